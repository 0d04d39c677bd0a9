"""A model whose singular directions are the filters of a layer."""

from typing import Any

import torch
from torch import Tensor, nn

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.copies import copied
from captum_classfilters._core.guard import held, model_left_as_found
from captum_classfilters._core.heads import alike
from captum_classfilters._core.layers import find_layer, layer_name
from captum_classfilters._core.linear_maps import (
    CONVOLUTIONS,
    TRANSPOSED,
    as_in_use,
    runs_pytorchs_forward,
    trial_inputs,
)
from captum_classfilters._core.stand_ins import StandIn
from captum_classfilters.spectral.layer_svd import LayerSVD, matrix_svd
from captum_classfilters.spectral.weight_matrix import weight_matrix


class FactoredLayer(StandIn):
    r"""
    A layer in two steps: to the signals of its singular directions, and back to its filters.

    ``directions`` is a layer of the same kind whose R filters are :math:`S V^\top`; ``combination``,
    a 1x1 convolution or linear layer with the weight *U* and the bias of the original, puts the
    filters together: :math:`y = U \, (S \, \mathrm{conv}(x, V)) + b`. A model that reads the layer's
    settings, weight or bias finds them here.

    Args:

        layer (nn.Module): The convolution or linear layer; it is only read.
        rank (int, optional): Keep this many directions (of each group), which makes the layer an
                    approximation with fewer parameters; by default all, which makes it equal.
                    Default: None
    """

    directions: nn.Module
    combination: nn.Module

    @arguments_checked
    def __init__(self, layer: nn.Module, rank: int | None = None) -> None:
        weight = weight_matrix(layer)
        svd = matrix_svd(weight, type(layer).__name__, rank, "auto", True)
        with model_left_as_found(None):  # new layers draw random weights first
            parts = {
                "directions": _directions(layer, svd, weight.matrices),
                "combination": _combination(layer, svd, weight.matrices),
            }
        super().__init__(parts, layer)
        if not runs_pytorchs_forward(layer):
            _check_equal(layer, self if rank is None else FactoredLayer(layer))


@arguments_checked
@torch.inference_mode(False)
def factor_layer(model: nn.Module, layer: nn.Module | str, *, rank: int | None = None) -> nn.Module:
    r"""
    A copy of a model in which the singular directions of one layer are filters of their own.

    The layer is replaced by a :class:`FactoredLayer`. Every method and measurement of this package
    then works on directions at the layer ``"<layer>.directions"``: gates, ablation, frequency, curves
    and pruning; and takes the tables of :class:`~captum_classfilters.LayerSingularDirection`.

    Args:

        model (nn.Module): The model; it is copied, not changed.
        layer (nn.Module or str): The convolution or linear layer, or its dotted name.
        rank (int, optional): Keep this many directions only; the copy is then an approximation.
                    Default: None

    Returns:
        *nn.Module*.

    Raises:
        ValueError: The layer is unknown, cannot be decomposed, is the whole model, has a padding of
                    its own, or belongs to a ``MultiheadAttention``, which uses its weight without
                    calling it.

    Examples::

        >>> import torch
        >>> from captum_classfilters import FilterGate, LayerSingularDirection
        >>> from captum_classfilters.spectral import factor_layer
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        ...     torch.nn.Flatten(), torch.nn.Linear(8, 2))
        >>> images = torch.rand(4, 3, 6, 6)
        >>> factored = factor_layer(net, "0")
        >>> torch.allclose(factored(images), net(images), atol=1e-5)
        True
        >>> gate = FilterGate(factored, "0.directions")  # now a gate for each direction
        >>> gate.ones(4).shape
        torch.Size([4, 8])
    """
    if layer is model:
        raise ValueError(
            "The layer is the whole model; make a `FactoredLayer` of it instead of a copy."
        )
    name = layer if isinstance(layer, str) else layer_name(model, layer)
    module = find_layer(model, name)
    attentions = [part for part in model.modules() if isinstance(part, nn.MultiheadAttention)]
    if any(module in attention.children() for attention in attentions):
        raise ValueError(
            f"The layer {name!r} belongs to a MultiheadAttention, which reads its weight without "
            "calling it; it cannot be replaced. Choose a layer outside."
        )
    with held(model):
        return copied(model, {module: FactoredLayer(module, rank)})


def _check_equal(layer: nn.Module, factored: nn.Module) -> None:
    """Raise if a layer with a forward of its own does more than a plain one with its settings."""
    with as_in_use(layer) as in_use:
        inputs = trial_inputs(layer)
        wanted, got = in_use(inputs), factored(inputs)
    if wanted.shape != got.shape or not bool(alike(got, wanted)):
        raise ValueError(
            f"The forward of {type(layer).__name__} is its own: a plain layer with its weight and its "
            "settings gives other outputs, because of a padding of its own for example. Put what it "
            "does beside its weight in a layer before it."
        )


def _directions(layer: Any, svd: LayerSVD, like: Tensor) -> nn.Module:
    r"""The layer with :math:`S V^\top` for filters and no bias."""
    assert svd.right is not None
    if svd.kind == "linear":
        made: Any = nn.Linear(layer.in_features, len(svd), bias=False)
    else:
        options = {
            "stride": layer.stride,
            "padding": layer.padding,
            "dilation": layer.dilation,
            "groups": layer.groups,
            "padding_mode": layer.padding_mode,
        }
        if svd.kind == "transposed convolution":
            options["output_padding"] = layer.output_padding
        made = _plain(layer)(layer.in_channels, len(svd), layer.kernel_size, bias=False, **options)
    return _filled(made, svd.input_weight(), None, like)


def _combination(layer: Any, svd: LayerSVD, like: Tensor) -> nn.Module:
    """From R signals to the layer's filters."""
    bias = layer.bias is not None
    if svd.kind == "linear":
        made: Any = nn.Linear(len(svd), svd.num_filters, bias=bias)
    else:
        kind = CONVOLUTIONS[len(layer.kernel_size) - 1]
        made = kind(len(svd), svd.num_filters, 1, groups=svd.groups, bias=bias)
    return _filled(made, svd.blocks.flatten(0, 1), layer.bias, like)


def _plain(layer: nn.Module) -> type[nn.Module]:
    """PyTorch's own class of a convolution, without what a subclass adds."""
    return next(kind for kind in (*CONVOLUTIONS, *TRANSPOSED) if isinstance(layer, kind))


def _filled(made: Any, weight: Tensor, bias: Tensor | None, like: Tensor) -> nn.Module:
    made = made.to(like)
    with torch.no_grad():
        made.weight.copy_(weight.reshape(made.weight.shape))
        if bias is not None:
            made.bias.copy_(bias)
    result: nn.Module = made
    return result
