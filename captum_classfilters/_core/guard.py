"""The model comes back exactly as found."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def model_left_as_found(
    model: nn.Module | None, *, evaluation: bool = False, freeze: bool = False
) -> Iterator[None]:
    r"""Restore training flags, ``requires_grad``, ``grad``, and the random state on exit.

    Hooks are not this guard's business: whoever registers one removes it. The guard holds
    references, not copies, so it costs no memory.

    Args:

        model (nn.Module or None): The model to guard; ``None`` guards the random state only.
        evaluation (bool): Put every module into evaluation mode inside the block.
        freeze (bool): Switch ``requires_grad`` off for every parameter inside the block, so that
                    a backward pass stops at the layer of interest.
    """
    modules = list(model.modules()) if model is not None else []
    parameters = list(model.parameters()) if model is not None else []
    training = [module.training for module in modules]
    gradients = [(parameter.requires_grad, parameter.grad) for parameter in parameters]
    random_state = torch.get_rng_state()
    cuda_random_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        if evaluation and model is not None:
            model.eval()
        if freeze:
            for parameter in parameters:
                parameter.requires_grad_(False)
        yield
    finally:
        for module, flag in zip(modules, training, strict=True):
            module.training = flag
        for parameter, (requires_grad, gradient) in zip(parameters, gradients, strict=True):
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
        torch.set_rng_state(random_state)
        if cuda_random_states is not None:
            torch.cuda.set_rng_state_all(cuda_random_states)
