"""Signals along singular directions: one forward pass for a batch and all layers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from captum_classfilters._core.captum import format_tensor_into_tuples
from captum_classfilters._core.layers import check_runs, find_layer, layer_name, only_tensor
from captum_classfilters.spectral.layer_svd import LayerSVD
from captum_classfilters.spectral.model_svd import ModelSVD, model_svd

SignalReduction = Literal["mean", "max", "min", "abs_mean", "l2"]
# Means are taken before the projection, which is linear; the others need the maps of all directions.
_OVER_POSITIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "max": lambda maps: maps.amax(2),
    "min": lambda maps: maps.amin(2),
    "abs_mean": lambda maps: maps.abs().mean(2),
    "l2": lambda maps: maps.norm(dim=2),
}


def direction_signals(
    model: nn.Module,
    inputs: Tensor | tuple[Tensor, ...],
    layers: Sequence[str | nn.Module] | None = None,
    *,
    svds: Mapping[str, LayerSVD] | None = None,
    reduction: SignalReduction | None = "mean",
) -> dict[str, Tensor]:
    r"""
    Signals of a batch along the singular directions of any number of layers, in one forward pass.

    The signals :math:`P = U^\top (y - b)` are taken inside the hooks, before a ReLU in place can
    overwrite the layer's output *y*; hooks are removed afterwards. The mean over positions is
    taken before the projection and costs next to nothing.

    Args:

        model (nn.Module): The model, run as it is, without gradients.
        inputs (Tensor or tuple[Tensor, ...]): Input of the model, N examples first.
        layers (sequence, optional): Layers, or their dotted names; by default those of ``svds``.
                    Of a whole model's decompositions, given or computed here, these are the layers
                    that run exactly once.
                    Default: None
        svds (mapping, optional): Decompositions by name, as from :func:`model_svd`, with a cache
                    or a rank say. By default they are computed here.
                    Default: None
        reduction (str, optional): Over positions: ``"mean"``, ``"max"``, ``"min"``,
                    ``"abs_mean"``, ``"l2"`` (the norm), or None for the whole maps.
                    Default: "mean"

    Returns:
        *dict* of layer names and signals: (N, R), or (N, R, ...) maps as the layer has them ((N, ...,
        R) for a linear layer), in units of the layer's output.

    Raises:
        ValueError: A layer is unknown, cannot be decomposed, has no decomposition in ``svds``, or
                    does not run exactly once.

    Examples::

        >>> import torch
        >>> from captum_classfilters.spectral import direction_signals
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(inplace=True), torch.nn.Flatten(),
        ...     torch.nn.Linear(128, 2))
        >>> signals = direction_signals(net, torch.rand(4, 3, 6, 6))
        >>> {name: tuple(values.shape) for name, values in signals.items()}
        {'0': (4, 8), '3': (4, 2)}
    """
    if reduction is not None and reduction != "mean" and reduction not in _OVER_POSITIONS:
        known = ", ".join(("mean", *_OVER_POSITIONS))
        raise ValueError(f"reduction={reduction!r}; choose one of {known}, or None for maps.")
    chosen = svds if svds is not None else model_svd(model, layers)
    names = list(chosen)
    if layers is not None and svds is not None:
        names = [one if isinstance(one, str) else layer_name(model, one) for one in layers]
    missing = [name for name in names if name not in chosen]
    if missing:
        raise ValueError(f"svds holds no decomposition of {', '.join(map(repr, missing))}.")
    anything = layers is None and (svds is None or isinstance(svds, ModelSVD))
    found: dict[str, Tensor] = {}
    runs = dict.fromkeys(names, 0)

    def hook(name: str) -> Callable[..., None]:
        def take(module: nn.Module, _inputs: Any, output: Any) -> None:
            runs[name] += 1
            if runs[name] == 1:
                found[name] = _signals(chosen[name], module, only_tensor(output, name), reduction)

        return take

    modules = {name: _module(model, chosen, name) for name in names}
    if not anything and None in modules.values():
        name = next(name for name, module in modules.items() if module is None)
        raise ValueError(
            f"{name!r} is a projection inside a MultiheadAttention: it has a spectrum, but no output "
            "of its own to take signals from."
        )
    handles = [
        module.register_forward_hook(hook(name))
        for name, module in modules.items()
        if module is not None
    ]
    try:
        with torch.no_grad():
            model(*format_tensor_into_tuples(inputs))
    finally:
        for handle in handles:
            handle.remove()
    if not anything:
        for name in names:
            check_runs(name, runs[name])
    return {name: found[name] for name in names if runs[name] == 1}


def _module(model: nn.Module, svds: Mapping[str, LayerSVD], name: str) -> nn.Module | None:
    """The layer of that name; None for a projection, which has no output of its own."""
    if not isinstance(svds, ModelSVD):
        return find_layer(model, name)
    module = svds.module(name)
    return None if isinstance(module, nn.MultiheadAttention) else module


def _signals(
    svd: LayerSVD, module: nn.Module, output: Tensor, reduction: SignalReduction | None
) -> Tensor:
    axis = svd.channel_axis
    if reduction == "mean" and output.dim() > 2:
        # Positions of size one stay, so that the layout is still the layer's.
        over = [dim for dim in range(1, output.dim()) if dim != axis % output.dim()]
        output = output.mean(over, keepdim=True)
    maps = svd.signals(unbiased(output, module, axis))
    if reduction is None:
        return maps
    positions = maps.movedim(axis, 1).reshape(len(maps), len(svd), -1)
    return positions[:, :, 0] if reduction == "mean" else _OVER_POSITIONS[reduction](positions)


def unbiased(output: Tensor, module: nn.Module, axis: int) -> Tensor:
    """A layer's output without its bias."""
    bias = getattr(module, "bias", None)
    if not isinstance(bias, Tensor):
        return output
    shape = [1] * output.dim()
    shape[axis] = -1
    return output - bias.detach().reshape(shape)
