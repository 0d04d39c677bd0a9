"""Where single filters look: their activations, and the gradients of these, in the image's size."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.devices import device_of, on_device, ordinary
from captum_classfilters._core.guard import model_left_as_found
from captum_classfilters._core.layers import CHECKPOINTED, find_layer
from captum_classfilters._core.outputs import at_least_float32
from captum_classfilters._core.taps import LayerTap, tapping


@arguments_checked
def filter_activation_maps(
    model: nn.Module,
    layer: nn.Module | str,
    images: Tensor,
    filters: Tensor | None = None,
    *,
    size: tuple[int, int] | None = None,
    channel_dim: int | None = None,
) -> Tensor:
    r"""
    Maps of chosen filters, interpolated to the image's size, for all images at once.

    These are Liang et al.'s *ActivMaps* (https://arxiv.org/abs/2007.08194) before their threshold.
    The map of a whole class, :math:`\sum_k w_{ck} a_k` (Zhou et al.'s CAM), is what
    :class:`ClassFilterSaliency` with ``mode="activation_map"`` gives, for selected filters or for all.

    Args:

        model (nn.Module): The model.
        layer (nn.Module or str): A layer with maps (N, K, h, w), or its dotted name.
        images (Tensor): Shape (N, ..., H, W), the model's input.
        filters (Tensor, optional): Indices of filters, shape (n,) for all images alike, or (N, n). By
                    default every filter.
                    Default: None
        size (tuple of int, optional): Height and width of the maps; the image's by default.
                    Default: None
        channel_dim (int, optional): Axis of the filters, where it cannot be told from the layer.
                    Default: None

    Returns:
        *Tensor* of shape (N, n, H, W), in units of the activation.

    Raises:
        ValueError: The layer has no maps, does not run exactly once, or lacks a filter.

    Examples::

        >>> import torch
        >>> from captum_classfilters.attr import filter_activation_maps
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(128, 2))
        >>> maps = filter_activation_maps(net, "0", torch.rand(2, 3, 6, 6), torch.tensor([7, 1, 2]))
        >>> maps.shape
        torch.Size([2, 3, 6, 6])
    """
    with torch.no_grad(), model_left_as_found(model, evaluation=True):
        maps = _maps(model, layer, on_device(images, device_of(model)), channel_dim)
    chosen = _chosen(maps, filters)
    own = maps.gather(1, chosen[:, :, None, None].expand(-1, -1, *maps.shape[2:]))
    size = (images.shape[-2], images.shape[-1]) if size is None else size
    return F.interpolate(own, size=size, mode="bilinear", align_corners=False)


@arguments_checked
def filter_gradient_maps(
    model: nn.Module,
    layer: nn.Module | str,
    images: Tensor,
    filters: Tensor,
    *,
    blur: float | None = None,
    channel_dim: int | None = None,
) -> Tensor:
    r"""
    How strongly each pixel moves a filter's mean activation, for chosen filters of all images.

    .. math:: g_k(p) = \Big( \sum_{\text{colors } i}
              \big( \partial \bar a_k / \partial x_{ip} \big)^2 \Big)^{1/2}

    divided by its root mean square over the pixels, then blurred: Liang et al.'s *GradMaps*
    (https://arxiv.org/abs/2007.08194), whose threshold is 1. It takes one backward pass for each
    of the n filters and any number of images.

    Args:

        model (nn.Module): The model.
        layer (nn.Module or str): The layer, or its dotted name.
        images (Tensor): Shape (N, colors, H, W), the model's input.
        filters (Tensor): Indices of filters, shape (n,) for all images alike, or (N, n).
        blur (float, optional): Standard deviation of a Gaussian blur, in pixels; the authors take
                    30 at 128 pixels.
                    Default: None
        channel_dim (int, optional): Axis of the filters, where it cannot be told from the layer.
                    Default: None

    Returns:
        *Tensor* of shape (N, n, H, W), without unit. A filter without gradient has a map of zeros.

    Raises:
        ValueError: The images have another shape, the layer does not run exactly once, lacks a
                    filter or has no gradient towards the images, or ``blur`` is not positive.
    """
    if images.dim() != 4:
        raise ValueError(f"images have shape {tuple(images.shape)}; expected (N, colors, H, W).")
    if blur is not None and not blur > 0:
        raise ValueError(f"blur={blur} must be positive, in pixels; None leaves the maps sharp.")
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        model_left_as_found(model, evaluation=True, freeze=True),
    ):
        points = on_device(images.detach(), device_of(model)).clone().requires_grad_()
        means = _maps(model, layer, points, channel_dim, any_layout=True)
        means = means.flatten(2).mean(2) if means.dim() > 2 else means
        chosen = _chosen(means, filters)
        gradients = []
        for column in range(chosen.shape[1]):
            one = means.gather(1, chosen[:, column : column + 1]).sum()
            last = column + 1 == chosen.shape[1]
            (gradient,) = torch.autograd.grad(one, points, retain_graph=not last)
            gradients.append(at_least_float32(gradient).norm(dim=1))
    maps = torch.stack(gradients, 1)
    root = maps.square().mean((2, 3), keepdim=True).sqrt()
    maps = maps / torch.where(root > 0, root, torch.ones_like(root))
    return maps if blur is None else blurred(maps, blur)


def blurred(maps: Tensor, deviation: float) -> Tensor:
    r"""
    Maps under a Gaussian blur, reflected at the border.

    Args:

        maps (Tensor): Shape (N, H, W) or (N, n, H, W).
        deviation (float): Standard deviation, in pixels; the kernel ends at three deviations.

    Returns:
        *Tensor* of the same shape.
    """
    from scipy.ndimage import gaussian_filter  # takes longer to import than the methods

    deviations = [0.0] * (maps.dim() - 2) + [deviation, deviation]
    smooth = gaussian_filter(maps.detach().cpu().numpy(), deviations, mode="mirror", truncate=3)
    return torch.from_numpy(smooth).to(maps)


def _maps(
    model: nn.Module,
    layer: nn.Module | str,
    images: Tensor,
    channel_dim: int | None,
    any_layout: bool = False,
) -> Tensor:
    """The layer's output with the filters on axis 1."""
    module = find_layer(model, layer) if isinstance(layer, str) else layer
    kept: list[Tensor] = []

    def keep(tensor: Tensor, axis: int) -> Tensor:
        kept.append(tensor.movedim(axis, 1))
        return tensor.clone()  # what follows may write into the layer's tensor

    tap = LayerTap(model, module, channel_dim, react=keep)
    with tapping([tap]):
        model(images)
        tap.check(len(images))
    if torch.is_grad_enabled() and not kept[0].requires_grad:
        raise ValueError(
            f"No gradient of the layer {tap.name!r} reaches the images: the model runs it, or what "
            "stands before it, under torch.no_grad(), or detaches, quantizes or rounds there; "
            f"{CHECKPOINTED}."
        )
    if kept[0].dim() != 4 and not any_layout:
        raise ValueError(
            f"The layer {tap.name!r} puts out {tuple(kept[0].shape)} with its filters on axis 1; "
            "maps need (N, K, h, w)."
        )
    return kept[0]


def _chosen(maps: Tensor, filters: Tensor | None) -> Tensor:
    """Indices of filters for each image (N, n)."""
    number, width = maps.shape[:2]
    if filters is None:
        filters = torch.arange(width)
    if filters.dim() not in (1, 2) or filters.is_floating_point() or filters.dtype == torch.bool:
        raise ValueError(
            f"filters are {filters.dtype} of shape {tuple(filters.shape)}; expected indices (n,) or "
            "(N, n)."
        )
    if filters.dim() == 2 and len(filters) != number:
        raise ValueError(f"filters have {len(filters)} rows for {number} images.")
    if not filters.numel() or not 0 <= int(filters.min()) <= int(filters.max()) < width:
        raise ValueError(f"filters must name at least one of the layer's filters 0 to {width - 1}.")
    filters = ordinary(filters.to(maps.device, torch.int64))
    return filters if filters.dim() == 2 else filters.expand(number, -1)
