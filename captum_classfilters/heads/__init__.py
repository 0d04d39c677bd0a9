"""Badola et al.: the decomposed head, its refit and tuning, accuracy curves, the paper's measurements."""

from captum_classfilters.heads.accuracy_curve import accuracy_curve, select_by_accuracy
from captum_classfilters.heads.compare_heads import compare_heads
from captum_classfilters.heads.decompose import decompose, decomposed_head
from captum_classfilters.heads.decomposed_linear import DecomposedLinear
from captum_classfilters.heads.essentiality import essentiality, model_essentiality
from captum_classfilters.heads.filter_diversity import (
    coverage,
    diversity,
    effective_rank,
    filter_clusters,
)
from captum_classfilters.heads.fine_tune import fine_tune
from captum_classfilters.heads.gram_spectrum import gram_spectrum
from captum_classfilters.heads.layer_sweep import layer_sweep
from captum_classfilters.heads.linear_head import find_head, replace_head
from captum_classfilters.heads.refit import refit_head
from captum_classfilters.heads.remove_class import remove_class
from captum_classfilters.heads.set_overlap import set_overlap
from captum_classfilters.heads.sparsity import psi, psi_floor, top_mass

__all__ = [
    "DecomposedLinear",
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
    "gram_spectrum",
    "layer_sweep",
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
