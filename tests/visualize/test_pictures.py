"""Pictures of tables, curves and explanations show the numbers they are given."""

import sys
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from captum_classfilters import ClassFilters
from captum_classfilters.heads.accuracy_curve import AccuracyCurve
from captum_classfilters.visualize import (
    figures as _figures,
)
from captum_classfilters.visualize import (
    plot_accuracy_curve,
    plot_class_filters,
    plot_class_overlap,
    plot_explanations,
    plot_filter_maps,
)
from captum_classfilters.visualize.figures import short_names
from tests.models import known


def table(classes=3, filters=7, signed=True):
    scores = torch.randn(classes, filters, generator=torch.Generator().manual_seed(0))
    scores = scores if signed else scores.abs()
    names = [f"class {index}" for index in range(classes)]
    return ClassFilters(
        scores, torch.ones(classes), class_names=names, method="M", layer="L"
    ).with_selection(torch.zeros(classes, filters).bool().scatter(1, scores.topk(2).indices, True))


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (294.2, "294"),
        (-1234.5, "-1,234"),
        (99.6, "100"),
        (9.96, "10"),
        (0.0123, "0.012"),
        (0.0, "0"),
    ],
)
def test_numbers_above_images_have_two_digits_or_are_whole(value, shown):
    assert _figures.short_number(value) == shown


class TestPictures:
    def test_only_a_notebook_finds_them_among_the_figures_of_pyplot(self, monkeypatch):
        """There the figure shows below the cell; elsewhere nothing piles up."""
        plt.close("all")
        plot_class_filters(table())
        assert plt.get_fignums() == []
        assert not _figures._in_ipython()
        session = SimpleNamespace(get_ipython=lambda: object())
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, "IPython", session)
            assert _figures._in_ipython()
        monkeypatch.setattr(_figures, "_in_ipython", lambda: True)
        figure, _ = plot_class_filters(table())
        assert plt.get_fignums() == [figure.number]
        plt.close("all")

    def test_heat_map_shows_scores_and_marks_the_selection(self):
        one = table()
        _, axes = plot_class_filters(one, order="index")
        image = axes.images[0]
        np.testing.assert_allclose(known(image.get_array()), one.scores.numpy())
        low, high = image.get_clim()
        assert low == -known(high)
        marked = {(int(y), int(x)) for x, y in np.asarray(axes.collections[0].get_offsets())}
        assert marked == {tuple(cell) for cell in one.selected.nonzero().tolist()}
        assert [label.get_text() for label in axes.get_yticklabels()] == list(one.class_names)

    def test_heat_map_groups_filters_by_their_best_class(self):
        one = table()
        _, axes = plot_class_filters(one)
        order = [int(label.get_text()) for label in axes.get_xticklabels()]
        assert sorted(order) == list(range(7))
        best = one.scores.argmax(0)[order].tolist()
        assert best == sorted(best)

    def test_heat_map_of_few_classes_with_images_among_many(self):
        scores, counts = torch.full((60, 5), torch.nan), torch.zeros(60)
        scores[[7, 50]], counts[[7, 50]] = torch.rand(2, 5), torch.ones(2)
        one = ClassFilters(scores, counts)
        _, axes = plot_class_filters(one)
        assert [label.get_text() for label in axes.get_yticklabels()] == ["7", "50"]
        assert "2 of 60 classes" in axes.get_xlabel()
        _, axes = plot_class_filters(one, classes=[3, 7])  # as asked for
        assert [label.get_text() for label in axes.get_yticklabels()] == ["3", "7"]
        _, axes = plot_class_filters(one, classes=60)
        assert known(axes.images[0].get_array()).shape == (60, 5)
        _, axes = plot_class_filters(ClassFilters(scores.fill_(torch.nan), 0 * counts))
        assert len(known(axes.images[0].get_array())) == 40

    def test_heat_map_of_votes_and_of_many_classes(self):
        _, axes = plot_class_filters(table(signed=False))
        assert axes.images[0].norm.vmin == 0
        _, axes = plot_class_filters(table(classes=300, filters=600))
        assert len(axes.get_yticks()) <= 40
        scores = torch.rand(2, 3)
        scores[1] = float("nan")
        plot_class_filters(ClassFilters(scores, torch.tensor([1, 0])))
        with pytest.raises(ValueError, match="order='random'"):
            plot_class_filters(table(), order="random")

    def test_curve_draws_every_rule_and_the_controls(self):
        curve = AccuracyCurve(
            [1, 2, 4],
            {"ours": [0.2, 0.5, 0.9], "theirs": [0.1, 0.2, 0.9]},
            {},
            0.9,
            [0.1, 0.1, 0.9],
            [0.01, 0.2, 0.3],
            10,
        )
        _, axes = plot_accuracy_curve(curve)
        drawn = {line.get_label(): list(np.asarray(line.get_ydata())) for line in axes.lines}
        assert drawn["ours"] == pytest.approx([20, 50, 90])
        assert drawn["random filters"] == pytest.approx([10, 10, 90])
        assert drawn["all filters"][0] == pytest.approx(90)
        band = np.asarray(axes.collections[0].get_paths()[0].vertices)[:, 1]
        assert (band.min(), band.max()) == (0, 100)  # shares, whatever the deviation

    @pytest.mark.parametrize("channels", [1, 3])
    def test_explanations_survive_maps_of_zeros(self, channels):
        images = torch.rand(2, channels, 5, 5) * 3
        maps = torch.randn(2, channels, 5, 5)
        figure, grid = plot_explanations(
            images, {"a": maps, "b": torch.zeros_like(maps)}, titles="xy"
        )
        assert grid.shape == (2, 3)
        assert "zero" in [text.get_text() for text in grid[0, 2].texts]
        assert grid[0, 1].get_title() == "a"
        figure.canvas.draw()
        with pytest.raises(ValueError, match="expected 2 maps"):
            plot_explanations(images, {"a": maps[:1]})

    def test_filter_maps_carry_their_contribution(self):
        one = table()
        contributions = torch.randn(7, 3, 3)
        _, grid = plot_filter_maps(torch.rand(1, 6, 6), contributions, one, "class 1")
        first = int(one.filters_of(1)[0])
        assert grid[1].get_title() == f"filter {first}\n{float(contributions[first].sum()):+.2f}"
        with pytest.raises(ValueError, match="expected one image"):
            plot_filter_maps(torch.rand(1, 6, 6), contributions[:3], one, 0)

    def test_overlap_counts(self):
        _, axes = plot_class_overlap(table())
        shared = table().overlap().count
        texts = {text.get_position(): int(text.get_text()) for text in axes.texts}
        assert texts[(1, 0)] == int(shared[0, 1])


def test_names_of_methods_keep_what_follows_their_commas():
    assert short_names(["CAR, greedy", "CAR, ranked once"], synonyms=False) == [
        "CAR, greedy",
        "CAR, ranked once",
    ]
    assert short_names(["tiger, cat", "tiger, beetle", "lion"]) == [
        "tiger [0]",
        "tiger [1]",
        "lion",
    ]
    assert short_names(["tiger beetle, x"] * 2) == ["tiger beetle"] * 2  # images of one class
