"""Class filters by the response alone: selectivity and mutual information as tables."""

from collections.abc import Sequence

import torch
from torch import Tensor

from captum_classfilters.class_filters import ClassFilters
from captum_classfilters.metrics.features import checked_features
from captum_classfilters.metrics.mutual_information import mutual_information_matrix
from captum_classfilters.metrics.selectivity import class_means

_EPSILON = 1e-7


def selectivity_filters(
    features: Tensor,
    labels: Tensor,
    *,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    layer: str = "",
) -> ClassFilters:
    r"""
    Selectivity of each filter for each class, as a table.

    .. math:: s_{ck} = \frac{m_{ck} - \bar m_{\neg c, k}}{m_{ck} + \bar m_{\neg c, k}}

    with :math:`m_{ck}` the filter's mean response to the class and :math:`\bar m_{\neg c, k}` the mean
    of the other classes' means. The largest of a filter's values is its
    :func:`class_selectivity_index`. What the network does with the filter plays no role.

    Args:

        features (Tensor): Shape (N, K), responses that are not negative.
        labels (Tensor): Shape (N,).
        num_classes (int, optional): C. By default the largest label plus one.
        class_names (sequence of str, optional): C names.
                    Default: None
        layer (str): Name of the layer.

    Returns:
        *ClassFilters*.

    Raises:
        ValueError: Shapes do not fit, features are negative, or fewer than two classes have images.

    Examples::

        >>> import torch
        >>> from captum_classfilters.metrics import selectivity_filters
        >>> features = torch.tensor([[3., 1.], [1., 1.]])
        >>> selectivity_filters(features, torch.tensor([0, 1])).scores.round(decimals=2)
        tensor([[ 0.5000,  0.0000],
                [-0.5000,  0.0000]], dtype=torch.float64)
    """
    values, classes, number = checked_features(features, labels, num_classes, nonnegative=True)
    counts = torch.bincount(classes, minlength=number)
    seen = counts > 0
    if int(seen.sum()) < 2:
        raise ValueError("Selectivity needs two classes with images.")
    means = class_means(values, classes, number)
    rest = (means[seen].sum(0) - means) / (int(seen.sum()) - 1)
    return ClassFilters(
        scores=(means - rest) / (means + rest + _EPSILON),
        counts=counts,
        class_names=class_names,
        layer=layer,
        method="ClassSelectivity",
        provenance={"signed": False},
    )


def mutual_information_filters(
    features: Tensor,
    labels: Tensor,
    *,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    layer: str = "",
    num_neighbors: int = 3,
    balanced: bool = False,
    seed: int = 0,
) -> ClassFilters:
    r"""
    Mutual information of each filter's response and each class's indicator, as a table.

    It has no sign: a filter that is silent on a class, and on no other, tells as much as one that
    fires for it. See :func:`mutual_information_matrix`.

    Args:

        features (Tensor): Shape (N, K).
        labels (Tensor): Shape (N,).
        num_classes (int, optional): C. By default the largest label plus one.
        class_names (sequence of str, optional): C names.
                    Default: None
        layer (str): Name of the layer.
        num_neighbors, balanced, seed: As for :func:`mutual_information_matrix`.

    Returns:
        *ClassFilters*.

    Raises:
        ValueError: As :func:`mutual_information_matrix`.
    """
    matrix = mutual_information_matrix(
        features,
        labels,
        num_classes=num_classes,
        num_neighbors=num_neighbors,
        balanced=balanced,
        seed=seed,
    )
    counts = torch.bincount(labels.cpu().long(), minlength=len(matrix))
    return ClassFilters(
        scores=matrix.masked_fill((counts == 0)[:, None], float("nan")),
        counts=counts,
        class_names=class_names,
        layer=layer,
        method="MutualInformation",
        provenance={"signed": False},
    )
