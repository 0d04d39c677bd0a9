"""How far classes share filters, with what random sets would share."""

from dataclasses import dataclass

import torch
from torch import Tensor

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.ranking import random_sets
from captum_classfilters._core.tables import Table, Tabular, short_repr
from captum_classfilters.class_filters import ClassFilters


@short_repr
@dataclass(frozen=True)
class SetOverlap(Tabular):
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
                    (mean, standard deviation) over repetitions.
    """

    mutual_information: Tensor
    mean_all_pairs: float
    mean_off_diagonal: float
    mean_jaccard: float
    distinct_filters: int
    classes_per_filter: Tensor
    random: dict[str, tuple[float, float]]

    def _tables(self) -> list[Table]:
        figures = ("mean_all_pairs", "mean_off_diagonal", "mean_jaccard", "distinct_filters")
        rows = []
        for name in figures:
            mean, deviation = self.random.get(name, (None, None))
            row = {"": name.replace("_", " "), "sets": float(getattr(self, name))}
            rows.append(row | {"random sets": mean, "their deviation": deviation})
        return [
            Table(rows, dict.fromkeys(("sets", "random sets", "their deviation"), ".4g"), bars=())
        ]


@arguments_checked
def set_overlap(
    class_filters: ClassFilters | Tensor, *, repetitions: int = 20, seed: int = 0
) -> SetOverlap:
    r"""
    Measure how far the filter sets of different classes overlap.

    Mutual information of membership is *not* monotone in overlap: disjoint sets have some, too.
    Read it beside the Jaccard similarity (:meth:`ClassFilters.overlap`) and the random baseline,
    which Badola et al.'s script lacks.

    Args:

        class_filters (ClassFilters or Tensor): A table with a selection, or its mask (C, K).
        repetitions (int): Number of random draws for the baseline.
                    Default: 20
        seed (int): Seed of the draws.
                    Default: 0

    Returns:
        *SetOverlap*: ``mutual_information`` (C, C) in nats, its ``mean_all_pairs`` with those of a
        class and itself and its ``mean_off_diagonal``, ``mean_jaccard``, ``distinct_filters``,
        ``classes_per_filter`` (K,), and ``random``: for each figure (mean, standard deviation).

    Raises:
        ValueError: There are fewer than two classes.
    """
    mask = class_filters.selected if isinstance(class_filters, ClassFilters) else class_filters
    if mask.dim() != 2 or len(mask) < 2 or mask.dtype != torch.bool:
        raise ValueError(
            f"Expected a bool mask (C, K) of two classes or more, not {mask.dtype} of shape "
            f"{tuple(mask.shape)}."
        )
    mask = mask.cpu()
    own = _figures(mask)
    draws = (
        [_figures(drawn) for drawn in random_sets(mask, repetitions, seed)] if repetitions else []
    )
    random = {}
    for name in own if draws else ():
        values = torch.tensor([draw[name] for draw in draws], dtype=torch.float64)
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

    With :math:`p_{xy}` the shares of filters that are (1) or are not (0) in the two sets,

    .. math:: I = \sum_{x, y} p_{xy} \log \frac{p_{xy}}{p_{x \cdot} \, p_{\cdot y}} .

    Args:

        mask (Tensor): Shape (C, K), bool.

    Returns:
        *Tensor* of shape (C, C), float64, in nats; the diagonal holds the entropies.
    """
    sides = torch.stack([~mask, mask]).double()
    share = sides.mean(2)  # (2, C)
    joint = torch.einsum("xak,ybk->xyab", sides, sides) / mask.shape[1]
    expected = torch.einsum("xa,yb->xyab", share, share)
    return torch.xlogy(joint, joint / expected.clamp(min=1e-300)).sum((0, 1))


def _figures(mask: Tensor) -> dict[str, float]:
    information = membership_information(mask)
    overlap = ClassFilters(mask.double(), torch.ones(len(mask)), selected=mask).overlap()
    different = ~torch.eye(len(mask), dtype=torch.bool)
    return {
        "mean_all_pairs": float(information.mean()),
        "mean_off_diagonal": float(information[different].mean()),
        "mean_jaccard": float(overlap.jaccard[different].nanmean()),
        "distinct_filters": float(mask.any(0).sum()),
    }
