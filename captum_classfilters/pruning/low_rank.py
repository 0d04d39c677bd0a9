"""Layers split into two narrower ones, in closed form, as far as what they make allows."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from captum_classfilters.pruning.least_squares import Fit, Seen, Weighted, matrix_of

_ROUNDING = 1e-6  # of the largest eigenvalue, below which there is nothing to save


class LowRank:
    r"""
    What a layer makes, through fewer numbers than it has outputs.

    With :math:`W` fitted to what the layer should make, :math:`\Sigma` the covariance of what it reads,
    and :math:`\|R e\|^2` what an error *e* costs, the matrix of rank *r* that costs least is
    :math:`R^{-1} U_r U_r^T R W`, where :math:`U_r` holds the *r* leading eigenvectors of
    :math:`R W \Sigma W^T R^T`; it costs the sum of the other eigenvalues.

    Source: Izenman: *Reduced-rank regression for the multivariate linear model*, Journal of Multivariate
    Analysis 5, 1975; for convolutions one after another as in Zhang et al.: *Accelerating very deep
    convolutional networks for classification and detection*, TPAMI 2016,
    https://arxiv.org/abs/1505.06798.

    Args:

        module (nn.Module): The convolution or linear layer, of C outputs and D inputs.
        seen (Seen): What it reads, and what it should make.
        root (Tensor): :math:`R`, (C, C).
    """

    def __init__(self, module: Weighted, seen: Seen, root: Tensor) -> None:
        self.module, self.root = module, root
        moments = seen.moments / seen.rows
        self.mean = moments[-1, :-1]
        covariance = moments[:-1, :-1] - self.mean[:, None] * self.mean
        matrix = Fit(seen, matrix_of(module)).matrix
        self.weight, self.bias = matrix[:, :-1], matrix[:, -1]
        weighted = root @ self.weight
        values, vectors = torch.linalg.eigh(weighted @ covariance @ weighted.T)
        self.values, self.vectors = values.flip(0).clamp(min=0), vectors.flip(1)

    def split(self, rank: int) -> nn.Sequential:
        """Two layers that do what this one does, with so many outputs of the first."""
        leading = self.vectors[:, :rank]
        first = leading.T @ self.root @ self.weight
        second = torch.linalg.solve(self.root, leading)
        return split_layer(self.module, first, second, self._bias(first, second))

    def _bias(self, first: Tensor, second: Tensor) -> Tensor:
        """Has the mean of the outputs stay."""
        return self.bias + self.weight @ self.mean - second @ (first @ self.mean)


def split_layer(module: Weighted, first: Tensor, second: Tensor, bias: Tensor) -> nn.Sequential:
    """A layer as one with the weight ``first`` (r, D) before one with ``second`` (C, r) and a bias."""
    rank, like = len(first), module.weight
    halves: tuple[Weighted, Weighted]
    if isinstance(module, nn.Linear):
        halves = nn.Linear(module.in_features, rank, bias=False), nn.Linear(rank, len(second))
    else:
        geometry: Mapping[str, Any] = {
            key: getattr(module, key)
            for key in ("kernel_size", "stride", "padding", "dilation", "padding_mode")
        }
        halves = (
            nn.Conv2d(module.in_channels, rank, bias=False, **geometry),
            nn.Conv2d(rank, len(second), 1),
        )
    both = nn.Sequential(*halves).to(like).requires_grad_(like.requires_grad)
    for name, value in (("0.weight", first), ("1.weight", second), ("1.bias", bias)):
        own = both.get_parameter(name)
        own.data.copy_(value.reshape(own.shape))
    return both.train(module.training)


def replace_module(model: nn.Module, module: nn.Module, other: nn.Module) -> None:
    """Put another module wherever a model has this one."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is module:
                setattr(parent, name, other)


def sizes_of(module: Weighted) -> tuple[int, int, int]:
    """Parameters of a layer, of each rank of it once it is split, and of the split layer's bias."""
    outputs, inputs = len(module.weight), int(module.weight[0].numel())
    return sum(p.numel() for p in module.parameters()), inputs + outputs, outputs


def least_size(module: Weighted) -> int:
    """Parameters of a layer or, if that is less, of its split into two of rank one."""
    whole, each, fixed = sizes_of(module)
    return min(whole, each + fixed)


def choose_ranks(layers: Mapping[str, LowRank], most: int) -> dict[str, int]:
    r"""
    The ranks of layers that together may have so many parameters.

    From one each, the rank is raised where that saves most of the error for each parameter.

    Args:

        layers (mapping): The layers.
        most (int): Their parameters, in all.

    Returns:
        *dict* from the layers that are to be split to their ranks; layers that would not become
        smaller are not among them.
    """
    size, ranks = {}, dict.fromkeys(layers, 1)
    gains = []
    for name, layer in layers.items():
        each = sizes_of(layer.module)[1]
        size[name] = least_size(layer.module)
        values = layer.values[1:][layer.values[1:] > _ROUNDING * layer.values[0]]
        gains += [(float(value) / each, name) for value in values]
    closed = {name for name, layer in layers.items() if size[name] == sizes_of(layer.module)[0]}
    spare = most - sum(size.values())
    for _, name in sorted(gains, key=lambda gain: -gain[0]):
        if name in closed:
            continue
        whole, each, _ = sizes_of(layers[name].module)
        step = min(each, whole - size[name])
        if step > spare:
            closed.add(name)
            continue
        spare, size[name], ranks[name] = spare - step, size[name] + step, ranks[name] + 1
        if size[name] == whole:
            closed.add(name)
    return {
        name: rank for name, rank in ranks.items() if size[name] < sizes_of(layers[name].module)[0]
    }
