"""Badola et al.: the decomposed head, its refit and tuning, accuracy curves, the paper's measurements."""

from captum_classfilters.heads.accuracy_curve import (
    AccuracyCurve,
    accuracy_curve,
    select_by_accuracy,
)
from captum_classfilters.heads.compare_heads import HeadComparison, HeadCost, compare_heads
from captum_classfilters.heads.decompose import (
    DecomposedLinear,
    decompose,
    decomposed_head,
    find_head,
    head_name,
    replace_head,
)
from captum_classfilters.heads.essentiality import Essentiality, essentiality, model_essentiality
from captum_classfilters.heads.filter_diversity import (
    Coverage,
    coverage,
    diversity,
    effective_rank,
    filter_clusters,
)
from captum_classfilters.heads.fine_tune import Epoch, fine_tune
from captum_classfilters.heads.gram_spectrum import GramSpectrum, gram_spectrum
from captum_classfilters.heads.layer_sweep import LayerMeasurement, layer_sweep
from captum_classfilters.heads.refit import fit_linear, refit_head
from captum_classfilters.heads.remove_class import RemovedClass, remove_class
from captum_classfilters.heads.set_overlap import SetOverlap, membership_information, set_overlap
from captum_classfilters.heads.sparsity import TopMass, psi, psi_floor, top_mass

__all__ = [
    "AccuracyCurve",
    "Coverage",
    "DecomposedLinear",
    "Epoch",
    "Essentiality",
    "GramSpectrum",
    "HeadComparison",
    "HeadCost",
    "LayerMeasurement",
    "RemovedClass",
    "SetOverlap",
    "TopMass",
    "accuracy_curve",
    "compare_heads",
    "coverage",
    "decompose",
    "decomposed_head",
    "diversity",
    "effective_rank",
    "essentiality",
    "filter_clusters",
    "find_head",
    "fine_tune",
    "fit_linear",
    "gram_spectrum",
    "head_name",
    "layer_sweep",
    "membership_information",
    "model_essentiality",
    "psi",
    "psi_floor",
    "refit_head",
    "remove_class",
    "replace_head",
    "select_by_accuracy",
    "set_overlap",
    "top_mass",
]
