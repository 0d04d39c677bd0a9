"""Are a class's filters needed, and do they suffice? Curves over a data set, with controls."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.devices import sums_device
from captum_classfilters._core.ranking import descending, random_orders
from captum_classfilters._core.tables import Table, Tabular, short_repr
from captum_classfilters._core.types import Dataloader, ForwardFunc, Unpack
from captum_classfilters.attr import LayerFilterAblation
from captum_classfilters.attr.filter_removal import Replacement
from captum_classfilters.class_filters import ClassFilters
from captum_classfilters.metrics.removals import (
    MAGNITUDE,
    RANDOM,
    OrderedRemoval,
    areas,
    at_input_of,
    curve_points,
    kept_alone,
    magnitude_control,
    named_tables,
    resolved_layer,
)
from captum_classfilters.metrics.replayed_batches import ReplayedBatch, replaying

Measure = Literal["recall", "probability"]


@short_repr
@dataclass(frozen=True)
class ClassCurves(Tabular):
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
        return areas(self.necessity, self.num_filters, 0)

    @property
    def sufficiency_area(self) -> dict[str, Tensor]:
        """Area under each class's sufficiency curve (C,). High: its first filters suffice."""
        return areas(self.sufficiency, self.num_filters, 0)

    def _tables(self) -> list[Table]:
        needed, enough = self.necessity_area, self.sufficiency_area
        rows = [
            {"": name, "necessity": needed[name].nanmean(), "sufficiency": enough[name].nanmean()}
            for name in needed
        ]
        title = f"area under {self.measure}, mean over classes"
        return [Table(rows, {"necessity": ".4f", "sufficiency": ".4f"}, title)]


@arguments_checked
def class_curves(
    model: nn.Module | ForwardFunc,
    layer: nn.Module | str,
    class_filters: ClassFilters | Mapping[str, ClassFilters],
    dataloader: Dataloader,
    *,
    num_filters: Sequence[int] | None = None,
    measure: Measure = "recall",
    replacement: Replacement = "zero",
    repetitions: int = 5,
    seed: int = 0,
    weight_magnitude: Tensor | None = None,
    channel_dim: int | None = None,
    unpack: Unpack | None = None,
    device: torch.device | str | None = None,
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

        model (nn.Module or Callable): The model, or its forward function, with scores (N, C).
        layer (nn.Module or str): The layer that the tables were found at, or its dotted name. Filters
                    of tables found at its input are removed there.
        class_filters (ClassFilters or mapping of them): Tables, found on *other* images.
        dataloader (iterable): Batches of (inputs, labels).
        num_filters (sequence of int, optional): Points of the curves; 0, K, and with every number j
                    also K - j are added. By default about 17, evenly spaced.
        measure (str): ``"recall"``, the share of the class's images that are recognized, or
                    ``"probability"``, the mean probability of the class.
                    Default: "recall"
        replacement (str): What stands in for a removed filter, as in
                    :class:`~captum_classfilters.LayerFilterAblation`.
                    Default: "zero"
        repetitions (int): Random orders for each class to average over.
                    Default: 5
        seed (int): Seed of the random orders; the global random state is not touched.
                    Default: 0
        weight_magnitude (Tensor, optional): Shape (K,), the norm of each filter's weights, where it
                    cannot be found in the layer.
        channel_dim (int, optional): Axis of the filters, where it cannot be told from the layer.
                    Default: None
        unpack (Callable, optional): From a batch of another kind to the pair (inputs, labels).
                    Default: None
        device (torch.device or str, optional): Where the batches go; by default where the model is.
        show_progress (bool): Show a progress bar.
                    Default: True

    Returns:
        *ClassCurves*.

    Raises:
        ValueError: Tables do not fit the layer or each other, labels do not fit, there are no
                    images, or the model returns NaN or Inf, with filters or without.

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
    if repetitions < 1:
        raise ValueError("repetitions must be at least 1: a curve needs its control.")
    tables = named_tables(class_filters)
    first = next(iter(tables.values()))
    shape = (first.num_classes, first.num_filters)
    layer = resolved_layer(model, layer)
    at_input = at_input_of(model, layer, tables)
    magnitude = magnitude_control(model, layer, shape[1], weight_magnitude, at_input)
    sizes = curve_points(num_filters, shape[1])
    orders = {name: descending(table.scores) for name, table in tables.items()}
    orders[MAGNITUDE] = descending(magnitude).expand(shape)
    random = random_orders(shape, repetitions, torch.Generator().manual_seed(seed))
    ablation = LayerFilterAblation(model, layer, replacement=replacement, channel_dim=channel_dim)
    sums = _Sums()
    with replaying(
        ablation,
        layer,
        shape,
        dataloader,
        unpack=unpack,
        device=device,
        show_progress=show_progress,
        at_input=at_input,
    ) as batches:
        for replayed in batches:
            removal = OrderedRemoval(
                replayed.replay,
                _value(replayed, measure),
                sizes,
                replayed.check,
                f" of batch {replayed.batch.number}",
            )
            curves = removal.both_ways(
                {name: order[replayed.labels] for name, order in orders.items()}
            )
            curves[RANDOM] = removal.at_random(random[:, replayed.labels])
            sums.add(curves, replayed.labels, shape[0])
    necessity = sums.means()
    return ClassCurves(
        sizes, necessity, kept_alone(necessity), sums.counts.cpu(), first.class_names, measure
    )


def _value(replayed: ReplayedBatch, measure: Measure) -> Callable[[Tensor], Tensor]:
    """From outputs (P, N, ...) to each image's recall or probability (P, N)."""
    labels = replayed.labels.to(replayed.replay.output.device)

    def recall(outputs: Tensor) -> Tensor:
        return (replayed.classes(outputs).argmax(2) == labels).float()

    def probability(outputs: Tensor) -> Tensor:
        index = labels.expand(len(outputs), -1)[:, :, None]
        return replayed.probabilities(outputs).gather(2, index)[:, :, 0]

    return recall if measure == "recall" else probability


class _Sums:
    """Sums over the images of each class, where the work is."""

    def __init__(self) -> None:
        self.counts = torch.zeros(0, dtype=torch.int64)
        self.totals: dict[str, Tensor] = {}

    def add(self, curves: Mapping[str, Tensor], labels: Tensor, num_classes: int) -> None:
        """Add curves (P, N) of images to those of their classes."""
        device = sums_device(next(iter(curves.values())).device)
        labels = labels.to(device)
        if not self.totals:
            self.counts = torch.zeros(num_classes, dtype=torch.int64, device=device)
        self.counts.index_add_(0, labels, torch.ones_like(labels))
        for name, values in curves.items():
            rows = values.to(device, torch.float64)
            if name not in self.totals:
                self.totals[name] = rows.new_zeros(len(rows), num_classes)
            self.totals[name].index_add_(1, labels, rows)

    def means(self) -> dict[str, Tensor]:
        """Means (P, C) on the CPU; NaN for classes without images."""
        return {name: (total / self.counts).cpu() for name, total in self.totals.items()}
