"""The trained networks are what they say, measured on every one that the package has."""

from collections import Counter

import pytest
import torch

from captum_classfilters import LayerFilterAblation
from captum_classfilters.testing import (
    recovery,
    shipped_networks,
    tasks,
    trained_network,
)
from captum_classfilters.testing.circuits import Circuit, Gates
from captum_classfilters.testing.tasks import AXES, LEVELS, draw_concepts, plan
from tests.models import QUIET

ON, OFF = True, False


def test_gates_by_hand():
    """An AND of two ORs, a copy, and a filter that stands for nothing."""
    gates = Gates((((0, 1), (2,)), ((1,),), ()), 3)
    inputs = torch.tensor([[ON, OFF, ON], [OFF, ON, ON], [ON, ON, OFF], [OFF, OFF, ON]])
    expected = [[ON, OFF, OFF], [ON, ON, OFF], [OFF, ON, OFF], [OFF, OFF, OFF]]
    assert gates(inputs).tolist() == expected
    assert gates.named.tolist() == [ON, ON, OFF]
    moved = gates.ordered(torch.tensor([2, 0, 1]), torch.tensor([1, 2, 0]))
    assert moved.groups == (((2,),), (), ((1, 2), (0,)))


def test_gates_that_others_turn_off_by_hand():
    """Filter 1 hears input 1 unless input 0 is on, filter 0 hears input 0."""
    gates = Gates((((0,),), ((1,),)), 2, ((), (0,)))
    inputs = torch.tensor([[ON, ON], [OFF, ON], [ON, OFF], [OFF, OFF]])
    assert gates(inputs).tolist() == [[ON, OFF], [OFF, ON], [ON, OFF], [OFF, OFF]]
    moved = gates.ordered(torch.tensor([1, 0]), torch.tensor([1, 0]))
    assert moved.unless == ((1,), ())
    assert moved(inputs.flip(1)).tolist() == [[OFF, ON], [ON, OFF], [OFF, ON], [OFF, OFF]]


def test_knockouts_by_hand():
    """Class 0: (a or b) and c, of which c is on in both cells; class 1: d, and nobody listens to e."""
    first = Gates(tuple(((i,),) for i in range(5)), 5)
    circuit = Circuit((first, Gates((((0, 1), (2,)), ((3,),)), 5)))
    image = torch.tensor([[ON, ON, ON, OFF, ON], [OFF, ON, ON, OFF, OFF]])
    assert circuit.knockouts(image, 0, 1, 0) == [(2,), (0, 1)]
    assert circuit.knockouts(image, 0, 1, 1) == []
    image[1, 1] = OFF
    image[0, 0] = OFF
    assert circuit.knockouts(image, 0, 1, 0) == [(1,), (2,)]
    assert circuit.deciding([image], 0, 1).int().tolist() == [[0, 1, 1, 0, 0], [0, 0, 0, 0, 0]]
    paths = circuit.reaching(0, 1).int().tolist()
    assert paths == [[1, 1, 1, 0, 0], [0, 0, 0, 1, 0]]


@pytest.mark.parametrize(
    ("axis", "level", "deciding", "serves"),
    [
        ("shared", 1, [2] * 4, [2] * 4),
        ("shared", 2, [2] * 6, [3] * 4),
        ("redundancy", 1, [2] * 4, [1] * 8),
        ("redundancy", 2, [3] * 4, [1] * 12),
        ("backup", 1, [2] * 4, [1] * 8),
        ("superposition", 1, [2] * 6, [3] * 4),
        ("superposition", 2, [2] * 10, [4] * 5),
        ("shortcut", 1, [2, 1, 1, 1], [1] * 5),
        ("depth", 2, [1] * 4, [1] * 4),
    ],
)
def test_how_many_filters_decide(axis, level, deciding, serves):
    """Filters of each class, and classes of each filter that decides, by the task's own numbers."""
    task = plan(axis, level)
    truth = task.circuit.deciding(task.situations(), task.layer, len(task.kinds))
    assert truth.sum(1).tolist() == deciding
    assert [n for n in truth.sum(0).tolist() if n] == serves


def test_an_image_shows_its_class_and_marks_at_their_rates():
    task = plan("shortcut", 2)
    labels = torch.arange(4000) % 4
    concepts, _ = draw_concepts(task, labels, torch.Generator().manual_seed(0))
    shown = concepts.sum(1)
    assert (shown[torch.arange(4000), labels] == 2).all()
    assert (shown[:, :4].sum(1) == 2).all()
    assert (shown[:, task.loud] == 3).all()
    used, idle = ((shown[:, mark] > 0).float() for mark in task.marks)
    rates = [[float(has[labels == c].mean()) for c in range(4)] for has in (used, idle)]
    assert rates[0] == [pytest.approx(0.9, abs=0.03), 0, 0, 0]
    expected = [pytest.approx(rate, abs=0.03) for rate in (0.05, 0.9, 0.05, 0.05)]
    assert rates[1] == expected


def test_backups_are_silent_until_they_are_needed():
    task = plan("backup", 1)
    assert task.kinds[1][:2] == ("own", "backup")
    first = task.circuit.after(task.situations()[0], 0)[0]
    for gone, acts in (([], 0), ([0], 1), ([1], 0)):
        left = first.clone()
        left[:, gone] = OFF
        after = task.circuit.after(left, 1)[0]
        assert [i for i in (0, 1) if after[:, i].any()] == [acts]
    truth = [task.circuit.deciding(task.situations(), layer, 3)[0] for layer in (0, 1)]
    assert [row.nonzero()[:, 0].tolist() for row in truth] == [[0, 1], [0]]


def one_of_each() -> list[tuple[str, int, int]]:
    return list({name[:2]: name for name in shipped_networks()}.values())


@pytest.mark.parametrize("name", one_of_each(), ids=lambda name: "-".join(map(str, name)))
def test_shipped_networks_do_what_their_circuits_say(name):
    """By removals and interchanges at every layer; the benchmark measures all of them."""
    found = trained_network(*name).verify()
    assert found.holds, found


def test_the_package_has_three_networks_of_each_axis_and_level():
    assert Counter(name[:2] for name in shipped_networks()) == {
        (axis, level): 3 for axis in AXES for level in LEVELS[axis]
    }


@pytest.mark.parametrize("harm", ["a class of its own", "a listener", "an edge"])
def test_verification_fails_where_the_network_does_otherwise(harm):
    network = trained_network("shared", 1)
    echo = network.kinds["layer3"].index("echo")
    own = network.truth["layer3"][1].nonzero()[0, 0]
    weight = network.model.get_parameter("head.weight").data
    if harm == "a class of its own":
        weight[[0, 1]] = weight[[1, 0]]
    elif harm == "a listener":
        weight[:, echo] += 50 * torch.tensor([1.0, -1.0, 1.0, -1.0])
    else:
        network.model.get_parameter("layer3.2.bias").data[own] += 0.5
    found = network.verify(100)
    assert not found.holds
    assert (found.accuracy < 0.95) == (harm != "an edge") or harm == "a listener"
    assert (found.edges_lost < 0.95) == (harm == "an edge")


def test_one_filter_is_not_missed_among_copies_and_all_are():
    """By hand: the class's probability without one of two filters, and without both."""
    network = trained_network("redundancy", 1)
    x, y = network.images(40)
    maps = network.model[:2](x)
    for class_ in range(4):
        first, second = network.truth["layer2"][class_].nonzero()[:, 0].tolist()
        for without, right in (([first], 1.0), ([second], 1.0), ([first, second], 0.0)):
            changed = maps[y == class_].clone()
            changed[:, without] = 0
            chance = network.model[2:](changed).softmax(1)[:, class_]
            assert float((chance > 0.5).float().mean()) == right


def test_where_others_step_in_single_removals_see_nothing():
    """The class keeps its probability without either filter, and loses it without both."""
    network = trained_network("backup", 1)
    table = LayerFilterAblation(network.model, "layer1", score="probability").identify(
        network.loader(80), **QUIET
    )
    truth = network.truth["layer1"]
    assert float(table.scores[truth].abs().max()) < 0.1
    x, y = network.images(80)
    both = truth.float()[y] < 0.5
    without = network.model[1:](network.model[0](x) * both[..., None, None])
    chance = without.softmax(1).gather(1, y[:, None])
    assert float((chance > 0.5).float().mean()) == 0


def test_ablation_finds_filters_that_are_shared():
    network = trained_network("shared", 2, 1)
    table = LayerFilterAblation(network.model, "layer2").identify(network.loader(120), **QUIET)
    assert recovery(table, network.truth["layer2"], as_many=True).precision == 1.0


def test_training_is_repeatable_and_leaves_the_random_state(monkeypatch):
    monkeypatch.setattr(tasks, "_STEPS", (3, 3))
    before = torch.get_rng_state()
    with torch.no_grad():  # a caller's mode plays no role
        first = trained_network("shortcut", 1, 7, shipped=False)
    again = trained_network("shortcut", 1, 7)  # there is none, so that it is trained
    other = trained_network("shortcut", 1, 8)
    assert torch.equal(torch.get_rng_state(), before)
    weights = first.model.state_dict()
    assert all(torch.equal(weights[k], v) for k, v in again.model.state_dict().items())
    assert not torch.equal(weights["head.weight"], other.model.get_parameter("head.weight"))
    assert not any(p.requires_grad for p in first.model.parameters())
    assert not first.model.training
    assert not first.verify(40).holds  # nine steps teach nothing
    assert all(torch.equal(value, value.half().float()) for value in weights.values())


def test_images_are_repeatable():
    network = trained_network("depth", 2)
    before = torch.get_rng_state()
    x, y = network.images(10, seed=3)
    assert x.shape == (10, 1, 12, 12)
    assert y.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert torch.equal(x, network.images(10, seed=3)[0])
    assert not torch.equal(x, network.images(10, seed=4)[0])
    assert torch.equal(torch.get_rng_state(), before)
    (batch, labels), *rest = network.loader(10, seed=3, batch_size=6)
    assert torch.equal(batch, x[:6])
    assert len(rest) == 1
    assert labels.tolist() == y[:6].tolist()


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_networks_are_the_same_under_every_default_type(default):
    expected = trained_network("backup")
    torch.set_default_dtype(default)
    try:
        network = trained_network("backup")
        x, _ = network.images(10)
        assert torch.get_default_dtype() == default
        assert network.verify(40).holds
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(network.patterns, expected.patterns)
    assert torch.equal(x, expected.images(10)[0])
    assert torch.equal(network.model(x), expected.model(x))


def test_bad_input():
    with pytest.raises(ValueError, match="axis='sharing'; choose one of shared, redundancy"):
        trained_network("sharing")
    for level in (0, 3):
        with pytest.raises(ValueError, match=r"level=.*choose one of 1, 2"):
            trained_network("shared", level)
    with pytest.raises(ValueError, match="level=2; choose one of 1, the levels of 'backup'"):
        trained_network("backup", 2)
    with pytest.raises(ValueError, match="seed=-1; expected a whole number from 0"):
        trained_network("shared", 1, -1)
    with pytest.raises(ValueError, match="number=3"):
        trained_network("shared").verify(3)
