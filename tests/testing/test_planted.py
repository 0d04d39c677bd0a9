"""The planted networks are what they say, and methods are measured against them."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from captum_classfilters import (
    ClassFilters,
    LayerFilterAblation,
    LayerFilterContribution,
    LayerFilterFrequency,
    identify_class_filters,
)
from captum_classfilters.gate_space import FilterGate
from captum_classfilters.identify import collect_features
from captum_classfilters.metrics import (
    class_means,
    class_selectivity_index,
    mutual_information_filters,
    selectivity_filters,
)
from captum_classfilters.testing import planted_network, recovery
from tests.models import QUIET


@pytest.mark.parametrize("layer", ["shallow", "middle", "deep"])
def test_the_planted_filters_decide_and_the_others_do_not(layer):
    """By removing whole kinds: nothing changes, or the class's logit falls to nothing."""
    planted = planted_network()
    x, y = planted.images(200)
    with torch.no_grad():
        logits = planted.model(x)
        assert (logits.argmax(1) == y).all()
        gated = FilterGate(planted.model, layer)
        needed = planted.truth[layer].any(0)
        assert torch.allclose(gated(needed[None].float(), x), logits, atol=1e-6)
        for class_ in range(planted.num_classes):
            own = x[y == class_]
            without = gated((~planted.truth[layer][class_])[None].float(), own)[:, class_]
            assert (without <= 1e-6).all()  # nothing else speaks for the class
            assert (logits[y == class_, class_] > 0.05).all()
            for k in planted.truth[layer][class_].nonzero()[:, 0].tolist():
                gates = torch.ones(1, len(needed))
                gates[0, k] = 0
                assert (gated(gates, own)[:, class_] < logits[y == class_, class_] - 1e-4).all()


def test_kinds_answer_as_said():
    planted = planted_network()
    x, y = planted.images(400)
    for layer in planted.layers:
        features, _ = collect_features(planted.model, layer, [(x, y)], **QUIET)
        means = class_means(features, y)
        kinds = planted.kinds[layer]
        loud = means[:, [k == "loud" for k in kinds]]
        other = means[:, [k in ("own", "shared", "silent") for k in kinds]]
        assert loud.min() > other.max()
        assert (means[:, [k == "silent" for k in kinds]] == 0).all()
        echo = means[:, [k == "echo" for k in kinds]]
        assert sorted(echo.argmax(0).tolist()) == [0, 1, 2, 3]
    assert len({planted.kinds[layer] for layer in planted.layers}) == 3  # no order to exploit


@settings(max_examples=6, deadline=None)
@example(5, 479)  # a rounding error of filters without effect would be a discovery here
@given(st.integers(2, 7), st.integers(0, 500))
def test_methods_that_ask_what_decides_recover_all_and_nothing_else(classes, seed):
    planted = planted_network(classes, seed=seed)
    data = planted.loader(30 * classes, seed=seed)
    for layer in planted.layers:
        methods = [
            LayerFilterContribution(planted.model, layer),
            LayerFilterAblation(planted.model, layer),
        ]
        tables = identify_class_filters(
            methods, data, num_filters=3, significance=True, num_classes=classes, **QUIET
        )
        for table in tables:
            found = recovery(table, planted.truth[layer], as_many=True)
            assert (found.precision, found.recall) == (1.0, 1.0)
            chosen = recovery(table.select(fdr=0.05), planted.truth[layer])
            assert chosen.precision == 1.0
            # Of two classes the shared filter tells neither: it decides, and is no discovery.
            if classes > 2 and layer == "deep":
                assert chosen.recall == 1.0
    assert found.num_selected == 2 * classes + 2


def test_methods_that_ask_what_responds_do_not():
    planted = planted_network()
    x, y = planted.images(400)
    truth = planted.truth["deep"]
    votes = LayerFilterFrequency(planted.model, "deep", top_k=3).identify([(x, y)], **QUIET)
    features, _ = collect_features(planted.model, "deep", [(x, y)], **QUIET)
    for table in (
        votes,
        selectivity_filters(features, y),
        mutual_information_filters(features, y),
    ):
        assert recovery(table, truth, as_many=True).precision < 0.9


def test_recovery_by_hand():
    truth = torch.tensor([[True, True, False], [False, False, False]])
    table = ClassFilters(torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]), torch.ones(2))
    found = recovery(table.select(num_filters=1), truth)
    assert (found.precision, found.recall, found.num_selected) == (0.0, 0.0, 2)
    found = recovery(table, truth, as_many=True)
    assert (found.precision, found.recall, found.num_selected) == (0.5, 0.5, 2)
    nothing = recovery(table, truth)
    assert nothing.precision != nothing.precision
    assert nothing.recall == 0.0
    with pytest.raises(ValueError, match="truth has shape"):
        recovery(table, truth[:, :2])


def test_recovery_where_nothing_was_planted_or_scores():
    truth = torch.tensor([[True, True, False, False], [False, True, True, False]])
    scores = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0]])
    table = ClassFilters(scores, torch.ones(2))
    found = recovery(table, truth, as_many=True)  # a zero is not selected
    assert (found.precision, found.recall, found.num_selected) == (1.0, 0.75, 3)
    for as_many, number in ((True, 0), (False, 2)):
        none = recovery(table.select(num_filters=1), torch.zeros(2, 4).bool(), as_many=as_many)
        assert math.isnan(none.recall)
        assert none.num_selected == number


def test_selectivity_table_has_the_index_for_its_largest_values():
    features = torch.rand(60, 5)
    labels = torch.arange(60) % 4
    table = selectivity_filters(features, labels, num_classes=5)
    index = class_selectivity_index(class_means(features, labels, 5))
    assert torch.allclose(table.scores[:4].max(0).values, index)
    assert table.scores[4].isnan().all()
    information = mutual_information_filters(features, labels, num_classes=5)
    assert information.scores[4].isnan().all()
    with pytest.raises(ValueError, match="two classes"):
        selectivity_filters(features, torch.zeros(60, dtype=torch.int64))
    with pytest.raises(ValueError, match="negative"):
        selectivity_filters(-features, labels)


def test_bad_input():
    with pytest.raises(ValueError, match="choose 2 to 7"):
        planted_network(8)
    with pytest.raises(ValueError, match="leak=-1"):
        planted_network(leak=-1)
