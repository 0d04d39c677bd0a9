"""What judges any method: faithfulness, sensitivity, curves, localization, information, comparison."""

from captum_classfilters.metrics.cascading_randomization import cascading_randomization
from captum_classfilters.metrics.class_curves import class_curves
from captum_classfilters.metrics.collateral_damage import collateral_damage
from captum_classfilters.metrics.compare_attributions import compare_attributions
from captum_classfilters.metrics.compare_methods import compare_methods, standard_methods
from captum_classfilters.metrics.evaluate_classifier import evaluate_classifier
from captum_classfilters.metrics.feature_tables import (
    correlation_filters,
    mutual_information_filters,
    selectivity_filters,
)
from captum_classfilters.metrics.filter_curves import filter_curves
from captum_classfilters.metrics.filter_infidelity import filter_infidelity
from captum_classfilters.metrics.filter_localization import assign_filters, filter_localization
from captum_classfilters.metrics.filter_sensitivity import (
    explanation_for_sensitivity,
    filter_max_sensitivity,
    filter_scores_of,
)
from captum_classfilters.metrics.localization import (
    boxes_to_masks,
    center_box_maps,
    choose_threshold,
    localization,
)
from captum_classfilters.metrics.mutual_information import (
    mutual_information_bound,
    mutual_information_matrix,
    mutual_information_score,
)
from captum_classfilters.metrics.quantus_explanation import quantus_explanation
from captum_classfilters.metrics.remove_and_retrain import remove_and_retrain
from captum_classfilters.metrics.selectivity import (
    class_means,
    class_selectivity_index,
    selectivity_regularizer,
)
from captum_classfilters.metrics.validate import validate

__all__ = [
    "assign_filters",
    "boxes_to_masks",
    "cascading_randomization",
    "center_box_maps",
    "choose_threshold",
    "class_curves",
    "class_means",
    "class_selectivity_index",
    "collateral_damage",
    "compare_attributions",
    "compare_methods",
    "correlation_filters",
    "evaluate_classifier",
    "explanation_for_sensitivity",
    "filter_curves",
    "filter_infidelity",
    "filter_localization",
    "filter_max_sensitivity",
    "filter_scores_of",
    "localization",
    "mutual_information_bound",
    "mutual_information_filters",
    "mutual_information_matrix",
    "mutual_information_score",
    "quantus_explanation",
    "remove_and_retrain",
    "selectivity_filters",
    "selectivity_regularizer",
    "standard_methods",
    "validate",
]

# Their spelling in the first release.
cascading_randomisation = cascading_randomization
centre_box_maps = center_box_maps
selectivity_regulariser = selectivity_regularizer
