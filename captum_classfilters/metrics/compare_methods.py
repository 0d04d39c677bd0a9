"""Several methods on one layer: how far they agree, how much their filters suffice, their cost."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from captum.attr import LayerAttribution, LayerGradientXActivation
from torch import Tensor, nn
from tqdm.auto import tqdm

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.batches import check_read_again, first_batch
from captum_classfilters._core.distributed import is_main_process
from captum_classfilters._core.guard import model_left_as_found
from captum_classfilters._core.layers import layer_name
from captum_classfilters._core.names import kind_of
from captum_classfilters._core.outputs import scores_per_class
from captum_classfilters._core.ranking import random_sets
from captum_classfilters._core.tables import Row, Table, Tabular, short_repr
from captum_classfilters._core.types import Dataloader, Keywords, Unpack
from captum_classfilters._core.warnings import unsaid, warn
from captum_classfilters.attr import (
    LayerClassGate,
    LayerFilterAblation,
    LayerFilterContribution,
    LayerFilterFrequency,
)
from captum_classfilters.class_filters import ClassFilters
from captum_classfilters.identify import binomial_interval, collect_features, identify_class_filters
from captum_classfilters.metrics.feature_tables import (
    mutual_information_filters,
    selectivity_filters,
)
from captum_classfilters.metrics.removals import resolved_layer
from captum_classfilters.metrics.replayed_batches import replaying

# The table of methods has each one's number of filters.
_SHOWN = ("Every score at the layer", "Fewer filters than asked", "Filters that lower")

Method: TypeAlias = ClassFilters | LayerAttribution | Callable[[], ClassFilters]


@short_repr
@dataclass(frozen=True)
class MethodComparison(Tabular):
    r"""
    Several methods on one layer, each with its best filters for each class, as many of each method.

    A method gets fewer where it has no more filters with a score other than zero.

    Args:

        names (tuple of str): M names of methods.
        tables (dict): Their tables, with up to ``num_filters`` filters selected for each class.
        num_filters (int): k.
        overlap (Tensor): Shape (M, M). Share of a class's k filters that two methods have in common,
                    mean over classes.
        chance (float): The overlap expected of random sets, k / K.
        rank_correlation (Tensor): Shape (M, M). Spearman's correlation of two methods' scores of all
                    filters, mean over classes; NaN where all scores of a method are equal.
        hits (Tensor): Shape (M, C). Images of a class that are still recognized when the logit of
                    every class is computed with that class's k filters alone.
        random_hits (Tensor): Shape (R, C). The same for random filters.
        accuracy (float): Accuracy with all filters, on the same images.
        counts (Tensor): Shape (C,). Number of images of each class that this was measured on.
        seconds (dict): Seconds that each method took to make its table; NaN where it was given.
        skipped (dict): Methods of the standard set that do not apply here, with the reason.
    """

    names: tuple[str, ...]
    tables: dict[str, ClassFilters]
    num_filters: int
    overlap: Tensor
    chance: float
    rank_correlation: Tensor
    hits: Tensor
    random_hits: Tensor
    accuracy: float
    counts: Tensor
    seconds: dict[str, float]
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def sufficiency(self) -> Tensor:
        """Accuracy with each class's filters alone (M,)."""
        return self.hits.sum(1).double() / self.counts.sum()

    @property
    def random_sufficiency(self) -> float:
        """Sufficiency of random filters, mean over draws; NaN without draws."""
        return float((self.random_hits.sum(1).double() / self.counts.sum()).mean())

    @arguments_checked
    def sufficiency_interval(self, confidence: float = 0.95) -> Tensor:
        """Exact binomial intervals of the sufficiencies (M, 2)."""
        return binomial_interval(self.hits.sum(1), self.counts.sum(), confidence)

    def _tables(self) -> list[Table]:
        rows = [
            {title: None if cell != cell else cell for title, cell in row.items()}
            for row in self._rows()
        ]
        lines = [f"{name} does not apply: {reason}" for name, reason in self.skipped.items()]
        return [Table(rows, {"filters per class": ".3g"}, notes=lines, index="method")]

    def _rows(self) -> list[Row]:
        interval = self.sufficiency_interval()
        k = self.num_filters
        rows = [
            {
                "method": name,
                "filters per class": float(self.tables[name].selected.sum(1).double().mean()),
                f"sufficiency at {k}": float(self.sufficiency[row]),
                "low": float(interval[row, 0]),
                "high": float(interval[row, 1]),
                f"overlap@{k} with the others": _mean_of_others(self.overlap, row),
                "rank correlation with the others": _mean_of_others(self.rank_correlation, row),
                "seconds": self.seconds[name],
            }
            for row, name in enumerate(self.names)
        ]
        nan = float("nan")
        random = ["random filters", k, self.random_sufficiency, nan, nan, self.chance, 0.0, nan]
        most = next(iter(self.tables.values())).num_filters
        everything = ["all filters", most, self.accuracy, nan, nan, nan, nan, nan]
        return [*rows, *(dict(zip(rows[0], cells, strict=True)) for cells in (random, everything))]


@arguments_checked
def compare_methods(
    model: nn.Module,
    layer: nn.Module | str,
    dataloader: Dataloader,
    test_loader: Dataloader,
    *,
    methods: Mapping[str, Method] | None = None,
    num_filters: int = 5,
    replacement: Literal["zero", "mean"] = "zero",
    gate: Tensor | None = None,
    num_classes: int | None = None,
    repetitions: int = 5,
    seed: int = 0,
    channel_dim: int | None = None,
    unpack: Unpack | None = None,
    device: torch.device | str | None = None,
    show_progress: bool = True,
) -> MethodComparison:
    r"""
    Find a layer's class filters by several methods, and compare what they find.

    Agreement is measured by overlap@k beside its chance level and by rank correlation. What the
    filters are worth is measured on images of their own: the logit of each class is computed with
    that class's k filters alone, all others of the layer replaced,

    .. math:: y_c(x) = F_c(x; S_c) ,

    and the largest wins. Where the layer feeds the head this is the decomposed head of Badola et al.
    (:func:`decompose`); here it is defined at any layer. Filters that push every image towards
    their class gain nothing by it.

    Args:

        model (nn.Module): The model, with scores (N, C).
        layer (nn.Module or str): The layer, or its dotted name.
        dataloader (iterable): Batches of (inputs, labels) to find filters on, read once by each
                    method so that their costs can be told apart.
        test_loader (iterable): Other batches, to measure sufficiency on.
        methods (mapping, optional): By name, ``LayerAttribution`` methods on this layer, functions
                    that make a *ClassFilters* table, or tables. By default
                    :func:`standard_methods`.
        num_filters (int): k.
                    Default: 5
        replacement (str): What stands in for the other filters: ``"zero"``, or ``"mean"``, each
                    filter's mean over the batch, which keeps inner layers nearer to what the rest
                    of the network knows; use mixed batches then.
                    Default: "zero"
        gate (Tensor, optional): Shape (C, K), a trained class-specific gate, to be compared too.
                    Default: None
        num_classes (int, optional): C. By default the number of the model's outputs.
        repetitions (int): Number of random sets of filters in the control.
                    Default: 5
        seed (int): Seed of the random sets; the global random state is not touched.
                    Default: 0
        channel_dim (int, optional): Axis of the filters, where it cannot be told from the layer.
                    Default: None
        unpack (Callable, optional): From a batch of another kind to the pair (inputs, labels).
                    Default: None
        device (torch.device or str, optional): Where the batches go; by default where the model is.
        show_progress (bool): Show progress bars.
                    Default: True

    Returns:
        *MethodComparison*.

    Raises:
        ValueError: There is no method, ``num_filters`` exceeds K, a loader is empty, a table has
                    another shape than the layer, or the model returns NaN or Inf, with filters or
                    without.

    Examples::

        >>> import torch
        >>> from captum_classfilters import LayerFilterContribution, LayerFilterFrequency
        >>> from captum_classfilters.metrics import compare_methods
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        ...     torch.nn.Flatten(), torch.nn.Linear(8, 2))
        >>> train, test = [[(torch.rand(8, 3, 6, 6), torch.arange(8) % 2)] for _ in range(2)]
        >>> methods = {
        ...     "votes": LayerFilterFrequency(net, "1", top_k=3),
        ...     "logits": LayerFilterContribution(net, "1")}
        >>> result = compare_methods(
        ...     net, "1", train, test, methods=methods, num_filters=3, show_progress=False)
        >>> result.overlap.shape, result.chance
        (torch.Size([2, 2]), 0.375)
    """
    if test_loader is dataloader:
        warn(
            "Sufficiency is measured on the images that the filters were found on; pass a "
            "test_loader of its own.",
        )
    check_read_again(dataloader)
    layer = resolved_layer(model, layer)
    reading: Keywords = {"unpack": unpack, "device": device}
    asked = methods is not None
    if methods is None:
        methods = standard_methods(
            model,
            layer,
            dataloader,
            num_filters=num_filters,
            num_classes=num_classes,
            gate=gate,
            channel_dim=channel_dim,
            **reading,
        )
    elif gate is not None:
        methods = {**methods, "class gate": LayerClassGate(model, layer, gate).class_filters}
    if not methods:
        raise ValueError("methods is empty; pass at least one.")
    tables, seconds, skipped = _tables(
        methods, dataloader, num_filters, asked, reading, show_progress
    )
    overlap, correlation = _agreements(list(tables.values()))
    masks = torch.stack([table.selected for table in tables.values()])
    everywhere = torch.arange(masks.shape[2]).expand(masks.shape[1:]) < num_filters
    hits, counts, right = hits_alone(
        LayerFilterAblation(model, layer, replacement=replacement, channel_dim=channel_dim),
        layer,
        torch.cat([masks, random_sets(everywhere, repetitions, seed)]),
        test_loader,
        show_progress=show_progress,
        **reading,
    )
    return MethodComparison(
        names=tuple(tables),
        tables=tables,
        num_filters=num_filters,
        overlap=overlap,
        chance=num_filters / masks.shape[2],
        rank_correlation=correlation,
        hits=hits[: len(tables)],
        random_hits=hits[len(tables) :],
        accuracy=int(right.sum()) / int(counts.sum()),
        counts=counts,
        seconds=seconds,
        skipped=skipped,
    )


@arguments_checked
def standard_methods(
    model: nn.Module,
    layer: nn.Module | str,
    dataloader: Dataloader,
    *,
    num_filters: int = 5,
    num_classes: int | None = None,
    gate: Tensor | None = None,
    channel_dim: int | None = None,
    unpack: Unpack | None = None,
    device: torch.device | str | None = None,
) -> dict[str, Method]:
    r"""
    The methods that :func:`compare_methods` compares unless told otherwise.

    Frequency (top ``num_filters``), contribution, ablation, classification accuracy reduction of
    each class (CAR) as it is and in its soft form, Captum's gradient times
    activation, class selectivity and mutual information; the class gate where one is given.

    Args:

        model (nn.Module): The model.
        layer (nn.Module or str): The layer.
        dataloader (iterable): Batches of (inputs, labels).
        num_filters (int): Votes of each image in the frequency method.
                    Default: 5
        num_classes (int, optional): C. By default the number of the model's outputs.
        gate (Tensor, optional): Shape (C, K), a trained gate.
                    Default: None
        channel_dim (int, optional): Axis of the filters, where it cannot be told from the layer.
                    Default: None
        unpack (Callable, optional): From a batch of another kind to the pair (inputs, labels).
                    Default: None
        device (torch.device or str, optional): Where the batches go; by default where the model is.

    Returns:
        *dict* of methods, to be passed on to :func:`compare_methods` with others added for example.
    """
    layer = resolved_layer(model, layer)
    reading: Keywords = {"unpack": unpack, "device": device, "show_progress": False}
    ablation = LayerFilterAblation(model, layer, channel_dim=channel_dim)
    contribution = LayerFilterContribution(model, layer, channel_dim=channel_dim)
    frequency = LayerFilterFrequency(model, layer, top_k=num_filters, channel_dim=channel_dim)
    gradient = LayerGradientXActivation(model, layer)
    setattr(gradient, "channel_dim", channel_dim)  # noqa: B010 - Captum declares no such attribute

    def identified(method: LayerAttribution) -> Callable[[], ClassFilters]:
        return lambda: identify_class_filters(
            method, dataloader, num_classes=num_classes, num_filters=1, **reading
        )

    def reduction(soft: bool) -> ClassFilters:
        reduced = ablation.identify(
            dataloader, metric="accuracy", num_classes=num_classes, **reading
        )
        table: ClassFilters = reduced.to_class_filters(1, soft=soft)
        return table

    def responses(make: Callable[..., ClassFilters]) -> ClassFilters:
        features, labels = collect_features(
            model, layer, dataloader, channel_dim=channel_dim, unpack=unpack, show_progress=False
        )
        classes = num_classes or _num_classes(model, dataloader, unpack)
        return make(features, labels, num_classes=classes, layer=layer_name(model, layer))

    methods: dict[str, Method] = {
        "frequency": identified(frequency),
        "contribution": identified(contribution),
        "ablation": identified(ablation),
        "CAR per class": lambda: reduction(soft=False),
        "CAR per class, soft": lambda: reduction(soft=True),
        "gradient x activation": identified(gradient),
        "selectivity": lambda: responses(selectivity_filters),
        "mutual information": lambda: responses(mutual_information_filters),
    }
    if gate is not None:
        methods["class gate"] = LayerClassGate(model, layer, gate).class_filters
    return methods


def _tables(
    methods: Mapping[str, Method],
    dataloader: Dataloader,
    num_filters: int,
    asked: bool,
    reading: Keywords,
    show_progress: bool,
) -> tuple[dict[str, ClassFilters], dict[str, float], dict[str, str]]:
    """Tables with their selections, what they cost, and methods that do not apply unless asked for."""
    tables: dict[str, ClassFilters] = {}
    seconds: dict[str, float] = {}
    skipped: dict[str, str] = {}
    quiet = not (show_progress and is_main_process())
    for name, method in tqdm(methods.items(), desc="methods", disable=quiet):
        started = time.perf_counter()
        try:
            with unsaid(*_SHOWN):
                table = _table(name, method, dataloader, reading)
        except ValueError as error:
            if asked:
                raise
            skipped[name] = str(error)
            continue
        ready_made = isinstance(method, ClassFilters)
        seconds[name] = float("nan") if ready_made else time.perf_counter() - started
        with unsaid(*_SHOWN):
            tables[name] = table.select(num_filters=num_filters)
    if not tables:
        reasons = "; ".join(dict.fromkeys(skipped.values()))
        raise ValueError(f"No method of the standard set applies: {reasons}")
    shapes = {name: tuple(table.scores.shape) for name, table in tables.items()}
    if len(set(shapes.values())) != 1:
        raise ValueError(f"The tables have different shapes (C, K): {shapes}.")
    return tables, seconds, skipped


def _table(name: str, method: Method, dataloader: Dataloader, reading: Keywords) -> ClassFilters:
    if isinstance(method, ClassFilters):
        return method
    if isinstance(method, LayerAttribution):
        table = identify_class_filters(
            method, dataloader, num_filters=1, show_progress=False, **reading
        )
    elif not callable(method):
        raise ValueError(
            f"{name!r} is {kind_of(method)}; expected a LayerAttribution, a ClassFilters table, "
            "or a function that makes one."
        )
    else:
        table = method()
    if not isinstance(table, ClassFilters):
        raise ValueError(f"{name!r} gave {kind_of(table)}; expected a ClassFilters table.")
    return table


def _agreements(tables: list[ClassFilters]) -> tuple[Tensor, Tensor]:
    overlap = torch.eye(len(tables), dtype=torch.float64)
    correlation = overlap.clone()
    for row in range(len(tables)):
        for column in range(row):
            agreement = tables[row].agreement(tables[column])
            overlap[row, column] = overlap[column, row] = agreement.mean_overlap
            correlation[row, column] = correlation[column, row] = agreement.mean_rank_correlation
    return overlap, correlation


def _mean_of_others(table: Tensor, row: int) -> float:
    """Mean of a row without its diagonal; methods of constant scores have no correlation."""
    others = torch.arange(len(table)) != row
    return float(table[row, others].nanmean())


def hits_alone(
    ablation: LayerFilterAblation,
    layer: nn.Module,
    masks: Tensor,
    dataloader: Dataloader,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""
    Images that are recognized when each class's logit is computed with its own filters alone.

    Args:

        ablation (LayerFilterAblation): The model, and what stands in for a filter.
        layer (nn.Module): The layer.
        masks (Tensor): Shape (S, C, K), bool: S tables, the filters of each class.
        dataloader (iterable): Batches of (inputs, labels).
        options: As for :func:`~captum_classfilters.metrics.replayed_batches.replaying`.

    Returns:
        *tuple* of int64 Tensors: hits (S, C); images of each class (C,); of these, the images that
        are recognized with all filters (C,).
    """
    num_classes, num_filters = masks.shape[1:]
    totals: Tensor | None = None
    with replaying(ablation, layer, (num_classes, num_filters), dataloader, **options) as batches:
        for replayed in batches:
            own = []
            for class_, removed in enumerate((~masks).unbind(1)):
                outputs = replayed.replay.outputs(removed)
                replayed.check_finite(outputs, removed)
                own.append(replayed.classes(outputs)[:, :, class_])
            full = replayed.classes(replayed.replay.output[None])
            scores = torch.cat([full, torch.stack(own, 2)])
            labels = replayed.labels.to(scores.device)
            right = (scores.argmax(2) == labels).long()
            rows = torch.cat([right, torch.ones_like(right[:1])])
            counts = rows.new_zeros(len(rows), num_classes).index_add_(1, labels, rows)
            totals = counts if totals is None else totals + counts
    assert totals is not None
    totals = totals.cpu()
    return totals[1:-1], totals[-1], totals[0]


def _num_classes(model: nn.Module, dataloader: Dataloader, unpack: Unpack | None) -> int:
    """C, from what the model returns for the first batch."""
    batch = first_batch(model, dataloader, unpack)
    with model_left_as_found(model, evaluation=True), torch.no_grad():
        return scores_per_class(model(*batch.inputs)).shape[1]
