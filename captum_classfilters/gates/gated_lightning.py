"""Training with a class-specific gate under Lightning; needs the extra ``lightning``."""

from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from captum_classfilters._core.extras import missing_extra
from captum_classfilters._core.names import kind_of
from captum_classfilters.gates.class_specific_gate import ClassSpecificGate
from captum_classfilters.gates.gated_training import GateSchedule

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

try:
    from lightning.pytorch import Callback

    _MISSING = None
except ImportError as error:  # the class can be read and documented without Lightning
    Callback = object
    _MISSING = error


def _second(batch: object) -> Tensor:
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        raise ValueError(
            f"The batch is {kind_of(batch)}, not a pair (images, labels); pass labels= to "
            "ClassGateCallback, a function from the batch to its labels."
        )
    labels: Tensor = batch[1]
    return labels


class ClassGateCallback(Callback):
    r"""
    Lightning callback that trains a class-specific gate beside any ``training_step``.

    In the steps that the schedule says, ``training_step`` runs with the gate on; its loss is that of the
    gated path. The regularizer's gradient is added before the optimizer steps, and the gate is
    projected afterwards; where gradients are accumulated over batches, these are the steps in which a
    gated batch takes part. Nothing in the ``LightningModule`` changes, but that one of its optimizers
    must hold the gate's parameters; the simplest way is to make the gate an attribute of the module.
    Lightning's checkpoints hold the gate, and a run that is resumed from one goes on exactly.

    With automatic optimization this is :class:`GatedTrainer`, step for step, with a
    ``gated_weight`` of 1 and one optimizer. Several processes have not been tested.

    Args:

        gate (ClassSpecificGate): The gate, attached to a layer of the model.
        schedule (GateSchedule, optional): When steps are gated, by epoch or by batch.
        regularization (float): Weight of the regularizer.
                    Default: 1e-3
        regularizer (Callable, optional): The term itself, from the gate to a scalar. By default
                    ``gate.regularizer()``.
        labels (Callable, optional): From a batch to its labels (N,). By default the second of a pair.

    Raises:
        ImportError: Lightning is missing.
        ValueError: The gate is not attached, or the schedule is joint: a joint step is two forward
                    passes, which only ``training_step`` itself can make.

    Examples::

        >>> import lightning, torch
        >>> from captum_classfilters import ClassSpecificGate
        >>> from captum_classfilters.gates.gated_lightning import ClassGateCallback
        >>> class Classifier(lightning.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = torch.nn.Sequential(
        ...             torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        ...             torch.nn.Flatten(), torch.nn.Linear(8, 2))
        ...         self.gate = ClassSpecificGate(2, 8).attach(self.net, "1")
        ...     def training_step(self, batch, _):
        ...         return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        >>> module = Classifier()
        >>> callback = ClassGateCallback(module.gate)
    """

    def __init__(
        self,
        gate: ClassSpecificGate,
        schedule: GateSchedule | None = None,
        regularization: float = 1e-3,
        regularizer: Callable[[ClassSpecificGate], Tensor] | None = None,
        labels: Callable[[Any], Tensor] = _second,
    ) -> None:
        if _MISSING is not None:
            raise missing_extra("lightning", "ClassGateCallback", _MISSING) from _MISSING
        super().__init__()
        if not gate.attached:
            raise ValueError("The gate is not attached; call gate.attach(model, layer) first.")
        self.gate = gate
        self.schedule = schedule or GateSchedule()
        if self.schedule.unit == "joint":
            raise ValueError(
                "A joint schedule needs two forward passes in a step; make them in training_step, with "
                "`with gate.gating(labels):` around one, or choose unit='epoch' or 'batch'."
            )
        self.regularization = regularization
        self.regularizer = regularizer or (lambda gate: gate.regularizer())
        self.labels = labels
        self._open = ExitStack()
        self._forget()

    def _forget(self) -> None:
        self._gated = False  # a gated batch took part in the gradients since the last step
        self._stepped = False  # the gate's optimizer takes a step with them in this batch

    def on_fit_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Check that the gate is trained.

        Raises:
            ValueError: No optimizer holds the gate's parameters.
        """
        self._forget()
        self.gate.to(pl_module.device)
        if not any(self._holds(optimizer) for optimizer in trainer.optimizers):
            raise ValueError(
                "No optimizer holds the gate's parameters; make the gate an attribute of the "
                "LightningModule, or add gate.parameters() in configure_optimizers."
            )

    def on_train_batch_start(
        self, trainer: "Trainer", pl_module: "LightningModule", batch: object, batch_idx: int
    ) -> None:
        """Switch the gate on, if it is its turn."""
        if self.schedule.is_gated(trainer.current_epoch, batch_idx):
            self._gated = True
            self._open = ExitStack()
            self._open.enter_context(self.gate.gating(self.labels(batch)))

    def on_after_backward(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Switch the gate off; layers that run once more for gradients have been gated once more."""
        self._open.close()

    def on_before_optimizer_step(
        self, trainer: "Trainer", pl_module: "LightningModule", optimizer: torch.optim.Optimizer
    ) -> None:
        """Add the regularizer's gradient, after any loss scaling has been undone."""
        if not self._gated or not self._holds(optimizer):
            return
        self._stepped = True
        weight = self.gate.weight
        with torch.enable_grad():
            term = self.regularization * self.regularizer(self.gate)
        if term.requires_grad:
            (gradient,) = torch.autograd.grad(term, weight)
            weight.grad = gradient if weight.grad is None else weight.grad + gradient

    def on_train_batch_end(
        self,
        trainer: "Trainer",
        pl_module: "LightningModule",
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Project the gate, if there was a step."""
        # A skipped batch, of which there is no loss, may not run the layer.
        with suppress(ValueError):
            self._open.close()
        if self._stepped:
            self.gate.project()
            self._forget()

    def on_exception(
        self, trainer: "Trainer", pl_module: "LightningModule", exception: BaseException
    ) -> None:
        """Switch the gate off."""
        with suppress(BaseException):
            self._open.__exit__(type(exception), exception, exception.__traceback__)
        self._forget()

    def state_dict(self) -> dict[str, Any]:
        """The gate, for Lightning's checkpoint."""
        return {"gate": self.gate.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The gate, from Lightning's checkpoint."""
        self.gate.load_state_dict(state_dict["gate"])

    def _holds(self, optimizer: torch.optim.Optimizer) -> bool:
        groups = optimizer.param_groups
        return any(held is self.gate.weight for group in groups for held in group["params"])
