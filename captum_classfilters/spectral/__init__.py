"""The spectral view: singular directions of a layer's weight, and their statistics."""

from captum_classfilters.spectral.layer_svd import LayerSVD, layer_svd
from captum_classfilters.spectral.model_svd import ModelSVD, model_svd
from captum_classfilters.spectral.weight_matrix import WeightMatrix, weight_matrix

__all__ = [
    "LayerSVD",
    "ModelSVD",
    "WeightMatrix",
    "layer_svd",
    "model_svd",
    "weight_matrix",
]
