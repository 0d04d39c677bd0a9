"""Orders of filters: by their scores, and at random as a control."""

from collections.abc import Sequence

import torch
from torch import Tensor


def descending(scores: Tensor) -> Tensor:
    """Indices by falling score; ties in the order of the filters, NaN last."""
    return scores.nan_to_num(nan=-float("inf")).sort(dim=-1, descending=True, stable=True).indices


def highest(scores: Tensor, sizes: Tensor) -> Tensor:
    """Masks (C, K) of the so many highest scores of each row; ties go to the lower index.

    The same as the first of :func:`descending`, without sorting what is not asked for.
    """
    filled = scores.nan_to_num(nan=-float("inf"), neginf=-float("inf"))
    largest = filled.topk(int(sizes.max().clamp(min=1)), dim=1).values
    least = largest.gather(1, (sizes - 1).clamp(min=0)[:, None])
    above, equal = filled > least, filled == least
    missing = sizes[:, None] - above.sum(1, keepdim=True)
    if bool((equal.sum(1, keepdim=True) > missing).any()):  # ties
        equal &= equal.cumsum(1, dtype=torch.int32) <= missing
    return (above | equal) & (sizes > 0)[:, None]


def ranks(order: Tensor) -> Tensor:
    """The place of each filter in an order of filters, (..., K)."""
    return order.argsort(-1)


def rank_correlation(left: Tensor, right: Tensor) -> Tensor:
    """Spearman's correlation of each row; NaN where a row is constant or not finite."""
    from torchmetrics.functional import spearman_corrcoef

    result = torch.full((len(left),), float("nan"), dtype=torch.float64)
    usable = torch.isfinite(left).all(1) & torch.isfinite(right).all(1)
    usable &= _varies(left) & _varies(right) if left.shape[1] > 1 else False
    for row in usable.nonzero()[:, 0].tolist():
        result[row] = spearman_corrcoef(left[row], right[row])
    return result


def _varies(rows: Tensor) -> Tensor:
    """Whether the numbers of a row differ; the deviation of equal ones may be above zero by rounding."""
    return rows.amax(1) > rows.amin(1)


def random_orders(shape: Sequence[int], repetitions: int, generator: torch.Generator) -> Tensor:
    """Random orders of K filters, (repetitions, ..., K) for a shape (..., K)."""
    return torch.rand(repetitions, *shape, generator=generator).argsort(-1)


def first_of(order: Tensor, sizes: Tensor | int) -> Tensor:
    """Masks (..., K) of the first so many filters of orders (..., K); sizes broadcast to (...)."""
    return ranks(order) < torch.as_tensor(sizes)[..., None]


def random_sets(selected: Tensor, repetitions: int, seed: int) -> Tensor:
    """Masks (repetitions, ..., K) of as many filters as each row of ``selected`` has, at random."""
    generator = torch.Generator().manual_seed(seed)
    orders = random_orders(selected.shape, repetitions, generator)
    return first_of(orders.to(selected.device), selected.sum(-1))
