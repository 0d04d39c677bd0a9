"""The weights of a layer, filter by filter."""

from torch import Tensor, nn

from captum_classfilters._core.linear_maps import weight_at_inference


def filter_weights(module: nn.Module) -> Tensor | None:
    r"""
    The weights that make each filter of a convolution or linear layer, (K, ...).

    They are those of inference, with masks, norms and parametrizations as they are now. Transposed
    convolutions, which hold their weights by input, are turned, each group by itself.

    Args:

        module (nn.Module): The layer.

    Returns:
        *Tensor* of shape (K, inputs, ...), without gradients, or None where the module has no
        weights of this kind.

    Examples::

        >>> import torch
        >>> from captum_classfilters._core.filter_weights import filter_weights
        >>> filter_weights(torch.nn.Conv2d(4, 6, 3)).shape
        torch.Size([6, 4, 3, 3])
        >>> filter_weights(torch.nn.ConvTranspose2d(4, 6, 3, groups=2)).shape
        torch.Size([6, 2, 3, 3])
        >>> filter_weights(torch.nn.ReLU()) is None
        True
    """
    weight = weight_at_inference(module)
    if weight is None or weight.dim() < 2:
        return None
    if not getattr(module, "transposed", False):
        return weight
    groups = int(getattr(module, "groups", 1))
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def reading_weights(module: nn.Module) -> Tensor | None:
    """The weights with which a convolution or linear layer reads each of its inputs, (inputs, ...);
    in a grouped layer an input is read by the filters of its group alone."""
    weight = weight_at_inference(module)
    if weight is None or weight.dim() < 2:
        return None
    if getattr(module, "transposed", False):
        return weight
    groups = int(getattr(module, "groups", 1))
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
