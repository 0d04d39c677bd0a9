"""A specialist's outputs and accuracies against the full network with its other filters masked."""

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from captum_classfilters import ClassFilters, LayerFilterContribution
from captum_classfilters.cli.demo import load_digits, small_cnn, train_classifier
from captum_classfilters.metrics import evaluate_classifier
from captum_classfilters.pruning import specialize
from captum_classfilters.pruning.specialize import Specialist, _accuracy
from tests.models import QUIET, batches, conv_at, deep, images, joined, known
from tests.pretend_device import host_reads, pretend

pytest.importorskip("torch_pruning")


def table_of(layer, filters, classes=3, seed=0, select=2):
    scores = torch.rand(classes, filters, generator=torch.Generator().manual_seed(seed))
    return ClassFilters(
        scores, torch.ones(classes), class_names=["a", "b", "c"][:classes], layer=layer
    ).select(select)


@pytest.mark.filterwarnings("ignore:The specialist")  # of a network that has not learned
@pytest.mark.parametrize("classes", [[2, 0], ["c", "a"]])
def test_outputs_are_the_masked_networks(classes):
    model, data = deep(seed=2), batches(60)
    x, y = joined(data)
    first, second = table_of("stage1", 4), table_of("stage2", 6, seed=1)
    specialist = specialize(model, [first, second], classes, images(), dataloader=data, **QUIET)
    with torch.no_grad():
        maps = model.stage1(x) * first.selected[[2, 0]].any(0).reshape(1, -1, 1, 1)
        maps = model.stage2(maps) * second.selected[[2, 0]].any(0).reshape(1, -1, 1, 1)
        expected = model.head(maps.mean((2, 3)))[:, [2, 0]]
        found = specialist.model.eval()(x)
        full = model(x)
    assert torch.allclose(found, expected, atol=1e-6)
    assert specialist.classes == (2, 0)
    assert specialist.class_names == ("c", "a")
    table = known(specialist.accuracy)
    for place, label in enumerate((2, 0)):
        of = y == label
        assert int(table.counts[place]) == int(of.sum())
        assert float(table.among_all[place]) == float((full[of].argmax(1) == label).double().mean())
        among = (full[of][:, [2, 0]].argmax(1) == place).double().mean()
        assert float(table.full[place]) == float(among)
        assert float(table.specialist[place]) == float(
            (found[of].argmax(1) == place).double().mean()
        )
    both = y != 1
    right = (found[both].argmax(1) == (y[both] == 0).long()).double().mean()
    assert table.overall() == pytest.approx(float(right))
    assert "together" in str(table)


def test_a_convolutional_head_is_cut_too():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).eval()
    table, x = table_of("1", 6), images()
    specialist = specialize(model, table, ["b", "c"], x)
    assert (
        conv_at(specialist.model, "2").out_channels,
        conv_at(specialist.model, "0").out_channels,
    ) == (
        2,
        int(table.selected[1:].any(0).sum()),
    )
    with torch.no_grad():
        kept = torch.relu(model[0](x)) * table.selected[1:].any(0).reshape(1, -1, 1, 1)
        expected = model[2:](kept)[:, 1:]
        assert torch.allclose(specialist.model(x), expected, atol=1e-6)


def test_digits_with_half_their_filters():
    pytest.importorskip("sklearn")
    torch.manual_seed(0)
    digits = load_digits()
    model = train_classifier(small_cnn(), digits.train, epochs=8, show_progress=False)
    table = LayerFilterContribution(model, "filters").identify(digits.train, num_filters=8, **QUIET)
    example = next(iter(digits.test))[0][:4]
    specialist = specialize(model, table, [1, 4, 7], example, dataloader=digits.test, **QUIET)
    assert isinstance(specialist, Specialist)
    assert int(specialist.kept["filters"].sum()) <= 24
    assert conv_at(specialist.model, "filters.0").out_channels == int(
        specialist.kept["filters"].sum()
    )
    recall = evaluate_classifier(model, digits.test, **QUIET).recall
    accuracy = known(specialist.accuracy)
    assert torch.allclose(accuracy.among_all, recall[[1, 4, 7]])
    assert accuracy.overall("full") >= accuracy.overall("among_all")
    assert accuracy.overall() > 0.9


def test_accuracy_on_an_accelerator_and_of_every_kind_of_batch():
    model, data = deep(seed=2), batches(60)
    table = table_of("stage2", 6)
    expected = known(
        specialize(model, table, ["c", "a"], images(), dataloader=data, **QUIET).accuracy
    )
    kinds: dict[str, list[Any]] = {
        "list": [(x, y.tolist(), "more") for x, y in data],
        "tuple": [((x,), y) for x, y in data],
        "empty first": [(data[0][0][:0], data[0][1][:0]), *data],
    }
    for name, loader in kinds.items():
        found = specialize(model, table, ["c", "a"], images(), dataloader=loader, **QUIET)
        got = known(found.accuracy)
        assert torch.equal(got.specialist, expected.specialist), name
        assert torch.equal(got.counts, expected.counts), name
    smaller = specialize(model, table, ["c", "a"], images(), **QUIET).model
    reads = []
    for there, times in ((True, 2), (True, 4), (False, 2)):
        with pretend("cuda") as device:
            moved = deep(seed=2).to(device), copy.deepcopy(smaller).to(device)
            loader = [(x.to(device), y.to(device)) for x, y in data] if there else data
            host_reads.clear()
            got = _accuracy(*moved, [2, 0], ("c", "a"), loader * times, show_progress=False)
            reads.append(len(host_reads))
        for which in ("among_all", "full", "specialist"):
            assert torch.equal(getattr(got, which), getattr(expected, which)), which
        assert torch.equal(got.counts, times * expected.counts)
    assert reads[1] - reads[0] <= 4  # 24 batches more, looked at by eights


def test_a_specialist_that_guesses_is_told():
    """Class 0 is what filter 0 sees, class 1 what filter 5 sees; the others see nothing."""
    model = nn.Sequential(
        nn.Conv2d(6, 6, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2)
    ).eval()
    with torch.no_grad():
        model.get_parameter("0.weight").copy_(torch.eye(6)[:, :, None, None])
        model.get_parameter("3.bias").zero_()
        model.get_parameter("3.weight").zero_()
        model.get_parameter("3.weight")[0, 0] = model.get_parameter("3.weight")[1, 5] = 1.0
    y = torch.arange(40) % 2
    x = torch.zeros(40, 6, 3, 3)
    x[torch.arange(40), torch.where(y == 0, 0, 5)] = 1.0
    data = [(x[:25], y[:25]), (x[25:], y[25:])]

    def special(*filters):
        selected = torch.zeros(2, 6, dtype=torch.bool)
        selected[:, list(filters)] = True
        table = ClassFilters(torch.zeros(2, 6), torch.ones(2), layer="0").with_selection(selected)
        return specialize(model, table, [0, 1], x[:2], dataloader=data, **QUIET)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert special(0, 5).accuracy.overall() == 1.0
    with pytest.warns(UserWarning, match=r"accuracy of 0\.500, .* 0\.500 of a guess; .* 1\.000"):
        assert special(2, 3).accuracy.overall() == 0.5


def test_a_head_whose_weight_is_computed_is_refused_until_the_advice_is_followed():
    model, x = deep(), images()
    nn.utils.parametrizations.weight_norm(model.head)
    table = table_of("stage1", 4)
    with pytest.raises(ValueError, match="'head' cannot be cut to some classes") as caught:
        specialize(model, table, ["a", "c"], x)
    eval(str(caught.value).split("first: ")[1].removesuffix("."))
    specialist = specialize(model, table, ["a", "c"], x)
    assert specialist.model(x).shape == (8, 2)


def test_bad_input():
    model, x = deep(), images()
    table = table_of("stage2", 6)
    cases: list[tuple[Any, Any, dict[str, Any], str]] = [
        (table, ["a"], {}, "two or more different"),
        (table, 0, {}, "classes=0 is one number; expected a list"),
        (table, "ab", {}, "classes='ab' is one name; expected a list"),
        (table, ["a", 0], {}, "two or more different"),
        (table, ["a", "z"], {}, "No class named 'z'"),
        ([], ["a", "b"], {}, "empty"),
        ([table, table], ["a", "b"], {}, "Two tables"),
        (
            table.with_selection(torch.zeros(3, 6, dtype=torch.bool)),
            ["a", "b"],
            {},
            "selects no filters for a, b",
        ),
        (table, ["a", "b"], {"head": "stage1.0"}, "expected an nn.Linear"),
        (table, ["a", "b"], {"dataloader": [(x[:2], torch.tensor([2, 2]))]}, "no image of a, b"),
    ]
    for tables, classes, options, message in cases:
        with pytest.raises(ValueError, match=message):
            specialize(model, tables, classes, x, **options, **QUIET)
    broken = [(torch.cat([x[:2], torch.full_like(x[:1], math.nan)]), torch.tensor([0, 1, 0]))]
    with pytest.raises(ValueError, match="NaN or Inf for image 2 of batch 0"):
        specialize(model, table, ["a", "b"], x, dataloader=broken, **QUIET)
    one = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 1)).eval()
    with pytest.raises(ValueError, match="one output tells its two classes apart already"):
        specialize(one, table_of("1", 6, classes=2), ["a", "b"], x)
    with pytest.raises(ValueError, match="has 3 outputs, and there is no class 3 among them"):
        specialize(
            model,
            ClassFilters(torch.rand(4, 6), torch.ones(4), layer="stage2").select(2),
            [0, 3],
            x,
        )
    hidden = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.Flatten(), nn.Linear(96, 4), nn.ReLU(), nn.Linear(4, 3)
    ).eval()
    with pytest.raises(ValueError, match="rows of '2' are not the model's outputs"):
        specialize(hidden, table_of("0", 6), ["a", "b"], x, head="2")
