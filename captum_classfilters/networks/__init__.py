"""Model in, model out: decomposed heads, refitting, fine-tuning, selection by accuracy."""

from captum_classfilters.networks.accuracy_curve import (
    AccuracyCurve,
    accuracy_curve,
    select_by_accuracy,
)
from captum_classfilters.networks.baseline_scores import (
    filter_importance_baselines,
    incoming_weight_scores,
    outgoing_weight_scores,
    random_scores,
)
from captum_classfilters.networks.class_filter_importance import ClassFilterImportance
from captum_classfilters.networks.class_specific_gate import ClassSpecificGate
from captum_classfilters.networks.compare_heads import HeadComparison, HeadCost, compare_heads
from captum_classfilters.networks.compare_networks import (
    NetworkComparison,
    NetworkCost,
    compare_networks,
    multiply_adds,
)
from captum_classfilters.networks.decompose import (
    DecomposedLinear,
    decompose,
    decomposed_head,
    find_head,
    head_name,
    replace_head,
)
from captum_classfilters.networks.evaluate_classifier import ClassifierScores, evaluate_classifier
from captum_classfilters.networks.fine_tune import Epoch, fine_tune
from captum_classfilters.networks.gated_training import GatedEpoch, GatedTrainer, GateSchedule
from captum_classfilters.networks.greedy_filter_pruning import GreedyFilterPruning
from captum_classfilters.networks.layerwise_fine_tuning import LayerwiseFineTuning
from captum_classfilters.networks.masked_filters import masked_filters
from captum_classfilters.networks.prunable_layers import (
    PrunableLayer,
    PrunableLayers,
    prunable_layers,
)
from captum_classfilters.networks.prune_filters import prune_filters
from captum_classfilters.networks.pruning_order import PruningOrder
from captum_classfilters.networks.refit import fit_linear, refit_head
from captum_classfilters.networks.removal_curve import (
    RemovalCurves,
    accuracy_after_removal,
    removal_order,
)
from captum_classfilters.networks.remove_class import RemovedClass, remove_class
from captum_classfilters.networks.specialise import (
    Specialist,
    SpecialistAccuracy,
    specialise,
)
from captum_classfilters.networks.weight_compression import (
    CompressedLayer,
    CompressedWeights,
    CompressionReport,
    compress_layer,
    encode_weights,
    kmeans_quantize,
    magnitude_prune,
)

__all__ = [
    "AccuracyCurve",
    "ClassFilterImportance",
    "ClassSpecificGate",
    "ClassifierScores",
    "CompressedLayer",
    "CompressedWeights",
    "CompressionReport",
    "DecomposedLinear",
    "Epoch",
    "GateSchedule",
    "GatedEpoch",
    "GatedTrainer",
    "GreedyFilterPruning",
    "HeadComparison",
    "HeadCost",
    "LayerwiseFineTuning",
    "NetworkComparison",
    "NetworkCost",
    "PrunableLayer",
    "PrunableLayers",
    "PruningOrder",
    "RemovalCurves",
    "RemovedClass",
    "Specialist",
    "SpecialistAccuracy",
    "accuracy_after_removal",
    "accuracy_curve",
    "compare_heads",
    "compare_networks",
    "compress_layer",
    "decompose",
    "decomposed_head",
    "encode_weights",
    "evaluate_classifier",
    "filter_importance_baselines",
    "find_head",
    "fine_tune",
    "fit_linear",
    "head_name",
    "incoming_weight_scores",
    "kmeans_quantize",
    "magnitude_prune",
    "masked_filters",
    "multiply_adds",
    "outgoing_weight_scores",
    "prunable_layers",
    "prune_filters",
    "random_scores",
    "refit_head",
    "removal_order",
    "remove_class",
    "replace_head",
    "select_by_accuracy",
    "specialise",
]
