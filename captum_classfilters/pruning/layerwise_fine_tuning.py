"""A few steps of training with a learning rate for each layer."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_classfilters._core.arguments import check_numbers
from captum_classfilters._core.batches import Batch, Batches, read_batches
from captum_classfilters._core.guard import check_ordinary, flags_restored
from captum_classfilters._core.layers import find_layer
from captum_classfilters._core.outputs import (
    as_rows,
    checked_rows,
    class_scores,
    log_probabilities,
)
from captum_classfilters._core.score_reader import OutputKind
from captum_classfilters._core.tables import short_repr
from captum_classfilters._core.training import compute_gradients, not_finite_in_training
from captum_classfilters._core.types import Dataloader, JsonDict, Unpack


@short_repr
@dataclass(frozen=True)
class LayerwiseFineTuning:
    r"""
    Train a network for some steps, each layer at its own learning rate.

    Stochastic gradient descent on the cross-entropy. After a filter's removal it is mostly the layer
    itself and the one that read the filter that have to adapt, so only the layers named are trained.
    Running statistics of batch normalization stay as they are.

    Args:

        dataloader (iterable): Batches of (images, labels); begun again when it ends.
        learning_rates (float or dict of str to float): One for all parameters, or one for each
                    layer by its dotted name; parameters of other layers are not trained.
        num_steps (int): Batches to train on.
                    Default: 100
        momentum (float): Of the gradient.
                    Default: 0.9
        weight_decay (float): Of the trained parameters.
                    Default: 0.0
        unpack (Callable, optional): From a batch of another kind to the pair (inputs, labels).
                    Default: None
        device (torch.device or str, optional): Where the batches go; by default where the model is.

    Examples::

        >>> import torch
        >>> from captum_classfilters.pruning import LayerwiseFineTuning
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> data = [(torch.rand(8, 2), torch.randint(2, (8,)))]
        >>> tuning = LayerwiseFineTuning(data, {"0": 0.001, "2": 0.01}, num_steps=5)
        >>> losses = tuning(net)
        >>> len(losses)
        5
    """

    dataloader: Dataloader
    learning_rates: float | Mapping[str, float]
    num_steps: int = 100
    momentum: float = 0.9
    weight_decay: float = 0.0
    unpack: Unpack | None = None
    device: torch.device | str | None = None

    def __post_init__(self) -> None:
        check_numbers(self)

    @property
    def options(self) -> JsonDict:
        """The options of the training, for the record."""
        rates = self.learning_rates
        return {
            "learning_rates": dict(rates) if isinstance(rates, Mapping) else rates,
            "num_steps": self.num_steps,
            "momentum": self.momentum,
            "weight_decay": self.weight_decay,
        }

    def __call__(self, model: nn.Module) -> list[float]:
        """
        Train the model in place.

        Returns:
            *list of float*: The loss of each step.

        Raises:
            ValueError: The loader is empty, a layer has no parameters or does not exist, or the
                        loss is not finite.
        """
        groups = self._groups(model)
        optimizer = torch.optim.SGD(
            groups, lr=0.0, momentum=self.momentum, weight_decay=self.weight_decay
        )
        losses: list[Tensor] = []
        with _trained([parameter for group in groups for parameter in group["params"]], model):
            kind = OutputKind(model)
            while len(losses) < self.num_steps:
                self._read_once(kind, model, optimizer, losses)
        values: list[float] = torch.stack(losses).tolist() if losses else []
        return values

    def _read_once(
        self,
        kind: OutputKind,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        losses: list[Tensor],
    ) -> None:
        """Train on a loader's batches until it ends or there are enough losses."""
        before = len(losses)
        with read_batches(
            model,
            self.dataloader,
            "fine-tuning",
            device=self.device,
            unpack=self.unpack,
            training=True,
            may_be_empty=True,
            show_progress=False,
        ) as batches:
            for batch in batches:
                losses.append(_step(kind, model, optimizer, batches, batch))
                batches.check(
                    losses[-1].isfinite(), partial(not_finite_in_training, model.parameters())
                )
                if len(losses) == self.num_steps:
                    break
        if len(losses) == before:
            raise ValueError("The loader to fine-tune on is empty.")

    def _groups(self, model: nn.Module) -> list[dict[str, Any]]:
        if not isinstance(self.learning_rates, Mapping):
            return [{"params": list(model.parameters()), "lr": self.learning_rates}]
        groups = []
        for name, rate in self.learning_rates.items():
            parameters = list(find_layer(model, name).parameters())
            if not parameters:
                raise ValueError(f"The layer {name!r} has no parameters to train.")
            groups.append({"params": parameters, "lr": rate})
        return groups


@contextmanager
def _trained(parameters: list[nn.Parameter], model: nn.Module) -> Iterator[None]:
    """Training mode but for batch normalization, and gradients for these parameters alone."""
    trained = {id(parameter) for parameter in parameters}
    check_ordinary(model)
    with flags_restored(model):
        model.train()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in trained)
            parameter.grad = None
        yield


def _step(
    kind: OutputKind,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    batch: Batch,
) -> Tensor:
    """One step; its loss, where the model is."""
    optimizer.zero_grad(set_to_none=True)
    scores = checked_rows(as_rows(class_scores(model(*batch.inputs))))
    probabilities = kind.probabilities(batch.inputs, scores, batches.check, batch.number)
    logs = log_probabilities(scores, probabilities)
    loss = F.nll_loss(logs, batches.class_labels(batch, logs.shape[1]))
    compute_gradients(loss, optimizer, model)
    optimizer.step()
    return loss.detach()
