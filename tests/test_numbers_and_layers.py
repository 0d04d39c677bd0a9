"""Numbers, layers, targets and labels in unusual forms: taken, or refused by name."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import LayerActivation
from torch import nn

from captum_classfilters import (
    ClassFilterSaliency,
    ClassSpecificGate,
    LayerClassGate,
    LayerFilterAblation,
    LayerFilterContribution,
    LayerFilterFrequency,
    identify_class_filters,
    prune_filters,
)
from captum_classfilters._core.arguments import whole_number
from captum_classfilters.attr import filter_gradient_maps
from captum_classfilters.gates import GatedTrainer, masking_test
from captum_classfilters.heads import accuracy_curve, fine_tune, top_mass
from captum_classfilters.identify import (
    LabelPermutation,
    accuracy_reduction,
    binomial_interval,
    exemplars,
)
from captum_classfilters.metrics import (
    class_curves,
    collateral_damage,
    correlation_filters,
    filter_curves,
    filter_scores_of,
    remove_and_retrain,
    selectivity_regularizer,
    validate,
)
from captum_classfilters.pruning import ClassFilterImportance, LayerwiseFineTuning, specialize
from captum_classfilters.spectral import layer_svd, profile_images, select_rank
from captum_classfilters.testing import trained_network
from captum_classfilters.visualize.arrays import chosen
from tests.models import QUIET, batches, images, pool_linear

ONE = np.int64(1)


@pytest.mark.parametrize("value", [True, np.True_, torch.tensor(True), 1.5, "1", None, [1]])
def test_what_is_no_whole_number(value):
    assert whole_number(value) is None
    assert whole_number(torch.tensor([1])) is None  # a list of one


@pytest.mark.parametrize("value", [1, ONE, np.uint8(1), torch.tensor(1)])
def test_whole_numbers_of_any_library(value):
    assert type(whole_number(value)) is int


def test_they_are_taken_wherever_a_number_is(tmp_path):
    model, data = pool_linear(), batches()
    method = LayerFilterFrequency(model, "1", top_k=ONE)
    table = method.identify(data, num_filters=ONE, state_path=tmp_path / "state", **QUIET)
    assert table.select(ONE) == table.select(1) == table
    with pytest.raises(ValueError, match="num_filters=True; expected a whole number or None"):
        table.select(True)
    assert LabelPermutation(permutations=np.int64(9)).record()["permutations"] == 9
    found = exemplars(model, "1", data, num_exemplars=ONE, boxes=False, **QUIET)["1"]
    assert found.highest.image.shape[1] == 1
    assert select_rank(torch.tensor([3.0, 1.0]), (2, 2), "top_k", k=ONE) == 1
    assert layer_svd(nn.Linear(3, 2), rank=ONE).left.shape == (2, 1)
    assert trained_network("shared", level=ONE, seed=np.int64(0)).level == 1
    assert chosen(ONE, torch.arange(3.0), "filters").tolist() == [2]


@pytest.mark.parametrize("number", [2, np.int64(2), [2], (2,)])
def test_one_number_of_filters_is_a_list_of_one(number):
    model, data = pool_linear(), batches()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = LayerFilterContribution(model, "1").identify(data, num_filters=2, **QUIET)
        assert accuracy_curve(model, table, data, num_filters=number, **QUIET).num_filters == [2]
    curves = filter_curves(model, "1", images(2), torch.rand(2, 6), target=1, num_filters=number)
    assert curves.num_filters == [0, 2, 4, 6]
    assert top_mass(torch.rand(4, 3), torch.arange(4), number).num_filters == [2]
    with pytest.raises(ValueError, match=r"num_filters=2.5; expected numbers of filters"):
        accuracy_curve(model, table, data, num_filters=2.5, **QUIET)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0, object, nn.ReLU])
def test_what_is_no_layer_is_named(value):
    with pytest.raises(ValueError, match=r"layer=.*expected a module of the model, or its dotted"):
        LayerFilterContribution(pool_linear(), value)


def test_a_method_whose_layer_was_never_set_says_so():
    with pytest.raises(ValueError, match="layer=None; expected a module"):
        LayerFilterContribution(pool_linear(), None).attribute(images(), target=0)


@pytest.mark.parametrize("value", ["1", 1.5, True])
def test_an_axis_is_a_whole_number(value):
    with pytest.raises(ValueError, match=r"channel_dim=.*; expected a whole number or None"):
        LayerFilterFrequency(pool_linear(), "1", channel_dim=value)
    method = LayerFilterFrequency(pool_linear(), "1")
    method.channel_dim = value
    with pytest.raises(ValueError, match=r"channel_dim=.* is no axis"):
        method.attribute(images())


@pytest.mark.parametrize("number", [3, 9])
def test_targets_of_another_number_than_the_images(number):
    model = pool_linear()
    target = torch.zeros(number, dtype=torch.int64)
    for method in (
        LayerFilterContribution(model, "1"),
        LayerClassGate(model, model[1], torch.ones(3, 6)),
    ):
        with pytest.raises(AssertionError, match=f"target has {number} classes for 8 images"):
            method.attribute(images(8), target=target)


@pytest.mark.parametrize("name", ["target", "inputs", "return_convergence_delta"])
def test_arguments_that_the_call_gives_itself(name):
    """A target of one's own left rows that were called the classes and were all of one output."""
    kwargs: dict[str, Any] = {name: 1}
    with pytest.raises(ValueError, match=rf"attribute_kwargs holds '{name}'.*target= beside"):
        LayerFilterContribution(pool_linear(), "1").identify(
            batches(), attribute_kwargs=kwargs, **QUIET
        )


def test_a_batch_of_one_image_has_no_other_to_take():
    x, y = images(5), torch.arange(5) % 3
    method = LayerFilterAblation(pool_linear(), "1", replacement="resample")
    with pytest.raises(ValueError, match="drop_last=True or another batch_size"):
        method.identify([(x[:4], y[:4]), (x[4:], y[4:])], **QUIET)


def test_a_selection_is_a_tensor():
    table = LayerFilterFrequency(pool_linear(), "1").identify(batches(), **QUIET)
    for mask in (table.selected.numpy(), table.selected.tolist()):
        with pytest.raises(ValueError, match=r"expected a Tensor, as torch.as_tensor\(selected\)"):
            table.with_selection(mask)  # type: ignore[arg-type]
        assert table.with_selection(torch.as_tensor(mask)) == table


def test_more_successes_than_trials():
    for number in (11, -1):
        with pytest.raises(ValueError, match="successes must be from 0 to counts"):
            binomial_interval(torch.tensor([number]), torch.tensor([10]))


def test_labels_of_every_form_are_validated():
    labels = torch.arange(60) % 3
    one_hot = nn.functional.one_hot(labels, 3)
    features = one_hot + 0.1 * torch.rand(60, 3)

    def identify(loader):
        parts = zip(*((inputs, own) for inputs, own in loader), strict=True)
        return correlation_filters(*(torch.cat(part) for part in parts))

    cards = [
        validate(identify, [(features, own)], num_filters=1)
        for own in (labels, labels[:, None], one_hot)
    ]
    for card in cards[1:]:
        assert torch.equal(card.missing, cards[0].missing)


# -- tables of a layer's input ----------------------------------------------------------------------


def square():
    """A layer with as many filters at its input as at its output."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        ).eval()  # fmt: skip
    x = torch.randn(40, 3, 7, 9, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        scores = model(x)
        labels = (scores - scores.mean(0)).argmax(1)
        model[4].bias -= scores.mean(0)
    return model, [(x, labels)]


def tables_of_one_tensor(model, data):
    """A table of the filters that go into the layer "2", and of the same, which come out of "1"."""
    options = {"num_filters": 2, **QUIET}
    at_input = LayerFilterAblation(model, "2").identify(
        data, attribute_to_layer_input=True, **options
    )
    at_output = LayerFilterAblation(model, "1").identify(data, **options)
    assert torch.equal(at_input.selected, at_output.selected)
    return at_input, at_output


def damages(damage):
    return {**damage.control_recall, "own": damage.recall_change}


ACTING: dict[str, Any] = {
    "class_curves": lambda model, layer, table, data: (
        class_curves(model, layer, table, data, **QUIET).necessity
    ),
    "collateral_damage": lambda model, layer, table, data: damages(
        collateral_damage(model, layer, table, data, **QUIET)
    ),
    "masking_test": lambda model, layer, table, data: {
        "recall": masking_test(model, layer, table, data, **QUIET).recall
    },
}


@pytest.mark.parametrize("name", ACTING)
def test_a_table_of_a_layers_input_acts_on_its_input(name):
    model, data = square()
    act, (at_input, at_output) = ACTING[name], tables_of_one_tensor(model, data)
    found, expected = act(model, "2", at_input, data), act(model, "1", at_output, data)
    torch.testing.assert_close(found, expected, equal_nan=True)
    beside = act(model, "1", at_input, data)  # the layer that the caller names
    torch.testing.assert_close(beside, expected, equal_nan=True)
    assert any(
        not torch.equal(values, expected[key])
        for key, values in act(model, "3", at_output, data).items()
    )


def test_tables_of_input_and_output_are_not_mixed():
    model, data = square()
    at_input, _ = tables_of_one_tensor(model, data)
    at_output = LayerFilterAblation(model, "2").identify(data, **QUIET)
    with pytest.raises(ValueError, match="Some tables have filters of the input of '2'"):
        class_curves(model, "2", {"in": at_input, "out": at_output}, data, **QUIET)


REFUSING: dict[str, Any] = {
    "prune_filters": lambda model, table, images: prune_filters(model, table, images),
    "prune_filters, keep": lambda model, table, images: prune_filters(
        model, "2", images, keep=table
    ),
    "prune_filters, mapping": lambda model, table, images: prune_filters(
        model, {"2": table}, images
    ),
    "specialize": lambda model, table, images: specialize(model, table, [1, 3], images, head="4"),
    "ClassFilterImportance": lambda model, table, images: ClassFilterImportance(
        model, table, images
    ),
    "ClassFilterSaliency": lambda model, table, images: ClassFilterSaliency(model, "2", table),
}


@pytest.mark.parametrize("name", REFUSING)
def test_a_table_of_a_layers_input_is_refused_by_what_acts_on_outputs(name):
    model, data = square()
    at_input, _ = tables_of_one_tensor(model, data)
    with pytest.raises(ValueError, match=r"filters of the input of '2' .* the layer before"):
        REFUSING[name](model, at_input, data[0][0])


def test_a_table_of_accuracies_says_that_it_is_of_the_input():
    model, data = square()
    method = LayerFilterAblation(model, "2")
    reduction = accuracy_reduction(method, data, attribute_to_layer_input=True, **QUIET)
    with pytest.raises(ValueError, match="filters of the input of '2'"):
        prune_filters(model, reduction.to_class_filters(2), data[0][0])


def test_filters_of_a_layers_input_are_removed_at_the_layer_before():
    model, data = square()
    at_input, at_output = tables_of_one_tensor(model, data)
    images = data[0][0]
    pruned = prune_filters(model, "1", images, keep=at_input)
    expected = prune_filters(model, at_output, images)
    assert torch.equal(pruned(images), expected(images))


class Weighted(nn.Module):
    """Places of three filters, of 4 x 5 numbers, that weigh one half and one in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.keep = nn.Identity()
        self.register_buffer("weights", torch.tensor([[0.5], [1], [0.5], [1]], dtype=torch.half))

    def forward(self, x):
        return (self.keep(x) * self.weights).float().sum((2, 3))


LARGE = 3 * 2.0**14  # which half precision holds; no two of them, though
OF_PLACES, OF_WEIGHTS = 20 * LARGE, 15 * LARGE


def own_scores(kind: type[LayerFilterContribution], x: torch.Tensor) -> torch.Tensor:
    method = kind(Weighted(), "keep")
    return method.filter_scores(method.attribute(x, target=0))


class Attributed(LayerFilterContribution):
    """Whose identification asks ``attribute``."""

    def attribute(self, *args, **kwargs):
        return super().attribute(*args, **kwargs)


def identified(x: torch.Tensor, kind: Any = LayerActivation, **options: Any) -> torch.Tensor:
    model, labels = Weighted(), torch.arange(len(x)) % 3
    layer = model.keep if kind is LayerActivation else "keep"
    return identify_class_filters(kind(model, layer), [(x, labels)], **options, **QUIET).scores


SUMS = {
    "filter_scores": (lambda x: own_scores(LayerFilterContribution, x)[:, 0], OF_WEIGHTS),
    "filter_scores_of": (
        lambda x: filter_scores_of(LayerActivation(model := Weighted(), model.keep), x),
        OF_PLACES,
    ),
    "identify, sum": (identified, OF_PLACES),
    "identify, abs_sum": (lambda x: identified(-x, reduction="abs_sum"), OF_PLACES),
    "identify, by the rule": (
        lambda x: identified(x, LayerFilterContribution).diagonal(),
        OF_WEIGHTS,
    ),
    "identify, by attribute": (lambda x: identified(x, Attributed).diagonal(), OF_WEIGHTS),
    "delta": (
        lambda x: LayerFilterContribution(Weighted(), "keep").attribute(
            x, target=0, return_convergence_delta=True
        )[1],
        0,
    ),
    "selectivity": (lambda x: selectivity_regularizer(x, torch.arange(len(x)) // 3), 0),
    "positions": (
        lambda x: torch.tensor(
            profile_images(
                Weighted(), "keep", [(x, torch.arange(len(x)) % 3)], kind="position", **QUIET
            )
            .weights["keep"]
            .sum(1)
        ),
        1,
    ),
}


@pytest.mark.parametrize("name", SUMS)
def test_sums_that_half_precision_does_not_hold(name):
    call, expected = SUMS[name]
    found = call(torch.full((6, 3, 4, 5), LARGE, dtype=torch.half))
    assert torch.allclose(found.double(), torch.tensor(expected, dtype=torch.float64))


def test_squares_that_half_precision_does_not_hold():
    layer = nn.Conv2d(1, 2, 1, bias=False).half()
    nn.init.constant_(layer.weight, 2.0**-10)  # of a mean of 20: its square is zero
    x = torch.rand(3, 1, 4, 5).half()
    maps = filter_gradient_maps(nn.Sequential(layer), "0", x, torch.tensor([1, 0]))
    assert torch.allclose(maps, torch.ones_like(maps), atol=1e-3)


def pairs(dtype: torch.dtype, number: int = 2) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(9) % 3
    return [(torch.randn(9, 2, 6, 6, generator=generator).to(dtype), labels)] * number


def trained_with_gates(dtype: torch.dtype, number: int) -> None:
    model = pool_linear().to(dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    gate = ClassSpecificGate(3, 6).attach(model, "1")
    GatedTrainer(model, gate, optimizer).fit(pairs(dtype, number), epochs=4, **QUIET)


TRAINERS = {
    "fine_tune": lambda dtype, n: fine_tune(
        pool_linear().to(dtype), pairs(dtype, n), pairs(dtype), epochs=1, **QUIET
    ),
    "remove_and_retrain": lambda dtype, n: remove_and_retrain(
        pool_linear().to(dtype), "1", torch.arange(6.0), pairs(dtype, n), pairs(dtype),
        num_filters=[1], epochs=2, repetitions=1, **QUIET,
    ),
    "gates": trained_with_gates,
}  # fmt: skip


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("name", TRAINERS)
def test_no_learning_rate_trains_float16(name, number):
    with pytest.raises(
        ValueError, match=r"is NaN or Inf\. Parameters in float16 .*model\.float\(\)"
    ):
        TRAINERS[name](torch.float16, number)
    for dtype in (torch.bfloat16, torch.float32):  # as the error says
        TRAINERS[name](dtype, number)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_layers_that_are_fine_tuned_in_float16(dtype):
    rounds = LayerwiseFineTuning(pairs(dtype), num_steps=9, learning_rates=6e4)
    with pytest.raises(ValueError, match="loss is NaN or Inf") as error:
        rounds(pool_linear().to(dtype))
    assert ("model.float()" in str(error.value)) == (dtype == torch.float16)
    assert ("Lower the learning rate" in str(error.value)) == (dtype == torch.float32)
