"""The linear layer at the end of a model, and how another layer feeds it."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from captum_classfilters._core.layers import positions_last

Feed = Literal["identical", "mean", "flatten"]


def is_linear(module: nn.Module) -> bool:
    """Whether a module is linear over channels: ``nn.Linear`` or an ungrouped 1x1 convolution."""
    if isinstance(module, nn.Linear):
        return True
    return (
        isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        and module.groups == 1
        and all(size == 1 for size in module.kernel_size)
        and all(size == 1 for size in module.stride)
        and not any(size for size in module.padding if not isinstance(size, str))
    )


@dataclass
class HeadRecord:
    """The last linear layer that ran in a forward pass, its input and its output."""

    module: nn.Module | None = None
    features: Tensor | None = None
    logits: Tensor | None = None
    runs: dict[int, int] = field(default_factory=dict)

    def clear(self) -> None:
        """Forget the last forward pass."""
        self.module = self.features = self.logits = None
        self.runs.clear()

    def is_output(self, output: Any) -> bool:
        """Whether the model's output is this layer's, unchanged and from a single use of it."""
        return (
            isinstance(output, Tensor)
            and self.logits is not None
            and self.runs.get(id(self.module)) == 1
            and output.shape == self.logits.shape
            and output.dim() == 2
            and (output.data_ptr() == self.logits.data_ptr() or torch.equal(output, self.logits))
        )

    @property
    def weight(self) -> Tensor:
        """Weight as a matrix (C, K)."""
        weight: Tensor = self.module.weight  # type: ignore[union-attr,assignment]
        return weight.detach().flatten(1)

    @property
    def bias(self) -> Tensor:
        """Bias (C,), zeros where the layer has none."""
        bias = getattr(self.module, "bias", None)
        return self.weight.new_zeros(len(self.weight)) if bias is None else bias.detach()


@contextmanager
def record_head(model: nn.Module | None) -> Iterator[HeadRecord]:
    """Record the last linear layer of each forward pass made inside the block."""
    record = HeadRecord()

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
            record.module, record.features, record.logits = module, inputs[0], output
            record.runs[id(module)] = record.runs.get(id(module), 0) + 1

    linear = [module for module in model.modules() if is_linear(module)] if model else []
    handles = [module.register_forward_hook(hook) for module in linear]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def how_layer_feeds(features: Tensor, activation: Tensor, axis: int) -> Feed | None:
    r"""How a layer's tensor becomes the head's input, checked on the numbers of this batch.

    Args:

        features (Tensor): The head's input, (N, F), or (N, F, ...) for a 1x1 convolution.
        activation (Tensor): The layer's tensor with its filters on ``axis``.
        axis (int): The axis of the filters.

    Returns:
        *str* or *None*: ``"identical"``, ``"mean"`` over positions, ``"flatten"`` of filters and
        positions, or None when the batch shows none of these.
    """
    if len(features) != len(activation):
        return None
    if features.dim() != 2:  # a convolutional head sees the layer's own maps
        alike = features.shape == activation.shape and _same(features, activation)
        return "identical" if alike else None
    maps = positions_last(activation, axis)
    num_filters, num_positions = maps.shape[1:]
    if features.shape[1] == num_filters:
        if num_positions == 1:
            return "identical" if _same(features, maps[:, :, 0]) else None
        return "mean" if _same(features, maps.mean(2)) else None
    if features.shape[1] == num_filters * num_positions:
        return "flatten" if _same(features, maps.flatten(1)) else None
    return None


def _same(left: Tensor, right: Tensor) -> bool:
    scale = float(right.abs().max()) if right.numel() else 0.0
    if not math.isfinite(scale):
        return False
    return torch.allclose(left, right, rtol=1e-4, atol=1e-5 * max(scale, 1e-6))
