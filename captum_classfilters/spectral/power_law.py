"""The exponent of a heavy tail, by maximum likelihood."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from captum_classfilters._core.tables import short_repr
from captum_classfilters.spectral.marchenko_pastur import positive_numbers


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


def fit_power_law(values: Tensor, minimum: float | None = None) -> PowerLaw:
    r"""
    Fit a power law to the tail of a layer's eigenvalues.

    For a given beginning :math:`\lambda_{min}` the exponent of greatest likelihood is

    .. math:: \alpha = 1 + n \Big/ \sum_{\lambda_i \ge \lambda_{min}}
              \ln \frac{\lambda_i}{\lambda_{min}} ,

    and the beginning is the eigenvalue at which the distance
    :math:`\max_i |F(\lambda_i) - i / n|`, :math:`i = 0 \dots n - 1`, is least. All eigenvalues but the
    largest are tried. The exponent is **not bounded**: random weights have exponents of 5 to 50,
    which fits that stop at 3 report as well trained.

    Source: Clauset, Shalizi, Newman: *Power-law distributions in empirical data* (2009), equation
    3.1 and section 3.3, https://arxiv.org/abs/0706.1062.

    Args:

        values (Tensor): Eigenvalues, as from :func:`eigenvalues`; zeros are left out.
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
    numbers = np.sort(positive_numbers(values))
    if len(np.unique(numbers)) < 2:
        raise ValueError(
            f"A power law needs at least two different positive eigenvalues; found {len(numbers)}, "
            "of one size."
        )
    logs = np.log(numbers)
    if minimum is not None:
        if not 0 < minimum < numbers[-1]:
            raise ValueError(
                f"minimum={minimum} must be positive and below the largest eigenvalue, "
                f"{numbers[-1]:.4g}."
            )
        return _fit(logs, int(np.searchsorted(numbers, minimum)), float(np.log(minimum)))
    starts = np.unique(numbers, return_index=True)[1][:-1]
    # The first of equals, so that the longest tail wins.
    return min((_fit(logs, int(start), logs[start]) for start in starts), key=lambda f: f.distance)


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
