"""Pictures of gates, mutual information and correlation."""

import numpy as np
import pytest
import torch

from captum_classfilters.gates import filter_correlation
from captum_classfilters.visualize import (
    plot_filter_correlation,
    plot_gate_and_weight,
    plot_mutual_information,
)
from tests.models import known

GATE = torch.tensor([[0.0, 1.0, 0.2], [1.0, 0.0, 0.9]])
WEIGHT = torch.tensor([[-1.0, 2.0, 0.5], [3.0, -2.0, 1.0]])


def test_gate_and_weight_share_order_and_scale():
    _, grid = plot_gate_and_weight(GATE, WEIGHT, class_names=["cat", "dog"])
    order = [1, 0, 2]  # filter 1 belongs to the first class; 0 is more open than 2
    shown = [axes.images[0].get_array() for axes in grid]
    np.testing.assert_allclose(shown[0], GATE[:, order])
    np.testing.assert_allclose(shown[1], WEIGHT[:, order])
    np.testing.assert_allclose(shown[2], (GATE * WEIGHT)[:, order])
    assert [axes.images[0].norm.vmax for axes in grid] == [1, 3, 3]
    assert [label.get_text() for label in grid[0].get_yticklabels()] == ["cat", "dog"]


def test_another_networks_weight_has_its_own_order():
    other = torch.tensor([[5.0, 0.0, 1.0, 7.0], [0.0, 2.0, 0.0, 0.0]])
    _, grid = plot_gate_and_weight(GATE, WEIGHT, other_weight=other)
    np.testing.assert_allclose(grid[3].images[0].get_array(), other[:, [3, 0, 2, 1]])
    assert grid[1].images[0].norm.vmax == 7
    _, grid = plot_gate_and_weight(GATE, WEIGHT, other_weight=other, order="index")
    np.testing.assert_allclose(grid[3].images[0].get_array(), other)


def test_mutual_information():
    information = torch.tensor([[0.1, 0.2, 0.0], [0.3, 0.0, 0.25]])
    _, axes = plot_mutual_information(information, bound=0.325)
    np.testing.assert_allclose(known(axes.images[0].get_array()), information[:, [1, 0, 2]])
    assert axes.images[0].norm.vmax == 0.325
    assert "score 0.250 of at most 0.325" in axes.get_title(loc="left")
    _, axes = plot_mutual_information(information, order="index")
    np.testing.assert_allclose(known(axes.images[0].get_array()), information)
    assert axes.images[0].norm.vmax == pytest.approx(0.3)


def test_correlation_is_grouped_and_its_means_are_said():
    torch.manual_seed(0)
    weight = torch.randn(5, 2, 3, 3)
    scores = torch.tensor([[1.0, 0, 1, 0, 0], [0, 1, 0, 1, 1]]) + torch.arange(5) / 100
    _, axes = plot_filter_correlation(weight, scores)
    order = [2, 0, 4, 3, 1]
    expected = filter_correlation(weight)[order][:, order]
    np.testing.assert_allclose(known(axes.images[0].get_array()), expected)
    within = (expected[0, 1] + expected[2, 3] + expected[2, 4] + expected[3, 4]) / 4
    across = expected[:2, 2:].mean()
    assert f"within a class {within:.2f}, across {across:.2f}" in axes.get_title(loc="left")
    assert len(axes.lines) == 2  # one edge, both ways
    assert axes.get_yticks().tolist() == [0.5, 3.0]


def test_bad_input():
    with pytest.raises(ValueError, match="do not fit"):
        plot_gate_and_weight(GATE, WEIGHT[:, :2])
    with pytest.raises(ValueError, match="order='size'"):
        plot_gate_and_weight(GATE, WEIGHT, order="size")
    with pytest.raises(ValueError, match=r"other_weight has shape \(3,\)"):
        plot_gate_and_weight(GATE, WEIGHT, other_weight=torch.rand(3))
    with pytest.raises(ValueError, match="class_names has 1 names; expected 2"):
        plot_gate_and_weight(GATE, WEIGHT, class_names=["cat"])
    with pytest.raises(ValueError, match=r"expected \(C, K\)"):
        plot_mutual_information(torch.rand(3))
    with pytest.raises(ValueError, match="order='size'"):
        plot_mutual_information(GATE, order="size")
    with pytest.raises(ValueError, match="do not fit 5 filters"):
        plot_filter_correlation(torch.rand(5, 2), GATE)


def test_the_bound_of_information_may_be_one_for_each_class():
    information = torch.rand(3, 5)
    _, axes = plot_mutual_information(information, bound=torch.tensor([0.5, 0.7, 0.6]))
    _, same = plot_mutual_information(information, bound=0.7)
    assert axes.images[0].get_clim() == pytest.approx(same.images[0].get_clim())
    assert axes.images[0].get_clim()[1] == pytest.approx(0.7)
