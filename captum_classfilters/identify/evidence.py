"""The evidence of single images, kept: standard errors, stability over splits, permutations."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, overload

import torch
from captum.attr import LayerAttribution
from torch import Tensor

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.batches import dataset_names
from captum_classfilters._core.distributed import ranks_together
from captum_classfilters._core.files import AnyPath
from captum_classfilters._core.labels import check_num_classes
from captum_classfilters._core.names import counted, listed_names
from captum_classfilters._core.progress import Progress
from captum_classfilters._core.provenance import Provenance
from captum_classfilters._core.tables import Table, Tabular, short_repr
from captum_classfilters._core.types import (
    AttributeKwargs,
    ClassNames,
    Dataloader,
    JsonDict,
    LayerMethod,
    Unpack,
)
from captum_classfilters.class_filters import ClassFilters, check_class_names, names_of_classes
from captum_classfilters.identify.collector import Collector, Tally
from captum_classfilters.identify.evidence_sources import Reduction, like_methods, sources_of
from captum_classfilters.identify.identify_class_filters import collect, facts_of
from captum_classfilters.identify.new_sums import new_sums

_ENTRIES_AT_ONCE = 2**22  # of the matrix repetitions x images, 32 MB in float64


@short_repr
@dataclass(frozen=True)
class Stability(Tabular):
    r"""
    How far the tables of disjoint parts of the images agree.

    Args:

        tables (list of ClassFilters): One for each part.
        overlap (Tensor): Shape (C,). Share of the selected filters that two parts have in common,
                    the mean over all pairs of parts; NaN for classes without images.
        chance (float): The overlap expected of random selections of that size.
        rank_correlation (Tensor): Shape (C,). Spearman's correlation of two parts' scores, the mean
                    over all pairs.
        selection_share (Tensor): Shape (C, K). Share of the parts that select a filter.
        standard_errors (Tensor): Shape (C, K). Of the mean over all parts, from the spread of the
                    parts; an alternative to the spread of single images.
    """

    tables: list[ClassFilters]
    overlap: Tensor
    chance: float
    rank_correlation: Tensor
    selection_share: Tensor
    standard_errors: Tensor

    def _tables(self) -> list[Table]:
        rows = [
            {
                "class": name,
                "overlap": self.overlap[row],
                "rank correlation": self.rank_correlation[row],
                "filters in every part": int((self.selection_share[row] == 1).sum()),
            }
            for row, name in enumerate(self.tables[0].class_names)
        ]
        title = (
            f"{len(self.tables)} parts: mean overlap {float(self.overlap.nanmean()):.3f} "
            f"(chance {self.chance:.3f}), "
            f"mean rank correlation {float(self.rank_correlation.nanmean()):.3f}"
        )
        return [Table(rows, title=title)]


@short_repr
@dataclass(frozen=True)
class Evidence(Tabular):
    r"""
    One method's evidence at one layer, image by image, each for the image's own label.

    Args:

        scores (Tensor): Shape (N, K), float32; float64 where the model computes in it.
        labels (Tensor): Shape (N,).
        class_names (tuple of str): C names.
        layer (str): Dotted name of the layer.
        method (str): Name of the method.
        provenance (dict): Where the numbers come from.
    """

    scores: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    layer: str = ""
    method: str = ""
    provenance: JsonDict = field(default_factory=dict)

    def _tables(self) -> list[Table]:
        best, filters = self.scores.max(1)
        rows = [
            {
                "image": index,
                "class": self.class_names[int(label)],
                "strongest filter": int(filters[index]),
                "evidence": best[index],
            }
            for index, label in enumerate(self.labels)
        ]
        title = f"{self.method} at {self.layer}: {counted(len(rows), 'image')}"
        return [Table(rows, {"evidence": ".4g"}, title)]

    @property
    def counts(self) -> Tensor:
        """Number of images of each class (C,)."""
        return torch.bincount(self.labels, minlength=len(self.class_names))

    @arguments_checked
    def class_filters(self, num_filters: int | None = None) -> ClassFilters:
        """The table of class means, with their standard errors.

        Args:

            num_filters (int, optional): Select this many filters for each class.
                        Default: None

        Returns:
            *ClassFilters*.
        """
        return self._table(torch.arange(len(self.labels)), num_filters)

    @arguments_checked
    def bootstrap_standard_errors(self, repetitions: int = 1000, seed: int = 0) -> Tensor:
        r"""
        Standard errors of the class means, by drawing each class's images again with replacement.

        For means they approach :math:`\sqrt{(n-1)/n}` times the standard errors of the table, which
        is the check on those.

        Args:

            repetitions (int): Number of draws.
                        Default: 1000
            seed (int): Seed of the draws; the global random state is not touched.
                        Default: 0

        Returns:
            *Tensor* of shape (C, K), float64; NaN for classes with fewer than two images.

        Raises:
            ValueError: There are fewer than two repetitions.
        """
        if repetitions < 2:
            raise ValueError(f"repetitions={repetitions} must be at least 2.")
        generator = torch.Generator().manual_seed(seed)
        shape = (len(self.class_names), self.scores.shape[1])
        errors = torch.full(shape, float("nan"), dtype=torch.float64)
        for class_, rows in enumerate(self._rows()):
            if len(rows) > 1:
                draws = _resampled_means(self.scores[rows].double(), repetitions, generator)
                errors[class_] = draws.std(0)
        return errors

    @arguments_checked
    def stability(self, num_filters: int, splits: int = 2, seed: int = 0) -> Stability:
        r"""
        Find the filters again on disjoint random parts of each class's images.

        Args:

            num_filters (int): Filters selected for each class and part.
            splits (int): Number of parts.
                        Default: 2
            seed (int): Seed of the parts; the global random state is not touched.
                        Default: 0

        Returns:
            *Stability*.

        Raises:
            ValueError: There are fewer than two parts, or a class has fewer images than parts.
        """
        if splits < 2:
            raise ValueError(f"splits={splits} must be at least 2.")
        part = self._parts(splits, seed)
        tables = [
            self._table((part == number).nonzero()[:, 0], num_filters) for number in range(splits)
        ]
        pairs = [left.agreement(right) for left, right in combinations(tables, 2)]
        means = torch.stack([table.scores for table in tables])
        return Stability(
            tables=tables,
            overlap=torch.stack([pair.overlap for pair in pairs]).mean(0),
            chance=num_filters / self.scores.shape[1],
            rank_correlation=torch.stack([pair.rank_correlation for pair in pairs]).mean(0),
            selection_share=torch.stack([table.selected for table in tables]).double().mean(0),
            standard_errors=means.std(0) / splits**0.5,
        )

    def _rows(self) -> Iterator[Tensor]:
        for class_ in range(len(self.class_names)):
            yield (self.labels == class_).nonzero()[:, 0]

    def _parts(self, splits: int, seed: int) -> Tensor:
        """The part of each image: every class is dealt out in a random order."""
        generator = torch.Generator().manual_seed(seed)
        part = torch.empty_like(self.labels)
        for class_, rows in enumerate(self._rows()):
            if 0 < len(rows) < splits:
                raise ValueError(
                    f"Class {self.class_names[class_]!r} has {len(rows)} images, fewer than "
                    f"splits={splits}."
                )
            order = torch.randperm(len(rows), generator=generator)
            part[rows[order]] = torch.arange(len(rows)) % splits
        return part

    def _table(self, rows: Tensor, num_filters: int | None) -> ClassFilters:
        sums = new_sums(len(self.class_names), self.scores.shape[1])
        sums.update(self.scores[rows], self.labels[rows])
        values = sums.of_this_process()  # every rank has the evidence of all
        table = ClassFilters(
            scores=values["mean"],
            counts=values["count"],
            standard_errors=values["standard_error"],
            class_names=self.class_names,
            layer=self.layer,
            method=self.method,
            provenance={**self.provenance, "num_images": len(rows)},
        )
        return table if num_filters is None else table.select(num_filters=num_filters)


@overload
def collect_evidence(
    methods: LayerMethod,
    dataloader: Dataloader,
    *,
    num_classes: int | None = None,
    class_names: ClassNames | None = None,
    reduction: Reduction = "sum",
    attribute_kwargs: AttributeKwargs | None = None,
    attribute_to_layer_input: bool = False,
    state_path: AnyPath | None = None,
    save_every: float | None = None,
    unpack: Unpack | None = None,
    device: torch.device | str | None = None,
    show_progress: bool = True,
) -> Evidence: ...


@overload
def collect_evidence(
    methods: Sequence[LayerAttribution],
    dataloader: Dataloader,
    *,
    num_classes: int | None = None,
    class_names: ClassNames | None = None,
    reduction: Reduction = "sum",
    attribute_kwargs: AttributeKwargs | None = None,
    attribute_to_layer_input: bool = False,
    state_path: AnyPath | None = None,
    save_every: float | None = None,
    unpack: Unpack | None = None,
    device: torch.device | str | None = None,
    show_progress: bool = True,
) -> list[Evidence]: ...


@overload
def collect_evidence(
    methods: Mapping[str, LayerAttribution],
    dataloader: Dataloader,
    *,
    num_classes: int | None = None,
    class_names: ClassNames | None = None,
    reduction: Reduction = "sum",
    attribute_kwargs: AttributeKwargs | None = None,
    attribute_to_layer_input: bool = False,
    state_path: AnyPath | None = None,
    save_every: float | None = None,
    unpack: Unpack | None = None,
    device: torch.device | str | None = None,
    show_progress: bool = True,
) -> dict[str, Evidence]: ...


@arguments_checked
def collect_evidence(
    methods: LayerMethod | Sequence[LayerAttribution] | Mapping[str, LayerAttribution],
    dataloader: Dataloader,
    *,
    num_classes: int | None = None,
    class_names: ClassNames | None = None,
    reduction: Reduction = "sum",
    attribute_kwargs: AttributeKwargs | None = None,
    attribute_to_layer_input: bool = False,
    state_path: AnyPath | None = None,
    save_every: float | None = None,
    unpack: Unpack | None = None,
    device: torch.device | str | None = None,
    show_progress: bool = True,
) -> Evidence | list[Evidence] | dict[str, Evidence]:
    r"""
    Keep the evidence of every image, in the one pass of :func:`identify_class_filters`.

    What that function adds up is kept here, O(N K), for questions that sums cannot answer: the
    bootstrap, and how stable the filters are over parts of the images.

    Args:

        methods (LayerAttribution, or a sequence or mapping of them): What to measure, and where.
        dataloader (iterable): Batches of (inputs, labels).
        num_classes, class_names, unpack, device, show_progress: As for
                    :func:`identify_class_filters`.
        reduction, attribute_kwargs, attribute_to_layer_input, state_path, save_every: Likewise.

    Returns:
        *Evidence* for one method, a *list* for a sequence, a *dict* for a mapping.

    Raises:
        ValueError: As :func:`identify_class_filters`.

    Examples::

        >>> import torch
        >>> from captum_classfilters import LayerFilterContribution
        >>> from captum_classfilters.identify import collect_evidence
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        ...     torch.nn.Flatten(), torch.nn.Linear(8, 2))
        >>> data = [(torch.rand(20, 3, 6, 6), torch.arange(20) % 2)]
        >>> evidence = collect_evidence(
        ...     LayerFilterContribution(net, "1"), data, show_progress=False)
        >>> evidence.scores.shape
        torch.Size([20, 8])
        >>> evidence.stability(num_filters=3).overlap.shape
        torch.Size([2])
    """
    class_names = listed_names(class_names)
    names = dataset_names(dataloader) if class_names is None else class_names
    with ranks_together() as ranks:
        check_num_classes(num_classes)
        check_class_names(class_names, num_classes)
        sources = sources_of(methods, attribute_kwargs, attribute_to_layer_input, reduction)
        collector = Collector(sources, num_classes, record_all=True)
        record = Provenance([source.model for source in sources])

        def result() -> Any:
            kept = [_evidence(tally, names, record) for tally in collector.tallies]
            return like_methods(methods, sources, kept)

        progress = Progress(
            collector,
            lambda: {
                "the call": "collect_evidence",
                **facts_of(sources, record),
                "num_classes": num_classes,
                "class_names": names,
            },
            lambda: result() if collector.has_images else None,
            state_path,
            save_every,
        )
        collect(collector, dataloader, class_names, unpack, device, show_progress, progress, ranks)
    evidence = result()
    progress.finished()
    return evidence


def _evidence(tally: Tally, names: Sequence[str] | None, record: Provenance) -> Evidence:
    """The evidence of one source."""
    assert tally.record is not None
    assert tally.shape is not None
    scores, labels = tally.record.tensors()
    source = tally.source
    origin = record.of(source.model, options=source.options, feeds_head=tally.feed)
    return Evidence(
        scores,
        labels,
        names_of_classes(names, tally.shape[0]),
        source.table_layer,
        source.name,
        {**origin, "num_images": len(labels)},
    )


def _resampled_means(values: Tensor, repetitions: int, generator: torch.Generator) -> Tensor:
    """Means of as many rows, drawn with replacement (R, K)."""
    number = len(values)
    at_once = max(1, _ENTRIES_AT_ONCE // number)
    means = []
    for start in range(0, repetitions, at_once):
        rows = min(at_once, repetitions - start)
        drawn = torch.randint(number, (rows, number), generator=generator)
        weights = torch.zeros(rows, number, dtype=torch.float64)
        weights.scatter_add_(1, drawn, torch.ones(1, dtype=torch.float64).expand_as(drawn))
        means.append(weights @ values / number)
    return torch.cat(means)
