"""How much a filter is about color: from its weights, or from its response to gray images."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.batches import read_batches
from captum_classfilters._core.devices import sums_device
from captum_classfilters._core.layers import find_layer, layer_name
from captum_classfilters._core.taps import LayerTap, tapping
from captum_classfilters._core.types import Dataloader, ModelInputs, Unpack
from captum_classfilters._core.units import check_finite


@arguments_checked
def weight_chroma(weights: Tensor) -> Tensor:
    r"""
    Share of a first-layer filter's energy that is color and not brightness.

    At each place of the kernel the weights of red, green and blue are a vector; its part along
    (1, 1, 1) answers to brightness, the rest to color:

    .. math:: 1 - \frac{\sum_p (w_p \cdot u)^2}{\sum_p \lVert w_p \rVert^2}, \qquad
        u = (1, 1, 1) / \sqrt{3}

    Args:

        weights (Tensor): Shape (K, 3, ...), filters by colors by places.

    Returns:
        *Tensor* of shape (K,), float64, in [0, 1]; NaN for a filter without weights.

    Raises:
        ValueError: The weights do not read three colors.

    Examples::

        >>> import torch
        >>> from captum_classfilters.pruning import weight_chroma
        >>> gray, red_green = torch.ones(3, 1, 1), torch.tensor([1., -1., 0.]).reshape(3, 1, 1)
        >>> weight_chroma(torch.stack([gray, red_green]))
        tensor([0., 1.], dtype=torch.float64)
    """
    if weights.dim() < 2 or weights.shape[1] != 3:
        raise ValueError(
            f"The weights have shape {tuple(weights.shape)}; expected (K, 3, ...), those of a layer "
            "that reads red, green and blue."
        )
    weights = weights.detach().cpu().double()
    places = weights.flatten(2) if weights.dim() > 2 else weights[..., None]
    brightness = places.sum(1).square().sum(1) / 3
    energy = places.square().sum((1, 2))
    share = (1 - brightness / energy).clamp(0, 1)
    return torch.where(energy > 0, share, torch.full_like(share, torch.nan))


@arguments_checked
def response_chroma(
    model: nn.Module,
    layer: nn.Module | str,
    dataloader: Dataloader,
    *,
    top: int = 9,
    mean: Sequence[float] | None = None,
    standard_deviation: Sequence[float] | None = None,
    channel_dim: int | None = None,
    unpack: Unpack | None = None,
    device: torch.device | str | None = None,
    show_progress: bool = True,
) -> Tensor:
    r"""
    Share of a filter's strongest responses that goes when the image turns gray; for any layer.

    .. math:: 1 - \frac{\sum_j a(\mathrm{gray}(x_j))}{\sum_j a(x_j)}

    over the images :math:`x_j` of the filter's largest activations, :math:`a` the activation at the
    place of the largest. What a place responds to is its patch of the image, so an image in gray
    has the patch in gray. Gray is the mean of red, green and blue.

    Args:

        model (nn.Module): The model; its first input are images (N, 3, H, W).
        layer (nn.Module or str): The layer, or its dotted name; best behind its activation.
        dataloader (iterable): Batches of images, or pairs of (images, labels).
        top (int): Number of images for each filter.
                    Default: 9
        mean (sequence of float, optional): Means that the images were normalized with, so that
                    gray is gray in the original colors.
                    Default: None
        standard_deviation (sequence of float, optional): Likewise.
                    Default: None
        channel_dim (int, optional): Axis of the filters, where it cannot be told from the layer.
                    Default: None
        unpack (Callable, optional): From a batch of another kind to the pair (inputs, labels).
                    Default: None
        device (torch.device or str, optional): Where the batches go; by default where the model is.
        show_progress (bool): Show a progress bar over the batches.
                    Default: True

    Returns:
        *Tensor* of shape (K,), float64: 0 where color does not matter, 1 where gray images get no
        response, negative where they get more; NaN for a filter that never responds.

    Raises:
        ValueError: The loader is empty, images have no three colors, or ``top`` is not positive.
    """
    if top < 1:
        raise ValueError(f"top={top} must be at least 1.")
    module = find_layer(model, layer) if isinstance(layer, str) else layer
    strongest: tuple[Tensor, Tensor] | None = None
    with read_batches(
        model,
        dataloader,
        "gray images",
        device=device,
        unpack=unpack,
        labeled=False,
        show_progress=show_progress,
    ) as batches:
        for batch in batches:
            images, *others = batch.inputs
            responses = [
                _maps(model, module, (shown, *others), channel_dim)
                for shown in (images, grayed(images, mean, standard_deviation))
            ]
            finite = [maps.flatten(1).isfinite().all(1) for maps in responses]
            check_finite(batches, batch, layer_name(model, module), finite[0] & finite[1])
            largest, place = responses[0].max(2)
            gray = responses[1].gather(2, place[..., None])[..., 0]
            strongest = _strongest(strongest, (largest, gray), top)
    assert strongest is not None  # the loader has an image
    color, gray = (responses.sum(0).cpu() for responses in strongest)
    share = 1 - gray / color
    return torch.where(color > 0, share, torch.full_like(share, torch.nan))


def _maps(
    model: nn.Module, layer: nn.Module, inputs: ModelInputs, channel_dim: int | None
) -> Tensor:
    """What a layer puts out, as maps (N, K, P) in float64 where sums are kept."""
    maps: list[Tensor] = []

    def keep(tensor: Tensor, _axis: int) -> None:
        kept = tap.maps_of(tensor).detach()
        maps.append(kept.to(sums_device(kept.device), torch.float64, copy=True))

    tap = LayerTap(model, layer, channel_dim, react=keep)
    with tapping([tap]):
        model(*inputs)
    tap.check(len(inputs[0]))
    return maps[0]


def grayed(
    images: Tensor,
    mean: Sequence[float] | None = None,
    standard_deviation: Sequence[float] | None = None,
) -> Tensor:
    """Images without color: every color the mean of the three.

    Args:

        images (Tensor): Shape (N, 3, H, W).
        mean (sequence of float, optional): Means that the images were normalized with.
        standard_deviation (sequence of float, optional): Likewise.

    Returns:
        *Tensor* of the images' shape.

    Raises:
        ValueError: The images do not have three colors.
    """
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(
            f"The images have shape {tuple(images.shape)}; expected (N, 3, H, W): without red, "
            "green and blue there is no color to remove."
        )
    shape = (1, 3, 1, 1)
    shift = torch.tensor([0.0] * 3 if mean is None else list(mean)).to(images).reshape(shape)
    scale = [1.0] * 3 if standard_deviation is None else list(standard_deviation)
    spread = torch.tensor(scale).to(images).reshape(shape)
    original = images * spread + shift
    return (original.mean(1, keepdim=True).expand_as(original) - shift) / spread


def _strongest(
    before: tuple[Tensor, Tensor] | None, added: tuple[Tensor, Tensor], top: int
) -> tuple[Tensor, Tensor]:
    """The largest responses so far of each filter (T, K), with those to the gray images."""
    color, gray = (
        added if before is None else (torch.cat(pair) for pair in zip(before, added, strict=True))
    )
    values, index = color.topk(min(top, len(color)), dim=0)
    return values, gray.gather(0, index)
