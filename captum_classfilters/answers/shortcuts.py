"""Which filters carry something that does not belong to the classes, and into which outputs."""

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.batches import dataset_names
from captum_classfilters._core.names import counted, listed_names
from captum_classfilters._core.provenance import provenance
from captum_classfilters._core.ranking import descending
from captum_classfilters._core.tables import Table, Tabular, short_repr
from captum_classfilters._core.types import ClassNames, Dataloader, JsonDict, Unpack
from captum_classfilters._core.warnings import warn
from captum_classfilters.answers.relabeling import Relabeling
from captum_classfilters.answers.sides import Marked, Side, read_sides
from captum_classfilters.class_filters import given_or_known_names, index_of_class
from captum_classfilters.heads.linear_head import LinearHead, scoring_head
from captum_classfilters.identify import false_discovery_adjusted

_SHOWN = 5  # filters and outputs that are printed
_FEW_PAIRS = 20  # fewer say nothing about how alike pairs are


@short_repr
@dataclass(frozen=True)
class Shortcuts(Tabular):
    r"""
    What changes in a model's head if images have something; prints as a table.

    Differences are means over pairs of images with it and without it; of groups, means within
    classes. Filters are the head's F inputs.

    Args:

        filter_change (Tensor): Shape (F,). How much each filter grows with it.
        filter_spread (Tensor): Shape (F,). Its standard deviation over images without it.
        filter_q (Tensor): Shape (F,). Adjusted p-values of changes beyond ``least`` spreads.
        output_change (Tensor): Shape (C,). How much each output's score grows with it, the mean over
                    the outputs taken off.
        output_spread (Tensor): Shape (C,). The same score's standard deviation without it.
        output_q (Tensor): Shape (C,). Adjusted p-values of changes beyond ``least`` spreads.
        predicted (Tensor): Shape (C, 2). Images for which an output is the largest, without and with.
        weight (Tensor): Shape (C, F). The head's.
        without, with_ (Side): What the head made of the images.
        paired (bool): Whether the images were pairs.
        class_names (tuple of str): C names.
        head (str): Dotted name of the head.
        least (float): Changes in spreads that are passed over.
        fdr (float): False discovery rate.
        provenance (dict): Where the numbers come from.
    """

    filter_change: Tensor
    filter_spread: Tensor
    filter_q: Tensor
    output_change: Tensor
    output_spread: Tensor
    output_q: Tensor
    predicted: Tensor
    weight: Tensor
    without: Side = field(repr=False)
    with_: Side = field(repr=False)
    paired: bool
    class_names: tuple[str, ...]
    head: str
    least: float
    fdr: float
    provenance: JsonDict = field(default_factory=dict)

    @cached_property
    def filters(self) -> Tensor:
        """Filters whose change (at the false discovery rate) adds to an output that it raises, the
        largest change in spreads first; none where no output rises."""
        adds = (self.contributions[self.outputs] > 0).any(0)
        found = (self.filter_q <= self.fdr) & adds
        order = descending(self.filter_change.abs() / self.filter_spread)
        return order[found[order]]

    @cached_property
    def outputs(self) -> Tensor:
        """Outputs that it raises (at the false discovery rate), those it wins most images for first."""
        raised = (self.output_q <= self.fdr) & (self.output_change > 0)
        change = self.output_change / self.output_spread
        shares = self.predicted / self.predicted.sum(0).clamp(min=1)
        order = descending(change)
        order = order[descending((shares[:, 1] - shares[:, 0])[order])]
        return order[raised[order]]

    @property
    def contributions(self) -> Tensor:
        """What each filter's change adds to each output's, (C, F); rows sum to
        :attr:`output_change` where the scores are the head's output."""
        return (self.weight - self.weight.mean(0)) * self.filter_change

    @arguments_checked
    def carriers(self, output: int | str, num_filters: int) -> Tensor:
        """The filters that carry it into an output, strongest first.

        Args:

            output (int or str): The output, by index or name.
            num_filters (int): How many, at most.

        Returns:
            *Tensor* of int64.

        Raises:
            ValueError: There is no such output.
        """
        row = self.contributions[index_of_class(output, self.class_names)]
        order = descending(row)[:num_filters]
        return order[row[order] > 0]

    def accuracy(self) -> tuple[float, float]:
        """Accuracy on the images without it and with it."""
        before, after = (
            float((side.predicted == side.labels).double().mean())
            for side in (self.without, self.with_)
        )
        return before, after

    def _tables(self) -> list[Table]:
        clean, marked = self.accuracy()
        before, after = (len(side.labels) for side in (self.without, self.with_))
        kind = (
            counted(before, "pair") if self.paired else f"{before:,} and {counted(after, 'image')}"
        )
        title = (
            f"carried by {len(self.filters)} of {counted(len(self.filter_q), 'filter')} of {self.head}, "
            f"into {len(self.outputs)} of {counted(len(self.output_q), 'output')}; accuracy "
            f"{clean:.4f} without it, {marked:.4f} with it, {kind}"
        )
        rows = [
            {
                "output": self.class_names[output],
                "change": self.output_change[output],
                "in spreads": self.output_change[output] / self.output_spread[output],
                "q": self.output_q[output],
                "taken for it without": self.predicted[output, 0],
                "taken for it with": self.predicted[output, 1],
                "filters that carry it": ", ".join(
                    map(str, self.carriers(output, _SHOWN).tolist())
                ),
            }
            for output in self.outputs.tolist()
        ]
        formats = {"change": "+.3g", "in spreads": "+.2f", "q": ".2g"}
        return [Table(rows, formats, title, bars=("change",))]


@arguments_checked
def find_shortcuts(
    model: nn.Module,
    dataloader: Dataloader,
    marked: Marked = None,
    *,
    paired: bool = True,
    head: nn.Module | str | None = None,
    class_names: ClassNames | None = None,
    fdr: float = 0.05,
    least: float = 0.8,
    permutations: int = 49_999,
    seed: int = 0,
    unpack: Unpack | None = None,
    show_progress: bool = True,
) -> Shortcuts:
    r"""
    Find the filters that carry something into outputs: a watermark, a ruler, a scanner's label.

    Images with it are compared with images without it, best as pairs of the same image. With
    :math:`z_k` the head's inputs and :math:`w_{ck}` its weights, a filter changes by
    :math:`d_k = \mathrm{mean}(z_k^{\text{with}} - z_k^{\text{without}})`, which adds
    :math:`w_{ck} d_k` to the score of output *c*. A change counts where it exceeds ``least`` standard
    deviations of the filter over images without it, and by more than chance: with that much taken
    off, signs of the pairs are turned at random (of groups, who has it is shuffled within classes).
    P-values are adjusted over the filters, and over the outputs, by Benjamini and Hochberg's procedure.
    With ``least=0`` any change that is not chance counts, of which re-encoding an image has many; 0.8 is
    what Cohen calls a large effect.

    Args:

        model (nn.Module): The model.
        dataloader (iterable): Batches of (inputs, labels) without it; or, if nothing else is given,
                    of pairs ((without, with), labels).
        marked (iterable or Callable, optional): Batches of the same images with it, in the same order;
                    or a function from images without it to images with it.
                    Default: None
        paired (bool): The images of the two loaders are the same. Otherwise they are two groups,
                    compared within classes.
                    Default: True
        head (nn.Module or str, optional): The head, or its dotted name; by default the last
                    linear layer.
                    Default: None
        class_names (sequence of str, optional): C names. By default those of the data set.
        fdr (float): False discovery rate of what is found.
                    Default: 0.05
        least (float): Changes of so many standard deviations are passed over.
                    Default: 0.8
        permutations (int): Number of relabelings to draw.
                    Default: 49,999
        seed (int): Of these.
                    Default: 0
        unpack (Callable, optional): From a batch of another kind to the pair (inputs, labels).
                    Default: None
        show_progress (bool): Show a progress bar.
                    Default: True

    Returns:
        *Shortcuts*, for :func:`repair`: changes and q-values of filters and outputs, and which filters
        carry what into which output.

    Raises:
        ValueError: Images are no pairs, or too few for a single finding among so many filters and
            outputs; or the head is not a plain linear layer that runs once.

    Examples::

        >>> import torch
        >>> from captum_classfilters.answers import find_shortcuts
        >>> net = torch.nn.Sequential(
        ...     torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 2))
        >>> with torch.no_grad():
        ...     _ = net[2].weight.copy_(torch.tensor([[1., 0., 0.], [0., 1., 4.]]))
        >>> images, labels = torch.rand(40, 3, 8, 8), torch.arange(40) % 2
        >>> def stamp(images):  # a bright corner in the third channel
        ...     images = images.clone()
        ...     images[:, 2, :4, :4] = 1
        ...     return images
        >>> found = find_shortcuts(net, [(images, labels)], stamp, show_progress=False)
        >>> found.filters, found.outputs
        (tensor([2]), tensor([1]))
    """
    _check_options(fdr, least, permutations)
    class_names, known = listed_names(class_names), dataset_names(dataloader)
    own, dataloader = scoring_head(
        model, dataloader, head, unpack=unpack, single=paired and marked is None, alone=False
    )
    without, with_ = read_sides(
        model,
        own,
        dataloader,
        marked,
        paired=paired,
        unpack=unpack,
        show_progress=show_progress,
    )
    if paired:
        _warn_unless_alike(without, with_)
    relabeling = _relabeling(without, with_, paired)
    num_classes = without.scores.shape[1]
    names = given_or_known_names(class_names, known, num_classes)
    _check_enough(relabeling, max(num_classes, without.features.shape[1]), fdr, permutations)

    def compared(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Changes, spreads and adjusted p-values."""
        values = high.double() - low.double() if paired else torch.cat([low, high])
        spread = low.double().std(0)
        p_values = relabeling.p_values(values, least * spread, permutations, seed)
        return relabeling.differences(values), spread, false_discovery_adjusted(p_values)

    filters = compared(without.features, with_.features)
    outputs = compared(_relative(without.scores), _relative(with_.scores))
    counts = [torch.bincount(s.predicted, minlength=num_classes) for s in (without, with_)]
    return Shortcuts(
        filter_change=filters[0],
        filter_spread=filters[1],
        filter_q=filters[2],
        output_change=outputs[0],
        output_spread=outputs[1],
        output_q=outputs[2],
        predicted=torch.stack(counts, 1),
        weight=_signed_weight(own).cpu().double(),
        without=without,
        with_=with_,
        paired=paired,
        class_names=names,
        head=own.name,
        least=least,
        fdr=fdr,
        provenance=provenance(model, options={"least": least, "fdr": fdr, "paired": paired}),
    )


def _warn_unless_alike(without: Side, with_: Side) -> None:
    """Warn if images are no nearer to their partners than to others of their class."""
    order = without.labels.argsort(stable=True)
    own, other = without.features[order].double(), with_.features[order].double()
    same = without.labels[order] == without.labels[order].roll(-1)

    def spread(change: Tensor) -> float:  # what the mark does to all images alike does not count
        return float((change - change.mean(0))[same].square().sum(1).mean())

    if int(same.sum()) >= _FEW_PAIRS and spread(other - own) > 0.8 * spread(
        other.roll(-1, 0) - own
    ):
        warn(
            "Images differ as much from their partners as from other images of their class, so these "
            "may be no pairs; give the same images in the same order, or say paired=False for two "
            "groups of different images."
        )


def _signed_weight(head: LinearHead) -> Tensor:
    """The head's weight (C, F); of a binary classifier's one output as two."""
    return torch.cat([-head.weight, head.weight]) if len(head.weight) == 1 else head.weight


def _relative(scores: Tensor) -> Tensor:
    """Scores with each image's mean taken off, which decides nothing."""
    return scores.double() - scores.double().mean(1, keepdim=True)


def _relabeling(without: Side, with_: Side, paired: bool) -> Relabeling:
    if paired:
        return Relabeling.of_pairs(len(without.labels))
    has = torch.cat([torch.zeros(len(without.labels)), torch.ones(len(with_.labels))])
    return Relabeling.of_groups(has, torch.cat([without.labels, with_.labels]))


def _check_options(fdr: float, least: float, permutations: int) -> None:
    if not 0 < fdr < 1:
        raise ValueError(f"fdr={fdr} must lie between 0 and 1.")
    if not 0 <= least < math.inf:
        raise ValueError(f"least={least} must be a number of standard deviations, 0 or more.")
    if permutations < 1:
        raise ValueError(f"permutations={permutations} must be at least 1.")


def _check_enough(relabeling: Relabeling, tests: int, fdr: float, permutations: int) -> None:
    """Refuse what could find nothing, whatever the images show."""
    needed = math.log2(tests / fdr) + 1
    if relabeling.bits < needed:
        raise ValueError(
            f"There are too few images: {len(relabeling.weights)} "
            + ("pairs" if relabeling.blocks is None else "images")
            + f" have 2^{relabeling.bits:.1f} relabelings, and a single finding among {tests:,} "
            f"filters or outputs at fdr={fdr} needs 2^{needed:.1f}: give at least "
            f"{math.ceil(needed)} pairs, or more images of classes that have both kinds."
        )
    if tests / (permutations + 1) > fdr:
        raise ValueError(
            f"permutations={permutations} are too few: a single finding among {tests:,} filters or "
            f"outputs at fdr={fdr} needs {math.ceil(tests / fdr) - 1:,}."
        )
