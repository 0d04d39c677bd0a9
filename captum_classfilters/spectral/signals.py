"""Signals along singular directions: one forward pass for a batch and all layers."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from captum_classfilters._core.batches import num_images
from captum_classfilters._core.captum import format_tensor_into_tuples
from captum_classfilters._core.devices import device_of, on_device
from captum_classfilters._core.guard import model_left_as_found
from captum_classfilters._core.layers import find_layer, layer_name
from captum_classfilters._core.taps import tapping
from captum_classfilters._core.units import Aggregate, UnitTap, aggregated, check_aggregate
from captum_classfilters.spectral.layer_svd import LayerSVD
from captum_classfilters.spectral.model_svd import ModelSVD, model_svd


def direction_signals(
    model: nn.Module,
    inputs: Tensor | tuple[Tensor, ...],
    layers: Sequence[str | nn.Module] | None = None,
    *,
    svds: Mapping[str, LayerSVD] | None = None,
    aggregate: Aggregate | None = "mean",
) -> dict[str, Tensor]:
    r"""
    Signals of a batch along the singular directions of any number of layers, in one forward pass.

    The signals :math:`P = U^\top (y - b)` are taken inside the hooks, before a ReLU in place can
    overwrite the layer's output *y*; hooks are removed afterwards. The mean over positions is
    taken before the projection and costs next to nothing.

    Args:

        model (nn.Module): The model. It runs in evaluation mode and is left as found.
        inputs (Tensor or tuple[Tensor, ...]): Input of the model, N examples first.
        layers (sequence, optional): Layers, or their dotted names; by default those of ``svds``.
                    Of a whole model's decompositions, given or computed here, these are the layers
                    that run exactly once, with one row for each example.
                    Default: None
        svds (mapping, optional): Decompositions by name, as from :func:`model_svd`, with a cache
                    or a rank for example. By default they are computed here.
                    Default: None
        aggregate (str, optional): Over positions, as in
                    :func:`~captum_classfilters.identify.unit_scores`, or None for the whole maps.
                    Default: "mean"

    Returns:
        *dict* of layer names and signals: (N, R), or (N, R, ...) maps as the layer has them ((N, ...,
        R) for a linear layer), in units of the layer's output, where the model is.

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
    if aggregate is not None:
        check_aggregate(aggregate)
    chosen = svds if svds is not None else model_svd(model, layers)
    names = list(chosen)
    if layers is not None and svds is not None:
        names = [layer if isinstance(layer, str) else layer_name(model, layer) for layer in layers]
    missing = [name for name in names if name not in chosen]
    if missing:
        raise ValueError(f"svds holds no decomposition of {', '.join(map(repr, missing))}.")
    anything = layers is None and (svds is None or isinstance(svds, ModelSVD))
    taps = []
    for name in names:
        module = _module(model, chosen, name)
        if module is not None:
            taps.append(UnitTap(model, module, directions=chosen[name]))
            taps[-1].average_first = aggregate == "mean"
            if aggregate is not None:
                taps[-1].reduce = lambda maps: (aggregated(maps, aggregate),)
        elif not anything:
            raise ValueError(
                f"{name!r} is a projection inside a MultiheadAttention: it has a spectrum, but no "
                "output of its own to take signals from."
            )
    values = on_device(format_tensor_into_tuples(inputs), device_of(model))
    with model_left_as_found(model, evaluation=True), torch.no_grad(), tapping(taps):
        model(*values)
    size = num_images(values)
    if anything:
        taps = [tap for tap in taps if list(tap.rows.values()) == [[size]]]
    for tap in taps:
        tap.check(size)
    return {tap.name: _like_layer(tap) if aggregate is None else tap.seen[0] for tap in taps}


def _module(model: nn.Module, svds: Mapping[str, LayerSVD], name: str) -> nn.Module | None:
    """The layer of that name; None for a projection, which has no output of its own."""
    if not isinstance(svds, ModelSVD):
        return find_layer(model, name)
    module = svds.module(name)
    return None if isinstance(module, nn.MultiheadAttention) else module


def _like_layer(tap: UnitTap) -> Tensor:
    """Maps (N, R, P) in the layer's own layout."""
    maps = tap.seen[0]
    axis = -1 if isinstance(tap.module, nn.Linear) else 1
    return maps.reshape(*maps.shape[:2], *tap.positions).movedim(1, axis)
