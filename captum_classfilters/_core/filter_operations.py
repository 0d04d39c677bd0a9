r"""
What PyTorch's operations below autograd do with filters.

Each filter has a number, and every element of a tensor the number of its filter, 0 for none; the
numbers are kept with size 1 along axes on which they do not vary. Pointwise operations leave
numbers where they are, operations that move elements move them as well. An operation that would do
something else if there were fewer filters, or that is not known here, loses them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves, tree_map_only

from captum_classfilters._core.types import Arguments, Keywords

Numbers = NDArray[np.int64]
NumbersOf = Callable[[object], Numbers | None]
Moved = Sequence[Numbers | None] | None  # in each output; None where filters are lost

BITS = 31  # of a number: two of them are one of 64 bits

# Pointwise, beside what PyTorch itself tags as such.
_POINTWISE = {
    *("hardswish", "hardswish_", "rrelu_with_noise", "log_sigmoid_forward", "native_dropout"),
    *("_to_copy", "lift_fresh", "contiguous", "copy_", "fill_", "zero_"),
    *("bernoulli_", "uniform_", "normal_"),
}
_MOVES = {
    *("permute", "transpose", "t", "numpy_T", "unsqueeze", "squeeze", "expand", "repeat"),
    *("stack", "alias", "detach"),
}
_VIEWS = {"view", "_unsafe_view", "reshape", "_reshape_alias"}
# Along an axis these do something with places, or with all values; the argument that names the axis.
_ALONG = {
    **dict.fromkeys(("slice", "select", "split", "split_with_sizes", "unbind"), "dim"),
    **dict.fromkeys(("index_select", "_softmax", "_log_softmax", "cumsum"), "dim"),
    **dict.fromkeys(("flip", "roll"), "dims"),
    "unfold": "dimension",
}
_SPATIAL = (
    *("max_pool", "avg_pool", "fractional_max_pool", "adaptive_", "_adaptive_avg_pool"),
    *("upsample_", "_upsample_", "reflection_pad", "replication_pad", "grid_sampler"),
)
_REDUCTIONS = {
    *("mean", "sum", "amax", "amin", "max", "min", "std", "var", "logsumexp", "prod"),
    *("linalg_vector_norm", "any", "all"),
}
_LIKE_ZEROS = {"sum", "linalg_vector_norm"}  # fewer filters give what filters that are zero give


@dataclass
class Meeting:
    """Filters that are added, multiplied or otherwise combined element by element."""

    left: Numbers
    right: Numbers
    product: bool


@dataclass
class Followed:
    """What an operation does with filters.

    Args:

        outputs (sequence): The numbers in each of its outputs, None for no filters.
        lost (list): Filters with which it would do something else if there were fewer.
        summed (list): Filters that it adds up.
        meetings (list of Meeting): Filters that it combines.
    """

    outputs: Sequence[Numbers | None] = ()
    lost: list[Numbers] = field(default_factory=list)
    summed: list[Numbers] = field(default_factory=list)
    meetings: list[Meeting] = field(default_factory=list)


@dataclass
class Operation:
    """One call of an operation below autograd."""

    func: OpOverload
    args: Arguments
    kwargs: Keywords
    output: Any

    @property
    def name(self) -> str:
        """Its name without that of its variant."""
        return str(getattr(getattr(self.func, "overloadpacket", None), "__name__", self.func))

    @property
    def outputs(self) -> Sequence[Any]:
        """The output, or all of them."""
        return self.output if isinstance(self.output, (tuple, list)) else [self.output]

    @property
    def pointwise(self) -> bool:
        """Whether each element of the output comes from those at its place."""
        if torch.Tag.pointwise in getattr(self.func, "tags", ()) or self.name in _POINTWISE:
            return True
        made = self.name.endswith("_like") or self.name.startswith("new_")
        return bool(made and self.outputs[0].shape == self.args[0].shape)

    @property
    def reduces(self) -> bool:
        """Whether it makes one value of several."""
        return self.name in _REDUCTIONS

    def argument(self, name: str) -> Any:
        """An argument by its name in the operation's signature."""
        for place, argument in enumerate(self.func._schema.arguments):
            if argument.name == name:
                if place < len(self.args):
                    return self.args[place]
                return self.kwargs.get(name, argument.default_value)
        return None

    def axes(self, name: str, dimensions: int) -> list[int]:
        """The axes that an argument names."""
        value = self.argument(name)
        axes = [] if value is None else value if isinstance(value, (list, tuple)) else [value]
        return [axis % dimensions for axis in axes] if dimensions else []

    def on_numbers(self, numbers_of: NumbersOf) -> list[Numbers | None]:
        """What the operation makes of the numbers in the place of the values."""

        def instead(tensor: Tensor) -> Tensor:
            numbers = numbers_of(tensor)
            numbers = np.zeros((), np.int64) if numbers is None else numbers
            return torch.from_numpy(numbers).expand(tensor.shape)

        first, *others = self.args
        moved = self.func(
            tree_map_only(Tensor, instead, first),
            *tree_map_only(Tensor, Tensor.cpu, others),
            **self.kwargs,
        )
        return [part.numpy() for part in (moved if isinstance(moved, (tuple, list)) else [moved])]


def follow(operation: Operation, numbers_of: NumbersOf) -> Followed:
    """What an operation does with the filters in its arguments."""
    name = operation.name
    source: Any = operation.args[0] if operation.args else None
    if operation.pointwise:
        return _pointwise(operation, numbers_of)
    if name == "cat":
        return Followed([_side_by_side(operation, numbers_of)])
    if name in _MOVES:
        return Followed(operation.on_numbers(numbers_of))
    numbers = numbers_of(source)
    moved: Moved = None
    if numbers is None:  # another argument has filters
        pass
    elif name in _VIEWS:
        moved = _viewed(numbers, source.shape, operation.output.shape)
    elif name.startswith("as_strided"):
        moved = _restrided(operation, numbers)
    elif name in _ALONG:
        moved = _along(operation, numbers, numbers_of)
    elif name == "constant_pad_nd":
        moved = _padded(operation, numbers)
    elif name == "index":
        moved = _indexed(operation, numbers, numbers_of)
    elif name.startswith(_SPATIAL):
        moved = _resized(operation, numbers)
    elif name in _REDUCTIONS:
        return _reduced(operation, numbers)
    if moved is None:
        known = (numbers_of(leaf) for leaf in tensors_in(operation))
        return Followed(lost=[own for own in known if own is not None])
    return Followed(moved)


def tensors_in(operation: Operation) -> list[Tensor]:
    """The tensors among an operation's arguments."""
    return [*tensors(operation.args), *tensors(tuple(operation.kwargs.values()))]


def tensors(value: object) -> list[Tensor]:
    """The tensors in a value."""
    nested = (tuple, list, dict)
    flat = isinstance(value, tuple) and not any(isinstance(part, nested) for part in value)
    leaves = value if isinstance(value, tuple) and flat else tree_leaves(value)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def axes_of(numbers: Numbers) -> list[int]:
    """The axes along which filters differ."""
    return [axis for axis, size in enumerate(numbers.shape) if size > 1]


def narrowed(numbers: Numbers) -> Numbers:
    """Numbers with size 1 along every axis on which they do not vary."""
    for axis, size in enumerate(numbers.shape):
        if size > 1:
            first = numbers.take([0], axis)
            if numbers.strides[axis] == 0 or (numbers == first).all():
                numbers = first
    return numbers


# -- pointwise ------------------------------------------------------------------------------------


def _pointwise(operation: Operation, numbers_of: NumbersOf) -> Followed:
    """Filters keep their places; those of several tensors meet."""
    output, followed = operation.outputs[0], Followed()
    leaves = tensors_in(operation)
    known = [(leaf, own) for leaf in leaves if (own := numbers_of(leaf)) is not None]
    varying = {axis - leaf.dim() for leaf, own in known for axis in axes_of(own)}
    several = len(known) > 1
    for leaf in leaves:
        sizes = [_size(leaf, axis) for axis in varying]
        mine = numbers_of(leaf)
        if mine is None and any(size > 1 for size in sizes) and not _is_filled(operation, leaf):
            followed.lost += [own for _, own in known]  # the tensor would keep its size
        if mine is not None and several and 1 in sizes:  # one value for all filters of another
            followed.lost.append(mine)
            known = [(tensor, own) for tensor, own in known if tensor is not leaf]
    result: Numbers | None = None
    for _, own in known:
        aligned = own[(None,) * (output.dim() - own.ndim)]
        result = aligned if result is None else _meet(operation, followed, result, aligned)
    followed.outputs = [result]
    return followed


def _is_filled(operation: Operation, leaf: Tensor) -> bool:
    """Whether a tensor is one into the whole of which another is copied."""
    return operation.name == "copy_" and leaf is operation.output and leaf._base is None


def _size(tensor: Tensor, axis: int) -> int:
    """The size of an axis counted from the end, 1 where a tensor only repeats itself."""
    if -axis > tensor.dim() or tensor.stride(axis) == 0:
        return 1
    return tensor.shape[axis]


def _meet(operation: Operation, followed: Followed, left: Numbers, right: Numbers) -> Numbers:
    """Note which filters meet; the numbers of those that were there first."""
    left, right = np.broadcast_arrays(left, right)
    alone = (left > 0) != (right > 0)
    if alone.any():
        followed.lost.append(np.maximum(left, right)[alone])
    different = ~alone & (left != right)
    if different.any():
        pairs = np.unique(left[different] << BITS | right[different])
        product = operation.name.startswith("mul")
        followed.meetings.append(Meeting(pairs >> BITS, pairs & ((1 << BITS) - 1), product))
    return np.where(alone, np.maximum(left, right), np.minimum(left, right))


# -- elements moved -------------------------------------------------------------------------------


def _side_by_side(operation: Operation, numbers_of: NumbersOf) -> Numbers:
    dimensions = operation.output.dim()
    (axis,) = operation.axes("dim", dimensions)
    nobody = np.zeros([1] * dimensions, np.int64)
    parts = [
        (part.shape[axis], nobody if (own := numbers_of(part)) is None else own)
        for part in operation.args[0]
        if part.dim() == dimensions  # an empty tensor of one axis is passed over
    ]
    shape = [max(sizes) for sizes in zip(*(own.shape for _, own in parts), strict=True)]
    sides = []
    for size, own in parts:
        shape[axis] = size
        sides.append(np.broadcast_to(own, shape))
    return np.concatenate(sides, axis)


def _viewed(numbers: Numbers, before: Sequence[int], after: Sequence[int]) -> Moved:
    """A view may flatten filters with their neighbors, but not take them apart."""
    axes = set(axes_of(numbers))
    if any(axes & set(old) and len(new) != 1 for old, new in _groups(before, after)):
        return None
    if before[:1] == after[:1] and 0 not in axes:  # every image has the same
        before, after = (1, *before[1:]), (1, *after[1:])
    return [np.broadcast_to(numbers, before).reshape(after)]


def _restrided(operation: Operation, numbers: Numbers) -> Moved:
    """Maps of one position may be given the strides of another memory format."""
    output = operation.output
    same = output.shape == operation.args[0].shape and output.storage_offset() == 0
    dense, one_axis = output.is_contiguous(), len(axes_of(numbers)) == 1
    axes = [axis for axis in range(1, output.dim()) if output.shape[axis] > 1]
    return [numbers] if same and dense and one_axis and axes == axes_of(numbers) else None


def _groups(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """The axes of two shapes of the same elements in the smallest groups of the same size."""
    left = [axis for axis, size in enumerate(before) if size != 1]
    right = [axis for axis, size in enumerate(after) if size != 1]
    while left and right:
        old, new = [left.pop(0)], [right.pop(0)]
        while prod(before[axis] for axis in old) != prod(after[axis] for axis in new):
            if prod(before[axis] for axis in old) < prod(after[axis] for axis in new):
                old.append(left.pop(0))
            else:
                new.append(right.pop(0))
        yield old, new


def _along(operation: Operation, numbers: Numbers, numbers_of: NumbersOf) -> Moved:
    """What happens along another axis does not touch the filters."""
    source = operation.args[0]
    axes = operation.axes(_ALONG[operation.name], source.dim())
    whole = operation.name == "slice" and operation.output.shape == source.shape
    if not whole and (not axes or set(axes) & set(axes_of(numbers))):
        return None
    if operation.name in ("_softmax", "_log_softmax", "cumsum"):
        return [numbers]
    return operation.on_numbers(numbers_of)


def _padded(operation: Operation, numbers: Numbers) -> Moved:
    """Padded positions are their filter's; padded filters are nobody's."""
    dimensions, given = operation.args[0].dim(), operation.argument("pad")
    pads = [(0, 0)] * dimensions
    for place in range(0, len(given), 2):
        axis = dimensions - 1 - place // 2
        if axis in axes_of(numbers):
            pads[axis] = (given[place], given[place + 1])
    cropped = any(pad < 0 for both in pads for pad in both)
    return None if cropped else [np.pad(numbers, pads)]


def _indexed(operation: Operation, numbers: Numbers, numbers_of: NumbersOf) -> Moved:
    indices = operation.argument("indices")
    axes = {axis for axis, index in enumerate(indices) if index is not None}
    bools = any(indices[axis].dtype == torch.bool for axis in axes)
    return None if bools or axes & set(axes_of(numbers)) else operation.on_numbers(numbers_of)


def _resized(operation: Operation, numbers: Numbers) -> Moved:
    """Pooling, resizing or padding of the positions of each filter."""
    spatial = next((int(digit) for digit in operation.name if digit.isdigit()), 0)
    first = set(axes_of(numbers)) <= {1} and operation.args[0].dim() == spatial + 2
    return [numbers] if first else None


def _reduced(operation: Operation, numbers: Numbers) -> Followed:
    """Over positions filters stay; over filters only a sum does the same with fewer."""
    dimensions = operation.args[0].dim()
    axes = operation.axes("dim", dimensions) or list(range(dimensions))
    own = set(axes_of(numbers))
    if own & set(axes):
        if operation.name in _LIKE_ZEROS and own <= set(axes):
            return Followed(summed=[numbers])
        return Followed(lost=[numbers])
    if operation.outputs[0].dim() < dimensions:
        numbers = numbers.squeeze(tuple(axes))
    return Followed([numbers])
