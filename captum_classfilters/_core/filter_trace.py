r"""
Where filters go: one forward pass in which every element of every tensor knows its filter.

Each convolution and linear layer numbers its filters. The numbers travel beside the tensors through
every operation below autograd, where PyTorch has few: pointwise operations keep them, operations
that move elements move them as well, and an operation that would do something else with fewer
filters, or that is not known, loses them with its name. Nothing is guessed from shapes.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from captum_classfilters._core.taps import hooked, tapped

Numbers = NDArray[np.int64]

WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear)
PER_FILTER = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.PReLU)
MIXING = (nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.CrossMapLRN2d) + (
    (nn.RMSNorm,) if hasattr(nn, "RMSNorm") else ()
)
FIRST_PARAMETER = 1 << 40  # numbers from here on are elements of parameters
_MOST_ELEMENTS = 1 << 20  # larger parameters are not one number for each filter

# Operations by name, beside those that PyTorch itself tags as pointwise.
_ALIKE = {
    *("hardswish", "hardswish_", "rrelu_with_noise", "log_sigmoid_forward", "native_dropout"),
    *("_to_copy", "lift_fresh", "contiguous", "copy_", "fill_", "zero_"),
    *("bernoulli_", "uniform_", "normal_"),
}
_MOVES = {
    *("permute", "transpose", "t", "numpy_T", "unsqueeze", "squeeze", "expand", "repeat"),
    *("stack", "alias", "detach"),
}
_VIEWS = {"view", "_unsafe_view", "reshape", "_reshape_alias"}
# What each of them does along an axis depends on places there; its argument that names the axis.
_ALONG = {
    **dict.fromkeys(("slice", "select", "split", "split_with_sizes", "unbind"), "dim"),
    **dict.fromkeys(("index_select", "_softmax", "_log_softmax", "cumsum"), "dim"),
    "flip": "dims",
    "roll": "dims",
    "unfold": "dimension",
}
_SPATIAL = (
    "max_pool",
    "avg_pool",
    "adaptive_",
    "_adaptive_avg_pool",
    "upsample_",
    *("_upsample_", "reflection_pad", "replication_pad", "grid_sampler", "fractional_max_pool"),
)
_REDUCTIONS = {
    *("mean", "sum", "amax", "amin", "max", "min", "std", "var", "logsumexp", "prod"),
    *("linalg_vector_norm", "any", "all"),
}
_WORDS = {"getitem": "indexing", "setitem": "assigning to parts"}
_WITHOUT_MEANS_ZERO = {"sum", "linalg_vector_norm"}  # a deleted filter adds what a zero one adds

Kind = Literal["operation", "groups", "mixes", "repeats", "outputs"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Numbered:
    """The numbers of a tensor's filters, of size 1 where they do not vary, and who uses it."""

    def __init__(self, numbers: Numbers, shape: torch.Size) -> None:
        self.numbers, self.shape = numbers, shape
        self.uses: list[Use] = []

    @property
    def axes(self) -> list[int]:
        """The axes along which the filters differ."""
        return [axis for axis, size in enumerate(self.numbers.shape) if size > 1]


@dataclass
class Record:
    """Something that happened to filters.

    Args:

        numbers (array): Which, in the order of the places if they have any.
        kind (str): What happened, or "" where that goes without saying.
        text (str): Where it happened.
        owners (frozenset of int): The layers, by their order, whose filters they are.
    """

    numbers: Numbers
    kind: str = ""
    text: str = ""
    owners: frozenset[int] = frozenset()


@dataclass
class Meeting:
    """Filters that are added, multiplied or otherwise combined element by element."""

    left: Numbers
    right: Numbers
    product: bool


@dataclass
class Use:
    """A run of a module, or of an operation outside those without submodules, that takes filters.

    Args:

        module (nn.Module, optional): The module; None for an operation.
        inputs (int): How many of its inputs hold filters.
        output (Numbered, optional): The filters in its output.
        skipped (bool): Its own operations are not followed: the rule for its class says more.
        simple (bool): It computes each element of its output from one of its input.
    """

    module: nn.Module | None
    inputs: int
    output: Numbered | None = None
    skipped: bool = False
    simple: bool = True


class FilterTrace(TorchDispatchMode):
    r"""
    What one forward pass does with the filters of each weighted layer.

    Args:

        model (nn.Module): The model; its training flags are the caller's business.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.names = {
            module: name
            for name, module in model.named_modules()
            if not isinstance(module, torch.jit.ScriptModule)  # these take no hooks
        }
        self.runs: dict[nn.Module, int] = {}
        self.outputs: dict[nn.Module, Numbered] = {}
        self.sources: list[nn.Module] = []
        self.starts: list[int] = [1]
        self.parameters: dict[str, tuple[int, torch.Size]] = {}
        self.read: dict[nn.Module, Record] = {}
        self.followed: dict[nn.Module, Record] = {}
        self.summed: list[Record] = []
        self.lost: list[Record] = []
        self.moved: list[Record] = []
        self.meetings: list[Meeting] = []
        self.before: dict[int, frozenset[int]] = {}
        self._numbered: dict[int, tuple[Any, Numbered]] = {}
        self._stack: list[Use] = []
        self._skipping = 0
        self.function = ""

    def run(self, inputs: tuple[Any, ...]) -> None:
        """The forward pass."""
        self._number_parameters()
        with torch.no_grad(), _Called(self), ExitStack() as stack:
            for module in self.names:
                stack.enter_context(tapped(module, self._entering(module), at_input=True))
            stack.enter_context(hooked(self.names, self._leave))
            stack.enter_context(self)
            outputs = self.model(*inputs)
        for leaf in _tensors(outputs):
            if (numbered := self._of(leaf)) is not None:
                self._lose(numbered.numbers, "outputs", "")
        records = (*self.read.values(), *self.followed.values(), *self.summed, *self.lost)
        for record in (*records, *self.moved):
            record.owners = self.owners_of(record.numbers)
        for owner, module in enumerate(self.sources):  # in the order of their runs
            read = self.read[module].owners if module in self.read else frozenset()
            self.before[owner] = read.union(*(self.before.get(other, ()) for other in read))

    # -- numbers -----------------------------------------------------------------------------------

    def _number_parameters(self) -> None:
        """Number the elements of parameters and buffers that no weighted layer or norm owns."""
        start = FIRST_PARAMETER
        known = (*WEIGHTED, *PER_FILTER, *MIXING, nn.Embedding)
        for module, name in self.names.items():
            if isinstance(module, known):
                continue
            tensors = {**module._parameters, **module._buffers}
            for key, tensor in tensors.items():
                if tensor is None or not 1 < tensor.numel() <= _MOST_ELEMENTS:
                    continue
                if self._of(tensor) is None:
                    self.parameters[f"{name}.{key}" if name else key] = (start, tensor.shape)
                    numbers = np.arange(start, start + tensor.numel())
                    self._set(tensor, numbers.reshape(tensor.shape))
                    start += tensor.numel()

    def _start_of(self, module: nn.Module, number: int) -> int:
        """The number of a weighted layer's first filter."""
        if module not in self.sources:
            self.sources.append(module)
            self.starts.append(self.starts[-1] + number)
        return self.starts[self.sources.index(module)]

    def owners_of(self, numbers: Numbers) -> frozenset[int]:
        """The weighted layers, by their order, whose filters are among some."""
        own = numbers[(numbers > 0) & (numbers < FIRST_PARAMETER)]
        return frozenset((np.searchsorted(self.starts, own, side="right") - 1).tolist())

    def _lose(self, numbers: Numbers, kind: Kind, text: str) -> None:
        self.lost.append(Record(numbers, kind, text))

    def _lose_all(self, numbered: Iterable[Numbered], text: str) -> None:
        for one in numbered:
            self._lose(one.numbers, "operation", text)

    def _set(self, tensor: Any, numbers: Numbers | None) -> Numbered | None:
        """Give a tensor its filters' numbers, which broadcast to its shape."""
        if not isinstance(tensor, Tensor) or numbers is None:
            return None
        numbers = _narrowed(numbers)
        if not numbers.any():
            self._numbered.pop(id(tensor), None)
            return None
        numbered = Numbered(numbers, tensor.shape)
        self._numbered[id(tensor)] = (weakref.ref(tensor), numbered)
        return numbered

    def _of(self, tensor: Any) -> Numbered | None:
        known = self._numbered.get(id(tensor))
        return known[1] if known is not None and known[0]() is tensor else None

    # -- modules -----------------------------------------------------------------------------------

    def _entering(self, module: nn.Module) -> Callable[[Any], None]:
        has_rule = isinstance(module, (*WEIGHTED, *PER_FILTER, *MIXING))

        def enter(inputs: Any) -> None:
            known = [one for leaf in _tensors(inputs) if (one := self._of(leaf)) is not None]
            use = Use(module, len(known), skipped=has_rule and bool(inputs))
            if use.skipped and not self._skipping:
                for one in known:
                    one.uses.append(use)
            self._stack.append(use)
            self._skipping += use.skipped

        return enter

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        while True:
            use = self._stack.pop()
            self._skipping -= use.skipped
            if use.module is module:
                break  # else a module whose error the model has caught
        self.runs[module] = self.runs.get(module, 0) + 1
        tensor = output[0] if isinstance(output, (tuple, list)) and len(output) == 1 else output
        if not isinstance(tensor, Tensor):
            return
        if use.skipped and not self._skipping and isinstance(inputs[0], Tensor):
            self._follow_module(module, inputs[0], tensor)
        use.output = self._of(tensor)
        if use.output is not None:
            self.outputs[module] = use.output

    def _follow_module(self, module: Any, source: Any, output: Tensor) -> None:
        numbered = self._of(source)
        if isinstance(module, WEIGHTED):
            self._follow_weighted(module, source, numbered, output)
        elif numbered is None:
            return
        elif isinstance(module, MIXING):
            axes = set(numbered.axes)
            own_forward = type(module).forward is not nn.LayerNorm.forward
            if isinstance(module, nn.LayerNorm) and not own_forward:
                axes &= set(range(source.dim() - len(module.normalized_shape), source.dim()))
            if axes:
                self._lose(numbered.numbers, "mixes", self.names[module])
            self._set(output, numbered.numbers)
        elif (isinstance(module, nn.PReLU) and module.num_parameters == 1) or self._along(
            module, numbered, 1, source.shape[1]
        ):
            self._set(output, numbered.numbers)

    def _along(self, module: nn.Module, numbered: Numbered, axis: int, size: int) -> bool:
        """Note that a module has one number for each place on an axis; whether it is the filters'."""
        if set(numbered.axes) - {axis}:
            text = f"{self._called(module)}, which takes other axes for its filters"
            self._lose(numbered.numbers, "operation", text)
            return False
        places = np.broadcast_to(numbered.numbers.ravel(), size)
        records = self.read if self._reads(module) else self.followed
        if module in records:
            self._lose(places, "repeats", self.names[module])
        else:
            records[module] = Record(places)
        return True

    @staticmethod
    def _reads(module: Any) -> bool:
        """Whether a weighted layer makes filters of its own from those it reads."""
        return isinstance(module, WEIGHTED) and not is_depthwise(module)

    def _follow_weighted(
        self, module: Any, source: Tensor, numbered: Numbered | None, output: Tensor
    ) -> None:
        spatial = 0 if isinstance(module, nn.Linear) else len(module.kernel_size)
        axis = source.dim() - spatial - 1
        grouped = getattr(module, "groups", 1) > 1 and not is_depthwise(module)
        if numbered is not None:
            known = self._along(module, numbered, axis, source.shape[axis])
            if grouped:
                self._lose(numbered.numbers, "groups", self.names[module])
            if is_depthwise(module) and known:
                self._set(output, numbered.numbers)
        number = output.shape[axis]
        if is_depthwise(module):
            return
        start = self._start_of(module, number)
        shape = [1] * output.dim()
        shape[axis] = number
        numbers = np.arange(start, start + number).reshape(shape)
        self._set(output, numbers)
        if grouped:
            self._lose(numbers, "groups", self.names[module])

    def _called(self, module: nn.Module) -> str:
        """A module in words."""
        name, kind = self.names.get(module, ""), type(module).__name__
        return f"{name!r} ({kind})" if name else f"the forward pass of {kind}"

    # -- operations --------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and follow the filters through it."""
        kwargs = kwargs or {}
        if self._skipping:
            return func(*args, **kwargs)
        leaves = [*_tensors(args), *_tensors(tuple(kwargs.values()))]
        known = [one for leaf in leaves if (one := self._of(leaf)) is not None]
        output = func(*args, **kwargs)
        if known:
            operation = _Operation(func, args, kwargs, output)
            try:
                self._follow(operation, leaves, known)
            except (
                ArithmeticError,
                AttributeError,
                LookupError,
                RuntimeError,
                TypeError,
                ValueError,
            ):
                self._lose_all(known, self._text(operation))  # arguments that are not foreseen
        return output

    def _follow(self, operation: "_Operation", leaves: list[Tensor], known: list[Numbered]) -> None:
        name = operation.name
        if operation.pointwise:
            self._pointwise(operation, leaves)
        elif name == "cat":
            self._cat(operation)
        elif name in _MOVES:
            self._set_all(operation.output, operation.on(self._numbers_of))
        elif name in _VIEWS:
            self._view(operation, known[0])
        elif name in _ALONG:
            self._move_along(operation, leaves[0], known)
        elif name == "constant_pad_nd":
            self._pad(operation, leaves[0], known[0])
        elif name == "index":
            self._index(operation, leaves[0], known)
        elif name.startswith(_SPATIAL) and self._of(leaves[0]) is not None:
            self._resize(operation, leaves[0], known[0])
        elif name in _REDUCTIONS:
            self._reduce(operation, leaves[0], known[0])
        else:
            self._lose_all(known, self._text(operation))
        use = self._leaf() or Use(None, len(known), self._of(operation.first))
        if any(one.numbers.min() < FIRST_PARAMETER for one in known):
            use.simple &= operation.pointwise
        for one in known:
            one.uses.append(use)
            if not operation.pointwise and name not in _REDUCTIONS:
                self.moved.append(Record(one.numbers, "", self._text(operation)))

    def _leaf(self) -> Use | None:
        """The run of a module without submodules in which an operation runs."""
        use = self._stack[-1] if self._stack else None
        return None if use is None or use.module is None or use.module._modules else use

    def _text(self, operation: "_Operation") -> str:
        module = (self._stack[-1].module if self._stack else None) or self.model
        name = (self.function or operation.name).strip("_")
        return f"{_WORDS.get(name, name)} in {self._called(module)}"

    def _numbers_of(self, tensor: Tensor) -> Tensor:
        """One number for each element of a tensor, 0 where there is no filter."""
        numbered = self._of(tensor)
        numbers = np.zeros((), np.int64) if numbered is None else numbered.numbers
        return torch.from_numpy(numbers).expand(tensor.shape)

    def _set_all(self, outputs: Any, numbers: Any) -> None:
        if isinstance(numbers, Tensor):
            self._set(outputs, numbers.numpy())
            return
        for output, own in zip(outputs, numbers, strict=True):
            self._set(output, own.numpy())

    def _pointwise(self, operation: "_Operation", leaves: list[Tensor]) -> None:
        """Filters keep their places; those of several tensors meet."""
        output = operation.first
        shape = output.shape
        known = [(leaf, one) for leaf in leaves if (one := self._of(leaf)) is not None]
        aligned = [(leaf, _aligned(one.numbers, len(shape))) for leaf, one in known]
        varying = [
            axis
            for axis in range(len(shape))
            if any(numbers.shape[axis] > 1 for _, numbers in aligned)
        ]
        for leaf in leaves:  # a tensor of fixed size, or one value for all the filters
            sizes = [_size(leaf, axis - len(shape)) for axis in varying]
            own = self._of(leaf)
            fresh = operation.name == "copy_" and leaf is output and leaf._base is None
            if own is None and any(size > 1 for size in sizes) and not fresh:
                self._lose_all([one for _, one in known], self._text(operation))
            if own is not None and len(known) > 1 and any(size == 1 for size in sizes):
                self._lose(own.numbers, "operation", self._text(operation))
                aligned = [(tensor, numbers) for tensor, numbers in aligned if tensor is not leaf]
        result: Numbers | None = None
        for _, numbers in aligned:
            result = numbers if result is None else self._meet(operation, result, numbers)
        self._set(output, result)

    def _meet(self, operation: "_Operation", left: Numbers, right: Numbers) -> Numbers:
        """Note which filters meet; the numbers of those that were there first."""
        left, right = np.broadcast_arrays(left, right)
        alone = (left > 0) != (right > 0)
        if alone.any():
            self._lose(np.maximum(left, right)[alone], "operation", self._text(operation))
        different = ~alone & (left != right)
        if different.any():
            pairs = np.unique(np.stack([left[different], right[different]]), axis=1)
            product = operation.name.startswith("mul")
            self.meetings.append(Meeting(pairs[0], pairs[1], product))
        return np.where(alone, np.maximum(left, right), np.minimum(left, right))

    def _cat(self, operation: "_Operation") -> None:
        """Filters side by side."""
        output = operation.output
        (axis,) = operation.axes("dim", output.dim())
        parts = [part for part in operation.args[0] if part.dim() == output.dim()]
        empty = np.zeros([1] * output.dim(), np.int64)
        numbers = [empty if (own := self._of(part)) is None else own.numbers for part in parts]
        shape = [max(sizes) for sizes in zip(*(own.shape for own in numbers), strict=True)]
        sides = []
        for part, indices in zip(parts, numbers, strict=True):
            shape[axis] = part.shape[axis]
            sides.append(np.broadcast_to(indices, shape))
        self._set(output, np.concatenate(sides, axis))

    def _view(self, operation: "_Operation", numbered: Numbered) -> None:
        """A view may flatten filters with their neighbors, but not take them apart."""
        before, after = operation.args[0].shape, operation.output.shape
        if _in_one_piece(before, after, numbered.axes):
            if before[:1] == after[:1] and 0 not in numbered.axes:  # every image has the same
                before, after = (1, *before[1:]), (1, *after[1:])
            numbers = np.broadcast_to(numbered.numbers, before)
            self._set(operation.output, numbers.reshape(after))
        else:
            self._lose_all([numbered], self._text(operation))

    def _move_along(
        self, operation: "_Operation", source: Tensor, known: Sequence[Numbered]
    ) -> None:
        """What happens along another axis does not touch the filters."""
        axes = operation.axes(_ALONG[operation.name], source.dim())
        own = self._of(source)
        whole = operation.name == "slice" and operation.output.shape == source.shape
        if own is None or (not whole and (not axes or set(axes) & set(own.axes))):
            self._lose_all(known, self._text(operation))
        elif operation.name in ("_softmax", "_log_softmax", "cumsum"):
            self._set(operation.output, own.numbers)
        else:
            self._set_all(operation.output, operation.on(self._numbers_of))

    def _pad(self, operation: "_Operation", source: Tensor, numbered: Numbered) -> None:
        """Padded positions are their filter's; padded filters are nobody's."""
        pads = [(0, 0)] * source.dim()
        given = operation.argument("pad")
        for place in range(0, len(given), 2):
            axis = source.dim() - 1 - place // 2
            if axis in numbered.axes:
                pads[axis] = (given[place], given[place + 1])
        if any(pad < 0 for both in pads for pad in both):
            self._lose_all([numbered], self._text(operation))
        else:
            self._set(operation.output, np.pad(numbered.numbers, pads))

    def _index(self, operation: "_Operation", source: Tensor, known: Sequence[Numbered]) -> None:
        indices = operation.argument("indices")
        own = self._of(source)
        fixed = [axis for axis, index in enumerate(indices) if index is not None]
        bools = any(index is not None and index.dtype == torch.bool for index in indices)
        if own is None or bools or set(fixed) & set(own.axes):
            self._lose_all(known, self._text(operation))
        else:
            self._set_all(operation.output, operation.on(self._numbers_of))

    def _resize(self, operation: "_Operation", source: Tensor, numbered: Numbered) -> None:
        """Pooling, resizing or padding of the positions of each filter."""
        dimensions = next((int(digit) for digit in operation.name if digit.isdigit()), 0)
        output = operation.first
        if numbered.axes in ([], [1]) and source.dim() == dimensions + 2:
            self._set(output, numbered.numbers)
        else:
            self._lose_all([numbered], self._text(operation))

    def _reduce(self, operation: "_Operation", source: Tensor, numbered: Numbered) -> None:
        """Over positions filters stay; over filters only a sum does the same with fewer."""
        axes = operation.axes("dim", source.dim()) or list(range(source.dim()))
        if not set(axes) & set(numbered.axes):
            numbers = numbered.numbers
            if operation.first.dim() < source.dim():
                for axis in sorted(axes, reverse=True):
                    numbers = numbers.squeeze(axis)
            self._set(operation.first, numbers)
        elif operation.name in _WITHOUT_MEANS_ZERO and set(numbered.axes) <= set(axes):
            self.summed.append(Record(numbered.numbers))
        else:
            self._lose_all([numbered], self._text(operation))


class _Called(TorchFunctionMode):
    """Which function of PyTorch's the model has called, for messages."""

    def __init__(self, trace: FilterTrace) -> None:
        super().__init__()
        self.trace = trace

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        before, self.trace.function = self.trace.function, getattr(func, "__name__", "")
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.trace.function = before


@dataclass
class _Operation:
    """One call of an operation below autograd."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    name: str = field(init=False)

    def __post_init__(self) -> None:
        self.name = getattr(getattr(self.func, "overloadpacket", None), "__name__", str(self.func))

    @property
    def first(self) -> Any:
        """The output, or the first of several."""
        several = isinstance(self.output, (tuple, list)) and len(self.output) > 0
        return self.output[0] if several else self.output

    @property
    def pointwise(self) -> bool:
        """Whether each element of the output comes from those at its place."""
        if torch.Tag.pointwise in getattr(self.func, "tags", ()) or self.name in _ALIKE:
            return True
        made = self.name.endswith("_like") or self.name.startswith("new_")
        return made and self.first.shape == self.args[0].shape

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

    def on(self, numbers_of: Callable[[Tensor], Tensor]) -> Any:
        """The operation on the numbers of filters instead of their values."""
        first, *others = self.args
        numbers = tree_map_only(Tensor, numbers_of, first)
        return self.func(numbers, *tree_map_only(Tensor, Tensor.cpu, others), **self.kwargs)


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in a value."""
    if isinstance(value, (tuple, list)) and not any(
        isinstance(v, (tuple, list, dict)) for v in value
    ):
        return [leaf for leaf in value if isinstance(leaf, Tensor)]
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def is_depthwise(module: Any) -> bool:
    """Whether a convolution gives each filter that it reads one of its own."""
    groups = getattr(module, "groups", 1)
    return groups > 1 and groups == module.in_channels == module.out_channels


def _aligned(numbers: Numbers, dimensions: int) -> Numbers:
    return numbers[(None,) * (dimensions - numbers.ndim)]


def _size(tensor: Tensor, axis: int) -> int:
    """The size of an axis counted from the end, 1 where a tensor only repeats itself."""
    if -axis > tensor.dim() or tensor.stride(axis) == 0:
        return 1
    return tensor.shape[axis]


def _narrowed(numbers: Numbers) -> Numbers:
    """Numbers with size 1 along every axis on which they do not vary."""
    for axis, size in enumerate(numbers.shape):
        if size > 1:
            first = numbers.take([0], axis)
            if numbers.strides[axis] == 0 or (numbers == first).all():
                numbers = first
    return numbers


def _in_one_piece(before: Sequence[int], after: Sequence[int], axes: Sequence[int]) -> bool:
    """Whether a view leaves each of these axes whole, alone or flattened with its neighbors."""
    return all(not (set(old) & set(axes) and len(new) != 1) for old, new in _groups(before, after))


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
