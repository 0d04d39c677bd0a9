"""Baseline scores by hand and by autograd, and accuracy curves against whole forward passes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from captum_classfilters import LayerFilterAblation
from captum_classfilters._core.filter_weights import reading_weights
from captum_classfilters.identify import activation_scores
from captum_classfilters.pruning import (
    GreedyFilterPruning,
    PruningOrder,
    accuracy_after_removal,
    filter_importance_baselines,
    removal_order,
)
from captum_classfilters.pruning.baseline_scores import (
    incoming_weight_scores,
    outgoing_weight_scores,
    random_scores,
)
from tests.models import QUIET, TwoInputs, batches, deep, hooks_of, images, joined, known
from tests.pretend_device import host_reads, pretend

pytest.importorskip("torch_pruning")


@pytest.fixture(scope="module")
def trained():
    """A model whose accuracy depends on its filters."""
    model = deep(seed=2)
    x, _ = joined(batches(60))
    with torch.no_grad():
        model.head.bias.sub_(model(x).mean(0))
        y = (model(x) + 0.02 * torch.randn(60, 3)).argmax(1)
    return model, [(x[i : i + 16], y[i : i + 16]) for i in range(0, 60, 16)]


def accuracy_without(model, layer, removed, x, y):
    def zero(_module, _inputs, output):
        output = output.clone()
        output[:, removed] = 0
        return output

    handle = model.get_submodule(layer).register_forward_hook(zero)
    with torch.no_grad():
        right = (model(x).argmax(1) == y).double().mean()
    handle.remove()
    return float(right)


@pytest.mark.parametrize("layer", ["stage1", "stage2"])
def test_curves_against_whole_forward_passes(trained, layer):
    model, data = trained
    x, y = joined(data)
    number = model.get_submodule(layer)[0].out_channels
    orders: dict[str, Any] = {
        "one": torch.randperm(number),
        "two": random_scores(number, 3).long(),
        "few": [2, 0],
    }
    curves = accuracy_after_removal(model, layer, orders, data, **QUIET)
    assert curves.accuracy["one"].shape == (1, number)
    assert curves.accuracy["two"].shape == (3, number)
    assert curves.accuracy["few"].shape == (1, 3)
    for name, rows in curves.orders.items():
        for order, found in zip(rows.tolist(), curves.accuracy[name].tolist(), strict=True):
            for removed, accuracy in enumerate(found):
                expected = accuracy_without(model, layer, order[:removed], x, y)
                assert accuracy == pytest.approx(expected, abs=1e-12)
    assert curves.num_images == 60
    assert curves.full_accuracy == accuracy_without(model, layer, [], x, y)
    assert hooks_of(model) == 0


def test_same_curve_as_greedy_pruning_and_car(trained):
    model, data = trained
    greedy = GreedyFilterPruning(model, "stage2").run(data, num_filters=1, **QUIET)
    curve = accuracy_after_removal(model, "stage2", greedy, data, **QUIET)
    assert curve.accuracy["order"][0].tolist() == pytest.approx(greedy.accuracy, abs=1e-12)
    car = LayerFilterAblation(model, "stage2").identify(data, metric="accuracy", **QUIET)
    singles = torch.arange(6)[:, None]  # six orders of one filter each
    curve = accuracy_after_removal(model, "stage2", singles, data, **QUIET)
    drops = curve.full_accuracy - curve.accuracy["order"][:, 1]
    assert torch.allclose(drops, car.reduction, atol=1e-12)


def test_curve_of_a_model_with_two_inputs():
    model, x = TwoInputs(), images()
    data = [((x, x.flip(0)), torch.arange(8) % 3)]
    curves = accuracy_after_removal(model, "conv", [3, 1], data, **QUIET)
    with torch.no_grad():
        right = float((model(x, x.flip(0)).argmax(1) == data[0][1]).double().mean())
    assert curves.full_accuracy == right


def test_reading_curves(trained):
    model, data = trained
    curves = accuracy_after_removal(
        model, "stage1", {"a": [0, 1, 2, 3], "random": random_scores(4, 2).long()}, data, **QUIET
    )
    assert curves.at(0.5, "a") == float(curves.accuracy["a"][0, 2])
    assert curves.at(0.5, "random") == float(curves.accuracy["random"][:, 2].mean())
    assert curves.table([0, 0.5]).splitlines()[1].split() == [
        "a",
        f"{curves.full_accuracy:.4f}",
        f"{curves.at(0.5, 'a'):.4f}",
    ]
    with pytest.raises(ValueError, match="Name one of the orders: a, random"):
        curves.at(0.5)
    with pytest.raises(ValueError, match="4 of 4 filters; the curve has 0 to 3"):
        curves.at(1.0, "a")


def test_orders():
    scores = torch.tensor([[3.0, 1, 1, 2], [0, 0, 0, -1]])
    assert removal_order(scores).tolist() == [[1, 2, 3, 0], [3, 0, 1, 2]]
    with pytest.raises(ValueError, match="NaN"):
        removal_order(torch.tensor([1.0, float("nan")]))


def test_weight_scores_by_hand():
    model = nn.Sequential(
        nn.Conv2d(1, 2, (1, 2)), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2, bias=False)
    ).eval()
    with torch.no_grad():
        model.get_parameter("0.weight").copy_(
            torch.tensor([[1.0, -3.0], [0.5, 0.5]]).reshape(2, 1, 1, 2)
        )
        # Two positions of each filter: columns 0, 1 and 2, 3.
        model.get_parameter("3.weight").copy_(torch.tensor([[1.0, -1, 4, 0], [2, 0, 0, -8]]))
    x = torch.rand(2, 1, 1, 3)
    for layer in ("0", "1"):
        assert incoming_weight_scores(model, layer, x).tolist() == [2, 0.5]
        assert outgoing_weight_scores(model, layer, x).tolist() == [1, 3]


def test_weight_scores_of_concatenated_and_of_reused_filters():
    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.left, self.right = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 2, 3, padding=1)
            self.both = nn.Identity()
            self.up = nn.ConvTranspose2d(5, 4, 2)
            self.side = nn.Conv2d(5, 2, 1)

        def forward(self, x):
            y = self.both(torch.cat([self.left(x), self.right(x)], 1))
            return self.up(y).mean((2, 3))[:, :2] + self.side(y).mean((2, 3))

    model, x = Fork(), images()
    incoming = [w.abs().mean((1, 2, 3)) for w in (model.left.weight, model.right.weight)]
    assert torch.allclose(incoming_weight_scores(model, "both", x), torch.cat(incoming).double())
    up = model.up.weight.abs().flatten(1)
    side = model.side.weight.abs()[:, :, 0, 0].T
    expected = torch.cat([up, side], 1).mean(1).double()
    assert torch.allclose(outgoing_weight_scores(model, "both", x), expected)
    assert torch.allclose(outgoing_weight_scores(model, "right", x), expected[3:])


def test_weight_scores_of_grouped_layers_by_hand():
    model = nn.Sequential(
        nn.ConvTranspose2d(2, 4, 1, groups=2, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)
    ).eval()
    with torch.no_grad():
        model.get_parameter("0.weight").copy_(torch.tensor([[1.0, -2], [3, 5]])[:, :, None, None])
    assert incoming_weight_scores(model, "1", torch.rand(2, 2, 2, 2)).tolist() == [1, 2, 3, 5]
    reader = nn.Conv1d(4, 6, 1, groups=2)
    rows = known(reading_weights(reader)).flatten(1)
    for index in range(4):
        group = index // 2
        own = reader.weight[3 * group : 3 * group + 3, index % 2].flatten()
        assert torch.equal(rows[index], own)


def test_activation_scores_against_autograd(trained):
    model, data = trained
    x, y = joined(data)
    first = model.stage1(x).detach().requires_grad_(True)
    logits = model.head(model.flatten(model.pool(model.stage2(first.clone()))))
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), first)
    found = activation_scores(model, "stage1", data, **QUIET)
    for values, expected in [
        (found.mean, first.abs().mean((0, 2, 3))),
        (found.maximum, first.amax((0, 2, 3))),
        (found.zero_share, (first == 0).double().mean((0, 2, 3))),
        (found.taylor, (first * gradient).abs().mean((0, 2, 3))),
    ]:
        assert torch.allclose(values, expected.double(), rtol=1e-4)
    assert found.num_images == 60
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_all_baselines_have_one_direction(trained):
    model, data = trained
    scores = filter_importance_baselines(model, "stage2", data, repetitions=4, **QUIET)
    activity = activation_scores(model, "stage2", data, **QUIET)
    assert torch.equal(scores["APoZ"], 1 - activity.zero_share)
    assert torch.equal(scores["Taylor"], activity.taylor)
    assert [tuple(one.shape) for one in scores.values()] == [(6,)] * 6 + [(4, 6)]
    orders = {name: removal_order(one) for name, one in scores.items()}
    curves = accuracy_after_removal(model, "stage2", orders, data, **QUIET)
    assert list(curves.accuracy) == list(scores)
    assert orders["APoZ"][0] == activity.zero_share.argmax()
    assert orders["Taylor"][0] == activity.taylor.argmin()


def test_random_scores_are_seeded():
    scores = random_scores(7)
    assert scores.shape == (10, 7)
    assert torch.equal(scores, random_scores(7))
    assert torch.equal(scores[:3], random_scores(7, 3))
    assert torch.equal(scores[2:5], random_scores(7, 3, seed=2))
    assert all(sorted(row) == list(range(7)) for row in scores.tolist())
    assert len({tuple(row) for row in scores.tolist()}) > 5
    assert random_scores(1, 2).tolist() == [[0], [0]]
    for number, repetitions in ((0, 1), (4, 0)):
        with pytest.raises(ValueError, match=f"repetitions={repetitions}"):
            random_scores(number, repetitions)


def test_bad_input(trained):
    model, data = trained
    cases: list[tuple[Any, str]] = [
        ([0, 0], "names a filter twice"),
        ([4], "filter 4; the layer has 4"),
        ([0.5], "float32"),
        ({}, "empty"),
        ({"mine": torch.zeros(2, 2, 2).long()}, r"'mine' .* \(2, 2, 2\)"),
        (PruningOrder({"stage2": 6}, [("stage2", 5)]), "filter 5; the layer has 4"),
    ]
    for order, message in cases:
        with pytest.raises(ValueError, match=message):
            accuracy_after_removal(model, "stage1", order, data, **QUIET)
    with pytest.raises(ValueError, match="loader is empty"):
        accuracy_after_removal(model, "stage1", [0], [], **QUIET)
    with pytest.raises(ValueError, match="loader is empty"):
        filter_importance_baselines(model, "stage1", [], **QUIET)
    with pytest.raises(ValueError, match="loader is empty"):
        activation_scores(model, "stage1", [], **QUIET)
    with pytest.raises(ValueError, match="read only once"):
        filter_importance_baselines(model, "stage1", iter(data), **QUIET)
    with pytest.raises(ValueError, match="3 classes"):
        activation_scores(model, "stage1", [(images(2), torch.tensor([0, 3]))], **QUIET)


def test_curves_on_an_accelerator_are_those_of_the_cpu(trained):
    model, data = trained
    orders: dict[str, Any] = {"a": [0, 2, 1], "b": torch.tensor([[3, 1], [1, 3]])}
    expected = accuracy_after_removal(model, "stage1", orders, data, **QUIET)
    own = []
    for there in (True, False):
        for times in (4, 8):
            with pretend("cuda") as device:
                moved = deep().to(device)
                moved.load_state_dict(model.state_dict())
                loader = [(x.to(device), y.to(device)) for x, y in data] if there else data
                host_reads.clear()
                got = accuracy_after_removal(moved, "stage1", orders, loader * times, **QUIET)
                own.append(len([read for read in host_reads if "/replay/" not in read]))
            for name, accuracy in expected.accuracy.items():
                assert torch.equal(got.accuracy[name], accuracy)
                assert got.accuracy[name].device.type == "cpu"
        assert own[-1] - own[-2] <= 2  # 16 batches more are looked at twice more


def test_curves_of_one_logit_say_their_way():
    model = nn.Sequential(nn.Identity(), nn.Linear(3, 1, bias=False))
    with torch.no_grad():
        model.get_parameter("1.weight").copy_(torch.tensor([[1.0, -2, 0.5]]))
    x, y = torch.tensor([[3.0, 1, 1], [1, 1, 0], [2, 0, 1], [0, 1, 1]]), torch.tensor([1, 0, 1, 1])
    curves = accuracy_after_removal(model, "0", [1, 0], [(x, y)], **QUIET)
    # z: 1.5, -1, 2.5, -1.5; then 3.5, 1, 2.5, 0.5; then 0.5, 0, 0.5, 0.5
    assert curves.accuracy["order"].tolist() == [[0.75, 0.75, 1.0]]
    assert curves.way in ("closed form", "replay")
    assert "0%" in str(curves)


def test_curves_refuse_outputs_that_are_not_finite():
    class Ratio(nn.Module):
        def __init__(self):
            super().__init__()
            self.filters = nn.Identity()

        def forward(self, x):
            means = self.filters(x).mean((2, 3))
            return means[:, :2] / means[:, 2:]

    data = [(1 + torch.rand(6, 3, 2, 2), torch.arange(6) % 2)]
    with pytest.raises(
        ValueError, match=r"NaN or Inf for image 0 of batch 0 .*filters 1, 2 removed"
    ):
        accuracy_after_removal(Ratio(), "filters", [1, 2], data, **QUIET)
    broken = [(torch.full((2, 3, 2, 2), torch.nan), torch.arange(2))]
    with pytest.raises(ValueError, match="NaN or Inf for image 0 of batch 0"):
        accuracy_after_removal(Ratio(), "filters", [1], broken, **QUIET)
