"""What a layer puts out, image by image, as maps of its filters or of directions in their space."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from captum_classfilters._core.batches import Batch, Batches, read_batches
from captum_classfilters._core.devices import on_device, without_autocast
from captum_classfilters._core.layers import (
    find_layers,
    only_tensor,
    positions_last,
)
from captum_classfilters._core.outputs import at_least_float32, scores_per_class
from captum_classfilters._core.progress import Progress
from captum_classfilters._core.tables import described
from captum_classfilters._core.taps import LayerTap, tapping
from captum_classfilters._core.types import Dataloader, Directions, Unpack

#: How the positions of a map become one number.
Aggregate = Literal["mean", "max", "min", "sum", "abs_mean", "abs_sum", "l2"]
Seen = tuple[Tensor, ...]

_BYTES_ON_DEVICE = 64 * 2**20  # of results that wait there to be moved together


_AGGREGATES: dict[str, Callable[[Tensor, torch.dtype], Tensor]] = {
    "mean": lambda maps, dtype: maps.mean(2, dtype=dtype),
    "max": lambda maps, dtype: maps.amax(2).to(dtype),
    "min": lambda maps, dtype: maps.amin(2).to(dtype),
    "sum": lambda maps, dtype: maps.sum(2, dtype=dtype),
    "abs_mean": lambda maps, dtype: maps.abs().mean(2, dtype=dtype),
    "abs_sum": lambda maps, dtype: maps.abs().sum(2, dtype=dtype),
    "l2": lambda maps, dtype: torch.linalg.vector_norm(maps, dim=2, dtype=dtype),
}


def aggregated(maps: Tensor, aggregate: str) -> Tensor:
    """One number (N, U) for each map of (N, U, P), of half precision in float32."""
    check_aggregate(aggregate)
    return _AGGREGATES[aggregate](maps, torch.promote_types(maps.dtype, torch.float32))


def check_aggregate(aggregate: object, known: Sequence[str] = get_args(Aggregate)) -> None:
    """Raise if there is no such aggregate."""
    if aggregate not in known:
        names = [repr(name) for name in known]
        raise ValueError(
            f"aggregate={aggregate!r}; choose one of {', '.join(names[:-1])} and {names[-1]}."
        )


class UnitTap(LayerTap):
    r"""
    A layer that is read as maps (N, U, P) of its units: its filters, or directions in their space.

    Args:

        model (nn.Module): The model.
        module (nn.Module): The layer.
        name (str): Its name, for messages.
        channel_dim (int, optional): Axis of the filters, where it cannot be told from the layer.
                    Default: None
        at_input (bool): Read the layer's input instead of its output.
                    Default: False
        directions (Tensor or object, optional): A matrix (K, r), or an object with one as ``left``.
                    Default: None
        subtract_bias (bool): Subtract the layer's own bias before projecting.
                    Default: True
    """

    average_first = False  # a mean over positions is linear: cheaper before projecting
    differentiable = False  # `source` takes the layer's place, so that gradients can be taken there
    source: Tensor  # the layer's tensor in the last forward pass, if it is differentiable
    positions: tuple[int, ...] = ()  # the shape of a unit's map
    seen: Seen = ()  # what `reduce` made of the last forward pass

    def __init__(
        self,
        model: nn.Module,
        module: nn.Module,
        channel_dim: int | None = None,
        at_input: bool = False,
        directions: Directions | None = None,
        subtract_bias: bool = True,
    ) -> None:
        super().__init__(model, module, channel_dim, at_input)
        #: From maps (N, U, P), which what follows the layer may overwrite, to what is kept of them:
        #: tensors with N rows.
        self.reduce: Callable[[Tensor], Seen] = lambda maps: (maps,)
        self.matrix = None if directions is None else _matrix(directions, self.name)
        self.offset: Tensor | None = None
        if self.matrix is not None and subtract_bias:
            self.offset = projected_bias(module, self.matrix)

    def take(self, value: object) -> Tensor | None:
        """Keep what matters of the layer's value."""
        tensor = only_tensor(value, self.name)
        self.count(tensor)
        if self.differentiable:
            self.check_recorded()
        if self.differentiable and not tensor.requires_grad:
            tensor = tensor.detach().requires_grad_()
        seen = self.reduce(self.maps(tensor))
        if not self.frozen:
            self.seen = seen
        if not self.differentiable:
            return None
        if not self.frozen:
            self.source = tensor
        return tensor.clone()  # what follows the layer may overwrite it

    def maps(self, tensor: Tensor) -> Tensor:
        """The layer's tensor as (N, U, P); P = 1 where positions are averaged first."""
        maps = self.projected(tensor)
        if self.offset is None:
            return maps
        self.offset = self.offset.to(maps)  # moved once
        return maps - self.offset[:, None]

    def projected(self, tensor: Tensor) -> Tensor:
        """A tensor in the layer's layout as (N, U, P), no bias subtracted."""
        axis = self.axis_of(tensor)
        self.positions = (*tensor.shape[1:axis], *tensor.shape[axis + 1 :])
        maps = positions_last(tensor, axis)
        if self.average_first:
            maps = aggregated(maps, "mean")[:, :, None]
        if self.matrix is None:
            return maps
        if len(self.matrix) != maps.shape[1]:
            raise ValueError(
                f"The directions for {self.name!r} have shape {tuple(self.matrix.shape)}, but the "
                f"layer has {maps.shape[1]} filters; expected ({maps.shape[1]}, r)."
            )
        maps = at_least_float32(maps)
        self.matrix = self.matrix.to(maps)  # moved once
        with without_autocast(maps.device):
            return torch.einsum("nkp,kr->nrp", maps, self.matrix)

    def check(self, num_images: int) -> None:
        """Raise if the layer did not run exactly once, with one row for each image."""
        super().check(num_images)
        if len(self.rows) > 1:
            raise ValueError(
                f"The layer {self.name!r} ran on several devices; pass the model inside the "
                "DataParallel (model.module)."
            )

    def finite(self) -> Tensor:
        """Which images (N,) have only finite numbers in what was kept of them."""
        parts = [part.detach() for part in self.seen if part.is_floating_point()]
        return torch.stack([part.flatten(1).isfinite().all(1) for part in parts]).all(0)


def units_of(
    model: nn.Module,
    layers: str | nn.Module | Sequence[str | nn.Module],
    channel_dim: int | Mapping[str, int] | None = None,
    directions: Mapping[str, Directions] | None = None,
    subtract_bias: bool = True,
) -> list[UnitTap]:
    """The units of several layers; with directions, every layer must have some."""
    taps = []
    for name, module in find_layers(model, layers).items():
        dim = channel_dim.get(name) if isinstance(channel_dim, Mapping) else channel_dim
        if directions is not None and name not in directions:
            raise ValueError(
                f"There are no directions for the layer {name!r}; directions must name every layer."
            )
        chosen = None if directions is None else directions[name]
        taps.append(UnitTap(model, module, dim, False, chosen, subtract_bias))
    if not taps:
        raise ValueError("There are no layers.")
    return taps


def projected_bias(module: nn.Module, matrix: Tensor) -> Tensor:
    """A layer's own bias along directions (K, r), as (r,); zeros without one."""
    bias = getattr(module, "bias", None)
    weighted = isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))
    # A matrix that does not fit is refused where the layer is read.
    if not weighted or not isinstance(bias, Tensor) or len(bias) != len(matrix):
        return matrix.new_zeros(matrix.shape[1])
    with without_autocast(matrix.device):
        return bias.detach().to(matrix) @ matrix


def read_units(
    model: nn.Module,
    taps: Sequence[UnitTap],
    dataloader: Dataloader,
    description: str,
    take: Callable[[Batches, Batch, object], None],
    *,
    unpack: Unpack | None,
    show_progress: bool,
    labeled: bool = True,
    progress: Progress | None = None,
) -> int:
    r"""
    Run a model over a loader; after each batch a function finds in the taps what they saw of it.

    Args:

        model (nn.Module): The model.
        taps (sequence of UnitTap): Layers to read.
        dataloader (iterable): The loader.
        description (str): What the progress bar is called.
        take (Callable): Called with the batches, each batch, which has been checked, and what the
                    model returned for it, while the layers are still tapped.
        unpack (Callable, optional): From a batch of another kind to the pair (inputs, labels).
        show_progress (bool): Show a progress bar.
        labeled (bool): Refuse batches without labels.
                    Default: True
        progress (Progress, optional): Keeps what is counted if the pass stops early.
                    Default: None

    Returns:
        *int*: The number of images.

    Raises:
        ValueError: A layer did not run exactly once for each image, or its numbers are not finite.
    """
    with read_batches(
        model,
        dataloader,
        description,
        unpack=unpack,
        labeled=labeled,
        gradients=any(tap.differentiable for tap in taps),
        show_progress=show_progress,
        progress=progress,
    ) as batches:
        for batch in batches:
            with tapping(taps):
                output = model(*batch.inputs)
                for tap in taps:
                    tap.check(batch.size)
                    check_finite(batches, batch, tap.name, tap.finite())
                    tap.frozen = True
                take(batches, batch, output)
            batches.check_repeats(model, batch, output)
    return batches.num_images


def check_finite(
    batches: Batches, batch: Batch, name: str, finite: Tensor, what: str = "activations"
) -> None:
    """Raise, soon, unless all images (N,) of a batch are marked."""
    number, first = batch.number, batch.first_image  # the error must not keep the images

    def error(finite: Tensor) -> ValueError:
        image = int((~finite).nonzero()[0, 0])
        return ValueError(
            f"NaN or Inf among the {what} of the layer {name!r} for image {first + image}: "
            f"batch {number}, image {image} of the batch."
        )

    batches.check(finite.all(), partial(error, finite))


def given_classes(batch: Batch) -> Tensor | None:
    """The class index that a batch gives for each image, (N,); None if it gives something else.

    Numbers are not looked at, so a device is not waited for.
    """
    try:
        labels = torch.as_tensor(batch.labels)
    except (TypeError, ValueError, RuntimeError):
        return None
    labels = labels[:, 0] if labels.shape == (batch.size, 1) else labels
    whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    return labels.long() if whole and labels.shape == (batch.size,) else None


def num_outputs(output: object) -> int | None:
    """How many classes a model's output has scores of; None if it is something else."""
    try:
        return scores_per_class(output).shape[1]
    except ValueError:
        return None


def classes_of(batches: Batches, batch: Batch, num_classes: int | None) -> Tensor:
    """The class index of each image (N,), checked; of whatever number of classes if it is None."""
    if num_classes is not None:
        return batches.class_labels(batch, num_classes)
    labels, number = given_classes(batch), batch.number
    if labels is None:
        raise ValueError(
            f"The labels of batch {number} are {described(batch.labels)}; expected one class for each "
            f"image, whole numbers of shape ({batch.size},)."
        )
    batches.check(
        on_device((labels >= 0).all(), batch.device),
        lambda: ValueError(
            f"Batch {number} has a label below 0; expected class indices, which start at 0."
        ),
    )
    return labels


class Rows:
    r"""
    Tensors with a row for each image, kept on the CPU batch after batch.

    Those of a device wait there for others to be moved with, so that it need not be waited for after
    each batch.

    Args:

        keep (Callable, optional): From tensors on their device to what is kept of them, on the CPU;
                    by default the first of them itself.
                    Default: None
    """

    def __init__(self, keep: Callable[..., Any] | None = None) -> None:
        self._keep = keep or (lambda rows, *_: rows.cpu())
        self._waiting: list[Seen] = []
        self._bytes = 0
        self._pieces: list[Any] = []

    def add(self, *tensors: Tensor) -> None:
        """Add a batch's rows."""
        self._waiting.append(tensors)
        self._bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if tensors[0].device.type == "cpu" or self._bytes >= _BYTES_ON_DEVICE:
            self._move()

    def pieces(self) -> list[Any]:
        """What is kept, in order."""
        self._move()
        return self._pieces

    def _move(self) -> None:
        waiting, self._waiting, self._bytes = self._waiting, [], 0
        if waiting:
            parts = [
                part[0] if len(part) == 1 else torch.cat(part)
                for part in zip(*waiting, strict=True)
            ]
            self._pieces.append(self._keep(*parts))


def _matrix(directions: Directions, name: str) -> Tensor:
    matrix = getattr(directions, "left", directions)
    if not isinstance(matrix, Tensor) or matrix.dim() != 2 or not matrix.shape[1]:
        described = tuple(matrix.shape) if isinstance(matrix, Tensor) else type(matrix).__name__
        raise ValueError(
            f"The directions for {name!r} are {described}; expected a matrix (K, r) whose columns "
            "are directions."
        )
    return matrix.detach()
