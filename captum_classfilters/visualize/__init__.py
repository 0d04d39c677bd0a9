"""Pictures of class filters; needs the extra ``plot``."""

from captum_classfilters.visualize.accuracy_curve import plot_accuracy_curve
from captum_classfilters.visualize.class_filters import plot_class_filters, plot_class_overlap
from captum_classfilters.visualize.explanations import plot_explanations, plot_filter_maps
from captum_classfilters.visualize.filter_contrast import plot_filter_contrast
from captum_classfilters.visualize.method_comparison import plot_method_comparison

__all__ = [
    "plot_accuracy_curve",
    "plot_class_filters",
    "plot_class_overlap",
    "plot_explanations",
    "plot_filter_contrast",
    "plot_filter_maps",
    "plot_method_comparison",
]
