"""How much a filter is about colour: from its weights, or from its response to grey images."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from captum_classfilters._core.guard import model_left_as_found
from captum_classfilters._core.layers import (
    check_batch,
    check_runs,
    filter_axis,
    find_layer,
    layer_name,
    only_tensor,
    positions_last,
)


def weight_chroma(weights: Tensor) -> Tensor:
    r"""
    Share of a first-layer filter's energy that is colour and not brightness.

    At each place of the kernel the weights of red, green and blue are a vector; its part along
    (1, 1, 1) answers to brightness, the rest to colour:

    .. math:: 1 - \frac{\sum_p (w_p \cdot u)^2}{\sum_p \lVert w_p \rVert^2}, \qquad
        u = (1, 1, 1) / \sqrt{3}

    Args:

        weights (Tensor): Shape (K, 3, ...), filters by colours by places.

    Returns:
        *Tensor* of shape (K,), float64, in [0, 1]; NaN for a filter without weights.

    Raises:
        ValueError: The weights do not read three colours.

    Examples::

        >>> import torch
        >>> from captum_classfilters.pruning import weight_chroma
        >>> grey, red_green = torch.ones(3, 1, 1), torch.tensor([1., -1., 0.]).reshape(3, 1, 1)
        >>> weight_chroma(torch.stack([grey, red_green]))
        tensor([0., 1.], dtype=torch.float64)
    """
    if weights.dim() < 2 or weights.shape[1] != 3:
        raise ValueError(
            f"The weights have shape {tuple(weights.shape)}; expected (K, 3, ...), those of a layer "
            "that reads red, green and blue."
        )
    places = (
        weights.detach().double().flatten(2) if weights.dim() > 2 else weights.double()[..., None]
    )
    brightness = places.sum(1).square().sum(1) / 3
    energy = places.square().sum((1, 2))
    share = (1 - brightness / energy).clamp(0, 1)
    return torch.where(energy > 0, share, torch.full_like(share, torch.nan))


def response_chroma(
    model: nn.Module,
    layer: nn.Module | str,
    dataloader: Iterable[Any],
    *,
    top: int = 9,
    mean: Sequence[float] | None = None,
    standard_deviation: Sequence[float] | None = None,
    channel_dim: int | None = None,
    show_progress: bool = True,
) -> Tensor:
    r"""
    Share of a filter's strongest responses that goes when the image turns grey; for any layer.

    .. math:: 1 - \frac{\sum_j a(\mathrm{grey}(x_j))}{\sum_j a(x_j)}

    over the images :math:`x_j` of the filter's largest activations, :math:`a` the activation at the
    place of the largest. What a place responds to is its patch of the image, so greying the image
    greys the patch. Grey is the mean of red, green and blue.

    Args:

        model (nn.Module): The model; its first input are images (N, 3, H, W).
        layer (nn.Module or str): The layer, or its dotted name; best behind its activation.
        dataloader (iterable): Batches of images, or pairs of (images, labels).
        top (int): Number of images for each filter.
                    Default: 9
        mean (sequence of float, optional): Means that the images were normalised with, so that
                    grey is grey in the original colours.
                    Default: None
        standard_deviation (sequence of float, optional): Likewise.
                    Default: None
        channel_dim (int, optional): Axis of the filters, where it cannot be told from the layer.
                    Default: None
        show_progress (bool): Show a progress bar over the batches.
                    Default: True

    Returns:
        *Tensor* of shape (K,), float64: 0 where colour does not matter, 1 where grey images get no
        response, negative where they get more; NaN for a filter that never responds.

    Raises:
        ValueError: The loader is empty, images have no three colours, or ``top`` is not positive.
    """
    if top < 1:
        raise ValueError(f"top={top} must be at least 1.")
    module = find_layer(model, layer) if isinstance(layer, str) else layer
    name, maps = layer_name(model, module), list[Tensor]()

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        tensor = only_tensor(output, name).detach()
        maps.append(positions_last(tensor, filter_axis(module, tensor, channel_dim)).clone())

    parameter = next(model.parameters(), None)
    colour, grey = torch.empty(0), torch.empty(0)
    bar = tqdm(dataloader, desc="grey images", unit="batch", disable=not show_progress)
    handle = module.register_forward_hook(hook)
    try:
        with model_left_as_found(model, evaluation=True), torch.no_grad():
            for batch in bar:
                images = batch[0] if isinstance(batch, (tuple, list)) else batch
                images = images if parameter is None else images.to(parameter.device)
                responses = []
                for shown in (images, greyed(images, mean, standard_deviation)):
                    maps.clear()
                    model(shown)
                    check_runs(name, len(maps))
                    check_batch(name, len(maps[0]), len(images))
                    responses.append(maps[0].double().cpu())
                largest, place = responses[0].max(2)
                without = responses[1].gather(2, place[..., None])[..., 0]
                colour, grey = _best(colour, grey, largest, without, top)
    finally:
        handle.remove()
    if not len(colour):
        raise ValueError("The data loader is empty: there are no images.")
    total = colour.sum(0)
    index = 1 - grey.sum(0) / total
    return torch.where(total > 0, index, torch.full_like(index, torch.nan))


def greyed(
    images: Tensor,
    mean: Sequence[float] | None = None,
    standard_deviation: Sequence[float] | None = None,
) -> Tensor:
    """Images without colour: every colour the mean of the three.

    Args:

        images (Tensor): Shape (N, 3, H, W).
        mean (sequence of float, optional): Means that the images were normalised with.
        standard_deviation (sequence of float, optional): Likewise.

    Returns:
        *Tensor* of the images' shape.

    Raises:
        ValueError: The images do not have three colours.
    """
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(
            f"The images have shape {tuple(images.shape)}; expected (N, 3, H, W): without red, "
            "green and blue there is no colour to remove."
        )
    shape = (1, 3, 1, 1)
    shift = images.new_tensor([0.0] * 3 if mean is None else list(mean)).reshape(shape)
    scale = [1.0] * 3 if standard_deviation is None else list(standard_deviation)
    spread = images.new_tensor(scale).reshape(shape)
    original = images * spread + shift
    return (original.mean(1, keepdim=True).expand_as(original) - shift) / spread


def _best(
    colour: Tensor, grey: Tensor, more_colour: Tensor, more_grey: Tensor, top: int
) -> tuple[Tensor, Tensor]:
    """The largest responses so far of each filter (T, K), with those to the grey images."""
    if len(colour):
        more_colour = torch.cat([colour, more_colour])
        more_grey = torch.cat([grey, more_grey])
    values, index = more_colour.topk(min(top, len(more_colour)), dim=0)
    return values, more_grey.gather(0, index)
