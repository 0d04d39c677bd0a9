"""Measures of how class-specific a gate, or a network's filters, are."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from captum_classfilters._core.arguments import arguments_checked


def _matrix(gate: Tensor) -> Tensor:
    if gate.dim() != 2 or bool(gate.isnan().any()):
        raise ValueError(f"gate is {tuple(gate.shape)}; expected a Tensor (C, K) without NaN.")
    return gate.detach()


@arguments_checked
def density_interval(num_classes: int, num_filters: int, limit: float | None = None) -> Tensor:
    r"""
    The attainable range of a gate's L1-density.

    Every filter is fully open for one class, hence at least 1/C; the hinge regularizer presses down
    to ``limit`` / (C K).

    Args:

        num_classes (int): C.
        num_filters (int): K.
        limit (float, optional): The hinge's *g*, K by default.
                    Default: None

    Returns:
        *Tensor* of shape (2,), lower and upper end.

    Raises:
        ValueError: There are no classes or filters.
    """
    if num_classes < 1 or num_filters < 1:
        raise ValueError(f"A gate of {num_classes} classes and {num_filters} filters is empty.")
    upper = (num_filters if limit is None else limit) / (num_classes * num_filters)
    return torch.tensor([1 / num_classes, max(upper, 1 / num_classes)], dtype=torch.float64)


@arguments_checked
def gate_similarity(gate: Tensor) -> float:
    r"""
    Sum over ordered pairs of classes of the cosine between their gates (CSI); lower is more specific.

    .. math:: \mathrm{CSI} = \sum_{i \ne j} \cos(G_{i \cdot}, G_{j \cdot})

    Args:

        gate (Tensor): Shape (C, K); of a network without a gate, any table's ``scores`` or
                    ``selected``.

    Returns:
        *float*, between 0 and C (C - 1) for gates in [0, 1].

    Raises:
        ValueError: The gate is not a matrix, or holds NaN.
    """
    rows = normalize(_matrix(gate).double(), dim=1)
    cosine = rows @ rows.T
    return float(cosine.sum() - cosine.diagonal().sum())


@arguments_checked
def filter_correlation(weight: Tensor) -> Tensor:
    r"""
    Absolute cosine between filters' weights, zero on the diagonal.

    Args:

        weight (Tensor): Shape (K, ...), the weight of a convolution or linear layer.

    Returns:
        *Tensor* of shape (K, K).

    Raises:
        ValueError: The weight has fewer than two axes.
    """
    if weight.dim() < 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected (K, ...).")
    rows = normalize(weight.detach().flatten(1).double(), dim=1)
    return (rows @ rows.T).abs().fill_diagonal_(0.0)
