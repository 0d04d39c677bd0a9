"""How far classes share filters, with what random sets would share."""

from dataclasses import dataclass

import torch
from torch import Tensor

from captum_classfilters.class_filters import ClassFilters


@dataclass(frozen=True)
class SetOverlap:
    r"""
    Overlap of the classes' filter sets.

    Args:

        mutual_information (Tensor): Shape (C, C), nats, between membership in two classes' sets.
        mean_all_pairs (float): Its mean over all ordered pairs, **pairs of a class with itself
                    included**: the figure of the authors' script. Self-pairs alone give
                    H(k/K) / C and dominate it.
        mean_off_diagonal (float): Its mean over pairs of different classes.
        mean_jaccard (float): Mean Jaccard similarity over pairs of different classes.
        distinct_filters (int): Filters that any class uses.
        classes_per_filter (Tensor): Shape (K,).
        random (dict): The same four figures for random sets of the same sizes, each as
                    (mean, standard deviation) over seeds.
    """

    mutual_information: Tensor
    mean_all_pairs: float
    mean_off_diagonal: float
    mean_jaccard: float
    distinct_filters: int
    classes_per_filter: Tensor
    random: dict[str, tuple[float, float]]


def set_overlap(class_filters: ClassFilters | Tensor, *, random_seeds: int = 20) -> SetOverlap:
    r"""
    Measure how far the filter sets of different classes overlap.

    Mutual information of membership is *not* monotone in overlap: disjoint sets have some, too.
    Read it beside the Jaccard similarity and the random baseline, which Badola et al.'s script
    lacks.

    Args:

        class_filters (ClassFilters or Tensor): A table with a selection, or its mask (C, K).
        random_seeds (int): Number of random draws for the baseline.
                    Default: 20

    Returns:
        *SetOverlap*.

    Raises:
        ValueError: There are fewer than two classes.
    """
    mask = class_filters.selected if isinstance(class_filters, ClassFilters) else class_filters
    if mask.dim() != 2 or len(mask) < 2 or mask.dtype != torch.bool:
        raise ValueError(f"Expected a bool mask (C, K) of two classes or more, not {mask.shape}.")
    own = _figures(mask)
    draws = []
    for seed in range(random_seeds):
        generator = torch.Generator().manual_seed(seed)
        rank = torch.rand(mask.shape, generator=generator).argsort(1).argsort(1)
        draws.append(_figures(rank < mask.sum(1, keepdim=True)))
    random = {}
    for name in own:
        values = torch.tensor([draw[name] for draw in draws], dtype=torch.float64)
        if len(values):
            random[name] = (float(values.mean()), float(values.std(correction=0)))
    return SetOverlap(
        mutual_information=membership_information(mask),
        distinct_filters=int(own["distinct_filters"]),
        mean_all_pairs=own["mean_all_pairs"],
        mean_off_diagonal=own["mean_off_diagonal"],
        mean_jaccard=own["mean_jaccard"],
        classes_per_filter=mask.sum(0),
        random=random,
    )


def membership_information(mask: Tensor) -> Tensor:
    r"""
    Mutual information between membership in the filter sets of every two classes.

    Args:

        mask (Tensor): Shape (C, K), bool.

    Returns:
        *Tensor* of shape (C, C), float64, in nats; the diagonal holds the entropies.
    """
    member = mask.double()
    number = mask.shape[1]
    both = member @ member.T
    size = member.sum(1)
    cells = (
        (both, size[:, None], size[None, :]),
        (size[:, None] - both, size[:, None], number - size[None, :]),
        (size[None, :] - both, number - size[:, None], size[None, :]),
        (
            number - size[:, None] - size[None, :] + both,
            number - size[:, None],
            number - size[None],
        ),
    )
    total = torch.zeros_like(both)
    for count, row, column in cells:
        share = count / number
        expected = (row * column / number**2).expand_as(share)
        total += torch.where(share > 0, share * (share / expected).log(), 0.0)
    return total


def _figures(mask: Tensor) -> dict[str, float]:
    information = membership_information(mask)
    member = mask.double()
    both = member @ member.T
    size = member.sum(1)
    jaccard = both / (size[:, None] + size[None, :] - both)
    different = ~torch.eye(len(mask), dtype=torch.bool)
    return {
        "mean_all_pairs": float(information.mean()),
        "mean_off_diagonal": float(information[different].mean()),
        "mean_jaccard": float(jaccard[different].nanmean()),
        "distinct_filters": float(mask.any(0).sum()),
    }
