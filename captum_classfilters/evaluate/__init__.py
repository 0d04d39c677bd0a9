"""Measurements of class filters: sparsity, selectivity, overlap, essentiality, spectra."""

from captum_classfilters.evaluate.breadth_scores import mixture_entropy_score, union_score
from captum_classfilters.evaluate.essentiality import (
    Essentiality,
    essentiality,
    model_essentiality,
)
from captum_classfilters.evaluate.gram_spectrum import GramSpectrum, gram_spectrum
from captum_classfilters.evaluate.layer_sweep import LayerMeasurement, layer_sweep
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
    "Essentiality",
    "GramSpectrum",
    "LayerMeasurement",
    "SetOverlap",
    "TopMass",
    "class_means",
    "class_selectivity_index",
    "essentiality",
    "gram_spectrum",
    "layer_sweep",
    "membership_information",
    "mixture_entropy_score",
    "model_essentiality",
    "psi",
    "psi_floor",
    "selectivity_regulariser",
    "set_overlap",
    "top_mass",
    "union_score",
]
