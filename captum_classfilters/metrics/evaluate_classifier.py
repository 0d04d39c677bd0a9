"""Accuracy of a classifier, overall and for each class."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassConfusionMatrix
from tqdm.auto import tqdm

from captum_classfilters._core.guard import model_left_as_found


@dataclass(frozen=True)
class ClassifierScores:
    r"""
    How well a classifier does.

    Args:

        accuracy (float): Share of images whose largest logit is their class's.
        top5_accuracy (float or None): Share whose class is among the five largest; None for C < 6.
        recall (Tensor): Shape (C,). Accuracy on each class's images; NaN for classes without any.
        confusion (Tensor): Shape (C, C), int64. Images of class i predicted as class j.
        num_images (int): N.
    """

    accuracy: float
    top5_accuracy: float | None
    recall: Tensor
    confusion: Tensor
    num_images: int


def evaluate_classifier(
    model: nn.Module, dataloader: Iterable[Any], *, show_progress: bool = True
) -> ClassifierScores:
    r"""
    Measure a classifier on a data set, in evaluation mode, and leave it as found.

    Args:

        model (nn.Module): The model, with logits (N, C).
        dataloader (iterable): Batches of (images, labels).
        show_progress (bool): Show a progress bar.
                    Default: True

    Returns:
        *ClassifierScores*.

    Raises:
        ValueError: The loader is empty.
    """
    confusion: MulticlassConfusionMatrix | None = None
    among_five = 0
    parameter = next(model.parameters(), None)
    device = parameter.device if parameter is not None else torch.device("cpu")
    bar = tqdm(dataloader, desc="accuracy", unit="batch", disable=not show_progress)
    with model_left_as_found(model, evaluation=True), torch.no_grad():
        for images, labels in bar:
            logits = model(images.to(device)).cpu()
            if confusion is None:
                confusion = MulticlassConfusionMatrix(logits.shape[1])
            confusion.update(logits.argmax(1), labels.cpu())
            top = logits.topk(min(5, logits.shape[1]), dim=1).indices
            among_five += int((top == labels.cpu()[:, None]).any(1).sum())
    if confusion is None:
        raise ValueError("The data loader is empty.")
    table = confusion.compute().long()
    total = int(table.sum())
    return ClassifierScores(
        accuracy=float(table.diagonal().sum() / total),
        top5_accuracy=among_five / total if len(table) > 5 else None,
        recall=table.diagonal().double() / table.sum(1).double(),
        confusion=table,
        num_images=total,
    )
