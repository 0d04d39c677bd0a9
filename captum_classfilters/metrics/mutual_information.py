"""Mutual information between filters and classes, for every pair at once."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from captum_classfilters.metrics.features import checked_features, checked_labels

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


def mutual_information_matrix(
    features: Tensor,
    labels: Tensor,
    *,
    num_classes: int | None = None,
    num_neighbors: int = 3,
    balanced: bool = False,
    seed: int = 0,
    num_workers: int = 1,
    show_progress: bool = False,
) -> Tensor:
    r"""
    Mutual information of each filter's response and each class's indicator.

    The response is continuous, the indicator :math:`1[y = c]` binary, and the estimator is that of
    Ross (2014, https://doi.org/10.1371/journal.pone.0087357), which scikit-learn's
    ``mutual_info_classif`` uses and Liang et al. (https://arxiv.org/abs/2007.08194) measure with:

    .. math:: I_{ck} = \psi(N) + \langle \psi(q_i) \rangle - \langle \psi(N_{y_i}) \rangle
              - \langle \psi(m_i) \rangle ,

    where the ball around image *i* reaches its *q*-th neighbor among images with the same
    indicator, and holds :math:`m_i` of all images. As there, responses are scaled to unit variance,
    get noise of relative size 1e-10 that decides ties, and negative estimates are set to zero.

    Only the images next to a member of class *c* have a ball that the class changes, at most
    ``2 num_neighbors`` of them for each member. All classes together therefore cost
    O(N log N) for each filter, where one call of scikit-learn for each class costs O(C N log N).

    Args:

        features (Tensor): Shape (N, K), responses of K filters to N images.
        labels (Tensor): Shape (N,), class indices.
        num_classes (int, optional): C. By default the largest label plus one.
        num_neighbors (int): q.
                    Default: 3
        balanced (bool): For each class, use its images and an equal number of others, drawn with
                    ``seed``. The attainable bound is then ln 2 for every class.
                    Default: False
        seed (int): Seed of the noise and of the draw.
                    Default: 0
        num_workers (int): Threads; filters are independent of each other.
                    Default: 1
        show_progress (bool): Show a progress bar.
                    Default: False

    Returns:
        *Tensor* of shape (C, K), float64, in nats. Zero for classes without two images on each
        side.

    Raises:
        ValueError: Shapes do not fit, labels are out of range, or features are not finite.

    Examples::

        >>> import torch
        >>> from captum_classfilters.metrics import mutual_information_matrix
        >>> labels = torch.arange(400) % 2
        >>> telling = labels + 0.01 * torch.rand(400)
        >>> matrix = mutual_information_matrix(
        ...     torch.stack([telling, torch.rand(400)], dim=1), labels)
        >>> matrix.shape, bool(matrix[0, 0] > 0.68), bool(matrix[0, 1] < 0.1)
        (torch.Size([2, 2]), True, True)
    """
    if num_neighbors < 1:
        raise ValueError(f"num_neighbors={num_neighbors} must be at least 1.")
    checked, class_of, number = checked_features(features, labels, num_classes)
    values, classes = checked.numpy(), class_of.numpy()
    noise = np.random.default_rng(seed)
    draws = _balanced_draws(classes, number, noise) if balanced else None
    seeds = [int(noise.integers(0, 2**63)) for _ in range(values.shape[1])]

    def one_filter(index: int) -> Floats:
        column = _jittered(values[:, index], np.random.default_rng(seeds[index]))
        if draws is None:
            return _all_classes(column, classes, number, num_neighbors)
        row = np.zeros(number)
        for class_, chosen in draws.items():
            indicator = (classes[chosen] == class_).astype(np.int64)
            row[class_] = _all_classes(column[chosen], indicator, 2, num_neighbors)[1]
        return row

    order = range(values.shape[1])
    bar = tqdm(total=len(order), desc="mutual information", disable=not show_progress)
    rows = []
    with ThreadPoolExecutor(max_workers=max(1, num_workers)) as pool, bar:
        for row in pool.map(one_filter, order):
            rows.append(row)
            bar.update()
    return torch.from_numpy(np.stack(rows, axis=1))


def mutual_information_score(matrix: Tensor) -> float:
    r"""
    The mutual information score (MIS) of Liang et al.: the mean over filters of their best class's.

    .. math:: \mathrm{MIS} = \frac{1}{K} \sum_k \max_c I_{ck}

    Args:

        matrix (Tensor): Shape (C, K), from :func:`mutual_information_matrix`.

    Returns:
        *float*, in nats.

    Raises:
        ValueError: The table is not a matrix with classes and filters.
    """
    if matrix.dim() != 2 or not matrix.numel():
        raise ValueError(f"matrix has shape {tuple(matrix.shape)}; expected (C, K).")
    return float(matrix.max(0).values.mean())


def mutual_information_bound(
    labels: Tensor, *, num_classes: int | None = None, balanced: bool = False
) -> Tensor:
    r"""
    The largest mutual information that any response can have with each class's indicator.

    This is the indicator's entropy :math:`H(1[y = c])`: 0.325 nats for ten classes of equal size,
    0.0079 for a thousand, ln 2 for balanced draws.

    Args:

        labels (Tensor): Shape (N,), class indices.
        num_classes (int, optional): C. By default the largest label plus one.
        balanced (bool): For balanced draws.
                    Default: False

    Returns:
        *Tensor* of shape (C,), float64, in nats.

    Raises:
        ValueError: The labels are not class indices.
    """
    classes, number = checked_labels(labels, labels.numel(), num_classes)
    counts = torch.bincount(classes, minlength=number).to(torch.float64)
    share = torch.full_like(counts, 0.5) if balanced else counts / counts.sum()
    other = 1 - share
    return -(torch.xlogy(share, share) + torch.xlogy(other, other))


def _jittered(column: Floats, noise: np.random.Generator) -> Floats:
    """Scaled to unit variance, ties decided by noise of relative size 1e-10."""
    deviation = column.std()
    scaled = column / deviation if deviation > 0 else column
    size = 1e-10 * max(1.0, float(np.abs(scaled).mean()))
    jittered: Floats = scaled + size * noise.standard_normal(len(scaled))
    return jittered


def _balanced_draws(
    classes: Integers, number: int, noise: np.random.Generator
) -> dict[int, Integers]:
    """For each class its images and as many others."""
    draws = {}
    for class_ in range(number):
        members = np.flatnonzero(classes == class_)
        others = np.flatnonzero(classes != class_)
        if len(members) and len(others):
            size = min(len(members), len(others))
            drawn = noise.choice(others, size=size, replace=False)
            draws[class_] = np.concatenate([members, np.sort(drawn)])
    return draws


def _all_classes(column: Floats, classes: Integers, number: int, neighbors: int) -> Floats:
    """Mutual information of one response with every class's indicator (C,)."""
    order = np.argsort(column, kind="stable")
    x, y = column[order], classes[order]
    counts = np.bincount(y, minlength=number)
    total = len(x)
    others = total - counts
    members = _Members(y, counts)
    inside = _inside(x, y, counts, members, neighbors)
    outside = _outside(x, y, counts, members, neighbors)
    psi = _digamma(np.maximum(np.arange(total + 1), 1))
    q_inside = np.minimum(neighbors, np.maximum(counts - 1, 1))
    q_outside = np.minimum(neighbors, np.maximum(others - 1, 1))
    within = counts * (psi[q_inside] - psi[counts]) + others * (psi[q_outside] - psi[others])
    estimate = psi[total] + (within - inside - outside) / total
    usable = (counts > 1) & (others > 1)
    return np.where(usable, np.maximum(estimate, 0.0), 0.0)


class _Members:
    """Positions of each class's members in sorted order, and of its n-th non-member."""

    def __init__(self, y: Integers, counts: Integers) -> None:
        self.positions = np.argsort(y, kind="stable")  # grouped by class, rising within
        self.start = np.concatenate([[0], np.cumsum(counts)])
        grouped = y[self.positions]
        self.rank = np.arange(len(y)) - self.start[grouped]  # of each member within its class
        # One rising sequence serves all classes: each class has its own stretch of keys.
        self.stride = len(y) + 1
        self.position_keys = grouped * self.stride + self.positions
        self.non_member_keys = grouped * self.stride + self.positions - self.rank

    def before(self, classes: Integers, positions: Integers) -> Integers:
        """Number of a class's members before a position."""
        found = np.searchsorted(self.position_keys, classes * self.stride + positions)
        return found - self.start[classes]

    def non_member(self, classes: Integers, ranks: Integers) -> Integers:
        """Position of a class's non-member of a given rank."""
        found = np.searchsorted(self.non_member_keys, classes * self.stride + ranks, side="right")
        return ranks + found - self.start[classes]


def _inside(x: Floats, y: Integers, counts: Integers, members: _Members, neighbors: int) -> Floats:
    """Sum of digamma(m) over each class's own images (C,)."""
    here = members.positions
    classes, ranks = y[here], members.rank
    sizes = counts[classes]

    def neighbor(offset: int | Integers) -> Integers:
        reached = np.clip(ranks + offset, 0, sizes - 1)
        return here[members.start[classes] + reached]

    balls = _ball_counts(x, here, ranks, sizes, neighbors, neighbor)
    sums = np.bincount(classes, weights=_digamma(balls), minlength=len(counts))
    return sums.astype(np.float64)


def _outside(x: Floats, y: Integers, counts: Integers, members: _Members, neighbors: int) -> Floats:
    """Sum of digamma(m) over each class's non-members (C,)."""
    others = len(x) - counts
    # Away from a class's members a ball holds q images, itself included.
    plain = _digamma(np.minimum(neighbors, np.maximum(others - 1, 1)))
    positions, classes = _near_members(y, len(counts), neighbors)
    ranks = positions - members.before(classes, positions)
    sizes = others[classes]

    def neighbor(offset: int | Integers) -> Integers:
        return members.non_member(classes, np.clip(ranks + offset, 0, sizes - 1))

    balls = _ball_counts(x, positions, ranks, sizes, neighbors, neighbor)
    change = np.bincount(classes, weights=_digamma(balls) - plain[classes], minlength=len(counts))
    result: Floats = others * plain + change
    return result


def _near_members(y: Integers, number: int, reach: int) -> tuple[Integers, Integers]:
    """All pairs of an image and another class that has a member within ``reach`` places."""
    index = np.arange(len(y))
    pairs = [np.empty(0, dtype=np.int64)]
    for offset in range(1, min(reach, len(y) - 1) + 1):
        low, high = index[:-offset], index[offset:]
        different = y[low] != y[high]
        pairs.append(low[different] * number + y[high][different])
        pairs.append(high[different] * number + y[low][different])
    distinct = np.unique(np.concatenate(pairs))
    return distinct // number, distinct % number


def _ball_counts(
    x: Floats,
    positions: Integers,
    ranks: Integers,
    sizes: Integers,
    neighbors: int,
    neighbor: Callable[[int | Integers], Integers],
) -> Integers:
    """Images strictly closer than the q-th neighbor of the same group, each counting itself."""
    here = x[positions]
    within = np.minimum(neighbors, sizes - 1)
    radius = np.full(len(positions), np.inf)
    edge, edge_is_low = positions.copy(), np.zeros(len(positions), dtype=bool)
    # The q nearest of a sorted group are a window around the image: try every window.
    for left in range(neighbors + 1):
        right = np.maximum(within - left, 0)
        valid = (left <= within) & (ranks >= left) & (ranks + right < sizes)
        low = neighbor(-left)
        high = neighbor(right)
        to_low, to_high = here - x[low], x[high] - here
        reach = np.where(valid, np.maximum(to_low, to_high), np.inf)
        better = reach < radius
        radius = np.where(better, reach, radius)
        edge = np.where(better, np.where(to_low >= to_high, low, high), edge)
        edge_is_low = np.where(better, to_low >= to_high, edge_is_low)
    # On the neighbor's own side positions count exactly; only the other side is searched.
    alone = ~np.isfinite(radius)
    reach = np.where(alone, 0.0, radius)
    first_closer = np.minimum(np.searchsorted(x, here - reach, side="right"), positions)
    first_beyond = np.maximum(np.searchsorted(x, here + reach, side="left"), positions + 1)
    lower = np.where(edge_is_low, edge + 1, first_closer)
    upper = np.where(edge_is_low, first_beyond, edge)
    counted: Integers = np.where(alone, 1, np.maximum(upper - lower, 1))
    return counted


def _digamma(values: Integers) -> Floats:
    result: Floats = torch.digamma(torch.from_numpy(values.astype(np.float64))).numpy()
    return result
