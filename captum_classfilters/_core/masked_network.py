"""A network with filters set to zero, and another one seen to be the same."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from captum_classfilters._core.layers import layer_tensors, module_named, with_tensors
from captum_classfilters._core.taps import entered, hooked, tapped
from captum_classfilters._core.types import ModelInputs

_MOST_POSITIONS = 512  # of what a layer reads or makes that are kept to be compared
_FLOOR = 1e-3  # where all values are smaller, differences are measured by this instead

Batch = ModelInputs


@dataclass
class Mask:
    """Where filters are zero: the module, the axis of the filters and their places there."""

    module: str
    axis: int
    places: list[int]
    at_input: bool = False


@contextmanager
def masked(model: nn.Module, masks: Iterable[Mask]) -> Iterator[None]:
    """Zero filters in the outputs, or inputs, of some layers."""

    def zeroed(mask: Mask, value: Any) -> object:
        first, *others = layer_tensors(value)
        places = torch.tensor(mask.places).to(first.device)
        return with_tensors(value, [first.index_fill(mask.axis, places, 0), *others])

    with ExitStack() as stack:
        for mask in masks:
            module = module_named(model, mask.module)
            stack.enter_context(tapped(module, partial(zeroed, mask), at_input=mask.at_input))
        yield


@dataclass
class Seen:
    """What was seen of a network on one batch.

    Args:

        batch (tuple): The model's inputs.
        outputs (list of Tensor): What it put out.
        read (dict): For each reader, its inputs (C, ...) at some positions ...
        spread (dict): ... their lowest, highest and mean value (3, C) over all positions ...
        made (dict): ... and its outputs (K, ...).
    """

    batch: Batch
    outputs: list[Tensor] = field(default_factory=list)
    read: dict[str, Tensor] = field(default_factory=dict)
    spread: dict[str, Tensor] = field(default_factory=dict)
    made: dict[str, Tensor] = field(default_factory=dict)


def observe(model: nn.Module, batch: Batch, readers: Iterable[str], spreads: bool = False) -> Seen:
    r"""
    Run a model and see what it puts out and what some of its layers read and make.

    Args:

        model (nn.Module): The model, in evaluation mode; the random state is the caller's business.
        batch (tuple): Its inputs.
        readers (iterable of str): Convolutions and linear layers.
        spreads (bool): See the spread of what these read.
    """
    seen = Seen(batch)
    with _watched(model, readers, seen, spreads), torch.no_grad():
        torch.manual_seed(0)
        outputs = model(*batch)
    seen.outputs = [leaf.detach() for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
    return seen


@contextmanager
def _watched(model: nn.Module, readers: Iterable[str], seen: Seen, spreads: bool) -> Iterator[None]:
    names = {module_named(model, name): name for name in readers}

    def reads(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        tensor, axis = inputs[0].detach(), channel_axis(module)
        seen.read[names[module]] = _some(tensor, axis)
        if spreads:
            others = [other for other in range(tensor.dim()) if other != axis % tensor.dim()]
            bounds = [tensor.amin(others), tensor.amax(others), tensor.mean(others)]
            seen.spread[names[module]] = torch.stack(bounds)

    def makes(module: nn.Module, _inputs: object, output: Tensor) -> None:
        seen.made[names[module]] = _some(output.detach(), channel_axis(module))

    with entered(names, reads), hooked(names, makes):
        yield


def channel_axis(module: nn.Module) -> int:
    """The axis of a convolution's or linear layer's inputs, and of its filters."""
    return -1 - len(module.kernel_size) if isinstance(module, nn.modules.conv._ConvNd) else -1


def _some(tensor: Tensor, axis: int) -> Tensor:
    """Values (C, ...) at some positions, evenly spread over every axis."""
    rows = tensor.movedim(axis, 0)
    most = round(_MOST_POSITIONS ** (1 / max(1, rows.dim() - 1)))
    steps = [slice(None), *(slice(None, None, -(-size // most)) for size in rows.shape[1:])]
    return rows[tuple(steps)].clone()


def random_like(batch: Batch) -> Batch:
    """Other inputs of the same range, so that what one image shows is not taken for a rule."""
    generator = torch.Generator().manual_seed(0)

    def other(value: Tensor) -> Tensor:
        if value.dtype == torch.bool or value.is_complex() or not value.numel():
            return value
        finite = value.detach().cpu().double().nan_to_num()
        low, high = float(finite.min()), float(finite.max())
        if not value.is_floating_point():
            numbers = torch.randint(int(low), int(high) + 1, value.shape, generator=generator)
            return numbers.to(value)
        noise = torch.rand(value.shape, generator=generator)
        return (low + noise * ((high - low) or 1.0)).to(value)

    return tuple(tree_map_only(Tensor, other, batch))


def first_images(batch: Batch, number: int) -> Batch:
    """The first images of a batch; all of it where its tensors are not equally many."""
    leaves = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    if len({len(leaf) if leaf.dim() else 0 for leaf in leaves}) != 1:
        return batch
    return tuple(tree_map_only(Tensor, lambda tensor: tensor[:number], batch))


def has_several_images(batch: Batch) -> bool:
    """Whether the first axis of an input is longer than 1."""
    leaves = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    return any(leaf.dim() and len(leaf) > 1 for leaf in leaves)


def difference(
    expected: Seen, model: nn.Module, read: Mapping[str, set[int]], removed: Mapping[str, set[int]]
) -> str:
    r"""
    How a model differs from a masked one; empty if it does not.

    Args:

        expected (Seen): The masked model.
        model (nn.Module): The model without these filters, in evaluation mode.
        read (dict): For each reader, the inputs that it has lost.
        removed (dict): For each module, the filters that it has lost.
    """
    try:
        seen = observe(model, expected.batch, read)
    except Exception as error:
        first_line = (str(error).splitlines() or [""])[0]
        return f"the network without them does not run ({type(error).__name__}: {first_line})"
    for name, lost in read.items():
        if _differ(_without(expected.read[name], lost), seen.read[name]):
            return f"without them, {name!r} would read other values than with them zero"
        own = removed.get(name, set())
        if _differ(_without(expected.made[name], own), seen.made[name]):
            return f"without them, {name!r} would put out other values than with them zero"
    same_number = len(expected.outputs) == len(seen.outputs)
    if not same_number or any(map(_differ, expected.outputs, seen.outputs)):
        return "without them, the model puts out other values than with them zero"
    return ""


def _without(rows: Tensor, places: set[int]) -> Tensor:
    return rows.index_select(0, other_places(len(rows), places).to(rows.device))


def other_places(number: int, places: set[int]) -> Tensor:
    """The places that stay."""
    stays = torch.ones(number, dtype=torch.bool)
    stays[list(places)] = False
    return stays.nonzero()[:, 0]


def _differ(expected: Tensor, other: Tensor) -> bool:
    """Whether two tensors differ by more than rounding."""
    if expected.shape != other.shape:
        return True
    if not expected.is_floating_point() or not expected.numel():
        return False  # what is counted or chosen may change by rounding
    tolerance = _tolerance(expected)
    if float((expected - other).abs().max()) <= tolerance * _size(expected):
        return False
    same = (expected == other) | (expected.isnan() & other.isnan())  # infinite, or no number
    off = float((expected - other)[~same].abs().max()) if not bool(same.all()) else 0.0
    return not off <= tolerance * _size(expected[expected.isfinite()])


def _size(values: Tensor) -> float:
    return max(float(values.abs().max()) if values.numel() else 0.0, _FLOOR)


def _tolerance(tensor: Tensor) -> float:
    """How far rounding may go, relative to the largest value."""
    precision = torch.finfo(tensor.dtype).eps
    if precision > 1e-6:
        return float(precision**0.5)
    return 1e-4 if tensor.device.type == "cpu" else 1e-2  # products in TensorFloat32
