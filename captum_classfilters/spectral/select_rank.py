"""Which singular values matter: one choice among rules."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from captum_classfilters._core.arguments import arguments_checked, whole_number
from captum_classfilters._core.energy import number_for_energy
from captum_classfilters.spectral.marchenko_pastur import (
    fit_marchenko_pastur,
    marchenko_pastur_edge,
)
from captum_classfilters.spectral.routes import NEGLIGIBLE, singular_values


def select_rank(
    values: Tensor | ArrayLike,
    shape: tuple[int, int],
    rule: str = "marchenko_pastur",
    **options: Any,
) -> int:
    r"""
    Number of singular values that matter, by one of several rules.

    With *m* and *N* the smaller and larger of the shape, :math:`q = m / N`:

    ================== ============================================================ ================
    rule               keeps                                                        options
    ================== ============================================================ ================
    top_k              the first ``k``                                              ``k``
    energy             as many as hold a share of :math:`\sum S^2`                  ``share=0.9``
    elbow              up to the point farthest below the chord of the falling
                       values (Satopää et al. 2011)
    gap                up to the largest ratio :math:`S_a / S_{a+1}`
    marchenko_pastur   :math:`S > \sigma (\sqrt N + \sqrt m) (1 + tolerance)`       ``tolerance=0``,
                                                                                    ``sigma``
    gavish_donoho      :math:`S > (0.56 q^3 - 0.95 q^2 + 1.82 q + 1.43)
                       \cdot \mathrm{median}(S)` (Gavish and Donoho 2014)
    permutation        S above a quantile of the largest singular value of the      ``weight``,
                       weight with its entries shuffled                             ``quantile=0.95``,
                                                                                    ``rounds=20``,
                                                                                    ``seed=0``
    effective_rank     :math:`\exp H(S / \sum S)`, rounded (Roy and Vetterli 2007)
    stable_rank        :math:`\sum S^2 / S_1^2`, rounded
    ================== ============================================================ ================

    ``sigma`` is the standard deviation of noise entries: ``"entries"`` (the default) takes the root
    mean square of the weight's entries, in which what is not noise takes part, ``"bulk"`` takes that
    of :func:`fit_marchenko_pastur`, and a number is taken as it is.

    Args:

        values (Tensor or array): All singular values (of one group), falling.
        shape (tuple of int): Rows and columns of the matrix.
        rule (str): One of the rules above.
                    Default: "marchenko_pastur"
        options: Of the rule.

    Returns:
        *int*, from 0 to the number of values.

    Raises:
        ValueError: The rule or an option is unknown or out of range; the values are not finite,
                    not falling, or not as many as the shape's smaller side.

    Examples::

        >>> import torch
        >>> from captum_classfilters.spectral import select_rank
        >>> values = torch.tensor([9.0, 3.0, 1.0, 1.0])
        >>> select_rank(values, (4, 9), "energy", share=0.95)
        2
        >>> select_rank(values, (4, 9), "gap")
        1
    """
    if rule not in RULES:
        raise ValueError(f"rule={rule!r}; choose one of {', '.join(RULES)}.")
    numbers = _checked(values, shape)
    try:
        return RULES[rule](numbers, shape, **options)
    except TypeError as error:
        raise ValueError(f"The rule {rule!r} and its options do not fit: {error}.") from error


@arguments_checked
def effective_rank(values: Tensor) -> float:
    r"""
    Roy and Vetterli's effective rank, :math:`\exp H(S / \sum S)`.

    Args:

        values (Tensor): Singular values.

    Returns:
        *float*, from 1 to the number of values.

    Raises:
        ValueError: No value is positive.
    """
    numbers = _not_all_zero(values)
    shares = numbers / numbers.sum()
    return float(torch.special.entr(shares).sum().exp())


@arguments_checked
def stable_rank(values: Tensor) -> float:
    r"""
    The stable rank, :math:`\sum S^2 / S_1^2`.

    Args:

        values (Tensor): Singular values.

    Returns:
        *float*, from 1 to the number of values.

    Raises:
        ValueError: No value is positive.
    """
    squares = _not_all_zero(values).square()
    return float(squares.sum() / squares.max())


@arguments_checked
def gavish_donoho_threshold(values: Tensor, shape: tuple[int, int]) -> float:
    r"""
    Gavish and Donoho's threshold for noise of unknown size.

    Source: Gavish, Donoho: *The optimal hard threshold for singular values is 4/sqrt(3)* (2014),
    the polynomial approximation of equation 5, https://arxiv.org/abs/1305.5870.

    Args:

        values (Tensor): All singular values.
        shape (tuple of int): Rows and columns.

    Returns:
        *float*, in the units of the values.
    """
    q = min(shape) / max(shape)
    median = float(np.median(values.detach().cpu().double().numpy()))
    return (0.56 * q**3 - 0.95 * q**2 + 1.82 * q + 1.43) * median


@arguments_checked
def permutation_threshold(
    weight: Tensor, *, quantile: float = 0.95, rounds: int = 20, seed: int = 0
) -> float:
    r"""
    A quantile of the largest singular value of a matrix whose entries are shuffled.

    Args:

        weight (Tensor): The matrix, or a layer's weight with its filters first.
        quantile (float): Which quantile.
                    Default: 0.95
        rounds (int): Number of shuffles.
                    Default: 20
        seed (int): Of the shuffles; PyTorch's own random state is not touched.
                    Default: 0

    Returns:
        *float*, in the units of the weight.
    """
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile={quantile} is out of range; choose a share in [0, 1].")
    if rounds < 1:
        raise ValueError(f"rounds={rounds} must be at least 1.")
    matrix = weight.detach().flatten(1)
    generator = torch.Generator().manual_seed(seed)
    largest = []
    for _ in range(rounds):
        order = torch.randperm(matrix.numel(), generator=generator).to(matrix.device)
        shuffled = matrix.flatten()[order].reshape(1, *matrix.shape)
        largest.append(float(singular_values(shuffled)[0, 0]))
    return float(np.quantile(largest, quantile))


def _checked(values: Tensor | ArrayLike, shape: tuple[int, int]) -> Tensor:
    numbers = torch.as_tensor(values).detach().cpu().double().flatten()
    if len(shape) != 2 or len(numbers) != min(shape):
        raise ValueError(
            f"{len(numbers)} singular values do not belong to a matrix of shape {tuple(shape)}; "
            f"expected all of them, {min(shape)}. For grouped layers pass one group's."
        )
    if not bool(torch.isfinite(numbers).all()) or bool((numbers < 0).any()):
        raise ValueError("Singular values must be finite and not negative.")
    if bool((numbers.diff() > 0).any()):
        raise ValueError("Singular values must be falling, the largest first.")
    return _not_all_zero(numbers)


def _not_all_zero(values: Tensor) -> Tensor:
    """Singular values in float64, of which one at least says something; what rounding makes of zeros
    is zero."""
    numbers = values.detach().cpu().double()
    if not bool(numbers.isfinite().all()):
        raise ValueError("Singular values must be finite; some are NaN or infinite.")
    if not bool((numbers > 0).any()):
        raise ValueError("All singular values are zero: there is nothing to choose from.")
    return numbers.where(numbers > NEGLIGIBLE * numbers.max(), 0.0)


def _top_k(values: Tensor, shape: tuple[int, int], *, k: int) -> int:
    number = whole_number(k)
    if number is None or not 0 <= number <= len(values):
        raise ValueError(f"k={k!r} must be a whole number from 0 to {len(values)}.")
    return number


def _energy(values: Tensor, shape: tuple[int, int], *, share: float = 0.9) -> int:
    return int(number_for_energy(values.square(), share))


def _elbow(values: Tensor, shape: tuple[int, int]) -> int:
    if len(values) < 3 or values[0] - values[-1] <= NEGLIGIBLE * values[0]:
        return len(values)
    place = torch.linspace(0, 1, len(values), dtype=torch.float64)
    height = (values - values[-1]) / (values[0] - values[-1])
    # Farthest below the chord from (0, 1) to (1, 0); a convex fall keeps what precedes it.
    below = 1 - place - height
    return int(below.argmax()) if below.max() > 1e-12 else len(values)


def _gap(values: Tensor, shape: tuple[int, int]) -> int:
    if len(values) < 2:
        return len(values)
    positive = values[values > 0]
    if len(positive) < len(values):
        return len(positive)  # an infinite ratio
    ratios = values[:-1] / values[1:]
    # The first of those that are equal but for rounding.
    return int((ratios >= (1 - NEGLIGIBLE) * ratios.max()).int().argmax()) + 1


def _marchenko_pastur(
    values: Tensor,
    shape: tuple[int, int],
    *,
    tolerance: float = 0.0,
    sigma: float | str = "entries",
) -> int:
    if sigma == "entries":
        sigma = float((values.square().sum() / (shape[0] * shape[1])).sqrt())
    elif sigma == "bulk":
        sigma = fit_marchenko_pastur(values.square() / shape[0], shape).entry_deviation
    elif isinstance(sigma, str) or sigma <= 0:
        raise ValueError(f"sigma={sigma!r}; choose 'entries', 'bulk' or a positive number.")
    return int((values > marchenko_pastur_edge(shape, float(sigma)) * (1 + tolerance)).sum())


def _gavish_donoho(values: Tensor, shape: tuple[int, int]) -> int:
    return int((values > gavish_donoho_threshold(values, shape)).sum())


def _permutation(
    values: Tensor,
    shape: tuple[int, int],
    *,
    weight: Tensor,
    quantile: float = 0.95,
    rounds: int = 20,
    seed: int = 0,
) -> int:
    if tuple(weight.flatten(1).shape) != tuple(shape):
        raise ValueError(
            f"weight has the shape {tuple(weight.shape)}, which does not unfold to {tuple(shape)}."
        )
    threshold = permutation_threshold(weight, quantile=quantile, rounds=rounds, seed=seed)
    return int((values > threshold).sum())


def _effective_rank(values: Tensor, shape: tuple[int, int]) -> int:
    return round(effective_rank(values))


def _stable_rank(values: Tensor, shape: tuple[int, int]) -> int:
    return round(stable_rank(values))


RULES: dict[str, Callable[..., int]] = {
    "top_k": _top_k,
    "energy": _energy,
    "elbow": _elbow,
    "gap": _gap,
    "marchenko_pastur": _marchenko_pastur,
    "gavish_donoho": _gavish_donoho,
    "permutation": _permutation,
    "effective_rank": _effective_rank,
    "stable_rank": _stable_rank,
}
