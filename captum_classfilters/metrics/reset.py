"""New weights for parts of a model."""

from typing import Any

import torch
from torch import Tensor, nn


def weighted_modules(
    model: nn.Module, inputs: tuple[Any, ...], after: nn.Module | None = None
) -> list[tuple[str, nn.Module]]:
    """Modules with weights of their own in the order they first run, or those that run only after a
    layer has ended."""
    names = {id(module): name for name, module in model.named_modules()}
    own = [one for one in model.modules() if next(one.parameters(recurse=False), None) is not None]
    ran: list[nn.Module] = []
    before: list[nn.Module] = []

    def note(module: nn.Module, _inputs: Any) -> None:
        if all(module is not one for one in ran):
            ran.append(module)

    def ended(*_: Any) -> None:
        before.extend(ran)

    handles = [module.register_forward_pre_hook(note) for module in own]
    if after is not None:
        handles.append(after.register_forward_hook(ended))
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    skipped = {id(module) for module in before}
    return [(names[id(one)], one) for one in ran if id(one) not in skipped]


def reset_weights(module: nn.Module) -> None:
    """Draw a module's own weights anew: as it was built, or normal with the same mean and spread."""
    reset = getattr(module, "reset_parameters", None)
    if callable(reset):
        reset()
        return
    with torch.no_grad():
        for parameter in module.parameters(recurse=False):
            spread: Tensor | float = parameter.std() if parameter.numel() > 1 else 1.0
            parameter.copy_(parameter.mean() + spread * torch.randn_like(parameter))
