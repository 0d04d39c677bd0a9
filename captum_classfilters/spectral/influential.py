"""The units that hold the larger share of an image's scores."""

import torch
from torch import Tensor

from captum_classfilters._core.arguments import arguments_checked


@arguments_checked
def influential(
    scores: Tensor,
    *,
    share: float | None = None,
    count: int | None = None,
    quantile: float | None = None,
    at_most: int | None = None,
) -> tuple[Tensor, Tensor]:
    r"""
    Select each image's influential units, and weigh them by their scores.

    Only positive scores can be selected. By ``share``, units are accepted from the highest score
    down while their cumulative share of all positive scores is at most ``share``, and one more; by
    ``count``, the highest ``count``; by ``quantile``, all that reach this quantile of the image's
    positive scores. **Ties** go to the lower index.

    Source: DeepDataProfiler, whose rule ``share`` is. Its weights leave the last unit accepted out
    of their normalization and sum to more than one; here they are shares of what was accepted and
    sum to one.

    Args:

        scores (Tensor): Shape (N, U).
        share (float, optional): In [0, 1). One of the three rules is given.
        count (int, optional): At least 1.
        quantile (float, optional): In [0, 1].
        at_most (int, optional): Largest number of units, for any rule.

    Returns:
        *tuple* of a bool mask (N, U), and weights (N, U), float64, zero outside the mask and with
        sum one for every image that has a positive score.

    Raises:
        ValueError: Not exactly one rule is given, or a value is out of range.

    Examples::

        >>> import torch
        >>> from captum_classfilters.spectral import influential
        >>> mask, weights = influential(torch.tensor([[1., 6., -9., 3.]]), share=0.7)
        >>> mask.tolist(), weights.tolist()
        ([[False, True, False, True]], [[0.0, 0.666..., 0.0, 0.333...]])
    """
    rules = {"share": share, "count": count, "quantile": quantile}
    chosen_rules = [name for name, value in rules.items() if value is not None]
    if len(chosen_rules) != 1:
        raise ValueError(f"Give one of share, count and quantile, not {chosen_rules or 'none'}.")
    if scores.dim() != 2:
        raise ValueError(f"scores have shape {tuple(scores.shape)}; expected (N, U).")
    if bool(scores.isnan().any()):
        raise ValueError("The scores hold NaN.")
    if share is not None and not 0 <= share < 1:
        raise ValueError(f"share={share}; expected a number in [0, 1).")
    if quantile is not None and not 0 <= quantile <= 1:
        raise ValueError(f"quantile={quantile}; expected a number in [0, 1].")
    for name, number in (("count", count), ("at_most", at_most)):
        if number is not None and number < 1:
            raise ValueError(f"{name}={number}; expected a positive number.")
    positive = scores.detach().double().clamp(min=0)
    falling, order = positive.sort(dim=1, descending=True, stable=True)
    keep = (falling > 0).sum(1)
    if count is not None:
        keep = keep.clamp(max=count)
    elif share is not None:
        total = falling.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        accepted = (falling.cumsum(1) / total <= share).sum(1) + 1
        keep = torch.minimum(keep, accepted)
    else:
        assert quantile is not None
        known = torch.where(positive > 0, positive, torch.nan)
        edge = torch.nanquantile(known, quantile, dim=1, keepdim=True)
        keep = (falling >= edge).sum(1)  # NaN, for no positive score, keeps none
    if at_most is not None:
        keep = keep.clamp(max=at_most)
    ranks = torch.arange(scores.shape[1], device=scores.device)
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask.scatter_(1, order, ranks < keep[:, None])
    kept = positive * mask
    return mask, kept / kept.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
