"""A network that runs without some of its filters, and comes back as it was."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.layers import (
    find_layer,
    layer_axis,
    name_of,
    only_tensor,
    with_tensors,
)
from captum_classfilters._core.names import kind_of
from captum_classfilters._core.types import ForwardFunc


@arguments_checked
@contextmanager
def masked_filters(
    model: nn.Module,
    kept: Mapping[str, Tensor] | Mapping[nn.Module, Tensor],
    channel_dim: int | None = None,
) -> Iterator[nn.Module]:
    r"""
    Set filters to zero in the outputs of some layers while the block runs.

    The layer's output is masked, so after its bias; to remove a filter of a convolution with batch
    normalization or a bias after it, name the module that ends with the activation. The model can
    be run, trained and explained inside the block.

    Args:

        model (nn.Module): The model.
        kept (dict): For each layer, given by its dotted name or itself, which filters stay: a bool
                    Tensor (K,).
        channel_dim (int, optional): Axis of the filters, where it cannot be told from the layers.
                    Default: None

    Yields:
        *nn.Module*: The model.

    Raises:
        ValueError: There is no such layer, or a mask is not bool with one entry for each filter.

    Examples::

        >>> import torch
        >>> from captum_classfilters.pruning import masked_filters
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.ReLU())
        >>> with masked_filters(net, {"0": torch.tensor([True, False])}):
        ...     output = net(torch.rand(1, 3, 4, 4))
        >>> int(output[:, 1].count_nonzero())
        0
    """
    names = [name_of(model, layer) for layer in kept]
    layers = [find_layer(model, name) for name in names]
    own_forwards = [layer.__dict__.get("forward") for layer in layers]
    try:
        for layer, mask in zip(layers, kept.values(), strict=True):
            # Not a hook: a recorded forward pass must hold what the layer gives when masked.
            layer.__dict__["forward"] = _masked(model, layer, mask, channel_dim)
        yield model
    finally:
        for layer, forward in zip(layers, own_forwards, strict=True):
            layer.__dict__.pop("forward", None)
            if forward is not None:
                layer.__dict__["forward"] = forward


def _masked(
    model: nn.Module, layer: nn.Module, mask: Tensor, channel_dim: int | None
) -> ForwardFunc:
    """The forward of a layer, some filters of its output zero."""
    name = name_of(model, layer)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 1:
        raise ValueError(
            f"The mask of {name!r} is {_described(mask)}; expected a bool Tensor (K,) that says which "
            "filters stay."
        )
    forward = layer.forward

    def run(*args: Any, **kwargs: Any) -> object:
        output = forward(*args, **kwargs)
        tensor = only_tensor(output, name)
        axis = layer_axis(model, layer, tensor, channel_dim)
        if len(mask) != tensor.shape[axis]:
            raise ValueError(
                f"The mask of {name!r} has shape {tuple(mask.shape)}, but the layer has "
                f"{tensor.shape[axis]} filters."
            )
        shape = [1] * tensor.dim()
        shape[axis] = len(mask)
        stays = mask.to(tensor.device).reshape(shape)
        masked = torch.where(stays, tensor, torch.zeros_like(tensor[:1]))
        return with_tensors(output, [masked])

    return run


def _described(mask: object) -> str:
    if isinstance(mask, Tensor):
        return f"a Tensor of {mask.dtype} and shape {tuple(mask.shape)}"
    return kind_of(mask)
