"""The one place that hooks a layer, to read its tensor or to put another in its place."""

import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from captum_classfilters._core.layers import (
    check_batch,
    check_numbers,
    check_runs,
    filter_axis,
    layer_name,
    not_recorded,
    only_tensor,
    positions_last,
    weighted_before,
    with_tensors,
)
from captum_classfilters._core.types import Arguments, Keywords, ModelInputs

# PyTorch calls a hook that another thread is just registering or removing without the inputs given by
# their names, of a run that the hook is not for.


def hooked(
    modules: Iterable[nn.Module], hook: Callable[[nn.Module, Any, Any], object]
) -> AbstractContextManager[None]:
    """Call a function with each of these modules, its inputs and its output whenever it has run in
    the block; what it returns, if not None, takes the output's place. Inputs given by their names
    come after those that are not."""

    def call(module: nn.Module, inputs: Arguments, named: Keywords, output: object) -> object:
        return hook(module, (*inputs, *named.values()), output)

    return watched(modules, call)


@contextmanager
def watched(
    modules: Iterable[nn.Module],
    hook: Callable[[nn.Module, Arguments, Keywords, object], object],
) -> Iterator[None]:
    """As :func:`hooked`, with inputs given by their names apart."""

    def call(module: nn.Module, inputs: Arguments, *given: Any) -> object:
        if len(given) < 2:  # of another thread
            return None
        return hook(module, inputs, *given)

    with ExitStack() as stack:
        stack.enter_context(_running_eagerly())
        for module in modules:
            if not isinstance(module, torch.jit.ScriptModule):  # would refuse, or never call
                stack.callback(module.register_forward_hook(call, with_kwargs=True).remove)
        yield


@contextmanager
def entered(
    modules: Iterable[nn.Module], react: Callable[[nn.Module, Arguments], None]
) -> Iterator[None]:
    """Call a function with each of these modules and its inputs whenever it is about to run in the
    block. Inputs given by their names come last."""

    def call(module: nn.Module, inputs: Arguments, named: Keywords | None = None) -> None:
        if named is None:  # of another thread
            return
        react(module, (*inputs, *named.values()))

    with ExitStack() as stack:
        stack.enter_context(_running_eagerly())
        for module in modules:
            stack.callback(module.register_forward_pre_hook(call, with_kwargs=True).remove)
        yield


@contextmanager
def tapped(
    module: nn.Module, react: Callable[[Any], object], *, at_input: bool = False
) -> Iterator[None]:
    r"""
    Call a function with what a module puts out, or takes, in every forward pass of the block.

    Args:

        module (nn.Module): The layer.
        react (Callable): From the layer's output, or from the tuple of its inputs (those given by
                    their names come last), to what takes its place; None leaves it as it is. A
                    Tensor may replace whatever holds a single one.
        at_input (bool): Tap the layer's inputs.
                    Default: False
    """

    def pre_hook(_module: nn.Module, inputs: Arguments, named: Keywords | None = None) -> Any:
        if named is None:  # of another thread
            return None
        given = (*inputs, *named.values())
        taken: Any = _in_the_form_of(given, react(given))
        if taken is None:
            return None
        taken = taken if isinstance(taken, tuple) else (taken,)
        number = len(inputs)
        return taken[:number], dict(zip(named, taken[number:], strict=True))

    def hook(_module: nn.Module, _inputs: object, output: object) -> object:
        return _in_the_form_of(output, react(output))

    with ExitStack() as stack:
        stack.enter_context(_running_eagerly())
        if at_input:
            stack.callback(module.register_forward_pre_hook(pre_hook, with_kwargs=True).remove)
        else:
            stack.enter_context(hooked([module], hook))
        yield


class BackwardTap:
    r"""
    Taps a module's outputs also where a backward pass runs it again, as non-reentrant activation
    checkpointing does, in a forward pass whose own hooks are gone by then.

    The hook is there only during backward passes from the forward pass's outputs, and acts only on
    what they run again of this forward pass: others of the same model, in the same graph or in
    another thread, are left alone. Where the whole of the owner runs again, it taps by itself.

    Args:

        module (nn.Module): The layer.
        react (Callable): From its output to what takes its place.
        owner (object): Whose forward pass it is, as :func:`tapping_for` is told.
    """

    def __init__(self, module: nn.Module, react: Callable[[object], object], owner: object) -> None:
        self.module, self.react, self.owner = module, react, owner
        self.handles: dict[int, RemovableHandle] = {}  # by backward pass
        # Nodes of the graph are numbered as they are made, in each thread.
        self.first = self.last = torch.autograd._get_sequence_nr()

    def follow(self, outputs: Iterable[Tensor]) -> None:
        """The forward pass is over and has put out this."""
        self.last = torch.autograd._get_sequence_nr()
        for node in {tensor.grad_fn for tensor in outputs} - {None}:
            node.register_prehook(self._begin)  # type: ignore[union-attr]

    def _begin(self, _gradients: object) -> None:
        backward = torch._C._current_graph_task_id()
        if backward in self.handles:  # of another output
            return

        def hook(_module: nn.Module, _inputs: object, output: object) -> object:
            if torch._C._current_graph_task_id() != backward or not self._concerned():
                return None
            return _in_the_form_of(output, self.react(output))

        def end() -> None:
            self._end(backward)

        self.handles[backward] = self.module.register_forward_hook(hook)
        # A backward pass that fails forgets what was to end it.
        weakref.finalize(end, self._end, backward)
        torch.autograd.Variable._execution_engine.queue_callback(end)

    def _concerned(self) -> bool:
        """Whether what runs is what this forward pass ran."""
        node = torch._C._current_autograd_node()
        if node is None or self.owner in _owners():
            return False
        return bool(self.first <= node._sequence_nr() < self.last)

    def _end(self, backward: int) -> None:
        if backward in self.handles:
            self.handles.pop(backward).remove()


def failing_layer(model: nn.Module, inputs: ModelInputs) -> nn.Module | None:
    """The innermost module in which a forward pass fails; None if it does not fail."""
    modules = [part for part in model.modules() if not isinstance(part, torch.jit.ScriptModule)]
    running: list[nn.Module] = []

    def leave(module: nn.Module, _inputs: object, _output: object) -> None:
        while running.pop() is not module:  # what failed inside, and was caught there
            pass

    try:
        with entered(modules, lambda module, _: running.append(module)), hooked(modules, leave):
            model(*inputs)
    except Exception:  # whatever a model raises
        return running[-1] if running else model
    return None


def _running_eagerly() -> AbstractContextManager[object]:
    """A block in which compiled models run as they were written: compiled code does not see hooks
    that are registered after it was made. Nothing is compiled before torch._dynamo is imported."""
    if "torch._dynamo" not in sys.modules or not hasattr(torch.compiler, "set_stance"):
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def _in_the_form_of(value: object, replacement: object) -> object:
    if isinstance(replacement, Tensor) and not isinstance(value, Tensor):
        return with_tensors(value, [replacement])
    return replacement


class LayerTap:
    r"""
    One layer's tensor in the current forward pass: how often it came by, and where its filters are.

    Args:

        model (nn.Module, optional): The model that the layer is part of, if it is known.
        module (nn.Module): The layer.
        channel_dim (int, optional): Axis of the filters, where it cannot be told from the layer.
                    Default: None
        at_input (bool): Read the layer's input instead of its output.
                    Default: False
        react (Callable, optional): From the tensor and the axis of its filters to a tensor that
                    takes its place, or None.
                    Default: None
    """

    def __init__(
        self,
        model: nn.Module | None,
        module: nn.Module,
        channel_dim: int | None = None,
        at_input: bool = False,
        react: Callable[[Tensor, int], Tensor | None] | None = None,
    ) -> None:
        self.module, self.name = module, layer_name(model, module)
        self.channel_dim, self.at_input, self.react = channel_dim, at_input, react
        self._before = weighted_before(model, module)
        self.rows: dict[torch.device, list[int]] = {}  # of each run on each device
        #: What runs now is the layer once more, checkpointed, in the backward pass, or the whole model on
        #: the same images: it makes what it made in the forward pass, and nothing of that is kept.
        self.frozen = False

    def axis_of(self, tensor: Tensor) -> int:
        """The axis of the filters in the layer's tensor, or in one like it."""
        return filter_axis(self.module, tensor, self.channel_dim, self._before, self.at_input)

    def maps_of(self, tensor: Tensor) -> Tensor:
        """The layer's tensor, or one like it, as (N, K, P)."""
        return positions_last(tensor, self.axis_of(tensor))

    def begin(self) -> None:
        """Forget the last forward pass."""
        self.rows, self.frozen = {}, False

    def take(self, value: object) -> Tensor | None:
        """See the layer's value pass; what is returned, if not None, takes its place."""
        tensor = only_tensor(value, self.name)
        self.count(tensor)
        return None if self.react is None else self.react(tensor, self.axis_of(tensor))

    def count(self, tensor: Tensor) -> None:
        """Count a run, of numbers that can be weighed; replicas of a data-parallel model run once on
        each device."""
        check_numbers(self.name, tensor)
        if not self.frozen:
            rows = self.rows.setdefault(tensor.device, [])
            rows.append(tensor.shape[0] if tensor.dim() else 0)

    def check_recorded(self) -> None:
        """Raise if the forward pass makes no record for gradients here; a later run need not."""
        if not self.frozen and not torch.is_grad_enabled():
            raise not_recorded(self.name)

    def check(self, num_images: int) -> None:
        """Raise if the layer did not run exactly once, with one row for each image."""
        check_runs(self.name, max(map(len, self.rows.values()), default=0), self.module)
        check_batch(self.name, sum(rows[0] for rows in self.rows.values()), num_images)


@contextmanager
def tapping(taps: Sequence[LayerTap]) -> Iterator[None]:
    """Tap several layers in the forward passes of the block, each told to begin anew."""
    with ExitStack() as stack:
        for tap in taps:
            tap.begin()
            stack.enter_context(tapped(tap.module, tap.take, at_input=tap.at_input))
        yield


_this_thread = threading.local()


def _owners() -> list[object]:
    """Whose forward passes are running in this thread, of those that `tapping_for` taps."""
    owners: list[object] = vars(_this_thread).setdefault("owners", [])
    return owners


@contextmanager
def tapping_for(owner: object, tap: LayerTap) -> Iterator[None]:
    r"""
    Tap a layer in a forward pass that another thread, or a backward pass, may run as well.

    What runs in another thread is tapped if that is a part of this forward pass, as replicas of a
    data-parallel model are: not a forward pass of its own, nor what a backward pass runs again.

    Args:

        owner (object): What runs the layer; equal for the same thing run again.
        tap (LayerTap): The layer.
    """
    thread, owners = threading.get_ident(), _owners()

    def take(value: object) -> Tensor | None:
        apart = _owners() or torch._C._current_autograd_node() is not None
        return None if threading.get_ident() != thread and apart else tap.take(value)

    tap.begin()
    owners.append(owner)
    try:
        with tapped(tap.module, take, at_input=tap.at_input):
            yield
    finally:
        owners.pop()
