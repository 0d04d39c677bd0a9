"""Repairs of a cell of the confusion matrix, against the models themselves."""

import pytest
import torch
from torch import nn

from captum_classfilters.answers import repair_confusion
from tests.models import QUIET


def net() -> nn.Sequential:
    """The third channel is no class's own, but speaks for the second class."""
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    with torch.no_grad():
        model.get_parameter("2.weight").copy_(
            torch.tensor([[4.0, 0, 0, 0], [0, 4, 3, 0], [0, 0, 0, 4]])
        )
        model.get_parameter("2.bias").copy_(torch.tensor([0.0, -1.5, 0.0]))
    return model.eval()


def data(seed: int, number: int = 90):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(number) % 3
    x = torch.rand(number, 4, 1, 1, generator=generator)
    x[torch.arange(number), torch.tensor([0, 1, 3])[labels]] += 0.4
    return list(zip(x.split(40), labels.split(40), strict=True))


class TestRepairConfusion:
    def test_the_entry_that_drives_it(self):
        model = net()
        fixed = repair_confusion(model, data(0), data(1), 0, 1, size=1, repetitions=3, **QUIET)
        assert fixed.removed.nonzero().tolist() == [[1, 2]]
        assert float(fixed.model.get_parameter("2.weight").detach()[1, 2]) == 0
        x = torch.cat([x for x, _ in data(0)])
        expected = -1.5 + 3 * float(x[:, 2].mean())
        assert float(fixed.model.get_parameter("2.bias").detach()[1]) == pytest.approx(
            expected, abs=1e-6
        )
        assert torch.equal(model.get_parameter("2.weight"), net().get_parameter("2.weight"))

    def test_counts_are_those_of_the_models(self):
        fixed = repair_confusion(net(), data(0), data(1), 0, 1, repetitions=3, **QUIET)
        x, y = (torch.cat(part) for part in zip(*data(1), strict=True))
        with torch.no_grad():
            before, after = net()(x).argmax(1), fixed.model(x).argmax(1)
        rows = ((y == 0, 1), (y == 0, 0), (y == 1, 1), (y == 2, 2))
        for row, (images, class_) in enumerate(rows):
            old, new = (answers[images] == class_ for answers in (before, after))
            assert fixed.hits[row, :2].tolist() == [int(old.sum()), int(new.sum())]
            assert int(fixed.lost[row]) == int((old & ~new).sum())
            assert int(fixed.gained[row]) == int((new & ~old).sum())
            assert int(fixed.counts[row]) == 30
        assert fixed.hits[4].tolist() == fixed.hits[1:4].sum(0).tolist()
        assert fixed.hits.shape == (5, 6)
        # It is what confuses these classes, and no class needs it.
        assert fixed.hits[0, 1] < fixed.hits[0, 0]
        assert fixed.hits[4, 1] > fixed.hits[4, 0]
        assert float(fixed.interval()[0, 1]) < 0.05
        assert "0 taken for 1" in str(fixed)

    def test_a_lower_bias_is_beside_it(self):
        """No edit of the weight: as much is taken off the second class's score everywhere."""
        fixed = repair_confusion(net(), data(0), data(1), 0, 1, repetitions=0, **QUIET)
        assert fixed.hits[0, 2] <= fixed.hits[0, 0]
        assert fixed.hits.shape == (5, 3)

    def test_without_gain_the_model_is_unchanged(self):
        """Each image of the cell looks as one of the other class does; the other class has more."""
        x = torch.rand(4, 4, 1, 1, generator=torch.Generator().manual_seed(0))
        x[:, 1] += 1
        images = (
            x.repeat(3, 1, 1, 1)
            + torch.arange(3)[:, None].repeat_interleave(4, 0)[..., None, None] * 1e-4
        )
        labels = torch.ones(12, dtype=torch.int64)
        labels[:4] = 0
        find = [(images, labels)]
        fixed = repair_confusion(net(), find, data(1), 0, 1, repetitions=3, **QUIET)
        assert not fixed.removed.any()
        assert "The model is unchanged" in str(fixed)
        for name, own in net().state_dict().items():
            assert torch.equal(fixed.model.state_dict()[name], own)
        assert torch.equal(fixed.hits[:, 0], fixed.hits[:, 1])
        assert int(fixed.lost.sum() + fixed.gained.sum()) == 0
        assert fixed.hits.shape == (5, 6)
        forced = repair_confusion(net(), find, data(1), 0, 1, size=2, repetitions=0, **QUIET)
        assert int(forced.removed.sum()) == 2  # a size that is asked for is edited
        assert "2 weights of the head edited" in str(forced)

    def test_no_gain_on_other_images_is_said(self):
        fixed = repair_confusion(net(), data(0), data(1), 0, 1, size=8, repetitions=0, **QUIET)
        assert fixed.hits[4, 1] < fixed.hits[4, 0]
        turned = f"{int(fixed.gained[4])} turn right, {int(fixed.lost[4])} wrong"
        assert f"no gain on other images: {turned}" in str(fixed)

    def test_refusals(self):
        with pytest.raises(ValueError, match="Both classes are"):
            repair_confusion(net(), data(0), data(1), 1, 1, **QUIET)
        with pytest.raises(ValueError, match="No image of class '2' was taken for '2 x'"):
            repair_confusion(
                net(), [(torch.eye(4)[[3]][:, :, None, None], torch.tensor([2]))], data(1), 2, 1,
                class_names=["0", "2 x", "2"], **QUIET,
            )  # fmt: skip
        with pytest.raises(ValueError, match="were used to find"):
            repair_confusion(net(), data(0), data(0), 0, 1, **QUIET)
        with pytest.raises(ValueError, match="size=9 is out of range; choose 1 to 8"):
            repair_confusion(net(), data(0), data(1), 0, 1, size=9, **QUIET)
        with pytest.raises(ValueError, match="3"):
            repair_confusion(net(), data(0), data(1), 0, 3, **QUIET)
        one = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1)).eval()
        with pytest.raises(ValueError, match="has one output"):
            repair_confusion(one, data(0), data(1), 0, 1, **QUIET)
