"""Do intervals cover, and are p-values small, as often as they say?

    python -m benchmarks.coverage    # about two minutes

Counts of images are enumerated, so that their coverage is exact; the rest is simulated. A p-value holds
its level if at most 5 % of those of pure chance are up to 0.05.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from scipy.stats import binom, multinomial
from torch import Tensor

from benchmarks.shared import Table, parsed, parser
from captum_classfilters.identify import (
    binomial_interval,
    permutation_p_values,
    vote_p_values,
)
from captum_classfilters.identify.accuracy_reduction import paired_interval
from captum_classfilters.identify.contrastive import FilterContrast
from captum_classfilters.spectral import fit_power_law
from captum_classfilters.spectral.power_law import random_exponents

CHANGES = ((0.02, 0.01), (0.05, 0.05), (0.2, 0.05), (0.5, 0.1))  # shares of images lost and gained
LEVEL = 0.05


def outcomes(number: int) -> tuple[Tensor, Tensor]:
    """All pairs of images lost and gained."""
    lost, gained = torch.meshgrid([torch.arange(number + 1)] * 2, indexing="ij")
    possible = lost + gained <= number
    return lost[possible], gained[possible]


def difference_of_exact_intervals(lost: Tensor, gained: Tensor, number: Tensor) -> Tensor:
    """What CAR had before: bounds of two Clopper-Pearson intervals, each at half the error."""
    lost_ends, gained_ends = (
        binomial_interval(part, number, 1 - LEVEL / 2) for part in (lost, gained)
    )
    return torch.stack(
        [lost_ends[:, 0] - gained_ends[:, 1], lost_ends[:, 1] - gained_ends[:, 0]], 1
    )


def paired_coverage(number: int) -> Iterator[tuple[float, float, float, float]]:
    """Coverage of both intervals of CAR, and their mean widths, for each pair of shares."""
    lost, gained = outcomes(number)
    size = torch.tensor(number)
    ends = [paired_interval(lost, gained, size), difference_of_exact_intervals(lost, gained, size)]
    cells = torch.stack([lost, gained, number - lost - gained], 1).numpy()
    for lose, gain in CHANGES:
        chance = torch.from_numpy(multinomial.pmf(cells, number, [lose, gain, 1 - lose - gain]))
        covered = [
            float(chance[(low <= lose - gain) & (lose - gain <= high)].sum())
            for low, high in (end.unbind(1) for end in ends)
        ]
        widths = [float(((end[:, 1] - end[:, 0]) * chance).sum()) for end in ends]
        yield covered[0], covered[1], widths[0], widths[1]


def binomial_coverage(number: int, shares: np.ndarray) -> list[float]:
    """Coverage of the exact interval of one share."""
    hits = torch.arange(number + 1)
    low, high = binomial_interval(hits, torch.tensor(number)).unbind(1)
    covered = [(low.numpy() <= share) & (share <= high.numpy()) for share in shares]
    return [
        float(binom.pmf(hits.numpy(), number, share)[inside].sum())
        for share, inside in zip(shares, covered, strict=True)
    ]


def student_coverage(number: int, draw: Callable[[Sequence[int]], Tensor], mean: float) -> float:
    """Coverage of the interval of a mean, over 4,000 filters."""
    values = draw((number, 4000)).double()
    contrast = FilterContrast(
        favored="a",
        against="b",
        scores=values.mean(0),
        standard_errors=values.std(0) / number**0.5,
        degrees_of_freedom=torch.full((4000,), number - 1.0, dtype=torch.float64),
        margin=0.0,
        num_images=number,
    )
    low, high = contrast.interval().unbind(1)
    return float(((low <= mean) & (mean <= high)).double().mean())


def of_votes(rounds: int) -> Tensor:
    """P-values of votes that have nothing to do with the classes."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(rounds):
        labels = torch.randint(0, 3, (60,), generator=generator)
        hot = torch.nn.functional.one_hot(labels, 3).double()
        votes = (torch.rand(60, 8, generator=generator) < 0.3).double()
        found.append(vote_p_values((hot.T @ votes).long(), hot.sum(0).long()))
    return torch.cat(found).flatten()


def of_permutations(rounds: int) -> Tensor:
    """P-values of skewed evidence that has nothing to do with the classes."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for number in range(rounds):
        labels = torch.randint(0, 3, (40,), generator=generator)
        evidence = torch.rand(40, 4, generator=generator).log().neg()
        found.append(
            permutation_p_values(evidence, labels, num_classes=3, permutations=99, seed=number)
        )
    return torch.cat(found).flatten()


def of_spectra(rounds: int) -> Tensor:
    """P-values of the exponents of random layers of 64 x 27."""
    generator = torch.Generator().manual_seed(3)
    null = torch.tensor(random_exponents(64, 27), dtype=torch.float64)
    found = []
    for _ in range(rounds):
        weight = torch.randn(64, 27, generator=generator, dtype=torch.float64)
        alpha = fit_power_law(torch.linalg.svdvals(weight).square()).alpha
        found.append((1 + int((null <= alpha).sum())) / (1 + len(null)))
    return torch.tensor(found)


def main(given: Sequence[str] | None = None) -> None:
    """Print both tables."""
    options = parser(__doc__)
    options.add_argument("--images", type=int, nargs="+", default=[20, 50, 200, 1000])
    options.add_argument("--rounds", type=int, default=400, help="simulated tables")
    arguments = parsed(options, given, images=[20], rounds=20)
    table = Table("95 % intervals", "least coverage", "largest coverage", "width")
    for number in arguments.images:
        columns = list(zip(*paired_coverage(number), strict=True))
        for name, covered, widths in (
            ("CAR", columns[0], columns[2]),
            ("CAR, difference of exact intervals", columns[1], columns[3]),
        ):
            shares = [width / own for width, own in zip(widths, columns[2], strict=True)]
            table.row(
                f"{name}, {number} images",
                f"{min(covered):.3f}",
                f"{max(covered):.3f}",
                f"{min(shares):.2f} to {max(shares):.2f}",
            )
        exact = binomial_coverage(number, np.linspace(0.02, 0.98, 49))
        table.row(f"a share, {number} images", f"{min(exact):.3f}", f"{max(exact):.3f}", "-")
    generator = torch.Generator().manual_seed(0)
    for number in (10, 50):
        normal = student_coverage(number, lambda s: torch.randn(*s, generator=generator), 0.0)
        skewed = student_coverage(
            number, lambda s: torch.rand(*s, generator=generator).log().neg(), 1.0
        )
        table.row(f"a mean, normal evidence, {number} images", *[f"{normal:.3f}"] * 2, "-")
        table.row(f"a mean, exponential evidence, {number} images", *[f"{skewed:.3f}"] * 2, "-")
    table = Table("p-values of pure chance", "number", "up to 0.05", "mean")
    for name, values in (
        ("votes (exact)", of_votes(arguments.rounds)),
        ("permutations of labels, 99", of_permutations(arguments.rounds)),
        ("exponents of random layers, 39", of_spectra(arguments.rounds)),
    ):
        values = values[values.isfinite()]
        low = float((values <= LEVEL).double().mean())
        table.row(name, f"{len(values):,}", f"{low:.3f}", f"{float(values.mean()):.3f}")


if __name__ == "__main__":
    main()
