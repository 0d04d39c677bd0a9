"""Max-sensitivity of filter scores, and the form of an explanation that Captum's metric needs."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from captum.attr import GuidedGradCam, LayerAttribution, NeuronAttribution, NoiseTunnel
from captum.metrics import sensitivity_max
from torch import Tensor, nn

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.captum import TargetType, default_perturb_func
from captum_classfilters._core.captum_layers import captum_reads_layer, check_reads_layer
from captum_classfilters._core.guard import model_left_as_found
from captum_classfilters._core.layers import (
    attribution_axis,
    module_of,
    only_tensor,
    positions_last,
)
from captum_classfilters._core.outputs import at_least_float32
from captum_classfilters._core.tables import short_repr
from captum_classfilters._core.taps import tapped
from captum_classfilters._core.types import Attributions, ModelInputs
from captum_classfilters._core.units import aggregated
from captum_classfilters.attr import ClassFilterSaliency
from captum_classfilters.gate_space import FilterGate
from captum_classfilters.metrics.inputs import at_model, taken_at, with_classes_as_targets

Explanation = Callable[..., tuple[Tensor, ...]]


def explanation_for_sensitivity(method: object) -> Explanation:
    r"""
    A layer attribution in the form that ``captum.metrics.sensitivity_max`` needs.

    Captum hands its reference call a *tuple* of inputs and iterates over what comes back. A layer
    method answers with a bare tensor, which is then taken apart image by image: most shapes raise an
    error, and for single images of methods with one channel, such as Grad-CAM, the value is wrong without
    a word. The function returned here always answers with a tuple of detached, contiguous tensors,
    and is right for input attributions too.

    Args:

        method (Attribution or Callable): Any attribution of Captum or of this package, or its
                    ``attribute``.

    Returns:
        *Callable*: ``explanation(inputs, **options)`` returning a tuple of Tensors.

    Raises:
        TypeError: ``method`` is neither.

    Examples::

        >>> import torch
        >>> from captum.attr import LayerGradCam
        >>> from captum.metrics import sensitivity_max
        >>> from captum_classfilters.metrics import explanation_for_sensitivity
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        ...     torch.nn.Flatten(), torch.nn.Linear(8, 2))
        >>> explanation = explanation_for_sensitivity(LayerGradCam(net, net[1]))
        >>> sensitivity_max(explanation, torch.rand(4, 3, 6, 6), target=1).shape
        torch.Size([4])
    """
    attribute = getattr(method, "attribute", method)
    if not callable(attribute):
        raise TypeError(
            f"{type(method).__name__} is not an attribution; pass one, or its `attribute`."
        )

    def explain(inputs: object, **options: Any) -> tuple[Tensor, ...]:
        return tuple(part.detach().contiguous() for part in _tensors(attribute(inputs, **options)))

    return explain


def moved_a_little(inputs: Tensor | tuple[Tensor, ...], radius: float) -> tuple[Tensor, ...]:
    """Captum's perturbed inputs in the inputs' own type: it adds float32 to bfloat16 and float16."""
    given = inputs if isinstance(inputs, tuple) else (inputs,)
    return tuple(
        moved.to(own.dtype) if own.is_floating_point() else moved
        for moved, own in zip(default_perturb_func(given, radius), given, strict=True)
    )


@short_repr
@dataclass(frozen=True)
class FilterSensitivity:
    r"""
    How much filter scores move when their input moves a little.

    Args:

        overall (Tensor): Shape (N,). Largest change of an image's K scores, as a share of their
                    Euclidean norm.
        by_filter (Tensor): Shape (N, K). Largest change of each score, as a share of its own size.
    """

    overall: Tensor
    by_filter: Tensor


@arguments_checked
def filter_max_sensitivity(
    method: LayerAttribution,
    inputs: Tensor | tuple[Tensor, ...],
    *,
    target: TargetType = None,
    additional_forward_args: object = None,
    space: Literal["images", "gates"] = "images",
    perturb_radius: float = 0.02,
    n_perturb_samples: int = 10,
    max_examples_per_batch: int | None = None,
    seed: int = 0,
    **options: Any,
) -> FilterSensitivity:
    r"""
    Max-sensitivity of a layer method's filter scores, over all and for each filter at once.

    With :math:`s(x)` the K filter scores and :math:`\delta` drawn uniformly from a cube of half side
    r,

    .. math:: \mathrm{SENS}_{\max} = \max_{\delta} \frac{\lVert s(x + \delta) - s(x) \rVert}
                                                       {\lVert s(x) \rVert}

    (Yeh et al., NeurIPS 2019, https://arxiv.org/abs/1901.09392). ``captum.metrics.sensitivity_max``
    does the sampling; the figures for each filter are those of calling it on each filter's score in
    turn, from the same explanations.

    Args:

        method (LayerAttribution): Of this package or of Captum, with a layer of K filters; or an
                    attribution of one's own that has a ``layer``, or that returns scores (N, K).
        inputs (Tensor or tuple[Tensor, ...]): Input of the model, N examples first.
        target (int, tuple, Tensor or list, optional): In any of Captum's forms.
                    Default: None
        additional_forward_args (Any, optional): Further arguments of the forward function.
                    Default: None
        space (str): What moves: the ``"images"``, as usual, or the filters' ``"gates"`` about one.
                    Default: "images"
        perturb_radius (float): r, in units of the images or of the gates.
                    Default: 0.02
        n_perturb_samples (int): Draws for each image.
                    Default: 10
        max_examples_per_batch (int, optional): Captum's: images explained at once.
                    Default: None
        seed (int): Seed of the draws; the global random state is left as found.
                    Default: 0
        options: Further arguments of the method's ``attribute``.

    Returns:
        *FilterSensitivity*.

    Raises:
        ValueError: ``space`` is unknown, a number is out of range, the attributions have no
                    filters (the method explains the input, say), or a method of Captum cannot
                    read its layer.

    Examples::

        >>> import torch
        >>> from captum_classfilters import LayerFilterContribution
        >>> from captum_classfilters.metrics import filter_max_sensitivity
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        ...     torch.nn.Flatten(), torch.nn.Linear(8, 2))
        >>> method = LayerFilterContribution(net, net[1])
        >>> filter_max_sensitivity(method, torch.rand(4, 3, 6, 6), target=1).by_filter.shape
        torch.Size([4, 8])
    """
    if hasattr(_without_noise(method), "layer"):  # others may explain gates
        check_explains_layer(method)
    if space not in ("images", "gates"):
        raise ValueError(f"space={space!r}; choose 'images' or 'gates'.")
    if not perturb_radius > 0 or n_perturb_samples < 1:
        raise ValueError(
            f"perturb_radius={perturb_radius} must be above 0, and "
            f"n_perturb_samples={n_perturb_samples} at least 1."
        )
    model = module_of(method.forward_func)
    images, further, target = at_model(model, inputs, additional_forward_args, target)
    options = taken_at(model, options)
    method = with_classes_as_targets(method, (*images, *further), target)
    moved, explained = images, method.attribute
    if space == "gates":
        method, gate = _gated(method)
        # The gates are the first input, the images stand still behind them.
        further = (*images, *further)
        moved, explained = (gate.ones(len(images[0])),), _gates_first(method)
    seen: list[Tensor] = []

    def scores(inputs: object, **arguments: Any) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            seen.append(filter_scores_of(method, explained(inputs, **arguments)))
        return (seen[-1],)

    if further:
        options["additional_forward_args"] = further
    with model_left_as_found(model, evaluation=True), torch.inference_mode(False):
        check_reads_layer(method, (*moved, *further))
        torch.manual_seed(seed)
        with captum_reads_layer(method, (*moved, *further)):
            overall = sensitivity_max(
                scores,
                moved,
                perturb_func=moved_a_little,
                perturb_radius=perturb_radius,
                n_perturb_samples=n_perturb_samples,
                max_examples_per_batch=max_examples_per_batch,
                target=target,
                **options,
            )
    return FilterSensitivity(overall.cpu(), _by_filter(seen[0], seen[1:]).cpu())


def filter_scores_of(method: object, attributions: object) -> Tensor:
    r"""
    Filter scores (N, K) of a layer method's attributions: their sums over positions.

    Args:

        method (LayerAttribution): The method, of this package or of Captum.
        attributions (Tensor): What it returned for a layer of one tensor.

    Returns:
        *Tensor* of shape (N, K), detached; of half precision in float32, which holds the sums.

    Raises:
        ValueError: There are several tensors, or no filters: the method explains the input, say.
    """
    name = type(method).__name__
    if isinstance(attributions, (tuple, list)) and len(attributions) > 1:
        raise ValueError(
            f"{name} returned {len(attributions)} tensors; filter scores are those of one layer that "
            "puts out one tensor."
        )
    tensor = only_tensor(attributions, name).detach()
    inner = _without_noise(method)
    if tensor.dim() > 2 or hasattr(inner, "layer"):  # others may explain gates (N, K)
        check_explains_layer(inner)
    if tensor.dim() == 2:
        return at_least_float32(tensor).contiguous()
    if not hasattr(inner, "layer"):
        raise ValueError(
            f"{name} has no attribute 'layer', so the filters of its attributions "
            f"{tuple(tensor.shape)} cannot be told; return one score for each filter, (N, K)."
        )
    if not isinstance(inner.layer, nn.Module):
        raise ValueError(f"{name} has a list of layers; take them one by one.")
    return aggregated(positions_last(tensor, attribution_axis(inner, tensor)), "sum").contiguous()


def check_explains_layer(method: object) -> None:
    """Raise for a method that is known to explain the input; some have a layer, through which they do.
    One that is neither Captum's nor ours is believed."""
    inner = _without_noise(method)
    of_input = isinstance(inner, (ClassFilterSaliency, GuidedGradCam, NeuronAttribution))
    captums = type(inner).__module__.startswith("captum.")
    if of_input or (captums and not isinstance(inner, LayerAttribution)):
        raise ValueError(
            f"{type(inner).__name__} is no LayerAttribution: it explains the model's input, whose "
            "channels are not filters. explanation_for_sensitivity takes it to "
            "captum.metrics.sensitivity_max."
        )


def _without_noise(method: object) -> object:
    """The method that a NoiseTunnel smooths, which has the layer."""
    while isinstance(method, NoiseTunnel):
        method = method.attribution_method
    return method


def scores_filters(method: object, attributions: object, inputs: ModelInputs) -> bool:
    """Whether a layer method has one value for each place of its layer; Grad-CAM has one map for all
    filters. The layer is run once to see."""
    layer = getattr(method, "layer", None)
    if not isinstance(method, LayerAttribution) or not isinstance(layer, nn.Module):
        return False
    if not isinstance(attributions, Tensor):
        return False
    shapes: list[torch.Size] = []

    def note(value: object) -> None:
        shapes.append(only_tensor(value, type(layer).__name__).shape)

    model = module_of(method.forward_func, [layer])
    with model_left_as_found(model, evaluation=True), torch.no_grad():
        check_reads_layer(method, inputs)
        with tapped(layer, note):
            method.forward_func(*inputs)
    return bool(shapes) and attributions.shape[1:] == shapes[0][1:]


def _by_filter(reference: Tensor, perturbed: list[Tensor]) -> Tensor:
    size = reference.abs()
    size = torch.where(size == 0, torch.ones_like(size), size)  # as Captum does
    # Captum repeats each image as often as fits a batch, its copies side by side.
    changes = [
        (moved.reshape(len(reference), -1, reference.shape[1]) - reference[:, None]).abs().amax(1)
        for moved in perturbed
    ]
    return torch.stack(changes).amax(0) / size


def _gated(method: LayerAttribution) -> tuple[LayerAttribution, FilterGate]:
    """A copy of a layer method that explains the gated model, and the gate."""
    layer = getattr(method, "layer", None)
    if not isinstance(layer, nn.Module):
        raise ValueError("space='gates' needs a layer method with a single layer.")
    gated = copy.copy(method)
    gate = FilterGate(method.forward_func, layer, channel_dim=getattr(method, "channel_dim", None))
    gated.forward_func = gate
    if hasattr(gated, "model"):  # as Captum's methods call it that hook the whole model
        gated.model = gate
    return gated, gate


def _gates_first(method: LayerAttribution) -> Callable[..., Attributions]:
    """`attribute` with the gates as its only input and the images as further arguments."""

    def attribute(
        gates: Tensor | tuple[Tensor, ...], additional_forward_args: ModelInputs, **options: Any
    ) -> Attributions:
        gates = gates[0] if isinstance(gates, tuple) else gates
        return method.attribute((gates, *additional_forward_args), **options)

    return attribute


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in value for tensor in _tensors(part)]
