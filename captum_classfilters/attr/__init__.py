"""Per-image evidence: Captum attributions whose features are filters."""

from captum_classfilters.attr.base import LayerFilterAttribution, WeightedFilterAttribution
from captum_classfilters.attr.class_filter_saliency import ClassFilterSaliency
from captum_classfilters.attr.filter_maps import filter_activation_maps, filter_gradient_maps
from captum_classfilters.attr.layer_class_gate import LayerClassGate
from captum_classfilters.attr.layer_filter_ablation import LayerFilterAblation
from captum_classfilters.attr.layer_filter_contribution import LayerFilterContribution
from captum_classfilters.attr.layer_filter_frequency import LayerFilterFrequency
from captum_classfilters.attr.layer_filter_shapley import LayerFilterShapley

__all__ = [
    "ClassFilterSaliency",
    "LayerClassGate",
    "LayerFilterAblation",
    "LayerFilterAttribution",
    "LayerFilterContribution",
    "LayerFilterFrequency",
    "LayerFilterShapley",
    "WeightedFilterAttribution",
    "filter_activation_maps",
    "filter_gradient_maps",
]
