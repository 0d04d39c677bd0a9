"""What a layer puts out, as maps of its filters or of directions in their space."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from captum_classfilters._core.layers import (
    check_batch,
    check_runs,
    filter_axis,
    find_layers,
    only_tensor,
    positions_last,
)


class UnitMaps:
    """One layer's units: its filters, or projections of them on directions.

    Args:

        name (str): The layer's name, for messages.
        module (nn.Module): The layer.
        channel_dim (int, optional): Axis of the filters.
        directions (Tensor or object, optional): A matrix (K, r), or an object with one as ``left``.
        subtract_bias (bool): Subtract the layer's own bias before projecting.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        channel_dim: int | None = None,
        directions: Any = None,
        subtract_bias: bool = True,
    ) -> None:
        self.name, self.module, self.channel_dim = name, module, channel_dim
        self.positions: tuple[int, ...] = ()
        self.runs = 0
        self.average_first = False  # a mean over positions is linear: cheaper before projecting
        self.matrix = None if directions is None else self._matrix(directions)
        self.offset: Tensor | None = None
        bias = getattr(module, "bias", None)
        weighted = isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))
        if subtract_bias and weighted and self.matrix is not None and isinstance(bias, Tensor):
            fits = len(bias) == len(self.matrix)  # else `maps` says what does not
            self.offset = bias.detach().to(self.matrix) @ self.matrix if fits else None

    def _matrix(self, directions: Any) -> Tensor:
        matrix = getattr(directions, "left", directions)
        if not isinstance(matrix, Tensor) or matrix.dim() != 2 or not matrix.shape[1]:
            found = tuple(matrix.shape) if isinstance(matrix, Tensor) else type(matrix).__name__
            raise ValueError(
                f"The directions for {self.name!r} are {found}; expected a matrix (K, r) whose "
                "columns are directions."
            )
        return matrix.detach()

    def maps(self, output: Any) -> Tensor:
        """The layer's output as (N, U, P), P = 1 where positions are averaged first."""
        self.runs += 1
        maps = self.projected(only_tensor(output, self.name))
        return maps if self.offset is None else maps - self.offset.to(maps)[:, None]

    def projected(self, tensor: Tensor) -> Tensor:
        """A tensor in the layer's layout as (N, U, P), no bias subtracted."""
        axis = filter_axis(self.module, tensor, self.channel_dim)
        self.positions = (*tensor.shape[1:axis], *tensor.shape[axis + 1 :])
        maps = positions_last(tensor, axis)
        maps = maps.mean(2, keepdim=True) if self.average_first else maps
        if self.matrix is None:
            return maps
        if len(self.matrix) != maps.shape[1]:
            raise ValueError(
                f"The directions for {self.name!r} have shape {tuple(self.matrix.shape)}, but the "
                f"layer has {maps.shape[1]} filters; expected ({maps.shape[1]}, r)."
            )
        return torch.einsum("nkp,kr->nrp", maps, self.matrix.to(maps))

    def check(self, scores: Tensor, num_images: int, seen: int) -> None:
        """The layer ran once, with one row (N, U) for each image, and no NaN."""
        check_runs(self.name, self.runs)
        check_batch(self.name, len(scores), num_images)
        wrong = scores.isnan().any(1).nonzero()
        if len(wrong):
            raise ValueError(
                f"The layer {self.name!r} puts out NaN for image {seen + int(wrong[0])}."
            )


def aggregated(maps: Tensor, how: str) -> Tensor:
    """One number (N, U) for each map of (N, U, P)."""
    if how == "mean":
        return maps.mean(2)
    if how == "max":
        return maps.amax(2)
    if how == "min":
        return maps.amin(2)
    if how == "abs_mean":
        return maps.abs().mean(2)
    if how == "l2":
        return torch.linalg.vector_norm(maps, dim=2)
    raise ValueError(f"aggregate={how!r}; choose one of 'mean', 'max', 'min', 'abs_mean' and 'l2'.")


def units_of(
    model: nn.Module,
    layers: str | nn.Module | Sequence[str | nn.Module],
    directions: Mapping[str, Any] | None,
    subtract_bias: bool,
    channel_dim: int | Mapping[str, int] | None,
) -> list[UnitMaps]:
    """The units of several layers; with directions, every layer must have some."""
    units = []
    for name, module in find_layers(model, layers).items():
        dim = channel_dim.get(name) if isinstance(channel_dim, Mapping) else channel_dim
        if directions is not None and name not in directions:
            raise ValueError(
                f"There are no directions for the layer {name!r}; directions must name every layer."
            )
        chosen = None if directions is None else directions[name]
        units.append(UnitMaps(name, module, dim, chosen, subtract_bias))
    if not units:
        raise ValueError("There are no layers.")
    return units
