"""The selectivity index is one of activations that are not negative; others are refused by name."""

import pytest
import torch

from captum_classfilters.metrics import class_selectivity_index, selectivity_regularizer


def test_by_hand():
    means = torch.tensor([[4.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    # (4 - 1/2) / (4 + 1/2), equal means, and a filter that is always zero.
    assert class_selectivity_index(means).tolist() == pytest.approx([7 / 9, 0, 0], abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_negative_means_are_named(dtype):
    means = torch.tensor([[1.0, -1.0, 2.0], [1.0, 1.0, -0.25], [1.0, 0.5, 3.0]], dtype=dtype)
    with pytest.raises(
        ValueError, match=r"of 2 filters are negative .* filter 1 .* smallest is -1"
    ):
        class_selectivity_index(means)
    with pytest.raises(ValueError, match="after its ReLU"):
        class_selectivity_index(-torch.ones(2, 1, dtype=dtype) * 1e-6)
    index = class_selectivity_index(means.clamp(min=0))
    assert bool(((index >= 0) & (index <= 1)).all())


def test_other_means_are_named():
    with pytest.raises(ValueError, match="negative or infinite"):
        class_selectivity_index(torch.tensor([[1.0, 1.0], [1.0, float("inf")]]))
    with pytest.raises(ValueError, match=r"shape \(3,\); expected \(C, K\)"):
        class_selectivity_index(torch.rand(3))
    rows = torch.tensor([[1.0, 2.0], [float("nan")] * 2, [3.0, 0.0]])
    assert torch.equal(class_selectivity_index(rows), class_selectivity_index(rows[[0, 2]]))
    with pytest.raises(ValueError, match="two classes with images"):
        class_selectivity_index(rows[:2])


def test_the_regularizer_refuses_layers_before_a_relu():
    labels = torch.tensor([0, 1, 0, 1])
    maps = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0)) - 1
    with pytest.raises(ValueError, match="after its ReLU"):
        selectivity_regularizer(maps, labels)
    # Single values may be negative where the means of the classes are not.
    mixed = torch.tensor([[-1.0], [0.5], [3.0], [0.5]])
    assert float(selectivity_regularizer(mixed, labels)) == pytest.approx(1 / 3, abs=1e-6)


def test_the_regularizer_names_shapes_that_do_not_fit():
    one_hot = torch.eye(3)[torch.tensor([0, 1, 2, 0])]
    with pytest.raises(ValueError, match=r"labels \(4, 3\) do not fit; .* one class index"):
        selectivity_regularizer([torch.rand(4, 5), torch.rand(4, 2)], one_hot)
    with pytest.raises(ValueError, match=r"activations \(3, 2\) and labels \(4,\)"):
        selectivity_regularizer([torch.rand(4, 5), torch.rand(3, 2)], torch.tensor([0, 1, 2, 0]))
