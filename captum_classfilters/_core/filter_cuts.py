"""Modules made smaller: tensors without some places along an axis."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from captum_classfilters._core.filter_trace import is_depthwise
from captum_classfilters._core.masked_network import other_places

# What modules call the numbers of their filters and inputs.
_SIZES = {
    *("in_channels", "out_channels", "groups", "in_features", "out_features"),
    *("num_features", "num_parameters"),
}

Replaced = TypeVar("Replaced", bound=Tensor | None)


def num_filters(module: nn.Module) -> int:
    """The filters of a convolution or linear layer, or those that a norm has values for."""
    return int(getattr(module, _filter_sizes(module)[0]))


def cut_filters(module: nn.Module, places: set[int]) -> None:
    """Take filters out of a module that makes them or has a value for each."""
    transposed = getattr(module, "transposed", False) and not is_depthwise(module)
    sizes = _filter_sizes(module)
    cut_tensor(module, "weight", 1 if transposed else 0, places)
    for key in ("bias", "running_mean", "running_var"):
        cut_tensor(module, key, 0, places)
    _shrink(module, sizes, places)


def cut_inputs(module: nn.Module, places: set[int]) -> None:
    """Take inputs away from a convolution or linear layer."""
    cut_tensor(module, "weight", 0 if getattr(module, "transposed", False) else 1, places)
    _shrink(module, ["in_features" if isinstance(module, nn.Linear) else "in_channels"], places)


def _filter_sizes(module: nn.Module) -> list[str]:
    """The attributes of a module that say how many filters it has."""
    if isinstance(module, nn.Linear):
        return ["out_features"]
    if isinstance(module, nn.PReLU):
        return ["num_parameters"]
    if isinstance(module, nn.modules.conv._ConvNd):
        return ["out_channels", *(["in_channels", "groups"] if is_depthwise(module) else [])]
    return ["num_features"]


def _shrink(module: nn.Module, sizes: Sequence[str], places: set[int]) -> None:
    for size in sizes:
        setattr(module, size, getattr(module, size) - len(places))


def cut_tensor(module: nn.Module, key: str, axis: int, places: set[int]) -> None:
    """Take places along an axis out of a parameter or buffer, if the module has it."""
    tensor = getattr(module, key, None)
    if tensor is None:
        return
    stays = other_places(tensor.shape[axis], places).to(tensor.device)
    smaller: Tensor = tensor.detach().index_select(axis, stays)
    if isinstance(tensor, nn.Parameter):
        smaller = nn.Parameter(smaller, requires_grad=tensor.requires_grad)
    setattr(module, key, smaller)


def add_to_bias(module: Any, change: Tensor) -> None:
    """Give a convolution or linear layer another bias."""
    old = module.weight if module.bias is None else module.bias
    bias = change if module.bias is None else module.bias.detach() + change
    module.bias = nn.Parameter(bias.clone(), requires_grad=old.requires_grad)


@contextmanager
def restored(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Give modules back their tensors and sizes when the block ends."""
    before = [
        (module, dict(module._parameters), dict(module._buffers), _sizes(module))
        for module in modules
    ]
    try:
        yield
    finally:
        for module, parameters, buffers, sizes in before:
            module._parameters.update(parameters)
            module._buffers.update(buffers)
            vars(module).update(sizes)


def _sizes(module: nn.Module) -> dict[str, int]:
    return {key: value for key, value in vars(module).items() if key in _SIZES}


def replace_tensors(model: nn.Module, smaller: nn.Module) -> None:
    """Give a model the tensors and sizes of its smaller copy; what is equal stays its own."""
    for module, other in zip(model.modules(), smaller.modules(), strict=True):
        _replace(module._parameters, other._parameters)
        _replace(module._buffers, other._buffers)
        vars(module).update(_sizes(other))


def _replace(own: dict[str, Replaced], others: dict[str, Replaced]) -> None:
    for key, tensor in others.items():
        if not _equal(own.get(key), tensor):
            own[key] = tensor


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and torch.equal(one, other)
