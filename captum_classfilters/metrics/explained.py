"""Attributions of either space brought into one form: a score for each pixel or for each filter."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from captum.attr import LayerAttribution
from torch import Tensor, nn

from captum_classfilters._core.captum import TargetType
from captum_classfilters._core.captum_layers import captum_reads_layer
from captum_classfilters._core.layers import layer_name, module_of
from captum_classfilters._core.names import kind_of
from captum_classfilters._core.outputs import class_scores
from captum_classfilters._core.rules import FilterRule
from captum_classfilters._core.score_reader import gives_probabilities
from captum_classfilters._core.types import Attributions, ForwardFunc, Keywords
from captum_classfilters.gate_space import FilterGate
from captum_classfilters.metrics.filter_sensitivity import filter_scores_of, scores_filters
from captum_classfilters.metrics.inputs import taken_at, with_classes_as_targets
from captum_classfilters.metrics.removals import check_names

PIXELS = "pixels"


def check_is_function(make_method: object) -> None:
    """Raise if a method is given where a function that makes one for a model is needed."""
    if not callable(make_method):
        raise ValueError(
            f"make_method is {kind_of(make_method)}; expected a function that makes a method for "
            'a model: lambda model: LayerFilterContribution(model, "layer3").'
        )


def explains(method: object, model: nn.Module) -> bool | None:
    """Whether a method's model has a part in common with a model; None where it hides its model."""
    function = getattr(method, "forward_func", None)
    own = function.model if isinstance(function, FilterGate) else module_of(function)
    if own is None:
        return None
    parts = set(map(id, model.modules()))
    return any(id(module) in parts for module in own.modules())


def explained_methods(methods: Mapping[str, object], model: nn.Module) -> "list[Explained]":
    """The methods under comparison, checked to explain this model."""
    if not isinstance(methods, Mapping) or not methods:
        raise ValueError(
            f"methods is {'empty' if not methods else f'a {type(methods).__name__}'}; expected "
            'attributions by name, {"saliency": Saliency(model)} for example.'
        )
    check_names(list(methods))
    result = []
    for name, value in methods.items():
        method, options = value if isinstance(value, tuple) else (value, {})
        if isinstance(method, type):
            raise ValueError(f"{name!r} is a class; pass {method.__name__}(model).")
        if not callable(getattr(method, "attribute", method)):
            raise ValueError(f"{name!r} is {kind_of(method)}; expected an attribution.")
        if explains(method, model) is False:
            raise ValueError(f"{name!r} explains another model than the one given.")
        result.append(Explained(name, method, taken_at(model, dict(options))))
    return result


class PixelRemoval:
    r"""
    A batch ready to be run without some pixels; the interface of ``SuffixReplay`` in pixel space.

    Args:

        model (Callable): The model.
        inputs (Tensor): Shape (N, channels, H, W).
        baseline (Tensor): What stands in for a removed pixel, broadcastable to the inputs.
        batch_size (int): Images in a forward pass.
    """

    def __init__(
        self, model: ForwardFunc, inputs: Tensor, baseline: Tensor, batch_size: int
    ) -> None:
        self.model, self.inputs = model, inputs
        self.baseline = baseline.expand_as(inputs)
        self.batch_size = batch_size
        self.num_images, self.num_filters = len(inputs), inputs[0, 0].numel()
        self.output = class_scores(model(inputs))

    @property
    def gives_probabilities(self) -> bool:
        """Whether the model returns probabilities, not logits, as this batch tells."""
        return gives_probabilities(
            self.output, module_of(self.model), lambda: self.model(self.inputs)
        )

    def outputs(self, removed: Tensor) -> Tensor:
        """Outputs (P, N, C) without sets of pixels (P, K) or (P, N, K)."""
        return torch.cat([outputs for _, outputs in self.in_parts(removed)])

    def in_parts(self, removed: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The same, one forward pass at a time: which sets they are, and their outputs."""
        masks = (removed if removed.dim() == 3 else removed[:, None]).to(self.inputs.device)
        size = max(1, self.batch_size // self.num_images)
        for start in range(0, len(masks), size):
            rows = masks[start : start + size]
            shape = (len(rows), rows.shape[1], 1, *self.inputs.shape[2:])
            images = torch.where(rows.reshape(shape), self.baseline, self.inputs)
            output = class_scores(self.model(images.flatten(0, 1)))
            yield slice(start, start + size), output.unflatten(0, (len(rows), self.num_images))


@dataclass
class Explained:
    r"""
    A method under comparison.

    Args:

        name (str): Its name in the tables.
        method (Any): An attribution, or a function of inputs and ``target``.
        options (dict): Further arguments of its ``attribute``.
    """

    name: str
    method: Any
    options: Keywords
    #: Of the method, or of a copy whose targets are classes.
    _attribute: Callable[..., Attributions] | None = field(default=None, init=False)

    @property
    def gate(self) -> FilterGate | None:
        """Gate space, where the method explains it."""
        function = getattr(self.method, "forward_func", None)
        return function if isinstance(function, FilterGate) else None

    def raw(self, inputs: Tensor, target: TargetType) -> Attributions:
        """What the method itself returns."""
        given = (inputs,) if self.gate is None else (self.gate.ones(len(inputs)), inputs)
        if self._attribute is None:
            method = with_classes_as_targets(self.method, given, target)
            self._attribute = getattr(method, "attribute", method)
        attribute = self._attribute
        with captum_reads_layer(self.method, given), warnings.catch_warnings(), torch.enable_grad():
            # Said of every batch, and nothing that whoever compares could change.
            warnings.filterwarnings("ignore", "Input Tensor .* did not already require gradients")
            warnings.filterwarnings("ignore", r"Setting forward, backward hooks and attributes")
            if self.gate is None:
                return attribute(inputs, target=target, **self.options)
            return attribute(
                given[0], target=target, additional_forward_args=inputs, **self.options
            )

    def space(self, inputs: Tensor, target: TargetType) -> tuple[str, nn.Module | None]:
        """``"pixels"``, or the layer's name and the layer."""
        gate = self.gate
        if gate is not None:
            return gate.layer_name, gate._layer[0]
        layer = getattr(self.method, "layer", None)
        if not isinstance(self.method, LayerAttribution):
            return PIXELS, None
        if not isinstance(layer, nn.Module):
            raise ValueError(f"{self.name!r} has no single layer; compare its layers one by one.")
        raw = self.raw(inputs, target)
        if isinstance(self.method, FilterRule) and self.method.features_name is not None:
            raise ValueError(
                f"{self.name!r} scores {self.method.features_name}, and removing filters says nothing "
                "of them; compare on a model whose filters they are, that of "
                "captum_classfilters.spectral.factor_layer for example."
            )
        if not scores_filters(self.method, raw, (inputs,)):
            return PIXELS, None
        return layer_name(module_of(self.method.forward_func), layer), layer

    def pixels(self, inputs: Tensor, target: TargetType) -> Tensor:
        """Attributions in the inputs' shape; a layer's map is interpolated, its value spread evenly
        over the channels."""
        raw = self.raw(inputs, target)
        raw = raw[0] if isinstance(raw, tuple) else raw
        if isinstance(self.method, LayerAttribution):
            maps = LayerAttribution.interpolate(raw, tuple(inputs.shape[2:]), "bilinear")
            raw = maps.expand_as(inputs) / inputs.shape[1]
        if raw.shape != inputs.shape:
            raise ValueError(
                f"{self.name!r} returns {tuple(raw.shape)} for images {tuple(inputs.shape)}; expected "
                "their shape, or a layer attribution."
            )
        return raw.detach().contiguous()

    def filters(self, inputs: Tensor, target: TargetType) -> Tensor:
        """Filter scores (N, K)."""
        return filter_scores_of(self.method, self.raw(inputs, target))

    def pixel_contributions(self, pixels: Tensor, inputs: Tensor, baseline: Tensor) -> Tensor:
        """What the attributions say each pixel's removal costs, (N, H W): themselves, or where the
        method does not multiply by inputs (Saliency, Grad-CAM), times the change of the input."""
        local = not getattr(self.method, "multiplies_by_inputs", True)
        values = pixels * (inputs - baseline) if local else pixels
        return values.sum(1).flatten(1)
