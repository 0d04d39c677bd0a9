"""Greedy pruning against the plain loop over whole forward passes, and its bounds."""

import copy
import errno
import functools
import json
import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from captum_classfilters import ClassFilters, ClassScores
from captum_classfilters.gates import masking_test
from captum_classfilters.pruning import (
    GreedyFilterPruning,
    LayerwiseFineTuning,
    PruningOrder,
    accuracy_after_removal,
    masked_filters,
)
from captum_classfilters.pruning import greedy_filter_pruning as module
from tests.models import batches, deep, hooks_of, joined, known
from tests.pretend_device import host_reads, pretend


@pytest.fixture(scope="module")
def trained():
    """A model whose accuracy depends on its filters, with labels it mostly gets right."""
    model = deep(seed=2)
    x, _ = joined(batches(60))
    with torch.no_grad():
        logits = model(x)
        model.head.bias.sub_(logits.mean(0))
        y = (model(x) + 0.02 * torch.randn(60, 3)).argmax(1)
    data = [(x[i : i + 16], y[i : i + 16]) for i in range(0, 60, 16)]
    return model, data


def plain_loop(model, layer, x, y, steps):
    """Removal order by one whole forward pass for each candidate."""
    gone: list[int] = []
    order, curve = [], []
    for _ in range(steps):
        scores = []
        for candidate in range(layer[0].out_channels):
            if candidate in gone:
                continue

            def zero(_module, _inputs, output, removed=(*gone, candidate)):
                output = output.clone()
                output[:, list(removed)] = 0
                return output

            handle = layer.register_forward_hook(zero)
            with torch.no_grad():
                outputs = model(x)
            handle.remove()
            accuracy = float((outputs.argmax(1) == y).double().mean())
            loss = float(torch.nn.functional.cross_entropy(outputs.double(), y))
            scores.append((-accuracy, loss, candidate))
        accuracy, _, best = min(scores)
        gone.append(best)
        order.append(best)
        curve.append(-accuracy)
    return order, curve


@pytest.mark.parametrize(("name", "steps"), [("stage1", 3), ("stage2", 5)])
def test_same_order_as_the_plain_loop(trained, name, steps):
    model, data = trained
    layer, (x, y) = model.get_submodule(name), joined(data)
    result = GreedyFilterPruning(model, name).run(data, num_filters=1, show_progress=False)
    order, curve = plain_loop(model, layer, x, y, steps)
    assert result.order == order
    assert result.accuracy[1:] == pytest.approx(curve, abs=1e-12)
    with torch.no_grad():
        assert result.accuracy[0] == float((model(x).argmax(1) == y).double().mean())
    assert hooks_of(model) == 0


def test_bounds(trained):
    model, data = trained
    pruning = GreedyFilterPruning(model, "stage2")
    full = pruning.run(data, num_filters=1, show_progress=False)
    half = pruning.run(data, ratio=2, show_progress=False)
    assert half.order == full.order[:3]
    assert half.kept().sum() == 3
    assert torch.equal(full.kept(3), half.kept())
    floor = min(full.accuracy) + 1e-9
    bounded = pruning.run(data, min_accuracy=floor, show_progress=False)
    stop = next(i for i, accuracy in enumerate(full.accuracy) if accuracy < floor)
    assert bounded.order == full.order[: stop - 1]
    assert min(bounded.accuracy) >= floor


def test_report_images_do_not_choose(trained):
    model, data = trained
    result = GreedyFilterPruning(model, "stage1").run(
        data[:2], data[2:], num_filters=2, show_progress=False
    )
    alone = GreedyFilterPruning(model, "stage1").run(data[:2], num_filters=2, show_progress=False)
    assert result.order == alone.order
    assert result.accuracy == alone.accuracy
    assert alone.report_accuracy == []
    x, y = joined(data[2:])
    with torch.no_grad():
        maps = model.stage1(x) * result.kept().reshape(1, -1, 1, 1)
        logits = model.head(model.flatten(model.pool(model.stage2(maps))))
        expected = float((logits.argmax(1) == y).double().mean())
    assert result.report_accuracy[-1] == expected
    assert len(result.report_accuracy) == 3


def test_a_killed_run_continues(trained, tmp_path, monkeypatch):
    model, data = trained
    path = tmp_path / "state.safetensors"
    pruning = GreedyFilterPruning(model, "stage2")
    full = pruning.run(data, num_filters=1, show_progress=False)

    class KilledError(Exception):
        pass

    original = module._Step.__call__
    done: list[int] = []

    def killed_after(steps):
        done.clear()

        def step(self, *args):
            if len(done) == steps:
                raise KilledError
            done.append(1)
            return original(self, *args)

        monkeypatch.setattr(module._Step, "__call__", step)

    killed_after(2)
    with pytest.raises(KilledError):
        pruning.run(data, num_filters=1, state_path=path, show_progress=False)
    assert PruningOrder.load(path).order == full.order[:2]
    killed_after(3)  # what is left, and no step twice
    assert pruning.run(data, num_filters=1, state_path=path, show_progress=False) == full
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="another run"):
        GreedyFilterPruning(model, "stage1").run(
            data, num_filters=1, state_path=path, show_progress=False
        )


def test_bad_input(trained):
    model, data = trained
    pruning = GreedyFilterPruning(model, "stage1")
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "at least one"),
        ({"num_filters": 0}, "cannot lose every filter"),
        ({"num_filters": 5}, "expected 1 to 4"),
        ({"ratio": 0.5}, "ratio=0.5"),
        ({"min_accuracy": 1.5}, "above the accuracy at the start"),
    ]
    for bounds, message in cases:
        with pytest.raises(ValueError, match=message):
            pruning.run(data, show_progress=False, **bounds)
    with pytest.raises(ValueError, match="dataloader is empty"):
        pruning.run([], num_filters=2, show_progress=False)
    with pytest.raises(ValueError, match="report_dataloader is empty"):
        pruning.run(data, [], num_filters=2, show_progress=False)
    x, y = joined(data)
    broken = [(x[:4], y[:4]), (torch.full_like(x[:4], torch.nan), y[:4])]
    with pytest.raises(ValueError, match="NaN or Inf for image 0 of batch 1"):
        pruning.run(broken, num_filters=2, show_progress=False)
    with pytest.raises(ValueError, match="different classes"):
        pruning.run(data, [(x[y < 1], y[y < 1])], num_filters=2, show_progress=False)
    with pytest.raises(ValueError, match="num_filters=0"):
        pruning.run(data, num_filters=2, show_progress=False).kept(0)


def masked_outputs(model, x, masks):
    """Logits with filters zeroed by hooks."""
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _m, _i, output, mask=mask: output * mask.reshape(1, -1, 1, 1)
        )
        for name, mask in masks.items()
    ]
    with torch.no_grad():
        outputs = model(x)
    for handle in handles:
        handle.remove()
    return outputs


def plain_loop_over_layers(model, names, x, y, steps):
    """Removals by one whole forward pass for each remaining filter of each layer."""
    masks = {n: torch.ones(model.get_submodule(n)[0].out_channels) for n in names}
    removed = []
    for _ in range(steps):
        scores = []
        for place, name in enumerate(names):
            for candidate in masks[name].nonzero()[:, 0].tolist():
                if masks[name].sum() == 1:
                    continue
                mask = masks[name].clone()
                mask[candidate] = 0
                outputs = masked_outputs(model, x, {**masks, name: mask}).double()
                accuracy = float((outputs.argmax(1) == y).double().mean())
                loss = float(torch.nn.functional.cross_entropy(outputs, y))
                scores.append((-accuracy, loss, place, candidate))
        _, _, place, candidate = min(scores)
        masks[names[place]][candidate] = 0
        removed.append((names[place], candidate))
    return removed, masks


def test_no_layer_loses_its_last_filter(trained):
    """Though it may be the cheapest of all."""
    model, data = trained
    model = copy.deepcopy(model)
    model.stage1[0].weight.data.zero_()
    model.stage1[0].bias.data.zero_()
    order = GreedyFilterPruning(model, ["stage1", "stage2"]).run(
        data, num_filters=2, schedule="all_layers", show_progress=False
    )
    assert [int(order.kept(layer=layer).sum()) for layer in ("stage1", "stage2")] == [1, 1]


def test_training_that_breaks_the_bound_is_undone(trained):
    """The next layer is pruned on the network as it was before."""
    model, data = trained
    runs = []

    def ruin_once(network):
        runs.append(1)
        if len(runs) == 1:
            network.head.weight.data.zero_()

    order = GreedyFilterPruning(model, ["stage1", "stage2"]).run(
        data, num_filters=3, min_accuracy=0.5, fine_tune=ruin_once, show_progress=False
    )
    assert order.removed
    assert {layer for layer, _ in order.removed} == {"stage2"}
    assert bool(known(order.weights)["head.weight"].any())


def test_all_layers_compete(trained):
    model, data = trained
    names = ["stage1", "stage2"]
    result = GreedyFilterPruning(model, names).run(
        data, data[:3], num_filters=3, schedule="all_layers", show_progress=False
    )
    x, y = joined(data)
    removed, masks = plain_loop_over_layers(model, names, x, y, 7)
    assert result.removed == removed
    assert {name for name, _ in removed} == set(names)
    assert all(torch.equal(result.masks()[name], masks[name].bool()) for name in names)
    right = masked_outputs(model, x, masks).argmax(1) == y
    assert result.accuracy[-1] == float(right.double().mean())
    shown = joined(data[:3])
    right = masked_outputs(model, shown[0], masks).argmax(1) == shown[1]
    assert result.report_accuracy[-1] == float(right.double().mean())
    assert all(int(mask.sum()) >= 1 for mask in result.masks().values())
    with pytest.raises(ValueError, match="Filters of 2 layers were removed"):
        result.order  # noqa: B018
    with pytest.raises(ValueError, match="No filter of 'head'"):
        result.kept(layer="head")


def test_layer_by_layer_keeps_what_was_removed_before(trained):
    model, data = trained
    result = GreedyFilterPruning(model, ["stage1", "stage2"]).run(
        data, num_filters={"stage1": 2, "stage2": 4}, show_progress=False
    )
    x, y = joined(data)
    first, masks = plain_loop_over_layers(model, ["stage1"], x, y, 2)
    assert result.removed[:2] == first
    # The second layer is judged on the network that lacks the first one's filters.
    scores = []
    for candidate in range(6):
        mask = torch.ones(6)
        mask[candidate] = 0
        outputs = masked_outputs(model, x, {**masks, "stage2": mask}).double()
        accuracy = float((outputs.argmax(1) == y).double().mean())
        loss = float(torch.nn.functional.cross_entropy(outputs, y))
        scores.append((-accuracy, loss, candidate))
    assert result.removed[2] == ("stage2", min(scores)[2])
    assert result.accuracy[3] == -min(scores)[0]
    assert [name for name, _ in result.removed] == ["stage1"] * 2 + ["stage2"] * 2


def test_equal_filters_go_by_their_norm():
    """Two dead filters: neither accuracy nor loss tells them apart, their weights do."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 3, 1),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(3, 2),
    ).eval()
    model.get_parameter("4.weight").data[:, :2] = 0
    model[0].weight.data = torch.tensor([3.0, -1.0, 1.0]).reshape(3, 1, 1, 1)
    x = torch.rand(8, 1, 4, 4)
    model[4].bias.data -= model(x).mean(0).detach()
    data = [(x, model(x).argmax(1))]
    order = GreedyFilterPruning(model, "0").run(data, num_filters=1, show_progress=False).order
    assert order == [1, 0]
    model[0].weight.data[:2] *= torch.tensor([0.1, 1.0]).reshape(2, 1, 1, 1)
    order = GreedyFilterPruning(model, "0").run(data, num_filters=1, show_progress=False).order
    assert order == [0, 1]
    # An activation has no weights: the lower index goes first.
    assert GreedyFilterPruning(model, "1").run(data, num_filters=1, show_progress=False).order == [
        0,
        1,
    ]


def test_fine_tuning_between_steps(trained, tmp_path):
    model, data = trained
    before = {name: one.clone() for name, one in model.state_dict().items()}
    calls = []
    tuning = LayerwiseFineTuning(data, {"stage2": 0.05, "head": 0.2}, num_steps=80)

    def tune(network):
        calls.append(network)
        x, _ = joined(data)
        assert torch.count_nonzero(network.stage1(x).sum((0, 2, 3)) == 0) == len(calls)
        tuning(network)

    run: dict[str, Any] = {"num_filters": 1, "fine_tune": tune, "show_progress": False}
    pruning = GreedyFilterPruning(model, "stage1")
    result = pruning.run(data, data, **run)
    assert len(calls) == 3
    assert all(network is not model for network in calls)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert result.accuracy == result.report_accuracy
    # What is recorded is the accuracy of the tuned, masked network.
    tuned = copy.deepcopy(model)
    tuned.load_state_dict(result.weights)
    x, y = joined(data)
    with masked_filters(tuned, result.masks()), torch.no_grad():
        accuracy = float((tuned(x).argmax(1) == y).double().mean())
    assert accuracy == result.accuracy[-1]
    plain = pruning.run(data, num_filters=1, show_progress=False)
    assert result.accuracy[-1] > plain.accuracy[-1]
    assert plain.weights is None
    # Layers without a learning rate stay as they are, and so do running statistics.
    for name in ("stage1.0.weight", "stage2.1.running_mean"):
        assert torch.equal(known(result.weights)[name], before[name])
    assert not torch.equal(known(result.weights)["head.weight"], before["head.weight"])


def test_a_killed_run_with_fine_tuning_continues_exactly(trained, tmp_path):
    model, data = trained
    x, y = joined(data)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, y), batch_size=16, shuffle=True
    )
    tune = LayerwiseFineTuning(loader, 0.05, num_steps=5)
    path = tmp_path / "state.safetensors"
    options: dict[str, Any] = {"fine_tune": tune, "fine_tune_every": 2, "show_progress": False}
    pruning = GreedyFilterPruning(model, "stage2")
    full = pruning.run(data, num_filters=1, **options)
    pruning.run(data, num_filters=3, state_path=path, **options)
    torch.manual_seed(1234)  # another process has another random state
    rest = pruning.run(data, num_filters=1, state_path=path, **options)
    assert rest == full
    weights = known(full.weights)
    assert all(torch.equal(one, weights[name]) for name, one in known(rest.weights).items())


def test_accuracy_floor_after_fine_tuning(trained):
    """A removal whose fine-tuning fails the floor is taken back, weights and all."""
    model, data = trained

    def spoil(network):
        network.head.weight.data.zero_()
        network.head.bias.data = torch.tensor([1.0, 0.0, 0.0])  # all images are of class 0

    result = GreedyFilterPruning(model, "stage1").run(
        data, min_accuracy=0.45, fine_tune=spoil, fine_tune_every=2, show_progress=False
    )
    assert len(result.removed) == 1
    assert result.weights is None
    # The next layer starts from the weights before the failure.
    both = GreedyFilterPruning(model, ["stage1", "stage2"]).run(
        data, min_accuracy=0.45, fine_tune=spoil, fine_tune_every=2, show_progress=False
    )
    one = GreedyFilterPruning(model, ["stage1", "stage2"]).run(
        data, num_filters={"stage1": 3, "stage2": 5}, show_progress=False
    )
    assert both.accuracy[:2] == one.accuracy[:2]
    assert len(both.removed) == 1 or both.removed == one.removed


def test_sequential_testing_saves_and_chooses_alike():
    """Half of the filters matter much; they are soon out of the question."""
    torch.manual_seed(0)
    number, classes = 8, 4
    model = torch.nn.Sequential(torch.nn.Conv2d(number, number, 1, bias=False))
    model.append(torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()))
    model.append(torch.nn.Linear(number, classes, bias=False))
    model[0].weight.data = torch.eye(number)[:, :, None, None]
    model[2].weight.data = torch.cat([torch.eye(classes), torch.zeros(classes, 4)], 1)
    y = torch.arange(400) % classes
    x = 0.3 * torch.rand(400, number, 2, 2)
    x[torch.arange(400), y] += 1
    data = [(x[i : i + 20], y[i : i + 20]) for i in range(0, 400, 20)]
    pruning = GreedyFilterPruning(model, "0")
    full = pruning.run(data, num_filters=4, show_progress=False)
    early = pruning.run(data, num_filters=4, error_probability=0.05, show_progress=False)
    assert sorted(full.order) == [4, 5, 6, 7]
    assert early.order == full.order
    assert early.accuracy == full.accuracy
    assert full.saving == 0
    assert full.evaluations[0] == 8 * 400
    # A candidate that a class depends on loses 5 images of 20: the sign test drops it when
    # 0.5 ** lost < 0.05 / (7 * 19), which takes 12 images, so 3 batches.
    assert early.evaluations[0] == 4 * 400 + 4 * 60
    assert early.saving == pytest.approx(1 - sum(early.evaluations) / sum(full.evaluations))


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch):
    """Ten images are enough for candidates to be compared."""
    monkeypatch.setattr(module, "_SMALLEST_PART", 10)


def unraced(monkeypatch: pytest.MonkeyPatch, pruning: GreedyFilterPruning, data, **options):
    """The same run with every candidate on every image."""
    with monkeypatch.context() as patch:
        patch.setattr(module, "_SMALLEST_PART", 10**9)
        return pruning.run(data, show_progress=False, **options)


@pytest.mark.parametrize("probabilities", [False, True])
def test_candidates_that_cannot_be_best_run_no_further(
    trained, small_parts, monkeypatch, probabilities
):
    model, data = copy.deepcopy(trained[0]), trained[1]
    if probabilities:
        model.head = torch.nn.Sequential(model.head, torch.nn.Softmax(1))
    pruning = GreedyFilterPruning(model, "stage1")
    full = unraced(monkeypatch, pruning, data, num_filters=1)
    raced = pruning.run(data, num_filters=1, show_progress=False)
    assert full.saving == 0 < raced.saving
    assert raced.removed == full.removed
    assert raced.accuracy == full.accuracy
    assert raced.possible_evaluations == full.possible_evaluations
    # Who is run on must not depend on how many run at once.
    one = pruning.run(data, num_filters=1, perturbations_per_eval=1, show_progress=False)
    assert (one.removed, one.evaluations) == (raced.removed, raced.evaluations)


def test_the_race_breaks_ties_as_the_whole_run_does(small_parts, monkeypatch):
    """Many filters cost no image, and some of them nothing at all."""
    savings = []
    for seed in range(6):
        torch.manual_seed(seed)
        first, second = torch.nn.Conv2d(2, 12, 1), torch.nn.Conv2d(12, 4, 3, padding=1)
        head = torch.nn.Linear(4, 3)
        model = torch.nn.Sequential(first, torch.nn.ReLU(), second, torch.nn.ReLU())
        model += torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), head)
        x = torch.randn(90, 2, 4, 4)
        with torch.no_grad():
            second.weight[:, 5:9] = 0
            head.bias.sub_(model(x).mean(0))
            y = model(x).argmax(1)
        y[::5] = 0
        data = [(x[i : i + 15], y[i : i + 15]) for i in range(0, 90, 15)]
        pruning = GreedyFilterPruning(model, "1")
        full = unraced(monkeypatch, pruning, data, num_filters=2)
        raced = pruning.run(data, num_filters=2, show_progress=False)
        assert raced.removed == full.removed
        assert raced.accuracy == full.accuracy
        savings.append(raced.saving)
    assert max(savings) > 0


def test_equal_candidates_are_not_dropped(trained):
    """Where nothing can be told apart, everything is run."""
    model, data = trained
    generator = torch.Generator().manual_seed(0)
    noise = [(x, torch.randint(3, (len(y),), generator=generator)) for x, y in data]
    for seed in range(5):
        order = torch.randperm(len(noise), generator=torch.Generator().manual_seed(seed))
        result = GreedyFilterPruning(model, "stage2").run(
            [noise[i] for i in order], num_filters=5, error_probability=1e-6, show_progress=False
        )
        assert result.saving == 0


def test_masked_filters_restores_the_model(trained):
    model, data = trained
    mask = torch.tensor([True, False, True, False])
    with masked_filters(model, {"stage1": mask}), torch.no_grad():
        assert torch.equal(model(data[0][0]), masked_outputs(model, data[0][0], {"stage1": mask}))
    assert "forward" not in vars(model.stage1)
    x = data[0][0]
    with pytest.raises(ValueError, match=r"shape \(3,\), but the layer has 4"):  # noqa: SIM117
        with masked_filters(model, {"stage1": mask[:3]}):
            model(x)
    assert "forward" not in vars(model.stage1)
    with masked_filters(model, {model.stage1: mask}), torch.no_grad():  # the layer itself
        assert torch.equal(model(x), masked_outputs(model, x, {"stage1": mask}))
    for wrong in (mask.float(), [True, False, True, False], mask[None], torch.tensor([0, 2])):
        with pytest.raises(ValueError, match=r"'stage1' is .* expected a bool Tensor"):  # noqa: SIM117
            with masked_filters(model, {"stage1": wrong}):  # type: ignore[arg-type]
                pass
    assert "forward" not in vars(model.stage1)


def test_files_of_runs(trained, tmp_path):
    model, data = trained
    path = tmp_path / "order.safetensors"
    result = GreedyFilterPruning(model, "stage1").run(data, num_filters=2, show_progress=False)
    result.save(path)
    assert PruningOrder.load(path) == result
    assert PruningOrder.load(path).weights is None
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="does not hold a PruningOrder record"):
        PruningOrder.load(path)


def test_bad_options(trained):
    model, data = trained
    both = GreedyFilterPruning(model, ["stage1", "stage2"])
    cases: list[tuple[dict[str, Any], str]] = [
        ({"num_filters": 2, "schedule": "all_at_once"}, "schedule='all_at_once'"),
        ({"num_filters": 1, "schedule": "all_layers"}, "expected 2 to 10"),
        ({"num_filters": {"stage1": 1}, "schedule": "all_layers"}, "one number"),
        ({"num_filters": {"stage3": 1}}, "names \\['stage3'\\]"),
        ({"num_filters": 2, "error_probability": 1.0}, "between 0 and 1"),
        ({"num_filters": 2, "fine_tune_every": 0}, "fine_tune_every=0"),
        ({"ratio": 7, "schedule": "all_layers"}, "expected 1 to 5"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            both.run(data, show_progress=False, **options)
    with pytest.raises(ValueError, match="needs the model itself"):
        GreedyFilterPruning(lambda x: model(x), model.stage1).run(
            data, num_filters=2, fine_tune=print, show_progress=False
        )
    with pytest.raises(ValueError, match="list of layers is empty"):
        GreedyFilterPruning(model, [])
    for tuning, message in [
        (LayerwiseFineTuning([], 0.1), "loader to fine-tune on is empty"),
        (LayerwiseFineTuning(data, {"pool": 0.1}), "no parameters"),
        (LayerwiseFineTuning(data, 1e30, num_steps=3), "NaN or Inf"),
    ]:
        with pytest.raises(ValueError, match=message):
            tuning(copy.deepcopy(model))


# -- resuming -------------------------------------------------------------------------------------


def test_a_run_continues_with_the_same_options_alone(trained, tmp_path):
    model, data = trained
    path = tmp_path / "state.safetensors"
    both = GreedyFilterPruning(model, ["stage1", "stage2"])
    options: dict[str, Any] = {"num_filters": 3, "error_probability": 0.01, "show_progress": False}
    both.run(data, data, state_path=path, **options)
    x, y = joined(data)
    flipped = [(x.flip(3), y)]  # other images of the same labels
    others: list[tuple[dict[str, Any], str]] = [
        ({"seed": 1}, r"seed \(0 there, 1 here\)"),
        ({"error_probability": 0.02}, r"error_probability \(0.01 there, 0.02 here\)"),
        ({"fine_tune_every": 2}, "fine_tune_every"),
        ({"schedule": "all_layers"}, "schedule"),
        ({"fine_tune": LayerwiseFineTuning(data, 0.1)}, "LayerwiseFineTuning"),
        ({"num_filters": 2}, r"num_filters \(3 there, 2 here\)"),
        ({"min_accuracy": 0.1}, "min_accuracy"),
    ]
    for changed, message in others:
        with pytest.raises(ValueError, match=f"another run.*{message}"):
            both.run(data, data, state_path=path, **{**options, **changed})
    with pytest.raises(ValueError, match="images to report on"):
        both.run(data, state_path=path, **options)
    with pytest.raises(ValueError, match=r"another run.*(images|accuracy at the start)"):
        both.run(flipped, flipped, state_path=path, **options)
    with pytest.raises(ValueError, match="num_images"):
        both.run([*data, *data], data, state_path=path, **options)
    again = both.run(data, data, state_path=path, **options)
    assert again == PruningOrder.load(path)
    tuned = tmp_path / "tuned.safetensors"
    options = {"num_filters": 3, "state_path": tuned, "show_progress": False}
    GreedyFilterPruning(model, "stage1").run(
        data, fine_tune=LayerwiseFineTuning(data, 0.1, num_steps=2), **options
    )
    with pytest.raises(ValueError, match="'num_steps': 3"):
        GreedyFilterPruning(model, "stage1").run(
            data, fine_tune=LayerwiseFineTuning(data, 0.1, num_steps=3), **options
        )


def test_bounds_of_one_layer_may_go_further_but_not_back(trained, tmp_path):
    model, data = trained
    path = tmp_path / "state.safetensors"
    pruning = GreedyFilterPruning(model, "stage2")
    pruning.run(data, num_filters=3, state_path=path, show_progress=False)
    with pytest.raises(ValueError, match="gone beyond these bounds: 3 filters are left"):
        pruning.run(data, num_filters=4, state_path=path, show_progress=False)
    state = PruningOrder.load(path)
    state.accuracy[2] = 0.25
    state.save(tmp_path / "low.safetensors")
    options: dict[str, Any] = {"num_filters": 1, "state_path": tmp_path / "low.safetensors"}
    with pytest.raises(ValueError, match=r"at an accuracy of 0\.2500 or more"):
        pruning.run(data, min_accuracy=0.3, show_progress=False, **options)
    rest = pruning.run(data, num_filters=1, state_path=path, show_progress=False)
    assert rest == pruning.run(data, num_filters=1, show_progress=False)


def test_a_run_continues_with_the_same_images_alone(trained, tmp_path):
    """In whatever order and batches; the loss cannot tell images that differ by little."""
    model, data = trained
    path = tmp_path / "state.safetensors"
    options: dict[str, Any] = {"state_path": path, "show_progress": False}
    pruning = GreedyFilterPruning(model, "stage1")
    expected = pruning.run(data, num_filters=1, show_progress=False)
    pruning.run(data, data, num_filters=3, **options)
    x, y = joined(data)
    nearly = x.clone()
    nearly[7, 0, 2, 2] += 1e-5
    whole = [(x, y)]
    with pytest.raises(ValueError, match=r"another run.*fingerprint of the images \("):
        pruning.run([(nearly, y)], whole, num_filters=2, **options)
    with pytest.raises(ValueError, match=r"another run.*fingerprint of the images to report on"):
        pruning.run(whole, [(nearly, y)], num_filters=2, **options)
    order = torch.randperm(len(x))
    again = pruning.run([(x[order], y[order])], whole, num_filters=1, **options)
    assert again.removed == expected.removed


@pytest.mark.parametrize("damage", ["cut", "bit", "text", "folder", "pipe", "no folder"])
def test_states_that_cannot_be_used_are_refused_before_the_images_are_read(
    trained, tmp_path, damage
):
    model, data = trained
    path, read = tmp_path / "state.safetensors", []

    def counted():
        for batch in data:
            read.append(1)
            yield batch

    pruning = GreedyFilterPruning(model, "stage1")
    options: dict[str, Any] = {"num_filters": 2, "show_progress": False}
    pruning.run(data, state_path=path, **options)
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[:-20])
    elif damage == "bit":
        path.write_bytes(content.replace(b'num_images\\": 60', b'num_images\\": 61'))
    elif damage == "text":
        path.write_text("a text")
    elif damage in ("folder", "pipe"):
        path.unlink()
        (os.mkdir if damage == "folder" else os.mkfifo)(path)
    if damage == "no folder":
        path = tmp_path / "none" / "state.safetensors"
    message = "There is no folder" if damage == "no folder" else f"{path} is "
    with pytest.raises(ValueError, match=message) as raised:
        pruning.run(counted(), state_path=path, **options)
    if damage in ("cut", "bit", "text"):
        assert "Remove the file to begin anew" in str(raised.value)
        path.unlink()
        pruning.run(data, state_path=path, **options)
    with pytest.raises(ValueError, match=r"another run.*seed \(0 there, 1 here\)"):
        pruning.run(counted(), state_path=_written(pruning, data, tmp_path), seed=1, **options)
    assert not read


def _written(pruning, data, folder):
    path = folder / "another.safetensors"
    pruning.run(data, state_path=path, num_filters=3, show_progress=False)
    return path


def test_a_full_disk_costs_the_state_and_not_the_run(trained, tmp_path, monkeypatch):
    model, data = trained
    path = tmp_path / "state.safetensors"
    pruning = GreedyFilterPruning(model, "stage1")
    expected = pruning.run(data, num_filters=1, show_progress=False)
    replaced = os.replace

    def full(*paths):
        calls.append(1)
        if len(calls) in (1, 2):
            raise OSError(errno.ENOSPC, "No space left on device")
        replaced(*paths)

    calls: list[int] = []
    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(UserWarning, match=r"state .* was not written: .*disk of .* is full") as told:
        found = pruning.run(data, num_filters=1, state_path=path, show_progress=False)
    assert found == expected
    assert len(told) == 2
    assert PruningOrder.load(path) == expected  # the third was written
    assert os.listdir(tmp_path) == [path.name]


def test_functions_that_fine_tune_are_told_apart(tmp_path):
    def tune(model, rate=0.1):
        """Nothing."""

    def with_rate(rate):
        return lambda model: rate

    class Tune:
        def __init__(self, **options):
            self.options = options

        def __call__(self, model):
            """Nothing."""

    described = [
        module._described(function)
        for function in (
            tune,
            functools.partial(tune, rate=0.2),
            functools.partial(tune, rate=0.3),
            with_rate(0.1),
            with_rate(0.2),
            Tune(rate=1, on=torch.device("cpu")),
            Tune(rate=2, on=torch.device("cpu")),
            Tune(rate=np.float32(2), on=torch.device("cpu"), layers=(1, np.int64(2))),
            Tune().__call__,
        )
    ]
    texts = [json.dumps(one) for one in described]  # which a file can hold
    assert len(set(texts)) == len(texts)
    assert not any("0x" in text for text in texts)
    assert texts[3] == json.dumps(module._described(with_rate(0.1)))


def test_numbers_of_any_library_are_kept(trained, tmp_path):
    model, data = trained
    path = tmp_path / "state.safetensors"
    pruning = GreedyFilterPruning(model, "stage1")
    options: dict[str, Any] = {"state_path": path, "show_progress": False, "seed": np.int64(0)}
    pruning.run(data, num_filters={"stage1": np.int64(3)}, ratio=np.float32(1.25), **options)
    found = pruning.run(data, num_filters={"stage1": 2}, ratio=1.25, **{**options, "seed": 0})
    assert found.order[:1] == PruningOrder.load(path).order[:1]


# -- batches, devices, models ---------------------------------------------------------------------


def test_pruning_on_an_accelerator_is_pruning_on_the_cpu(trained):
    model, data = trained
    names = ["stage1", "stage2"]
    runs: list[tuple[Any, dict[str, Any]]] = [
        ("stage2", {"num_filters": 2}),
        (names, {"num_filters": 3, "schedule": "all_layers"}),
        ("stage2", {"num_filters": 4, "error_probability": 0.1}),
    ]
    for layer, options in runs:
        expected = GreedyFilterPruning(model, layer).run(data, data, show_progress=False, **options)
        for there in (True, False):
            with pretend("cuda") as device:
                moved = copy.deepcopy(model).to(device)
                batches_ = [(x.to(device), y.to(device)) for x, y in data] if there else data
                got = GreedyFilterPruning(moved, layer).run(
                    batches_, data, show_progress=False, **options
                )
            assert got.removed == expected.removed
            assert got.accuracy == expected.accuracy
            assert got.report_accuracy == expected.report_accuracy
            assert got.evaluations == expected.evaluations


def test_fine_tuning_on_an_accelerator(trained, tmp_path):
    model, data = trained
    tune = LayerwiseFineTuning(data, {"stage2": 0.05}, num_steps=3)
    expected = GreedyFilterPruning(model, "stage1").run(
        data, num_filters=2, fine_tune=tune, show_progress=False
    )
    with pretend("meta") as device:
        moved = copy.deepcopy(model).to(device)
        got = GreedyFilterPruning(moved, "stage1").run(
            data, num_filters=2, fine_tune=tune, show_progress=False
        )
        weights = {name: value.cpu() for name, value in known(got.weights).items()}
    assert got.removed == expected.removed
    for name, value in known(expected.weights).items():
        assert torch.allclose(weights[name].float(), value.float(), atol=1e-6), name


def test_steps_do_not_wait_for_the_device_batch_by_batch(trained):
    """Apart from the replay itself, a step reads its counts once, however many batches there are."""
    model, data = trained
    own = []
    for number in (8, 16):
        with pretend("cuda") as device:
            moved = copy.deepcopy(model).to(device)
            on_device = [(x.to(device), y.to(device)) for x, y in data * 4][:number]
            host_reads.clear()
            GreedyFilterPruning(moved, "stage1").run(on_device, num_filters=1, show_progress=False)
            own.append([read for read in host_reads if "/replay/" not in read])
    assert len(own[1]) - len(own[0]) <= 1 + 1  # reading is looked at every eighth batch


class OneLogit(nn.Module):
    """Says z = a0 + a1 / 2 - a2 for the means a of three filters."""

    def __init__(self, shape):
        super().__init__()
        self.filters, self.head, self.shape = nn.ReLU(), nn.Linear(3, 1), shape
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor([[1.0, 0.5, -1.0]]))
            self.head.bias.fill_(-0.2)

    def forward(self, x):
        return self.head(self.filters(x).mean((2, 3))).reshape(-1, *self.shape)


@pytest.mark.parametrize("shape", [(1,), ()])
def test_one_logit(shape):
    model = OneLogit(shape)
    x = torch.rand(40, 3, 2, 2, generator=torch.Generator().manual_seed(0)).double().float()
    means = x.mean((2, 3))
    z = means @ model.head.weight[0] + model.head.bias
    y = (z > 0).long()
    order = GreedyFilterPruning(model, "filters").run([(x, y)], num_filters=2, show_progress=False)
    weights = model.head.weight.detach()[0]
    scores = []
    for filter_ in range(3):
        without = z.detach() - means[:, filter_] * weights[filter_]
        right = ((without > 0) == (y == 1)).double().mean()
        loss = nn.functional.binary_cross_entropy_with_logits(without.double(), y.double())
        scores.append((-float(right), float(loss), filter_))
    assert order.order == [min(scores)[2]]
    assert order.accuracy == pytest.approx([1.0, -min(scores)[0]])
    own = nn.functional.binary_cross_entropy_with_logits(z.double(), y.double())
    assert order.start_loss == pytest.approx(float(own.detach()), rel=1e-6)


def test_probabilities_are_not_put_through_a_softmax_again(trained):
    model, data = trained
    likely = nn.Sequential(*copy.deepcopy(model).children(), nn.Softmax(1)).eval()
    order = GreedyFilterPruning(model, "stage2").run(data, num_filters=2, show_progress=False)
    again = GreedyFilterPruning(likely, "1").run(data, num_filters=2, show_progress=False)
    assert again.order == order.order
    assert again.start_loss == pytest.approx(order.start_loss, rel=1e-5)


class Ratio(nn.Module):
    """Divides two filters by a third, which must not be zero."""

    def __init__(self):
        super().__init__()
        self.filters = nn.Identity()

    def forward(self, x):
        means = self.filters(x).mean((2, 3))
        return means[:, :2] / means[:, 2:]


def test_outputs_that_are_not_finite_without_a_filter_are_refused_by_name():
    x = 1 + torch.rand(6, 3, 2, 2)
    data = [(x[:0], torch.zeros(0)), *[(x, torch.arange(6) % 2)] * 2]
    pruning = GreedyFilterPruning(Ratio(), "filters")
    settings: tuple[dict[str, Any], ...] = ({}, {"error_probability": 0.1})
    for options in settings:
        with pytest.raises(ValueError, match=r"NaN or Inf for image 0 of batch 1 .* filters 2 rem"):
            pruning.run(data, num_filters=2, show_progress=False, **options)


def test_images_put_in_another_order_keep_their_names(small_parts):
    """The error names the loader's image, wherever it is among the hardest."""
    torch.manual_seed(0)
    x = 1 + torch.rand(45, 3, 2, 2)
    only = OnlyOne(float(x[33, 2].mean()))
    model = torch.nn.Sequential(torch.nn.Identity(), only, torch.nn.AdaptiveAvgPool2d(1))
    model += torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3, 2))
    with torch.no_grad():
        y = model(x).argmax(1)
    y[33] = 1 - y[33]
    data = [(x[i : i + 15], y[i : i + 15]) for i in range(0, 45, 15)]
    with pytest.raises(ValueError, match=r"NaN or Inf for image 3 of batch 2 .* filters 0 rem"):
        GreedyFilterPruning(model, "0").run(data, num_filters=2, show_progress=False)


class InPairs(nn.Module):
    """Gives each image what the other of its pair should get; refuses an image without another."""

    def forward(self, x):
        return x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


@pytest.mark.parametrize("part", [10, 9])
def test_images_that_depend_on_their_batch_stay_in_it(monkeypatch, part):
    monkeypatch.setattr(module, "_SMALLEST_PART", part)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU())
    model += nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    x, y = torch.randn(36, 2, 4, 4), torch.arange(36) % 3
    data = [(x[:18], y[:18]), (x[18:], y[18:])]
    assert raced_on(monkeypatch, GreedyFilterPruning(model, "1"), data)
    model += nn.Sequential(InPairs())
    assert not raced_on(monkeypatch, GreedyFilterPruning(model, "1"), data)


def raced_on(monkeypatch, pruning: GreedyFilterPruning, data) -> bool:
    """Whether candidates race."""
    raced, race = [], module.Candidates.race

    def recorded(*args):
        raced.append(True)
        return race(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module.Candidates, "race", recorded)
        pruning.run(data, num_filters=2, show_progress=False)
    return bool(raced)


class OnlyOne(nn.Module):
    """Divides by the first filter in the one image whose last filter has this mean."""

    def __init__(self, mean: float):
        super().__init__()
        self.mean = mean

    def forward(self, x):
        own = (x.mean((2, 3), keepdim=True)[:, 2:] - self.mean).abs() < 1e-6
        return torch.where(own, x / x[:, :1], x)


def test_the_way_is_recorded(trained):
    model, data = trained
    order = GreedyFilterPruning(model, ["stage1", "stage2"]).run(
        data, num_filters=3, show_progress=False
    )
    assert order.ways == {"stage1": "replay", "stage2": "closed form"}
    assert order.options["num_filters"] == 3
    assert str(order).splitlines()[1].split() == [
        "layer",
        "filters",
        "left",
        *["without", "filters", "by"],
    ]
    assert str(order).splitlines()[3].split() == ["stage2", "6", "3", "closed", "form"]
    assert len(repr(order)) < 900

    class Centered(nn.Module):  # a batch-dependent model cannot be replayed
        def forward(self, x):
            return x - x.mean(0, keepdim=True)

    whole = nn.Sequential(*model.children(), Centered()).eval()
    again = GreedyFilterPruning(whole, "0").run(data, num_filters=3, show_progress=False)
    assert again.ways == {"0": "whole model"}


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        lambda model: torch.compile(model, backend="eager"),
        lambda model: lambda x: model(x),
        lambda model: functools.partial(model.forward),
    ],
)
def test_wrapped_models(trained, wrap):
    model, data = trained
    wrapped = wrap(copy.deepcopy(model))
    wrapped(data[0][0])
    expected = GreedyFilterPruning(model, "stage1").run(data, num_filters=2, show_progress=False)
    got = GreedyFilterPruning(wrapped, "stage1").run(data, num_filters=2, show_progress=False)
    assert (got.removed, got.accuracy) == (expected.removed, expected.accuracy)
    assert got.model_sha256 == expected.model_sha256
    if isinstance(wrapped, nn.Module):
        tune = LayerwiseFineTuning(data, {"stage2": 0.05}, num_steps=3)
        options: dict[str, Any] = {"num_filters": 2, "fine_tune": tune, "show_progress": False}
        expected = GreedyFilterPruning(model, "stage1").run(data, **options)
        assert GreedyFilterPruning(wrapped, "stage1").run(data, **options).order == expected.order


def test_loaders_of_every_kind(trained):
    model, data = trained
    expected = GreedyFilterPruning(model, "stage1").run(data, num_filters=2, show_progress=False)
    kinds: dict[str, Iterable[object]] = {
        "list": [(x, y.tolist()) for x, y in data],
        "more": [(x, y, "name") for x, y in data],
        "tuple": [((x,), y) for x, y in data],
        "empty first": [(data[0][0][:0], data[0][1][:0]), *data],
        "generator": (pair for pair in data),
        "one by one": [(x[i : i + 1], y[i : i + 1]) for x, y in data for i in range(len(y))],
    }
    for name, loader in kinds.items():
        got = GreedyFilterPruning(model, "stage1").run(loader, num_filters=2, show_progress=False)
        assert (got.removed, got.accuracy) == (expected.removed, expected.accuracy), name
    named = [{"a": x, "b": y} for x, y in data]
    unpacked = GreedyFilterPruning(model, "stage1").run(
        named, num_filters=2, unpack=lambda batch: (batch["a"], batch["b"]), show_progress=False
    )
    assert unpacked.removed == expected.removed
    for block in (torch.no_grad, torch.inference_mode):
        with block():
            got = GreedyFilterPruning(model, "stage1").run(
                data, num_filters=2, fine_tune=LayerwiseFineTuning(data, 1e-9, num_steps=1),
                show_progress=False,
            )  # fmt: skip
        assert got.removed == expected.removed
    x, y = data[0]
    for labels, message in [
        (y.float(), "float32"),
        (y + 1, "label 3"),
        (torch.ones(16, 3), "multi"),
    ]:
        with pytest.raises(ValueError, match=message):
            GreedyFilterPruning(model, "stage1").run([(x, labels)], num_filters=2)


def test_every_layer_has_a_bound(trained):
    model, data = trained
    both = GreedyFilterPruning(model, ["stage1", "stage2"])
    with pytest.raises(ValueError, match="must name every layer; it lacks stage2"):
        both.run(data, num_filters={"stage1": 2}, show_progress=False)
    order = both.run(data, num_filters={"stage1": 2}, ratio=2, show_progress=False)
    assert [int(order.kept(layer=name).sum()) for name in order.filters] == [2, 3]


def test_norms_of_turned_and_grouped_filters():
    up = nn.ConvTranspose2d(4, 6, 1, groups=2, bias=False)
    with torch.no_grad():
        up.weight.copy_(torch.arange(12.0).reshape(4, 3, 1, 1))
    # Rows are inputs: group 0 has inputs 0 and 1, group 1 inputs 2 and 3.
    assert module._norms(up, torch.arange(6), 6) == [3, 5, 7, 15, 17, 19]
    assert module._norms(nn.ReLU(), torch.arange(2), 6) == [0, 0]


def test_fine_tuning_of_one_logit_with_tuples_and_labels_as_a_list():
    model = OneLogit((1,))
    x = torch.rand(12, 3, 2, 2)
    y = (torch.arange(12) % 2).tolist()
    z = model(x)[:, 0].double()
    loss = nn.functional.binary_cross_entropy_with_logits(z, torch.tensor(y).double())
    tuning = LayerwiseFineTuning([(x[:0], []), ((x,), y, "more")], 0.1, num_steps=3)
    losses = tuning(model.eval())
    assert losses[0] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert losses[2] < losses[0]
    assert not model.training


class Answering(nn.Module):
    """Answers with an object that has logits, with a mapping, or with a tuple."""

    class Answer:
        def __init__(self, logits):
            self.logits = logits

    def __init__(self, net, kind):
        super().__init__()
        self.net, self.kind = net, kind

    def forward(self, x):
        logits = self.net(x)
        kinds = {"object": self.Answer(logits), "mapping": {"out": logits}, "tuple": (logits, 0)}
        return kinds[self.kind]


def test_models_that_return_more_than_a_tensor(trained):
    model, data = trained
    table = ClassFilters(torch.rand(3, 6), torch.ones(3)).select(num_filters=2)
    calls = {
        "greedy": lambda m, name: GreedyFilterPruning(m, f"{name}stage2").run(
            data, num_filters=3, show_progress=False
        ).order,
        "tuned": lambda m, name: GreedyFilterPruning(m, f"{name}stage1").run(
            data, num_filters=3, fine_tune=LayerwiseFineTuning(data, 0.01, num_steps=2),
            show_progress=False,
        ).accuracy,
        "curves": lambda m, name: accuracy_after_removal(
            m, f"{name}stage1", [0, 2], data, show_progress=False
        ).accuracy["order"].tolist(),
        "masking": lambda m, name: masking_test(
            m, f"{name}stage2", table, data, show_progress=False
        ).recall.tolist(),
    }  # fmt: skip
    for name, call in calls.items():
        expected = call(model, "")
        for kind in ("object", "mapping"):
            assert call(Answering(copy.deepcopy(model), kind).eval(), "net.") == expected, name
        several = Answering(copy.deepcopy(model), "tuple").eval()
        with pytest.raises(ValueError, match="ClassScores"):
            call(several, "net.")
        picked = ClassScores(several, lambda output: output[0])
        assert call(picked, "net.") == expected, name
