"""Right answers of several heads, as a torchmetrics Metric."""

import torch
from torch import Tensor

from captum_classfilters.identify.summed_metric import SummedMetric


class Hits(SummedMetric):
    """Right answers by class, of the model and of each trial, and images by class."""

    right: Tensor
    seen: Tensor

    def __init__(self, num_trials: int, num_classes: int) -> None:
        super().__init__()
        right = torch.zeros(1 + num_trials, num_classes, dtype=torch.int64)
        self.add_state("right", right, dist_reduce_fx="sum")
        self.add_state("seen", right[0].clone(), dist_reduce_fx="sum")

    def update(self, predicted: Tensor, labels: Tensor) -> None:
        """Add predictions (1 + T, N)."""
        hits = (predicted == labels).to(self.right.dtype)
        self.right.index_add_(1, labels, hits)
        self.seen.index_add_(0, labels, torch.ones_like(labels))

    def compute(self) -> tuple[Tensor, Tensor]:
        """Right answers (1 + T, C) and images (C,)."""
        return self.right.cpu(), self.seen.cpu()
