"""One number for each image and filter, or direction, of several layers."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from captum_classfilters._core.batches import split_batch
from captum_classfilters._core.guard import model_left_as_found
from captum_classfilters._core.layers import check_runs
from captum_classfilters._core.units import UnitMaps, aggregated, units_of


def unit_scores(
    model: nn.Module,
    layers: str | nn.Module | Sequence[str | nn.Module],
    dataloader: Iterable[Any],
    *,
    aggregate: Literal["mean", "max", "min", "abs_mean", "l2"] = "mean",
    directions: Mapping[str, Any] | None = None,
    subtract_bias: bool = True,
    channel_dim: int | Mapping[str, int] | None = None,
    show_progress: bool = True,
) -> tuple[dict[str, Tensor], Tensor]:
    r"""
    Reduce each image's map of every filter, or direction, to one signed number.

    One pass serves all layers; maps are reduced inside the hooks, so that memory is O(N U).

    Args:

        model (nn.Module): The model. It runs in evaluation mode and is left as found.
        layers (str, nn.Module or sequence): Layers, or their dotted names.
        dataloader (iterable): Batches of (inputs, labels).
        aggregate (str): ``"mean"``, ``"max"``, ``"min"``, mean absolute value (``"abs_mean"``) or
                    Euclidean norm (``"l2"``) over positions.
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
        show_progress (bool): Show a progress bar.
                    Default: True

    Returns:
        *tuple* of a *dict* of tensors (N, U), float32, by layer name, and the labels (N,), int64.

    Raises:
        ValueError: The loader is empty or has no labels, a layer puts out NaN or does not run
            exactly once, directions do not fit, or the aggregate is unknown.

    Examples::

        >>> import torch
        >>> from captum_classfilters.identify import unit_scores
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU())
        >>> data = [(torch.rand(6, 3, 8, 8), torch.arange(6) % 2)]
        >>> scores, labels = unit_scores(net, ["0", "1"], data, show_progress=False)
        >>> scores["1"].shape
        torch.Size([6, 4])
    """
    aggregated(torch.zeros(1, 1, 1), aggregate)  # an unknown one is refused before the pass
    units = units_of(model, layers, directions, subtract_bias, channel_dim)
    for one in units:
        one.average_first = aggregate == "mean"
    parts, labels = score_images(
        model,
        units,
        dataloader,
        {one.name: lambda maps: aggregated(maps, aggregate) for one in units},
        show_progress,
    )
    return {name: torch.cat(found) for name, found in parts.items()}, labels


def score_images(
    model: nn.Module,
    units: Sequence[UnitMaps],
    dataloader: Iterable[Any],
    reduce: Mapping[str, Any],
    show_progress: bool,
) -> tuple[dict[str, list[Any]], Tensor]:
    """What a function makes of each layer's maps (N, U, P), batch by batch, and all labels."""
    batch: dict[str, Any] = {}

    def hook(one: UnitMaps) -> Any:
        def take(_module: nn.Module, _inputs: Any, output: Any) -> None:
            maps = one.maps(output).detach()
            batch[one.name] = (maps.amax(2), reduce[one.name](maps))

        return take

    parameter = next(model.parameters(), None)
    device = parameter.device if parameter is not None else None
    handles = [one.module.register_forward_hook(hook(one)) for one in units]
    parts: dict[str, list[Any]] = {one.name: [] for one in units}
    labels: list[Tensor] = []
    bar = tqdm(dataloader, desc="units", unit="batch", disable=not show_progress)
    try:
        with model_left_as_found(model, evaluation=True), torch.no_grad():
            for index, given in enumerate(bar):
                inputs, targets = split_batch(given, index, device)
                targets = torch.as_tensor(targets).cpu()
                number = len(inputs[0])
                if targets.shape != (number,):
                    raise ValueError(
                        f"The labels of batch {index} have shape {tuple(targets.shape)}; expected "
                        f"({number},), one class for each image."
                    )
                for one in units:
                    one.runs = 0
                model(*inputs)
                for one in units:
                    check_runs(one.name, one.runs)
                    highest, found = batch.pop(one.name)
                    one.check(highest, number, sum(map(len, labels)))
                    parts[one.name].append(
                        found.float().cpu() if isinstance(found, Tensor) else found
                    )
                labels.append(targets.long())
    finally:
        for handle in handles:
            handle.remove()
    if not labels or not sum(map(len, labels)):
        raise ValueError("The data loader is empty.")
    return parts, torch.cat(labels)
