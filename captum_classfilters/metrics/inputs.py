"""Captum's arguments, where the model is."""

from typing import TypeVar

from torch import Tensor, nn

from captum_classfilters._core.captum import (
    format_additional_forward_args,
    format_tensor_into_tuples,
)
from captum_classfilters._core.devices import device_of, on_device, ordinary
from captum_classfilters._core.targets import Target, as_taken
from captum_classfilters._core.types import ModelInputs

T = TypeVar("T")


def at_model(
    model: nn.Module | None,
    inputs: Tensor | tuple[Tensor, ...],
    additional_forward_args: object,
    target: Target,
) -> tuple[tuple[Tensor, ...], ModelInputs, Target]:
    """Inputs, further arguments and target where a model is, such that any method takes them: Captum's
    cannot differentiate by part of a tensor that requires gradients."""
    further = format_additional_forward_args(additional_forward_args) or ()
    images = tuple(part.detach() for part in format_tensor_into_tuples(inputs))
    return taken_at(model, (images, further, as_taken(target)))


def taken_at(model: nn.Module | None, value: T) -> T:
    """A value, a method's options for example, with every tensor where a model is and usable by
    autograd."""
    return on_device(ordinary(value), device_of(model))
