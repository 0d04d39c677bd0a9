"""Orders of filters."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from captum_classfilters._core.ranking import descending, highest, ranks


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 7), st.integers(0, 10_000))
def test_the_highest_are_the_first_in_falling_order(width, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-2, 3, (5, width), generator=generator).double()  # many ties
    scores[2] = float("nan")
    sizes = torch.randint(0, width + 1, (5,), generator=generator)
    expected = ranks(descending(scores)) < sizes[:, None]
    assert torch.equal(highest(scores, sizes), expected)
