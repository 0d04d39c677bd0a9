"""Layers split into two narrower ones, in closed form, as far as what they make allows."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from captum_classfilters.pruning.least_squares import Fit, Seen, Weighted, matrix_of
from captum_classfilters.pruning.network_size import NetworkSize

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


def choose_ranks(layers: Mapping[str, LowRank], most: int, size: NetworkSize) -> dict[str, int]:
    r"""
    The ranks of layers that together may have such a size.

    From one each, the rank is raised where that saves most of the error for what it adds.

    Args:

        layers (mapping): The layers.
        most (int): Their size, in all.
        size (NetworkSize): What is counted.

    Returns:
        *dict* from the layers that are to be split to their ranks; layers that would not become
        smaller are not among them.
    """
    whole = {name: size.of_layer(name, layer.module) for name, layer in layers.items()}
    each: dict[str, float] = {}
    now: dict[str, float] = {}
    gains = []
    for name, layer in layers.items():
        each[name], fixed = size.of_split(name, *shape_of(layer.module))
        now[name] = min(whole[name], each[name] + fixed)
        values = layer.values[1:][layer.values[1:] > _ROUNDING * layer.values[0]]
        gains += [(float(value) / each[name], name) for value in values]
    ranks, spare = dict.fromkeys(layers, 1), most - sum(now.values())
    closed = {name for name in layers if now[name] == whole[name]}
    for _, name in sorted(gains, key=lambda gain: -gain[0]):
        if name in closed:
            continue
        step = min(each[name], whole[name] - now[name])
        if step > spare:
            closed.add(name)
            continue
        spare, now[name], ranks[name] = spare - step, now[name] + step, ranks[name] + 1
        if now[name] == whole[name]:
            closed.add(name)
    return {name: rank for name, rank in ranks.items() if now[name] < whole[name]}


def shape_of(module: Weighted) -> tuple[int, int]:
    """Outputs of a layer, and numbers that each is made of."""
    return len(module.weight), int(module.weight[0].numel())
