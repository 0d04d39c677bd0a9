"""Pictures of class filters; needs the extra ``plot``."""

from captum_classfilters.visualize.accuracy_curve import plot_accuracy_curve
from captum_classfilters.visualize.class_filters import plot_class_filters, plot_class_overlap
from captum_classfilters.visualize.class_specific_gate import (
    plot_filter_correlation,
    plot_gate_and_weight,
    plot_mutual_information,
)
from captum_classfilters.visualize.explanations import plot_explanations, plot_filter_maps

__all__ = [
    "plot_accuracy_curve",
    "plot_class_filters",
    "plot_class_overlap",
    "plot_explanations",
    "plot_filter_correlation",
    "plot_filter_maps",
    "plot_gate_and_weight",
    "plot_mutual_information",
]
