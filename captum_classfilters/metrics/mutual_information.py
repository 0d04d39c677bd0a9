"""Mutual information between filters and classes, for every pair at once."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters.metrics.features import checked_features, checked_labels

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

# So many balls are counted at once that what they take stays in a processor's cache.
_BLOCK = 8192
_FAR = 1e3  # from zero, in standard deviations: a filter's responses are within a few


@arguments_checked
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
        balanced (bool): For each class, use as many of its images as of others: all on the smaller
                    side, and as many of the other, drawn with ``seed``. The attainable bound is then
                    ln 2 for every class that has images and others.
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
    psi = _digamma(np.maximum(np.arange(len(values) + 1), 1))
    seeds = [int(noise.integers(0, 2**63)) for _ in range(values.shape[1])]

    def one_filter(index: int) -> Floats:
        column = _jittered(values[:, index], np.random.default_rng(seeds[index]))
        if draws is None:
            return _all_classes(column, classes, number, num_neighbors, psi)
        row = np.zeros(number)
        for class_, chosen in draws.items():
            indicator = (classes[chosen] == class_).astype(np.int64)
            row[class_] = _all_classes(column[chosen], indicator, 2, num_neighbors, psi)[1]
        return row

    order = range(values.shape[1])
    bar = tqdm(total=len(order), desc="mutual information", disable=not show_progress)
    rows = []
    with ThreadPoolExecutor(max_workers=max(1, num_workers)) as pool, bar:
        for row in pool.map(one_filter, order):
            rows.append(row)
            bar.update()
    return torch.from_numpy(np.stack(rows, axis=1))


@arguments_checked
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


@arguments_checked
def mutual_information_bound(
    labels: Tensor, *, num_classes: int | None = None, balanced: bool = False
) -> Tensor:
    r"""
    The largest mutual information that any response can have with each class's indicator.

    This is the indicator's entropy :math:`H(1[y = c])`: 0.325 nats for ten classes of equal size,
    0.0079 for a thousand, ln 2 for balanced draws; zero for a class without images, or without others.

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
    share = counts / counts.sum()
    if balanced:
        share = torch.where((share > 0) & (share < 1), 0.5, share)
    other = 1 - share
    return -(torch.xlogy(share, share) + torch.xlogy(other, other))


def _jittered(column: Floats, noise: np.random.Generator) -> Floats:
    """Scaled to unit variance, ties decided by noise of relative size 1e-10, as scikit-learn does it;
    responses far from zero are centered first, where such noise would drown the spread."""
    deviation = column.std()
    scaled = column / deviation if deviation > 0 else column
    if deviation > 0 and float(np.abs(scaled).mean()) > _FAR:
        scaled = (column - column.mean()) / deviation
    size = 1e-10 * max(1.0, float(np.abs(scaled).mean()))
    jittered: Floats = scaled + size * noise.standard_normal(len(scaled))
    return jittered


def _balanced_draws(
    classes: Integers, number: int, noise: np.random.Generator
) -> dict[int, Integers]:
    """For each class as many of its images as of others: all of the fewer."""
    draws = {}
    for class_ in range(number):
        members = np.flatnonzero(classes == class_)
        others = np.flatnonzero(classes != class_)
        if len(members) and len(others):
            size = min(len(members), len(others))
            if len(members) > size:
                members = np.sort(noise.choice(members, size=size, replace=False))
            drawn = noise.choice(others, size=size, replace=False)
            draws[class_] = np.concatenate([members, np.sort(drawn)])
    return draws


def _all_classes(
    column: Floats, classes: Integers, number: int, neighbors: int, psi: Floats
) -> Floats:
    """Mutual information of one response with every class's indicator (C,)."""
    order = np.argsort(column, kind="stable")
    x, y = column[order], classes[order]
    counts = np.bincount(y, minlength=number)
    total = len(x)
    others = total - counts
    usable = (counts > 1) & (others > 1)
    sorted_classes = _SortedClasses(x, y, counts, psi)
    estimate = np.zeros(number)
    for sizes, balls in ((counts, sorted_classes.inside), (others, sorted_classes.outside)):
        reached = np.minimum(neighbors, sizes - 1)
        for within in np.unique(reached[usable]).tolist():
            chosen = np.flatnonzero(usable & (reached == within))
            terms = sizes[chosen] * (psi[within] - psi[sizes[chosen]]) - balls(chosen, within)
            estimate[chosen] += terms / total
    return np.where(usable, np.maximum(psi[total] + estimate, 0.0), 0.0)


class _SortedClasses:
    """Responses in rising order, and sums over the balls around them, class by class.

    A class's images, or the others, stand one after another in a row with room between classes, so
    that an image's neighbors of the same side are its neighbors in the row.
    """

    def __init__(self, x: Floats, y: Integers, counts: Integers, psi: Floats) -> None:
        self.x, self.counts, self.psi = x, counts, psi
        # Grouped by class, rising within; NumPy sorts short integers several times as fast.
        short = y.astype(np.int16) if len(counts) <= np.iinfo(np.int16).max else y
        self.positions = np.argsort(short, kind="stable")
        self.start = np.cumsum(counts) - counts

    def inside(self, chosen: Integers, neighbors: int) -> Floats:
        """Sum of digamma(m) over the images of some classes."""
        sizes = self.counts[chosen]
        group, within = _numbered(sizes + 2 * neighbors)
        rank = within - neighbors
        real = (rank >= 0) & (rank < sizes[group])
        positions = np.where(rank < 0, -1, len(self.x))
        positions[real] = self.positions[self.start[chosen][group[real]] + rank[real]]
        looked_at = np.flatnonzero(real)
        balls = self._ball_counts(positions, looked_at, neighbors)
        sums = np.bincount(group[looked_at], weights=self.psi[balls], minlength=len(chosen))
        return sums.astype(np.float64)

    def outside(self, chosen: Integers, neighbors: int) -> Floats:
        """Sum of digamma(m) over the images outside of some classes.

        Away from a class's members a ball holds as many images as it is told to. So of the images
        between two members only those are put in the row that are next to one, and what their balls
        reach: ``2 * neighbors`` at either end.
        """
        sizes, total, reach = self.counts[chosen], len(self.x), 2 * neighbors
        group, gap = _numbered(sizes + 1)
        first, last = gap == 0, gap == sizes[group]
        member = self.start[chosen][group] + gap
        before = np.where(first, -1, self.positions[np.maximum(member - 1, 0)])
        after = np.where(last, total, self.positions[np.minimum(member, total - 1)])
        wide = after - before - 1
        # Each gap is two runs of positions, one at either end; room goes to a class's first and last.
        head, room = np.minimum(wide, reach), neighbors * first
        tail = np.minimum(wide - head, reach)
        lengths = np.stack([head + room, tail + neighbors * last], 1)
        positions = _runs(np.stack([before + 1 - room, after - tail], 1), lengths)
        end = np.cumsum(lengths.sum(1)) - neighbors * last
        low = np.where(first, 0, np.minimum(neighbors, wide))
        high = np.where(last, 0, np.minimum(neighbors, wide - low))
        looked_at = _runs(np.stack([end - head - tail, end - high], 1), np.stack([low, high], 1))
        balls = self._ball_counts(positions.clip(-1, total), looked_at, neighbors)
        change = self.psi[balls] - self.psi[neighbors]
        of_class = np.repeat(group, low + high)
        changes = np.bincount(of_class, weights=change, minlength=len(chosen))
        result: Floats = (total - sizes) * self.psi[neighbors] + changes
        return result

    def _ball_counts(self, positions: Integers, looked_at: Integers, neighbors: int) -> Integers:
        """Images strictly closer than the q-th neighbor of the same row, each counting itself.

        Args:

            positions (ndarray): The row: places among all responses, -1 and N where it has none.
            looked_at (ndarray): Places in the row that are counted.
            neighbors (int): q.
        """
        values = np.concatenate([self.x, [np.inf, -np.inf]])[positions]
        blocks = range(0, len(looked_at), _BLOCK)
        counted = [
            self._ball_counts_of(values, positions, looked_at[start : start + _BLOCK], neighbors)
            for start in blocks
        ]
        return np.concatenate([np.empty(0, dtype=np.int64), *counted])

    def _ball_counts_of(
        self, values: Floats, positions: Integers, looked_at: Integers, neighbors: int
    ) -> Integers:
        here = values[looked_at]
        low = [here - values[looked_at - away] for away in range(neighbors + 1)]
        high = [values[looked_at + away] - here for away in range(neighbors + 1)]
        # The q nearest of a sorted row are a window around the image: try every window.
        radius, left = high[neighbors], np.zeros(len(here), dtype=np.int64)
        for taken in range(1, neighbors + 1):
            reached = np.maximum(low[taken], high[neighbors - taken])
            left = np.where(reached < radius, taken, left)
            radius = np.minimum(radius, reached)
        lowest, highest = looked_at - left, looked_at - left + neighbors
        to_lowest = here - values[lowest]
        edge_is_low = to_lowest == radius
        # On the neighbor's own side positions count exactly; on the other one an image of another
        # row may lie beyond the window.
        edge = positions[np.where(edge_is_low, lowest, highest)]
        inner = np.where(edge_is_low, highest, lowest)
        beyond = inner + np.where(edge_is_low, 1, -1)
        counted: Integers = np.abs(positions[inner] - edge)
        border = np.where(edge_is_low, here + radius, here - radius)
        clear = np.abs(positions[beyond] - positions[inner]) == 1
        clear &= np.where(
            edge_is_low,
            (values[inner] < border) & (values[beyond] >= border),
            (values[inner] > border) & (values[beyond] <= border),
        )
        for low_edge in (True, False):
            searched = np.flatnonzero(~clear & (edge_is_low == low_edge))
            own = positions[looked_at[searched]]
            found = np.searchsorted(self.x, border[searched], "left" if low_edge else "right")
            counted[searched] = (
                np.maximum(found, own + 1) - edge[searched] - 1
                if low_edge
                else edge[searched] - np.minimum(found, own)
            )
        result: Integers = np.maximum(counted, 1)
        return result


def _runs(starts: Integers, lengths: Integers) -> Integers:
    """Rising numbers from each start, so many of them, one run after another."""
    sizes = lengths.ravel()
    shift = starts.ravel() - np.cumsum(sizes) + sizes
    result: Integers = np.repeat(shift, sizes) + np.arange(sizes.sum())
    return result


def _numbered(sizes: Integers) -> tuple[Integers, Integers]:
    """Of groups of some sizes, one after another: each entry's group, and its number in it."""
    group = np.repeat(np.arange(len(sizes)), sizes)
    return group, np.arange(len(group)) - (np.cumsum(sizes) - sizes)[group]


def _digamma(values: Integers) -> Floats:
    result: Floats = torch.digamma(torch.from_numpy(values.astype(np.float64))).numpy()
    return result
