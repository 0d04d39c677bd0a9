"""Networks put together at random: whichever way outputs are found, none is wrong.

`python -m benchmarks.random_networks` tries thousands.
"""

import warnings

import pytest

from tests.random_networks import AWKWARD, ENDS, JOINS, PLAIN, examine, trial

SEEDS = range(60)
ways: set[str] = set()


@pytest.mark.parametrize("seed", SEEDS)
def test_no_output_is_wrong(seed):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcome = examine(seed)
    assert outcome.wrong == 0, trial(seed).pieces
    ways.update(outcome.ways)


def test_every_way_was_taken():
    assert ways in (set(), {"closed form", "replay", "whole model"})  # none if only this test runs


def test_the_pieces_are_many():
    pieces = {piece for seed in range(300) for piece in trial(seed).pieces}
    known = {
        *PLAIN,
        *AWKWARD,
        *(f"end: {end}" for end in ENDS),
        *(f"join: {join}" for join in JOINS),
    }
    assert known <= pieces
