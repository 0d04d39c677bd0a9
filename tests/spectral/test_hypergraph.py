"""Hypergraphs of class separation: rules by hand, scores against HyperNetX and scikit-learn."""

import math
import sys
from typing import Any, Literal

import networkx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import entropy
from sklearn.metrics import jaccard_score

from captum_classfilters.spectral import class_hypergraph, separation_scores, separation_test
from captum_classfilters.spectral.class_separation import class_jaccard
from captum_classfilters.spectral.hypergraph import Hypergraph, Membership
from tests.models import QUIET, known

SCORES = torch.tensor(
    [
        [4.0, 0.5, 0.5, 0.0],
        [-3.0, 1.0, 0.0, 1.0],
        [0.0, 2.0, 2.0, 1.0],
        [0.0, -4.0, 0.0, 1.0],
        [0.0, 0.0, 0.0, 0.0],
    ]
)
LABELS = torch.tensor([0, 0, 1, 1, 1])


def by_hand(incidence, classes=None, num_classes=None):
    incidence = np.asarray(incidence, dtype=bool)
    vertices = tuple(f"v{i}" for i in range(len(incidence)))
    edges = tuple(f"e{i}" for i in range(incidence.shape[1]))
    classes = np.arange(len(incidence)) if classes is None else np.asarray(classes)
    return Hypergraph(incidence, vertices, edges, classes, num_classes or int(classes.max()) + 1)


def separated(seed=0, images=90, classes=3, own=8, strength=1.0):
    """Signals in which every class has directions of its own."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(images) % classes
    pattern = torch.eye(classes).repeat_interleave(own, dim=1)
    noise = torch.rand(images, own * classes, generator=generator)
    return strength * pattern[labels] + noise, labels


def test_signal_share():
    graph = class_hypergraph(SCORES, LABELS, threshold=0.25)
    # Mean shares: class 0 (.8+.6, .1+.2, .1+0, 0+.2)/2; class 1 (0, .4+.8+0, .4, .2+.2+0)/3
    assert graph.incidence.tolist() == [[True, False, False, False], [False, True, False, False]]
    images = class_hypergraph(SCORES, LABELS, vertices="image", threshold=0.2)
    assert images.incidence.tolist() == [
        [True, False, False, False],
        [True, True, False, True],
        [False, True, True, True],
        [False, True, False, True],
        [False, False, False, False],
    ]
    assert images.vertices[3] == "image 3"
    assert known(images.classes).tolist() == LABELS.tolist()
    default = class_hypergraph(SCORES, LABELS)  # 2 / 4
    assert (
        default.incidence.tolist()
        == class_hypergraph(SCORES, LABELS, threshold=0.5).incidence.tolist()
    )


def test_influential_rule():
    graph = class_hypergraph(SCORES, LABELS, rule="influential", share=0.1, threshold=0.6)
    # Influential at 0.1: direction 0, 0, 1 (tie with 2), 1, none.
    assert graph.incidence.tolist() == [[True, False, False, False], [False, True, False, False]]
    strict = class_hypergraph(SCORES, LABELS, rule="influential", share=0.1, threshold=0.7)
    assert strict.incidence.tolist() == [[True, False, False, False], [False] * 4]
    images = class_hypergraph(SCORES, LABELS, rule="influential", vertices="image", share=0.1)
    assert images.incidence.sum(1).tolist() == [1, 1, 1, 1, 0]


def test_exemplars_rule():
    images = class_hypergraph(
        SCORES, LABELS, rule="exemplars", vertices="image", num_exemplars=1, ends="both"
    )
    # Highest and lowest image of each direction, ties to the lower index.
    expected = [{0, 1}, {2, 3}, {2, 1}, {1, 0}]
    for column, members in enumerate(expected):
        assert set(np.flatnonzero(images.incidence[:, column])) == members
    graph = class_hypergraph(
        SCORES, LABELS, rule="exemplars", num_exemplars=1, ends="both", class_names=["cat", "dog"]
    )
    assert graph.incidence.T.tolist() == [[True, False], [False, True], [True, True], [True, False]]
    assert graph.vertices == ("cat", "dog")
    at_ends: tuple[tuple[Literal["highest", "lowest"], list[int]], ...] = (
        ("highest", [0, 2, 2, 1]),
        ("lowest", [1, 3, 1, 0]),
    )
    for ends, chosen in at_ends:
        one = class_hypergraph(
            SCORES, LABELS, rule="exemplars", vertices="image", num_exemplars=1, ends=ends
        )
        assert one.incidence.argmax(0).tolist() == chosen
        assert one.incidence.sum() == 4


def test_dual():
    graph = by_hand([[1, 1, 0], [0, 1, 1]])
    dual = graph.dual()
    assert dual.incidence.shape == (3, 2)
    assert (dual.vertices, dual.edges) == (graph.edges, graph.vertices)
    assert np.array_equal(dual.dual().incidence, graph.incidence)
    assert dual.components(1) == graph.components(1, of="edges")
    with pytest.raises(ValueError, match="a dual has none"):
        separation_scores(dual)


@settings(max_examples=50, deadline=None)
@given(arrays(bool, st.tuples(st.integers(2, 6), st.integers(1, 7))), st.integers(1, 3))
def test_components_equal_networkx(incidence, s):
    graph = by_hand(incidence)
    for of, rows in (("vertices", incidence), ("edges", incidence.T)):
        names = getattr(graph, of)
        line = networkx.Graph()
        for i, one in enumerate(rows):
            if one.sum() >= s:
                line.add_node(names[i])
            for j in range(i):
                if (one & rows[j]).sum() >= s:
                    line.add_edge(names[i], names[j])
        expected = {frozenset(group) for group in networkx.connected_components(line)}
        found = graph.components(s, of)
        assert {frozenset(group) for group in found} == expected
        assert [len(group) for group in found] == sorted(map(len, expected), reverse=True)


@settings(max_examples=50, deadline=None)
@given(arrays(bool, st.tuples(st.integers(2, 5), st.integers(1, 6))))
def test_scores_of_classes_by_definition(incidence):
    graph = by_hand(incidence)
    scores = separation_scores(graph)
    pairs = [
        jaccard_score(incidence[i], incidence[j])
        for i in range(len(incidence))
        for j in range(len(incidence))
        if i != j and incidence[i].any() and incidence[j].any()
    ]
    sizes = [column.sum() for column in incidence.T if column.any()]
    purity = [1 - entropy(np.ones(size) / size) / math.log(len(incidence)) for size in sizes]
    single = [size == 1 for size in sizes]
    for name, values in (("jaccard", pairs), ("purity", purity), ("single_class_share", single)):
        expected = np.mean(values) if values else math.nan
        assert scores[name] == pytest.approx(expected, nan_ok=True, abs=1e-6), name
    assert scores["empty_edges"] == pytest.approx(1 - len(sizes) / incidence.shape[1])
    isolated = sum(not row.any() for row in incidence)
    expected = len(graph.components()) + isolated if incidence.any() else math.nan
    assert scores["components"] == pytest.approx(expected, nan_ok=True)
    assert scores["empty_vertices"] == pytest.approx(isolated / len(incidence))


@pytest.mark.parametrize("labels", [[0, 1, 2], [1, 2, 0], [2, 1, 0]])
@pytest.mark.parametrize("vertices", ["class", "image"])
def test_the_order_of_labels_does_not_matter_with_one_image_each(vertices, labels):
    # Units of the images: 0 and 1, 1 and 2, 3; one of three units is shared.
    scores = torch.tensor([[1.0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]])
    matrix = class_jaccard(class_hypergraph(scores, torch.tensor(labels), vertices=vertices))
    own = 1.0 if vertices == "class" else math.nan  # no pair of different images of a class
    expected = np.array([[own, 1 / 3, 0], [1 / 3, own, 0], [0, 0, own]])
    np.testing.assert_allclose(matrix[np.ix_(labels, labels)], expected, atol=1e-6)


def test_scores_of_images_count_pairs_of_images():
    generator = np.random.default_rng(0)
    incidence = generator.random((12, 5)) < 0.5
    incidence[3] = False
    classes = np.arange(12) % 3
    graph = by_hand(incidence, classes)
    matrix = class_jaccard(graph)
    for a in range(3):
        for b in range(3):
            pairs = [
                jaccard_score(incidence[i], incidence[j])
                for i in np.flatnonzero(classes == a)
                for j in np.flatnonzero(classes == b)
                if i != j and incidence[i].any() and incidence[j].any()
            ]
            assert matrix[a, b] == pytest.approx(np.mean(pairs), abs=1e-6)
    scores = separation_scores(graph)
    counts = [np.bincount(classes[column], minlength=3) for column in incidence.T]
    purity = [1 - entropy(count / count.sum()) / math.log(3) for count in counts]
    assert scores["purity"] == pytest.approx(np.mean(purity))


def test_extremes():
    apart = separation_scores(by_hand(np.eye(4)))
    assert (apart["jaccard"], apart["components"]) == (0, 4)
    assert (apart["purity"], apart["single_class_share"]) == (1, 1)
    together = separation_scores(by_hand(np.ones((4, 3))))
    assert (together["jaccard"], together["components"]) == (1, 1)
    assert together["purity"] == pytest.approx(0)
    assert together["single_class_share"] == 0


RULES = [
    {"rule": "signal_share", "vertices": "class", "threshold": 0.05},
    {"rule": "signal_share", "vertices": "image", "threshold": 0.05},
    {"rule": "influential", "vertices": "class", "share": 0.3, "threshold": 0.3},
    {"rule": "influential", "vertices": "image", "share": 0.3},
    {"rule": "exemplars", "vertices": "class", "num_exemplars": 3},
    {"rule": "exemplars", "vertices": "image", "num_exemplars": 3},
]


@pytest.mark.parametrize("options", RULES)
def test_separated_classes_are_significant(options):
    scores, labels = separated(strength=1.5)
    test = separation_test(scores, labels, permutations=99, **options, **QUIET)
    assert test.p_values["jaccard"] <= 0.05
    assert test.p_values["purity"] <= 0.05
    assert test.observed["jaccard"] < np.nanmean(test.null["jaccard"])
    assert "jaccard" in str(test)
    if options["vertices"] == "image":
        assert math.isnan(test.p_values["components"])


@pytest.mark.parametrize("options", RULES)
def test_p_values_of_noise_are_uniform_or_larger(options):
    values = []
    for seed in range(40):
        scores, labels = separated(seed, images=45, strength=0.0)
        test = separation_test(scores, labels, permutations=19, seed=seed, **options, **QUIET)
        values.append([test.p_values["jaccard"], test.p_values["purity"]])
    table = np.array(values)
    # P(p <= 0.1) <= 0.1: at most 11 of 40 with probability above 0.9995.
    assert (table <= 0.1 + 1e-9).sum(0).max() <= 11
    assert np.nanmin(table) >= 0.05 - 1e-9


def test_null_is_the_permuted_hypergraph():
    scores, labels = separated(images=30)
    test = separation_test(
        scores, labels, threshold=0.05, permutations=5, seed=4, match_size=False, **QUIET
    )
    generator = np.random.default_rng(4)
    for draw in range(5):
        permuted = torch.from_numpy(generator.permutation(labels.numpy()))
        expected = separation_scores(class_hypergraph(scores, permuted, threshold=0.05))
        for name in test.null:
            assert test.null[name][draw] == pytest.approx(expected[name], nan_ok=True)
    for name, p in test.p_values.items():  # of the permutations and the true labels, those as good
        sign = -1 if name == "jaccard" else 1
        as_good = sum(
            sign * drawn >= sign * test.observed[name] - 1e-6 for drawn in test.null[name]
        )
        assert p == pytest.approx((1 + as_good) / 6)


def test_what_is_observed_is_scored_as_the_null_is():
    scores, labels = separated(images=30)
    test = separation_test(scores, labels, threshold=0.03, s=13, permutations=3, **QUIET)
    graph = class_hypergraph(scores, labels, threshold=0.03)
    expected = separation_scores(graph, s=13)  # more edges than classes share
    assert test.observed == pytest.approx(expected, nan_ok=True)
    assert expected["components"] != separation_scores(graph)["components"]
    row = test.to_pandas().iloc[0]
    null = test.null[row.iloc[0]]
    assert row["observed"] == pytest.approx(test.observed[row.iloc[0]])
    assert (row["null"], row["std"]) == pytest.approx((null.mean(), null.std()), nan_ok=True)


def test_null_has_the_size_of_the_observed_hypergraph():
    scores, labels = separated(images=60)
    membership = Membership(scores, "signal_share", None, 0.1, 10, "highest")
    for size in (0, 1, 7, 36):
        permuted = np.random.default_rng(1).permutation(labels.numpy())
        assert membership.of_classes(permuted, 3, size).sum() == size


def test_image_null_equals_new_labels():
    scores, labels = separated(images=30)
    options: dict[str, Any] = {"vertices": "image", "threshold": 0.05}
    test = separation_test(scores, labels, permutations=3, seed=2, **options, **QUIET)
    generator = np.random.default_rng(2)
    for draw in range(3):
        permuted = torch.from_numpy(generator.permutation(labels.numpy()))
        expected = separation_scores(class_hypergraph(scores, permuted, **options))
        for name in ("jaccard", "purity", "single_class_share"):
            assert test.null[name][draw] == pytest.approx(expected[name], abs=1e-6)


# A rule that finds nothing


@pytest.mark.parametrize(
    "graph",
    [
        class_hypergraph(torch.zeros(6, 4), torch.arange(6) % 3),
        class_hypergraph(torch.zeros(6, 4), torch.arange(6) % 3, vertices="image"),
        class_hypergraph(torch.zeros(6, 4), torch.arange(6) % 3, rule="influential"),
        class_hypergraph(torch.ones(6, 4), torch.arange(6) % 3, rule="exemplars", num_exemplars=1),
        Hypergraph(np.zeros((3, 0), dtype=bool), ("a", "b", "c"), (), np.arange(3), 3),
        Hypergraph(np.zeros((0, 2), dtype=bool), (), ("u0", "u1"), np.arange(0), 3),
        Hypergraph(np.zeros((0, 0), dtype=bool), (), (), np.arange(0), 3),
    ],
    ids=lambda graph: f"{graph.incidence.shape}",
)
def test_an_empty_hypergraph_answers(graph, recwarn):
    assert not graph.incidence.any()
    assert "tensor" not in repr(graph)
    assert graph.dual().incidence.shape == graph.incidence.shape[::-1]
    assert graph.dual().dual().vertices == graph.vertices
    for s in (1, 2):
        assert graph.components(s) == graph.components(s, "edges") == []
    assert graph.to_scipy().shape == graph.incidence.shape
    assert graph.to_scipy().nnz == 0
    assert class_jaccard(graph).shape == (3, 3)
    assert np.isnan(class_jaccard(graph)).all()
    scores = separation_scores(graph)
    for name in ("jaccard", "components", "purity", "single_class_share"):
        assert math.isnan(scores[name])
    for name, number in zip(("empty_vertices", "empty_edges"), graph.incidence.shape, strict=True):
        assert scores[name] == pytest.approx(1 if number else math.nan, nan_ok=True)
    assert not recwarn.list


def test_an_empty_hypergraph_goes_to_hypernetx():
    pytest.importorskip("hypernetx")
    graph = class_hypergraph(torch.zeros(6, 4), torch.arange(6) % 3)
    assert len(graph.to_hypernetx().edges) == 0


@pytest.mark.parametrize("vertices", ["class", "image"])
@pytest.mark.parametrize("rule", ["signal_share", "influential", "exemplars"])
def test_a_test_of_nothing_says_so(rule, vertices):
    test = separation_test(
        torch.zeros(6, 4),
        torch.arange(6) % 3,
        rule=rule,
        vertices=vertices,
        permutations=3,
        **QUIET,
    )
    assert all(math.isnan(p) for p in test.p_values.values())
    lines = str(test).splitlines()
    assert lines[0] == "The rule found nothing: no incidences."
    assert len(lines) == 6
    assert len(repr(test)) < 400


def test_hypernetx():
    hypernetx = pytest.importorskip("hypernetx")
    graph = class_hypergraph(*separated(strength=1.5), class_names=["a", "b", "c"])
    converted = graph.to_hypernetx()
    assert isinstance(converted, hypernetx.Hypergraph)
    held = {edge: set(converted.edges[edge]) for edge in converted.edges}
    for column, edge in enumerate(graph.edges):
        members = {graph.vertices[i] for i in np.flatnonzero(graph.incidence[:, column])}
        assert held.get(edge, set()) == members
    for s in (1, 2):
        expected = {frozenset(group) for group in converted.s_components(s=s, edges=False)}
        found = {frozenset(group) for group in graph.components(s)}
        # HyperNetX reports a vertex in fewer than s edges as a component of its own.
        assert {group for group in expected if len(group) > 1} == {g for g in found if len(g) > 1}


def test_without_hypernetx(monkeypatch):
    monkeypatch.setitem(sys.modules, "hypernetx", None)
    with pytest.raises(ImportError, match=r"captum-classfilters\[hypergraph\]"):
        by_hand(np.eye(2)).to_hypernetx()


def test_to_scipy():
    graph = by_hand([[1, 0], [1, 1]])
    assert graph.to_scipy().toarray().tolist() == [[1, 0], [1, 1]]


def test_bad_input():
    for options, message in (
        ({"rule": "mean"}, "rule='mean'; choose one of"),
        ({"vertices": "edge"}, "vertices='edge'; choose one of"),
        ({"threshold": 0.0}, r"number in \(0, 1\]"),
        ({"rule": "exemplars", "threshold": 0.5}, "give num_exemplars"),
        ({"rule": "exemplars", "num_exemplars": 0}, "num_exemplars=0"),
        ({"rule": "exemplars", "ends": "top"}, "ends='top'; choose one of"),
        ({"class_names": ["one"]}, "labels run from 0 to 1; expected 0 to 0"),
    ):
        with pytest.raises(ValueError, match=message):
            class_hypergraph(SCORES, LABELS, **options)
    with pytest.raises(ValueError, match=r"expected whole numbers of shape \(5,\)"):
        class_hypergraph(SCORES, LABELS[:3])
    with pytest.raises(ValueError, match="expected whole numbers"):
        class_hypergraph(SCORES, LABELS.float())
    with pytest.raises(ValueError, match="NaN or infinity"):
        class_hypergraph(SCORES / 0, LABELS)
    with pytest.raises(ValueError, match=r"expected \(N, U\)"):
        class_hypergraph(SCORES[0], LABELS)
    with pytest.raises(ValueError, match="permutations=0"):
        separation_test(SCORES, LABELS, permutations=0)
    with pytest.raises(ValueError, match="two or more"):
        separation_scores(class_hypergraph(SCORES, LABELS * 0))
    with pytest.raises(ValueError, match="vertices by edges"):
        Hypergraph(np.eye(2), ("a", "b"), ("c", "d"), None, 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="s=0"):
        by_hand(np.eye(2)).components(0)
