"""Whether a kind of filter, color filters for example, is removed earlier than chance."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from captum_classfilters._core.arguments import arguments_checked, indices_of
from captum_classfilters._core.tables import short_repr

if TYPE_CHECKING:
    from .pruning_order import PruningOrder


@short_repr
@dataclass(frozen=True)
class SelectivityTest:
    r"""
    How early a kind of filter was removed; prints as a sentence.

    Args:

        top (int): Length of the beginning that was looked at.
        count (int): Filters of the kind among the first ``top`` removed.
        base_rate (float): Share of the kind among all filters of the layer.
        hypergeometric_p (float): Probability of at least so many in a random order.
        mean_rank (float): Mean place in the order of the filters of the kind, 1 for the first;
                    filters that stayed share the last places.
        mean_rank_others (float): The same for the others.
        rank_p (float): Mann and Whitney's one-sided p for the kind being removed earlier.
    """

    top: int
    count: int
    base_rate: float
    hypergeometric_p: float
    mean_rank: float
    mean_rank_others: float
    rank_p: float

    @property
    def expected(self) -> float:
        """Filters of the kind expected among the first by chance."""
        return self.top * self.base_rate

    def __str__(self) -> str:
        return (
            f"{self.count} of the first {self.top} removed are of the kind, {self.expected:.1f} "
            f"expected at a base rate of {self.base_rate:.3f} (p = {self.hypergeometric_p:.2g}); "
            f"mean place {self.mean_rank:.1f} against {self.mean_rank_others:.1f} of the others "
            f"(p = {self.rank_p:.2g})"
        )


@arguments_checked
def selectivity_test(
    order: "Tensor | Sequence[int] | PruningOrder",
    selective: Tensor | Sequence[bool],
    top: int = 20,
) -> SelectivityTest:
    r"""
    Test whether a kind of filter is removed earlier than in a random order.

    A count alone says nothing without the share of the kind in the layer: 14 of 20 are expected
    where 70 per cent of the filters are of it.

    Args:

        order (Tensor, sequence or PruningOrder): Filters in the order of their removal, all or the
                    first of them.
        selective (Tensor or sequence): Shape (K,), bool. Which filters are of the kind, from
                    :func:`weight_chroma` above a threshold or from labels by hand.
        top (int): How many of the first removed to count.
                    Default: 20

    Returns:
        *SelectivityTest*.

    Raises:
        ValueError: ``order`` names a filter twice or one that is not there, all or no filters are
                    of the kind, or ``top`` exceeds the order.

    Examples::

        >>> import torch
        >>> from captum_classfilters.pruning import selectivity_test
        >>> color = torch.arange(96) < 48  # half of 96 filters
        >>> order = [*range(17), 50, 51, 52, *range(17, 48), 48, 49, *range(53, 96)]
        >>> round(selectivity_test(order, color).hypergeometric_p, 5)  # 17 of the first 20
        0.00038
    """
    from scipy.stats import hypergeom, mannwhitneyu

    kind = torch.as_tensor(selective).cpu()
    if kind.dtype != torch.bool or kind.dim() != 1:
        raise ValueError(
            f"selective is {kind.dtype} of shape {tuple(kind.shape)}; expected a mask."
        )
    removed = indices_of("order", getattr(order, "order", order))
    num_filters = len(kind)
    if len(set(removed)) != len(removed) or not set(removed) <= set(range(num_filters)):
        raise ValueError(f"The order must name each of the {num_filters} filters at most once.")
    if not 1 <= top <= len(removed):
        raise ValueError(f"top={top} is out of range: the order has {len(removed)} filters.")
    if bool(kind.all()) or not bool(kind.any()):
        raise ValueError("All filters or none are of the kind; there is nothing to tell apart.")
    count, of_kind = int(kind[removed[:top]].sum()), int(kind.sum())
    # Those that stayed share the mean of the last places.
    rank = torch.full((num_filters,), (len(removed) + 1 + num_filters) / 2, dtype=torch.float64)
    rank[removed] = torch.arange(1, len(removed) + 1, dtype=torch.float64)
    return SelectivityTest(
        top=top,
        count=count,
        base_rate=of_kind / num_filters,
        hypergeometric_p=float(hypergeom.sf(count - 1, num_filters, of_kind, top)),
        mean_rank=float(rank[kind].mean()),
        mean_rank_others=float(rank[~kind].mean()),
        rank_p=float(
            mannwhitneyu(rank[kind].numpy(), rank[~kind].numpy(), alternative="less").pvalue
        ),
    )
