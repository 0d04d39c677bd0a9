"""A replay equals the whole model, whatever the model does around the layer."""

import gc
import logging
import random
import weakref
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from captum_classfilters import LayerFilterAblation
from captum_classfilters._core.replay.repeated_batch import RepeatedBatch
from captum_classfilters._core.replay.suffix_replay import SuffixReplay
from tests.models import (
    Reused,
    TwoInputs,
    TwoTensors,
    deep,
    hooks_of,
    images,
    known,
    pool_linear,
)
from tests.pretend_device import host_reads, pretend


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
            outputs.append(model(*(x.clone() if isinstance(x, Tensor) else x for x in inputs)))
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
    options: dict[str, Any] = {"init_weights": False} if family == "googlenet" else {}
    model = torchvision.models.get_model(family, weights=None, **options).eval()
    layer, x = model.get_submodule(name), torch.randn(2, 3, 64, 64)
    replay = SuffixReplay(model, layer, (x,))
    removed = torch.zeros(2, replay.num_filters, dtype=torch.bool)
    removed[0, 0], removed[1, : replay.num_filters // 2] = True, True
    assert replay.way == "replay"
    expected = by_hand(model, layer, (x,), removed)
    scale = float(expected.abs().max())
    torch.testing.assert_close(replay.outputs(removed) / scale, expected / scale, rtol=0, atol=2e-6)


def runs_of(model, *names):
    """A list that names each of these modules whenever it runs."""
    ran = []
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda m, i, o, n=name: ran.append(n))
    return ran


def test_what_comes_before_the_layer_runs_once():
    model = deep()
    ran = runs_of(model, "stage1.0", "stage2.0")
    replay = SuffixReplay(model, model.stage1, (images(),), closed_form=False)
    replay.outputs(torch.eye(4, dtype=torch.bool), 2)
    ran.clear()
    replay.outputs(torch.eye(4, dtype=torch.bool), 2)
    assert ran == ["stage2.0", "stage2.0"]


@pytest.mark.parametrize(
    ("make", "layer", "before", "first"),
    [(deep, "stage2", "stage1.0", 1 + 2), (deep, "stage2.0", "stage1.0", 1 + 2 + 2)],
)
def test_the_whole_model_runs_a_few_times_for_the_first_batch_and_once_for_others(
    make, layer, before, first
):
    """Two sets at first, and two rows of the first replay if there is one."""
    model = make()
    ran = runs_of(model, before)
    for expected in (first, 1, 1):
        ran.clear()
        replay = SuffixReplay(model, model.get_submodule(layer), (images(),))
        replay.outputs(replay.each_filter())
        assert len(ran) == expected


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
        batch += torch.ones(16, 2, 6, 6)  # type: ignore[misc]  # in place, of its own kind
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
        """Normalizing what sums to one changes nothing until a filter goes."""

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


@pytest.mark.parametrize("layer", ["3", "4", "5.1"])
@pytest.mark.parametrize("rows", [1, 2])
def test_the_last_linear_layer_may_be_inside_of_the_layer_or_before_it(layer, rows, caplog):
    """Replays do not run it again."""
    head = nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.Softplus(), nn.Linear(4, 5))
    ends = nn.Sequential(nn.Softplus(), nn.Tanh())
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), head, nn.Hardtanh(-9, 9), ends
    ).eval()
    replay = SuffixReplay(model, model.get_submodule(layer), (torch.randn(4, 3, 8, 7),))
    assert replay.way == "replay"
    assert not caplog.records
    removed = replay.each_filter()
    expected = by_hand(model, replay.layer, replay.arguments, removed)
    torch.testing.assert_close(replay.outputs(removed, rows), expected, rtol=1e-6, atol=1e-6)


class AddsTheMean(nn.Sequential):
    """Its last linear layer takes one row, however many images there are."""

    def forward(self, tensor: Tensor) -> Tensor:
        maps, first, second = self
        means = maps(tensor).mean((2, 3))
        return first(means) + second(means.mean(0, keepdim=True))


def test_a_last_linear_layer_of_one_row_is_told_in_plain_words(caplog):
    model = AddsTheMean(nn.Conv2d(3, 6, 3), nn.Linear(6, 5), nn.Linear(6, 5)).eval()
    with caplog.at_level(logging.WARNING, logger="captum_classfilters"):
        replay = SuffixReplay(model, model[0], (torch.randn(4, 3, 8, 7),))
    assert replay.way == "whole model"
    assert "(the last linear layer does not run as it did before)" in caplog.text


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
        x = torch.rand(20, 2, 8, 8)
        return SuffixReplay(model, model[0], (x,)).rows_per_replay()

    assert 1 <= rows(8) < rows(100_000)


class Tail(nn.Module):
    """A convolution of 4 filters, a function of its maps, another convolution, a linear head."""

    def __init__(self, function=lambda h: h, before=None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.relu = nn.Conv2d(2, 4, 3, padding=1), nn.ReLU()
        self.before = before or nn.Identity()
        self.second, self.head = nn.Conv2d(4, 5, 3, padding=1), nn.Linear(5, 3)
        self.register_buffer("scale", torch.tensor(2.0))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        h = self.function(self.relu(self.conv(self.before(x))))
        return self.head(self.second(h).relu().mean((2, 3)))


def check(model, layer, x, way=None, **options):
    """Outputs without each filter, and without random sets, equal those of the whole model."""
    layer = model.get_submodule(layer)
    replay = SuffixReplay(model, layer, (x,), **options)
    halves = torch.rand(3, replay.num_filters, generator=torch.Generator().manual_seed(4)) < 0.5
    for removed in (replay.each_filter(), halves):
        expected = by_hand(model, layer, (x.clone(),), removed)
        outputs = replay.outputs(removed)
        torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert way is None or replay.way == way
    assert hooks_of(model) == 0
    return replay


BATCH_DEPENDENT = {
    "first image": lambda h: h - h[:1],
    "last image": lambda h: h - 0.5 * h[-1:],
    "mean of the batch": lambda h: h - h.mean(0),
    "norm of the batch": lambda h: h / h.norm(),
    "largest of the batch": lambda h: h / h.max(),
    "statistics of the batch": lambda h: F.batch_norm(h, None, None, training=True),
    "order of the batch": lambda h: h + h.flip(0),
    "neighbor": lambda h: h + 0.1 * h.roll(1, 0),
    "place in the batch": lambda h: h * torch.arange(1, len(h) + 1).reshape(-1, 1, 1, 1),
    "size of the batch": lambda h: h / len(h),
    "hardly": lambda h: h + 1e-3 * h[:1],
}


@pytest.mark.parametrize("number", [1, 5])
@pytest.mark.parametrize("kind", BATCH_DEPENDENT)
def test_what_looks_at_other_images_runs_whole(kind, number):
    # Saturated outputs hide most of it.
    model = nn.Sequential(Tail(BATCH_DEPENDENT[kind]), nn.Softmax(1)).eval()
    check(model, "0.relu", images(number), "whole model")


def shuffled_and_back(h):
    order = torch.randperm(len(h))
    return h[order].tanh()[order.argsort()]


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (shuffled_and_back, "random numbers"),
        (lambda h: h + 0 * numpy.random.rand(), "random numbers"),
        (lambda h: h + 0 * random.random(), "random numbers"),
        (lambda h: h * 2 if h.mean() > 0 else h, "values of the batch"),
        (lambda h: h * float(h.max()), "values of the batch"),
    ],
)
def test_chance_and_branches_run_whole(function, reason, caplog):
    class Named(Tail):
        pass

    Named.__name__ = f"Named{len(reason)}{id(function)}"  # each warns by itself
    with caplog.at_level(logging.WARNING, logger="captum_classfilters"):
        check(Named(function).eval(), "relu", images(), "whole model")
    assert reason in caplog.text


def test_reading_the_models_own_numbers_is_no_branch():
    model = Tail().eval()
    model.function = lambda h: h * model.get_buffer("scale").item()
    check(model, "relu", images(), "replay")


class Encoder(nn.Module):
    """Leaves a result where a later module finds it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv, self.how, self.kept = nn.Conv2d(2, 4, 1), how, None

    def forward(self, x: Tensor, skips: list) -> Tensor:
        if self.how == "list":
            skips.append(self.conv(x))
        else:
            self.kept = self.conv(x)
        return x


class Skips(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.how = Encoder(how), how
        self.conv, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        skips: list[Tensor] = []
        h = self.conv(self.encoder(x, skips)).relu()
        if self.how == "list":
            h = h + skips[0]
        elif self.how == "kept":
            h = h + self.encoder.kept
        else:  # of another batch this would go unseen by shapes
            h = h * known(self.encoder.kept).mean()
        return self.head(h.amax((2, 3)))


@pytest.mark.parametrize(
    ("how", "way"), [("list", "replay"), ("kept", "whole model"), ("mean", "")]
)
def test_what_modules_leave_for_later_ones(how, way):
    model = Skips(how).eval()
    check(model, "conv", images(), way or None)


@pytest.mark.parametrize("how", ["list", "kept", "mean"])
def test_batches_replayed_after_others_ran(how):
    """As greedy pruning does: modules keep something of the batch that ran last."""
    model = Skips(how).eval()
    batches = [images(seed=1), images(seed=2) * 3]
    replays = [SuffixReplay(model, model.conv, (x,)) for x in batches]
    for x, replay in zip(batches, replays, strict=True):
        expected = by_hand(model, model.conv, (x,), replay.each_filter())
        model(images(seed=7))
        torch.testing.assert_close(replay.outputs(replay.each_filter()), expected)


class Remembers(nn.Module):
    """Refuses a batch of another size than the last one, and keeps a history."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Tensor | None = None
        self.history: list[Tensor] = []
        self.by_name: dict[str, Tensor] = {}

    def forward(self, h: Tensor) -> Tensor:
        if self.last is not None and self.last.shape != h.shape:
            raise RuntimeError("the state does not fit")
        self.last = self.by_name["last"] = h
        self.history.append(h)
        return h


def test_a_failed_replay_leaves_no_trace_in_the_modules():
    memory = Remembers()
    model = Tail(memory).eval()  # a submodule by its attribute's name
    x = images()
    check(model, "relu", x, "whole model")
    assert known(memory.last).shape == memory.by_name["last"].shape == (8, 4, 6, 6)
    assert {type(h) for h in memory.history} == {Tensor}
    assert {len(h) for h in memory.history} == {8}


@pytest.mark.parametrize("value", [torch.inf, 1e8])
@pytest.mark.parametrize("clip", [False, True])
def test_images_with_infinite_or_huge_activations(value, clip):
    """Nothing stands in for them but zero; other images' numbers, and what is left, stay exact."""
    model = Tail(lambda h: h.clamp(max=1e3) if clip else h).eval()
    x = images()
    x[2, 0, 3, 3] = value
    for layer in ("relu", "conv"):
        outputs = check(model, layer, x).outputs(torch.eye(4).bool())
        assert bool(outputs[:, [0, 1, 3, 4, 5, 6, 7]].isfinite().all())
    head = pool_linear()
    with torch.no_grad():
        head.get_parameter("0.weight").abs_()
    check(head, "1", x)


def test_one_filter_much_larger_than_all_others_is_removed_exactly():
    model = Tail().eval()
    with torch.no_grad():
        model.conv.weight[1] *= 1e7
    for name in ("conv", "relu"):
        replay = check(model, name, images(), "replay")
        assert not replay._one_by_one
    # Two large filters: one may be followed, but not where the other is gone already.
    with torch.no_grad():
        model.conv.weight[2] = model.conv.weight[1]
    replay = SuffixReplay(model, model.conv, (images(),))
    removed = torch.tensor([[False, True, False, False], [False, True, True, False]])
    expected = by_hand(model, model.conv, (images(),), removed)
    torch.testing.assert_close(replay.outputs(removed), expected, rtol=1e-4, atol=1e-5)


class Half(nn.Module):
    """Autocast inside forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.model(x)


@pytest.mark.parametrize(
    ("make", "layer", "way"),
    [(pool_linear, "1", "closed form"), (pool_linear, "0", "replay"), (Tail, "relu", "replay")],
)
def test_autocast_inside_forward(make, layer, way):
    model = Half(make()).eval()
    layer = model.model.get_submodule(layer)
    replay = SuffixReplay(model, layer, (images(),))
    assert replay.way == way
    expected = by_hand(model, layer, (images(),), replay.each_filter())
    outputs = replay.outputs(replay.each_filter())
    assert outputs.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(outputs, expected, rtol=0.05, atol=0.02)
    drops = LayerFilterAblation(model, layer).attribute(images(), target=1).flatten(2).sum(2)
    torch.testing.assert_close(drops.float(), (replay.output - expected)[..., 1].T.float(),
                               rtol=0.1, atol=0.02)  # fmt: skip


@pytest.mark.parametrize("how", ["hook", "subclass", "before"])
def test_what_half_precision_cannot_tell_from_a_linear_head(how):
    class Tanh(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).tanh()

    class Before(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.relu = nn.Conv2d(2, 6, 3), nn.ReLU()
            self.head = (Tanh if how == "subclass" else nn.Linear)(6, 3)
            if how == "hook":
                self.head.register_forward_hook(lambda _m, _i, output: output.tanh())

        def forward(self, x: Tensor) -> Tensor:
            means = self.relu(self.conv(x)).mean((2, 3))
            return self.head(means.tanh() if how == "before" else means)

    model = Half(Before()).eval()
    relu = model.get_submodule("model.relu")
    replay = SuffixReplay(model, relu, (images(),))
    assert replay.way == "replay"
    expected = by_hand(model, relu, (images(),), replay.each_filter())
    torch.testing.assert_close(replay.outputs(replay.each_filter()), expected, rtol=0.02, atol=0.01)


class Cosine(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 16 * F.linear(F.normalize(x), F.normalize(self.weight))


def divided(z):
    z /= 5
    return z


class Ended(nn.Module):
    """`pool_linear`, and something done to what it returns."""

    def __init__(self, end=lambda z: z, head=None) -> None:
        super().__init__()
        twin = pool_linear()
        self.conv, self.relu, self.head, self.end = twin[0], twin[1], head or twin[4], end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.head(self.relu(self.conv(x)).mean((2, 3))))


def hooked(head):
    head.register_forward_hook(lambda _module, _inputs, output: output.sigmoid())
    return head


@pytest.mark.parametrize(
    ("end", "head", "way"),
    [
        (lambda z: z, None, "closed form"),
        (divided, None, "replay"),
        (lambda z: z.clone(), None, "replay"),
        (lambda z: z.clamp(max=9.0), None, "replay"),
        (lambda z: z.clamp_(max=9.0), None, "replay"),
        (lambda z: z[:, :2], None, "replay"),
        (lambda z: (z[:, :1].mul_(2), z)[1], None, "replay"),
        (lambda z: z, Cosine(6, 3), "replay"),
        (lambda z: z, hooked(nn.Linear(6, 3)), "replay"),
    ],
)
def test_the_closed_form_is_for_a_plain_head_whose_tensor_is_the_output(end, head, way):
    model = Ended(end, head).eval()
    removed = torch.eye(6).bool()
    expected = by_hand(model, model.relu, (images(),), removed)
    replay = SuffixReplay(model, model.relu, (images(),))
    assert replay.way == way
    torch.testing.assert_close(replay.outputs(removed), expected, rtol=1e-5, atol=1e-6)


def test_a_clip_that_no_output_of_the_batch_reaches():
    for seed in range(10):
        model = Ended().eval()
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.5)
            limit = float(model(images()).max()) + 1e-3
        model.end = lambda z, limit=limit: z.clamp(max=limit)
        check(model, "relu", images())


@pytest.mark.parametrize("error", [True, False])
def test_a_replay_that_fails_later_falls_back(error, caplog):
    """Batches of 8 and 16 images can be computed, larger ones not, or otherwise."""

    def function(h):
        if len(h) > 70 and error:
            raise RuntimeError("too many images")
        return h.tanh() if len(h) > 70 else h

    class Limited(Tail):
        pass

    Limited.__name__ = f"Limited{error}"
    model = Limited(function).eval()
    replay = SuffixReplay(model, model.relu, (images(),))
    assert replay.way == "replay"
    removed = torch.rand(12, 4, generator=torch.Generator().manual_seed(4)) < 0.5
    expected = by_hand(model, model.relu, (images(),), removed)
    with caplog.at_level(logging.WARNING, logger="captum_classfilters"):
        torch.testing.assert_close(replay.outputs(removed, 2), expected)
        assert replay.way == "replay"
        torch.testing.assert_close(replay.outputs(removed, 12), expected)
        assert replay.way == "whole model"
        torch.testing.assert_close(replay.outputs(removed), expected)
    assert sum("the whole model runs" in record.message for record in caplog.records) == 1


def test_an_error_while_the_run_is_recorded_is_not_the_users(monkeypatch):
    def fails(*_args):
        raise RuntimeError("a module that cannot be recorded")

    monkeypatch.setattr("captum_classfilters._core.replay.recorded_calls.ModuleCall.end", fails)
    check(Tail().eval(), "relu", images(), "whole model")


def test_the_models_own_error_is_the_users():
    def function(h):
        raise RuntimeError("of the model")

    model = Tail(function).eval()
    with pytest.raises(RuntimeError, match="of the model"):
        SuffixReplay(model, model.relu, (images(),))
    assert hooks_of(model) == 0
    assert all("forward" not in vars(module) for module in model.modules())


def test_nan_without_a_filter_is_refused_by_name():
    def share(h):
        h = h.clamp(min=0.2)[:, 1:2] * (h[:, 1:2] > 0) / h[:, 1:2].sum((1, 2, 3), keepdim=True)
        return h.expand(-1, 4, -1, -1)

    model = Tail(share).eval()
    x = images()
    with torch.no_grad():
        assert not bool(model(x).isnan().any())
    replay = SuffixReplay(model, model.relu, (x,))
    removed = replay.each_filter()
    outputs = replay.outputs(removed)
    with pytest.raises(
        ValueError, match=r"Without filter 1 of the layer 'relu' .* NaN for image 0"
    ):
        replay.check_no_nan(removed, outputs)
    replay.check_no_nan(removed[2:], outputs[2:])
    sets = torch.zeros(1, 8, 4, dtype=torch.bool)
    sets[0, 5, :3] = True
    with pytest.raises(ValueError, match=r"Without filter 0, 1, 2 of .* image 5"):
        replay.check_no_nan(sets, replay.outputs(sets))


def test_inputs_are_not_written_into_and_may_be_inference_tensors():
    class InPlace(Tail):
        def forward(self, x: Tensor) -> Tensor:
            x -= 0.5
            return super().forward(x)

    model, x = InPlace().eval(), images()
    kept = x.clone()
    check(model, "relu", x, "replay")
    assert torch.equal(x, kept)
    with torch.inference_mode():
        replay = check(deep(), "stage1", images() + 0)
        assert not replay.output.is_inference()


@pytest.mark.parametrize("kind", ["cuda", "meta"])
@pytest.mark.parametrize(
    ("make", "layer", "way", "reads"),
    [
        (pool_linear, "1", "closed form", 2),
        (deep, "stage1", "replay", 3),
        (Block, "first", "replay", 3),
        (lambda: Tail(lambda h: h - h[:1]), "relu", "whole model", 4),
    ],
)
def test_on_a_device(kind, make, layer, way, reads):
    """The numbers of the CPU, and few waits for the device; more for the first batch."""
    model, batches = make().eval(), (images(), images(seed=2))
    on_cpu = [SuffixReplay(model, model.get_submodule(layer), (x,), cut=False) for x in batches]
    removed = on_cpu[0].each_filter()
    by_image = torch.rand(3, 8, len(removed), generator=torch.Generator().manual_seed(1)) < 0.5
    expected = [torch.cat([r.outputs(removed), r.outputs(by_image)]) for r in on_cpu]
    with pretend(kind) as device:
        model = model.to(device)
        for want, x in zip(expected, batches, strict=True):
            x = x.to(device)
            host_reads.clear()
            replay = SuffixReplay(model, model.get_submodule(layer), (x,))
            single = replay.outputs(removed)
            waits = len(host_reads)
            outputs = torch.cat([single, replay.outputs(by_image.to(device))])
            assert replay.way == way
            assert outputs.device.type == kind
            torch.testing.assert_close(outputs.cpu(), want, rtol=1e-4, atol=1e-6)
            replay.check_no_nan(removed, single)
    assert waits <= reads


def test_a_replay_is_gone_when_nobody_holds_it():
    """It holds large tensors: it must not wait for the garbage collector."""
    gc.disable()
    try:
        for model, name in ((pool_linear(), "1"), (deep(), "stage1"), (BatchDependent(), "conv")):
            replay = SuffixReplay(model.eval(), model.get_submodule(name), (images(),))
            replay.outputs(replay.each_filter())
            gone = weakref.ref(replay)
            del replay
            assert gone() is None
    finally:
        gc.enable()


def test_no_sets_give_no_outputs():
    model = deep()
    replay = SuffixReplay(model, model.stage1, (images(),))
    assert replay.outputs(torch.zeros(0, 4, dtype=torch.bool)).shape == (0, 8, 3)


@pytest.mark.parametrize("rows", [None, 3])
def test_a_layer_with_its_filters_last(rows):
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.mix, self.head = nn.Conv2d(2, 4, 3), nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.mix(self.conv(x).permute(0, 2, 3, 1)).relu().amax((1, 2)))

    model = Last().eval()
    replay = SuffixReplay(model, model.mix, (images(),))
    assert (replay.axis, replay.way) == (3, "replay")
    outputs = []
    for index in range(5):
        handle = model.mix.register_forward_hook(
            lambda m, i, o, k=index: o * (torch.arange(5) != k)
        )
        with torch.no_grad():
            outputs.append(model(images()))
        handle.remove()
    torch.testing.assert_close(replay.outputs(replay.each_filter(), rows), torch.stack(outputs))
