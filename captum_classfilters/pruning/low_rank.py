"""Layers split into narrower ones, in closed form, as far as what they make allows."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from scipy.sparse.linalg import LinearOperator, cg
from torch import Tensor, nn
from torch.nn.utils import skip_init

from captum_classfilters._core.stand_ins import StandIn
from captum_classfilters.pruning.least_squares import (
    Fit,
    Seen,
    Weighted,
    cholesky,
    matrix_of,
    root_of,
)
from captum_classfilters.pruning.network_size import NetworkSize, Ranks, Shape

_ROUNDING = 1e-6  # of the largest eigenvalue, below which there is nothing to save
_RIDGE = 1e-8  # of the mean second moment: combinations that never vary do no harm
_ROUNDS = 2  # in which what a kernel reads is fitted to what it makes of that ...
_STEPS = 12  # ... by so many conjugate gradients
_ROUNDS_OF_SCALES = 10  # of layers in a row, each changes its neighbours'


class LowRank:
    r"""
    What a layer makes, through fewer numbers than it has inputs and outputs.

    With :math:`W` fitted to what the layer should make, :math:`\Sigma` the covariance of what it reads,
    and :math:`\|R e\|^2` what an error *e* costs, the matrix of rank *r* that costs least is
    :math:`R^{-1} U_r U_r^T R W`, where :math:`U_r` holds the *r* leading eigenvectors of
    :math:`R W \Sigma W^T R^T`; it costs the sum of the other eigenvalues.

    A kernel of several positions may read, at each of them, the same *a* combinations of the inputs
    instead of all. Were positions uncorrelated, of covariance :math:`L L^T` each, the best would be the
    *a* leading eigenvectors of :math:`\sum_p L^T W_p^T R^T R W_p L`, combinations of the whitened
    inputs. From there the combinations and the kernel are fitted in turn.

    Source: Izenman: *Reduced-rank regression for the multivariate linear model*, Journal of Multivariate
    Analysis 5, 1975; for convolutions one after another as in Zhang et al.: *Accelerating very deep
    convolutional networks for classification and detection*, TPAMI 2016,
    https://arxiv.org/abs/1505.06798; inputs and outputs narrowed as in Kim et al.: *Compression of deep
    convolutional neural networks for fast and low power mobile applications*, ICLR 2016,
    https://arxiv.org/abs/1511.06530.

    Args:

        module (nn.Module): The convolution or linear layer, of C outputs, I inputs and P positions.
        seen (Seen): What it reads, and what it should make.
        root (Tensor): :math:`R`, (C, C).
    """

    def __init__(self, module: Weighted, seen: Seen, root: Tensor) -> None:
        self.module, self.seen, self.root = module, seen, root
        self.shape = shape_of(module)
        matrix = Fit(seen, matrix_of(module)).matrix
        self.weight, self.bias = matrix[:, :-1], matrix[:, -1]
        weighted, covariance = root @ self.weight, self._covariance()
        values, _ = _leading(weighted @ covariance @ weighted.T)
        # What is lost without the combinations of outputs, and of inputs, from each on.
        self.output_values, self.input_values = values, values.new_zeros(0)
        if self.shape.positions > 1:
            values, _ = self._readings(self._basis(covariance))
            self.input_values = values * self.output_values.sum() / values.sum().clamp(min=1e-30)

    def split(self, ranks: Ranks) -> nn.Sequential:
        """Layers in a row that do what this one does, the kernel between narrower ones."""
        few = ranks.inputs < self.shape.inputs
        reading, kernel, making = self._of_few(ranks) if few else self._of_all(ranks.outputs)
        making = torch.linalg.solve(self.root, making)
        whole = torch.einsum("cr,rap,ai->cip", making, kernel, reading).flatten(1)
        bias = self.bias + (self.weight - whole) @ self._mean()  # the mean of the outputs stays
        return split_layer(self.module, reading, kernel, making, bias)

    def _of_all(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """A kernel of all inputs, (I, I) as they are, and what outputs are made of it, (C, r)."""
        target = self.root @ self.weight
        _, vectors = _leading(target @ self._covariance() @ target.T)
        making = vectors[:, :rank]
        kernel = (making.T @ target).reshape(-1, *self.shape[1:])
        return torch.eye(self.shape.inputs, dtype=target.dtype), kernel, making

    def _of_few(self, ranks: Ranks) -> tuple[Tensor, Tensor, Tensor]:
        """A kernel of combinations of inputs (a, I), fitted to each other in turn, and the same."""
        covariance = self._covariance()
        basis = self._basis(covariance)
        covariance = _whitened(covariance, basis)
        target = torch.einsum("cip,ij->cjp", (self.root @ self.weight).reshape(self.shape), basis)
        reading = self._readings(basis)[1][: ranks.inputs]
        for _ in range(_ROUNDS):
            making, kernel = _fitted(target, covariance, reading, ranks.outputs)
            reading = _refined(target, covariance, reading, making, kernel)
        making, kernel = _fitted(target, covariance, reading, ranks.outputs)
        return torch.linalg.solve(basis.T, reading.T).T, kernel, making

    def _mean(self) -> Tensor:
        return self.seen.moments[-1, :-1] / self.seen.rows

    def _covariance(self) -> Tensor:
        """Of what each position reads, (I P, I P)."""
        mean = self._mean()
        return self.seen.moments[:-1, :-1] / self.seen.rows - mean[:, None] * mean

    def _basis(self, covariance: Tensor) -> Tensor:
        """L (I, I), whose product with its transpose is the covariance of inputs at one position."""
        _, inputs, positions = self.shape
        each = covariance.reshape(inputs, positions, inputs, positions).diagonal(dim1=1, dim2=3)
        return root_of(each.mean(-1)).T

    def _readings(self, basis: Tensor) -> tuple[Tensor, Tensor]:
        """Combinations of whitened inputs (I, I), the most important first, and what each counts."""
        parts = (self.root @ self.weight).reshape(self.shape)
        weights = torch.einsum("cip,ij->pcj", parts, basis).flatten(0, 1)
        values, vectors = _leading(weights.T @ weights)
        return values, vectors.T


def _leading(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues of a symmetric matrix, the largest first, and their vectors in columns."""
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(0).clamp(min=0), vectors.flip(1)


def _whitened(covariance: Tensor, basis: Tensor) -> Tensor:
    """The covariance of inputs at all positions (I P, I P), in units of a basis (I, I)."""
    inputs = len(basis)
    for _ in range(2):
        rows = covariance.reshape(inputs, -1)
        rows = torch.linalg.solve_triangular(basis, rows, upper=False)
        covariance = rows.reshape(covariance.shape).T
    return covariance


def _fitted(
    target: Tensor, covariance: Tensor, reading: Tensor, rank: int
) -> tuple[Tensor, Tensor]:
    """What makes a target (C, I, P) best of some combinations (a, I) of the inputs: combinations of
    outputs (C, r), and a kernel (r, a, P) from one to the other."""
    number, positions = len(reading), target.shape[2]
    half = (reading @ covariance.reshape(reading.shape[1], -1)).reshape(number * positions, -1)
    both = target.flatten(1) @ half.T
    own = torch.einsum("sip,ai->sap", half.unflatten(1, (-1, positions)), reading).flatten(1)
    factor, _ = cholesky(own, _RIDGE * float(own.diagonal().mean().clamp(min=1e-30)))
    weights = torch.cholesky_solve(both.T, factor).T
    _, vectors = _leading(both @ weights.T)
    making = vectors[:, :rank]
    return making, (making.T @ weights).reshape(-1, number, positions)


def _refined(
    target: Tensor, covariance: Tensor, reading: Tensor, making: Tensor, kernel: Tensor
) -> Tensor:
    """Better combinations of inputs (a, I) for what a kernel makes of them."""

    def read(weights: Tensor) -> Tensor:
        """From weights (r, I, P) of the inputs to how far they depend on each combination."""
        products = weights.flatten(1) @ covariance
        return torch.einsum("rap,rip->ai", kernel, products.reshape(weights.shape))

    def applied(flat: Any) -> Any:
        own = torch.as_tensor(flat, dtype=kernel.dtype).reshape(reading.shape)
        return read(torch.einsum("rap,ai->rip", kernel, own)).flatten().numpy()

    wanted = read(torch.einsum("cr,cip->rip", making, target)).flatten().numpy()
    operator = LinearOperator((reading.numel(),) * 2, matvec=applied, dtype=wanted.dtype)
    found, _ = cg(operator, wanted, x0=reading.flatten().numpy(), maxiter=_STEPS)
    return torch.as_tensor(found).reshape(reading.shape)


def split_layer(
    module: Weighted, reading: Tensor, kernel: Tensor, making: Tensor, bias: Tensor
) -> nn.Sequential:
    """A layer as one with a kernel (r, a, P) that reads combinations (a, I) of the inputs, and whose
    outputs others are made of, (C, r), with a bias. What is not narrower than the layer becomes part
    of the kernel. Weights of the parts are of one size, so that training moves all alike."""
    outputs, inputs, _ = shape_of(module)
    like = module.weight
    if len(reading) == inputs:
        kernel = torch.einsum("rap,ai->rip", kernel, reading)
    if len(kernel) == outputs:
        kernel = torch.einsum("cr,rap->cap", making, kernel)
    parts, weights = [_with_kernel(module, kernel)], [kernel]
    if len(reading) < inputs:
        parts.insert(0, skip_init(nn.Conv2d, inputs, len(reading), 1, bias=False))
        weights.insert(0, reading)
    if len(kernel) < outputs:
        linear = isinstance(module, nn.Linear)
        kind, size = (nn.Linear, ()) if linear else (nn.Conv2d, (1,))
        last = skip_init(kind, len(kernel), outputs, *size)
        parts.append(last)
        weights.append(making)
    _equalize(weights)
    row = StandIn({str(place): part for place, part in enumerate(parts)}, module)
    row.to(like).requires_grad_(like.requires_grad)
    for part, weight in zip(parts, weights, strict=True):
        part.weight.data.copy_(weight.reshape(part.weight.shape))
    assert parts[-1].bias is not None
    parts[-1].bias.data.copy_(bias)
    return row


def _equalize(weights: list[Tensor]) -> None:
    """Scale what layers in a row hand on, in place of their weights, so that each number is made by
    weights of the same mean square as those that read it.

    Source: Nagel et al.: *Data-free quantization through weight equalization and bias correction*,
    ICCV 2019, https://arxiv.org/abs/1906.04721, equation 11, with mean squares for ranges.
    """
    for _ in range(_ROUNDS_OF_SCALES if len(weights) > 1 else 0):
        for place in range(len(weights) - 1):
            made, read = weights[place : place + 2]
            size = made.flatten(1).square().mean(1)
            wanted = read.transpose(0, 1).flatten(1).square().mean(1)
            scale = torch.where((size > 0) & (wanted > 0), wanted / size, 1).pow(0.25)
            weights[place] = made * scale.reshape(-1, *[1] * (made.dim() - 1))
            weights[place + 1] = read / scale.reshape(-1, *[1] * (read.dim() - 2))


def _with_kernel(module: Weighted, kernel: Tensor) -> Weighted:
    """A layer like this one for a kernel (r, a, P); its bias only if no other layer follows."""
    outputs, inputs, _ = kernel.shape
    last = outputs == len(module.weight)
    if isinstance(module, nn.Linear):
        return skip_init(nn.Linear, inputs, outputs, bias=last)
    geometry: Mapping[str, Any] = {
        key: getattr(module, key)
        for key in ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    }
    return skip_init(nn.Conv2d, inputs, outputs, bias=last, **geometry)


def replace_module(model: nn.Module, module: nn.Module, other: nn.Module) -> None:
    """Put another module wherever a model has this one."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is module:
                setattr(parent, name, other)


class _Widening:
    """The ranks of one layer, as they grow.

    Args:

        name (str): Its name.
        layer (LowRank): The layer.
        size (NetworkSize): What is counted.
    """

    def __init__(self, name: str, layer: LowRank, size: NetworkSize) -> None:
        self.name, self.layer, self.count = name, layer, size
        self.whole = size.of_layer(name, layer.module)
        self.ranks, self.size = layer.shape.least, 0.0
        self.steps: list[tuple[float, Ranks, float]] = []
        self.take(self.ranks)

    def take(self, ranks: Ranks) -> None:
        """Have these ranks, or the whole layer where it is no larger; find out what may be next."""
        self.ranks, self.size = ranks, min(self.whole, self._size(ranks))
        self.steps = [] if self.size == self.whole else [*self._next()]

    def _next(self) -> Iterator[tuple[float, Ranks, float]]:
        """What one rank more saves for what it adds, these ranks, and what they add."""
        values = self.layer.input_values, self.layer.output_values
        for rank, axis, each in zip(self.ranks, self.ranks._fields, values, strict=True):
            if rank < len(each) and each[rank] > _ROUNDING * each[0]:
                ranks = self.ranks._replace(**{axis: rank + 1})
                adds = min(self.whole, self._size(ranks)) - self.size
                yield float(each[rank]) / max(adds, 1e-9), ranks, adds

    def _size(self, ranks: Ranks) -> float:
        return self.count.of_split(self.name, self.layer.shape, ranks)


def choose_ranks(layers: Mapping[str, LowRank], most: float, size: NetworkSize) -> dict[str, Ranks]:
    r"""
    The ranks of layers that together may have such a size.

    From the least of each layer, ranks are raised where that saves most of the error for what it adds.

    Args:

        layers (mapping): The layers.
        most (float): Their size, in all.
        size (NetworkSize): What is counted.

    Returns:
        *dict* from the layers that are to be split to their ranks; layers that would not become
        smaller are not among them.
    """
    all_layers = [_Widening(name, layer, size) for name, layer in layers.items()]
    spare = most - sum(layer.size for layer in all_layers)
    while True:
        steps = [(step, layer) for layer in all_layers for step in layer.steps if step[2] <= spare]
        if not steps:
            break
        (_, ranks, adds), layer = max(steps, key=lambda pair: pair[0][0])
        layer.take(ranks)
        spare -= adds
    return {layer.name: layer.ranks for layer in all_layers if layer.size < layer.whole}


def shape_of(module: Weighted) -> Shape:
    """Outputs and inputs of a layer, and positions of its kernel."""
    outputs, inputs = module.weight.shape[:2]
    return Shape(outputs, inputs, module.weight[0, 0].numel())
