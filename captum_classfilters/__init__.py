"""Class-specific filters of convolutional networks, as Captum attributions."""

from captum_classfilters._version import __version__
from captum_classfilters.attr import (
    ClassFilterSaliency,
    LayerClassGate,
    LayerFilterAblation,
    LayerFilterContribution,
    LayerFilterFrequency,
)
from captum_classfilters.class_filters import ClassFilters
from captum_classfilters.class_scores import ClassScores
from captum_classfilters.gate_space import FilterGate
from captum_classfilters.gates import ClassSpecificGate
from captum_classfilters.heads import (
    DecomposedLinear,
    accuracy_curve,
    decompose,
    fine_tune,
    refit_head,
    select_by_accuracy,
)
from captum_classfilters.identify import LabelPermutation, identify_class_filters
from captum_classfilters.layers import list_filter_layers
from captum_classfilters.pruning import GreedyFilterPruning, prune_filters
from captum_classfilters.spectral import LayerSingularDirection

__all__ = [
    "ClassFilterSaliency",
    "ClassFilters",
    "ClassScores",
    "ClassSpecificGate",
    "DecomposedLinear",
    "FilterGate",
    "GreedyFilterPruning",
    "LabelPermutation",
    "LayerClassGate",
    "LayerFilterAblation",
    "LayerFilterContribution",
    "LayerFilterFrequency",
    "LayerSingularDirection",
    "__version__",
    "accuracy_curve",
    "decompose",
    "fine_tune",
    "identify_class_filters",
    "list_filter_layers",
    "prune_filters",
    "refit_head",
    "select_by_accuracy",
]
