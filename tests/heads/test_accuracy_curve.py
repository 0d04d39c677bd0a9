"""Accuracy curves against the decomposed models themselves."""

import warnings

import pytest
import torch

from captum_classfilters import (
    ClassFilters,
    LayerFilterContribution,
    accuracy_curve,
    decompose,
    refit_head,
    select_by_accuracy,
)
from captum_classfilters.metrics import evaluate_classifier
from tests.heads.common import QUIET, Net, TwoHeads, data_for, identified, separable, table_for
from tests.models import batches, pool_linear


class TestCurve:
    def test_points_are_the_decomposed_models(self):
        model, table = identified()
        data = batches()
        curve = accuracy_curve(
            model, {"ours": table}, data, num_filters=(1, 3, 6), repetitions=3, **QUIET
        )
        for number, accuracy in zip(curve.num_filters, curve.accuracy["ours"], strict=True):
            scores = evaluate_classifier(
                decompose(model, table.select(num_filters=number)), data, **QUIET
            )
            assert accuracy == pytest.approx(scores.accuracy)
            recall = curve.recall["ours"][curve.num_filters.index(number)]
            assert torch.allclose(recall, scores.recall)
        assert curve.accuracy["ours"][-1] == curve.full_accuracy
        assert curve.random_mean[-1] == pytest.approx(curve.full_accuracy)
        assert len(curve.random_standard_deviation) == 3

    def test_selection_by_accuracy_is_the_smallest(self):
        model, (x, y) = pool_linear(filters=8), separable()
        data = [(x, y)]
        refit_head(model, data, **QUIET)
        table = LayerFilterContribution(model, "1").identify(data, **QUIET)
        chosen = select_by_accuracy(model, table, data, keep=0.95, **QUIET)
        number = int(chosen.selected.sum(1)[0])
        curve = accuracy_curve(model, table, data, num_filters=range(1, 9), **QUIET)
        values = next(iter(curve.accuracy.values()))
        assert values[number - 1] >= 0.95 * curve.full_accuracy
        assert all(value < 0.95 * curve.full_accuracy for value in values[: number - 1])
        with pytest.raises(ValueError, match="keep=0"):
            select_by_accuracy(model, table, data, keep=0)

    def test_default_numbers_end_at_all_filters(self):
        model, table = identified()
        assert accuracy_curve(model, table, batches(), **QUIET).num_filters == [1, 2, 3, 5, 6]

    def test_bad_input(self):
        model, table = identified()
        for numbers, message in (
            ((7,), "out of range"),
            ((0,), "out of range"),
            ((2.5,), "expected whole numbers"),
            ((), "num_filters is empty"),
        ):
            with pytest.raises(ValueError, match=message):
                accuracy_curve(model, table, batches(), num_filters=numbers, **QUIET)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="class_filters is empty"):
            accuracy_curve(model, {}, batches(), **QUIET)
        with pytest.raises(ValueError, match="The data loader is empty"):
            accuracy_curve(model, table, [], **QUIET)

    def test_tables_of_different_heads(self):
        tables = {"a": table_for(head="fc"), "b": table_for(head="second")}
        with pytest.raises(ValueError, match="different heads"):
            accuracy_curve(TwoHeads(), tables, data_for(Net()), **QUIET)

    def test_numbers_need_no_order_and_classes_no_filters(self):
        model, data = Net(), data_for(Net())
        scores = torch.rand(3, 6, generator=torch.Generator().manual_seed(3)) + 0.1
        scores[1, 2:] = 0  # no evidence: two filters at most
        counts = torch.tensor([4, 4, 0])
        table = ClassFilters(scores, counts, layer="relu", provenance=table_for().provenance)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            curve = accuracy_curve(model, {"t": table}, data, num_filters=(6, 1, 4), **QUIET)
        for place, number in enumerate((6, 1, 4)):
            with pytest.warns(UserWarning, match="No filters are selected for 1 class"):
                chosen = table.select(number)
            smaller = decompose(model, chosen, missing="bias")
            accuracy = evaluate_classifier(smaller, data, **QUIET).accuracy
            assert curve.accuracy["t"][place] == accuracy
        assert curve.smallest(0.0001, "t") == 1

    def test_random_filters_have_the_task_of_the_tables(self):
        """A class without filters has its bias alone in the control, too: all filters of the others
        are then the same head."""
        model, data = Net(), data_for(Net(), number=60)
        scores = torch.rand(3, 6, generator=torch.Generator().manual_seed(3)) + 0.1
        table = ClassFilters(
            scores, torch.tensor([4, 4, 0]), layer="relu", provenance=table_for().provenance
        )
        curve = accuracy_curve(model, table, data, num_filters=(2, 6), repetitions=4, **QUIET)
        assert curve.random_standard_deviation[1] == 0
        assert curve.random_mean[1] == next(iter(curve.accuracy.values()))[1]
        assert curve.random_mean[1] != pytest.approx(curve.full_accuracy)

    def test_random_filters_differ_by_repetition(self):
        model, data = Net(), data_for(Net(), number=60)
        curve = accuracy_curve(model, table_for(), data, num_filters=(2, 6), repetitions=8, **QUIET)
        assert curve.random_standard_deviation[0] > 0
        assert curve.random_standard_deviation[1] == 0
        assert curve.random_mean[1] == pytest.approx(curve.full_accuracy)
        again = accuracy_curve(model, table_for(), data, num_filters=(2, 6), repetitions=8, **QUIET)
        assert again.random_mean == curve.random_mean
        other = accuracy_curve(
            model, table_for(), data, num_filters=(2, 6), repetitions=8, seed=1, **QUIET
        )
        assert other.random_mean[0] != curve.random_mean[0]
        single = accuracy_curve(model, table_for(), data, repetitions=1, **QUIET)
        assert single.random_standard_deviation == []  # of one draw there is none
        none = accuracy_curve(model, table_for(), data, repetitions=0, **QUIET)
        assert none.random_mean == []

    def test_prints_a_table(self):
        curve = accuracy_curve(Net(), {"ours": table_for()}, data_for(Net()), **QUIET)
        lines = str(curve).splitlines()
        assert lines[1].split() == ["filters", "ours", "random"]
        assert len(lines) == 2 + len(curve.num_filters)
        assert "\n" not in repr(curve)
