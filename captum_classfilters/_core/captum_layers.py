"""Whether a method of Captum can read its layer: one tensor, handled once, with gradients if needed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from captum.attr import GradientAttribution
from torch import Tensor, nn

from captum_classfilters._core.captum import CAPTUMS_LAYER_METHODS
from captum_classfilters._core.layers import (
    check_batch,
    check_hooks,
    check_runs,
    layer_name,
    layer_tensors,
    module_of,
    no_gradient,
    not_recorded,
)
from captum_classfilters._core.names import kind_of
from captum_classfilters._core.outputs import class_scores
from captum_classfilters._core.taps import tapped
from captum_classfilters._core.types import ForwardFunc, ModelInputs


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
