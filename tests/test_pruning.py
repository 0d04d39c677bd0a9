"""Greedy pruning against the plain loop over whole forward passes, and its bounds."""

import json

import pytest
import torch

from captum_classfilters.networks import GreedyFilterPruning
from tests.models import batches, deep, hooks_of, joined


@pytest.fixture(scope="module")
def trained():
    """A model whose accuracy depends on its filters, with labels it mostly gets right."""
    model = deep(seed=2)
    x, _ = joined(batches(60))
    with torch.no_grad():
        logits = model(x)
        model.head.bias -= logits.mean(0)
        y = (model(x) + 0.02 * torch.randn(60, 3)).argmax(1)
    data = [(x[i : i + 16], y[i : i + 16]) for i in range(0, 60, 16)]
    return model, data


def plain_loop(model, layer, x, y, steps):
    """Removal order by one whole forward pass for each candidate."""
    gone, order, curve = [], [], []
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


def test_a_killed_run_continues(trained, tmp_path):
    model, data = trained
    path = tmp_path / "state.json"
    pruning = GreedyFilterPruning(model, "stage2")
    full = pruning.run(data, num_filters=1, show_progress=False)

    class KilledError(Exception):
        pass

    def killed_after(steps):
        original, done = GreedyFilterPruning._step, []

        def step(*args):
            if len(done) == steps:
                raise KilledError
            done.append(1)
            return original(*args)

        return step

    pruning._step = killed_after(2)
    with pytest.raises(KilledError):
        pruning.run(data, num_filters=1, state_path=path, show_progress=False)
    assert json.loads(path.read_text())["order"] == full.order[:2]
    pruning._step = killed_after(3)  # what is left, and no step twice
    assert pruning.run(data, num_filters=1, state_path=path, show_progress=False) == full
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="another run"):
        GreedyFilterPruning(model, "stage1").run(
            data, num_filters=1, state_path=path, show_progress=False
        )


def test_bad_input(trained):
    model, data = trained
    pruning = GreedyFilterPruning(model, "stage1")
    for bounds, message in [
        ({}, "at least one"),
        ({"num_filters": 0}, "cannot lose every filter"),
        ({"num_filters": 5}, "expected 1 to 4"),
        ({"ratio": 0.5}, "ratio=0.5"),
        ({"min_accuracy": 1.5}, "above the accuracy at the start"),
    ]:
        with pytest.raises(ValueError, match=message):
            pruning.run(data, show_progress=False, **bounds)
    with pytest.raises(ValueError, match="loader is empty"):
        pruning.run([], num_filters=2, show_progress=False)
    x, y = joined(data)
    with pytest.raises(ValueError, match="different classes"):
        pruning.run(data, [(x[y < 1], y[y < 1])], num_filters=2, show_progress=False)
    with pytest.raises(ValueError, match="number=0"):
        pruning.run(data, num_filters=2, show_progress=False).kept(0)
