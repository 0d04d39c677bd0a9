"""Class-specific filters of convolutional networks, as Captum attributions."""

from captum_classfilters._version import __version__
from captum_classfilters.attr import (
    ClassFilterSaliency,
    LayerFilterContribution,
    LayerFilterFrequency,
)
from captum_classfilters.class_filters import Agreement, ClassFilters, ClassOverlap
from captum_classfilters.gate import FilterGate
from captum_classfilters.identify import identify_class_filters
from captum_classfilters.networks import DecomposedLinear, decompose

__all__ = [
    "Agreement",
    "ClassFilterSaliency",
    "ClassFilters",
    "ClassOverlap",
    "DecomposedLinear",
    "FilterGate",
    "LayerFilterContribution",
    "LayerFilterFrequency",
    "__version__",
    "decompose",
    "identify_class_filters",
]
