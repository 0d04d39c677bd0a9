"""The two scores of breadth by hand."""

import math

import pytest
import torch

from benchmarks.breadth_scores import mixture_entropy_score, union_score
from captum_classfilters import ClassFilters


def table(scores):
    return ClassFilters(scores, torch.ones(len(scores)))


def test_union_of_equal_and_disjoint_sets():
    mask = torch.zeros(3, 12, dtype=torch.bool)
    mask[0, :5] = mask[1, :5] = mask[2, 5:10] = True
    score = union_score(table(torch.rand(3, 12)).with_selection(mask))
    assert float(score[0, 1]) == pytest.approx(math.log(5))
    assert float(score[0, 2]) == pytest.approx(math.log(2.5))


def test_mixture_of_equal_histograms_is_their_entropy():
    score = mixture_entropy_score(table(torch.ones(2, 4)))
    assert float(score[0, 1]) == pytest.approx(math.log(4))
    with pytest.raises(ValueError, match="negative"):
        mixture_entropy_score(table(-torch.ones(2, 4)))
