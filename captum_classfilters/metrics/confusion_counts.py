"""A confusion matrix and top-5 accuracy, as torchmetrics Metrics."""

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from captum_classfilters.identify.summed_metric import SummedMetric


class ConfusionCounts(SummedMetric, MulticlassConfusionMatrix):
    """A confusion matrix that is counted without waiting for a device, as torchmetrics' own does to
    learn how large its counts became."""

    confmat: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, validate_args=False)

    def update(self, predicted: Tensor, labels: Tensor) -> None:
        """Count images by class and predicted class, both (N,)."""
        pairs = labels * self.num_classes + predicted
        self.confmat.view(-1).index_add_(0, pairs, torch.ones_like(pairs))
