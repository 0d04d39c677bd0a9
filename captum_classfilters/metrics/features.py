"""Checks that the measurements on features share."""

import torch
from torch import Tensor


def checked_features(
    features: Tensor, labels: Tensor, num_classes: int | None, nonnegative: bool = False
) -> tuple[Tensor, Tensor, int]:
    """Features (N, K) as float64 and labels (N,) as int64, on the CPU, and the number of classes."""
    if features.dim() != 2 or labels.shape != features.shape[:1] or not features.numel():
        raise ValueError(
            f"features {tuple(features.shape)} and labels {tuple(labels.shape)} do not fit; "
            "expected (N, K) and (N,) with at least one image and one filter."
        )
    if not bool(torch.isfinite(features).all()):
        raise ValueError("features hold NaN or Inf.")
    if nonnegative and bool((features < 0).any()):
        raise ValueError("features hold negative values; use activations after a ReLU.")
    return features.detach().cpu().double(), *checked_labels(labels, len(features), num_classes)


def checked_labels(labels: Tensor, num_images: int, num_classes: int | None) -> tuple[Tensor, int]:
    """Labels (N,) as int64 on the CPU, and the number of classes, by default the largest plus one."""
    if labels.shape != (num_images,) or not num_images:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}; expected ({num_images},) with at least one "
            "class index."
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels are {labels.dtype}; expected class indices.")
    classes = labels.detach().cpu().long()
    num_classes = int(classes.max()) + 1 if num_classes is None else num_classes
    if int(classes.min()) < 0 or int(classes.max()) >= num_classes:
        raise ValueError(f"labels are out of range: expected 0 to {num_classes - 1}.")
    return classes, num_classes


def class_rows(labels: Tensor, num_classes: int) -> list[Tensor]:
    """Indices of each class's images."""
    return [(labels == class_).nonzero()[:, 0] for class_ in range(num_classes)]
