"""Several methods on one layer: how far they agree, how much their filters suffice, their cost."""

import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from captum.attr import LayerAttribution, LayerGradientXActivation
from torch import Tensor, nn
from tqdm.auto import tqdm

from captum_classfilters._core.batches import check_read_again, split_batch
from captum_classfilters._core.guard import model_left_as_found
from captum_classfilters._core.labels import class_labels
from captum_classfilters._core.layers import find_layer, layer_name
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

if TYPE_CHECKING:
    import pandas

Method: TypeAlias = ClassFilters | LayerAttribution | Callable[[], ClassFilters]


@dataclass(frozen=True)
class MethodComparison:
    r"""
    Several methods on one layer, each with as many filters for each class.

    Args:

        names (tuple of str): M names of methods.
        tables (dict): Their tables, with ``num_filters`` filters selected for each class.
        num_filters (int): k.
        overlap (Tensor): Shape (M, M). Share of a class's k filters that two methods have in common,
                    mean over classes.
        chance (float): The overlap expected of random sets, k / K.
        rank_correlation (Tensor): Shape (M, M). Spearman's correlation of two methods' scores of all
                    filters, mean over classes; NaN where all scores of a method are equal.
        hits (Tensor): Shape (M, C). Images of a class that are still recognised when the logit of
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

    def sufficiency_interval(self, confidence: float = 0.95) -> Tensor:
        """Exact binomial intervals of the sufficiencies (M, 2)."""
        return binomial_interval(self.hits.sum(1), self.counts.sum(), confidence)

    def to_pandas(self) -> "pandas.DataFrame":
        """One row for each method, for random and for all filters. Needs the extra ``pandas``."""
        import pandas

        rows = self._rows()
        return pandas.DataFrame(rows).set_index("method")

    def __str__(self) -> str:
        """The table in Markdown."""
        rows = self._rows()
        cells = [list(rows[0])] + [
            [
                one if isinstance(one, str) else "" if one != one else f"{one:.3f}"
                for one in row.values()
            ]
            for row in rows
        ]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        cells.insert(1, ["-" * width for width in widths])
        lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
        lines += [f"{name} does not apply: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)

    def _rows(self) -> list[dict[str, Any]]:
        interval = self.sufficiency_interval()
        k = self.num_filters
        rows = [
            {
                "method": name,
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
        random = ["random filters", self.random_sufficiency, nan, nan, self.chance, 0.0, nan]
        everything = ["all filters", self.accuracy, nan, nan, nan, nan, nan]
        return [*rows, *(dict(zip(rows[0], cells, strict=True)) for cells in (random, everything))]


def compare_methods(
    model: nn.Module,
    layer: nn.Module | str,
    dataloader: Iterable[Any],
    test_loader: Iterable[Any],
    *,
    methods: Mapping[str, Method] | None = None,
    num_filters: int = 5,
    replacement: Literal["zero", "mean"] = "zero",
    gate: Tensor | None = None,
    num_classes: int | None = None,
    random_seeds: int = 5,
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

        model (nn.Module): The model, with logits (N, C).
        layer (nn.Module or str): The layer.
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
        random_seeds (int): Number of random sets of filters in the control.
                    Default: 5
        show_progress (bool): Show progress bars.
                    Default: True

    Returns:
        *MethodComparison*.

    Raises:
        ValueError: There is no method, ``num_filters`` exceeds K, a loader is empty, or a table has
                    another shape than the layer.

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
        warnings.warn(
            "Sufficiency is measured on the images that the filters were found on; pass a "
            "test_loader of its own.",
            stacklevel=2,
        )
    check_read_again(dataloader)
    module = find_layer(model, layer) if isinstance(layer, str) else layer
    given = methods is not None
    if methods is None:
        methods = standard_methods(
            model, layer, dataloader, num_filters=num_filters, num_classes=num_classes, gate=gate
        )
    elif gate is not None:
        methods = {**methods, "class gate": LayerClassGate(model, layer, gate).class_filters}
    if not methods:
        raise ValueError("methods is empty; pass at least one.")
    tables, seconds, skipped = _tables(methods, dataloader, num_filters, given, show_progress)
    names = tuple(tables)
    overlap, correlation = _agreements(list(tables.values()))
    masks = torch.stack([table.selected for table in tables.values()])
    random = _random_masks(masks[0], num_filters, random_seeds)
    hits, counts, accuracy = _kept_alone(
        LayerFilterAblation(model, module, replacement=replacement),
        torch.cat([masks, random]),
        test_loader,
        show_progress,
    )
    number = len(names)
    return MethodComparison(
        names=names,
        tables=tables,
        num_filters=num_filters,
        overlap=overlap,
        chance=num_filters / masks.shape[2],
        rank_correlation=correlation,
        hits=hits[:number],
        random_hits=hits[number:],
        accuracy=accuracy,
        counts=counts,
        seconds=seconds,
        skipped=skipped,
    )


def standard_methods(
    model: nn.Module,
    layer: nn.Module | str,
    dataloader: Iterable[Any],
    *,
    num_filters: int = 5,
    num_classes: int | None = None,
    gate: Tensor | None = None,
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

    Returns:
        *dict* of methods, to be passed on to :func:`compare_methods` with others added, say.
    """
    module = find_layer(model, layer) if isinstance(layer, str) else layer
    name = layer_name(model, module)

    def identified(method: LayerAttribution) -> Callable[[], ClassFilters]:
        return lambda: identify_class_filters(
            method, dataloader, num_classes=num_classes, num_filters=1, show_progress=False
        )

    def reduction(soft: bool) -> ClassFilters:
        found = LayerFilterAblation(model, module).identify(
            dataloader, metric="accuracy", num_classes=num_classes, show_progress=False
        )
        table: ClassFilters = found.to_class_filters(1, soft=soft)
        return table

    def responses(make: Callable[..., ClassFilters]) -> ClassFilters:
        features, labels = collect_features(model, module, dataloader, show_progress=False)
        classes = num_classes if num_classes is not None else _outputs(model, dataloader)
        return make(features, labels, num_classes=classes, layer=name)

    methods: dict[str, Method] = {
        "frequency": identified(LayerFilterFrequency(model, module, top_k=num_filters)),
        "contribution": identified(LayerFilterContribution(model, module)),
        "ablation": identified(LayerFilterAblation(model, module)),
        "CAR per class": lambda: reduction(soft=False),
        "CAR per class, soft": lambda: reduction(soft=True),
        "gradient x activation": identified(LayerGradientXActivation(model, module)),
        "selectivity": lambda: responses(selectivity_filters),
        "mutual information": lambda: responses(mutual_information_filters),
    }
    if gate is not None:
        methods["class gate"] = LayerClassGate(model, module, gate).class_filters
    return methods


def _tables(
    methods: Mapping[str, Method],
    dataloader: Iterable[Any],
    num_filters: int,
    given: bool,
    show_progress: bool,
) -> tuple[dict[str, ClassFilters], dict[str, float], dict[str, str]]:
    tables: dict[str, ClassFilters] = {}
    seconds: dict[str, float] = {}
    skipped: dict[str, str] = {}
    for name, method in tqdm(methods.items(), desc="methods", disable=not show_progress):
        started = time.perf_counter()
        try:
            table = _table(name, method, dataloader)
        except ValueError as error:
            if given:
                raise
            skipped[name] = str(error)
            continue
        ready_made = isinstance(method, ClassFilters)
        seconds[name] = float("nan") if ready_made else time.perf_counter() - started
        tables[name] = table.select(num_filters=num_filters)
    if not tables:
        reasons = "; ".join(dict.fromkeys(skipped.values()))
        raise ValueError(f"No method of the standard set applies: {reasons}")
    shapes = {name: tuple(table.scores.shape) for name, table in tables.items()}
    if len(set(shapes.values())) != 1:
        raise ValueError(f"The tables have different shapes (C, K): {shapes}.")
    return tables, seconds, skipped


def _table(name: str, method: Method, dataloader: Iterable[Any]) -> ClassFilters:
    if isinstance(method, ClassFilters):
        return method
    if isinstance(method, LayerAttribution):
        table = identify_class_filters(method, dataloader, num_filters=1, show_progress=False)
    elif not callable(method):
        raise ValueError(
            f"{name!r} is a {type(method).__name__}; expected a LayerAttribution, a ClassFilters table, "
            "or a function that makes one."
        )
    else:
        table = method()
    if not isinstance(table, ClassFilters):
        raise ValueError(f"{name!r} gave a {type(table).__name__}; expected a ClassFilters table.")
    return table


def _agreements(tables: list[ClassFilters]) -> tuple[Tensor, Tensor]:
    number = len(tables)
    overlap = torch.eye(number, dtype=torch.float64)
    correlation = torch.eye(number, dtype=torch.float64)
    for row in range(number):
        for column in range(row):
            agreement = tables[row].agreement(tables[column])
            overlap[row, column] = overlap[column, row] = agreement.mean_overlap
            correlation[row, column] = correlation[column, row] = agreement.mean_rank_correlation
    return overlap, correlation


def _mean_of_others(table: Tensor, row: int) -> float:
    """Mean of a row without its diagonal; methods of constant scores have no correlation."""
    others = torch.arange(len(table)) != row
    return float(table[row, others].nanmean())


def _random_masks(like: Tensor, num_filters: int, seeds: int) -> Tensor:
    """Random filters for each class (R, C, K)."""
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(seeds, *like.shape, generator=generator).argsort(2).argsort(2)
    return order < num_filters


def _kept_alone(
    ablation: LayerFilterAblation,
    masks: Tensor,
    dataloader: Iterable[Any],
    show_progress: bool,
) -> tuple[Tensor, Tensor, float]:
    """Hits (S, C) of S masks (S, C, K), each class's logit with its own filters alone; images of
    each class (C,); accuracy with all filters."""
    number, num_classes = masks.shape[:2]
    hits = torch.zeros(number, num_classes, dtype=torch.int64)
    counts = torch.zeros(num_classes, dtype=torch.int64)
    right = 0
    model, layer = ablation.forward_func, ablation.layer
    parameter = next(model.parameters(), None)
    device = None if parameter is None else parameter.device
    bar = tqdm(dataloader, desc="kept alone", unit="batch", disable=not show_progress)
    with model_left_as_found(model, evaluation=True):
        for position, batch in enumerate(bar):
            inputs, raw_labels = split_batch(batch, position, device)
            labels = class_labels(raw_labels, len(inputs[0]), num_classes, position).cpu()
            replay = ablation.replay(layer, inputs)
            if replay.num_filters != masks.shape[2]:
                raise ValueError(
                    f"The layer has {replay.num_filters} filters, the tables {masks.shape[2]}."
                )
            counts += torch.bincount(labels, minlength=num_classes)
            right += int((replay.output.argmax(1).cpu() == labels).sum())
            logits = [replay.outputs(~masks[:, c])[..., c].cpu() for c in range(num_classes)]
            recognised = torch.stack(logits, -1).argmax(-1) == labels
            for row in range(number):
                hits[row] += torch.bincount(labels[recognised[row]], minlength=num_classes)
    if int(counts.sum()) == 0:
        raise ValueError("The test_loader is empty.")
    return hits, counts, right / int(counts.sum())


def _outputs(model: nn.Module, dataloader: Iterable[Any]) -> int:
    """C, from the model's output on one image."""
    parameter = next(model.parameters(), None)
    inputs, _ = split_batch(
        next(iter(dataloader)), 0, None if parameter is None else parameter.device
    )
    with torch.no_grad(), model_left_as_found(model, evaluation=True):
        return int(model(*(one[:1] for one in inputs)).shape[1])
