"""Our methods, and Captum's, as explanation functions of Quantus."""

from collections.abc import Callable
from typing import Any

import numpy
import torch
from captum.attr import Attribution, LayerAttribution
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from captum_classfilters._core.captum_layers import captum_reads_layer
from captum_classfilters._core.devices import device_of
from captum_classfilters._core.layers import attribution_axis
from captum_classfilters._core.outputs import at_least_float32
from captum_classfilters.metrics.explained import check_is_function
from captum_classfilters.metrics.filter_sensitivity import scores_filters
from captum_classfilters.metrics.inputs import with_classes_as_targets


def quantus_explanation(
    make_method: Callable[[nn.Module], Attribution], **options: Any
) -> Callable[..., NDArray[numpy.floating]]:
    r"""
    An ``explain_func`` for the metrics of Quantus.

    Quantus (Hedström et al., JMLR 2023, https://arxiv.org/abs/2202.06861) hands its explanation
    function the model, sometimes with other weights, and arrays of images and targets, and expects an
    array of the images' size. Layer attributions are summed over filters and interpolated to it. The
    method is made anew for each call, so that metrics which randomize the model explain what they
    randomized.

    Args:

        make_method (Callable): Makes the method for a model, such as
                    ``lambda model: LayerFilterContribution(model, "layer3")``.
        options: Further arguments of the method's ``attribute``.

    Returns:
        *Callable*: ``explain(model, inputs, targets, **options)``, giving an array (N, channels, H, W),
        or (N, 1, H, W) for layer attributions.

    Examples::

        >>> import numpy, torch
        >>> from captum_classfilters import LayerFilterContribution
        >>> from captum_classfilters.metrics import quantus_explanation
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        ...     torch.nn.Flatten(), torch.nn.Linear(8, 2))
        >>> explain = quantus_explanation(lambda model: LayerFilterContribution(model, "1"))
        >>> explain(net, numpy.ones((4, 3, 6, 6), dtype="float32"), numpy.array([0, 1, 1, 0])).shape
        (4, 1, 6, 6)
        >>> # quantus.PixelFlipping()(net, x_batch, y_batch, explain_func=explain)
    """

    check_is_function(make_method)

    def explain(
        model: nn.Module,
        inputs: ArrayLike,
        targets: ArrayLike,
        device: torch.device | str | None = None,
        **further: Any,
    ) -> NDArray[numpy.floating]:
        place = device or device_of(model)
        weights = next((p for p in model.parameters() if p.is_floating_point()), None)
        dtype = torch.float32 if weights is None else weights.dtype
        images = torch.as_tensor(numpy.asarray(inputs)).to(place, dtype)
        classes = torch.as_tensor(numpy.asarray(targets)).to(place, torch.int64)
        method = with_classes_as_targets(make_method(model), (images,), classes)
        with captum_reads_layer(method, (images,)):
            raw = method.attribute(images, target=classes.reshape(-1), **{**options, **further})
        raw = raw[0] if isinstance(raw, tuple) else raw
        if isinstance(method, LayerAttribution):
            raw = _map(method, raw, images)
        raw = raw.detach().cpu()
        # NumPy has no bfloat16.
        result: NDArray[numpy.floating] = (
            raw.float() if raw.dtype == torch.bfloat16 else raw
        ).numpy()
        return result

    return explain


def _map(method: LayerAttribution, raw: Tensor, images: Tensor) -> Tensor:
    """One map (N, 1, H, W) of a layer attribution: its sum over filters, interpolated."""
    if raw.dim() != images.dim():
        raise ValueError(
            f"{type(method).__name__} returns {tuple(raw.shape)} at its layer, which has no positions "
            f"to interpolate to images {tuple(images.shape)}; choose a convolutional layer."
        )
    if scores_filters(method, raw, (images,)):
        raw = at_least_float32(raw).sum(attribution_axis(method, raw)).unsqueeze(1)
    mode = {3: "linear", 4: "bilinear", 5: "trilinear"}[images.dim()]
    return LayerAttribution.interpolate(raw, tuple(images.shape[2:]), mode)
