"""Are a class's filters needed, and do they suffice? Curves over a data set, with controls."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from captum_classfilters._core.batches import split_batch
from captum_classfilters._core.guard import model_left_as_found
from captum_classfilters._core.labels import class_labels
from captum_classfilters._core.layers import module_of
from captum_classfilters._core.replay.suffix_replay import SuffixReplay
from captum_classfilters.attr import LayerFilterAblation
from captum_classfilters.attr.layer_filter_ablation import Replacement
from captum_classfilters.class_filters import ClassFilters
from captum_classfilters.metrics.filter_curves import both_ways
from captum_classfilters.metrics.removals import (
    MAGNITUDE,
    RANDOM,
    OrderedRemoval,
    area,
    curve_points,
    magnitude_control,
    order_of,
    random_orders,
    resolved_layer,
)

Measure = Literal["recall", "probability"]


@dataclass(frozen=True)
class ClassCurves:
    r"""
    How a class fares with its first filters removed, or with them alone.

    Every table holds the class filters that were given, each of them ``"..., reversed"``, and the
    controls ``"random"`` and ``"weight magnitude"``.

    Args:

        num_filters (list of int): P numbers of filters, from 0 to K.
        necessity (dict): For each name a Tensor (P, C): recall, or probability, of each class with
                    its first so many filters removed. NaN for classes without images.
        sufficiency (dict): The same with all *but* its first so many filters removed.
        counts (Tensor): Shape (C,), images of each class.
        class_names (tuple of str): Names of the classes.
        measure (str): ``"recall"`` or ``"probability"``.
    """

    num_filters: list[int]
    necessity: dict[str, Tensor]
    sufficiency: dict[str, Tensor]
    counts: Tensor
    class_names: tuple[str, ...]
    measure: str

    @property
    def necessity_area(self) -> dict[str, Tensor]:
        """Area under each class's necessity curve (C,). Low: its first filters are needed."""
        return {name: area(curve, self._shares(), 0) for name, curve in self.necessity.items()}

    @property
    def sufficiency_area(self) -> dict[str, Tensor]:
        """Area under each class's sufficiency curve (C,). High: its first filters suffice."""
        return {name: area(curve, self._shares(), 0) for name, curve in self.sufficiency.items()}

    def _shares(self) -> Tensor:
        return torch.tensor(self.num_filters, dtype=torch.float64) / self.num_filters[-1]

    def __str__(self) -> str:
        needed, enough = self.necessity_area, self.sufficiency_area
        lines = [f"{f'mean area, {self.measure}':36s} necessity  sufficiency"]
        lines += [
            f"{name:36s} {float(needed[name].nanmean()):9.4f}  {float(enough[name].nanmean()):11.4f}"
            for name in needed
        ]
        return "\n".join(lines)


def class_curves(
    forward_func: Callable[..., Tensor],
    layer: nn.Module | str,
    class_filters: ClassFilters | Mapping[str, ClassFilters],
    dataloader: Iterable[Any],
    *,
    num_filters: Sequence[int] | None = None,
    measure: Measure = "recall",
    replacement: Replacement = "zero",
    random_seeds: int = 5,
    weight_magnitude: Tensor | None = None,
    channel_dim: int | None = None,
    show_progress: bool = True,
) -> ClassCurves:
    r"""
    Sufficiency and necessity curves of every class's filters, with their controls.

    The images of class *c* run without the first *j* filters of its row of the table (necessity),
    and with nothing but these (sufficiency), through the unchanged network. A random order, the norm
    of the filters' weights and the opposite order are always measured along. Use images that the
    table was not found on.

    In contrast to :func:`~captum_classfilters.accuracy_curve` no head is decomposed, and any layer
    will do; at a layer that feeds a linear head the curves follow from its weights.

    Args:

        forward_func (Callable): The forward function of the model, with outputs (N, C).
        layer (nn.Module or str): The layer that the tables were found at, or its dotted name.
        class_filters (ClassFilters or mapping of them): Tables, found on *other* images.
        dataloader (iterable): Batches of (images, labels).
        num_filters (sequence of int, optional): Points of the curves; 0, K, and with every number j
                    also K - j are added. By default about 17, evenly spaced.
        measure (str): ``"recall"``, the share of the class's images that are recognised, or
                    ``"probability"``, the mean probability of the class.
                    Default: "recall"
        replacement (str): What stands in for a removed filter, as in
                    :class:`~captum_classfilters.LayerFilterAblation`.
                    Default: "zero"
        random_seeds (int): Random orders for each class to average over.
                    Default: 5
        weight_magnitude (Tensor, optional): Shape (K,), the norm of each filter's weights, where it
                    cannot be found in the layer.
        channel_dim (int, optional): Axis of the filters, where it cannot be told from the layer.
                    Default: None
        show_progress (bool): Show a progress bar.
                    Default: True

    Returns:
        *ClassCurves*.

    Raises:
        ValueError: Tables do not fit the layer or each other, labels do not fit, or there are no
                    images.

    Examples::

        >>> import torch
        >>> from captum_classfilters import LayerFilterContribution
        >>> from captum_classfilters.metrics import class_curves
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        ...     torch.nn.Flatten(), torch.nn.Linear(8, 2))
        >>> data = [(torch.rand(6, 3, 6, 6), torch.tensor([0, 1, 1, 0, 1, 0]))]
        >>> table = LayerFilterContribution(net, net[1]).identify(data, show_progress=False)
        >>> curves = class_curves(net, net[1], table, data, show_progress=False)
        >>> curves.necessity["random"].shape
        torch.Size([9, 2])
    """
    if measure not in ("recall", "probability"):
        raise ValueError(f"measure={measure!r}; choose 'recall' or 'probability'.")
    if random_seeds < 1:
        raise ValueError("random_seeds must be at least 1: a curve needs its control.")
    tables = checked_tables(class_filters)
    first = next(iter(tables.values()))
    shape = (first.num_classes, first.num_filters)
    layer = resolved_layer(forward_func, layer)
    magnitude = magnitude_control(forward_func, layer, shape[1], weight_magnitude)
    points = curve_points(num_filters, shape[1])
    orders = {name: order_of(table.scores) for name, table in tables.items()}
    orders[MAGNITUDE] = order_of(magnitude).expand(shape)
    random = random_orders(shape, random_seeds)
    ablation = LayerFilterAblation(
        forward_func, layer, replacement=replacement, channel_dim=channel_dim
    )
    sums = _Sums(len(points), shape[0])
    with model_left_as_found(module_of(forward_func), evaluation=True), torch.no_grad():
        for replay, labels in replays(ablation, layer, shape, dataloader, show_progress):
            removal = OrderedRemoval(replay, _value(labels, measure), points)
            of_images = {name: order[labels] for name, order in orders.items()}
            deletion, insertion = both_ways(removal, of_images)
            drawn = [removal.removing(order[labels]) for order in random]
            deletion[RANDOM] = torch.stack(drawn).mean(0)
            insertion[RANDOM] = deletion[RANDOM].flip(0)
            sums.add(deletion, insertion, labels)
    necessity, sufficiency = sums.means()
    return ClassCurves(points, necessity, sufficiency, sums.counts, first.class_names, measure)


def checked_tables(
    class_filters: ClassFilters | Mapping[str, ClassFilters],
) -> dict[str, ClassFilters]:
    """Tables by name, all of one shape."""
    tables = (
        dict(class_filters)
        if isinstance(class_filters, Mapping)
        else {class_filters.method or "class filters": class_filters}
    )
    if not tables:
        raise ValueError("class_filters is empty; pass at least one table.")
    shapes = {name: tuple(table.scores.shape) for name, table in tables.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"The tables do not fit each other; their classes and filters: {shapes}.")
    return tables


def replays(
    ablation: LayerFilterAblation,
    layer: nn.Module,
    shape: tuple[int, int],
    dataloader: Iterable[Any],
    show_progress: bool,
) -> Iterable[tuple[SuffixReplay, Tensor]]:
    """Each batch, run once and ready to run on without filters; its labels. Whoever asks guards the
    model: a generator is not closed while an exception of its reader is alive."""
    model = module_of(ablation.forward_func)
    parameter = next(model.parameters(), None) if model is not None else None
    device = parameter.device if parameter is not None else None
    seen = 0
    bar = tqdm(dataloader, desc="without filters", unit="batch", disable=not show_progress)
    for number, batch in enumerate(bar):
        inputs, raw_labels = split_batch(batch, number, device)
        if len(inputs[0]) == 0:
            continue
        replay = ablation.replay(layer, inputs)
        found = (replay.output.shape[-1], replay.num_filters)
        if replay.output.dim() != 2 or found != shape:
            raise ValueError(
                f"The table has {shape[0]} classes and {shape[1]} filters; the model puts out "
                f"{tuple(replay.output.shape)} and the layer has {replay.num_filters} filters."
            )
        seen += replay.num_images
        yield replay, class_labels(raw_labels, replay.num_images, shape[0], number).cpu()
    if not seen:
        raise ValueError("The data loader is empty.")


def _value(labels: Tensor, measure: Measure) -> Callable[[Tensor], Tensor]:
    def value(outputs: Tensor) -> Tensor:
        own = labels.to(outputs.device).expand(outputs.shape[:-1])
        if measure == "recall":
            return (outputs.argmax(-1) == own).double()
        return outputs.softmax(-1).gather(-1, own[..., None])[..., 0]

    return value


class _Sums:
    """Sums over the images of each class."""

    def __init__(self, points: int, num_classes: int) -> None:
        self.shape = (points, num_classes)
        self.counts = torch.zeros(num_classes, dtype=torch.int64)
        self.totals: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})

    def add(
        self, deletion: dict[str, Tensor], insertion: dict[str, Tensor], labels: Tensor
    ) -> None:
        self.counts += torch.bincount(labels, minlength=self.shape[1])
        for totals, curves in zip(self.totals, (deletion, insertion), strict=True):
            for name, values in curves.items():
                total = totals.setdefault(name, torch.zeros(self.shape, dtype=torch.float64))
                total.index_add_(1, labels, values)

    def means(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        necessity, sufficiency = (
            {name: total / self.counts for name, total in totals.items()} for totals in self.totals
        )
        return necessity, sufficiency
