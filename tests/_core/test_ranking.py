"""Orders of filters."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from captum_classfilters._core.ranking import (
    descending,
    highest,
    rank_correlation,
    ranks,
)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 7), st.integers(0, 10_000))
def test_the_highest_are_the_first_in_falling_order(width, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-2, 3, (5, width), generator=generator).double()  # many ties
    scores[2] = float("nan")
    sizes = torch.randint(0, width + 1, (5,), generator=generator)
    expected = ranks(descending(scores)) < sizes[:, None]
    assert torch.equal(highest(scores, sizes), expected)


@pytest.mark.parametrize("classes", [1, 2, 3])
@pytest.mark.parametrize("width", [3, 5, 6, 7, 12, 20])
def test_equal_scores_have_no_rank_correlation(classes, width):
    """Their deviation is not always zero."""
    for value in (0.1, 0.7, 1 / 3, -2e9 / 7):
        equal = torch.full((classes, width), value, dtype=torch.float64)
        other = torch.arange(classes * width, dtype=torch.float64).view(classes, width)
        assert rank_correlation(equal, other).isnan().all()
        assert rank_correlation(other, equal).isnan().all()
        nearly = equal.clone()
        nearly[:, -1] *= 1 + 1e-15  # as little as it may be, it is an order
        expected = (3 / (width + 1)) ** 0.5 * value / abs(value)
        assert rank_correlation(nearly, other).tolist() == pytest.approx(
            [expected] * classes, rel=1e-4
        )
