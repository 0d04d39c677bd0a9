"""A network that runs without some of its filters, and comes back as it was."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from captum_classfilters._core.layers import filter_axis, find_layer, layer_name, only_tensor


@contextmanager
def masked_filters(
    model: nn.Module, kept: Mapping[str, Tensor], channel_dim: int | None = None
) -> Iterator[nn.Module]:
    r"""
    Set filters to zero in the outputs of some layers while the block runs.

    The layer's output is masked, so after its bias; to remove a filter of a convolution with batch
    normalisation or a bias after it, name the module that ends with the activation. The model can
    be run, trained and explained inside the block.

    Args:

        model (nn.Module): The model.
        kept (dict of str to Tensor): For each layer's dotted name, which filters stay (K,), bool.
        channel_dim (int, optional): Axis of the filters, where it cannot be told from the layers.
                    Default: None

    Yields:
        *nn.Module*: The model.

    Raises:
        ValueError: There is no such layer, or a mask does not have one entry for each filter.

    Examples::

        >>> import torch
        >>> from captum_classfilters.pruning import masked_filters
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.ReLU())
        >>> with masked_filters(net, {"0": torch.tensor([True, False])}):
        ...     output = net(torch.rand(1, 3, 4, 4))
        >>> int(output[:, 1].count_nonzero())
        0
    """
    layers = [find_layer(model, name) for name in kept]
    missing = object()
    found = [layer.__dict__.get("forward", missing) for layer in layers]
    try:
        for layer, mask in zip(layers, kept.values(), strict=True):
            # Not a hook: a recorded forward pass must hold what the layer gives when masked.
            layer.__dict__["forward"] = _masked(model, layer, mask, channel_dim)
        yield model
    finally:
        for layer, forward in zip(layers, found, strict=True):
            if forward is missing:
                with suppress(KeyError):
                    del layer.__dict__["forward"]
            else:
                layer.__dict__["forward"] = forward


def _masked(model: nn.Module, layer: nn.Module, mask: Tensor, channel_dim: int | None) -> Any:
    forward = layer.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        tensor = only_tensor(output, layer_name(model, layer))
        axis = filter_axis(layer, tensor, channel_dim)
        if mask.shape != (tensor.shape[axis],):
            raise ValueError(
                f"The mask of {layer_name(model, layer)!r} has shape {tuple(mask.shape)}, but the "
                f"layer has {tensor.shape[axis]} filters."
            )
        shape = [1] * tensor.dim()
        shape[axis] = len(mask)
        stays = mask.to(tensor.device).reshape(shape)
        masked = torch.where(stays, tensor, torch.zeros_like(tensor[:1]))
        return type(output)([masked]) if isinstance(output, (tuple, list)) else masked

    return run
