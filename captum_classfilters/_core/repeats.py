"""Whether a model gives the same scores for the same images."""

from collections.abc import Callable

import torch
from torch import Tensor

from captum_classfilters._core.outputs import class_scores

# Algorithms of accelerators may be chosen anew, and add in another order.
_CPU, _ACCELERATOR = 1e-5, 1e-3
_ULPS = 8  # of the type that was computed in


def difference_of_runs(
    output: object, run: Callable[[], object], rows: int | None = None
) -> tuple[Tensor, Tensor, Tensor] | None:
    r"""
    Run a model again and compare.

    Args:

        output (object): What it returned.
        run (Callable): Runs it again.
        rows (int, optional): The first images, with which alone it runs again; by default all.

    Returns:
        *tuple* of tensors of no axes, where the scores are: whether they are alike up to rounding, how
        far they differ at most, and how large they are at most; None where there are no scores.
    """
    first = _scores(output)
    if first is None:
        return None
    first = first[:rows].clone()  # a model may write into what it returned
    second = _scores(run())
    if second is None or second.shape != first.shape or not first.numel():
        return None
    wide = torch.promote_types(first.dtype, torch.float32)
    left, right = first.to(wide), second.to(first.device, wide)
    known = left.isfinite() & right.isfinite()
    distance = (left - right).abs().masked_fill(~known, 0).amax()
    size = left.abs().masked_fill(~known, 0).amax()
    same_kind = (left.isnan() == right.isnan()).all()
    return same_kind & (distance <= _tolerance(first) * size), distance, size


def _scores(output: object) -> Tensor | None:
    try:
        scores = class_scores(output)
    except ValueError:
        return None
    return scores.detach() if scores.is_floating_point() else None


def _tolerance(scores: Tensor) -> float:
    kind = scores.device.type
    # A product says in which type a surrounding autocast computes; PyTorch 2.3 cannot be asked.
    one = torch.ones(1, 1, device=scores.device)
    rounding = max(torch.finfo(dtype).eps for dtype in (scores.dtype, (one @ one).dtype))
    return max(_CPU if kind == "cpu" else _ACCELERATOR, _ULPS * rounding)
