"""Pictures of class filters; needs the extra ``plot``."""

from captum_classfilters.visualize.accuracy_curve import plot_accuracy_curve
from captum_classfilters.visualize.attribution_comparison import plot_comparison
from captum_classfilters.visualize.class_filters import plot_class_filters, plot_class_overlap
from captum_classfilters.visualize.class_specific_gate import (
    plot_filter_correlation,
    plot_gate_and_weight,
    plot_mutual_information,
)
from captum_classfilters.visualize.exemplars import plot_exemplars
from captum_classfilters.visualize.explanations import plot_explanations, plot_filter_maps
from captum_classfilters.visualize.feature_visualization import (
    FeatureObjective,
    RandomTransform,
    color_root,
    visualize_features,
)
from captum_classfilters.visualize.filter_contrast import plot_filter_contrast
from captum_classfilters.visualize.forgetting import plot_forgetting
from captum_classfilters.visualize.hypergraph import plot_class_separation, plot_hypergraph
from captum_classfilters.visualize.method_comparison import plot_method_comparison
from captum_classfilters.visualize.optimized_images import plot_features
from captum_classfilters.visualize.profile_similarity import plot_profile_similarity
from captum_classfilters.visualize.pruning import (
    plot_class_bars,
    plot_filter_grid,
    plot_removal_curves,
)
from captum_classfilters.visualize.shortcuts import plot_confusion_repair, plot_shortcuts
from captum_classfilters.visualize.spectra import plot_exponents, plot_spectrum
from captum_classfilters.visualize.unknown_inputs import plot_unknown_reasons

__all__ = [
    "FeatureObjective",
    "RandomTransform",
    "color_root",
    "plot_accuracy_curve",
    "plot_class_bars",
    "plot_class_filters",
    "plot_class_overlap",
    "plot_class_separation",
    "plot_comparison",
    "plot_confusion_repair",
    "plot_exemplars",
    "plot_explanations",
    "plot_exponents",
    "plot_features",
    "plot_filter_contrast",
    "plot_filter_correlation",
    "plot_filter_grid",
    "plot_filter_maps",
    "plot_forgetting",
    "plot_gate_and_weight",
    "plot_hypergraph",
    "plot_method_comparison",
    "plot_mutual_information",
    "plot_profile_similarity",
    "plot_removal_curves",
    "plot_shortcuts",
    "plot_spectrum",
    "plot_unknown_reasons",
    "visualize_features",
]
