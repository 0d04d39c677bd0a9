"""Models copied without touching the storage of their tensors."""

import copy
from typing import Any

from torch import nn


def copied(model: nn.Module) -> nn.Module:
    """A deep copy of a model, wherever its parameters are and whatever they were computed from.

    ``copy.deepcopy`` copies storages, which not every kind of tensor has, and refuses tensors that
    are the result of a computation; here each parameter and buffer is cloned, shared ones once.
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        clone = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
        memo[id(parameter)] = clone
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().clone()
    return copy.deepcopy(model, memo)
