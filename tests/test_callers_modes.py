"""What the caller has switched on or off around a call makes no difference: ``torch.autocast``, which
keeps casts of weights until it ends, ``torch.no_grad`` and ``torch.inference_mode``."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from captum.attr import LayerGradientXActivation
from torch import nn

from captum_classfilters import (
    ClassSpecificGate,
    LayerFilterAblation,
    LayerFilterContribution,
    LayerFilterFrequency,
    decompose,
    fine_tune,
    identify_class_filters,
    list_filter_layers,
    prune_filters,
    refit_head,
)
from captum_classfilters._core.guard import model_left_as_found
from captum_classfilters.gates import GatedTrainer
from captum_classfilters.heads import decomposed_head, remove_class
from captum_classfilters.metrics import cascading_randomization
from captum_classfilters.pruning import (
    GreedyFilterPruning,
    LayerwiseFineTuning,
    compress_layer,
    magnitude_prune,
    prunable_layers,
)
from captum_classfilters.spectral import factor_layer
from captum_classfilters.testing import planted_network, trained_network

QUIET: dict[str, Any] = {"show_progress": False}


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2)
        )


def separable():
    x = torch.randn(40, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0].mean((1, 2)) > 0).long()
    return [(x[start : start + 10], y[start : start + 10]) for start in range(0, 40, 10)]


def trainer_of(model):
    gate = ClassSpecificGate(2, 6).attach(model, "1")
    return GatedTrainer(model, gate, torch.optim.SGD(model.parameters(), lr=0.5))


def stepped(model, gated):
    trainer = trainer_of(model)
    return [trainer.step(*batch, gated)[0] for batch in separable() * 3]


TRAINERS: dict[str, Callable[[nn.Sequential], Any]] = {
    "fine_tune": lambda model: [
        epoch.loss
        for epoch in fine_tune(
            model, separable(), separable(), epochs=4, learning_rate=0.05, **QUIET
        )[1:]
    ],
    "refit_head": lambda model: refit_head(model, separable(), **QUIET),
    "GatedTrainer.fit": lambda model: [
        epoch.loss for epoch in trainer_of(model).fit(separable(), epochs=4, **QUIET)
    ],
    "GatedTrainer.step, plain": lambda model: stepped(model, gated=False),
    "GatedTrainer.step, gated": lambda model: stepped(model, gated=True),
    "LayerwiseFineTuning": LayerwiseFineTuning(separable(), 0.5, num_steps=12),
}


@pytest.mark.parametrize("name", TRAINERS)
def test_what_trains_learns_as_without_it(name):
    plain, model, train = network(), network(), TRAINERS[name]
    expected = train(plain)
    images = separable()[0][0]
    with torch.autocast("cpu", torch.bfloat16):
        model(images)  # the caller's own run, whose casts are kept
        found = train(model)
        trained = model(images).float()
        kept = torch.is_autocast_cache_enabled()
    assert kept
    assert expected[-1] < expected[0] - 0.05
    assert found[-1] == pytest.approx(expected[-1], abs=0.02)
    torch.testing.assert_close(trained, model(images), atol=0.05, rtol=0.05)


def test_a_randomized_model_explains_by_its_new_weights():
    model, images = network(), separable()[0][0]
    with torch.random.fork_rng():
        expected = cascading_randomization(
            model,
            lambda twin: LayerGradientXActivation(twin, twin.get_submodule("1")),
            images,
            target=1,
        )
        with torch.autocast("cpu", torch.bfloat16):
            found = cascading_randomization(
                model,
                lambda twin: LayerGradientXActivation(twin, twin.get_submodule("1")),
                images,
                target=1,
            )
    means = [result.rank_correlation.mean(1) for result in (found, expected)]
    torch.testing.assert_close(*means, atol=0.05, rtol=0)
    assert bool((found.rank_correlation < 0.9).any())


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("switched_off", [torch.no_grad, torch.inference_mode])
def test_a_single_step_where_the_caller_records_no_gradients(gated, switched_off):
    plain, model = network(), network()
    expected = stepped(plain, gated)
    trainer = trainer_of(model)
    with switched_off():
        found = [trainer.step(x.clone(), y.clone(), gated)[0] for x, y in separable() * 3]
    assert found == expected
    state = copy.deepcopy(plain.state_dict())
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


MAKING = {
    "decompose": lambda model, table, x: decompose(model, table),
    "decompose, checked": lambda model, table, x: decompose(
        model, table, missing="dense", dropped_means=torch.ones(6), example_inputs=x
    ),
    "decomposed_head": lambda model, table, x: decomposed_head(model, table)[1],
    "to_dense": lambda model, table, x: decomposed_head(model, table)[1].to_dense(),
    "remove_class": lambda model, table, x: remove_class(model[4], 0).head,
    "remove_class, decomposed": lambda model, table, x: (
        remove_class(decomposed_head(model, table)[1], 0).head
    ),
    "prune_filters": lambda model, table, x: prune_filters(model, "1", x, keep=table),
    "magnitude_prune": lambda model, table, x: magnitude_prune(model, "0", 0.5),
    "compress_layer": lambda model, table, x: compress_layer(model, "0", x, clusters=4).model,
    "factor_layer": lambda model, table, x: factor_layer(model, "0"),
    "planted_network": lambda model, table, x: planted_network().model,
    "trained_network": lambda model, table, x: trained_network("shared").model,
}


@pytest.mark.parametrize("name", MAKING)
def test_what_is_made_in_inference_mode_can_be_trained(name):
    data = separable()
    with torch.inference_mode():
        model = network_made_outside()
        table = LayerFilterContribution(model, "1").identify(data, num_filters=3, **QUIET)
        made = MAKING[name](model, table, data[0][0])
    tensors = [*made.named_parameters(), *made.named_buffers()]
    assert tensors
    assert [key for key, tensor in tensors if tensor.is_inference()] == []
    for parameter in made.parameters():
        parameter.requires_grad_()


@torch.inference_mode(False)
def network_made_outside():
    return network()


@torch.inference_mode()
def made_in_inference_mode() -> nn.Sequential:
    return network()


@torch.inference_mode()
def converted_in_inference_mode() -> nn.Sequential:
    return network_made_outside().double().float()


X, Y = (
    torch.randn(4, 3, 5, 7, generator=torch.Generator().manual_seed(1)),
    torch.tensor([0, 1, 1, 0]),
)

WITHOUT_GRADIENTS = {
    "contribution": lambda m: LayerFilterContribution(m, "1").identify([(X, Y)], **QUIET).scores,
    "ablation": lambda m: LayerFilterAblation(m, "1").identify([(X, Y)], **QUIET).scores,
    "frequency": lambda m: LayerFilterFrequency(m, "1", top_k=2).attribute(X, target=Y),
    "layers": lambda m: [layer.num_filters for layer in list_filter_layers(m, X)],
    "prunable": lambda m: [layer.name for layer in prunable_layers(m, X, **QUIET)],
    "greedy": lambda m: GreedyFilterPruning(m, ["1"]).run([(X, Y)], num_filters=4, **QUIET).removed,
    "prune": lambda m: prune_filters(m, "0", X, remove=[1])(X).detach(),
}
WITH_GRADIENTS = {
    "attribute": lambda m: LayerFilterContribution(m, "0").attribute(X, target=Y),
    "attribute of Captum's": lambda m: identify_class_filters(
        LayerGradientXActivation(m, m[0]), [(X, Y)], **QUIET
    ),
    "fine_tune": lambda m: fine_tune(m, [(X, Y)], [(X, Y)], epochs=1, **QUIET),
    "fine_tune the head": lambda m: fine_tune(
        m, [(X, Y)], [(X, Y)], epochs=1, freeze="backbone", **QUIET
    ),
    "refit": lambda m: refit_head(m, [(X, Y)], **QUIET),
    "by layers": lambda m: LayerwiseFineTuning([(X, Y)], 0.1, num_steps=1)(m),
    "gated": lambda m: trainer_of(m).fit([(X, Y)], epochs=3, **QUIET),
}


def flags(model: nn.Module) -> list[Any]:
    return [
        *((p.requires_grad, p.grad) for p in model.parameters()),
        *(module.training for module in model.modules()),
    ]


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("made", [made_in_inference_mode, converted_in_inference_mode])
@pytest.mark.parametrize("name", WITHOUT_GRADIENTS)
def test_a_model_made_in_inference_mode(name, made, inside):
    model, plain = made(), network()
    before = flags(model)
    with torch.inference_mode(inside):
        found = WITHOUT_GRADIENTS[name](model)
    assert str(found) == str(WITHOUT_GRADIENTS[name](plain))
    assert flags(model) == before


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("made", [made_in_inference_mode, converted_in_inference_mode])
@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_a_model_made_in_inference_mode_takes_no_gradients(name, made, inside):
    model = made()
    before = flags(model)
    with (
        torch.inference_mode(inside),
        pytest.raises(ValueError, match=r"torch\.inference_mode") as error,
    ):
        WITH_GRADIENTS[name](model)
    assert "copy.deepcopy(model)" in str(error.value)
    assert flags(model) == before
    WITH_GRADIENTS[name](copy.deepcopy(model))  # what the message advises


class Stubborn(nn.Parameter):
    def requires_grad_(self, requires_grad=True):
        if requires_grad:
            raise RuntimeError("stays frozen")
        return super().requires_grad_(False)


def test_what_can_be_restored_is_although_a_parameter_cannot_be():
    model = network()
    model[4].weight = Stubborn(torch.zeros(2, 6))
    with (
        pytest.raises(RuntimeError, match="stays frozen"),
        model_left_as_found(model, evaluation=True, freeze=True),
    ):
        pass
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["4.weight"]
    assert all(module.training for module in model.modules())
