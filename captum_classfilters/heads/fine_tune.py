"""Fine-tune a whole network, the best state kept."""

import copy
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from captum_classfilters._core.guard import model_left_as_found
from captum_classfilters.metrics.evaluate_classifier import evaluate_classifier

logger = logging.getLogger("captum_classfilters")

Freeze = Literal["nothing", "backbone", "batch_norm_statistics"]


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


def fine_tune(
    model: nn.Module,
    train_loader: Iterable[Any],
    validation_loader: Iterable[Any],
    *,
    epochs: int = 1,
    learning_rate: float = 1e-4,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Any = None,
    freeze: Freeze = "nothing",
    label_smoothing: float = 0.0,
    teacher: nn.Module | None = None,
    teacher_weight: float = 0.9,
    temperature: float = 2.0,
    show_progress: bool = True,
) -> list[Epoch]:
    r"""
    Fine-tune a model, a decomposed one say, in place; it ends in its best state.

    Adam without weight decay minimises the cross-entropy, as the authors of the decomposed head do.
    After each epoch the model is measured on the validation images, and the state that did best
    is kept, the one before training included. An interruption, too, leaves the best state so far.

    Args:

        model (nn.Module): The model.
        train_loader (iterable): Batches of (images, labels).
        validation_loader (iterable): Batches of other images, to choose the best state by.
        epochs (int): Number of epochs.
                    Default: 1
        learning_rate (float): Of Adam, where no ``optimizer`` is given.
                    Default: 1e-4
        optimizer (torch.optim.Optimizer, optional): Another optimiser over the model's parameters.
        scheduler (optional): A learning-rate scheduler, advanced after each batch.
        freeze (str): ``"nothing"``; ``"backbone"`` trains the last linear layer alone;
                    ``"batch_norm_statistics"`` keeps running means and variances.
                    Default: "nothing"
        label_smoothing (float): As for ``torch.nn.functional.cross_entropy``.
                    Default: 0.0
        teacher (nn.Module, optional): The full network, say, whose logits on the same images are
                    learned beside the labels (Hinton et al. 2015,
                    https://arxiv.org/abs/1503.02531). It helps where the network has seen the
                    training images and their labels teach it little more.
                    Default: None
        teacher_weight (float): Share of the loss that follows the teacher.
                    Default: 0.9
        temperature (float): Of both softmaxes in that share.
                    Default: 2.0
        show_progress (bool): Show progress bars.
                    Default: True

    Returns:
        *list of Epoch*: The history, its first entry the model as it was.

    Raises:
        ValueError: A loader is empty, ``freeze`` is unknown, or the loss is not finite.
    """
    if freeze not in ("nothing", "backbone", "batch_norm_statistics"):
        raise ValueError(
            f"freeze={freeze!r}; choose 'nothing', 'backbone' or 'batch_norm_statistics'."
        )
    if _same_data(train_loader, validation_loader):
        logger.warning("Training and validation use the same data; its accuracy is optimistic.")
    training = [(module, module.training) for module in model.modules()]
    flags = [(one, one.requires_grad, one.grad) for one in model.parameters()]
    history = [_measured(model, validation_loader, 0, None, None)]
    best = _copied(model)
    best_accuracy = history[0].validation_accuracy
    try:
        trained = _trained_parameters(model, freeze)
        optimizer = optimizer or torch.optim.Adam(trained, lr=learning_rate)
        criterion = _Criterion(label_smoothing, teacher, teacher_weight, temperature)
        for epoch in range(1, epochs + 1):
            _train_mode(model, freeze)
            bar = tqdm(train_loader, desc=f"epoch {epoch}", unit="batch", disable=not show_progress)
            loss, accuracy = _one_epoch(model, bar, optimizer, scheduler, criterion)
            history.append(_measured(model, validation_loader, epoch, loss, accuracy))
            if history[-1].validation_accuracy > best_accuracy:
                best, best_accuracy = _copied(model), history[-1].validation_accuracy
    finally:
        model.load_state_dict(best)
        for module, flag in training:
            module.training = flag
        for parameter, requires_grad, gradient in flags:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
    return history


def _one_epoch(
    model: nn.Module,
    batches: Iterable[Any],
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    criterion: "_Criterion",
) -> tuple[float, float]:
    device = next(model.parameters()).device
    total, right, seen = 0.0, 0, 0
    for images, labels in batches:
        images, labels = images.to(device), labels.to(device)
        optimizer.zero_grad(set_to_none=True)
        logits = model(images)
        loss = criterion(logits, labels, images)
        if not bool(torch.isfinite(loss)):
            raise ValueError("The training loss is NaN or Inf; lower the learning rate.")
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        total += float(loss.detach()) * len(labels)
        right += int((logits.detach().argmax(1) == labels).sum())
        seen += len(labels)
    if not seen:
        raise ValueError("The training loader is empty.")
    return total / seen, right / seen


@dataclass(frozen=True)
class _Criterion:
    """Cross-entropy with the labels, and with a teacher's softened predictions."""

    label_smoothing: float
    teacher: nn.Module | None
    teacher_weight: float
    temperature: float

    def __call__(self, logits: Tensor, labels: Tensor, images: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        if self.teacher is None:
            return loss
        with torch.no_grad(), model_left_as_found(self.teacher, evaluation=True):
            taught = (self.teacher(images) / self.temperature).softmax(1)
        # The factor keeps gradients of one size whatever the temperature.
        softened = F.cross_entropy(logits / self.temperature, taught) * self.temperature**2
        return (1 - self.teacher_weight) * loss + self.teacher_weight * softened


def _measured(
    model: nn.Module, loader: Iterable[Any], epoch: int, loss: float | None, accuracy: float | None
) -> Epoch:
    scores = evaluate_classifier(model, loader, show_progress=False)
    return Epoch(epoch, loss, accuracy, scores.accuracy)


def _copied(model: nn.Module) -> dict[str, Any]:
    return copy.deepcopy(model.state_dict())


def _trained_parameters(model: nn.Module, freeze: Freeze) -> list[nn.Parameter]:
    if freeze != "backbone":
        return [parameter for parameter in model.parameters() if parameter.requires_grad]
    from captum_classfilters.heads.decompose import find_head

    head = list(find_head(model)[1].parameters())
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is one for one in head))
    return head


def _train_mode(model: nn.Module, freeze: Freeze) -> None:
    model.train()
    if freeze == "nothing":
        return
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def _same_data(left: Any, right: Any) -> bool:
    dataset = getattr(left, "dataset", None)
    return left is right or (dataset is not None and dataset is getattr(right, "dataset", None))
