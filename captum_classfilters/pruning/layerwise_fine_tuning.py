"""A few steps of training with a learning rate for each layer."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from captum_classfilters._core.layers import find_layer


@dataclass(frozen=True)
class LayerwiseFineTuning:
    r"""
    Train a network for some steps, each layer at its own learning rate.

    Stochastic gradient descent on the cross-entropy. After a filter's removal it is mostly the layer
    itself and the one that read the filter that have to adapt, so only the layers named are trained.
    Running statistics of batch normalisation stay as they are.

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

    dataloader: Iterable[Any]
    learning_rates: float | Mapping[str, float]
    num_steps: int = 100
    momentum: float = 0.9
    weight_decay: float = 0.0

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
        flags = [(one, one.requires_grad, one.grad) for one in model.parameters()]
        training = [(module, module.training) for module in model.modules()]
        trained = {id(one) for group in groups for one in group["params"]}
        try:
            model.train()
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
            for parameter, _, _ in flags:
                parameter.requires_grad_(id(parameter) in trained)
                parameter.grad = None
            optimizer = torch.optim.SGD(
                groups, lr=0.0, momentum=self.momentum, weight_decay=self.weight_decay
            )
            with torch.enable_grad():
                return [_step(model, optimizer, *batch) for batch in self._batches()]
        finally:
            for module, flag in training:
                module.training = flag
            for parameter, requires_grad, gradient in flags:
                parameter.requires_grad_(requires_grad)
                parameter.grad = gradient

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

    def _batches(self) -> Iterator[Any]:
        left = self.num_steps
        while left > 0:
            before = left
            for images, labels in self.dataloader:
                if left == 0:
                    return
                left -= 1
                yield images, labels
            if left == before:
                raise ValueError("The loader to fine-tune on is empty.")


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor, labels: torch.Tensor
) -> float:
    device = next(model.parameters()).device
    optimizer.zero_grad(set_to_none=True)
    loss = F.cross_entropy(model(images.to(device)), labels.to(device))
    if not bool(torch.isfinite(loss)):
        raise ValueError("The loss of fine-tuning is NaN or Inf; lower the learning rates.")
    loss.backward()
    optimizer.step()
    return float(loss.detach())
