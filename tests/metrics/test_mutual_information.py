"""Mutual information of filters and classes against scikit-learn's estimator."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.feature_selection import mutual_info_classif

from captum_classfilters.metrics import mutual_information as module
from captum_classfilters.metrics import (
    mutual_information_bound,
    mutual_information_filters,
    mutual_information_matrix,
    mutual_information_score,
)


def reference(features, labels, num_classes, **options):
    columns = [
        mutual_info_classif(features, labels == class_, random_state=0, **options)
        for class_ in range(num_classes)
    ]
    return np.stack(columns)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(30, 200),
    st.integers(2, 6),
    st.integers(1, 5),
)
def test_equals_scikit_learn_without_ties(seed, number, num_classes, neighbors):
    noise = np.random.default_rng(seed)
    labels = noise.integers(0, num_classes, number)
    counts = np.bincount(labels, minlength=num_classes)
    # Below, scikit-learn measures distances by expanding squares, and miscounts by rounding.
    assume(counts.min() > 2 * (neighbors + 1))
    features = noise.standard_normal((number, 2)) + labels[:, None] * noise.random(2)
    ours = mutual_information_matrix(
        torch.tensor(features),
        torch.tensor(labels),
        num_classes=num_classes,
        num_neighbors=neighbors,
    ).numpy()
    theirs = reference(features, labels, num_classes, n_neighbors=neighbors)
    np.testing.assert_allclose(ours, theirs, atol=1e-9)


@given(st.integers(0, 10_000), st.integers(4, 25), st.integers(1, 4), st.integers(1, 5))
def test_equals_the_definition_on_few_images(seed, number, num_classes, neighbors):
    noise = np.random.default_rng(seed)
    labels = noise.integers(0, num_classes, number)
    column = noise.standard_normal(number)
    ours = mutual_information_matrix(
        torch.tensor(column)[:, None],
        torch.tensor(labels),
        num_classes=num_classes,
        num_neighbors=neighbors,
    )[:, 0]
    digamma = {n: float(torch.digamma(torch.tensor(n, dtype=torch.float64))) for n in range(1, 30)}
    for class_ in range(num_classes):
        indicator = labels == class_
        if min(indicator.sum(), (~indicator).sum()) < 2:
            assert ours[class_] == 0
            continue
        terms = []
        for image in range(number):
            group = np.flatnonzero(indicator == indicator[image])
            distances = np.sort(np.abs(column[group] - column[image]))[1:]
            reach = min(neighbors, len(distances))
            ball = int((np.abs(column - column[image]) < distances[reach - 1]).sum())
            terms.append(digamma[reach] - digamma[len(group)] - digamma[ball])
        expected = max(0.0, digamma[number] + float(np.mean(terms)))
        assert ours[class_] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("num_classes", "neighbors", "block"), [(40, 3, 8192), (7, 5, 11)])
def test_classes_together_are_each_class_by_itself(monkeypatch, num_classes, neighbors, block):
    """Members are far apart, or many; balls are counted in one go, or a few at a time."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(num_classes, (900,), generator=generator)
    features = torch.stack(
        [
            torch.randn(900, generator=generator).relu(),
            torch.randint(5, (900,), generator=generator) + 0.0,
            labels + torch.rand(900, generator=generator),
        ],
        1,
    )
    options = {"num_neighbors": neighbors, "seed": 3}
    alone = torch.stack(
        [
            mutual_information_matrix(features, (labels == index).long(), num_classes=2, **options)[
                1
            ]
            for index in range(num_classes)
        ]
    )
    monkeypatch.setattr(module, "_BLOCK", block)
    together = mutual_information_matrix(features, labels, **options)
    assert torch.allclose(together, alone, rtol=0, atol=1e-12)


def test_ties_agree_within_the_estimators_noise():
    noise = np.random.default_rng(0)
    labels = noise.integers(0, 5, 2000)
    features = np.maximum(noise.standard_normal((2000, 3)) + (labels[:, None] == 1), 0.0)
    ours = mutual_information_matrix(torch.tensor(features), torch.tensor(labels)).numpy()
    again = mutual_information_matrix(torch.tensor(features), torch.tensor(labels), seed=1).numpy()
    spread = np.abs(ours - again).max()
    assert np.abs(ours - reference(features, labels, 5)).max() < 3 * spread


def test_balanced_uses_as_many_others_as_members():
    labels = torch.arange(1000) % 10
    telling = (labels == 3).double() + 0.01 * torch.rand(1000, dtype=torch.float64)
    plain = mutual_information_matrix(telling[:, None], labels)[:, 0]
    balanced = mutual_information_matrix(telling[:, None], labels, balanced=True)[:, 0]
    assert plain[3] == pytest.approx(float(mutual_information_bound(labels)[3]), abs=0.02)
    assert balanced[3] == pytest.approx(np.log(2), abs=0.02)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.97])
def test_balanced_draws_have_as_many_on_both_sides(share):
    labels = (torch.arange(1000) < 1000 * share).long()
    telling = (labels + 0.01 * torch.rand(1000, dtype=torch.float64))[:, None]
    matrix = mutual_information_matrix(telling, labels, balanced=True)
    again = mutual_information_matrix(telling, labels, balanced=True)
    assert torch.equal(matrix, again)
    assert matrix[:, 0].tolist() == pytest.approx([np.log(2)] * 2, abs=0.03)
    bound = mutual_information_bound(labels, balanced=True)
    assert bound.tolist() == pytest.approx([np.log(2)] * 2)
    table = mutual_information_filters(telling, labels, balanced=True)
    assert torch.equal(table.scores, matrix)


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("labels", [[0, 2] * 50, [1] * 40])
def test_the_bound_of_a_class_without_images_or_others_is_zero(labels, balanced):
    y = torch.tensor(labels)
    bound = mutual_information_bound(y, num_classes=4, balanced=balanced)
    expected = [np.log(2) if 0 < labels.count(c) < len(labels) else 0 for c in range(4)]
    assert bound.tolist() == pytest.approx(expected)
    features = torch.rand(len(y), 2, dtype=torch.float64)
    matrix = mutual_information_matrix(features, y, num_classes=4, balanced=balanced)
    assert not matrix[torch.tensor(expected) == 0].any()


@pytest.mark.parametrize("offset", [1e4, -1e6])
def test_an_offset_decides_nothing(offset):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 3
    features = 0.01 * torch.randn(120, 5, dtype=torch.float64, generator=generator)
    features[labels == 1, 2] += 0.02
    expected = mutual_information_matrix(features, labels)
    found = mutual_information_matrix(features + offset, labels)
    assert torch.allclose(found, expected, rtol=0, atol=1e-6)


def test_threads_and_seed_decide_nothing_else():
    features, labels = torch.rand(200, 4), torch.arange(200) % 3
    one = mutual_information_matrix(features, labels, seed=5)
    two = mutual_information_matrix(features, labels, seed=5, num_workers=2)
    assert torch.equal(one, two)


def test_score_is_the_mean_of_each_filters_best_class():
    matrix = torch.tensor([[0.1, 0.1, 0.4], [0.3, 0.2, 0.1]])  # over classes it would be 0.35
    assert mutual_information_score(matrix) == pytest.approx(0.3)


def test_bound_is_the_indicators_entropy():
    bound = mutual_information_bound(torch.arange(1000) % 10)
    assert bound.tolist() == pytest.approx([-(0.1 * np.log(0.1) + 0.9 * np.log(0.9))] * 10)
    assert mutual_information_bound(torch.arange(10), balanced=True)[0] == pytest.approx(np.log(2))


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (torch.rand(4), torch.zeros(4).long(), "expected \\(N, K\\)"),
        (torch.rand(4, 2), torch.zeros(3).long(), "do not fit"),
        (torch.rand(4, 0), torch.zeros(4).long(), "one filter"),
        (torch.rand(4, 2), torch.zeros(4), "class indices"),
        (torch.full((4, 2), float("nan")), torch.zeros(4).long(), "NaN"),
        (torch.rand(4, 2), torch.tensor([0, -1, 0, 0]), "out of range"),
    ],
)
def test_bad_input(features, labels, message):
    with pytest.raises(ValueError, match=message):
        mutual_information_matrix(features, labels)


def test_bad_input_of_score_and_bound():
    with pytest.raises(ValueError, match=r"shape \(4,\); expected \(C, K\)"):
        mutual_information_score(torch.rand(4))
    for labels, message in (
        (torch.rand(4), "expected class indices"),
        (torch.tensor([0, -1]), "expected 0 to"),
        (torch.zeros(0).long(), "at least one class index"),
        (torch.zeros(2, 2).long(), r"expected \(4,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            mutual_information_bound(labels)
