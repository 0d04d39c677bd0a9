"""The one reading of Captum's targets: which score of each image is explained."""

from typing import TypeVar, cast

import torch
from torch import Tensor

from captum_classfilters._core.captum import TargetType, select_targets
from captum_classfilters._core.devices import on_device, ordinary
from captum_classfilters._core.outputs import two_classes

Target = TypeVar("Target", bound=TargetType)


def own_scores(scores: Tensor, target: TargetType, num_images: int) -> Tensor:
    r"""
    The score that each image's target selects (N,).

    Of a binary classifier's one logit z, class 1 has the score z and class 0 has -z; without a
    target it is z.

    Raises:
        AssertionError: The target does not select one score of each image, as Captum answers.
    """
    if target is None:
        if scores.numel() != num_images:
            raise AssertionError(
                f"The model returns {tuple(scores.shape)} for {num_images} images; say which output "
                "is explained: target=... (a class index, or one for each image)."
            )
        return scores.reshape(num_images)
    table = two_classes(scores)
    selected: Tensor = select_targets(table, on_device(as_taken(target), table.device)).reshape(-1)
    if len(selected) != num_images:
        raise AssertionError(
            f"The model returns {tuple(scores.shape)} for {num_images} images, and "
            f"target={target!r} does not pick one number for each."
        )
    return selected


def class_indices(num_classes: int, target: TargetType, num_images: int) -> Tensor:
    """The class that each image's target selects of (N, C) scores, as (N,) on the CPU.

    Raises:
        AssertionError: The target does not fit (N, C), as Captum answers.
    """
    if target is None and num_classes > 1:
        raise AssertionError(
            f"There are {num_classes} classes; say which is explained: target=... (a class index, or "
            "one for each image)."
        )
    table = torch.arange(num_classes).expand(num_images, num_classes)
    selected: Tensor = select_targets(table, on_device(as_taken(target), "cpu"))
    if selected.numel() not in (1, num_images):
        raise AssertionError(
            f"target={target!r} does not pick one class for each of {num_images} images."
        )
    return selected.reshape(-1).expand(num_images)


def as_taken(target: Target) -> Target:
    """A target as Captum and autograd take it: class indices of any type of whole numbers, labels in
    bytes for example, as int64, whatever mode they were made in."""
    target = ordinary(target)
    if not isinstance(target, Tensor) or target.dtype == torch.bool:
        return target
    whole = not (target.is_floating_point() or target.is_complex())
    return cast(Target, target.long()) if whole else target


def as_indices(target: TargetType) -> Tensor | None:
    """A target that is already one class index for each image, as such."""
    if isinstance(target, Tensor) and target.dim() == 1 and target.dtype == torch.int64:
        return target
    return None
