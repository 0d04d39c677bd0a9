"""The eigenvalues whose density random-matrix theory describes."""

import torch
from torch import Tensor, nn

from captum_classfilters.spectral.layer_svd import LayerSVD
from captum_classfilters.spectral.routes import singular_values
from captum_classfilters.spectral.weight_matrix import WeightMatrix, weight_matrix


def eigenvalues(layer: nn.Module | WeightMatrix | LayerSVD) -> Tensor:
    r"""
    Eigenvalues of a layer's correlation matrix, :math:`\lambda_a = S_a^2 / d`.

    *d* is the number of rows of :math:`\bar W`, the filters (of one group), whichever side is the
    longer. The values of all groups are pooled. They come from the Gram matrix in float64.

    Args:

        layer (nn.Module, WeightMatrix or LayerSVD): A convolution or linear layer, its unfolded
                    weight, or its decomposition, which must be complete.

    Returns:
        *Tensor* of float64, falling, in squared units of the weight.

    Raises:
        ValueError: As for :func:`weight_matrix`, or the decomposition lacks directions.
    """
    if isinstance(layer, LayerSVD):
        if not layer.complete:
            raise ValueError(
                "The decomposition keeps only its first directions; a density needs all of them. "
                "Decompose without `rank`."
            )
        values, rows = layer.values.double(), layer.shape[0]
    else:
        weight = layer if isinstance(layer, WeightMatrix) else weight_matrix(layer)
        with torch.no_grad():
            values = singular_values(weight.matrices.detach()).flatten()
        rows = weight.matrices.shape[1]
    return values.square().sort(descending=True).values / rows
