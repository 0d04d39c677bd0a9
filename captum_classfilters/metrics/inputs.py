"""Captum's arguments, where the model is."""

from typing import TypeVar

import torch
from captum.attr import Attribution
from torch import Tensor, nn

from captum_classfilters._core.captum import (
    TargetType,
    format_additional_forward_args,
    format_tensor_into_tuples,
)
from captum_classfilters._core.devices import device_of, on_device, ordinary
from captum_classfilters._core.guard import model_left_as_found
from captum_classfilters._core.layers import module_of
from captum_classfilters._core.rules import FilterRule
from captum_classfilters._core.targets import Target, as_taken
from captum_classfilters._core.types import ModelInputs
from captum_classfilters.class_scores import explaining_classes

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


def with_classes_as_targets(method: T, inputs: ModelInputs, target: TargetType) -> T:
    r"""
    A method whose targets are classes; see :func:`~captum_classfilters.class_scores.explaining_classes`.

    Args:

        method (object): A method, or its ``attribute``.
        inputs (tuple): What its forward function takes; that of a method of Captum is run to see what
                    it returns.
        target (int, tuple, Tensor, list or None): What it will be asked for; nothing changes without.

    Returns:
        *object*: The method, or a copy of it.
    """
    owner = getattr(method, "__self__", method)
    function = getattr(owner, "forward_func", None)
    captums = isinstance(owner, Attribution) and not isinstance(owner, FilterRule)
    if not captums or function is None or target is None:
        return method
    with model_left_as_found(module_of(function), evaluation=True), torch.no_grad():
        output = function(*inputs)
    return explaining_classes(method, output)
