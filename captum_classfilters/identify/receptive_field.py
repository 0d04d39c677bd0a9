"""Which input pixels a position of a layer can depend on, measured on the model itself."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial

import torch
from torch import Tensor, nn

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.devices import device_of, on_device
from captum_classfilters._core.guard import model_left_as_found
from captum_classfilters._core.taps import tapped, tapping
from captum_classfilters._core.units import Seen, UnitTap, units_of

_IMAGES_AT_ONCE = 32


class _LastLayerReached(Exception):  # noqa: N818 - it ends a forward pass, it reports no error
    """Nothing after the last layer of interest needs to run."""


@arguments_checked
def receptive_field(
    model: nn.Module,
    layers: str | nn.Module | Sequence[str | nn.Module],
    example_input: Tensor,
    *,
    channel_dim: int | Mapping[str, int] | None = None,
    batch_size: int | None = None,
) -> dict[str, Tensor]:
    r"""
    Measure the box of input pixels that each position of a layer can depend on.

    One row, or one column, of an image is replaced by NaN, and the positions of the layer that
    become NaN are read off. A NaN survives every weight, zero included, and every ReLU and pooling,
    so that this is the receptive field of the architecture, whatever the weights and the image;
    it needs no graph of the model, and holds for any of them. H + W single-image forward passes
    find the boxes of all layers together. A layer behind a global operation, an attention or a
    squeeze-and-excitation say, depends on the whole image, and its boxes say so. Signals and volumes
    are measured likewise, along each of their axes.

    Args:

        model (nn.Module): The model. It runs in evaluation mode and is left as found.
        layers (str, nn.Module or sequence): Layers, or their dotted names.
        example_input (Tensor): Images (N, C, H, W), signals (N, C, L) or volumes (N, C, D, H, W);
                    they give size and type.
        channel_dim (int or mapping, optional): Axis of the filters where it cannot be told from the
                    layer, for all layers or by name.
                    Default: None
        batch_size (int, optional): Images in each forward pass; by default as many as
                    ``example_input`` has, which a model may need, or 32 if it is a single image.
                    Default: None

    Returns:
        *dict*: For each layer's name an int64 tensor of shape (\*positions, 4), (h, w, 4) for a
        convolution: left, top, right, bottom in input pixels, clipped to the image; right and
        bottom are the first pixels outside. Of signals (\*positions, 2): start and end. Of volumes
        (\*positions, 6): left, top, front, right, bottom, back. A position that depends on no pixel
        has an empty box of zeros.

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
    dims = example_input.dim()
    if dims not in (3, 4, 5) or not example_input.is_floating_point():
        raise ValueError(
            f"example_input is {example_input.dtype} of shape {tuple(example_input.shape)}; "
            "receptive fields need floating-point images (N, C, H, W), signals (N, C, L) or volumes "
            "(N, C, D, H, W)."
        )
    num_images = batch_size or (len(example_input) if len(example_input) > 1 else _IMAGES_AT_ONCE)
    blank = torch.zeros_like(example_input[:1]).repeat(num_images, *[1] * (dims - 1))
    if dims == 4 and example_input.is_contiguous(memory_format=torch.channels_last):
        blank = blank.contiguous(memory_format=torch.channels_last)
    blank = on_device(blank, device_of(model))
    probe = _Probe(model, units_of(model, layers, channel_dim))
    # Convolutions by transformed tiles would spread a NaN to positions that do not depend on it.
    plain = torch.backends.cudnn.flags(enabled=False)
    with model_left_as_found(model, evaluation=True), torch.no_grad(), plain:
        for name, reached in probe.run(blank).items():
            if bool(reached.any()):
                raise ValueError(f"The layer {name!r} puts out NaN for an image of zeros.")
        along = [_edges(probe, blank, axis) for axis in reversed(range(2, dims))]
    boxes = {}
    for tap in probe.taps:
        first, end = zip(*(edges[tap.name] for edges in along), strict=True)
        boxes[tap.name] = torch.stack([*first, *end], -1).reshape(*tap.positions, -1).cpu()
    return boxes


class _Probe:
    """Runs a model as far as the last of some layers, and says where NaN came out."""

    def __init__(self, model: nn.Module, taps: Sequence[UnitTap]) -> None:
        self.model, self.taps = model, taps
        self.order: list[str] = []  # in which the layers end in a forward pass
        for tap in taps:
            tap.reduce = partial(_reached, tap.name, self.order)

    def run(self, images: Tensor) -> dict[str, Tensor]:
        """For each layer, bool (N, P): the position holds a NaN in any filter."""
        last = self.order[-1:]  # none in the first pass, which is whole: each layer runs once
        self.order.clear()
        with tapping(self.taps), ExitStack() as stack, suppress(_LastLayerReached):
            for tap in self.taps:
                if tap.name in last:
                    stack.enter_context(tapped(tap.module, _stop))
            self.model(images)
        for tap in self.taps:
            tap.check(len(images))
        return {tap.name: tap.seen[0] for tap in self.taps}


def _reached(name: str, order: list[str], maps: Tensor) -> Seen:
    order.append(name)
    return (maps.isnan().any(1),)


def _stop(_value: object) -> None:
    raise _LastLayerReached


def _edges(probe: _Probe, blank: Tensor, axis: int) -> dict[str, tuple[Tensor, Tensor]]:
    """First pixel, and first pixel after the last, that each position depends on along an axis."""
    length, num_images = blank.shape[axis], len(blank)
    first: dict[str, Tensor] = {}
    end: dict[str, Tensor] = {}
    for start in range(0, length, num_images):
        lines = range(start, min(start + num_images, length))
        images = blank.clone()  # those beyond the last line stay blank
        for row, line in enumerate(lines):
            images[row].select(axis - 1, line).fill_(float("nan"))
        for name, every in probe.run(images).items():
            reached = every[: len(lines)]
            numbers = torch.arange(start, start + len(lines), device=reached.device)[:, None]
            lowest = torch.where(reached, numbers, length).amin(0)
            highest = torch.where(reached, numbers + 1, 0).amax(0)
            first[name] = torch.minimum(first[name], lowest) if name in first else lowest
            end[name] = torch.maximum(end[name], highest) if name in end else highest
    return {name: (torch.where(last > 0, first[name], 0), last) for name, last in end.items()}
