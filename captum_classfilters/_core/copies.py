"""Models copied without touching the storage of their tensors."""

import copy
from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from captum_classfilters._core.guard import held


def copied(
    model: nn.Module,
    replaced: Mapping[nn.Module, nn.Module] | None = None,
    *,
    share: bool = False,
) -> nn.Module:
    """A deep copy of a model, wherever its parameters are and whatever they were computed from.

    ``copy.deepcopy`` copies storages, which not every kind of tensor has, and refuses tensors that
    are the result of a computation; here each parameter and buffer is cloned, shared ones once.
    Modules that are ``replaced`` have others in their place, and are not copied. With ``share``, the
    copy has the model's own parameters and buffers.
    """
    with held(model):  # what a running pass has frozen or hooked would be copied as it is now
        memo: dict[int, object] = {id(old): new for old, new in (replaced or {}).items()}
        for parameter in model.parameters():
            if share:
                memo[id(parameter)] = parameter
            elif not is_lazy(parameter):
                clone = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                memo[id(parameter)] = clone
        for buffer in model.buffers():
            if share:
                memo[id(buffer)] = buffer
            elif not is_lazy(buffer):
                memo[id(buffer)] = buffer.detach().clone()
        for module in model.modules():  # weights of norms and masks, or kept activations
            for value in tree_leaves(vars(module)):
                if isinstance(value, Tensor) and not value.is_leaf:
                    memo.setdefault(id(value), value.detach().clone())
        return copy.deepcopy(model, memo)
