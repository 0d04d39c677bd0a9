"""What a head costs, and a head without a class."""

import pytest
import torch
from torch import nn

from captum_classfilters import DecomposedLinear, decompose
from captum_classfilters.heads import compare_heads, remove_class
from tests.heads.common import identified
from tests.models import images


class TestCompareHeads:
    def test_counts(self):
        model, table = identified()
        comparison = compare_heads(model, decompose(model, table), images(), repetitions=3)
        assert comparison.before.head_parameters == 6 * 3 + 3
        assert comparison.after.head_parameters == 2 * 3 + 3
        assert comparison.after.head_multiply_adds == 6
        assert comparison.after.head_bytes == 9 * 4 + 6 * 2 * 8
        saved = comparison.before.parameters - comparison.after.parameters
        assert saved == 12
        assert comparison.before.seconds > 0
        lines = str(comparison).splitlines()
        assert lines[1].split() == ["head", "parameters", "21", "9", "2.33"]
        assert "\n" not in repr(comparison)

    def test_needs_a_pass_to_time(self):
        model, _ = identified()
        with pytest.raises(ValueError, match="repetitions=0"):
            compare_heads(model, model, images(), repetitions=0)


class TestRemoveClass:
    weight, bias = torch.rand(3, 4), torch.rand(3)
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0]], dtype=torch.bool)

    def test_of_a_decomposed_head(self):
        head, x = DecomposedLinear(self.weight, self.bias, self.mask), torch.rand(5, 4)
        removed = remove_class(head, 0)
        assert torch.allclose(removed.head(x), head(x)[:, 1:])
        assert removed.unused_features.tolist() == [0]

    @pytest.mark.parametrize("bias", [False, True])
    def test_of_a_dense_head(self, bias):
        dense, x = nn.Linear(4, 3, bias=bias).double().eval(), torch.rand(5, 4).double()
        removed = remove_class(dense, 2)
        assert torch.allclose(removed.head(x), dense(x)[:, :2])
        assert isinstance(removed.head, nn.Linear)
        assert not removed.head.training
        assert len(removed.unused_features) == 0

    def test_of_a_convolution(self):
        head, x = nn.Conv2d(4, 3, 1), torch.rand(2, 4, 5, 5)
        removed = remove_class(head, 1)
        assert torch.allclose(removed.head(x), head(x)[:, [0, 2]], atol=1e-6)

    def test_of_a_weight_that_is_normalized(self):
        head, x = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), torch.rand(2, 4)
        assert torch.allclose(remove_class(head, 1).head(x), head(x)[:, [0, 2]], atol=1e-6)

    def test_bad_input(self):
        dense = nn.Linear(4, 3)
        with pytest.raises(ValueError, match="out of range"):
            remove_class(dense, 3)
        with pytest.raises(ValueError, match="is a Conv2d, which cannot be decomposed"):
            remove_class(nn.Conv2d(4, 3, 3), 0)


@pytest.mark.parametrize("class_index", [0, 1])
def test_neither_class_of_one_output_is_removed(class_index):
    with pytest.raises(ValueError, match="tells the two classes of a binary classifier apart"):
        remove_class(nn.Linear(4, 1), class_index)
