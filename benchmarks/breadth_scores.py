"""Two scores of the authors' code under names that say what they measure."""

import torch
from torch import Tensor

from captum_classfilters.class_filters import ClassFilters


def mixture_entropy_score(class_filters: ClassFilters) -> Tensor:
    r"""
    Entropies of two classes' frequency histograms, less the entropy of their mixture.

    .. math:: s_{ab} = H(p_a) + H(p_b) - H\big( (p_a + p_b) / 2 \big)

    The code that accompanies Badola et al.'s follow-up work calls this mutual information. It is
    none: it is large when histograms are **broad**, whether or not they depend on each other.

    Args:

        class_filters (ClassFilters): A table of frequencies, not negative.

    Returns:
        *Tensor* of shape (C, C), in nats; NaN for classes without images.

    Raises:
        ValueError: Scores are negative.
    """
    scores = class_filters.scores
    if bool((scores < 0).any()):
        raise ValueError("Scores are negative; the score needs frequencies.")
    share = scores / scores.sum(1, keepdim=True)
    entropy = _entropy(share)
    mixture = (share[:, None] + share[None, :]) / 2
    return entropy[:, None] + entropy[None, :] - _entropy(mixture)


def union_score(class_filters: ClassFilters) -> Tensor:
    r"""
    Logarithm of two sets' sizes' product over the size of their union.

    .. math:: s_{ab} = \log \frac{|S_a| \, |S_b|}{|S_a \cup S_b|}

    Two identical sets of five score log 5, disjoint ones log 2.5.

    Args:

        class_filters (ClassFilters): A table with a selection.

    Returns:
        *Tensor* of shape (C, C).
    """
    member = class_filters.selected.double()
    size = member.sum(1)
    union = size[:, None] + size[None, :] - member @ member.T
    return (size[:, None] * size[None, :] / union).log()


def _entropy(share: Tensor) -> Tensor:
    return -torch.xlogy(share, share).sum(-1)
