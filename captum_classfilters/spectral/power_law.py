"""The exponent of a heavy tail, by maximum likelihood."""

import functools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.linalg import eigvalsh_tridiagonal
from torch import Tensor

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.tables import short_repr
from captum_classfilters.spectral.marchenko_pastur import positive_numbers

_MOST_ROWS = 1024


@short_repr
@dataclass(frozen=True)
class PowerLaw:
    r"""
    A power law :math:`p(\lambda) \propto \lambda^{-\alpha}` above :math:`\lambda_{min}`.

    Args:

        alpha (float): The exponent; larger than 1, and not bounded above.
        minimum (float): :math:`\lambda_{min}`, where the tail begins.
        distance (float): Kolmogorov-Smirnov distance between the tail and the law.
        num_tail (int): Eigenvalues in the tail.
    """

    alpha: float
    minimum: float
    distance: float
    num_tail: int

    @property
    def standard_error(self) -> float:
        r"""Of the exponent, :math:`(\alpha - 1) / \sqrt n`."""
        return float((self.alpha - 1) / self.num_tail**0.5)


@arguments_checked
def fit_power_law(values: Tensor | ArrayLike, minimum: float | None = None) -> PowerLaw:
    r"""
    Fit a power law to the tail of a layer's eigenvalues.

    For a given beginning :math:`\lambda_{min}` the exponent of greatest likelihood is

    .. math:: \alpha = 1 + n \Big/ \sum_{\lambda_i \ge \lambda_{min}}
              \ln \frac{\lambda_i}{\lambda_{min}} ,

    and the beginning is the eigenvalue at which the distance
    :math:`\max_i |F(\lambda_i) - i / n|`, :math:`i = 0 \dots n - 1`, is least. All eigenvalues but the
    largest are tried. The exponent is **not bounded**: those of large random matrices lie far above
    3, where some fits stop and report every random network as well trained. Those of small random
    matrices scatter; :func:`random_exponents` says how far.

    Source: Clauset, Shalizi, Newman: *Power-law distributions in empirical data* (2009), equation
    3.1 and section 3.3, https://arxiv.org/abs/0706.1062.

    Args:

        values (Tensor or array): Eigenvalues, as from :func:`eigenvalues`. Those up to
                    :math:`10^{-12}` of the largest are zero but for rounding, and left out; those
                    that differ by no more are equal.
        minimum (float, optional): A given beginning of the tail; by default searched for.
                    Default: None

    Returns:
        *PowerLaw*.

    Raises:
        ValueError: There are fewer than two different positive eigenvalues, or none but one above
                    the given beginning.

    Examples::

        >>> import torch
        >>> from captum_classfilters.spectral import fit_power_law
        >>> uniform = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
        >>> pareto = (1 - uniform) ** (-1 / 4)  # the quantiles of a power law with exponent 5
        >>> round(fit_power_law(pareto, minimum=1.0).alpha, 2)
        5.0
    """
    numbers = positive_numbers(values)
    if len(np.unique(numbers)) < 2:
        raise ValueError(
            f"A power law needs at least two different positive eigenvalues; found {len(numbers)}, "
            "of one size."
        )
    logs = np.log(numbers)
    if minimum is not None:
        if not 0 < minimum < numbers[-1] or minimum > numbers[-2]:
            raise ValueError(
                f"minimum={minimum} must be positive, below the largest eigenvalue, {numbers[-1]:.4g}, "
                f"and not above the next, {numbers[-2]:.4g}."
            )
        return _fit(logs, int(np.searchsorted(numbers, minimum)), float(np.log(minimum)))
    starts = np.unique(numbers, return_index=True)[1][:-1]
    # The first of equals, so that the longest tail wins.
    return min((_fit(logs, int(start), logs[start]) for start in starts), key=lambda f: f.distance)


@functools.lru_cache(maxsize=256)
def random_exponents(
    rows: int, columns: int, groups: int = 1, repetitions: int = 39, seed: int = 0
) -> tuple[float, ...]:
    r"""
    The exponents that :func:`fit_power_law` finds in random matrices of one shape.

    They do not depend on the scale of the entries. The eigenvalues of a Gaussian matrix are drawn as
    those of a bidiagonal one with :math:`\chi`-distributed entries, which have the same distribution.
    Matrices with more than 1,024 rows and columns are replaced by smaller ones with the same ratio of
    the two; their exponents are lower and scatter more, so that what differs from them differs from
    those of the large ones.

    Source: Dumitriu, Edelman: *Matrix models for beta ensembles* (2002),
    https://arxiv.org/abs/math-ph/0206043.

    Args:

        rows, columns (int): The shape of the matrix (of one group).
        groups (int): Matrices whose eigenvalues belong together.
                    Default: 1
        repetitions (int): Random matrices.
                    Default: 39
        seed (int): Of the draws.
                    Default: 0

    Returns:
        *tuple of float*: Rising.

    Examples::

        >>> from captum_classfilters.spectral.power_law import random_exponents
        >>> small, large = random_exponents(64, 27), random_exponents(512, 4608)
        >>> small[0] < 3 < 7 < large[0]
        True
    """
    few, many = sorted((rows, columns))
    scale = min(1.0, _MOST_ROWS / few)
    few, many = max(2, round(few * scale)), max(2, round(many * scale))
    generator = np.random.default_rng(seed)
    exponents = []
    for _ in range(repetitions):
        parts = [_random_eigenvalues(few, many, generator) for _ in range(groups)]
        exponents.append(fit_power_law(torch.from_numpy(np.concatenate(parts))).alpha)
    return tuple(sorted(exponents))


def _random_eigenvalues(few: int, many: int, generator: np.random.Generator) -> np.ndarray:
    """Of the product of a Gaussian matrix with its transpose."""
    diagonal = np.sqrt(generator.chisquare(many - np.arange(few)))
    below = np.sqrt(generator.chisquare(few - 1 - np.arange(few - 1)))
    squares = diagonal**2
    squares[1:] += below**2
    values = eigvalsh_tridiagonal(squares, diagonal[:-1] * below)
    return np.asarray(values.clip(min=0.0))


def _fit(logs: np.ndarray, start: int, log_minimum: float) -> PowerLaw:
    tail = logs[start:] - log_minimum
    count = len(tail)
    alpha = 1 + count / tail.sum()
    law = 1 - np.exp((1 - alpha) * tail)
    # Equal eigenvalues share the share of the first of them.
    below = np.searchsorted(tail, tail) / count
    return PowerLaw(
        float(alpha), float(np.exp(log_minimum)), float(np.abs(law - below).max()), count
    )
