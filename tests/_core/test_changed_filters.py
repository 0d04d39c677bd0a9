"""Filters replaced one at a time: only their share of the next layer is computed, exactly."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from captum_classfilters import GreedyFilterPruning, LayerFilterAblation
from captum_classfilters._core.replay import changed_filters as changed
from captum_classfilters._core.replay.changed_filters import ChangedFilters, UnchangedSteps
from captum_classfilters._core.replay.repeated_batch import CannotReplayError
from captum_classfilters._core.replay.suffix_replay import SuffixReplay
from tests._core.test_suffix_replay import by_hand
from tests.models import images, known


class After(nn.Module):
    """A convolution of 4 filters, something after it, and a head that is not linear."""

    def __init__(self, *after: nn.Module, join: str = "none") -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.beside = nn.Conv2d(2, 4, 3, padding=1)
        self.after = nn.Sequential(*after)
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        beside = self.beside(x)
        y = self.conv(x)
        if self.join == "add":
            y = y + beside
        elif self.join == "add in place":
            beside += y
            y = beside.relu_()
        elif self.join == "cat":
            y = torch.cat([beside, y, beside], 1)
        elif self.join == "twice":  # one branch spread, one not
            y = F.conv2d(y, torch.ones(4, 4, 1, 1)).sin() + y
        elif self.join == "twice in place":
            other = F.conv2d(y, torch.ones(4, 4, 1, 1)).sin()
            other += y
            y = other
        return self.after(y).flatten(1)


def norm(number: int = 4) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(number)
    generator = torch.Generator().manual_seed(3)
    for tensor in (layer.weight.data, layer.bias.data, layer.running_mean, layer.running_var):
        known(tensor).copy_(torch.rand(number, generator=generator) + 0.5)
    return layer


CASES = {
    "convolution": lambda: After(nn.Conv2d(4, 5, 3, padding=1), nn.Sigmoid()),
    "stride and dilation": lambda: After(nn.Conv2d(4, 5, 3, 2, 2, 2), nn.Sigmoid()),
    "one by one, stride": lambda: After(nn.Conv2d(4, 5, 1, (1, 2), bias=False), nn.Sigmoid()),
    "one by one, padded": lambda: After(nn.Conv2d(4, 5, 1, padding=1), nn.Sigmoid()),
    "rectangular": lambda: After(nn.Conv2d(4, 5, (1, 3), padding=(0, 1)), nn.Sigmoid()),
    "normalized": lambda: After(norm(), nn.ReLU(inplace=True), nn.Conv2d(4, 5, 3), nn.Tanh()),
    "no affine": lambda: After(
        nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 5, 3, bias=False), nn.Tanh()
    ),
    "pooled": lambda: After(nn.MaxPool2d(2), nn.AvgPool2d(2), nn.Conv2d(4, 3, 1), nn.Tanh()),
    "depthwise": lambda: After(
        nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 3, 1), nn.Tanh()
    ),
    "grouped": lambda: After(nn.Conv2d(4, 6, 3, groups=2), nn.Tanh()),
    "multiplied": lambda: After(nn.Conv2d(4, 8, 3, groups=4), nn.Tanh()),
    "flattened": lambda: After(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 5), nn.Tanh()),
    "averaged": lambda: After(
        nn.AdaptiveAvgPool2d(1), nn.Dropout(), nn.Flatten(), nn.Linear(4, 5), nn.Tanh()
    ),
    "no bias": lambda: After(
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5, bias=False), nn.Tanh()
    ),
    "other operation": lambda: After(nn.Softmax(1), nn.Conv2d(4, 3, 3)),
    "transposed": lambda: After(nn.ConvTranspose2d(4, 3, 3), nn.Tanh()),
    "sum": lambda: After(nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Tanh(), join="add"),
    "sum in place": lambda: After(nn.Conv2d(4, 5, 3), nn.Tanh(), join="add in place"),
    "concatenated": lambda: After(norm(12), nn.Conv2d(12, 5, 3), nn.Tanh(), join="cat"),
    "twice": lambda: After(nn.Tanh(), join="twice"),
    "twice in place": lambda: After(nn.Tanh(), join="twice in place"),
}


@pytest.mark.parametrize("rows", [None, 1, 3])
@pytest.mark.parametrize("case", CASES)
def test_filters_one_at_a_time_equal_whole_model(case, rows):
    model = CASES[case]().eval()
    replay = SuffixReplay(model, model.conv, (images(),), closed_form=False)
    single = torch.cat([torch.eye(4), torch.zeros(1, 4)]).bool()
    beside = single | torch.tensor([False, True, False, False])  # greedy: one gone already
    for removed in (single, beside):
        expected = by_hand(model, model.conv, (images(),), removed)
        torch.testing.assert_close(
            replay.outputs(removed, rows), expected, rtol=1e-5, atol=1e-6, msg=case
        )
    assert replay.way == "replay"
    assert replay._one_by_one
    assert not torch.allclose(expected, replay.output)


@pytest.mark.parametrize(
    ("case", "rule"),
    [("convolution", "_convolution"), ("normalized", "_batch_norm"), ("pooled", "_pool"),
     ("flattened", "_linear"), ("concatenated", "_cat"), ("twice", "_added")],
)  # fmt: skip
def test_unchanged_part_is_computed_once(case, rule, monkeypatch):
    """The saving is real: rows are not written out before the linear step that adds them up."""
    model = CASES[case]().eval()
    replay = SuffixReplay(model, model.conv, (images(),), closed_form=False)
    written_out, followed = [], []
    spread, one = ChangedFilters.all_rows, getattr(changed, rule)

    def write_out(self):
        written_out.append(1)
        return spread(self)

    monkeypatch.setattr(ChangedFilters, "all_rows", write_out)

    def counted(*args):
        result = one(*args)
        followed.append(result is not NotImplemented)
        return result

    monkeypatch.setattr(changed, rule, counted)
    rules = {key: counted for key, value in changed._RULES.items() if value is one}
    monkeypatch.setattr(changed, "_RULES", {**changed._RULES, **rules})
    replay.outputs(torch.eye(4).bool(), 2)
    assert followed == [True, True] or followed == [True] * 4  # two replays
    assert not written_out


@pytest.mark.parametrize("rows", [1, 2])
def test_unchanged_part_is_computed_once_for_all_replays(rows, monkeypatch):
    """A replay of a single row must not take its filter for one that is gone from all rows."""
    model = CASES["convolution"]().eval()
    computed = []
    original = UnchangedSteps.next

    def counted(self, name, compute):
        def compute_and_note():
            computed.append(name)
            return compute()

        return original(self, name, compute_and_note)

    monkeypatch.setattr(UnchangedSteps, "next", counted)
    ablation = LayerFilterAblation(model, model.conv)
    ablation.attribute(images(), target=0, perturbations_per_eval=rows)
    assert computed.count("layer") == 1
    loader = [(images(), torch.zeros(len(images()), dtype=torch.long))]
    computed.clear()
    ablation.identify(
        loader, metric="accuracy", perturbations_per_eval=rows, num_classes=3, show_progress=False
    )
    assert computed.count("layer") == 1
    computed.clear()
    GreedyFilterPruning(model, "conv").run(
        loader, num_filters=2, perturbations_per_eval=rows, show_progress=False
    )
    assert computed.count("layer") == 1 + 1  # nothing gone yet, then one filter


def test_steps_are_recorded_once():
    steps, runs = UnchangedSteps(), []

    def run():
        runs.append(1)
        return len(runs)

    for _ in range(3):
        steps.restart()
        assert [steps.next(name, run) for name in "ab"] == [1, 2]
    assert len(runs) == 2
    with pytest.raises(CannotReplayError, match="b where a ran before"):
        steps.restart().next("b", lambda: None)


def changed_batch(which=(0, 2), positions=(6, 6)):
    """Two copies of three images of four filters, each with another value in one filter."""
    generator = torch.Generator().manual_seed(5)
    base = torch.randn(3, 4, *positions, generator=generator)
    values = torch.randn(len(which), 3, *positions, generator=generator)
    return ChangedFilters(base, torch.tensor(which), values, UnchangedSteps())


OPERATIONS = {
    "catenated with itself": lambda x: torch.cat([x, x], 1),
    "catenated with its activation": lambda x: torch.cat([x, x.relu()], 1),
    "catenated along the batch": lambda x: torch.cat([x, x], 0),
    "statistics of the batch": lambda x: F.batch_norm(x, None, None, training=True),
    "statistics of the batch, kept": lambda x: F.batch_norm(
        x, torch.zeros(4), torch.ones(4), training=True
    ),
    "sum with itself": lambda x: x + x.sigmoid(),
    "product with another shape": lambda x: x * x.amax((2, 3), keepdim=True),
    "pooled over filters": lambda x: F.max_pool3d(x[:, None], (2, 2, 2)),
    "mean over filters": lambda x: x.mean(1),
    "mean over positions": lambda x: x.mean((2, 3)) ** 2,
    "mean over everything": lambda x: x.mean((1, 2, 3)),
    "flattened otherwise": lambda x: x.reshape(len(x), 8, -1),
    "flattened and added": lambda x: x.flatten(1) + x.relu().flatten(1),
    "turned": lambda x: F.conv_transpose2d(x, torch.ones(4, 2, 3, 3)),
    "rolled": lambda x: x.roll(1, 1),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_any_operation_is_that_on_all_rows(name):
    """Also without the check of a replay, which would find a wrong rule for some filters only."""
    with torch.no_grad():
        got = OPERATIONS[name](changed_batch())
        got = got.all_rows() if isinstance(got, ChangedFilters) else got
        torch.testing.assert_close(got, OPERATIONS[name](changed_batch().all_rows()))


def test_pooling_of_filters_with_one_axis_of_positions():
    """To pooling over two axes such a batch is one image, whose filters it would pool."""
    with torch.no_grad():
        got = F.avg_pool2d(changed_batch(positions=(6,)), 2)
        torch.testing.assert_close(got, F.avg_pool2d(changed_batch(positions=(6,)).all_rows(), 2))


def test_batches_that_differ_in_other_filters_are_added_row_by_row():
    one, other = changed_batch((0, 2)), changed_batch((1, 3))
    with torch.no_grad():
        torch.testing.assert_close(one + other, one.all_rows() + other.all_rows())


def test_what_cannot_be_written_in_place_is_refused():
    with torch.no_grad():
        with pytest.raises(CannotReplayError, match="in-place operation on a view"):
            changed_batch().flatten(1).relu_()
        rows = torch.ones(6, 4, 6, 6)
        with pytest.raises(CannotReplayError, match="writes into a shared tensor"):
            changed_batch().add_(rows)
        assert bool((rows == 1).all())


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 4)] * 2, *[st.integers(3, 7)] * 2),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    data=st.data(),
)
def test_convolution_of_changed_batch(shape, kernel, stride, padding, dilation, data):
    number, filters, *size = shape
    if any(dilation * (k - 1) + 1 > s + 2 * padding for k, s in zip(kernel, size, strict=True)):
        return
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    which = torch.tensor(data.draw(st.lists(st.integers(0, filters - 1), min_size=1, max_size=4)))
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    values = torch.randn(len(which), number, *size, generator=generator, dtype=torch.float64)
    weight = torch.randn(3, filters, *kernel, generator=generator, dtype=torch.float64)
    batch = ChangedFilters(base, which, values, UnchangedSteps())
    expected = base.repeat(len(which), 1, 1, 1)
    for copy, filter_ in enumerate(which.tolist()):
        expected[copy * number : (copy + 1) * number, filter_] = values[copy]
    torch.testing.assert_close(batch.all_rows(), expected)
    with torch.no_grad():
        got = F.conv2d(batch, weight, None, stride, padding, dilation)
    assert not isinstance(got, ChangedFilters)
    torch.testing.assert_close(got, F.conv2d(expected, weight, None, stride, padding, dilation))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (torchvision.models.squeezenet1_1, "features.6.expand3x3"),
        (torchvision.models.densenet121, "features.denseblock3.denselayer7.conv2"),
        (torchvision.models.mobilenet_v2, "features.5"),
        (torchvision.models.resnet18, "layer3.0.conv1"),
        (torchvision.models.resnet18, "layer2.1.conv2"),
        (torchvision.models.efficientnet_b0, "features.4"),
        (torchvision.models.googlenet, "inception4a"),
        (torchvision.models.shufflenet_v2_x0_5, "stage3.1"),
        (torchvision.models.vgg11, "features.8"),
    ],
)
def test_torchvision(make, name):
    torch.manual_seed(0)
    weights = {"init_weights": False} if make is torchvision.models.googlenet else {}
    model = make(**weights).eval()
    x = torch.randn(2, 3, 64, 64)
    layer = model.get_submodule(name)
    with torch.no_grad():
        replay = SuffixReplay(model, layer, (x,), closed_form=False)
        removed = torch.eye(replay.num_filters).bool()[[0, 3, 5]]
        expected = by_hand(model, layer, (x,), removed)
    assert replay._one_by_one
    scale = float(expected.abs().max())
    torch.testing.assert_close(replay.outputs(removed), expected, rtol=1e-5, atol=1e-5 * scale)
