"""Accuracy of a classifier, overall and for each class."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from captum_classfilters._core.batches import Batch, Batches, read_batches
from captum_classfilters._core.devices import device_of
from captum_classfilters._core.distributed import gather
from captum_classfilters._core.heads import alike
from captum_classfilters._core.labels import not_finite
from captum_classfilters._core.outputs import (
    are_probabilities,
    as_rows,
    class_scores,
    log_probabilities,
    scores_per_class,
    two_classes,
)
from captum_classfilters._core.tables import Table, Tabular, short_repr
from captum_classfilters._core.taps import hooked
from captum_classfilters._core.types import Dataloader, Keywords, ModelInputs, Unpack


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
        title = f"accuracy {self.accuracy:.4f}{top5}, {self.num_images:,} images"
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


class ScoreReader:
    r"""
    Scores of classes of one batch after another, checked.

    Args:

        model (nn.Module): The model.
        batches (Batches): The batches that are read; checks are made when they settle.
    """

    def __init__(self, model: nn.Module, batches: Batches) -> None:
        self.model, self._batches = model, batches
        self._gives_probability: bool | None = None

    def scores(self, batch: Batch, output: object) -> Tensor:
        """Scores (N, C), C at least 2, of what the model returned for a batch."""
        scores = as_rows(class_scores(output))
        if scores.dim() == 2 and scores.shape[1] == 1:
            scores = self._binary(batch, scores)
        scores = scores_per_class(scores)
        if len(scores) != batch.size:
            raise ValueError(
                f"The model returns {len(scores)} rows of scores for the {batch.size} images of "
                f"batch {batch.number}; accuracy needs one row for each image."
            )
        self.check_finite(batch, scores)
        return scores

    def log_probabilities(self, batch: Batch, output: object) -> Tensor:
        """Log-probabilities (N, C) of what the model returned, logits or probabilities alike."""
        scores = as_rows(class_scores(output))
        if scores.dim() == 2 and scores.shape[1] == 1:
            binary = self._binary(batch, scores)
            own = binary if self._gives_probability else scores
            return log_probabilities(own, bool(self._gives_probability))
        if self._gives_probability is None:
            self._gives_probability = are_probabilities(scores)
        return log_probabilities(scores_per_class(scores), self._gives_probability)

    def check_finite(self, batch: Batch, scores: Tensor) -> None:
        """Refuse, soon, scores (N, C) of which an image's largest is NaN or infinite."""
        finite = scores.amax(1).isfinite()
        self._batches.check(finite.all(), partial(not_finite, finite, batch.number))

    def _binary(self, batch: Batch, scores: Tensor) -> Tensor:
        """Scores (N, 2) of one output (N, 1): the logit z as (-z, z), a probability p as (1-p, p)."""
        if self._gives_probability is None:
            self._gives_probability = gives_probability(self.model, batch.inputs, scores)
        if not self._gives_probability:
            return two_classes(scores)
        in_range = ((scores >= 0) & (scores <= 1)).all()
        self._batches.check(in_range, partial(_neither, batch.number))
        return torch.cat([1 - scores, scores], 1)


def gives_probability(model: nn.Module, inputs: ModelInputs, scores: Tensor) -> bool:
    """Whether the one output (N, 1) of a binary classifier is a probability, not a logit: it lies in
    [0, 1] and is not what the last layer with weights puts out."""
    if not bool(((scores >= 0) & (scores <= 1)).all()):
        return False
    last: list[Tensor] = []

    def hook(_module: nn.Module, _inputs: object, output: object) -> None:
        last[:] = [output] if isinstance(output, Tensor) else []

    weighted = [m for m in model.modules() if next(m.parameters(recurse=False), None) is not None]
    with hooked(weighted, hook):
        model(*inputs)
    if not last:
        return True
    own = last[0].flatten(2).mean(2) if last[0].dim() > 2 else last[0]
    return own.numel() != scores.numel() or not bool(alike(own.reshape(scores.shape), scores))


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


def _neither(batch: int) -> ValueError:
    return ValueError(
        "The model's one output looked like a probability of class 1 in the first batch, but batch "
        f"{batch} has values outside [0, 1]. If it is a logit, say so: "
        "ClassScores(model, lambda z: torch.stack([-z.flatten(), z.flatten()], 1)) in place of the "
        "model."
    )
