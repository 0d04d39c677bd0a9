"""Measurements of class filters: sparsity, selectivity, overlap, essentiality, spectra."""

from captum_classfilters.evaluate.adversarial_detection import (
    AdversarialDetection,
    adversarial_detection,
)
from captum_classfilters.evaluate.breadth_scores import mixture_entropy_score, union_score
from captum_classfilters.evaluate.cascading_randomisation import (
    CascadingRandomisation,
    cascading_randomisation,
)
from captum_classfilters.evaluate.class_curves import ClassCurves, class_curves
from captum_classfilters.evaluate.class_interpretation import (
    ClassEffect,
    FilterInterpretation,
    class_interpretation,
    interpretation_table,
)
from captum_classfilters.evaluate.collateral_damage import CollateralDamage, collateral_damage
from captum_classfilters.evaluate.colour import greyed, response_chroma, weight_chroma
from captum_classfilters.evaluate.compare_attributions import (
    AttributionComparison,
    AttributionTable,
    compare_attributions,
)
from captum_classfilters.evaluate.compare_methods import (
    MethodComparison,
    compare_methods,
    standard_methods,
)
from captum_classfilters.evaluate.essentiality import (
    Essentiality,
    essentiality,
    model_essentiality,
)
from captum_classfilters.evaluate.feature_tables import (
    mutual_information_filters,
    selectivity_filters,
)
from captum_classfilters.evaluate.filter_curves import FilterCurves, filter_curves
from captum_classfilters.evaluate.filter_diversity import (
    Coverage,
    coverage,
    diversity,
    effective_rank,
    filter_clusters,
)
from captum_classfilters.evaluate.filter_infidelity import FilterInfidelity, filter_infidelity
from captum_classfilters.evaluate.filter_localization import (
    FilterLocalization,
    filter_localization,
)
from captum_classfilters.evaluate.filter_sensitivity import (
    FilterSensitivity,
    explanation_for_sensitivity,
    filter_max_sensitivity,
    filter_scores_of,
)
from captum_classfilters.evaluate.gate_measures import (
    assign_filters,
    class_share,
    density_interval,
    filter_correlation,
    gate_similarity,
)
from captum_classfilters.evaluate.gram_spectrum import GramSpectrum, gram_spectrum
from captum_classfilters.evaluate.layer_sweep import LayerMeasurement, layer_sweep
from captum_classfilters.evaluate.localization import (
    Localization,
    boxes_to_masks,
    centre_box_maps,
    choose_threshold,
    localization,
)
from captum_classfilters.evaluate.masking import MaskingResult, masking_test
from captum_classfilters.evaluate.mutual_information import (
    mutual_information_bound,
    mutual_information_matrix,
    mutual_information_score,
)
from captum_classfilters.evaluate.quantus_explanation import quantus_explanation
from captum_classfilters.evaluate.removal_selectivity import SelectivityTest, selectivity_test
from captum_classfilters.evaluate.remove_and_retrain import RemoveAndRetrain, remove_and_retrain
from captum_classfilters.evaluate.selectivity import (
    class_means,
    class_selectivity_index,
    selectivity_regulariser,
)
from captum_classfilters.evaluate.set_overlap import (
    SetOverlap,
    membership_information,
    set_overlap,
)
from captum_classfilters.evaluate.sparsity import TopMass, psi, psi_floor, top_mass

__all__ = [
    "AdversarialDetection",
    "AttributionComparison",
    "AttributionTable",
    "CascadingRandomisation",
    "ClassCurves",
    "ClassEffect",
    "CollateralDamage",
    "Coverage",
    "Essentiality",
    "FilterCurves",
    "FilterInfidelity",
    "FilterInterpretation",
    "FilterLocalization",
    "FilterSensitivity",
    "GramSpectrum",
    "LayerMeasurement",
    "Localization",
    "MaskingResult",
    "MethodComparison",
    "RemoveAndRetrain",
    "SelectivityTest",
    "SetOverlap",
    "TopMass",
    "adversarial_detection",
    "assign_filters",
    "boxes_to_masks",
    "cascading_randomisation",
    "centre_box_maps",
    "choose_threshold",
    "class_curves",
    "class_interpretation",
    "class_means",
    "class_selectivity_index",
    "class_share",
    "collateral_damage",
    "compare_attributions",
    "compare_methods",
    "coverage",
    "density_interval",
    "diversity",
    "effective_rank",
    "essentiality",
    "explanation_for_sensitivity",
    "filter_clusters",
    "filter_correlation",
    "filter_curves",
    "filter_infidelity",
    "filter_localization",
    "filter_max_sensitivity",
    "filter_scores_of",
    "gate_similarity",
    "gram_spectrum",
    "greyed",
    "interpretation_table",
    "layer_sweep",
    "localization",
    "masking_test",
    "membership_information",
    "mixture_entropy_score",
    "model_essentiality",
    "mutual_information_bound",
    "mutual_information_filters",
    "mutual_information_matrix",
    "mutual_information_score",
    "psi",
    "psi_floor",
    "quantus_explanation",
    "remove_and_retrain",
    "response_chroma",
    "selectivity_filters",
    "selectivity_regulariser",
    "selectivity_test",
    "set_overlap",
    "standard_methods",
    "top_mass",
    "union_score",
    "weight_chroma",
]
