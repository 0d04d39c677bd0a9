"""Per-class sums as a torchmetrics Metric, which adds, merges, synchronises and saves them."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class ClassFilterSums(Metric):
    r"""
    Streaming sums of per-image filter scores, class by class.

    Memory is O(C K) whatever the number of images. Merging across processes adds the states, so
    counts are bitwise those of one process and sums differ by rounding in float64 only.

    Args:

        num_classes (int): C.
        num_filters (int): K.
        integer (bool): Scores are whole numbers, votes say; they are then counted in int64, and
                    no standard errors of rounding enter.
                    Default: False

    Examples::

        >>> import torch
        >>> from captum_classfilters.identify import ClassFilterSums
        >>> sums = ClassFilterSums(num_classes=2, num_filters=3)
        >>> sums.update(torch.tensor([[1., 0., 2.], [3., 0., 0.]]), torch.tensor([0, 0]))
        >>> sums.compute()["mean"][0]
        tensor([2., 0., 1.], dtype=torch.float64)
    """

    full_state_update = False
    higher_is_better = None
    is_differentiable = False

    count: Tensor
    total: Tensor
    squares: Tensor

    def __init__(
        self, num_classes: int, num_filters: int, integer: bool = False, **options: Any
    ) -> None:
        super().__init__(**options)
        dtype = torch.int64 if integer else torch.float64
        table = torch.zeros(num_classes, num_filters, dtype=dtype)
        self.add_state("count", torch.zeros(num_classes, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", table, dist_reduce_fx="sum")
        self.add_state("squares", table.clone(), dist_reduce_fx="sum")

    def update(self, scores: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:

            scores (Tensor): Shape (N, K).
            labels (Tensor): Shape (N,), int64 in [0, C).
        """
        values = scores.detach().to(self.total)
        labels = labels.to(values.device)
        self.count += torch.bincount(labels, minlength=len(self.count))
        self.total.index_add_(0, labels, values)
        self.squares.index_add_(0, labels, values * values)

    def compute(self) -> dict[str, Tensor]:
        """The table so far.

        Returns:
            *dict* with **count** (C,), **total**, **mean** and **standard_error** (C, K). The mean
            of a class without images is NaN; so is the standard error of one with fewer than two.
        """
        number = self.count.to(torch.float64)[:, None]
        mean = self.total / number
        # Sums of squares can fall below the squared sum by rounding.
        spread = (self.squares - self.total * mean).clamp(min=0) / (number - 1).clamp(min=0)
        return {
            "count": self.count,
            "total": self.total,
            "mean": mean,
            "standard_error": (spread / number).sqrt(),
        }


def labels_of_scores(
    scores: Tensor, labels: Any, batch: int, num_classes: int | None = None
) -> Tensor:
    """The labels of a batch of class scores (N, C), both checked, where the scores are."""
    if scores.dim() != 2:
        raise ValueError(f"The model puts out {tuple(scores.shape)}; accuracy needs (N, C).")
    finite = scores.isfinite().all(1)
    if not bool(finite.all()):
        raise ValueError(
            f"The model puts out NaN or Inf for image {int((~finite).nonzero()[0, 0])} of batch "
            f"{batch}; accuracy would take it for some class."
        )
    return class_labels(labels, len(scores), num_classes or scores.shape[1], batch).to(
        scores.device
    )


def class_labels(labels: Any, num_images: int, num_classes: int, batch: int) -> Tensor:
    """Labels as int64 (N,), checked; the error says what was found and in which batch."""
    tensor = torch.as_tensor(labels)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(
            f"The labels of batch {batch} are {tensor.dtype}; expected whole numbers, one class "
            "index for each image."
        )
    if tensor.shape != (num_images,):
        raise ValueError(
            f"The labels of batch {batch} have shape {tuple(tensor.shape)}; expected "
            f"({num_images},), one class index for each image."
        )
    tensor = tensor.to(torch.int64)
    if num_images and (int(tensor.min()) < 0 or int(tensor.max()) >= num_classes):
        wrong = tensor[(tensor < 0) | (tensor >= num_classes)][0].item()
        raise ValueError(
            f"Batch {batch} has the label {wrong}, but there are {num_classes} classes: expected "
            f"0 to {num_classes - 1}."
        )
    return tensor
