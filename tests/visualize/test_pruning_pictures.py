"""Pictures of pruning show the numbers they are given."""

import numpy as np
import pytest
import torch

from captum_classfilters.pruning import PruningOrder
from captum_classfilters.pruning.class_interpretation import ClassEffect, FilterInterpretation
from captum_classfilters.pruning.removal_curve import RemovalCurves
from captum_classfilters.visualize import plot_class_bars, plot_filter_grid, plot_removal_curves

pytest.importorskip("matplotlib")


def frame(axes):
    return axes.spines["left"].get_edgecolor()


def test_filter_grid_is_in_the_order_of_removal():
    weights = torch.randn(7, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    marked = torch.tensor([True, False, False, False, False, True, False])
    figure, grid = plot_filter_grid(
        weights, [5, 2], marked=marked, mark_label="color", title="first layer"
    )
    titles = [axes.get_title() for axes in grid]
    assert titles == ["5 ✕1", "2 ✕2", "0", "1", "3", "4", "6"]
    expected = 0.5 + weights[5] / (2 * weights[5].abs().max())
    np.testing.assert_allclose(
        grid[0].images[0].get_array(), expected.permute(1, 2, 0).numpy(), atol=1e-6
    )
    assert frame(grid[0]) == frame(grid[1]) != frame(grid[2]) == frame(grid[6])
    assert [len(axes.lines) for axes in grid] == [1, 0, 1, 0, 0, 0, 0]
    assert "removed" in figure.get_suptitle()
    assert "dot: color" in figure.get_suptitle()
    order = PruningOrder({"layer": 7}, [("layer", 6), ("layer", 0)])
    _, grid = plot_filter_grid(torch.randn(7, 20, 5, 5), order, columns=3)
    assert [axes.get_title() for axes in grid][:2] == ["6 ✕1", "0 ✕2"]


def test_removal_curves_draw_every_order_and_the_band():
    accuracy = {
        "greedy": torch.tensor([[0.9, 0.8, 0.7, 0.5]]),
        "random": torch.tensor([[0.9, 0.7, 0.5, 0.3], [0.9, 0.5, 0.3, 0.1]]),
    }
    orders = {name: torch.zeros(len(rows), 3).long() for name, rows in accuracy.items()}
    _, axes = plot_removal_curves(RemovalCurves("conv2", 8, orders, accuracy, num_images=1500))
    lines = {line.get_label(): line for line in axes.lines}
    assert set(lines) == {"all filters", "greedy", "random, mean of 2"}
    np.testing.assert_allclose(np.asarray(lines["greedy"].get_xdata()), [0, 12.5, 25, 37.5])
    np.testing.assert_allclose(np.asarray(lines["greedy"].get_ydata()), [90, 80, 70, 50], rtol=1e-6)
    mean = np.asarray(lines["random, mean of 2"].get_ydata())
    np.testing.assert_allclose(mean, [90, 60, 40, 20], rtol=1e-5)
    band = np.asarray(axes.collections[0].get_paths()[0].vertices)[:, 1]
    assert band.max() == pytest.approx(90)
    assert band.min() == pytest.approx(20 - 100 * np.std([0.3, 0.1], ddof=1), rel=1e-5)
    assert axes.get_title(loc="left") == "accuracy on 1,500 images"


def test_class_bars_have_values_and_whiskers():
    effects = [
        ClassEffect(name, value, value - 0.1, value + 0.2, value, 50)
        for name, value in (("cat", 0.3), ("dog", 0.1), ("car", -0.2))
    ]
    one = FilterInterpretation(4, 0.05, tuple(effects[:2]), tuple(effects[:0:-1]))
    figure, grid = plot_class_bars([one, one], torch.rand(2, 3, 6, 6), title="two filters")
    axes = grid[0, 1]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "dog", "car"]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([30, 10, -20])
    whisker = axes.collections[0].get_segments()[0]
    np.testing.assert_allclose(whisker[:, 0], [20, 50], atol=1e-5)
    assert "filter 4: +5.00 points" in axes.get_title(loc="left")
    assert figure.get_suptitle() == "two filters"
    assert plot_class_bars(one)[1].shape == (1, 1)


@pytest.mark.parametrize("make", [torch.as_tensor, torch.Tensor.numpy], ids=["tensor", "array"])
@pytest.mark.parametrize("name", ["plot_filter_grid", "plot_class_bars"])
def test_bytes_are_pictures(name, make):
    pictures = torch.tensor([[0, 51, 255], [204, 102, 1]], dtype=torch.uint8).repeat(2, 3, 1, 1)
    one = FilterInterpretation(0, 0.5, (), ())
    if name == "plot_filter_grid":
        axes = plot_filter_grid(make(pictures), [0])[1][0]
    else:
        axes = plot_class_bars([one, one], make(pictures))[1][0, 0]
    drawn = np.asarray(axes.images[0].get_array())
    assert drawn.shape == (2, 3, 3)
    np.testing.assert_allclose(drawn[..., 1], [[0, 0.2, 1], [0.8, 0.4, 1 / 255]], atol=1e-9)


def test_bad_input():
    weights = torch.rand(4, 3, 3, 3)
    one = FilterInterpretation(0, 0.0, (), ())
    for call, message in [
        (lambda: plot_filter_grid(weights[:, :, :1, :1], [0]), "more than one place"),
        (lambda: plot_filter_grid(weights, [0, 0]), "at most once"),
        (lambda: plot_filter_grid(weights, [4]), "at most once"),
        (lambda: plot_filter_grid(weights, [0], marked=torch.ones(3)), r"\(3,\); expected \(4,\)"),
        (lambda: plot_class_bars([]), "0 filters and no pictures"),
        (lambda: plot_class_bars(one, weights), "1 filters and 4 pictures"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
