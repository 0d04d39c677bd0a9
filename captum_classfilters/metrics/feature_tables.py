"""Class filters by the response and the label: correlation, selectivity and mutual information."""

import torch
from torch import Tensor

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.types import ClassNames
from captum_classfilters.class_filters import ClassFilters
from captum_classfilters.metrics.features import checked_features
from captum_classfilters.metrics.mutual_information import mutual_information_matrix
from captum_classfilters.metrics.selectivity import class_means

_EPSILON = 1e-7


@arguments_checked
def selectivity_filters(
    features: Tensor,
    labels: Tensor,
    *,
    num_classes: int | None = None,
    class_names: ClassNames | None = None,
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
    _check_two_classes(counts, "Selectivity")
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


@arguments_checked
def mutual_information_filters(
    features: Tensor,
    labels: Tensor,
    *,
    num_classes: int | None = None,
    class_names: ClassNames | None = None,
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


@arguments_checked
def correlation_filters(
    features: Tensor,
    labels: Tensor,
    weight: Tensor | None = None,
    *,
    num_filters: int | None = None,
    num_classes: int | None = None,
    class_names: ClassNames | None = None,
    layer: str = "",
) -> ClassFilters:
    r"""
    How each filter's response goes with each class's label, as a table.

    Without a weight it is the correlation of the response :math:`a_k` and the class's indicator,

    .. math:: r_{ck} = \frac{\mathrm{cov}(a_k, 1[y = c])}{\mathrm{sd}(a_k) \, \mathrm{sd}(1[y = c])}
              = \sqrt{\frac{n_c}{N - n_c}} \, \frac{m_{ck} - m_k}{\mathrm{sd}(a_k)} ,

    :math:`m_{ck}` the filter's mean response to the class's :math:`n_c` images and :math:`m_k` to all.
    With the weight of a linear head it is that of the filter's *contribution* :math:`w_{ck} a_k` to
    the class's logit, in logits: :math:`w_{ck} \, \mathrm{sd}(a_k) \, r_{ck}`. A filter scores high
    that raises the logit, **and** does so for this class's images more than for others.

    Both fall when images lose the label and when others gain it, which means over the class's images
    alone do not: see :func:`validate`, and Oikarinen, Yan and Weng, ICML 2025, whose two tests it
    makes.

    Args:

        features (Tensor): Shape (N, K), of :func:`~captum_classfilters.identify.collect_features` for
                    example, which takes one forward pass for each image.
        labels (Tensor): Shape (N,), class indices.
        weight (Tensor, optional): Shape (C, K), the head's.
                    Default: None
        num_filters (int, optional): Select so many filters of each class.
                    Default: None
        num_classes (int, optional): C. By default the largest label plus one.
        class_names (sequence of str, optional): C names.
                    Default: None
        layer (str): Name of the layer.

    Returns:
        *ClassFilters*. A filter whose response never changes scores 0, a class without images NaN.

    Raises:
        ValueError: Shapes do not fit, labels are out of range, features are not finite, or fewer than
            two classes have images.

    Examples::

        >>> import torch
        >>> from captum_classfilters.metrics import correlation_filters
        >>> features = torch.tensor([[1., 2.], [1., 0.], [0., 2.], [0., 0.]])
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> correlation_filters(features, labels).scores
        tensor([[ 1.,  0.],
                [-1.,  0.]], dtype=torch.float64)
        >>> weight = torch.tensor([[4., 1.], [0., 1.]])
        >>> correlation_filters(features, labels, weight).scores
        tensor([[2., 0.],
                [-0., 0.]], dtype=torch.float64)
    """
    values, classes, number = checked_features(features, labels, num_classes)
    counts = torch.bincount(classes, minlength=number)
    _check_two_classes(counts, "Correlation")
    constant = values.amax(0) == values.amin(0)
    centered = (values - values.mean(0)).masked_fill(constant, 0)
    odds = counts.double() / (len(values) - counts)
    scores = odds.sqrt()[:, None] * class_means(centered, classes, number)
    if weight is None:
        scores = scores / centered.square().mean(0).sqrt().masked_fill(constant, 1)
    else:
        if weight.shape != scores.shape:
            raise ValueError(
                f"weight has shape {tuple(weight.shape)}; expected {tuple(scores.shape)}, a row for "
                "each class and a column for each filter."
            )
        scores = scores * weight.detach().to(scores)
    table = ClassFilters(
        scores=scores,
        counts=counts,
        class_names=class_names,
        layer=layer,
        method="LabelCorrelation" if weight is None else "ContributionCorrelation",
        provenance={"signed": True},
    )
    return table if num_filters is None else table.select(num_filters)


def _check_two_classes(counts: Tensor, what: str) -> None:
    if int((counts > 0).sum()) < 2:
        raise ValueError(f"{what} needs two classes with images.")
