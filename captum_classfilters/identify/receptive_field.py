"""Which input pixels a position of a layer can depend on, measured on the model itself."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from captum_classfilters._core.guard import model_left_as_found
from captum_classfilters._core.layers import (
    check_batch,
    check_runs,
    filter_axis,
    find_layers,
    only_tensor,
    positions_last,
)


class _LastLayerReached(Exception):  # noqa: N818 - it ends a forward pass, it reports no error
    """Nothing after the last layer of interest needs to run."""


def receptive_field(
    model: nn.Module,
    layers: str | nn.Module | Sequence[str | nn.Module],
    example_input: Tensor,
    *,
    channel_dim: int | Mapping[str, int] | None = None,
    batch_size: int = 32,
) -> dict[str, Tensor]:
    r"""
    Measure the box of input pixels that each position of a layer can depend on.

    One row, or one column, of an image is replaced by NaN, and the positions of the layer that
    become NaN are read off. A NaN survives every weight, zero included, and every ReLU and pooling,
    so that this is the receptive field of the architecture, whatever the weights and the image;
    it needs no graph of the model, and holds for any of them. H + W single-image forward passes
    find the boxes of all layers together. A layer behind a global operation, an attention or a
    squeeze-and-excitation say, depends on the whole image, and its boxes say so.

    Args:

        model (nn.Module): The model. It runs in evaluation mode and is left as found.
        layers (str, nn.Module or sequence): Layers, or their dotted names.
        example_input (Tensor): Shape (N, C, H, W); the first image gives size, type and device.
        channel_dim (int or mapping, optional): Axis of the filters where it cannot be told from the
                    layer, for all layers or by name.
                    Default: None
        batch_size (int): Images in one forward pass.
                    Default: 32

    Returns:
        *dict*: For each layer's name an int64 tensor of shape (\*positions, 4), (h, w, 4) for a
        convolution: left, top, right, bottom in input pixels, clipped to the image; right and
        bottom are the first pixels outside. A position that depends on no pixel has an empty box
        of zeros.

    Raises:
        ValueError: The input is not a batch of images, a layer does not run exactly once, or the
            model does not give finite values for an image of zeros.

    Examples::

        >>> import torch
        >>> from captum_classfilters.identify import receptive_field
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(1, 2, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2))
        >>> boxes = receptive_field(net, "2", torch.zeros(1, 1, 8, 8))["2"]
        >>> boxes.shape
        torch.Size([4, 4, 4])
        >>> boxes[0, 1].tolist()  # the first row of the pooled map, its second column
        [1, 0, 5, 3]
    """
    if example_input.dim() != 4 or not example_input.is_floating_point():
        raise ValueError(
            f"example_input is {example_input.dtype} of shape {tuple(example_input.shape)}; "
            "receptive fields need floating-point images (N, C, H, W)."
        )
    found = find_layers(model, layers)
    probe = _Probe(model, found, channel_dim)
    blank = torch.zeros_like(example_input[:1])
    parameter = next(model.parameters(), None)
    blank = blank if parameter is None else blank.to(parameter.device)
    # Convolutions by transformed tiles would spread a NaN to positions that do not depend on it.
    plain = torch.backends.cudnn.flags(enabled=False)
    with model_left_as_found(model, evaluation=True), torch.no_grad(), plain:
        for name, reached in probe.run(blank).items():
            if bool(reached.any()):
                raise ValueError(f"The layer {name!r} puts out NaN for an image of zeros.")
        edges = [_edges(probe, blank, axis, batch_size) for axis in (3, 2)]
    columns, rows = edges
    boxes = {}
    for name in found:
        (left, right), (top, bottom) = columns[name], rows[name]
        box = torch.stack([left, top, right, bottom], dim=-1)
        boxes[name] = box.reshape(*probe.positions[name], 4).cpu()
    return boxes


class _Probe:
    """Which positions of some layers are NaN in a forward pass."""

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        channel_dim: int | Mapping[str, int] | None,
    ) -> None:
        self.model, self.modules = model, modules
        self.channel_dim = channel_dim
        self.positions: dict[str, tuple[int, ...]] = {}
        self.checked = False

    def run(self, images: Tensor) -> dict[str, Tensor]:
        """For each layer, bool (N, P): the position holds a NaN in any filter."""
        found: dict[str, Tensor] = {}
        runs = dict.fromkeys(self.modules, 0)

        def hook(module: nn.Module, name: str) -> Callable[..., None]:
            def take(_module: nn.Module, _inputs: Any, output: Any) -> None:
                tensor = only_tensor(output, name)
                chosen = self.channel_dim
                dim = chosen.get(name) if isinstance(chosen, Mapping) else chosen
                axis = filter_axis(module, tensor, dim)
                shape = tuple(tensor.shape)
                self.positions[name] = (*shape[1:axis], *shape[axis + 1 :])
                found[name] = positions_last(tensor.isnan(), axis).any(1)
                runs[name] += 1
                if self.checked and len(found) == len(self.modules):
                    raise _LastLayerReached

            return take

        handles = [
            module.register_forward_hook(hook(module, name))
            for name, module in self.modules.items()
        ]
        try:
            with suppress(_LastLayerReached):
                self.model(images)
        finally:
            for handle in handles:
                handle.remove()
        for name in self.modules:
            check_runs(name, runs[name])
            check_batch(name, len(found[name]), len(images))
        self.checked = True  # the first pass was whole: each layer runs once
        return found


def _edges(
    probe: _Probe, blank: Tensor, axis: int, batch_size: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """First pixel, and first pixel after the last, that each position depends on along an axis."""
    length = blank.shape[axis]
    first: dict[str, Tensor] = {}
    end: dict[str, Tensor] = {}
    for start in range(0, length, batch_size):
        lines = range(start, min(start + batch_size, length))
        images = blank.repeat(len(lines), 1, 1, 1)
        for row, line in enumerate(lines):
            images[row].select(axis - 1, line).fill_(float("nan"))
        for name, reached in probe.run(images).items():
            if name not in first:
                first[name] = torch.full_like(reached[0], length, dtype=torch.int64)
                end[name] = torch.zeros_like(first[name])
            line_numbers = torch.tensor(list(lines), device=reached.device)[:, None]
            lowest = torch.where(reached, line_numbers, length).amin(0)
            highest = torch.where(reached, line_numbers + 1, 0).amax(0)
            first[name] = torch.minimum(first[name], lowest)
            end[name] = torch.maximum(end[name], highest)
    return {name: (torch.where(end[name] > 0, first[name], 0), end[name]) for name in probe.modules}
