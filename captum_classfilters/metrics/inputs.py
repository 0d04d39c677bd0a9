"""Captum's arguments, where the model is."""

from typing import TypeVar

from torch import Tensor, nn

from captum_classfilters._core.captum import (
    TargetType,
    format_additional_forward_args,
    format_tensor_into_tuples,
)
from captum_classfilters._core.devices import device_of, on_device
from captum_classfilters._core.types import ModelInputs

Target = TypeVar("Target", bound=TargetType)


def at_model(
    model: nn.Module | None,
    inputs: Tensor | tuple[Tensor, ...],
    additional_forward_args: object,
    target: Target,
) -> tuple[tuple[Tensor, ...], ModelInputs, Target]:
    """Inputs, further arguments and target where a model is, inputs so that autograd records them."""
    further = format_additional_forward_args(additional_forward_args) or ()
    arguments = (format_tensor_into_tuples(inputs), further, target)
    images, further, target = on_device(arguments, device_of(model))
    return tuple(part.clone() if part.is_inference() else part for part in images), further, target
