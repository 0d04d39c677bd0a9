"""Jaccard similarities against scikit-learn, and what two empty sets have."""

import numpy as np
import pytest
import torch
from scipy import sparse
from sklearn.metrics import jaccard_score

from captum_classfilters import ClassFilters
from captum_classfilters._core.overlap import jaccard_of, shared_members


def test_by_definition():
    sets = np.random.default_rng(0).random((7, 11)) < 0.4
    sets[3] = False
    both, size = shared_members(sets)
    assert size.tolist() == sets.sum(1).tolist()
    result = jaccard_of(both, size)
    for i in range(7):
        for j in range(7):
            assert both[i, j] == (sets[i] & sets[j]).sum()
            if sets[i].any() or sets[j].any():
                assert result[i, j] == pytest.approx(jaccard_score(sets[i], sets[j]), rel=1e-12)
    assert np.isnan(result[3, 3])
    assert jaccard_of(both, size, of_nothing=1.0)[3, 3] == 1
    assert jaccard_of(both, size, dtype=np.float32).dtype == np.float32


def test_sparse_sets_are_the_same():
    sets = np.random.default_rng(0).random((5, 40)) < 0.1
    for left, right in zip(
        shared_members(sets), shared_members(sparse.csr_array(sets)), strict=True
    ):
        np.testing.assert_array_equal(left, right)


def test_it_is_the_overlap_of_a_table():
    chosen = torch.rand(4, 9, generator=torch.Generator().manual_seed(0)) < 0.4
    table = ClassFilters(torch.rand(4, 9), torch.ones(4).long(), chosen)
    np.testing.assert_allclose(
        jaccard_of(*shared_members(chosen.numpy())), table.overlap().jaccard, rtol=1e-12
    )
