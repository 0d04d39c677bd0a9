"""A small edit of a head that turns a cell of the confusion matrix right, judged on other images."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.batches import dataset_names
from captum_classfilters._core.names import counted
from captum_classfilters._core.ranking import descending, random_sets
from captum_classfilters._core.tables import Table, Tabular, short_repr
from captum_classfilters._core.types import ClassNames, Dataloader, Unpack
from captum_classfilters.answers.head_edits import EditedHeads, HeadEdit, check_editable
from captum_classfilters.answers.repair import check_new
from captum_classfilters.answers.sides import Kept, SeenBatch, Side, see_loader
from captum_classfilters.class_filters import given_or_known_names, index_of_class
from captum_classfilters.heads.linear_head import LinearHead, scoring_head
from captum_classfilters.identify.accuracy_reduction import paired_interval

_LARGEST_SHARE = 0.2  # of the two rows' entries that are tried


@short_repr
@dataclass(frozen=True)
class ConfusionRepair(Tabular):
    r"""
    An edited model, and what the edit turns right and wrong; prints as a table.

    The rows of the counts are images of the true class taken for the predicted one, images of the
    true class that are right, of the predicted class that are right, of all others that are right,
    and of all classes that are right. Columns are the model, the edited model, the model with the
    predicted class's bias lowered instead, and each random edit of the same size.

    Args:

        model (nn.Module): A copy of the model with the edited head; with its own head, and nothing in
                    ``removed``, where no edit was found.
        removed (Tensor): Shape (C, F), bool. Entries of the head's weight that see a filter's mean in
                    its place.
        true, predicted (str): The classes.
        hits (Tensor): Shape (5, 3 + R). How many images.
        lost, gained (Tensor): Shape (5,). Counted only before the edit, and only after it.
        counts (Tensor): Shape (5,). Images in all, of the row's classes.
    """

    model: nn.Module = field(repr=False)
    removed: Tensor
    true: str
    predicted: str
    hits: Tensor
    lost: Tensor
    gained: Tensor
    counts: Tensor

    @property
    def shares(self) -> Tensor:
        """The counts as shares of the row's images, (5, 3 + R); NaN where there are none."""
        return self.hits.double() / self.counts[:, None]

    @arguments_checked
    def interval(self, confidence: float = 0.95) -> Tensor:
        """Tango's intervals of what the edit changes, in shares of the row's images.

        Args:

            confidence (float): Coverage, between 0 and 1.
                        Default: 0.95

        Returns:
            *Tensor* of shape (5, 2).

        Raises:
            ValueError: ``confidence`` is out of range.
        """
        return paired_interval(self.gained, self.lost, self.counts, confidence)

    def _tables(self) -> list[Table]:
        names = (
            f"{self.true} taken for {self.predicted}",
            f"{self.true} right",
            f"{self.predicted} right",
            "other classes right",
            "all right",
        )
        interval = self.interval()
        rows = [
            {
                "": name,
                "images": self.counts[row],
                "before": self.shares[row, 0],
                "after": self.shares[row, 1],
                "change": self.shares[row, 1] - self.shares[row, 0],
                "low": interval[row, 0],
                "high": interval[row, 1],
                "bias instead": self.shares[row, 2],
                "random edits": self.shares[row, 3:].mean(),
            }
            for row, name in enumerate(names)
        ]
        formats = dict.fromkeys(("before", "after", "bias instead", "random edits"), ".4f")
        formats |= dict.fromkeys(("change", "low", "high"), "+.4f")
        title = f"{counted(int(self.removed.sum()), 'weight')} of the head edited, judged on other images"
        if not bool(self.removed.any()):
            title = (
                "The model is unchanged: of the edits that were tried, none turns more of the cell's images "
                "right than it turns others wrong"
            )
        notes = []
        if bool(self.removed.any()) and self.gained[4] <= self.lost[4]:
            notes = [
                f"no gain on other images: {int(self.gained[4]):,} turn right, {int(self.lost[4]):,} wrong"
            ]
        return [Table(rows, formats, title, notes=notes, bars=("change",))]


@arguments_checked
@torch.inference_mode(False)
def repair_confusion(
    model: nn.Module,
    dataloader: Dataloader,
    judged: Dataloader,
    true: int | str,
    predicted: int | str,
    *,
    head: nn.Module | str | None = None,
    class_names: ClassNames | None = None,
    size: int | None = None,
    repetitions: int = 20,
    seed: int = 0,
    unpack: Unpack | None = None,
    show_progress: bool = True,
) -> ConfusionRepair:
    r"""
    Edit a head so that images of one class are no longer taken for another, and see what that costs.

    Candidates are the entries of the two classes' rows of the weight; an edited one sees its filter's
    mean :math:`\mu_k` in place of the filter. With :math:`p` the probabilities and *y* the labels,
    an edit saves, to first order, this much cross-entropy on some images:

    .. math:: \sum_n (p_{nc} - [y_n = c]) \, w_{ck} (z_{nk} - \mu_k)

    Entries are ordered by what they save on the cell's images, less what they cost on all others; as
    many of the first are edited as turn most images of the cell right, less those of all that turn
    wrong. Other images judge. Beside it stand the best lowering of the predicted class's bias, a single
    number, and random entries of the same rows.

    Args:

        model (nn.Module): The model.
        dataloader (iterable): Batches of (inputs, labels) to find the edit on.
        judged (iterable): Batches of *other* images to judge it on.
        true (int or str): The images' own class, by index, or by name where names are known.
        predicted (int or str): The class that they are taken for.
        head (nn.Module or str, optional): The head, or its dotted name; by default the last
                    linear layer.
                    Default: None
        class_names (sequence of str, optional): C names. By default those of the data set.
        size (int, optional): How many entries to edit, also where that turns more wrong than right.
                    Default: None
        repetitions (int): Random edits of the control.
                    Default: 20
        seed (int): Of these.
                    Default: 0
        unpack (Callable, optional): From a batch of another kind to the pair (inputs, labels).
                    Default: None
        show_progress (bool): Show a progress bar.
                    Default: True

    Returns:
        *ConfusionRepair*: the edited ``model`` and its table.

    Raises:
        ValueError: The classes are the same or unknown, no image is in the cell, the images to judge
            on were used, or the head is not a plain linear layer of one output for each class.

    Examples::

        >>> import torch
        >>> from captum_classfilters.answers import repair_confusion
        >>> net = torch.nn.Sequential(
        ...     torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 2))
        >>> with torch.no_grad():
        ...     _ = net[2].weight.copy_(torch.tensor([[4., 0., 0.], [0., 4., 3.]]))
        >>> images, labels = torch.rand(80, 3, 2, 2), torch.arange(80) % 2
        >>> images[torch.arange(80), labels] += .3
        >>> data = list(zip(images.split(40), labels.split(40)))
        >>> fixed = repair_confusion(net, data[:1], data[1:], 0, 1, size=1, show_progress=False)
        >>> int(fixed.removed.sum())  # of the six weights
        1
    """
    own, dataloader = scoring_head(model, dataloader, head, unpack=unpack, alone=False)
    check_editable(own)
    if len(own.weight) < 2:
        raise ValueError("The head has one output, whose threshold decides; move its bias instead.")
    kept = Kept()
    options = {"unpack": unpack, "show_progress": show_progress}
    see_loader(model, own, dataloader, kept.add, **options)  # type: ignore[arg-type]
    seen = kept.side()
    known = dataset_names(dataloader)
    names = given_or_known_names(class_names, known, seen.scores.shape[1])
    pair = index_of_class(true, names), index_of_class(predicted, names)
    _check_cell(seen, pair, names)
    found, most = _Search(seen, own, pair), 2 * own.weight.shape[1]
    if size is not None and not 1 <= size <= most:
        raise ValueError(f"size={size} is out of range; choose 1 to {most} entries.")
    if repetitions < 0:
        raise ValueError(f"repetitions={repetitions} must not be negative.")
    made = found.edit(size)
    assert made.removed is not None
    sets = random_sets(made.removed[list(pair)].flatten()[None], repetitions, seed)
    edits = [made, found.bias()]
    for chosen in sets:
        removed = torch.zeros_like(made.removed)
        removed[list(pair)] = chosen.reshape(2, -1)
        edits.append(HeadEdit(made.means, removed))
    counter = _Counter(EditedHeads(model, own, edits), seen, pair)
    see_loader(model, own, judged, counter.add, **options)  # type: ignore[arg-type]
    edited = made.edited(model, own)
    counts = (counter.hits, counter.lost, counter.gained, counter.counts)
    return ConfusionRepair(edited, made.removed, names[pair[0]], names[pair[1]], *counts)


class _Search:
    """The edits that turn most right on the images that they are found on."""

    def __init__(self, seen: Side, head: LinearHead, pair: tuple[int, int]) -> None:
        weight = head.weight.cpu().double()
        self.pair, self.labels, self.weight = pair, seen.labels, weight
        self.means = seen.features.double().mean(0)
        self.logits = _logits(seen, head)
        apart = seen.features.double() - self.means
        wrong = self.logits.softmax(1)
        wrong[torch.arange(len(wrong)), seen.labels] -= 1
        rows = torch.tensor(pair)
        #: What each entry of the two rows adds to its output, (2, N, F).
        self.parts = weight[rows][:, None] * apart
        answers = self.logits.argmax(1)
        self.cell = (seen.labels == pair[0]) & (answers == pair[1])
        self.right = answers == seen.labels
        saved = [
            torch.einsum("nr,rnf->rf", wrong[images][:, rows], self.parts[:, images])
            for images in (self.cell, ~self.cell)
        ]
        #: What the cell's images gain without each entry, less what others lose, (2, F).
        self.saved = saved[0] + saved[1].clamp(max=0)

    def edit(self, size: int | None) -> HeadEdit:
        """The edit of so many entries, or of the number that turns most right; of none without gain."""
        order = descending(self.saved.flatten())
        if size is None:
            most = max(1, round(_LARGEST_SHARE * len(order)))
            sizes = sorted({round(1.3**step) for step in range(64) if 1.3**step <= most})
            nets = torch.stack([self._net(self._without(order[:number])) for number in sizes])
            size = sizes[int(nets.argmax())] if bool((nets > 0).any()) else 0
        removed = torch.zeros(self.weight.shape, dtype=torch.bool)
        rows = torch.zeros(2, self.weight.shape[1], dtype=torch.bool)
        rows.view(-1)[order[:size]] = True
        removed[list(self.pair)] = rows
        return HeadEdit(self.means, removed)

    def bias(self) -> HeadEdit:
        """The lowering of the predicted class's bias that turns most right."""
        margins = self.logits[:, self.pair[1]] - self.logits[:, self.pair[0]]
        steps = margins[self.cell].quantile(torch.linspace(0, 1, 21).double()) + 1e-6
        nets = []
        for step in steps.tolist():
            logits = self.logits.clone()
            logits[:, self.pair[1]] -= step
            nets.append(self._net(logits))
        shift = torch.zeros(len(self.weight), dtype=torch.float64)
        shift[self.pair[1]] = -steps[int(torch.stack(nets).argmax())]
        return HeadEdit(self.means, shift=shift)

    def _without(self, entries: Tensor) -> Tensor:
        """Logits if some entries see means."""
        logits, width = self.logits.clone(), self.weight.shape[1]
        for row, output in enumerate(self.pair):
            own = entries[entries // width == row] % width
            logits[:, output] -= self.parts[row][:, own].sum(1)
        return logits

    def _net(self, logits: Tensor) -> Tensor:
        """How many images of the cell turn right, less those of all that turn wrong."""
        right = logits.argmax(1) == self.labels
        return (right & self.cell).sum() - (self.right & ~right).sum()


def _logits(seen: Side, head: LinearHead) -> Tensor:
    """The head's own output (N, C), in whose units its weight and bias are, where the model answers by it;
    else what the model's scores say."""
    bias = 0 if head.bias is None else head.bias.cpu().double()
    own = seen.features.double() @ head.weight.cpu().double().T + bias
    return own if torch.equal(own.argmax(1), seen.predicted) else seen.log_probabilities.double()


class _Counter:
    """Counts of images, batch by batch."""

    def __init__(self, heads: EditedHeads, seen: Side, pair: tuple[int, int]) -> None:
        self.heads, self.pair = heads, pair
        self._used = set(seen.fingerprints.tolist())
        self.hits = torch.zeros(5, 1 + len(heads.heads), dtype=torch.int64)
        self.lost, self.gained, self.counts = torch.zeros(3, 5, dtype=torch.int64)

    def add(self, seen: SeenBatch) -> None:
        """Add a batch."""
        check_new(seen, self._used)
        labels, answers = seen.labels.cpu(), self.heads.answers(seen)
        true, predicted = (labels == class_ for class_ in self.pair)
        right = answers == labels
        rows = (
            (true, answers == self.pair[1]),
            (true, right),
            (predicted, right),
            (~true & ~predicted, right),
            (torch.ones_like(true), right),
        )
        for place, (images, holds) in enumerate(rows):
            own = holds[:, images]
            self.hits[place] += own.sum(1)
            self.lost[place] += (own[0] & ~own[1]).sum()
            self.gained[place] += (own[1] & ~own[0]).sum()
            self.counts[place] += images.sum()


def _check_cell(seen: Side, pair: tuple[int, int], names: Sequence[str]) -> None:
    if pair[0] == pair[1]:
        raise ValueError(f"Both classes are {names[pair[0]]!r}; give two different ones.")
    cell = (seen.labels == pair[0]) & (seen.predicted == pair[1])
    if not bool(cell.any()):
        raise ValueError(
            f"No image of class {names[pair[0]]!r} was taken for {names[pair[1]]!r}, so there is nothing to "
            "repair; confusion_filters(...).largest() lists the cells that have images."
        )
