"""Checks that the measurements on features share."""

import torch
from torch import Tensor


def checked_features(
    features: Tensor, labels: Tensor, num_classes: int | None, nonnegative: bool = False
) -> tuple[Tensor, Tensor, int]:
    """Features (N, K) as float64, labels (N,) as int64, and the number of classes."""
    if features.dim() != 2 or labels.shape != features.shape[:1] or len(features) == 0:
        raise ValueError(
            f"features {tuple(features.shape)} and labels {tuple(labels.shape)} do not fit; "
            "expected (N, K) and (N,) with at least one image."
        )
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels are {labels.dtype}; expected class indices.")
    if not bool(torch.isfinite(features).all()):
        raise ValueError("features hold NaN or Inf.")
    if nonnegative and bool((features < 0).any()):
        raise ValueError("features hold negative values; use activations after a ReLU.")
    number = int(labels.max()) + 1 if num_classes is None else num_classes
    if int(labels.min()) < 0 or int(labels.max()) >= number:
        raise ValueError(f"labels are out of range: expected 0 to {number - 1}.")
    return features.detach().cpu().double(), labels.cpu().long(), number


def class_rows(labels: Tensor, num_classes: int) -> list[Tensor]:
    """Indices of each class's images."""
    return [(labels == class_).nonzero()[:, 0] for class_ in range(num_classes)]
