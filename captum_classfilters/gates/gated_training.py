"""Training with a class-specific gate: schedule, steps, history, exact resumption."""

import copy
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from tqdm.auto import tqdm

from captum_classfilters._core.arguments import arguments_checked, check_numbers
from captum_classfilters._core.batches import (
    Batch,
    Batches,
    check_now,
    check_read_again,
    read_batches,
)
from captum_classfilters._core.checkpoints import is_safetensors, read_checkpoint
from captum_classfilters._core.devices import device_of, on_device, ordinary
from captum_classfilters._core.distributed import is_main_process
from captum_classfilters._core.guard import model_left_as_found, weights_change
from captum_classfilters._core.labels import class_labels, not_finite
from captum_classfilters._core.nested import flattened, unflattened
from captum_classfilters._core.outputs import as_rows, class_scores, log_probabilities, two_classes
from captum_classfilters._core.score_reader import OutputKind
from captum_classfilters._core.tables import described, model_name, short_repr
from captum_classfilters._core.tensor_files import Schema, read_tensors, write_tensors
from captum_classfilters._core.training import compute_gradients, not_finite_in_training
from captum_classfilters._core.types import Check, Dataloader, Keywords, ModelInputs, Unpack
from captum_classfilters.gates.class_specific_gate import ClassSpecificGate, gates_not_finite

Unit = Literal["epoch", "batch", "joint"]
_FILE = Schema("gated_trainer", "captum_classfilters.GatedTrainer", 1, "GatedTrainer", "state")


@short_repr
@dataclass(frozen=True)
class GateSchedule:
    r"""
    When the gated path is trained.

    Step *s* is gated if ``s % period >= period - gated`` and the warm-up is over, where a step is an
    epoch or a batch: with the defaults, two plain epochs and a gated one in turn, as Liang et al.'s
    code alternates. ``unit="joint"`` trains both paths in every batch.

    Args:

        unit (str): ``"epoch"``, ``"batch"`` or ``"joint"``.
                    Default: "epoch"
        period (int): Length of a cycle.
                    Default: 3
        gated (int): How many of its steps are gated, the last ones.
                    Default: 1
        warmup (int): Number of first epochs without gated steps.
                    Default: 0

    Raises:
        ValueError: The unit is unknown, ``gated`` is not between 1 and ``period``, or the warm-up is
                    negative.
    """

    unit: Unit = "epoch"
    period: int = 3
    gated: int = 1
    warmup: int = 0

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.unit not in ("epoch", "batch", "joint"):
            raise ValueError(f"unit={self.unit!r}; choose 'epoch', 'batch' or 'joint'.")
        if not 1 <= self.gated <= self.period:
            raise ValueError(f"gated={self.gated} must be between 1 and period={self.period}.")
        if self.warmup < 0:
            raise ValueError(f"warmup={self.warmup} must not be negative.")

    @arguments_checked
    def is_gated(self, epoch: int, batch: int) -> bool:
        """Whether a batch takes the gated path.

        Args:

            epoch (int): Number of the epoch, from 0.
            batch (int): Number of the batch in it, from 0.

        Returns:
            *bool*.
        """
        if epoch < self.warmup:
            return False
        if self.unit == "joint":
            return True
        step = epoch if self.unit == "epoch" else batch
        return step % self.period >= self.period - self.gated


@short_repr
@dataclass(frozen=True)
class GatedEpoch:
    """What one epoch did.

    Args:

        epoch (int): Number of the epoch, from 0.
        gated_share (float): Share of its batches that took the gated path.
        loss (float): Mean loss over its batches.
        accuracy (float): Accuracy of the path that was trained, over its images.
        density (float): L1-density of the gate at its end.
        validation_accuracy (float or None): Accuracy of the ungated path on the validation data.
    """

    epoch: int
    gated_share: float
    loss: float
    accuracy: float
    density: float
    validation_accuracy: float | None


class GatedTrainer:
    r"""
    Train a network together with its class-specific gate.

    A plain step minimizes the cross-entropy of the ungated path with ``optimizer``. A gated step
    minimizes :math:`\lambda_1` times the cross-entropy of the gated path plus :math:`\lambda_2` times
    the gate's regularizer with ``gated_optimizer``, and projects the gate. In a joint step the plain
    cross-entropy is added. Schedulers advance at the end of an epoch in which their optimizer stepped.

    Args:

        model (nn.Module): The model; the gate must be attached to one of its layers.
        gate (ClassSpecificGate): The gate.
        optimizer (torch.optim.Optimizer): For plain steps, over the model's parameters.
        gated_optimizer (torch.optim.Optimizer, optional): For gated steps, over the parameters to
                    train there and the gate's. By default ``optimizer``, to which the gate's
                    parameters are added without weight decay if it lacks them.
        scheduler, gated_scheduler (optional): Learning-rate schedulers of the two.
        schedule (GateSchedule, optional): When steps are gated.
        gated_weight (float): :math:`\lambda_1`.
                    Default: 1.0
        regularization (float): :math:`\lambda_2`.
                    Default: 1e-3
        regularizer (Callable, optional): The term itself, from the gate to a scalar. By default
                    ``gate.regularizer()``.
        criterion (Callable, optional): Loss of the model's scores, as it returns them, and labels
                    (N,). By default the cross-entropy, of logits or of probabilities.

    Raises:
        ValueError: The gate is not attached, ``gated_optimizer`` does not hold its parameters, or a
                    scheduler needs a metric.

    Examples::

        >>> import torch
        >>> from captum_classfilters.gates import ClassSpecificGate, GatedTrainer
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        ...     torch.nn.Flatten(), torch.nn.Linear(8, 2))
        >>> data = [(torch.rand(4, 1, 6, 6), torch.tensor([0, 1, 1, 0]))]
        >>> gate = ClassSpecificGate(2, 8).attach(net, "1")
        >>> trainer = GatedTrainer(net, gate, torch.optim.SGD(net.parameters(), lr=0.1))
        >>> history = trainer.fit(data, epochs=3, show_progress=False)
        >>> [epoch.gated_share for epoch in history]
        [0.0, 0.0, 1.0]
    """

    @arguments_checked
    def __init__(
        self,
        model: nn.Module,
        gate: ClassSpecificGate,
        optimizer: torch.optim.Optimizer,
        gated_optimizer: torch.optim.Optimizer | None = None,
        scheduler: LRScheduler | None = None,
        gated_scheduler: LRScheduler | None = None,
        schedule: GateSchedule | None = None,
        gated_weight: float = 1.0,
        regularization: float = 1e-3,
        regularizer: Callable[[ClassSpecificGate], Tensor] | None = None,
        criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        if not gate.attached:
            raise ValueError("The gate is not attached; call gate.attach(model, layer) first.")
        if gated_optimizer is None:
            gated_optimizer = optimizer
            if not _holds(optimizer, gate.weight):
                _add_gate(optimizer, gate, (scheduler, gated_scheduler))
        if not _holds(gated_optimizer, gate.weight):
            raise ValueError("gated_optimizer does not hold the gate's parameters.")
        if any(isinstance(part, ReduceLROnPlateau) for part in (scheduler, gated_scheduler)):
            raise ValueError("ReduceLROnPlateau needs a metric; choose a scheduler of epochs.")
        self.model = model
        self.gate = gate
        self.optimizer = optimizer
        self.gated_optimizer = gated_optimizer
        self.scheduler = scheduler
        self.gated_scheduler = gated_scheduler
        self.schedule = schedule or GateSchedule()
        self.gated_weight = gated_weight
        self.regularization = regularization
        self.regularizer = regularizer or (lambda gate: gate.regularizer())
        self.criterion = criterion
        self._kind = OutputKind(model)
        self.history: list[GatedEpoch] = []

    def __repr__(self) -> str:
        told = f"gate={described(self.gate)}, epochs={len(self.history)}"
        return f"GatedTrainer({model_name(self.model)}, {told})"

    @arguments_checked
    def fit(
        self,
        train_loader: Dataloader,
        validation_loader: Dataloader | None = None,
        epochs: int = 1,
        *,
        unpack: Unpack | None = None,
        device: torch.device | str | None = None,
        show_progress: bool = True,
    ) -> list[GatedEpoch]:
        """Train until ``epochs`` epochs are done, those of a resumed run included.

        Args:

            train_loader (iterable): Batches of (images, labels).
            validation_loader (iterable, optional): Batches to measure the ungated path on.
            epochs (int): Number of epochs in all.
                        Default: 1
            unpack (Callable, optional): From a batch of another kind to the pair (inputs, labels).
                        Default: None
            device (torch.device or str, optional): Where the batches go; by default where the model
                        is.
            show_progress (bool): Show a progress bar.
                        Default: True

        Returns:
            *list of GatedEpoch*: The whole history.

        Raises:
            ValueError: A batch is no pair of images and labels, or model, labels and gate do not fit
                        each other; the first batch is checked before anything is trained. Or a step
                        has nothing to train, as a plain one of a frozen model.
        """
        if epochs - len(self.history) > 1:
            check_read_again(train_loader)
            check_read_again(validation_loader)
        bar = tqdm(
            range(len(self.history), epochs),
            desc="training",
            unit="epoch",
            disable=not (show_progress and is_main_process()),
        )
        options: Keywords = {"unpack": unpack, "device": device, "show_progress": False}
        for epoch in bar:
            self.model.train()
            record = self._epoch(epoch, train_loader, validation_loader, options)
            self.history.append(record)
            bar.set_postfix(
                accuracy=record.accuracy,
                density=record.density,
                path="gated" if record.gated_share else "plain",
            )
        return list(self.history)

    def step(
        self, images: Tensor | tuple[Tensor, ...], labels: Tensor, gated: bool
    ) -> tuple[float, int]:
        """One optimization step.

        Args:

            images (Tensor or tuple of Tensors): The inputs of the model.
            labels (Tensor): Shape (N,), or in the other forms that :meth:`fit` reads.
            gated (bool): Take the gated path (or both, if the schedule is joint).

        Returns:
            *tuple* of the loss and the number of correct predictions on the trained path.

        Raises:
            ValueError: The model and the gate differ in their number of classes, the labels are no
                        classes of the gate, or nothing that the step trains has a gradient.
        """
        inputs = images if isinstance(images, tuple) else (images,)
        with weights_change():
            classes = class_labels(labels, len(inputs[0]), self.gate.num_classes, batch=0)
            classes = on_device(classes, inputs[0].device)
            batch = Batch(0, 0, ordinary(inputs), labels)
            loss, correct = self._step(batch, classes, gated, check_now)
        return float(loss), int(correct)

    def _step(
        self, batch: Batch, labels: Tensor, gated: bool, check: Check
    ) -> tuple[Tensor, Tensor]:
        """A step; its loss and number of correct predictions, where the model is."""
        optimizer = self.gated_optimizer if gated else self.optimizer
        optimizer.zero_grad(set_to_none=True)
        losses = []
        if gated:
            loss, correct = self._gated_pass(batch, labels, check)
            losses.append(loss)
        if not gated or self.schedule.unit == "joint":
            loss, correct = self._judged(
                batch, class_scores(self.model(*batch.inputs)), labels, check
            )
            self._compute_gradients(loss, optimizer)
            losses.append(loss)
        optimizer.step()
        if gated:
            self.gate.project(check=check is check_now)
        return torch.stack([loss.detach() for loss in losses]).sum(), correct

    def _judged(
        self, batch: Batch, scores: Tensor, labels: Tensor, check: Check
    ) -> tuple[Tensor, Tensor]:
        """The loss of a batch's scores, and how many of its images are recognized."""
        correct = self._correct(batch, scores.detach(), labels, check)
        if self.criterion is not None:
            return self.criterion(scores, labels), correct
        probabilities = self._kind.probabilities(batch.inputs, scores, check, batch.number)
        return F.nll_loss(log_probabilities(as_rows(scores), probabilities), labels), correct

    def _correct(self, batch: Batch, scores: Tensor, labels: Tensor, check: Check) -> Tensor:
        """How many of a batch's images are recognized, where the scores are."""
        probabilities = self._kind.probabilities(batch.inputs, scores, check, batch.number)
        answers = two_classes(scores, probabilities).argmax(1)
        return (answers == labels.to(answers.device)).sum()

    def _gated_pass(self, batch: Batch, labels: Tensor, check: Check) -> tuple[Tensor, Tensor]:
        """The loss and hits of the gated path, and the gradients: layers that run once more for
        these, as activation checkpointing has them, are gated once more."""
        with self.gate.gating(labels, check=check is check_now):
            loss, correct = self._judged(batch, self._scores(batch.inputs), labels, check)
            loss = self.gated_weight * loss
            loss = loss + self.regularization * self.regularizer(self.gate)
            self._compute_gradients(loss, self.gated_optimizer)
        return loss, correct

    def _compute_gradients(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        advice = " To train the gate alone, gate every step: schedule=GateSchedule(period=1)."
        if not self.gate.weight.requires_grad:
            advice = " The gate is frozen as well; gate.requires_grad_(True) unfreezes it."
        compute_gradients(loss, optimizer, self.model, self.gate.parameters(), advice)

    def _scores(self, inputs: ModelInputs) -> Tensor:
        """The model's scores, of as many classes as the gate has."""
        scores = class_scores(self.model(*inputs))
        num_classes = two_classes(scores).shape[1]
        if num_classes != self.gate.num_classes:
            raise ValueError(
                f"The model tells {num_classes} classes apart, but the gate has "
                f"{self.gate.num_classes}."
            )
        return scores

    def _epoch(
        self,
        epoch: int,
        train_loader: Dataloader,
        validation_loader: Dataloader | None,
        options: Keywords,
    ) -> GatedEpoch:
        losses: list[Tensor] = []
        correct: list[Tensor] = []
        gated_batches = 0
        with self._batches(train_loader, options, training=True) as batches:
            for batch in batches:
                labels = batches.class_labels(batch, self.gate.num_classes)
                if not self.history and not losses:
                    # The first gated step may be epochs away.
                    with (
                        torch.no_grad(),
                        model_left_as_found(self.model, evaluation=True),
                        self.gate.gating(labels),
                    ):
                        self._scores(batch.inputs)
                gated = self.schedule.is_gated(epoch, batch.number)
                loss, right = self._step(batch, labels, gated, batches.check)
                if gated:
                    batches.check(
                        self.gate.weight.detach().isfinite().all(),
                        partial(gates_not_finite, self.model.parameters()),
                    )
                batches.check(
                    loss.detach().isfinite(),
                    partial(not_finite_in_training, self.model.parameters()),
                )
                losses.append(loss)
                correct.append(right)
                gated_batches += gated
        if not losses:
            raise ValueError(
                f"The training loader is empty in epoch {epoch}; a generator runs only once."
            )
        self._advance(gated_batches, len(losses))
        return GatedEpoch(
            epoch=epoch,
            gated_share=gated_batches / len(losses),
            loss=float(torch.stack(losses).cpu().double().mean()),
            accuracy=int(torch.stack(correct).sum()) / batches.num_images,
            density=self.gate.density,
            validation_accuracy=None
            if validation_loader is None
            else self._accuracy(validation_loader, options),
        )

    def _batches(
        self, dataloader: Dataloader, options: Keywords, training: bool
    ) -> AbstractContextManager[Batches]:
        where = options["device"] or device_of(self.model) or self.gate.weight.device
        return read_batches(
            self.model,
            dataloader,
            "training" if training else "validation",
            **{**options, "device": where},
            training=training,
            may_be_empty=training,
        )

    def _advance(self, gated_batches: int, batches: int) -> None:
        if self.scheduler is not None and (gated_batches < batches or self._one_optimizer):
            self.scheduler.step()
        if self.gated_scheduler is not None and gated_batches:
            self.gated_scheduler.step()

    @property
    def _one_optimizer(self) -> bool:
        return self.gated_optimizer is self.optimizer

    def _accuracy(self, dataloader: Dataloader, options: Keywords) -> float:
        correct: list[Tensor] = []
        with self._batches(dataloader, options, training=False) as batches:
            for batch in batches:
                labels = batches.class_labels(batch, self.gate.num_classes)
                scores = as_rows(class_scores(self.model(*batch.inputs)))
                finite = scores.isfinite().all(1)
                batches.check(finite.all(), partial(not_finite, finite, batch.number))
                correct.append(self._correct(batch, scores, labels, batches.check))
        return int(torch.stack(correct).sum()) / batches.num_images

    # -- resuming --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to go on exactly as this one would have.

        Returns:
            *dict*: Model, gate, optimizers, schedulers, history and torch's random state on the
            CPU; :meth:`save` writes it to a file. A loader that shuffles with a generator of its own
            is not part of it.
        """
        parts: dict[str, nn.Module | torch.optim.Optimizer | LRScheduler | None] = {
            "model": self.model,
            "gate": self.gate,
            "optimizer": self.optimizer,
            "gated_optimizer": None if self._one_optimizer else self.gated_optimizer,
            "scheduler": self.scheduler,
            "gated_scheduler": self.gated_scheduler,
        }
        state: dict[str, Any] = {
            name: part.state_dict() for name, part in parts.items() if part is not None
        }
        state["history"] = [asdict(record) for record in self.history]
        state["random_state"] = torch.get_rng_state()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another trainer stopped.

        Args:

            state (dict): From :meth:`state_dict`.

        Raises:
            ValueError: The state is not one of such a trainer, which is then as it was.
        """
        expected = set(self.state_dict())
        held = set(state) if isinstance(state, dict) else set()
        if held != expected:
            odd = sorted(map(str, expected ^ held))
            raise ValueError(
                f"The state does not fit this trainer; it differs in {', '.join(odd)}."
            )
        before = copy.deepcopy(self.state_dict())
        try:
            self._take(state)
        except (
            Exception
        ) as error:  # whatever modules, optimizers and schedulers make of others' states
            self._take(before)
            raise ValueError(f"The state does not fit this trainer: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything that a resumed run needs as one safetensors file, without code.

        Args:

            path (path): Where; a file that is there is replaced by a complete one.

        Raises:
            ValueError: A part of the state is an object that only code could make again.
            OSError: The file cannot be written; nothing has changed.
        """
        tree, tensors = flattened(self.state_dict())
        write_tensors(path, _FILE, tensors, {"state": tree})

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go on where the trainer stopped that wrote a file.

        Args:

            path (path): A file of :meth:`save`, or a :meth:`state_dict` that ``torch.save`` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is damaged, or is not of such a trainer; this one is as it was.
        """
        if not is_safetensors(path):
            state = read_checkpoint(path)
        else:
            stored = read_tensors(path, _FILE)
            tree, tensors = stored.value("state", dict), stored.all_tensors()
            with stored.building():
                state = unflattened(tree, tensors)
        try:
            self.load_state_dict(state)  # type: ignore[arg-type]  # which it checks
        except ValueError as error:
            raise ValueError(f"{path} cannot be resumed from: {error}") from error

    def _take(self, state: dict[str, Any]) -> None:
        history = [GatedEpoch(**record) for record in state["history"]]
        for place, record in enumerate(history):
            _check_epoch(record, place)
        for name in set(state) - {"history", "random_state"}:
            getattr(self, name).load_state_dict(state[name])
        self.history = history
        torch.set_rng_state(state["random_state"])


def _check_epoch(record: GatedEpoch, place: int) -> None:
    shares = [record.gated_share, record.accuracy]
    shares += [] if record.validation_accuracy is None else [record.validation_accuracy]
    if record.epoch != place or not all(0 <= share <= 1 for share in shares):
        raise ValueError(f"its history holds {record} as epoch {place}")


_OF_GROUPS = ("base_lrs", "_last_lr", "lr_lambdas", "max_lrs", "base_momentums", "max_momentums")


def _add_gate(
    optimizer: torch.optim.Optimizer,
    gate: ClassSpecificGate,
    schedulers: Sequence[LRScheduler | None],
) -> None:
    """Give an optimizer the gate's parameters, without weight decay; schedulers that were made
    before, and know its first group alone, treat the gate's as they do the first."""
    first = optimizer.param_groups[0]
    alike = {k: v for k, v in first.items() if k != "params"} if "initial_lr" in first else {}
    optimizer.add_param_group({**alike, "params": [gate.weight], "weight_decay": 0.0})
    waiting = [scheduler for scheduler in schedulers if scheduler is not None]
    while waiting:
        scheduler = waiting.pop()
        waiting.extend(getattr(scheduler, "_schedulers", ()))
        if scheduler.optimizer is optimizer:
            for name in _OF_GROUPS:
                noted = vars(scheduler).get(name)
                if isinstance(noted, list) and len(noted) == len(optimizer.param_groups) - 1:
                    noted.append(noted[0])


def _holds(optimizer: torch.optim.Optimizer, parameter: Tensor) -> bool:
    return any(held is parameter for group in optimizer.param_groups for held in group["params"])
