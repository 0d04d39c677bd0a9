"""Data set to class filters: one streaming pass, mergeable statistics."""

from importlib import import_module
from typing import TYPE_CHECKING

from captum_classfilters.identify.accuracy_reduction import (
    accuracy_reduction,
    binomial_interval,
    metric_reduction,
)
from captum_classfilters.identify.activation_scores import activation_scores
from captum_classfilters.identify.collect_features import collect_features
from captum_classfilters.identify.contrastive import confusion_filters, contrast_classes
from captum_classfilters.identify.evidence import Evidence, collect_evidence
from captum_classfilters.identify.exemplars import exemplars
from captum_classfilters.identify.identify_class_filters import identify_class_filters
from captum_classfilters.identify.random_weights import random_weights_null, reinitialize
from captum_classfilters.identify.receptive_field import receptive_field
from captum_classfilters.identify.significance import (
    LabelPermutation,
    false_discovery_adjusted,
    permutation_p_values,
    vote_p_values,
)
from captum_classfilters.identify.unit_scores import unit_scores

if TYPE_CHECKING:
    from captum_classfilters.identify.statistics import ClassFilterSums

__all__ = [
    "ClassFilterSums",
    "Evidence",
    "LabelPermutation",
    "accuracy_reduction",
    "activation_scores",
    "binomial_interval",
    "collect_evidence",
    "collect_features",
    "confusion_filters",
    "contrast_classes",
    "exemplars",
    "false_discovery_adjusted",
    "identify_class_filters",
    "metric_reduction",
    "permutation_p_values",
    "random_weights_null",
    "receptive_field",
    "reinitialize",
    "unit_scores",
    "vote_p_values",
]

# Its spelling in the first release.
reinitialise = reinitialize


def __getattr__(name: str) -> type:
    """`ClassFilterSums`, whose torchmetrics is imported when it is asked for."""
    if name != "ClassFilterSums":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: type = import_module(f"{__name__}.statistics").ClassFilterSums
    return found
