"""The one place that hooks a layer, to read its tensor or to put another in its place."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from captum.attr import GradientAttribution
from torch import Tensor, nn

from captum_classfilters._core.captum import CAPTUMS_LAYER_METHODS
from captum_classfilters._core.layers import (
    check_batch,
    check_hooks,
    check_numbers,
    check_runs,
    filter_axis,
    layer_name,
    layer_tensors,
    module_of,
    no_gradient,
    not_recorded,
    only_tensor,
    positions_last,
    weighted_before,
    with_tensors,
)
from captum_classfilters._core.names import kind_of
from captum_classfilters._core.outputs import class_scores
from captum_classfilters._core.types import Arguments, ForwardFunc, Keywords, ModelInputs


@contextmanager
def hooked(
    modules: Iterable[nn.Module], hook: Callable[[nn.Module, Any, Any], object]
) -> Iterator[None]:
    """Call a function with each of these modules, its inputs and its output whenever it has run in
    the block; what it returns, if not None, takes the output's place. Inputs given by their names
    come after those that are not."""

    def call(module: nn.Module, inputs: Arguments, named: Keywords, output: Any) -> Any:
        return hook(module, (*inputs, *named.values()), output)

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

    def call(module: nn.Module, inputs: Arguments, named: Keywords) -> None:
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

    def pre_hook(_module: nn.Module, inputs: Arguments, named: Keywords) -> Any:
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


@contextmanager
def captum_reads_layer(
    method: object, inputs: ModelInputs, at_input: bool = False
) -> Iterator[None]:
    """A block that runs a method, which may be one of Captum at a layer: where such a method fails
    because it cannot read its layer, the error says so."""
    try:
        yield
    except (AssertionError, AttributeError, IndexError, KeyError, TypeError, RuntimeError) as error:
        check_reads_layer(method, inputs, error, at_input=at_input)
        raise


def check_reads_layer(
    method: Any, inputs: ModelInputs, error: Exception | None = None, *, at_input: bool = False
) -> None:
    r"""
    Raise in words where a method of Captum cannot read its layer; others judge for themselves.

    The model is run once. Captum's methods take the last run of a layer for its only one, and rows for
    images. Whether they need another form of layer, or gradients, is asked once they have failed.

    Args:

        method (object): The method.
        inputs (tuple): What its forward function takes.
        error (Exception, optional): What the method raised.
                    Default: None
        at_input (bool): It reads the layer's input.
                    Default: False
    """
    layer = getattr(method, "layer", None)
    if not isinstance(method, CAPTUMS_LAYER_METHODS) or not isinstance(layer, nn.Module):
        return
    where = layer_name(module_of(method.forward_func, [layer]), layer)
    check_hooks(where, layer)
    gradients = error is not None and isinstance(method, GradientAttribution)
    with torch.set_grad_enabled(gradients):
        seen, output = _seen_at(method.forward_func, layer, inputs, at_input)
    name, value = type(method).__name__, seen[0].value if seen else None
    if error is not None and seen and not isinstance(value, Tensor):
        raise ValueError(
            f"{name} reads layers of one tensor; {where!r} handles {kind_of(value)}. Choose one of the "
            "layers inside it, or a method of this package, which reads whatever holds a single one."
        ) from error
    if output is None:  # the model itself failed, and will say why
        return
    try:
        _check_runs_seen(where, layer, seen, inputs)
        if gradients:
            _check_gradient_seen(where, seen[0], output)
    except ValueError as reason:
        raise reason from error


@dataclass
class _Seen:
    """What a layer handled in one run, and the tensor there that gradients lead to."""

    value: object
    leaf: Tensor | None
    recorded: bool


def _seen_at(
    forward_func: ForwardFunc, layer: nn.Module, inputs: ModelInputs, at_input: bool
) -> tuple[list[_Seen], object]:
    """The runs of a layer in a forward pass, with gradients if they are recorded here, and what the
    model returned; None if it failed."""
    seen: list[_Seen] = []
    gradients = torch.is_grad_enabled()

    def see(value: Any) -> Tensor | None:
        tensors, leaf = layer_tensors(value), None
        if gradients and len(tensors) == 1 and tensors[0].is_floating_point():
            leaf = tensors[0]
        if leaf is not None and not leaf.requires_grad:
            leaf = leaf.detach().requires_grad_()
        single = at_input and isinstance(value, tuple) and len(value) == 1
        seen.append(_Seen(value[0] if single else value, leaf, torch.is_grad_enabled()))
        return None if leaf is None else leaf.clone()  # what follows may write into it

    with suppress(Exception), tapped(layer, see, at_input=at_input):
        return seen, forward_func(*inputs)
    return seen, None


def _check_runs_seen(
    where: str, layer: nn.Module, seen: Sequence[_Seen], inputs: ModelInputs
) -> None:
    """Raise if a layer did not run once, on each device, with one row for each image."""
    rows: dict[torch.device, list[int]] = {}
    for run in seen:
        for tensor in layer_tensors(run.value)[:1]:
            rows.setdefault(tensor.device, []).append(tensor.shape[0] if tensor.dim() else 0)
    if seen and not rows:  # nothing that could be counted
        return
    check_runs(where, max(map(len, rows.values()), default=0), layer)
    images = next((tensor for tensor in inputs if isinstance(tensor, Tensor)), None)
    if images is not None and images.dim():
        check_batch(where, sum(of_device[0] for of_device in rows.values()), len(images))


def _check_gradient_seen(where: str, run: _Seen, output: object) -> None:
    """Raise if no gradient of the scores leads to what a layer handled."""
    if run.leaf is None:
        return
    if not run.recorded:
        raise not_recorded(where)
    scores, gradient = class_scores(output), None
    if scores.requires_grad:
        ones = torch.ones_like(scores)
        (gradient,) = torch.autograd.grad(scores, run.leaf, ones, allow_unused=True)
    if gradient is None:
        raise no_gradient(where)


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

    def axis_of(self, tensor: Tensor) -> int:
        """The axis of the filters in the layer's tensor, or in one like it."""
        return filter_axis(self.module, tensor, self.channel_dim, self._before, self.at_input)

    def maps_of(self, tensor: Tensor) -> Tensor:
        """The layer's tensor, or one like it, as (N, K, P)."""
        return positions_last(tensor, self.axis_of(tensor))

    def begin(self) -> None:
        """Forget the last forward pass."""
        self.rows = {}

    def take(self, value: object) -> Tensor | None:
        """See the layer's value pass; what is returned, if not None, takes its place."""
        tensor = only_tensor(value, self.name)
        self.count(tensor)
        return None if self.react is None else self.react(tensor, self.axis_of(tensor))

    def count(self, tensor: Tensor) -> None:
        """Count a run, of numbers that can be weighed; replicas of a data-parallel model run once on
        each device."""
        check_numbers(self.name, tensor)
        self.rows.setdefault(tensor.device, []).append(tensor.shape[0] if tensor.dim() else 0)

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
