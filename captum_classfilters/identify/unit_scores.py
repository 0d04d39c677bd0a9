"""One number for each image and filter, or direction, of several layers."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.batches import Batch, Batches
from captum_classfilters._core.types import Dataloader, Directions, Unpack
from captum_classfilters._core.units import (
    Aggregate,
    Rows,
    UnitTap,
    aggregated,
    check_aggregate,
    classes_of,
    num_outputs,
    read_units,
    units_of,
)


@arguments_checked
def unit_scores(
    model: nn.Module,
    layers: str | nn.Module | Sequence[str | nn.Module],
    dataloader: Dataloader,
    *,
    aggregate: Aggregate = "mean",
    directions: Mapping[str, Directions] | None = None,
    subtract_bias: bool = True,
    channel_dim: int | Mapping[str, int] | None = None,
    num_classes: int | None = None,
    unpack: Unpack | None = None,
    show_progress: bool = True,
) -> tuple[dict[str, Tensor], Tensor]:
    r"""
    Reduce each image's map of every filter, or direction, to one signed number.

    One pass serves all layers; maps are reduced inside the hooks, so that memory is O(N U).

    Args:

        model (nn.Module): The model. It runs in evaluation mode and is left as found.
        layers (str, nn.Module or sequence): Layers, or their dotted names.
        dataloader (iterable): Batches of (inputs, labels).
        aggregate (str): Over positions: the ``"mean"``, ``"max"``, ``"min"``, ``"sum"``, the mean or
                    sum of absolute values (``"abs_mean"``, ``"abs_sum"``) or the Euclidean norm
                    (``"l2"``).
                    Default: "mean"
        directions (mapping, optional): By layer name, a matrix (K, r) whose columns are directions,
                    or an object with such a matrix as ``left``; the units are then the projections
                    :math:`u^\top (y - b)`. A whole model's
                    :func:`~captum_classfilters.spectral.model_svd` can be given.
                    Default: None
        subtract_bias (bool): Subtract the layer's own bias b before projecting.
                    Default: True
        channel_dim (int or mapping, optional): Axis of the filters where it cannot be told from the
                    layer, for all layers or by name.
                    Default: None
        num_classes (int, optional): C; labels are 0 to C - 1. By default the number of the model's
                    outputs, if those are scores (N, C), else any.
                    Default: None
        unpack (Callable, optional): From a batch of another kind to the pair (inputs, labels).
                    Default: None
        show_progress (bool): Show a progress bar.
                    Default: True

    Returns:
        *tuple* of a *dict* of tensors (N, U) by layer name, float32 or the model's higher precision,
        and the labels (N,), int64; on the CPU.

    Raises:
        ValueError: The loader is empty, labels are not class indices, a layer puts out NaN or Inf or
            does not run exactly once, directions do not fit, or the aggregate is unknown.

    Examples::

        >>> import torch
        >>> from captum_classfilters.identify import unit_scores
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU())
        >>> data = [(torch.rand(6, 3, 8, 8), torch.arange(6) % 2)]
        >>> scores, labels = unit_scores(net, ["0", "1"], data, show_progress=False)
        >>> scores["1"].shape
        torch.Size([6, 4])
    """
    check_aggregate(aggregate)
    taps = units_of(model, layers, channel_dim, directions, subtract_bias)
    for tap in taps:
        tap.average_first = aggregate == "mean"
        tap.reduce = lambda maps: (aggregated(maps, aggregate),)
    rows = {tap.name: Rows() for tap in taps}
    labels = collect_units(model, taps, dataloader, rows, num_classes, unpack, show_progress)
    return {name: torch.cat(kept.pieces()) for name, kept in rows.items()}, labels


def collect_units(
    model: nn.Module,
    taps: Sequence[UnitTap],
    dataloader: Dataloader,
    rows: Mapping[str, Rows],
    num_classes: int | None,
    unpack: Unpack | None,
    show_progress: bool,
    one_size: bool = False,
) -> Tensor:
    r"""
    Collect what taps keep of every image.

    Args:

        model (nn.Module): The model.
        taps (sequence of UnitTap): Layers to read.
        dataloader (iterable): The loader.
        rows (mapping): By layer name, where its rows go.
        num_classes (int, optional): C, by default the number of the model's outputs if it is known.
        unpack (Callable, optional): From a batch of another kind to the pair (inputs, labels).
        show_progress (bool): Show a progress bar.
        one_size (bool): Refuse images whose maps differ in size.
                    Default: False

    Returns:
        *Tensor*: The labels (N,), int64, on the CPU.
    """
    labels = Rows()
    sizes: dict[str, tuple[int, ...]] = {}

    def take(batches: Batches, batch: Batch, output: object) -> None:
        known = num_outputs(output) if num_classes is None else num_classes
        labels.add(classes_of(batches, batch, known))
        for tap in taps:
            size = sizes.setdefault(tap.name, tap.positions)
            if one_size and tap.positions != size:
                raise ValueError(
                    f"The images differ in size: the maps of {tap.name!r} are {size} before batch "
                    f"{batch.number} and {tap.positions} in it. Read images of one size."
                )
            rows[tap.name].add(*tap.seen)

    read_units(
        model, taps, dataloader, "features", take, unpack=unpack, show_progress=show_progress
    )
    return torch.cat(labels.pieces())
