"""Which filters separate two classes, and which drive a cell of the confusion matrix."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from captum.attr import LayerAttribution
from torch import Tensor

from captum_classfilters._core.arguments import arguments_checked, check_confidence
from captum_classfilters._core.batches import Batch, dataset_names, of_few, read_batches
from captum_classfilters._core.labels import labels_of_scores
from captum_classfilters._core.names import counted, listed_names
from captum_classfilters._core.provenance import provenance
from captum_classfilters._core.score_reader import ScoreReader
from captum_classfilters._core.tables import Table, Tabular, import_pandas, short_repr
from captum_classfilters._core.types import (
    AttributeKwargs,
    ClassNames,
    Dataloader,
    JsonDict,
    Unpack,
)
from captum_classfilters.class_filters import given_or_known_names, index_of_class
from captum_classfilters.identify.evidence_sources import Reduction, Source, sources_of
from captum_classfilters.identify.new_sums import new_sums

if TYPE_CHECKING:
    import pandas

    from captum_classfilters.identify.statistics import ClassFilterSums


_SHOWN = 5  # filters of each side that are printed


@short_repr
@dataclass(frozen=True)
class FilterContrast(Tabular):
    r"""
    Evidence of each filter for one class against another.

    Args:

        favored (str): Name of the class that positive scores speak for.
        against (str): Name of the class that negative scores speak for.
        scores (Tensor): Shape (K,).
        standard_errors (Tensor): Shape (K,). NaN where there are too few images.
        degrees_of_freedom (Tensor): Shape (K,), of the intervals.
        margin (float): The difference of the two logits that the scores share out among the filters.
        num_images (int): Number of images behind it.
        layer (str): Dotted name of the layer.
        method (str): Name of the method.
        provenance (dict): Where the numbers come from.
    """

    favored: str
    against: str
    scores: Tensor
    standard_errors: Tensor
    degrees_of_freedom: Tensor
    margin: float
    num_images: int
    layer: str = ""
    method: str = ""
    provenance: JsonDict = field(default_factory=dict)

    @property
    def unexplained(self) -> float:
        """What the scores miss of the margin; with an exact method at a linear head only biases."""
        return self.margin - float(self.scores.sum())

    @arguments_checked
    def interval(self, confidence: float = 0.95, simultaneous: bool = False) -> Tensor:
        r"""
        Intervals of the mean evidence, by Student's distribution.

        Args:

            confidence (float): Coverage, between 0 and 1.
                        Default: 0.95
            simultaneous (bool): Cover all K filters at once (Bonferroni), as needed to point out
                        filters after looking at all of them.
                        Default: False

        Returns:
            *Tensor* of shape (K, 2); NaN where there are too few images.

        Raises:
            ValueError: ``confidence`` is out of range.
        """
        from scipy.stats import t

        check_confidence(confidence)
        tail = (1 - confidence) / 2 / (len(self.scores) if simultaneous else 1)
        reach = torch.as_tensor(t.isf(tail, self.degrees_of_freedom.numpy()))
        reach = reach * self.standard_errors
        return torch.stack([self.scores - reach, self.scores + reach], dim=1)

    @arguments_checked
    def strongest(self, num_filters: int) -> Tensor:
        """The filters that speak most for :attr:`favored`, best first; ties to the lower index.

        Args:

            num_filters (int): How many.

        Returns:
            *Tensor* of int64.
        """
        order = self.scores.sort(descending=True, stable=True).indices
        return order[: self._checked(num_filters)]

    @arguments_checked
    def opposing(self, num_filters: int) -> Tensor:
        """The filters that speak most for :attr:`against`, strongest first.

        Args:

            num_filters (int): How many.

        Returns:
            *Tensor* of int64.
        """
        return self.scores.sort(stable=True).indices[: self._checked(num_filters)]

    @arguments_checked
    def to_pandas(self, confidence: float = 0.95) -> "pandas.DataFrame":
        """One row for each filter, strongest first. Needs the extra ``pandas``.

        Args:

            confidence (float): Of the intervals.
                        Default: 0.95

        Returns:
            *pandas.DataFrame*.
        """
        order = self.scores.sort(descending=True, stable=True).indices
        low, high = self.interval(confidence)[order].unbind(1)
        columns = {"filter": order, "score": self.scores[order], "low": low, "high": high}
        frame: pandas.DataFrame = import_pandas().DataFrame(
            {title: values.numpy() for title, values in columns.items()}
        )
        return frame

    def _tables(self) -> list[Table]:
        few = min(_SHOWN, len(self.scores))
        ends = [*self.strongest(few).tolist(), *self.opposing(few).flip(0).tolist()]
        interval = self.interval()
        rows = [
            {
                "filter": index,
                "evidence": self.scores[index],
                "low": interval[index, 0],
                "high": interval[index, 1],
            }
            for index in dict.fromkeys(ends)
        ]
        title = (
            f"{self.favored} rather than {self.against}: margin {self.margin:.3g}, "
            f"{counted(self.num_images, 'image')}, {self.method} at {self.layer}"
        )
        return [Table(rows, dict.fromkeys(("evidence", "low", "high"), ".3g"), title)]

    def _checked(self, num_filters: int) -> int:
        if not 1 <= num_filters <= len(self.scores):
            raise ValueError(
                f"num_filters={num_filters} is out of range; choose 1 to {len(self.scores)}."
            )
        return num_filters


@short_repr
@dataclass(frozen=True)
class ConfusionFilters(Tabular):
    r"""
    For each kind of error that occurred, the filters that drive it.

    Args:

        confusion (Tensor): Shape (C, C), int64. Images of class i predicted as class j.
        class_names (tuple of str): C names.
        cells (dict): From (true, predicted) indices to *FilterContrast*: evidence for the predicted
                    class minus evidence for the true one, on the images of that cell. Only cells
                    with images are there.
    """

    confusion: Tensor
    class_names: tuple[str, ...]
    cells: dict[tuple[int, int], FilterContrast]

    def _tables(self) -> list[Table]:
        rows = []
        for true, predicted in self.largest(len(self.cells)):
            cell = self.cells[true, predicted]
            strongest = cell.strongest(min(_SHOWN, len(cell.scores))).tolist()
            rows.append(
                {
                    "class": self.class_names[true],
                    "taken for": self.class_names[predicted],
                    "images": cell.num_images,
                    "margin": cell.margin,
                    "filters that drive it": ", ".join(map(str, strongest)),
                }
            )
        right, total = int(self.confusion.diagonal().sum()), int(self.confusion.sum())
        return [
            Table(rows, title=f"{right:,} of {counted(total, 'image')} right", bars=("images",))
        ]

    def cell(self, true: int | str, predicted: int | str) -> FilterContrast:
        """The filters behind one cell.

        Args:

            true (int or str): Index or name of the images' own class.
            predicted (int or str): Index or name of the class they are taken for.

        Returns:
            *FilterContrast*.

        Raises:
            ValueError: There is no such class, or no image in that cell.
        """
        key = index_of_class(true, self.class_names), index_of_class(predicted, self.class_names)
        if key not in self.cells:
            names = self.class_names[key[0]], self.class_names[key[1]]
            raise ValueError(f"No image of class {names[0]!r} was taken for {names[1]!r}.")
        return self.cells[key]

    @arguments_checked
    def largest(self, number: int = 10) -> list[tuple[int, int]]:
        """The most frequent errors, as (true, predicted).

        Args:

            number (int): At most how many.
                        Default: 10

        Returns:
            *list of tuple*; equal counts in the order of the classes.
        """
        order = sorted(self.cells, key=lambda cell: (-self.cells[cell].num_images, cell))
        return order[:number]


def contrast_classes(
    method: LayerAttribution,
    dataloader: Dataloader,
    favored: int | str,
    against: int | str,
    *,
    class_names: ClassNames | None = None,
    reduction: Reduction = "sum",
    attribute_kwargs: AttributeKwargs | None = None,
    attribute_to_layer_input: bool = False,
    unpack: Unpack | None = None,
    device: torch.device | str | None = None,
    show_progress: bool = True,
) -> FilterContrast:
    r"""
    Find the filters that separate class *a* from class *b*.

    With :math:`e_k(x; c)` the evidence of filter *k* for class *c*, the evidence for *a* rather than
    *b* is compared between the images of the two classes:

    .. math:: s_k = \mathrm{mean}_{x \in a} [e_k(x; a) - e_k(x; b)]
              - \mathrm{mean}_{x \in b} [e_k(x; a) - e_k(x; b)]

    A filter scores if it raises the margin on one class's images or lowers it on the other's;
    evidence that all images share cancels. With contributions at a linear head the scores sum
    to the difference of the two classes' mean margins exactly, since biases cancel too.
    Intervals are Welch's, for two samples of different variance.

    Args:

        method (LayerAttribution): A method whose evidence depends on the target, on one layer.
        dataloader (iterable): Batches of (inputs, labels); images of other classes are passed over.
        favored (int or str): Class *a*, by index, or by name where names are known.
        against (int or str): Class *b*.
        class_names (sequence of str, optional): C names. By default those of the data set.
        reduction, attribute_kwargs, attribute_to_layer_input, unpack, device, show_progress: As for
                    :func:`identify_class_filters`.

    Returns:
        *FilterContrast*.

    Raises:
        ValueError: The classes are the same or unknown, one has fewer than two images, the model
                    returns NaN or Inf, or the method's evidence does not depend on the target.

    Examples::

        >>> import torch
        >>> from captum_classfilters import LayerFilterContribution
        >>> from captum_classfilters.identify import contrast_classes
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        ...     torch.nn.Flatten(), torch.nn.Linear(8, 3))
        >>> data = [(torch.rand(12, 3, 6, 6), torch.arange(12) % 3)]
        >>> contrast = contrast_classes(
        ...     LayerFilterContribution(net, "1"), data, 0, 2, show_progress=False)
        >>> contrast.strongest(3).shape, abs(contrast.unexplained) < 1e-5
        (torch.Size([3]), True)
    """
    pass_ = _Pass(method, reduction, attribute_kwargs, attribute_to_layer_input, unpack, device)
    class_names, known = listed_names(class_names), dataset_names(dataloader)
    sums: ClassFilterSums | None = None
    names: tuple[str, ...] = ()
    pair: list[int] = []
    for batch, labels, outputs in pass_.batches(dataloader, show_progress):
        if not pair:
            names = given_or_known_names(class_names, known, outputs.shape[1])
            pair = [index_of_class(favored, names), index_of_class(against, names)]
            if pair[0] == pair[1]:
                raise ValueError(f"Both classes are {names[pair[0]]!r}; give two different ones.")
        ours = (labels == pair[0]) | (labels == pair[1])
        if not bool(ours.any()):
            continue
        for_, against_ = (torch.full((int(ours.sum()),), class_) for class_ in pair)
        rows = pass_.difference(batch, outputs, ours, for_, against_)
        sums = new_sums(2, rows.shape[1]) if sums is None else sums
        sums.update(rows, (labels[ours] == pair[1]).long())
    if sums is None or int(sums.count.min()) < 2:
        counts = [0, 0] if sums is None else sums.count.tolist()
        raise ValueError(
            f"The loader has {counts[0]} images of class {names[pair[0]]!r} and {counts[1]} of "
            f"{names[pair[1]]!r}; two of each are needed at least."
        )
    values = sums.tables()
    scores = values["mean"][0] - values["mean"][1]
    variances = values["standard_error"] ** 2
    freedom = variances.sum(0) ** 2 / (variances**2 / (values["count"][:, None] - 1)).sum(0)
    return FilterContrast(
        favored=names[pair[0]],
        against=names[pair[1]],
        scores=scores[:-1],
        standard_errors=variances.sum(0).sqrt()[:-1],
        # Without any variance, of a dead filter say, the interval is a point for every number.
        degrees_of_freedom=freedom.nan_to_num(1.0)[:-1],
        margin=float(scores[-1]),
        num_images=int(values["count"].sum()),
        layer=pass_.source.layer_name,
        method=pass_.source.name,
        provenance=pass_.provenance,
    )


def confusion_filters(
    method: LayerAttribution,
    dataloader: Dataloader,
    *,
    class_names: ClassNames | None = None,
    reduction: Reduction = "sum",
    attribute_kwargs: AttributeKwargs | None = None,
    attribute_to_layer_input: bool = False,
    unpack: Unpack | None = None,
    device: torch.device | str | None = None,
    show_progress: bool = True,
) -> ConfusionFilters:
    r"""
    Find the filters behind every kind of error.

    For the images of class *i* that are taken for class *j*, filter *k* gets the mean of its evidence
    for the predicted class minus that for the true one,

    .. math:: s_k = \mathrm{mean}_{x: y = i, \hat y = j} [e_k(x; j) - e_k(x; i)]

    Filters with large scores drive the confusion, those with negative ones speak against it in
    vain. With contributions at a linear head, the scores and the difference of the two biases sum to
    the mean margin of the errors exactly. One pass; evidence is asked for wrongly classified images
    only, whose evidence is kept, O(errors K).

    Args:

        method (LayerAttribution): A method whose evidence depends on the target, on one layer.
        dataloader (iterable): Batches of (inputs, labels).
        class_names (sequence of str, optional): C names. By default those of the data set.
        reduction, attribute_kwargs, attribute_to_layer_input, unpack, device, show_progress: As for
                    :func:`identify_class_filters`.

    Returns:
        *ConfusionFilters*.

    Raises:
        ValueError: The loader is empty, the model returns NaN or Inf, or the method's evidence does
                    not depend on the target.

    Examples::

        >>> import torch
        >>> from captum_classfilters import LayerFilterContribution
        >>> from captum_classfilters.identify import confusion_filters
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        ...     torch.nn.Flatten(), torch.nn.Linear(8, 3))
        >>> data = [(torch.rand(12, 3, 6, 6), torch.arange(12) % 3)]
        >>> errors = confusion_filters(LayerFilterContribution(net, "1"), data, show_progress=False)
        >>> true, predicted = errors.largest()[0]
        >>> errors.cell(true, predicted).scores.shape
        torch.Size([8])
    """
    pass_ = _Pass(method, reduction, attribute_kwargs, attribute_to_layer_input, unpack, device)
    class_names, known = listed_names(class_names), dataset_names(dataloader)
    confusion: Tensor | None = None
    kept, keys = [], []
    for batch, labels, outputs in pass_.batches(dataloader, show_progress):
        number = outputs.shape[1]
        predicted = outputs.argmax(1)
        key = labels * number + predicted
        counts = torch.bincount(key, minlength=number**2).reshape(number, number)
        confusion = counts if confusion is None else confusion + counts
        wrong = predicted != labels
        if bool(wrong.any()):
            rows = pass_.difference(batch, outputs, wrong, predicted[wrong], labels[wrong])
            kept.append(rows)
            keys.append(key[wrong])
    assert confusion is not None
    names = given_or_known_names(class_names, known, len(confusion))
    cells = {}
    if kept:
        values, place = torch.cat(keys).unique(return_inverse=True)
        rows = torch.cat(kept)
        sums = new_sums(len(values), rows.shape[1])
        sums.update(rows, place)
        means = sums.tables()
        for position, key_ in enumerate(values.tolist()):
            true, other = divmod(key_, len(confusion))
            cells[true, other] = _cell(means, position, names[other], names[true], pass_)
    return ConfusionFilters(confusion, names, cells)


class _Pass:
    """One pass over the data: outputs, and differences of evidence for two targets."""

    def __init__(
        self,
        method: LayerAttribution,
        reduction: Reduction,
        attribute_kwargs: AttributeKwargs | None,
        at_input: bool,
        unpack: Unpack | None,
        device: torch.device | str | None,
    ) -> None:
        sources = sources_of(method, attribute_kwargs, at_input, reduction)
        if len(sources) != 1:
            raise ValueError("The method has several layers; contrast them one by one.")
        self.source: Source = sources[0]
        if not self.source.depends_on_target:
            raise ValueError(
                f"{self.source.name} gives the same evidence for every target, so it cannot tell "
                "two classes apart; use LayerFilterContribution or LayerFilterAblation, for example."
            )
        self.unpack, self.device = unpack, device
        self.provenance = provenance(self.source.model, options=self.source.options)

    def batches(
        self, dataloader: Dataloader, show_progress: bool
    ) -> Iterator[tuple[Batch, Tensor, Tensor]]:
        """Each batch, its labels and its outputs, these on the CPU."""
        with read_batches(
            self.source.model,
            dataloader,
            "contrast",
            unpack=self.unpack,
            device=self.device,
            show_progress=show_progress,
        ) as batches:
            forward_func = self.source.method.forward_func
            reader = ScoreReader(forward_func, batches, [self.source.method.layer])
            for batch in batches:
                returned = forward_func(*batch.inputs)
                if batch.first_image == 0:
                    self.source.adapt_to(returned)
                batches.check_repeats(forward_func, batch, returned)
                outputs = reader.scores(batch, returned)
                labels = labels_of_scores(outputs, batch.labels, batch.number)
                yield batch, labels.cpu(), outputs.cpu()

    def difference(
        self, batch: Batch, outputs: Tensor, chosen: Tensor, favored: Tensor, against: Tensor
    ) -> Tensor:
        """Evidence for one target minus that for another, and the margin as a last column."""
        images = tuple(image[chosen.to(image.device)] for image in batch.inputs)
        evidence = [
            of_few(
                lambda given: self.source.attributed(given[:-1], given[-1]),
                (*images, targets.to(batch.device)),
                batch.size,
            )
            for targets in (favored, against)
        ]
        finite = (evidence[0] - evidence[1]).isfinite().all(1).cpu()
        if not bool(finite.all()):
            image = int(chosen.nonzero()[:, 0][~finite][0])
            raise ValueError(
                f"NaN or Inf among the evidence of the layer {self.source.layer_name!r}: batch "
                f"{batch.number}, image {image} of the batch."
            )
        logits = outputs[chosen].double()
        margin = logits.gather(1, favored[:, None]) - logits.gather(1, against[:, None])
        return torch.cat([(evidence[0] - evidence[1]).cpu().double(), margin], dim=1)


def _cell(
    values: dict[str, Tensor], position: int, favored: str, against: str, pass_: _Pass
) -> FilterContrast:
    mean = values["mean"][position]
    number = int(values["count"][position])
    return FilterContrast(
        favored=favored,
        against=against,
        scores=mean[:-1],
        standard_errors=values["standard_error"][position, :-1],
        degrees_of_freedom=torch.full_like(mean[:-1], max(number - 1, 1)),
        margin=float(mean[-1]),
        num_images=number,
        layer=pass_.source.layer_name,
        method=pass_.source.name,
        provenance=pass_.provenance,
    )
