"""A replay equals the whole model, whatever the model does around the layer."""

import logging

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from captum_classfilters._core.replay.repeated_batch import RepeatedBatch
from captum_classfilters._core.replay.suffix_replay import SuffixReplay
from tests.models import Reused, TwoInputs, TwoTensors, deep, hooks_of, images, pool_linear


class Block(nn.Module):
    """A residual block with every trap: in-place ReLU and addition, shortcut after the layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.first = nn.Conv2d(4, 5, 3, padding=1)
        self.second = nn.Conv2d(5, 4, 1)
        self.shortcut = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        before = x
        self.relu(x)  # `before` is overwritten as well
        y = self.second(F.relu(self.first(x), inplace=True))
        y += self.shortcut(before)
        z = torch.cat([y, F.avg_pool2d(x, 3, 1, 1)], 1)
        return self.head(z.amax((2, 3)))


class SharedWritten(nn.Module):
    """The tensor that no removal has reached is the one written into."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = nn.Conv2d(2, 4, 3), nn.Conv2d(2, 4, 3)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.left(x), self.right(x)
        left += right
        left.relu_()
        return self.head(left.mean((2, 3)) ** 2)


class MakesRandom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.dropout, self.head = nn.Conv2d(2, 4, 3), nn.Dropout(0.5), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.conv(x)).amax((2, 3)))


class BatchDependent(MakesRandom):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).amax((2, 3))
        return self.head(x - x.mean(0))


def by_hand(model, layer, inputs, removed, at_input=False):
    """Outputs with each row's filters set to zero by a hook, one whole forward pass each."""
    outputs = []
    for row in removed:

        def zero(tensor, row=row):
            tensor = tensor.clone()
            tensor[:, row] = 0
            return tensor

        handle = (
            layer.register_forward_pre_hook(lambda _m, args: (zero(args[0]), *args[1:]))
            if at_input
            else layer.register_forward_hook(lambda _m, _args, output: zero(output))
        )
        with torch.no_grad():
            outputs.append(model(*inputs))
        handle.remove()
    return torch.stack(outputs)


CASES = [
    (Block, "stem"),
    (Block, "first"),
    (Block, "second"),
    (Block, "shortcut"),
    (SharedWritten, "right"),
    (SharedWritten, "left"),
    (deep, "stage1"),
    (deep, "stage1.0"),
    (deep, "stage2.1"),
]


@pytest.mark.parametrize("at_input", [False, True])
@pytest.mark.parametrize("rows", [None, 1, 3])
@pytest.mark.parametrize(("make", "name"), CASES)
def test_replay_equals_whole_model(make, name, rows, at_input):
    model = make().eval()
    layer = model.get_submodule(name)
    replay = SuffixReplay(model, layer, (images(),), at_input=at_input, closed_form=False)
    removed = torch.rand(7, replay.num_filters, generator=torch.Generator().manual_seed(2)) < 0.4
    expected = by_hand(model, layer, (images(),), removed, at_input)
    assert replay.way == "replay"
    torch.testing.assert_close(replay.outputs(removed, rows), expected, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(expected, replay.output)
    assert hooks_of(model) == 0
    assert all("forward" not in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("resnet18", "layer2.0.conv1"),
        ("resnet18", "layer3.0.downsample.0"),
        ("densenet121", "features.denseblock3.denselayer2.conv1"),
        ("squeezenet1_1", "features.6"),
        ("googlenet", "inception4a.branch2.1.conv"),
    ],
)
def test_replay_equals_whole_model_on_torchvision(family, name):
    torch.manual_seed(0)
    options = {"init_weights": False} if family == "googlenet" else {}
    model = torchvision.models.get_model(family, weights=None, **options).eval()
    layer, x = model.get_submodule(name), torch.randn(2, 3, 64, 64)
    replay = SuffixReplay(model, layer, (x,))
    removed = torch.zeros(2, replay.num_filters, dtype=torch.bool)
    removed[0, 0], removed[1, : replay.num_filters // 2] = True, True
    assert replay.way == "replay"
    expected = by_hand(model, layer, (x,), removed)
    scale = float(expected.abs().max())
    torch.testing.assert_close(replay.outputs(removed) / scale, expected / scale, rtol=0, atol=2e-6)


def test_what_comes_before_the_layer_runs_once():
    model = deep()
    ran = []
    for name in ("stage1.0", "stage2.0"):
        model.get_submodule(name).register_forward_hook(lambda m, i, o, n=name: ran.append(n))
    replay = SuffixReplay(model, model.stage1, (images(),), closed_form=False)
    ran.clear()
    replay.outputs(torch.eye(4, dtype=torch.bool), 2)
    assert ran == ["stage2.0", "stage2.0"]


def test_unreached_tensors_stay_one_copy():
    rows = images()
    batch = RepeatedBatch(rows, 3)
    conv = nn.Conv2d(2, 4, 3)
    with torch.no_grad():
        out = F.relu(conv(batch))
        assert isinstance(out, RepeatedBatch)
        assert len(out.rows) == 8
        assert out.shape == (24, 4, 4, 4)
        torch.testing.assert_close(out.all_rows(), F.relu(conv(rows.repeat(3, 1, 1, 1))))
        # Statistics over the batch are not image by image: all rows are seen.
        assert (batch - batch.mean(0)).shape == (24, 2, 6, 6)


def test_writing_into_one_copy_leaves_the_record():
    rows = images()
    kept = rows.clone()
    with torch.no_grad():
        batch = RepeatedBatch(rows, 2)
        batch.relu_()
        batch += torch.ones(16, 2, 6, 6)
    assert torch.equal(rows, kept)
    torch.testing.assert_close(batch.all_rows(), kept.relu().repeat(2, 1, 1, 1) + 1)


@pytest.mark.parametrize("flatten", [False, True])
def test_closed_form_equals_whole_model(flatten):
    if flatten:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3)).eval()
    else:
        model = pool_linear()
    replay = SuffixReplay(model, model[1], (images(),))
    removed = torch.rand(5, 6, generator=torch.Generator().manual_seed(2)) < 0.5
    assert replay.way == "closed form"
    expected = by_hand(model, model[1], (images(),), removed)
    torch.testing.assert_close(replay.outputs(removed), expected, rtol=1e-6, atol=1e-6)


def test_a_relation_that_only_the_batch_shows_is_not_used():
    class Softmaxed(nn.Module):
        """Normalising what sums to one changes nothing until a filter goes."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.soft, self.head = nn.Conv2d(2, 4, 3), nn.Softmax(1), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.soft(self.conv(x).mean((2, 3)))
            return self.head(x / x.sum(1, keepdim=True).clamp(min=1e-3))

    model = Softmaxed().eval()
    replay = SuffixReplay(model, model.soft, (images(),))
    removed = torch.eye(4, dtype=torch.bool)
    assert replay.way == "replay"
    expected = by_hand(model, model.soft, (images(),), removed)
    torch.testing.assert_close(replay.outputs(removed), expected, rtol=1e-6, atol=1e-6)


def test_several_inputs_and_plain_functions():
    model, removed = TwoInputs().eval(), torch.eye(4, dtype=torch.bool)
    inputs = (images(), images(seed=5))
    expected = by_hand(model, model.conv, (*inputs, 2.0), removed)
    for function in (model, lambda *args: model(*args)):
        replay = SuffixReplay(function, model.conv, inputs, (2.0,), closed_form=False)
        assert replay.way == "replay"
        torch.testing.assert_close(replay.outputs(removed), expected, rtol=1e-6, atol=1e-6)


def test_batch_dependent_model_runs_whole_and_says_so_once(caplog):
    model, removed = BatchDependent().eval(), torch.eye(4, dtype=torch.bool)
    with caplog.at_level(logging.WARNING, logger="captum_classfilters"):
        # Equal copies of a batch have its own mean; a removal in one of them shows in all.
        for _ in range(2):
            replay = SuffixReplay(model, model.conv, (images(),), closed_form=False)
            outputs = replay.outputs(removed)
    assert replay.way == "whole model"
    torch.testing.assert_close(outputs, by_hand(model, model.conv, (images(),), removed))
    assert sum("the whole model runs" in record.message for record in caplog.records) == 1


def test_dropout_in_training_mode_runs_whole():
    model = MakesRandom().train()
    assert SuffixReplay(model, model.conv, (images(),)).way == "whole model"
    assert SuffixReplay(model.eval(), model.conv, (images(),)).way == "replay"


@pytest.mark.parametrize(
    ("make", "name", "message"),
    [
        (Reused, "relu", "reached 2 times"),
        (Reused, "unused", "never reached"),
        (TwoTensors, "split", "not a single tensor"),
    ],
)
def test_layers_that_have_no_single_output(make, name, message):
    model = make().eval()
    with pytest.raises(ValueError, match=message):
        SuffixReplay(model, model.get_submodule(name), (images(),))
    assert hooks_of(model) == 0
    assert all("forward" not in vars(module) for module in model.modules())


class Empty(nn.Module):
    """Linear in the layer's means, but for images in which no filter is left."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.act, self.head = nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Linear(4, 3)

    def forward(self, x):
        means = self.act(self.conv(x)).mean((2, 3))
        return self.head(means + (means.sum(1, keepdim=True) == 0))


def test_the_closed_form_must_hold_without_any_filter_too():
    model = Empty().eval()
    replay = SuffixReplay(model, model.act, (images(),))
    removed = torch.tensor([[True] * 4, [True, False, False, False]])
    expected = by_hand(model, model.act, (images(),), removed)
    torch.testing.assert_close(replay.outputs(removed), expected)
    assert replay.way == "replay"


def test_more_rows_at_once_where_many_weights_are_read_for_them():
    def rows(width):
        model = nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, width), nn.ReLU(),
            nn.Linear(width, 3),
        ).eval()  # fmt: skip
        x = torch.rand(200, 2, 8, 8)
        return SuffixReplay(model, model[0], (x,)).rows_per_replay()

    assert 1 <= rows(8) < rows(20_000)
