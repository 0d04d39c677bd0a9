"""New weights for parts of a model."""

import copy
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from captum_classfilters._core.filter_graph import check_own_weights
from captum_classfilters._core.layers import plain_name, unwrapped
from captum_classfilters._core.linear_maps import check_not_quantized, is_quantized
from captum_classfilters._core.taps import tapped
from captum_classfilters._core.types import ModelInputs


def weighted_modules(
    model: nn.Module, inputs: ModelInputs, after: nn.Module | None = None
) -> list[tuple[str, nn.Module]]:
    """Modules with weights of their own, by name, in the order in which they first start; or those
    that start only after a layer has ended."""
    inner = unwrapped(model)
    names = {id(module): plain_name(name) for name, module in inner.named_modules()}
    started: dict[int, nn.Module] = {}
    before: set[int] = set()

    def note(module: nn.Module, _inputs: object) -> None:
        started.setdefault(id(module), module)

    with ExitStack() as stack:
        for module in inner.modules():
            if is_quantized(module) or next(module.parameters(recurse=False), None) is not None:
                stack.enter_context(tapped(module, partial(note, module), at_input=True))
        if after is not None:
            stack.enter_context(tapped(after, lambda _output: before.update(started)))
        stack.enter_context(torch.no_grad())
        model(*inputs)
    chosen = [(names[key], module) for key, module in started.items() if key not in before]
    for name, module in chosen:
        called = f"The layer {name!r} ({type(module).__name__}), which is to get new weights,"
        check_not_quantized(module, called, "Use the floating-point model")
    renewed = {module for _, module in chosen}
    for module in inner.modules():
        if renewed.intersection(module.modules()):  # of a parametrization, what it belongs to
            check_own_weights(model, module, names[id(module)])
    return chosen


def reset_weights(module: nn.Module) -> None:
    """Draw a module's own weights anew: as it was built, or normal with the same mean and spread.

    Numbers are drawn on the CPU, so that they are the same on every device.
    """
    if callable(getattr(module, "reset_parameters", None)):
        fresh = copy.deepcopy(module).cpu()
        fresh.reset_parameters()  # type: ignore[operator]
        module.load_state_dict(fresh.state_dict())
        return
    with torch.no_grad():
        for parameter in module.parameters(recurse=False):
            spread: Tensor | float = parameter.std() if parameter.numel() > 1 else 1.0
            noise = torch.randn(parameter.shape, dtype=parameter.dtype).to(parameter.device)
            parameter.copy_(parameter.mean() + spread * noise)
