"""A small edit of a head against a shortcut, judged on other images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.heads import alike
from captum_classfilters._core.image_keys import image_keys
from captum_classfilters._core.names import counted
from captum_classfilters._core.ranking import descending, random_sets
from captum_classfilters._core.tables import Row, Table, Tabular, short_repr
from captum_classfilters._core.types import Dataloader, Unpack
from captum_classfilters._core.warnings import warn
from captum_classfilters.answers.head_edits import EditedHeads, HeadEdit, check_editable
from captum_classfilters.answers.shortcuts import Shortcuts
from captum_classfilters.answers.sides import Marked, SeenBatch, see_sides
from captum_classfilters.class_filters import index_of_class
from captum_classfilters.heads.linear_head import LinearHead, linear_head_of
from captum_classfilters.identify.accuracy_reduction import paired_interval

#: What is edited.
Edit: TypeAlias = Literal["weights", "filters", "directions", "oblique"]

_SHARE_OF_FILTERS = 0.05
_FILTERS_PER_DIRECTION = 50  # few filters have no directions to spare
_RIDGE = 0.1  # of the mean variance, for as many images as filters
_MOST_ROUNDS = 100  # of moving biases, which settle sooner unless images are alike
_FEWEST = 10  # images of a class that say how often it should be predicted


@short_repr
@dataclass(frozen=True)
class Repair(Tabular):
    r"""
    An edited model and what the edit does to images it was not made from; prints as a table.

    The first axis of the counts is for images without it and with it; the last for the model, the
    edited model, and each random edit of the same size.

    Args:

        model (nn.Module): A copy of the model with the edited head.
        edit (str): What was edited: ``"weights"``, ``"filters"``, ``"directions"``, ``"oblique"``; or
                    ``"layers"``, filters inside.
        removed (Tensor or None): Shape (C, F), bool. Entries of the head's weight that see a filter's
                    mean in its place; None for directions and layers.
        directions (Tensor or None): Shape (F, r). What the head does not see any more.
        outputs (tuple of str): Names of the outputs that the edit is about.
        right (Tensor): Shape (2, 2 + R). Images that are classified correctly.
        taken (Tensor): Shape (2, 2 + R). Images of other classes that are taken for ``outputs``.
        lost, gained (Tensor): Shape (2, 2). Images that are right, or taken, only before the edit
                    and only after it; rows as of ``right``, columns right and taken.
        counts (Tensor): Shape (2, 2). Images of all classes, and of classes other than ``outputs``.
        filters (dict or None): Of each layer the filters (k,) that :func:`repair_layers` changed.
    """

    model: nn.Module = field(repr=False)
    edit: str
    removed: Tensor | None
    directions: Tensor | None
    outputs: tuple[str, ...]
    right: Tensor
    taken: Tensor
    lost: Tensor
    gained: Tensor
    counts: Tensor
    filters: dict[str, Tensor] | None = None

    @property
    def size(self) -> int:
        """Entries of the weight, filters or directions that were edited."""
        if self.directions is not None:
            return self.directions.shape[1]
        if self.filters is not None:
            return sum(map(len, self.filters.values()))
        assert self.removed is not None
        return int(self.removed.sum() if self.edit == "weights" else self.removed.any(0).sum())

    @property
    def accuracy(self) -> Tensor:
        """Shares of images that are right, (2, 2 + R)."""
        return self.right.double() / self.counts[:, :1]

    @property
    def taken_rate(self) -> Tensor:
        """Shares of images of other classes that are taken for the outputs, (2, 2 + R)."""
        return self.taken.double() / self.counts[:, 1:]

    @property
    def gap_closed(self) -> Tensor:
        """Share of the accuracy that it costs which the edit, and each random one, gives back,
        (1 + R,); NaN where it costs none."""
        without, with_ = self.accuracy
        gap = without[0] - with_[0]
        return (with_[1:] - with_[0]) / gap if gap > 0 else torch.full_like(with_[1:], torch.nan)

    @arguments_checked
    def interval(self, confidence: float = 0.95) -> Tensor:
        """Tango's intervals of what the edit changes, in shares of images.

        Args:

            confidence (float): Coverage, between 0 and 1.
                        Default: 0.95

        Returns:
            *Tensor* of shape (2, 2, 2): without it and with it; accuracy and ``taken_rate``; ends.

        Raises:
            ValueError: ``confidence`` is out of range.
        """
        return paired_interval(self.gained, self.lost, self.counts, confidence)

    def _tables(self) -> list[Table]:
        interval = self.interval()
        told = self.outputs[0] if len(self.outputs) == 1 else counted(len(self.outputs), "output")
        measures = ((self.accuracy, "accuracy"), (self.taken_rate, f"taken for {told}"))
        rows: list[Row] = []
        for place, (shares, name) in enumerate(measures):
            for kind, where in ((0, "without it"), (1, "with it")):
                before, after, *random = shares[kind].tolist()
                rows.append(
                    {
                        "": f"{name}, {where}",
                        "before": before,
                        "after": after,
                        "change": after - before,
                        "low": interval[kind, place, 0],
                        "high": interval[kind, place, 1],
                        "random edits": sum(random) / len(random) if random else float("nan"),
                    }
                )
        formats = dict.fromkeys(("before", "after", "random edits"), ".4f")
        formats |= dict.fromkeys(("change", "low", "high"), "+.4f")
        closed = float(self.gap_closed[0])
        title = (
            f"{edited_units(self.edit, self.size)} edited, judged on "
            f"{counted(int(self.counts[0, 0]), 'other image')} "
            f"without it and {int(self.counts[1, 0]):,} with it"
        )
        notes = [] if closed != closed else [f"{closed:.0%} of the accuracy that it costs is back"]
        return [Table(rows, formats, title, notes=notes, bars=("change",))]


@torch.inference_mode(False)
@arguments_checked
def repair(
    model: nn.Module,
    shortcuts: Shortcuts,
    dataloader: Dataloader,
    marked: Marked = None,
    *,
    edit: Edit = "directions",
    size: int | None = None,
    outputs: int | str | Sequence[int | str] | None = None,
    rebalance: bool = False,
    repetitions: int = 20,
    seed: int = 0,
    unpack: Unpack | None = None,
    show_progress: bool = True,
) -> Repair:
    r"""
    Edit a model's head so that a shortcut loses its effect, and judge that on other images.

    What is edited sees the means :math:`\mu` of the images without it, in place of what a filter does:

    - ``"weights"``: in the rows of the outputs, the entries that carry most of it, as many as take
      the mean rise of the output back. The fewest numbers, for one output that wins too often.
    - ``"filters"``: whole filters, those whose change moves the outputs most,
      :math:`|d_k| \, \lVert w_k - \bar w \rVert`.
    - ``"directions"``: the main directions :math:`U` of the pairs' differences, taken out of the
      features, :math:`W (z - U U^\top (z - \mu))`; of groups only the mean difference is known;
    - ``"oblique"``: the same directions, read where images without it vary least,
      :math:`W (z - U V^\top (z - \mu))` with :math:`V = S^{-1} U (U^\top S^{-1} U)^{-1}` and *S* the
      covariance of the images without it, to whose diagonal a tenth of the mean variance is added for
      as many images as filters. It keeps what classes have of the directions: for many more images
      than filters, and where a class goes with it.

    All are another weight and bias for the head: nothing is trained, the model is left alone and
    its copy is as fast and exports as before. A class that goes with it in training is hardly
    predicted without it once that is taken out: ``rebalance`` moves the biases of the outputs, so that
    on the images without it that the shortcuts were found on each is predicted as often as it is the
    label. As a control, as many entries of the same rows, filters or directions are drawn at random,
    and rebalanced alike.

    Source: taking what is spurious out of a last layer by directions in its features follows Neuhaus
    et al.: *Spurious Features Everywhere -- Large-Scale Detection of Harmful Spurious Features in
    ImageNet*, ICCV 2023, whose directions are principal components of a class's images without pairs.

    Args:

        model (nn.Module): The model that the shortcuts were found in.
        shortcuts (Shortcuts): From :func:`find_shortcuts`.
        dataloader (iterable): Batches of (inputs, labels) without it, of *other* images; or of pairs
                    ((without, with), labels).
        marked (iterable or Callable, optional): The same with it, as for :func:`find_shortcuts`.
                    Default: None
        edit (str): ``"weights"``, ``"filters"``, ``"directions"`` or ``"oblique"``.
                    Default: "directions"
        size (int, optional): Entries for each output, filters, or directions. By default what takes
                    the mean rise back, 5 per cent of the filters, and a direction for every 50 filters, as
                    far as there are any.
                    Default: None
        outputs (int, str or sequence, optional): Outputs that the edit is about, by index or name. By default
                    those found that win images.
                    Default: None
        rebalance (bool): Move the outputs' biases as well.
                    Default: False
        repetitions (int): Random edits of the control.
                    Default: 20
        seed (int): Of these.
                    Default: 0
        unpack (Callable, optional): From a batch of another kind to the pair (inputs, labels).
                    Default: None
        show_progress (bool): Show a progress bar.
                    Default: True

    Returns:
        *Repair*: the edited ``model``; accuracy without it and with it and how often the outputs win
        images of other classes, before and after, with paired intervals and the control.

    A warning says if images without it or with it are surely right less often after the edit.

    Raises:
        ValueError: Nothing was found and no outputs are named, the images were used to find, the
            model's head is another one, or a number is out of range; or ``rebalance`` is asked for and
            fewer than 10 of the images are of an output's class, or scores are not the head's output.

    Examples::

        >>> import torch
        >>> from captum_classfilters.answers import find_shortcuts, repair
        >>> net = torch.nn.Sequential(
        ...     torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 2))
        >>> with torch.no_grad():
        ...     _ = net[2].weight.copy_(torch.tensor([[1., 0., 0.], [0., 1., 4.]]))
        >>> images, labels = torch.rand(80, 3, 8, 8), torch.arange(80) % 2
        >>> def stamp(images):  # a bright corner in the third channel
        ...     images = images.clone()
        ...     images[:, 2, :4, :4] = 1
        ...     return images
        >>> quiet = {"show_progress": False}
        >>> found = find_shortcuts(net, [(images[:40], labels[:40])], stamp, **quiet)
        >>> repaired = repair(
        ...     net, found, [(images[40:], labels[40:])], stamp, edit="weights", **quiet)
        >>> repaired.size, repaired.removed.nonzero().tolist()
        (1, [[1, 2]])
        >>> repaired.model[2].weight[1]
        tensor([0., 1., 0.], grad_fn=<SelectBackward0>)
    """
    if edit not in get_args(Edit):
        raise ValueError(f"edit={edit!r}; choose one of {', '.join(map(repr, get_args(Edit)))}.")
    if repetitions < 0:
        raise ValueError(f"repetitions={repetitions} must not be negative.")
    head = linear_head_of(model, shortcuts.head)
    check_editable(head)
    check_same_head(head, shortcuts)
    chosen = chosen_outputs(shortcuts, outputs)
    made = _edit(shortcuts, head, edit, size, chosen)
    edits = [made, *_random_edits(made, edit, repetitions, seed, shortcuts)]
    if rebalance:
        edits = [_rebalanced(one, head, shortcuts, chosen) for one in edits]
        made = edits[0]
    heads = EditedHeads(model, head, edits)
    judged = judged_counts(
        model, head, heads.answers, dataloader, marked, chosen, found_on(shortcuts),
        paired=shortcuts.paired, unpack=unpack, show_progress=show_progress,
    )  # fmt: skip
    result = Repair(
        made.edited(model, head),
        edit,
        made.removed,
        made.directions,
        tuple(shortcuts.class_names[output] for output in chosen),
        *judged,
    )
    warn_of_loss(result)
    return result


# -- what is edited --------------------------------------------------------------------------------


def _edit(
    shortcuts: Shortcuts, head: LinearHead, edit: Edit, size: int | None, outputs: list[int]
) -> HeadEdit:
    num_filters = head.weight.shape[1]
    of_directions = edit in ("directions", "oblique")
    directions = _directions(shortcuts) if of_directions else None
    most = num_filters if directions is None else directions.shape[1]
    if not most or not bool(shortcuts.filter_change.any()):
        raise ValueError(
            "The images with it have the same features as those without it, so there is nothing to edit."
        )
    if size is not None and not 1 <= size <= most:
        raise ValueError(f"size={size} is out of range; choose 1 to {edited_units(edit, most)}.")
    means = shortcuts.without.features.double().mean(0)
    if directions is not None:
        default = min(most, max(1, num_filters // _FILTERS_PER_DIRECTION))
        directions = directions[:, : default if size is None else size]
        return HeadEdit(means, directions=directions, readers=_readers(directions, edit, shortcuts))
    removed = torch.zeros(head.weight.shape, dtype=torch.bool)
    if edit == "filters":
        number = max(1, round(_SHARE_OF_FILTERS * num_filters)) if size is None else size
        apart = (shortcuts.weight - shortcuts.weight.mean(0)).norm(dim=0)
        removed[:, descending(shortcuts.filter_change.abs() * apart)[:number]] = True
        return HeadEdit(means, removed)
    # Of each output over the others, in the units of the head's own output.
    rises = shortcuts.weight @ shortcuts.filter_change
    rises = rises - rises.mean()
    if len(head.weight) > 1:  # what one output loses lowers the mean, too
        rises = rises * len(rises) / (len(rises) - 1)
    for output in outputs:  # the one row of a binary classifier is that of its second output
        carried = shortcuts.weight[output] * shortcuts.filter_change
        order = descending(carried)
        order = order[carried[order] > 0]
        number = _enough(carried[order], float(rises[output]))
        removed[output % len(removed), order[: number if size is None else size]] = True
    return HeadEdit(means, removed)


def _enough(carried: Tensor, rise: float) -> int:
    """How many of the largest entries take a rise back; all, if they do not."""
    reached = (carried.cumsum(0) >= rise).nonzero()[:, 0]
    return int(reached[0]) + 1 if len(reached) else len(carried)


def _directions(shortcuts: Shortcuts) -> Tensor:
    """Orthonormal directions (F, r) of what it does to the features, largest first: as many as there
    are beyond rounding."""
    if shortcuts.paired:
        changes = shortcuts.with_.features.double() - shortcuts.without.features.double()
    else:
        changes = shortcuts.filter_change[None]
    found = torch.linalg.svd(changes, full_matrices=False)
    rounding = max(changes.shape) * float(found.S[0]), float(shortcuts.without.features.norm())
    real = torch.finfo(torch.float32).eps * max(rounding) < found.S
    return found.Vh[real].T.contiguous()


def _readers(directions: Tensor, edit: Edit, shortcuts: Shortcuts) -> Tensor | None:
    """What reads directions (F, r) and varies least over images without it; for orthogonal ones None."""
    if edit != "oblique":
        return None
    features = shortcuts.without.features.double()
    apart = features - features.mean(0)
    covariance = apart.T @ apart / len(apart)
    ridge = _RIDGE * len(covariance) / len(apart) * covariance.diagonal().mean()
    covariance.diagonal().add_(ridge.clamp(min=1e-12))
    read = torch.linalg.solve(covariance, directions)
    return read @ torch.linalg.inv(directions.T @ read)


def _rebalanced(
    made: HeadEdit, head: LinearHead, shortcuts: Shortcuts, outputs: list[int]
) -> HeadEdit:
    """The same edit with biases that have classes predicted as often as they are labels."""
    side, weight = shortcuts.without, shortcuts.weight
    features, bias = side.features.double(), head.bias
    own = features @ weight.T + (0 if bias is None else bias.detach().cpu().double())
    rounded = (side.scores.dtype, side.features.dtype, head.weight.dtype)
    if len(head.weight) < 2 or not bool(alike(own, side.scores.double(), *rounded)):
        raise ValueError(
            f"rebalance moves biases of scores that are the output of {head.name!r}, one for each class; "
            "this model's scores are not. Leave rebalance out."
        )
    new_weight, new_bias = (part.cpu().double() for part in made.weight_and_bias(head))
    logits, shift = features @ new_weight.T + new_bias, torch.zeros(len(new_bias)).double()
    wanted = side.labels.bincount(minlength=len(shift))
    for output in outputs:
        number = int(wanted[output])
        if not _FEWEST <= number < len(features):
            raise ValueError(
                f"{number} of the {len(features)} images that the shortcuts were found on are of class "
                f"{shortcuts.class_names[output]!r}, so how often it should be predicted is not known; "
                f"give {_FEWEST} or more, and images of other classes, or leave rebalance out."
            )
    for _ in range(_MOST_ROUNDS):  # an output that moves takes images from those moved before
        predicted = (logits + shift).argmax(1).bincount(minlength=len(shift))
        if torch.equal(predicted[outputs], wanted[outputs]):
            break
        for output in outputs:
            others = logits + shift
            others[:, output] = -torch.inf
            needed = (others.amax(1) - logits[:, output]).sort().values
            number = int(wanted[output])
            shift[output] = (needed[number - 1] + needed[number]) / 2
    return replace(made, shift=shift)


def _random_edits(
    made: HeadEdit, edit: Edit, repetitions: int, seed: int, shortcuts: Shortcuts
) -> list[HeadEdit]:
    """As many entries of the same rows, filters or directions at random."""
    generator = torch.Generator().manual_seed(seed)
    if made.directions is not None:
        shape = (repetitions, *made.directions.shape)
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        sets_of = [torch.linalg.qr(one).Q for one in drawn]
        return [
            HeadEdit(made.means, directions=one, readers=_readers(one, edit, shortcuts))
            for one in sets_of
        ]
    assert made.removed is not None
    if edit == "filters":
        sets = random_sets(made.removed[:1], repetitions, seed).expand(-1, len(made.removed), -1)
    else:
        sets = random_sets(made.removed, repetitions, seed)
    return [HeadEdit(made.means, removed) for removed in sets]


# -- how it is judged ------------------------------------------------------------------------------


def judged_counts(
    model: nn.Module,
    head: LinearHead,
    answers_of: Callable[[SeenBatch], Tensor],
    dataloader: Dataloader,
    marked: Marked,
    outputs: list[int],
    used: set[int],
    *,
    paired: bool,
    unpack: Unpack | None,
    show_progress: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Counts right and taken (2, 2 + R), lost and gained (2, 2), and images (2, 2), of the classes
    (1 + E, N) that the model and each edited one predict; of images that were not ``used``."""
    rates: list[Tensor | int] = [0, 0]  # (2, 1 + E), right and taken
    lost, gained, counts = torch.zeros(3, 2, 2, dtype=torch.int64)
    wanted = torch.tensor(outputs, dtype=torch.int64)

    def take(seen: SeenBatch) -> None:
        check_new(seen, used)
        kind, labels = seen.kind, seen.labels.cpu()
        answers = answers_of(seen)
        is_right = answers == labels
        others = ~torch.isin(labels, wanted)
        is_taken = torch.isin(answers, wanted) & others
        rates[kind] = rates[kind] + torch.stack([is_right.sum(1), is_taken.sum(1)])
        for place, holds in enumerate((is_right, is_taken)):
            lost[kind, place] += (holds[0] & ~holds[1]).sum()
            gained[kind, place] += (holds[1] & ~holds[0]).sum()
        counts[kind] += torch.stack([torch.tensor(len(labels)), others.sum()])

    see_sides(
        model, head, dataloader, marked, take,
        paired=paired, unpack=unpack, show_progress=show_progress,
    )  # fmt: skip
    right, taken = torch.stack([torch.as_tensor(rate) for rate in rates], 1)
    return right, taken, lost, gained, counts


def chosen_outputs(
    shortcuts: Shortcuts, outputs: int | str | Sequence[int | str] | None
) -> list[int]:
    if outputs is not None:
        given = [outputs] if isinstance(outputs, (int, str)) else outputs
        chosen = [index_of_class(output, shortcuts.class_names) for output in given]
        if not chosen:
            raise ValueError("outputs is empty; name at least one, or leave it out.")
        return list(dict.fromkeys(chosen))
    found = shortcuts.outputs
    wins = shortcuts.predicted[found, 1] > shortcuts.predicted[found, 0]
    if not len(found):
        raise ValueError(
            f"Nothing was found to repair: no output rises by more than {shortcuts.least} standard "
            f"deviations at fdr={shortcuts.fdr}. To edit all the same, name outputs."
        )
    return list((found[wins] if bool(wins.any()) else found[:1]).tolist())


def warn_of_loss(result: Repair) -> None:
    """Warn if images are surely right less often after the edit than before."""
    for accuracy, ends, where in zip(
        result.accuracy, result.interval()[:, 0], ("without it", "with it"), strict=True
    ):
        (before, after), (low, high) = accuracy[:2].tolist(), ends.tolist()
        if high < 0:
            warn(
                f"The edit of {edited_units(result.edit, result.size)} lowers the accuracy of images {where} "
                f"from {before:.3f} to {after:.3f} (95 % interval of the change {low:+.3f} to {high:+.3f}); "
                "try a smaller size or another edit."
            )


def check_same_head(head: LinearHead, shortcuts: Shortcuts) -> None:
    own = head.weight.cpu().double()
    if own.shape[1] != shortcuts.weight.shape[1] or not torch.equal(
        own, shortcuts.weight[-len(own) :]
    ):
        raise ValueError(
            f"The head {head.name!r} of this model has another weight than the one that the shortcuts "
            "were found in; find them in this model."
        )


def found_on(shortcuts: Shortcuts) -> set[int]:
    """Fingerprints of the images that shortcuts were found on."""
    sides = (shortcuts.without, shortcuts.with_)
    return {key for side in sides for key in side.fingerprints.tolist()}


def check_new(seen: SeenBatch, used: set[int]) -> None:
    keys = image_keys(seen.inputs).tolist()
    known = [place for place, key in enumerate(keys) if key in used]
    if known:
        raise ValueError(
            f"{len(known)} of the {len(keys)} images of batch {seen.batch.number}, image "
            f"{seen.batch.first_image + known[0]} first, were used to find what to edit, or are equal "
            "to such; judge the repair on others."
        )


def edited_units(edit: str, size: int) -> str:
    """What an edit of this size edits, in words."""
    if edit == "weights":
        return f"{counted(size, 'weight')} of the head"
    return counted(size, {"filters": "filter", "layers": "inner filter"}.get(edit, "direction"))
