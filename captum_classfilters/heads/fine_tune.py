"""Fine-tune a whole network, the best state kept."""

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.batches import Batch, Batches, check_read_again, read_batches
from captum_classfilters._core.devices import device_of, on_device
from captum_classfilters._core.guard import check_ordinary, flags_restored
from captum_classfilters._core.score_reader import ScoreReader
from captum_classfilters._core.tables import short_repr
from captum_classfilters._core.training import (
    check_trainable,
    no_gradient_of_loss,
    not_finite_in_training,
)
from captum_classfilters._core.types import Dataloader, Unpack
from captum_classfilters.heads.linear_head import find_head, first_inputs
from captum_classfilters.metrics.evaluate_classifier import evaluate_classifier

logger = logging.getLogger("captum_classfilters")

Freeze = Literal["nothing", "backbone", "batch_norm_statistics"]


@short_repr
@dataclass(frozen=True)
class Epoch:
    """What one epoch of fine-tuning did.

    Args:

        epoch (int): Number of the epoch; 0 is the state before training.
        loss (float or None): Mean training loss.
        train_accuracy (float or None): Accuracy on the training batches as they were seen.
        validation_accuracy (float): Accuracy on the validation images after the epoch.
    """

    epoch: int
    loss: float | None
    train_accuracy: float | None
    validation_accuracy: float


@arguments_checked
@torch.inference_mode(False)
def fine_tune(
    model: nn.Module,
    train_loader: Dataloader,
    validation_loader: Dataloader,
    *,
    epochs: int = 1,
    learning_rate: float = 1e-4,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: LRScheduler | None = None,
    freeze: Freeze = "nothing",
    label_smoothing: float = 0.0,
    teacher: nn.Module | None = None,
    teacher_weight: float = 0.9,
    temperature: float = 2.0,
    unpack: Unpack | None = None,
    show_progress: bool = True,
) -> list[Epoch]:
    r"""
    Fine-tune a model, a decomposed one for example, in place; it ends in its best state.

    Adam without weight decay minimizes the cross-entropy, as the authors of the decomposed head do.
    After each epoch the model is measured on the validation images, and the state that did best
    is kept, the one before training included. An interruption, too, leaves the best state so far.
    Logits, probabilities, their logarithms and the one output of a binary classifier are each
    trained on the cross-entropy of what they mean.

    Args:

        model (nn.Module): The model.
        train_loader (iterable): Batches of (inputs, labels).
        validation_loader (iterable): Batches of other images, to choose the best state by.
        epochs (int): Number of epochs.
                    Default: 1
        learning_rate (float): Of Adam, where no ``optimizer`` is given.
                    Default: 1e-4
        optimizer (torch.optim.Optimizer, optional): Another optimizer over the model's parameters.
        scheduler (optional): A learning-rate scheduler, advanced after each batch.
        freeze (str): ``"nothing"``; ``"backbone"`` trains the last linear layer alone;
                    ``"batch_norm_statistics"`` keeps running means and variances.
                    Default: "nothing"
        label_smoothing (float): As for ``torch.nn.functional.cross_entropy``.
                    Default: 0.0
        teacher (nn.Module, optional): A network, the full one for example, whose predictions
                    for the same images are learned beside the labels (Hinton et al. 2015,
                    https://arxiv.org/abs/1503.02531). It helps where the network has seen the
                    training images and their labels teach it little more.
                    Default: None
        teacher_weight (float): Share of the loss that follows the teacher.
                    Default: 0.9
        temperature (float): Of both softmaxes in that share.
                    Default: 2.0
        unpack (Callable, optional): From a batch of another kind to the pair (inputs, labels), for
                    both loaders.
                    Default: None
        show_progress (bool): Show progress bars.
                    Default: True

    Returns:
        *list of Epoch*: The history, its first entry the model as it was: ``epoch``, mean ``loss``,
        ``train_accuracy`` on the batches as they were seen, and ``validation_accuracy``.

    Raises:
        ValueError: A loader is empty or can be read only once, ``freeze`` is unknown, the loss
                    is not finite, or nothing can be trained: all parameters are frozen, or no
                    gradient leads to one, as through a quantized head.
    """
    if freeze not in ("nothing", "backbone", "batch_norm_statistics"):
        raise ValueError(
            f"freeze={freeze!r}; choose 'nothing', 'backbone' or 'batch_norm_statistics'."
        )
    check_ordinary(model)
    if freeze != "backbone":
        check_trainable(model)
    if epochs > 1:
        check_read_again(train_loader)
    if epochs > 0:
        check_read_again(validation_loader)  # also before the first epoch
    if _same_data(train_loader, validation_loader):
        logger.warning("Training and validation use the same data; its accuracy is optimistic.")

    def measured(epoch: int, loss: float | None = None, accuracy: float | None = None) -> Epoch:
        scores = evaluate_classifier(model, validation_loader, unpack=unpack, show_progress=False)
        return Epoch(epoch, loss, accuracy, scores.accuracy)

    head = None
    if freeze == "backbone":
        inputs, train_loader = first_inputs(model, train_loader, unpack)
        head = find_head(model, inputs)[1]
    history = [measured(0)]
    with _best_state_kept(model) as keep_state, _teaching(teacher):
        trained = _trained_parameters(model, head)
        optimizer = optimizer or torch.optim.Adam(trained, lr=learning_rate)
        criterion = _Criterion(label_smoothing, teacher, teacher_weight, temperature)
        for epoch in range(1, epochs + 1):
            _train_mode(model, freeze)
            with read_batches(
                model,
                train_loader,
                f"epoch {epoch}",
                unpack=unpack,
                training=True,
                show_progress=show_progress,
            ) as batches:
                loss, accuracy = _one_epoch(
                    model, batches, trained, optimizer, scheduler, criterion
                )
            best = max(entry.validation_accuracy for entry in history)
            history.append(measured(epoch, loss, accuracy))
            if history[-1].validation_accuracy > best:
                keep_state()
    return history


@dataclass(frozen=True)
class _Criterion:
    """Cross-entropy with the labels, and with a teacher's softened predictions."""

    label_smoothing: float
    teacher: nn.Module | None
    teacher_weight: float
    temperature: float

    def __call__(self, predicted: Tensor, labels: Tensor, taught: Tensor | None) -> Tensor:
        """The loss of log-probabilities (N, C), and those of the teacher."""
        loss = F.cross_entropy(predicted, labels, label_smoothing=self.label_smoothing)
        if taught is None:
            return loss
        softened = F.cross_entropy(
            predicted / self.temperature, (taught.to(predicted) / self.temperature).softmax(1)
        )
        # The factor keeps gradients of one size whatever the temperature.
        softened = softened * self.temperature**2
        return (1 - self.teacher_weight) * loss + self.teacher_weight * softened


def _one_epoch(
    model: nn.Module,
    batches: Batches,
    trained: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler | None,
    criterion: _Criterion,
) -> tuple[float, float]:
    """Mean loss, and accuracy on the batches as they were seen."""
    reader = ScoreReader(model, batches)
    teacher = None if criterion.teacher is None else ScoreReader(criterion.teacher, batches)
    sums: Tensor | None = None
    before = _not_finite(trained)
    for batch in batches:
        optimizer.zero_grad(set_to_none=True)
        predicted = reader.log_probabilities(batch, model(*batch.inputs))
        labels = batches.class_labels(batch, predicted.shape[1])
        loss = criterion(predicted, labels, _taught(teacher, batch))
        batches.check(loss.detach().isfinite(), partial(not_finite_in_training, trained))
        if loss.requires_grad:
            loss.backward()
        if sums is None and all(parameter.grad is None for parameter in trained):
            raise no_gradient_of_loss(model)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        right = (predicted.detach().argmax(1) == labels).sum()
        own = torch.stack([loss.detach().float() * batch.size, right.float()])
        sums = own if sums is None else sums + own
    if sums is None:
        raise ValueError("The training loader is empty: there is no image to train on.")
    now = _not_finite(trained)  # after the last step, whose loss nobody has computed
    if any(number > earlier for number, earlier in zip(now, before, strict=True)):
        raise not_finite_in_training(trained, "model after an epoch")
    total, right_answers = sums.tolist()
    return total / batches.num_images, right_answers / batches.num_images


def _not_finite(parameters: Sequence[Tensor]) -> tuple[int, int]:
    """How many numbers are NaN or infinite, and how many NaN; a mask may hold minus infinity from the
    start."""
    seen = [parameter.detach() for parameter in parameters]
    number = sum(int((~tensor.isfinite()).sum()) for tensor in seen)
    return number, sum(int(tensor.isnan().sum()) for tensor in seen)


def _taught(teacher: ScoreReader | None, batch: Batch) -> Tensor | None:
    """The teacher's log-probabilities for a batch."""
    if teacher is None:
        return None
    with torch.no_grad():
        inputs = on_device(batch.inputs, device_of(teacher.kind.model))
        return teacher.log_probabilities(batch, teacher.model(*inputs))


@contextmanager
def _teaching(teacher: nn.Module | None) -> Iterator[None]:
    """The teacher in evaluation mode; the random state is the pupil's."""
    training = [] if teacher is None else [(part, part.training) for part in teacher.modules()]
    try:
        if teacher is not None:
            teacher.eval()
        yield
    finally:
        for part, flag in training:
            part.training = flag


@contextmanager
def _best_state_kept(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Call what is given to keep the model's state; the one kept last is the model's in the end.
    Modes and gradients are as before."""
    best: list[dict[str, Tensor]] = []

    def keep_state() -> None:
        best[:] = [copy.deepcopy(model.state_dict())]  # with versions, which quantized layers read

    keep_state()
    with flags_restored(model):
        try:
            yield keep_state
        finally:
            model.load_state_dict(best[0])


def _trained_parameters(model: nn.Module, head: nn.Module | None) -> list[nn.Parameter]:
    """The head's parameters, all others frozen; without a head all that are not."""
    if head is None:
        return [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    head.requires_grad_(True)
    return list(head.parameters())


def _train_mode(model: nn.Module, freeze: Freeze) -> None:
    model.train()
    if freeze == "nothing":
        return
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def _same_data(left: object, right: object) -> bool:
    dataset = getattr(left, "dataset", None)
    return left is right or (dataset is not None and dataset is getattr(right, "dataset", None))
