"""The density of eigenvalues of a random matrix."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.tables import short_repr
from captum_classfilters.spectral.routes import NEGLIGIBLE

_GRID = 4097
_MOST_ROUNDS = 200


@short_repr
@dataclass(frozen=True)
class MarchenkoPastur:
    r"""
    Marchenko and Pastur's law for the eigenvalues of a random matrix, scaled by its rows.

    For a matrix of independent entries of variance :math:`\sigma_w^2`, with *m* and *N* its smaller
    and larger number of rows or columns and *d* its rows, the eigenvalues :math:`S^2 / d` lie in
    :math:`\sigma^2 (1 \pm \sqrt q)^2` with :math:`q = m / N` and
    :math:`\sigma^2 = \sigma_w^2 N / d`, at the density

    .. math:: p(x) = \frac{\sqrt{(x_+ - x)(x - x_-)}}{2 \pi \sigma^2 q x} .

    Source: Marčenko, Pastur: *Distribution of eigenvalues for some sets of random matrices*
    (1967); used on weights by Martin and Mahoney (2021), https://arxiv.org/abs/1810.01075.

    Args:

        variance (float): :math:`\sigma^2`, the mean of the eigenvalues.
        aspect (float): q, in (0, 1].

    Examples::

        >>> from captum_classfilters.spectral.marchenko_pastur import MarchenkoPastur
        >>> law = MarchenkoPastur(variance=1.0, aspect=0.25)
        >>> law.lower, law.upper
        (0.25, 2.25)
        >>> float(law.cumulative(2.25))
        1.0
    """

    variance: float
    aspect: float

    def __post_init__(self) -> None:
        if not 0 < self.aspect <= 1:
            raise ValueError(f"aspect={self.aspect} is out of range; q = m / N is in (0, 1].")
        if not self.variance > 0:
            raise ValueError(f"variance={self.variance} must be positive.")

    @property
    def lower(self) -> float:
        """The lower edge of the support."""
        return float(self.variance * (1 - self.aspect**0.5) ** 2)

    @property
    def upper(self) -> float:
        """The upper edge of the support."""
        return float(self.variance * (1 + self.aspect**0.5) ** 2)

    def density(self, x: ArrayLike) -> np.ndarray:
        """The density at given eigenvalues, zero outside the support.

        Args:

            x (array): Eigenvalues.

        Returns:
            *numpy.ndarray*.
        """
        x = np.asarray(x, dtype=np.float64)
        inside = (x > self.lower) & (x < self.upper)
        safe = np.where(inside, x, 1.0)
        root = np.sqrt(np.where(inside, (self.upper - x) * (x - self.lower), 0.0))
        return np.asarray(root / (2 * np.pi * self.variance * self.aspect * safe))

    def cumulative(self, x: ArrayLike) -> np.ndarray:
        """The share of eigenvalues up to given ones.

        Args:

            x (array): Eigenvalues.

        Returns:
            *numpy.ndarray*.
        """
        points, shares = self._table
        return np.asarray(np.interp(np.asarray(x, dtype=np.float64), points, shares))

    def quantile(self, share: ArrayLike) -> np.ndarray:
        """The eigenvalues up to which given shares of all lie.

        Args:

            share (array): Shares in [0, 1].

        Returns:
            *numpy.ndarray*.
        """
        points, shares = self._table
        return np.asarray(np.interp(np.asarray(share, dtype=np.float64), shares, points))

    @cached_property
    def _table(self) -> tuple[np.ndarray, np.ndarray]:
        """Eigenvalues and their cumulative shares."""
        # x = middle - half cos(t) turns the roots at the edges into a smooth integrand.
        angle = np.linspace(0, np.pi, _GRID)
        middle, half = (self.upper + self.lower) / 2, (self.upper - self.lower) / 2
        x = middle - half * np.cos(angle)
        with np.errstate(invalid="ignore", divide="ignore"):
            slope = (half * np.sin(angle)) ** 2 / (2 * np.pi * self.variance * self.aspect * x)
        if x[0] <= 0 or not np.isfinite(slope[0]):  # q = 1: the limit at zero is finite
            slope[0] = 2 * half / (2 * np.pi * self.variance * self.aspect)
        steps = (slope[1:] + slope[:-1]) / 2 * np.diff(angle)
        shares = np.concatenate([[0.0], np.cumsum(steps)])
        return x, shares / shares[-1]


@short_repr
@dataclass(frozen=True)
class MarchenkoPasturFit:
    r"""
    A fit of the law to the bulk of a layer's eigenvalues.

    Args:

        law (MarchenkoPastur): The law of the bulk.
        num_outliers (int): Eigenvalues above its upper edge, by more than the edge fluctuates.
        distance (float): Kolmogorov-Smirnov distance between the bulk and the law.
        entry_deviation (float): :math:`\sigma_w`, the standard deviation of a random matrix's
                    entries that has this law.
    """

    law: MarchenkoPastur
    num_outliers: int
    distance: float
    entry_deviation: float


@arguments_checked
def fit_marchenko_pastur(
    values: Tensor | ArrayLike, shape: tuple[int, int], *, tolerance: float = 0.0
) -> MarchenkoPasturFit:
    r"""
    Fit Marchenko and Pastur's law to the bulk of a layer's eigenvalues.

    The bulk is what does not lie above the law's upper edge; the law's variance is the median, over
    the bulk, of the ratio of each eigenvalue to the quantile that the law with variance 1 has in its
    place. Both are found by repetition from all eigenvalues. Large eigenvalues therefore do not
    stretch the law, as they do where it is fitted from the largest one.

    Args:

        values (Tensor or array): Eigenvalues :math:`S^2 / d`, as from :func:`eigenvalues`; those up to
                    :math:`10^{-12}` of the largest are zero but for rounding, and left out.
        shape (tuple of int): Rows and columns of the matrix (of one group).
        tolerance (float): Eigenvalues up to ``(1 + tolerance)`` times the upper edge, beyond the
                    fluctuation of the largest eigenvalue of a random matrix,
                    :math:`N^{-2/3}` of the edge (Tracy and Widom), are not outliers.
                    Default: 0.0

    Returns:
        *MarchenkoPasturFit*.

    Raises:
        ValueError: There are no positive finite eigenvalues, or the shape does not fit.

    Examples::

        >>> import torch
        >>> from captum_classfilters.spectral import eigenvalues, fit_marchenko_pastur
        >>> _ = torch.manual_seed(0)
        >>> layer = torch.nn.Linear(400, 100)
        >>> _ = torch.nn.init.normal_(layer.weight, std=0.05)
        >>> fit = fit_marchenko_pastur(eigenvalues(layer), (100, 400))
        >>> fit.num_outliers, round(fit.entry_deviation, 3)
        (0, 0.05)
    """
    smaller, larger = _checked_shape(shape)
    numbers = positive_numbers(values)
    unit = MarchenkoPastur(1.0, smaller / larger)
    margin = (1 + tolerance) * (1 + larger ** (-2 / 3))
    size = len(numbers)
    for _ in range(_MOST_ROUNDS):
        variance = _scale(numbers[:size], unit)
        kept = int(np.searchsorted(numbers, variance * unit.upper * margin, side="right"))
        if kept >= size:
            break
        size = kept
    law = MarchenkoPastur(variance, smaller / larger)
    shares = law.cumulative(numbers[:size])
    above = np.arange(1, size + 1) / size - shares
    below = shares - np.arange(size) / size
    return MarchenkoPasturFit(
        law,
        len(numbers) - size,
        float(max(above.max(), below.max())),
        float((variance * shape[0] / larger) ** 0.5),
    )


def _scale(bulk: np.ndarray, unit: MarchenkoPastur) -> float:
    """The variance at which a sorted bulk lies on the law's quantiles, by the median ratio."""
    places = (np.arange(len(bulk)) + 0.5) / len(bulk)
    return float(np.median(bulk / unit.quantile(places)))


@arguments_checked
def marchenko_pastur_edge(shape: tuple[int, int], sigma: float) -> float:
    r"""
    The largest singular value of a large random matrix, :math:`\sigma (\sqrt N + \sqrt m)`.

    Args:

        shape (tuple of int): Rows and columns.
        sigma (float): Standard deviation of its entries.

    Returns:
        *float*, in the units of the entries.

    Raises:
        ValueError: The shape or the deviation is not positive.
    """
    smaller, larger = _checked_shape(shape)
    if not sigma > 0:
        raise ValueError(f"sigma={sigma} must be positive, a standard deviation.")
    return float(sigma * (larger**0.5 + smaller**0.5))


def _checked_shape(shape: tuple[int, int]) -> tuple[int, int]:
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"shape={tuple(shape)} must be rows and columns, both at least 1.")
    return min(shape), max(shape)


def positive_numbers(values: Tensor | ArrayLike) -> np.ndarray:
    """Positive eigenvalues, rising, without what rounding makes of zeros where the rank is not full, and
    of equal ones: both are only known to a share of the largest."""
    numbers = np.sort(torch.as_tensor(values).detach().cpu().double().numpy().ravel())
    if not np.isfinite(numbers).all():
        raise ValueError("The eigenvalues are not all finite.")
    if not (numbers > 0).any():
        raise ValueError("There are no positive eigenvalues; the weight is zero or empty.")
    rounding = NEGLIGIBLE**2 * numbers[-1]  # squared, as eigenvalues are singular values squared
    numbers = numbers[numbers > rounding]
    new = np.diff(numbers, prepend=0.0) > rounding
    return np.asarray(numbers[new][np.cumsum(new) - 1])
