"""Groups of filters that do alike, and what of them the survivors of pruning still hold."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.extras import extra
from captum_classfilters._core.tables import short_repr
from captum_classfilters.spectral.select_rank import effective_rank as effective_rank_of

Similarity = Literal["cosine", "correlation"]


@short_repr
@dataclass(frozen=True)
class Coverage:
    r"""
    How many groups of filters still have a member.

    Args:

        share (float): Share of the groups with a survivor.
        chance (float): The share expected if as many filters survive at random.
        lost (tuple of int): The groups without a survivor.
    """

    share: float
    chance: float
    lost: tuple[int, ...]


@arguments_checked
def filter_clusters(
    vectors: Tensor,
    *,
    similarity: Similarity = "cosine",
    threshold: float = 0.7,
    num_clusters: int | None = None,
) -> Tensor:
    r"""
    Group a layer's filters by the likeness of their weights or of their activations.

    Average-linkage clustering (scikit-learn) of the distances 1 - similarity.

    Args:

        vectors (Tensor): Shape (K, D): a layer's weights flattened, or its activations on D images
                    (``collect_features(...)[0].T``).
        similarity (str): ``"cosine"``, for weights, or ``"correlation"``, for activations.
                    Default: "cosine"
        threshold (float): Groups are merged while their mean similarity is at least this.
                    Default: 0.7
        num_clusters (int, optional): Make so many groups instead.
                    Default: None

    Returns:
        *Tensor* of shape (K,), int64: the group of each filter, numbered from 0 in the order of
        their first members.

    Raises:
        ValueError: Shapes or options are wrong, or a filter has no direction (only zeros, or for
                    correlations a constant).
        ImportError: scikit-learn, of the extra ``prune``, is not installed.

    Examples::

        >>> import torch
        >>> from captum_classfilters.heads import filter_clusters
        >>> filter_clusters(torch.tensor([[1., 0.], [0., 1.], [2., .1]]))
        tensor([0, 1, 0])
    """
    cluster = extra("sklearn.cluster", "filter_clusters")
    distances = 1 - _similarity(vectors, similarity)
    num_filters = len(distances)
    if num_clusters is not None and not 1 <= num_clusters <= num_filters:
        raise ValueError(f"num_clusters={num_clusters}: expected 1 to {num_filters}.")
    if not -1 <= threshold <= 1:
        raise ValueError(f"threshold={threshold} is no similarity; choose a number in [-1, 1].")
    if num_filters == 1:
        return torch.zeros(1, dtype=torch.int64)
    clusters = cluster.AgglomerativeClustering(
        n_clusters=num_clusters,
        metric="precomputed",
        linkage="average",
        # Merging stops at distances of the threshold or above; equal similarity is to merge.
        distance_threshold=None if num_clusters is not None else 1 - threshold + 1e-9,
    ).fit_predict(distances.clamp(min=0).fill_diagonal_(0).numpy())
    renumbered: dict[int, int] = {}
    return torch.tensor(
        [renumbered.setdefault(int(cluster), len(renumbered)) for cluster in clusters]
    )


@arguments_checked
def coverage(clusters: Tensor, kept: Tensor) -> Coverage:
    r"""
    Share of the groups of filters that have a survivor, and what chance would leave.

    By chance a group of *s* of *K* filters loses all when *n* survive with probability
    :math:`\binom{K-s}{n} / \binom{K}{n}`.

    Args:

        clusters (Tensor): Shape (K,), the group of each filter, from :func:`filter_clusters`.
        kept (Tensor): Shape (K,), bool, which filters survive.

    Returns:
        *Coverage*: The ``share`` of groups with a survivor, that by ``chance``, and the ``lost``
        groups.

    Raises:
        ValueError: Shapes do not fit.
    """
    from scipy.stats import hypergeom

    if clusters.dim() != 1:
        raise ValueError(f"clusters have shape {tuple(clusters.shape)}; expected (K,).")
    clusters, kept = clusters.cpu(), _mask(kept, len(clusters))
    groups, sizes = clusters.unique(return_counts=True)
    alive = clusters[kept].unique()
    lost = [int(group) for group in groups if group not in alive]
    none_left = hypergeom.pmf(0, len(clusters), sizes.numpy(), int(kept.sum()))
    return Coverage(
        share=1 - len(lost) / len(groups),
        chance=float(1 - none_left.mean()),
        lost=tuple(lost),
    )


@arguments_checked
def diversity(vectors: Tensor, kept: Tensor | Sequence[bool] | None = None) -> float:
    r"""
    Mean of 1 - abs(correlation) over all pairs of filters; 0 if they all do the same.

    Args:

        vectors (Tensor): Shape (K, D), weights or activations.
        kept (Tensor or sequence, optional): Shape (K,), bool; only these filters.
                    Default: None

    Returns:
        *float* in [0, 1].

    Raises:
        ValueError: Fewer than two filters, or a constant one, or ``kept`` is no mask of them.
    """
    alike = _similarity(_rows(vectors, kept), "correlation").abs()
    num_filters = len(alike)
    if num_filters < 2:
        raise ValueError(f"There is {num_filters} filter; a diversity needs two or more.")
    return float((1 - alike).triu(1).sum() / (num_filters * (num_filters - 1) / 2))


@arguments_checked
def effective_rank(vectors: Tensor, kept: Tensor | Sequence[bool] | None = None) -> float:
    r"""
    Effective number of directions of filters, from the singular values of their vectors by
    :func:`captum_classfilters.spectral.effective_rank`.

    Args:

        vectors (Tensor): Shape (K, D), weights or activations.
        kept (Tensor or sequence, optional): Shape (K,), bool; only these filters.
                    Default: None

    Returns:
        *float* from 1 to min(K, D).

    Raises:
        ValueError: The matrix is empty or zero, or ``kept`` is no mask of its rows.
    """
    rows = _rows(vectors, kept)
    if rows.dim() != 2 or not bool(rows.abs().sum() > 0):
        raise ValueError(f"vectors of shape {tuple(rows.shape)}: expected (K, D), not all zero.")
    return effective_rank_of(torch.linalg.svdvals(rows))


def _rows(vectors: Tensor, kept: Tensor | Sequence[bool] | None = None) -> Tensor:
    """The vectors that are kept, as float64, on the CPU."""
    rows = vectors.detach().cpu().double()
    return rows if kept is None else rows[_mask(kept, len(rows))]


def _mask(kept: Tensor | Sequence[bool], number: int) -> Tensor:
    """Which filters survive (K,), on the CPU: zeros and ones would be read as filters 0 and 1."""
    mask = torch.as_tensor(kept, device="cpu")
    if mask.dtype != torch.bool or mask.shape != (number,):
        raise ValueError(
            f"kept is {mask.dtype} of shape {tuple(mask.shape)}; expected a bool mask of shape "
            f"({number},)."
        )
    return mask


def _similarity(vectors: Tensor, kind: Similarity) -> Tensor:
    """Similarities of all pairs of rows (K, K)."""
    if kind not in ("cosine", "correlation"):
        raise ValueError(f"similarity={kind!r}; choose 'cosine' or 'correlation'.")
    if vectors.dim() != 2 or not len(vectors):
        raise ValueError(f"vectors have shape {tuple(vectors.shape)}; expected (K, D).")
    rows = _rows(vectors)
    largest = rows.abs().max().clamp(min=1e-300)
    rows = rows - rows.mean(1, keepdim=True) if kind == "correlation" else rows
    size = rows.norm(dim=1, keepdim=True)
    flat = (size[:, 0] <= 1e-12 * largest).nonzero()[:, 0]
    if len(flat):
        raise ValueError(
            f"Filter {int(flat[0])} is constant, so it has no {kind} with others; leave such "
            "filters out."
        )
    rows = rows / size
    return (rows @ rows.T).clamp(-1, 1)
