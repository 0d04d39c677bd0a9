"""The spectral view: singular directions of a layer's weight, and their statistics."""

from captum_classfilters.spectral.eigenvalues import eigenvalues
from captum_classfilters.spectral.factored_layer import FactoredLayer, factor_layer
from captum_classfilters.spectral.layer_singular_direction import LayerSingularDirection
from captum_classfilters.spectral.layer_svd import LayerSVD, layer_svd
from captum_classfilters.spectral.marchenko_pastur import (
    MarchenkoPastur,
    MarchenkoPasturFit,
    fit_marchenko_pastur,
    marchenko_pastur_edge,
)
from captum_classfilters.spectral.model_spectra import (
    LayerSpectrum,
    ModelSpectra,
    SpectraComparison,
    compare_with_random,
    layer_verdict,
    model_spectra,
    universal_metric,
)
from captum_classfilters.spectral.model_svd import ModelSVD, model_svd
from captum_classfilters.spectral.power_law import PowerLaw, fit_power_law
from captum_classfilters.spectral.select_rank import (
    effective_rank,
    gavish_donoho_threshold,
    permutation_threshold,
    select_rank,
    stable_rank,
)
from captum_classfilters.spectral.signals import direction_signals
from captum_classfilters.spectral.weight_matrix import WeightMatrix, weight_matrix

__all__ = [
    "FactoredLayer",
    "LayerSVD",
    "LayerSingularDirection",
    "LayerSpectrum",
    "MarchenkoPastur",
    "MarchenkoPasturFit",
    "ModelSVD",
    "ModelSpectra",
    "PowerLaw",
    "SpectraComparison",
    "WeightMatrix",
    "compare_with_random",
    "direction_signals",
    "effective_rank",
    "eigenvalues",
    "factor_layer",
    "fit_marchenko_pastur",
    "fit_power_law",
    "gavish_donoho_threshold",
    "layer_svd",
    "layer_verdict",
    "marchenko_pastur_edge",
    "model_spectra",
    "model_svd",
    "permutation_threshold",
    "select_rank",
    "stable_rank",
    "universal_metric",
    "weight_matrix",
]
