"""Abbasi-Asl and Yu: filters removed by classification accuracy reduction, and compression."""

from captum_classfilters.pruning.baseline_scores import (
    filter_importance_baselines,
    incoming_weight_scores,
    outgoing_weight_scores,
    random_scores,
)
from captum_classfilters.pruning.class_filter_importance import ClassFilterImportance
from captum_classfilters.pruning.class_interpretation import (
    ClassEffect,
    FilterInterpretation,
    class_interpretation,
    interpretation_table,
)
from captum_classfilters.pruning.color import grayed, response_chroma, weight_chroma
from captum_classfilters.pruning.compare_networks import (
    NetworkComparison,
    NetworkCost,
    compare_networks,
    multiply_adds,
)
from captum_classfilters.pruning.greedy_filter_pruning import GreedyFilterPruning
from captum_classfilters.pruning.layerwise_fine_tuning import LayerwiseFineTuning
from captum_classfilters.pruning.masked_filters import masked_filters
from captum_classfilters.pruning.prunable_layers import (
    PrunableLayer,
    PrunableLayers,
    prunable_layers,
)
from captum_classfilters.pruning.prune_filters import prune_filters
from captum_classfilters.pruning.pruning_order import PruningOrder
from captum_classfilters.pruning.removal_curve import (
    RemovalCurves,
    accuracy_after_removal,
    removal_order,
)
from captum_classfilters.pruning.removal_selectivity import SelectivityTest, selectivity_test
from captum_classfilters.pruning.specialise import Specialist, SpecialistAccuracy, specialise
from captum_classfilters.pruning.weight_compression import (
    CompressedLayer,
    CompressedWeights,
    CompressionReport,
    compress_layer,
    encode_weights,
    kmeans_quantize,
    magnitude_prune,
)

__all__ = [
    "ClassEffect",
    "ClassFilterImportance",
    "CompressedLayer",
    "CompressedWeights",
    "CompressionReport",
    "FilterInterpretation",
    "GreedyFilterPruning",
    "LayerwiseFineTuning",
    "NetworkComparison",
    "NetworkCost",
    "PrunableLayer",
    "PrunableLayers",
    "PruningOrder",
    "RemovalCurves",
    "SelectivityTest",
    "Specialist",
    "SpecialistAccuracy",
    "accuracy_after_removal",
    "class_interpretation",
    "compare_networks",
    "compress_layer",
    "encode_weights",
    "filter_importance_baselines",
    "grayed",
    "incoming_weight_scores",
    "interpretation_table",
    "kmeans_quantize",
    "magnitude_prune",
    "masked_filters",
    "multiply_adds",
    "outgoing_weight_scores",
    "prunable_layers",
    "prune_filters",
    "random_scores",
    "removal_order",
    "response_chroma",
    "selectivity_test",
    "specialise",
    "weight_chroma",
]
