"""Accuracy of a classifier, overall and for each class."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from captum_classfilters._core.batches import read_batches
from captum_classfilters._core.devices import device_of
from captum_classfilters._core.distributed import gather
from captum_classfilters._core.names import counted
from captum_classfilters._core.score_reader import ScoreReader
from captum_classfilters._core.tables import Table, Tabular, short_repr
from captum_classfilters._core.types import Dataloader, Keywords, Unpack


@short_repr
@dataclass(frozen=True)
class ClassifierScores(Tabular):
    r"""
    How well a classifier does.

    Args:

        accuracy (float): Share of images whose largest score is their class's.
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

    def _tables(self) -> list[Table]:
        others = self.confusion.clone().fill_diagonal_(0)
        wrong, taken_for = others.max(1)
        rows = [
            {
                "class": index,
                "images": self.confusion[index].sum(),
                "recall": self.recall[index],
                "most often taken for": int(taken_for[index]) if wrong[index] > 0 else None,
                "times": int(wrong[index]),
            }
            for index in range(len(self.recall))
        ]
        top5 = (
            "" if self.top5_accuracy is None else f", {self.top5_accuracy:.4f} among the first five"
        )
        title = f"accuracy {self.accuracy:.4f}{top5}, {counted(self.num_images, 'image')}"
        return [Table(rows, title=title, bars=("recall",))]


def evaluate_classifier(
    model: nn.Module,
    dataloader: Dataloader,
    *,
    unpack: Unpack | None = None,
    show_progress: bool = True,
) -> ClassifierScores:
    r"""
    Measure a classifier on a data set, in evaluation mode, and leave it as found.

    Of a binary classifier's one output, class 1 is predicted where the logit is above 0, or the
    probability above one half. It is taken for a probability if all values of the first batch lie
    in [0, 1] and do not come straight from a layer with weights. Under ``torchrun`` every rank
    reads its own share and all ranks get the scores of the whole.

    Args:

        model (nn.Module): The model, with scores (N, C), or with one output (N,) or (N, 1) for two
                    classes.
        dataloader (iterable): Batches of (inputs, labels), one class index for each image.
        unpack (Callable, optional): From a batch of another kind to the pair (inputs, labels).
                    Default: None
        show_progress (bool): Show a progress bar.
                    Default: True

    Returns:
        *ClassifierScores*, its tensors on the CPU.

    Raises:
        ValueError: The loader is empty, labels are no class indices, or scores are not finite.

    Examples::

        >>> import torch
        >>> from captum_classfilters.metrics import evaluate_classifier
        >>> data = [(torch.eye(3), torch.tensor([0, 1, 1]))]
        >>> scores = evaluate_classifier(torch.nn.Identity(), data, show_progress=False)
        >>> scores.recall
        tensor([1.0000, 0.5000,    nan], dtype=torch.float64)
    """
    counts: _Counts | None = None
    with read_batches(
        model,
        dataloader,
        "accuracy",
        unpack=unpack,
        summed=True,
        show_progress=show_progress,
    ) as batches:
        reader = ScoreReader(model, batches)
        for batch in batches:
            output = model(*batch.inputs)
            batches.check_repeats(model, batch, output)
            scores = reader.scores(batch, output)
            counts = counts or _Counts(scores.shape[1], scores.device)
            counts.update(scores, batches.class_labels(batch, scores.shape[1]))
    num_classes = next((c for c in gather(counts and counts.num_classes) if c), None)
    if num_classes is None:
        raise ValueError("The data loader is empty: there is no image to read.")
    return (counts or _Counts(num_classes, device_of(model) or torch.device("cpu"))).compute()


class _Counts:
    """What a classifier's scores are made of, on its device until they are asked for."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        from torchmetrics.classification import MulticlassAccuracy

        from captum_classfilters.metrics.confusion_counts import ConfusionCounts

        self.num_classes = num_classes
        self.confusion = ConfusionCounts(num_classes).to(device)
        self.among_five: MulticlassAccuracy | None = None
        if num_classes > 5:
            options: Keywords = {"top_k": 5, "average": "micro", "validate_args": False}
            self.among_five = MulticlassAccuracy(num_classes, **options).to(device)

    def update(self, scores: Tensor, labels: Tensor) -> None:
        """Add a batch."""
        self.confusion.update(scores.argmax(1), labels)
        if self.among_five is not None:
            self.among_five.update(scores, labels)

    def compute(self) -> ClassifierScores:
        """The scores, of all ranks."""
        confusion = self.confusion.compute().cpu()
        right, of_class = confusion.diagonal().double(), confusion.sum(1).double()
        five = self.among_five
        return ClassifierScores(
            accuracy=float(right.sum() / of_class.sum()),
            top5_accuracy=None if five is None else float(five.compute()),
            recall=right / of_class,
            confusion=confusion,
            num_images=int(confusion.sum()),
        )
