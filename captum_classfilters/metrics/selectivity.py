"""The class selectivity index, and a regularizer made of it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.outputs import at_least_float32
from captum_classfilters.identify.new_sums import new_sums
from captum_classfilters.metrics.features import checked_features

_EPSILON = 1e-7


@arguments_checked
def class_selectivity_index(class_means: Tensor) -> Tensor:
    r"""
    The class selectivity index of each filter.

    .. math:: \mathrm{SI}_k = \frac{m_{\max} - m_{\mathrm{rest}}}{m_{\max} + m_{\mathrm{rest}}} ,

    :math:`m_{\max}` the largest of the filter's class-conditional **mean** activations and
    :math:`m_{\mathrm{rest}}` the mean of the others (Morcos et al. 2018,
    https://arxiv.org/abs/1803.06959; Leavitt and Morcos 2020, https://arxiv.org/abs/2003.01262). Class
    sums in place of means would reward filters for the larger classes. The index is defined for
    activations that are not negative, as those after a ReLU are.

    Args:

        class_means (Tensor): Shape (C, K), not negative, from :func:`class_means` for example. Rows of
                    NaN, classes without images, are left out.

    Returns:
        *Tensor* of shape (K,), between 0 and 1; 0 for a filter that is always zero.

    Raises:
        ValueError: There are fewer than two classes with images, or a mean is negative or infinite.

    Examples::

        >>> import torch
        >>> from captum_classfilters.metrics import class_selectivity_index
        >>> class_selectivity_index(torch.tensor([[1., 1.], [0., 1.]])).round(decimals=3)
        tensor([1., 0.])
    """
    if class_means.dim() != 2:
        raise ValueError(f"class_means have shape {tuple(class_means.shape)}; expected (C, K).")
    means = class_means[~class_means.isnan().any(1)]
    if len(means) < 2:
        raise ValueError(f"class_means {tuple(class_means.shape)} need two classes with images.")
    wrong = ((means < 0) | means.isinf()).any(0).nonzero()[:, 0].tolist()
    if wrong:
        raise ValueError(
            f"class_means of {len(wrong)} filters are negative or infinite, of filter {wrong[0]} for "
            f"example, whose smallest is {float(means[:, wrong[0]].min()):.3g}. The index is defined "
            "for activations that are not negative: take a layer after its ReLU."
        )
    largest = means.max(0).values
    rest = (means.sum(0) - largest) / (len(means) - 1)
    return (largest - rest) / (largest + rest + _EPSILON)


@arguments_checked
def class_means(features: Tensor, labels: Tensor, num_classes: int | None = None) -> Tensor:
    r"""
    Mean of each filter's response over each class's images.

    Args:

        features (Tensor): Shape (N, K).
        labels (Tensor): Shape (N,).
        num_classes (int, optional): C. By default the largest label plus one.

    Returns:
        *Tensor* of shape (C, K), float64; NaN rows for classes without images.
    """
    features, labels, num_classes = checked_features(features, labels, num_classes)
    sums = new_sums(num_classes, features.shape[1], sync_on_compute=False)
    sums.update(features, labels)
    return sums.tables()["mean"]


@arguments_checked
def selectivity_regularizer(activations: Tensor | Sequence[Tensor], labels: Tensor) -> Tensor:
    r"""
    Mean class selectivity of a batch, differentiable, to be added to a training loss.

    .. math:: \mathrm{loss} = \mathrm{CE} + \alpha \, \frac{1}{L} \sum_l \frac{1}{K_l} \sum_k
              \mathrm{SI}_{lk}

    A **positive** :math:`\alpha` makes filters *less* selective, a negative one more (Leavitt and
    Morcos write the term with the opposite sign). Classes that the batch lacks are left out.

    Args:

        activations (Tensor or sequence of Tensor): Of each layer, (N, K, ...), after a ReLU.
        labels (Tensor): Shape (N,).

    Returns:
        *Tensor*, a scalar in [0, 1].

    Raises:
        ValueError: The shapes do not fit, the batch holds fewer than two classes, or a class's mean
                    is negative.
    """
    layers = [activations] if isinstance(activations, Tensor) else list(activations)
    for activation in layers:
        if activation.dim() < 2 or labels.shape != activation.shape[:1]:
            raise ValueError(
                f"activations {tuple(activation.shape)} and labels {tuple(labels.shape)} do not fit; "
                "expected (N, K, ...) and one class index for each image (N,)."
            )
    present, index = labels.unique(return_inverse=True)
    if len(present) < 2:
        raise ValueError("The batch holds a single class; selectivity needs two.")
    terms = []
    for activation in layers:
        index = index.to(activation.device)
        values = at_least_float32(activation)  # whose sums half precision may not hold
        values = values.flatten(2).mean(2) if values.dim() > 2 else values
        total = values.new_zeros(len(present), values.shape[1]).index_add(0, index, values)
        means = total / torch.bincount(index)[:, None]
        terms.append(class_selectivity_index(means).mean())
    return torch.stack([term.to(layers[0].device) for term in terms]).mean()
