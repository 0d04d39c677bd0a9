"""Data set to class filters: one streaming pass, mergeable statistics."""

from captum_classfilters.identify.accuracy_reduction import (
    AccuracyReduction,
    MetricReduction,
    accuracy_reduction,
    binomial_interval,
    metric_reduction,
)
from captum_classfilters.identify.collect_features import collect_features
from captum_classfilters.identify.contrastive import (
    ConfusionFilters,
    FilterContrast,
    confusion_filters,
    contrast_classes,
)
from captum_classfilters.identify.evidence import Evidence, Stability, collect_evidence
from captum_classfilters.identify.identify_class_filters import identify_class_filters
from captum_classfilters.identify.random_weights import (
    RandomWeightsNull,
    random_weights_null,
    reinitialise,
)
from captum_classfilters.identify.significance import (
    LabelPermutation,
    false_discovery_adjusted,
    permutation_p_values,
    vote_p_values,
)
from captum_classfilters.identify.statistics import ClassFilterSums

__all__ = [
    "AccuracyReduction",
    "ClassFilterSums",
    "ConfusionFilters",
    "Evidence",
    "FilterContrast",
    "LabelPermutation",
    "MetricReduction",
    "RandomWeightsNull",
    "Stability",
    "accuracy_reduction",
    "binomial_interval",
    "collect_evidence",
    "collect_features",
    "confusion_filters",
    "contrast_classes",
    "false_discovery_adjusted",
    "identify_class_filters",
    "metric_reduction",
    "permutation_p_values",
    "random_weights_null",
    "reinitialise",
    "vote_p_values",
]
