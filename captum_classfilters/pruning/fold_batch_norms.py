"""Batch normalizations folded into the layers before them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from captum_classfilters._core.heads import alike
from captum_classfilters._core.outputs import scores_per_class
from captum_classfilters._core.taps import hooked
from captum_classfilters._core.types import ModelInputs
from captum_classfilters.pruning.low_rank import replace_module

_FUSE: dict[type[nn.Module], Callable[..., nn.Module]] = {
    nn.Conv1d: fuse_conv_bn_eval,
    nn.Conv2d: fuse_conv_bn_eval,
    nn.Conv3d: fuse_conv_bn_eval,
    nn.Linear: fuse_linear_bn_eval,
}


@torch.no_grad()
def fold_batch_norms(model: nn.Module, inputs: ModelInputs) -> int:
    """Fold batch normalizations of a network, in place, into the layers whose outputs they read.

    An identity takes a normalization's place where the network's outputs for some inputs stay; a layer
    that something else reads, too, or a normalization that does more stays as it is.

    Source: Jacob et al.: *Quantization and training of neural networks for efficient integer-arithmetic-only
    inference*, CVPR 2018, section 3.2, https://arxiv.org/abs/1712.05877.

    Args:

        model (nn.Module): The network, in evaluation mode.
        inputs (tuple): A few inputs.

    Returns:
        *int*: How many were folded.
    """
    expected = scores_per_class(model(*inputs))
    return sum(_folded(model, *pair, inputs, expected) for pair in _pairs(model, inputs))


def _pairs(model: nn.Module, inputs: ModelInputs) -> list[tuple[nn.Module, nn.Module]]:
    """Layers and the normalizations that read just what they made, each of which runs once."""
    # Tensors are held, or others would get their places in memory, and with these their ids.
    made: dict[int, tuple[nn.Module, Tensor]] = {}
    pairs: list[tuple[nn.Module, nn.Module]] = []
    ran: list[nn.Module] = []

    def hook(module: nn.Module, read: ModelInputs, output: Tensor) -> None:
        ran.append(module)
        if isinstance(module, _BatchNorm):
            layer, _ = made.get(id(read[0]), (None, None))
            if layer is not None and module.running_mean is not None:
                pairs.append((layer, module))
        elif "weight" in module._parameters:  # and not computed from others
            made[id(output)] = module, output

    with hooked([m for m in model.modules() if isinstance(m, (_BatchNorm, *_FUSE))], hook):
        model(*inputs)
    return [pair for pair in pairs if all(ran.count(module) == 1 for module in pair)]


def _folded(
    model: nn.Module, layer: nn.Module, norm: nn.Module, inputs: ModelInputs, expected: Tensor
) -> bool:
    """Fold a normalization unless that changes what the network puts out."""
    fuse = next(fuse for kind, fuse in _FUSE.items() if isinstance(layer, kind))
    before, identity = (layer.weight, layer.bias), nn.Identity()
    fused = fuse(layer, norm)
    layer.weight, layer.bias = fused.weight, fused.bias
    replace_module(model, norm, identity)
    try:  # a model may read of its normalization what an identity does not have
        if bool(alike(scores_per_class(model(*inputs)), expected)):
            return True
    except Exception:
        pass
    layer.weight, layer.bias = before
    replace_module(model, identity, norm)
    return False
