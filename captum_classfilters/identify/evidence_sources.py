"""Where the evidence of single images comes from: a method's rule, or its ``attribute``."""

import copy
import inspect
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import torch
from captum.attr import LayerAttribution
from torch import Tensor, nn

from captum_classfilters._core.captum_layers import captum_reads_layer, check_reads_layer
from captum_classfilters._core.forward import FilterMaps
from captum_classfilters._core.layers import (
    attribution_axis,
    check_batch,
    declared_filters,
    layer_name,
    module_of,
    positions_last,
)
from captum_classfilters._core.names import kind_of
from captum_classfilters._core.outputs import at_least_float32
from captum_classfilters._core.progress import described_options
from captum_classfilters._core.rules import FilterRule
from captum_classfilters._core.types import AttributeKwargs, JsonDict, Keywords
from captum_classfilters._core.units import aggregated
from captum_classfilters.class_scores import explaining_classes

Reduction = Literal["sum", "mean", "max", "abs_sum"]
_DEFAULT_FILTERS = 5
_NO_OPTIONS = {"layer", "device_ids"}  # of a method: where it looks, and where that runs
#: What the call itself gives ``attribute``, for each batch; else its table would say something else.
_OWN_ARGUMENTS = ("inputs", "target", "return_convergence_delta", "return_half_widths")
logger = logging.getLogger("captum_classfilters")

T = TypeVar("T")


@dataclass
class Source:
    """One method at one layer.

    Args:

        key: The method's place among those given.
        method (LayerAttribution): The method, bound to that layer alone.
        kwargs (dict): Further arguments of its ``attribute``.
        reduction (str): How maps of ``attribute`` become one number per filter.
    """

    key: Any
    method: LayerAttribution
    kwargs: Keywords
    reduction: Reduction

    def __post_init__(self) -> None:
        if not isinstance(self.method.layer, nn.Module):
            raise ValueError(
                f"{type(self.method).__name__} has the layer {self.method.layer!r}; expected a "
                "module."
            )
        self.rule = self.method if isinstance(self.method, FilterRule) else None
        self.model = module_of(self.method.forward_func, [self.method.layer])
        self.layer_name = layer_name(self.model, self.method.layer)
        self._looked = False  # whether the layer was seen to run once
        if self.rule is None:
            self._check_not_summed()

    @property
    def name(self) -> str:
        """The method's name, as Captum spells it without spaces."""
        return type(self.method).__name__

    @property
    def table_layer(self) -> str:
        """The layer's name in a table; not the filters' if the features are something else."""
        features = self.rule.features_name if self.rule is not None else None
        return f"{self.layer_name}.{features}" if features else self.layer_name

    @property
    def options(self) -> JsonDict:
        """Options of the method and of its ``attribute``, for the record; of another package's method
        what is no default. Tables are merged where these are the same."""
        if self.rule is not None:
            return {**self.rule.options, **described_options(self.kwargs)}
        multiplied = getattr(self.method, "multiplies_by_inputs", True)
        return {
            **({} if self.reduction == "sum" else {"reduction": self.reduction}),
            **({} if multiplied else {"multiplies_by_inputs": False}),
            **described_options(self.kwargs),
        }

    @property
    def facts(self) -> JsonDict:
        """All that numbers depend on besides the model and the layer, as JSON can hold it."""
        own = {name: v for name, v in vars(self.method).items() if name not in _NO_OPTIONS}
        return {
            "options": self.rule.options if self.rule is not None else {},
            "attributes": described_options(own),
            "attribute_kwargs": described_options(self.kwargs),
            "reduction": self.reduction,
            "depends_on_target": self.depends_on_target,
        }

    @property
    def counts_votes(self) -> bool:
        """Whether scores are whole numbers."""
        return self.rule is not None and self.rule.has_whole_scores

    @property
    def default_num_filters(self) -> int:
        """How many filters are selected if nothing is said."""
        return _DEFAULT_FILTERS if self.rule is None else self.rule.default_num_filters

    @property
    def depends_on_target(self) -> bool:
        """Whether an image's evidence is another one for another target."""
        return self._takes_target if self.rule is None else self.rule.depends_on_target

    @property
    def at_input(self) -> bool:
        """Whether the evidence is about the layer's input."""
        return bool(self.kwargs.get("attribute_to_layer_input", False))

    @property
    def shares_forward(self) -> bool:
        """Whether the method's rule is followed, in a forward pass shared with other methods."""
        return (
            self.rule is not None
            and self.rule.has_current_rule
            and not set(self.kwargs) - {"attribute_to_layer_input"}
        )

    def adapt_to(self, output: object) -> None:
        """Let a method of another package see scores (N, C), whatever the model returns: of a
        binary classifier's one logit z those of two classes, of an object its ``logits``."""
        if self.rule is None and self._takes_target:
            self.method = explaining_classes(self.method, output)

    @property
    def _takes_target(self) -> bool:
        return "target" in self._parameters

    @property
    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.method.attribute).parameters

    def _check_not_summed(self) -> None:
        """Raise if the method sums over all filters, as Grad-CAM does; of one filter the sum is itself."""
        summed = self.kwargs.get("attr_dim_summation", "attr_dim_summation" in self._parameters)
        if summed and (self.at_input or declared_filters(self.method.layer) != 1):
            raise ValueError(
                f"{self.name} sums over the filters of {self.layer_name!r}, so it says nothing of any; "
                'pass attribute_kwargs={"attr_dim_summation": False}, or, of several methods, these '
                "keywords by the method's place or name."
            )

    def scores(self, maps: FilterMaps, target: Tensor) -> Tensor:
        """Scores (N, K) by the method's rule."""
        assert self.rule is not None
        features = self.rule.features_of(maps, self.method.layer)
        return self.rule.scores_from(features, target).detach()

    @property
    def sums_up(self) -> bool:
        """Whether the evidence is meant to add up to what all filters do, as contributions are."""
        rule = self.rule
        return (
            rule is not None
            and rule.has_current_rule
            and rule.needs_derivative
            and self.method.has_convergence_delta()
        )

    def missing(self, inputs: tuple[Tensor, ...], target: Tensor, counted: Tensor) -> float | None:
        """The share of the scores that the filters' evidence does not account for: the mean size of
        Captum's convergence delta over that of what all filters do together, over some images."""
        try:
            attributions, delta = self.method.attribute(
                inputs if len(inputs) > 1 else inputs[0],
                target=target,
                return_convergence_delta=True,
                **self.kwargs,
            )
        except Exception as error:  # a model may need some filter; its table is not lost for that
            logger.warning(
                "What the contributions at %r miss could not be measured: %s",
                self.layer_name,
                error,
            )
            return None
        together = at_least_float32(attributions.detach()).flatten(1).sum(1) - delta
        share = float(delta[counted].abs().sum() / together[counted].abs().sum())
        return share if math.isfinite(share) else None

    def attributed(self, inputs: tuple[Tensor, ...], target: Tensor) -> Tensor:
        """Scores (N, K) through the method's own ``attribute``."""
        kwargs = dict(self.kwargs)
        if self.depends_on_target if self.rule is not None else self._takes_target:
            kwargs["target"] = target
        if self.rule is None:
            # LayerDeepLift hooks gradients before the layer, where frozen parameters leave none.
            inputs = tuple(
                image.detach().requires_grad_() if image.is_floating_point() else image
                for image in inputs
            )
            if not self._looked:
                check_reads_layer(self.method, inputs, at_input=self.at_input)
                self._looked = True
        with captum_reads_layer(self.method, inputs, self.at_input), torch.enable_grad():
            attributions = self.method.attribute(inputs if len(inputs) > 1 else inputs[0], **kwargs)
        if not isinstance(attributions, Tensor):
            raise ValueError(
                f"{self.name} at {self.layer_name!r} returned {kind_of(attributions)}; "
                "class filters need one tensor, (N, K) or (N, K, ...)."
            )
        attributions = attributions.detach()
        if self.rule is not None:
            return self.rule.filter_scores(attributions, self.at_input)
        axis = attribution_axis(self.method, attributions, self.at_input)
        check_batch(self.layer_name, len(attributions), len(target))
        return aggregated(positions_last(attributions, axis), self.reduction)


def sources_of(
    methods: object,
    attribute_kwargs: AttributeKwargs | None,
    at_input: bool,
    reduction: Reduction,
) -> list[Source]:
    """The methods given, alone or several, each at each of its layers."""
    if reduction not in get_args(Reduction):
        raise ValueError(
            f"reduction={reduction!r}; choose one of {', '.join(get_args(Reduction))}."
        )
    several = isinstance(methods, (Mapping, Sequence))
    kwargs_of: dict[Any, Any] = (
        dict(attribute_kwargs or {}) if several else {0: dict(attribute_kwargs or {})}
    )
    sources = []
    for key, method in _keyed(methods):
        if not isinstance(method, LayerAttribution):
            raise ValueError(
                f"A {type(method).__name__} is not a Captum LayerAttribution object; pass a method "
                "bound to a model and a layer, LayerFilterFrequency(model, layer) for example."
            )
        kwargs = dict(kwargs_of.pop(key, {}))
        own = [name for name in _OWN_ARGUMENTS if name in kwargs]
        if own:
            raise ValueError(
                f"attribute_kwargs holds {', '.join(map(repr, own))}, which the call itself gives "
                "attribute. One output is explained for all images by identify(..., target=1), with "
                "target= beside attribute_kwargs."
            )
        if at_input:
            kwargs["attribute_to_layer_input"] = True
        layers = method.layer if isinstance(method.layer, (list, tuple)) else [method.layer]
        for layer in layers:
            single = copy.copy(method)
            single.layer = layer
            sources.append(Source(key, single, kwargs, reduction))
    if kwargs_of:
        raise ValueError(f"attribute_kwargs names no method: {', '.join(map(str, kwargs_of))}.")
    if not sources:
        raise ValueError("methods is empty; pass at least one LayerAttribution.")
    return sources


def like_methods(
    methods: object, sources: Sequence[Source], results: Sequence[T]
) -> T | list[T] | dict[str, T]:
    """Results of the sources in the form in which the methods were given."""
    shaped: dict[Any, Any] = {}
    for key, method in _keyed(methods):
        own = [r for source, r in zip(sources, results, strict=True) if source.key == key]
        shaped[key] = own if isinstance(method.layer, (list, tuple)) else own[0]
    if isinstance(methods, Mapping):
        return shaped
    return list(shaped.values()) if isinstance(methods, Sequence) else shaped[0]


def _keyed(methods: object) -> Iterable[tuple[Any, Any]]:
    if isinstance(methods, Mapping):
        return methods.items()
    return enumerate(methods if isinstance(methods, Sequence) else [methods])
