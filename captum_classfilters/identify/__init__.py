"""Data set to class filters: one streaming pass, mergeable statistics."""

from captum_classfilters.identify.accuracy_reduction import (
    AccuracyReduction,
    MetricReduction,
    accuracy_reduction,
    binomial_interval,
    metric_reduction,
)
from captum_classfilters.identify.activation_scores import ActivationScores, activation_scores
from captum_classfilters.identify.collect_features import collect_features
from captum_classfilters.identify.exemplars import Exemplars, ExemplarSide, exemplars
from captum_classfilters.identify.identify_class_filters import identify_class_filters
from captum_classfilters.identify.receptive_field import receptive_field
from captum_classfilters.identify.statistics import ClassFilterSums
from captum_classfilters.identify.unit_scores import unit_scores

__all__ = [
    "AccuracyReduction",
    "ActivationScores",
    "ClassFilterSums",
    "ExemplarSide",
    "Exemplars",
    "MetricReduction",
    "accuracy_reduction",
    "activation_scores",
    "binomial_interval",
    "collect_features",
    "exemplars",
    "identify_class_filters",
    "metric_reduction",
    "receptive_field",
    "unit_scores",
]
