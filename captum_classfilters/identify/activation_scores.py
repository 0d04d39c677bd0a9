"""How much a layer's filters are active, and what their activations change: pruning baselines."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from captum_classfilters._core.batches import split_batch
from captum_classfilters._core.guard import model_left_as_found
from captum_classfilters._core.labels import class_labels
from captum_classfilters._core.layers import (
    check_batch,
    check_runs,
    filter_axis,
    find_layer,
    layer_name,
    only_tensor,
    positions_last,
)


@dataclass(frozen=True)
class ActivationScores:
    r"""
    Activation statistics of a layer's filters over images and positions.

    Args:

        mean (Tensor): Shape (K,). Mean of the absolute activation.
        maximum (Tensor): Shape (K,). Largest activation.
        zero_share (Tensor): Shape (K,). APoZ, the share of activations that are not positive:
                    zeros, behind a ReLU.
        taylor (Tensor): Shape (K,). Mean of :math:`|a \, \partial \mathrm{CE} / \partial a|`.
        layer (str): Dotted name of the layer.
        num_images (int): N.
    """

    mean: Tensor
    maximum: Tensor
    zero_share: Tensor
    taylor: Tensor
    layer: str
    num_images: int


def activation_scores(
    model: nn.Module,
    layer: nn.Module | str,
    dataloader: Iterable[Any],
    *,
    channel_dim: int | None = None,
    show_progress: bool = True,
) -> ActivationScores:
    r"""
    Mean and largest activation, APoZ and the Taylor criterion of every filter, in one pass.

    Source: APoZ: Hu et al., *Network Trimming*, 2016, https://arxiv.org/abs/1607.03250. Taylor:
    Molchanov et al., *Pruning Convolutional Neural Networks for Resource Efficient Inference*,
    2017, https://arxiv.org/abs/1611.06440; here the absolute value is taken at each position, so
    that positions of opposite sign do not cancel.

    Args:

        model (nn.Module): The model, with logits (N, C).
        layer (nn.Module or str): The layer, or its dotted name; an activation, if filters are to be
                    judged by what later layers read.
        dataloader (iterable): Batches of (inputs, labels).
        channel_dim (int, optional): Axis of the filters, where it cannot be told from the layer.
                    Default: None
        show_progress (bool): Show a progress bar over the batches.
                    Default: True

    Returns:
        *ActivationScores*.

    Raises:
        ValueError: The loader is empty, labels are not class indices, or the layer does not run
                    exactly once.

    Examples::

        >>> import torch
        >>> from captum_classfilters.identify import activation_scores
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        ...     torch.nn.Flatten(), torch.nn.Linear(8, 2))
        >>> data = [(torch.rand(4, 3, 6, 6), torch.tensor([0, 1, 1, 0]))]
        >>> scores = activation_scores(net, "1", data, show_progress=False)
        >>> scores.mean.shape, scores.taylor.shape
        (torch.Size([8]), torch.Size([8]))
    """
    module = find_layer(model, layer) if isinstance(layer, str) else layer
    sums = _Sums(module, layer_name(model, module), channel_dim)
    parameter = next(model.parameters(), None)
    device = None if parameter is None else parameter.device
    handle = module.register_forward_hook(sums.take)
    bar = tqdm(dataloader, desc="activations", unit="batch", disable=not show_progress)
    try:
        with model_left_as_found(model, evaluation=True, freeze=True), torch.enable_grad():
            for number, batch in enumerate(bar):
                inputs, labels = split_batch(batch, number, device)
                if len(inputs[0]):
                    sums.taken.clear()
                    sums.add(model(*inputs), labels, number, len(inputs[0]))
    finally:
        handle.remove()
    return sums.result()


class _Sums:
    """Sums over images and positions."""

    def __init__(self, layer: nn.Module, name: str, channel_dim: int | None) -> None:
        self.layer, self.name, self.channel_dim = layer, name, channel_dim
        self.taken: list[Tensor] = []
        self.images = self.values = 0
        self.mean = self.zeros = self.taylor = torch.zeros(0, dtype=torch.float64)
        self.maximum = torch.zeros(0)

    def take(self, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        """Start the gradient at the layer; a copy goes on, since what follows may overwrite it."""
        leaf = only_tensor(output, self.name).detach().clone().requires_grad_(True)
        self.taken.append(leaf)
        on = leaf.clone()
        return type(output)([on]) if isinstance(output, (tuple, list)) else on

    def add(self, logits: Tensor, labels: Any, number: int, images: int) -> None:
        check_runs(self.name, len(self.taken))
        activation = self.taken[0]
        check_batch(self.name, len(activation), images)
        if logits.dim() != 2:
            raise ValueError(f"The model puts out {tuple(logits.shape)}; a loss needs (N, C).")
        truth = class_labels(labels, images, logits.shape[1], number).to(logits.device)
        loss = F.cross_entropy(logits, truth, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, activation)
        axis = filter_axis(self.layer, activation, self.channel_dim)
        maps = positions_last(activation.detach(), axis).cpu()
        change = (maps * positions_last(gradient, axis).cpu()).abs()
        parts = [one.double().sum((0, 2)) for one in (maps.abs(), maps <= 0, change)]
        if not self.images:
            self.mean, self.zeros, self.taylor = (torch.zeros_like(one) for one in parts)
            self.maximum = torch.full((maps.shape[1],), -float("inf"), dtype=torch.float64)
        self.mean, self.zeros, self.taylor = (
            old + new for old, new in zip((self.mean, self.zeros, self.taylor), parts, strict=True)
        )
        self.maximum = torch.maximum(self.maximum, maps.amax((0, 2)).double())
        self.images += images
        self.values += images * maps.shape[2]

    def result(self) -> ActivationScores:
        if not self.images:
            raise ValueError("The data loader is empty: there are no activations.")
        return ActivationScores(
            mean=self.mean / self.values,
            maximum=self.maximum,
            zero_share=self.zeros / self.values,
            taylor=self.taylor / self.values,
            layer=self.name,
            num_images=self.images,
        )
