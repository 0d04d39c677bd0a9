"""The spectral view: singular directions of a layer's weight, and their statistics."""

from captum_classfilters.spectral.class_separation import separation_scores, separation_test
from captum_classfilters.spectral.eigenvalues import eigenvalues
from captum_classfilters.spectral.factored_layer import FactoredLayer, factor_layer
from captum_classfilters.spectral.hypergraph import class_hypergraph
from captum_classfilters.spectral.influential import influential
from captum_classfilters.spectral.layer_singular_direction import LayerSingularDirection
from captum_classfilters.spectral.layer_svd import layer_svd
from captum_classfilters.spectral.marchenko_pastur import (
    fit_marchenko_pastur,
    marchenko_pastur_edge,
)
from captum_classfilters.spectral.model_spectra import (
    compare_with_random,
    model_spectra,
    universal_metric,
)
from captum_classfilters.spectral.model_svd import model_svd
from captum_classfilters.spectral.power_law import fit_power_law
from captum_classfilters.spectral.profile_graph import distance_matrix, persistence, profile_graph
from captum_classfilters.spectral.profile_similarity import (
    instance_jaccard,
    jaccard,
    similarity_matrix,
)
from captum_classfilters.spectral.profiles import profile_images
from captum_classfilters.spectral.select_rank import (
    effective_rank,
    gavish_donoho_threshold,
    permutation_threshold,
    select_rank,
    stable_rank,
)
from captum_classfilters.spectral.signals import direction_signals
from captum_classfilters.spectral.weight_matrix import weight_matrix

__all__ = [
    "FactoredLayer",
    "LayerSingularDirection",
    "class_hypergraph",
    "compare_with_random",
    "direction_signals",
    "distance_matrix",
    "effective_rank",
    "eigenvalues",
    "factor_layer",
    "fit_marchenko_pastur",
    "fit_power_law",
    "gavish_donoho_threshold",
    "influential",
    "instance_jaccard",
    "jaccard",
    "layer_svd",
    "marchenko_pastur_edge",
    "model_spectra",
    "model_svd",
    "permutation_threshold",
    "persistence",
    "profile_graph",
    "profile_images",
    "select_rank",
    "separation_scores",
    "separation_test",
    "similarity_matrix",
    "stable_rank",
    "universal_metric",
    "weight_matrix",
]
