"""Work happens where the model is; results live on the CPU. No function needs to be told."""

import itertools
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

T = TypeVar("T")


def device_of(model: nn.Module | None) -> torch.device | None:
    """Where a model's parameters are, or its buffers if it has no parameters; None without any."""
    if model is None:
        return None
    tensors = itertools.chain(model.parameters(), model.buffers())
    tensor = next(tensors, None)
    return None if tensor is None else tensor.device


def on_device(value: T, device: torch.device | str | None) -> T:
    """A value with every tensor in it on a device; None leaves them where they are.

    A copy from pinned memory does not wait for the device.
    """
    if device is None:
        return value
    ahead = torch.device(device).type != "cpu"  # a copy to the CPU must have ended to be read
    return tree_map_only(Tensor, lambda tensor: tensor.to(device, non_blocking=ahead), value)


def sums_device(device: torch.device) -> torch.device:
    """Where sums in float64 are kept for values on a device: there, if it knows the type."""
    return torch.device("cpu") if device.type == "mps" else device


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A block in which a surrounding ``torch.autocast`` does not change any type."""
    try:
        return torch.autocast(device.type, enabled=False)
    except RuntimeError:  # of devices that know no autocast; PyTorch 2.3 cannot be asked which do
        return nullcontext()


def ordinary(value: T) -> T:
    """A value with every tensor in it such that autograd can keep it, whatever mode it was made in."""
    with torch.inference_mode(False):  # a clone that is made in inference mode is of its kind again
        return tree_map_only(
            Tensor, lambda tensor: tensor.clone() if tensor.is_inference() else tensor, value
        )
