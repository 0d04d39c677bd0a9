r"""
Where filters go: one forward pass in which every element of every tensor knows its filter.

Each convolution and linear layer numbers its filters, and the numbers travel beside the tensors.
For modules whose work on filters is known, convolutions and norms for example, a rule says what
they do; everything else is followed operation by operation, below autograd, where PyTorch has few.
Nothing is guessed from shapes.
"""

import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from captum_classfilters._core.filter_operations import (
    BITS,
    Followed,
    Meeting,
    Numbers,
    Operation,
    axes_of,
    follow,
    narrowed,
    tensors,
    tensors_in,
)
from captum_classfilters._core.layers import layer_tensors, plain_name, unwrapped
from captum_classfilters._core.taps import entered, hooked
from captum_classfilters._core.types import Arguments, Keywords, ModelInputs

WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear)
PER_FILTER = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.PReLU)
_MIXING = (nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.CrossMapLRN2d) + (
    (nn.RMSNorm,) if hasattr(nn, "RMSNorm") else ()
)
_RULED = (*WEIGHTED, *PER_FILTER, *_MIXING)

T = TypeVar("T")

FIRST_PARAMETER = 1 << 30  # numbers from here on are elements of parameters
_MOST_ELEMENTS = 1 << 20  # larger parameters are not one value for each filter

_WORDS = {"getitem": "indexing", "setitem": "assigning to parts"}

Kind = Literal["operation", "groups", "mixes", "repeats", "outputs"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Numbered:
    """The numbers in a tensor, its shape, and who uses it."""

    def __init__(self, numbers: Numbers, shape: torch.Size) -> None:
        self.numbers, self.shape = numbers, shape
        self.uses: list[Use] = []


@dataclass
class Use:
    """A run of a module, or of an operation outside those without submodules, that takes filters.

    Args:

        module (nn.Module, optional): The module; None for an operation.
        inputs (int): How many of its inputs hold filters.
        output (Numbered, optional): The filters in its output.
        ruled (bool): A rule for its class says what it does; its operations are not followed.
        pointwise (bool): Each element of its output comes from those at its place.
    """

    module: nn.Module | None
    inputs: int
    output: Numbered | None = None
    ruled: bool = False
    pointwise: bool = True


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


class FilterTrace(TorchDispatchMode):
    r"""
    What one forward pass does with the filters of each weighted layer.

    Args:

        model (nn.Module): The model; its training flags are the caller's business.

    Attributes:

        sources (list of nn.Module): The weighted layers in the order of their runs ...
        starts (list of int): ... and the number of each one's first filter.
        parameters (dict): The parameters and buffers of no ruled module, with the number of the
                    first element and the shape.
        runs (dict): How often each module ran ...
        outputs (dict): ... and the filters in its last output.
        read (dict): For each weighted layer that reads filters, which at each place.
        followed (dict): The same for modules with a value for each filter they are given.
        summed, lost, moved (list of Record): Filters that were added up, those that could not be
                    followed, and what moved which.
        meetings (list of Meeting): Filters that are combined.
        before (dict): For each weighted layer those that it is computed from, all by their order.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.names = {
            module: plain_name(name)
            for name, module in unwrapped(model).named_modules()
            if not isinstance(module, torch.jit.ScriptModule)  # these take no hooks
        }
        self.sources: list[nn.Module] = []
        self.starts: list[int] = [1]
        self.parameters: dict[str, tuple[int, torch.Size]] = {}
        self.runs: dict[nn.Module, int] = {}
        self.outputs: dict[nn.Module, Numbered] = {}
        self.read: dict[nn.Module, Record] = {}
        self.followed: dict[nn.Module, Record] = {}
        self.summed: list[Record] = []
        self.lost: list[Record] = []
        self.moved: list[Record] = []
        self.meetings: list[Meeting] = []
        self.before: dict[int, frozenset[int]] = {}
        self.function = ""  # of PyTorch's, that the model has called
        self._numbered: dict[int, tuple[weakref.ref[Tensor], Numbered]] = {}
        self._stack: list[Use] = []
        self._ruled = 0

    def run(self, inputs: ModelInputs) -> None:
        """The forward pass."""
        self._number_parameters()
        with torch.no_grad(), _Called(self), ExitStack() as stack:
            stack.enter_context(entered(self.names, self._enter))
            stack.enter_context(hooked(self.names, self._leave))
            stack.enter_context(self)
            outputs = self.model(*inputs)
        for leaf in tensors(outputs):
            self._lose(self._numbers(leaf), "outputs", "")
        records = (*self.read.values(), *self.followed.values(), *self.summed, *self.lost)
        for record in (*records, *self.moved):
            record.owners = self.owners_of(record.numbers)
        for owner, module in enumerate(self.sources):
            read = self.read[module].owners if module in self.read else frozenset()
            self.before[owner] = read.union(*(self.before.get(other, ()) for other in read))

    def owners_of(self, numbers: Numbers) -> frozenset[int]:
        """The weighted layers, by their order, whose filters are among some."""
        own = numbers[(numbers > 0) & (numbers < FIRST_PARAMETER)]
        return frozenset((np.searchsorted(self.starts, own, side="right") - 1).tolist())

    # -- numbers -----------------------------------------------------------------------------------

    def _number_parameters(self) -> None:
        start = FIRST_PARAMETER
        for module, name in self.names.items():
            if isinstance(module, (*_RULED, nn.Embedding)):
                continue
            for key, tensor in {**module._parameters, **module._buffers}.items():
                if tensor is None or not 1 < tensor.numel() <= _MOST_ELEMENTS:
                    continue
                if start + tensor.numel() > 1 << BITS:  # hundreds of large ones
                    continue
                if self._numbers(tensor) is None:
                    self.parameters[f"{name}.{key}" if name else key] = (start, tensor.shape)
                    numbers = np.arange(start, start + tensor.numel())
                    self._set(tensor, numbers.reshape(tensor.shape))
                    start += tensor.numel()

    def _start_of(self, module: nn.Module, number: int) -> int:
        if module not in self.sources:
            self.sources.append(module)
            self.starts.append(self.starts[-1] + number)
        return self.starts[self.sources.index(module)]

    def _set(self, tensor: object, numbers: Numbers | None) -> None:
        """Give a tensor its filters' numbers, which broadcast to its shape."""
        if not isinstance(tensor, Tensor):
            return
        if numbers is None or not numbers.any():
            self._numbered.pop(id(tensor), None)
        else:
            numbered = Numbered(narrowed(numbers), tensor.shape)
            self._numbered[id(tensor)] = (weakref.ref(tensor), numbered)

    def _of(self, tensor: object) -> Numbered | None:
        known = self._numbered.get(id(tensor))
        return known[1] if known is not None and known[0]() is tensor else None

    def _numbers(self, tensor: object) -> Numbers | None:
        numbered = self._of(tensor)
        return None if numbered is None else numbered.numbers

    def _lose(self, numbers: Numbers | None, kind: Kind, text: str) -> None:
        if numbers is not None:
            self.lost.append(Record(numbers, kind, text))

    # -- modules -----------------------------------------------------------------------------------

    def _enter(self, module: nn.Module, inputs: ModelInputs) -> None:
        known = [one for leaf in tensors(inputs) if (one := self._of(leaf)) is not None]
        ruled = isinstance(module, _RULED) and bool(inputs) and isinstance(inputs[0], Tensor)
        use = Use(module, len(known), ruled=ruled)
        if ruled and not self._ruled:
            for one in known:
                one.uses.append(use)
        self._stack.append(use)
        self._ruled += ruled

    def _leave(self, module: nn.Module, inputs: ModelInputs, output: object) -> None:
        while True:
            use = self._stack.pop()
            self._ruled -= use.ruled
            if use.module is module:
                break  # else a module whose error the model has caught
        self.runs[module] = self.runs.get(module, 0) + 1
        found = layer_tensors(output)
        if len(found) != 1:
            return
        tensor = found[0]
        if use.ruled and not self._ruled:
            self._follow_module(module, inputs[0], tensor)
        use.output = self._of(tensor)
        if use.output is not None:
            self.outputs[module] = use.output

    def _follow_module(self, module: nn.Module, source: Tensor, output: Tensor) -> None:
        numbers = self._numbers(source)
        if isinstance(module, WEIGHTED):
            self._follow_weighted(module, source, numbers, output)
        elif numbers is None:
            return
        elif isinstance(module, _MIXING):
            if set(axes_of(numbers)) & _mixed_axes(module, source):
                self._lose(numbers, "mixes", self.names[module])
            self._set(output, numbers)
        elif _has_one_value(module) or self._place(
            module, numbers, 1, source.shape[1], self.followed
        ):
            self._set(output, numbers)

    def _follow_weighted(
        self, module: nn.Module, source: Tensor, numbers: Numbers | None, output: Tensor
    ) -> None:
        spatial = len(module.kernel_size) if isinstance(module, nn.modules.conv._ConvNd) else 0
        axis = source.dim() - spatial - 1
        depthwise, name = is_depthwise(module), self.names[module]
        records = self.followed if depthwise else self.read
        placed = numbers is not None and self._place(
            module, numbers, axis, source.shape[axis], records
        )
        if depthwise:
            self._set(output, numbers if placed else None)
            return
        start = self._start_of(module, output.shape[axis])
        own = np.arange(start, start + output.shape[axis])
        self._set(output, own.reshape([-1 if at == axis else 1 for at in range(output.dim())]))
        if getattr(module, "groups", 1) > 1:
            self._lose(numbers, "groups", name)
            self._lose(own, "groups", name)

    def _place(
        self,
        module: nn.Module,
        numbers: Numbers,
        axis: int,
        size: int,
        records: dict[nn.Module, Record],
    ) -> bool:
        """Note which filter stands at each place of the axis on which a module has a value for
        each; whether filters vary on this axis alone."""
        if set(axes_of(numbers)) - {axis}:
            text = f"{self._called(module)}, which takes other axes for its filters"
            self._lose(numbers, "operation", text)
            return False
        places = np.broadcast_to(numbers.ravel(), size)
        if module in records:
            self._lose(places, "repeats", self.names[module])
        else:
            records[module] = Record(places)
        return True

    def _called(self, module: nn.Module) -> str:
        """A module in words."""
        name, kind = self.names.get(module, ""), type(module).__name__
        return f"{name!r} ({kind})" if name else f"the forward pass of {kind}"

    # -- operations --------------------------------------------------------------------------------

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: Arguments = (),
        kwargs: Keywords | None = None,
    ) -> Any:
        """Run an operation and follow the filters through it."""
        output = func(*args, **(kwargs or {}))
        if not self._ruled:
            operation = Operation(func, args, kwargs or {}, output)
            known = [one for leaf in tensors_in(operation) if (one := self._of(leaf)) is not None]
            if known:
                self._follow(operation, known)
        return output

    def _follow(self, operation: Operation, known: list[Numbered]) -> None:
        try:
            followed = follow(operation, self._numbers)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            followed = Followed(lost=[one.numbers for one in known])  # unforeseen arguments
        text = self._text(operation)
        for numbers in followed.lost:
            self._lose(numbers, "operation", text)
        self.summed += [Record(numbers) for numbers in followed.summed]
        self.meetings += followed.meetings
        for place, output in enumerate(operation.outputs):
            self._set(output, followed.outputs[place] if place < len(followed.outputs) else None)
        use = self._leaf() or Use(None, len(known), self._of(operation.outputs[0]))
        if any(one.numbers.min() < FIRST_PARAMETER for one in known):
            use.pointwise &= operation.pointwise
        for one in known:
            one.uses.append(use)
            if not operation.pointwise and not operation.reduces:
                self.moved.append(Record(one.numbers, "", text))

    def _leaf(self) -> Use | None:
        """The run of a module without submodules in which an operation runs."""
        use = self._stack[-1] if self._stack else None
        return None if use is None or use.module is None or use.module._modules else use

    def _text(self, operation: Operation) -> str:
        module = self._stack[-1].module if self._stack else None
        module = self.model if module is None else module
        name = (self.function or operation.name).strip("_")
        return f"{_WORDS.get(name, name)} in {self._called(module)}"


class _Called(TorchFunctionMode):
    """Tells a trace which function of PyTorch's the model has called."""

    def __init__(self, trace: FilterTrace) -> None:
        super().__init__()
        self.trace = trace

    def __torch_function__(
        self,
        func: Callable[..., T],
        types: Sequence[type],
        args: Arguments = (),
        kwargs: Keywords | None = None,
    ) -> T:
        before, self.trace.function = self.trace.function, getattr(func, "__name__", "")
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.trace.function = before


def _has_one_value(module: nn.Module) -> bool:
    return isinstance(module, nn.PReLU) and module.num_parameters == 1


def _mixed_axes(module: nn.Module, source: Tensor) -> set[int]:
    """The axes over which a norm takes its statistics, as far as they can hold filters."""
    axes = set(range(source.dim()))
    if isinstance(module, nn.LayerNorm) and type(module).forward is nn.LayerNorm.forward:
        axes &= set(range(source.dim() - len(module.normalized_shape), source.dim()))
    return axes


def is_depthwise(module: nn.Module) -> bool:
    """Whether a convolution gives each filter that it reads one of its own."""
    if not isinstance(module, nn.modules.conv._ConvNd):
        return False
    return module.groups > 1 and module.groups == module.in_channels == module.out_channels
