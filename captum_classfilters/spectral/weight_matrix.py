"""A layer's weight as one matrix per group, a row for each output filter."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from captum_classfilters._core.linear_maps import (
    LINEAR_MAPS,
    TRANSPOSED,
    check_not_quantized,
    weight_at_inference,
    weight_in_use,
)
from captum_classfilters._core.tables import short_repr


class UnfitWeightError(ValueError):
    """A convolution's or linear layer's weight that cannot be decomposed as it is."""


@short_repr
class WeightMatrix(NamedTuple):
    """The unfolded weight of a layer.

    Args:

        matrices (Tensor): Shape (G, d / G, n): for each group, a row for each output filter.
        folded (tuple of int): Shape of one row before unfolding: (c / G, kh, kw), or (in,).
        kind (str): ``"convolution"``, ``"transposed convolution"`` or ``"linear"``.
    """

    matrices: Tensor
    folded: tuple[int, ...]
    kind: Literal["convolution", "transposed convolution", "linear"]


def can_decompose(module: nn.Module) -> bool:
    """Whether a module is of a class that :func:`weight_matrix` unfolds."""
    return isinstance(module, LINEAR_MAPS)


def weight_matrix(module: nn.Module, name: str | None = None) -> WeightMatrix:
    r"""
    Unfold a convolution's or linear layer's weight along its output filters.

    A convolution's weight (d, c / G, kh, kw) gives G matrices of d / G rows and
    :math:`(c / G) \cdot kh \cdot kw` columns, flattened in memory order; a transposed convolution's is
    turned first, so that rows are output filters here too; a linear layer's (d, c) is one matrix.

    Args:

        module (nn.Module): The layer.
        name (str, optional): What error messages call it.
                    Default: None

    The weight is the one that the layer computes with at inference: with its masks of pruning and
    its parametrizations. A layer whose own forward does anything else with it is refused.

    Returns:
        *WeightMatrix*.

    Raises:
        ValueError: The module has no weight, one that is no linear map from channels to channels, a
                    quantized, empty or not yet initialized one, one with NaN or infinite entries, or
                    one that is not what the layer computes.
    """
    called = f"{type(module).__name__}" + (f" {name!r}" if name else "")
    if not isinstance(module, nn.Module):
        raise ValueError(f"Expected a layer, a torch.nn.Module; got a {called}.")
    if any(map(is_lazy, module.parameters())):
        raise UnfitWeightError(
            f"{called} has no weight yet; run the model once so that it learns its shape."
        )
    check_not_quantized(module, called, "Decompose the floating-point layer")
    weight = weight_at_inference(module)
    if isinstance(module, nn.MultiheadAttention):
        raise ValueError(
            f"{called} holds several weights; `model_svd` lists its query, key and value projections "
            "and its `out_proj` separately."
        )
    if not isinstance(weight, Tensor):
        raise ValueError(
            f"{called} has no weight of its own, so it has no singular directions. Choose a "
            "convolution or a linear layer inside or before it."
        )
    if not can_decompose(module):
        raise ValueError(
            f"{called} has a weight of shape {tuple(weight.shape)}, but it is not a convolution or a "
            "linear layer. Choose one of these, a normalization's neighbor for example."
        )
    weight, reason = weight_in_use(module)
    result = unfold(weight, _kind(module), getattr(module, "groups", 1), called)
    if reason is not None:
        raise UnfitWeightError(
            f"{called} cannot be decomposed by its weight: {reason}. Decompose a plain layer with the "
            "weight that it computes with: merge an adapter, convert a quantized or standardized one."
        )
    return result


def unfold(weight: Tensor, kind: str, groups: int, called: str) -> WeightMatrix:
    """The matrices of a weight that is known to be one of a convolution or a linear layer."""
    if weight.is_complex() or not weight.is_floating_point():
        raise UnfitWeightError(f"{called} has a weight of {weight.dtype}; expected real numbers.")
    if weight.is_meta or not weight.numel():
        what = "without values, on the meta device" if weight.is_meta else "without entries"
        raise UnfitWeightError(f"{called} has a weight of shape {tuple(weight.shape)} {what}.")
    # NaN wins every comparison here; `isfinite` of a large weight would copy it several times.
    if not bool(torch.isfinite(torch.stack(weight.aminmax())).all()):
        bad = ~torch.isfinite(weight)
        first = tuple(bad.nonzero()[0].tolist())
        raise UnfitWeightError(
            f"{called} has {int(bad.sum())} NaN or infinite entries in its weight, the first at "
            f"{first}; a decomposition needs finite numbers."
        )
    if kind == "transposed convolution":
        # (c, d / G, *kernel): channels are grouped on axis 0, filters are axis 1 of each group.
        parts = weight.unflatten(0, (groups, -1)).transpose(1, 2)
    else:
        parts = weight.unflatten(0, (groups, -1))
    return WeightMatrix(parts.flatten(2), tuple(parts.shape[2:]), kind)  # type: ignore[arg-type]


def _kind(module: nn.Module) -> str:
    if isinstance(module, TRANSPOSED):
        return "transposed convolution"
    return "linear" if isinstance(module, nn.Linear) else "convolution"
