"""Abbasi-Asl and Yu: filters removed by classification accuracy reduction, and compression."""

from captum_classfilters.pruning.baseline_scores import filter_importance_baselines
from captum_classfilters.pruning.class_filter_importance import ClassFilterImportance
from captum_classfilters.pruning.class_interpretation import (
    class_interpretation,
    interpretation_table,
)
from captum_classfilters.pruning.color import response_chroma, weight_chroma
from captum_classfilters.pruning.compare_networks import compare_networks, multiply_adds
from captum_classfilters.pruning.greedy_filter_pruning import GreedyFilterPruning
from captum_classfilters.pruning.layerwise_fine_tuning import LayerwiseFineTuning
from captum_classfilters.pruning.masked_filters import masked_filters
from captum_classfilters.pruning.prunable_layers import prunable_layers
from captum_classfilters.pruning.prune_filters import prune_filters
from captum_classfilters.pruning.pruning_order import PruningOrder
from captum_classfilters.pruning.removal_curve import accuracy_after_removal, removal_order
from captum_classfilters.pruning.removal_selectivity import selectivity_test
from captum_classfilters.pruning.specialize import specialize
from captum_classfilters.pruning.weight_compression import compress_layer, magnitude_prune

__all__ = [
    "ClassFilterImportance",
    "GreedyFilterPruning",
    "LayerwiseFineTuning",
    "PruningOrder",
    "accuracy_after_removal",
    "class_interpretation",
    "compare_networks",
    "compress_layer",
    "filter_importance_baselines",
    "interpretation_table",
    "magnitude_prune",
    "masked_filters",
    "multiply_adds",
    "prunable_layers",
    "prune_filters",
    "removal_order",
    "response_chroma",
    "selectivity_test",
    "specialize",
    "weight_chroma",
]

# Its spelling in the first release.
specialise = specialize
