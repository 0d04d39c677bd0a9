"""Whether there is anything to train, whether a loss leads to it, and what to say where that ends in NaN."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from captum_classfilters._core.layers import CHECKPOINTED, named_layers
from captum_classfilters._core.linear_maps import is_quantized


def compute_gradients(
    loss: Tensor,
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    but: Iterable[Tensor] = (),
    advice: str = "",
) -> None:
    r"""
    Compute a loss's gradients, for a step of an optimizer.

    Args:

        loss (Tensor): The loss.
        optimizer (torch.optim.Optimizer): Its parameters are to be trained.
        model (nn.Module): What the loss comes from, for the error.
        but (iterable of Tensor): Parameters that are not the model's own, though it may hold them.
        advice (str): What else to do where all of the model is frozen.

    Raises:
        ValueError: No gradient leads to any of these parameters.
    """
    if loss.requires_grad:
        loss.backward()
        if any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
            return
    check_trainable(model, but, advice)
    raise no_gradient_of_loss(model)


def check_trainable(model: nn.Module, but: Iterable[Tensor] = (), advice: str = "") -> None:
    """Raise if no parameter of a model, but for some, is to be trained."""
    left_out = {id(parameter) for parameter in but}
    parameters = [p for p in model.parameters() if id(p) not in left_out]
    if not any(parameter.requires_grad for parameter in parameters):
        frozen = f"its {len(parameters)} parameters are frozen; model.requires_grad_(True) unfreezes them."
        raise ValueError(
            f"Nothing of the {type(model).__name__} can be trained: "
            f"{frozen if parameters else 'it has no parameters.'}{advice}{_quantized(model)}"
        )


def no_gradient_of_loss(model: nn.Module) -> ValueError:
    """The error of a loss that leads to no parameter that is to be trained."""
    return ValueError(
        "No gradient of the loss leads to any of the parameters that are to be trained: what follows "
        "them runs under torch.no_grad(), detaches its tensors or is quantized, or does not use them; "
        f"{CHECKPOINTED}.{_quantized(model)}"
    )


def not_finite_in_training(parameters: Iterable[Tensor], what: str = "training loss") -> ValueError:
    """The error for a loss, or what was learned, that is NaN or infinite."""
    advice = half_precision_advice(parameters) or " Lower the learning rate."
    return ValueError(f"The {what} is NaN or Inf.{advice}")


def half_precision_advice(parameters: Iterable[Tensor]) -> str:
    """How to train what is in float16, as a sentence; nothing if there is none."""
    if all(parameter.dtype != torch.float16 for parameter in parameters):
        return ""
    return (
        " Parameters in float16 are too coarse to train, at any learning rate (Adam's eps of 1e-8 is "
        "zero there): train model.float() or model.bfloat16() on images of that type."
    )


def _quantized(model: nn.Module) -> str:
    """What to do about quantized layers, for an error; nothing if there are none."""
    names = [
        name or type(module).__name__
        for name, module in named_layers(model).items()
        if is_quantized(module) and not name.endswith("_packed_params")
    ]
    if not names:
        return ""
    return (
        f" Quantized layers cannot be trained ({', '.join(map(repr, names[:5]))}): fine-tune the "
        "floating-point model, and quantize that."
    )
