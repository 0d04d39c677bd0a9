"""Gate space: Captum's input methods and metrics over filters."""

import copy
import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from captum.attr import FeatureAblation, IntegratedGradients, ShapleyValueSampling
from captum.metrics import infidelity, infidelity_perturb_func_decorator, sensitivity_max
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from captum_classfilters import ClassScores, FilterGate, LayerFilterContribution
from tests.models import (
    ChannelsLast,
    Reused,
    TwoInputs,
    TwoTensors,
    deep,
    hooks_of,
    images,
    known,
    pool_linear,
)
from tests.pretend_device import pretend


@pytest.mark.parametrize("dims", [0, 1, 2, 3])
def test_any_number_of_positions(dims):
    torch.manual_seed(0)
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    layer = convolutions[dims - 1](2, 5, 1) if dims else nn.Linear(2, 5)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(5 * 3**dims, 2))
    x = torch.randn(4, 2, *([3] * dims))
    gate = FilterGate(model, layer)
    assert torch.equal(gate(gate.ones(4), x), model(x))
    gates = torch.rand(4, 5)
    shape = (4, 5) + (1,) * dims
    assert torch.allclose(gate(gates, x), model[1:](layer(x) * gates.reshape(shape)))


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: m.forward, nn.DataParallel])
def test_forward_functions(wrap):
    model, x = deep(), images()
    gate = FilterGate(wrap(model), model.stage1)
    gates = gate.ones(8)
    assert gates.shape == (8, 4)
    assert torch.equal(gate(gates, x), model(x))
    gates[:, 1] = 0
    expected = model.stage1(x)
    expected[:, 1] = 0
    assert torch.allclose(gate(gates, x), model[1:](expected))
    assert hooks_of(model) == 0


def compiled(model):
    fast = torch.compile(model, backend="eager")
    fast(images())  # compiled before there is a hook
    return fast


WRAPPED = {
    "compiled": compiled,
    "lambda": lambda model: lambda x: model(x),
    "partial": lambda model: functools.partial(model.forward),
    "data parallel": nn.DataParallel,
    "class scores": lambda model: ClassScores(model, lambda output: output),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrapped_models_and_layers_by_name(name):
    model, x, gates = deep(), images(), torch.rand(8, 4)
    gate = FilterGate(WRAPPED[name](model), "stage1")
    assert gate.layer_name == "stage1"
    expected = model[1:](model.stage1(x) * gates[:, :, None, None])
    for _ in range(2):
        assert torch.allclose(gate(gates, x), expected, atol=1e-6)
    assert torch.allclose(gate(gate.ones(8), x), model(x))
    assert hooks_of(model) == 0


def test_ones_are_where_the_model_is_and_in_its_type():
    model = deep().double()
    assert FilterGate(model, "stage1").ones(2).dtype == torch.float64
    assert FilterGate(model, "stage1.2").ones(2).dtype == torch.float64  # an activation
    half = nn.Sequential(nn.Embedding(5, 3), nn.BatchNorm1d(3, affine=False)).bfloat16()
    assert FilterGate(half, "1").ones(2).dtype == torch.bfloat16  # buffers alone
    for kind in ("cuda", "meta"):
        with pretend(kind) as device:
            model = deep().to(device)
            for layer in ("stage1", "stage1.2"):
                gate = FilterGate(model, layer)
                assert gate.ones(2).device == device
                zeros = torch.zeros(8, 4)
                for gates in (zeros, zeros.to(device)):
                    got = gate(gates, images().to(device)).cpu()
                    assert torch.allclose(got, FilterGate(deep(), layer)(zeros, images()))


def test_a_layer_that_puts_out_a_tuple_of_one_tensor():
    class One(nn.Module):
        def forward(self, x):
            return (x,)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.head = One(), nn.Linear(3, 2)

        def forward(self, x):
            return self.head(self.one(x)[0])

    model, x, gates = Model(), torch.rand(4, 3), torch.rand(4, 3)
    assert torch.allclose(FilterGate(model, "one")(gates, x), model.head(x * gates))


def test_nothing_keeps_the_model_alive():
    model = deep()
    FilterGate(model, "stage1")(torch.ones(8, 4), images())
    alive = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert alive() is None
    finally:
        gc.enable()


def test_one_row_gates_all_images_and_further_inputs_pass():
    model = TwoInputs().eval()
    gate = FilterGate(model, "conv")
    inputs = (images(seed=1), images(seed=2), 2.0)
    half = torch.full((1, 4), 0.5)
    assert torch.allclose(gate(half, *inputs), gate(half.expand(8, 4), *inputs))


def test_channels_last():
    twin, x = pool_linear(), images()
    model = ChannelsLast(twin).eval()
    gate = FilterGate(model, "transpose", num_filters=6, channel_dim=-1)
    gates = torch.rand(8, 6)
    assert torch.allclose(gate(gates, x), FilterGate(twin, "1")(gates, x), atol=1e-6)


def test_captums_methods_agree_with_exact_contributions():
    model, x = pool_linear(), images()
    target = torch.arange(8) % 3
    method = LayerFilterContribution(model, "1")
    exact = method.filter_scores(method.attribute(x, target=target))
    gate = FilterGate(model, "1")
    gates, options = gate.ones(8), {"target": target, "additional_forward_args": x}
    for captum_method in (IntegratedGradients(gate), FeatureAblation(gate)):
        assert torch.allclose(captum_method.attribute(gates, **options).float(), exact, atol=1e-5)
    shapley = ShapleyValueSampling(gate).attribute(gates, n_samples=2, **options)
    assert torch.allclose(shapley, exact, atol=1e-5)


def test_captums_metrics_over_filters():
    model, x = pool_linear(), images()
    method = LayerFilterContribution(model, "1")
    exact = method.filter_scores(method.attribute(x, target=1))
    gate = FilterGate(model, "1")
    options: dict[str, Any] = {"target": 1, "additional_forward_args": x}

    @infidelity_perturb_func_decorator(True)
    def drop(gates):
        return gates * (torch.rand_like(gates) > 0.5)

    assert infidelity(gate, drop, gate.ones(8), exact, **options).max() <= 1e-10
    torch.manual_seed(0)
    random = torch.randn_like(exact) * exact.std()
    assert infidelity(gate, drop, gate.ones(8), random, **options).mean() >= 1e-3
    ablation = FeatureAblation(gate)
    sensitivity = sensitivity_max(ablation.attribute, gate.ones(8), **options)
    assert sensitivity.shape == (8,)


def test_state_dict_and_copies():
    model, x = deep(), images()
    gate = FilterGate(model, "stage1")
    assert set(gate.state_dict()) == {f"model.{key}" for key in model.state_dict()}
    twin = copy.deepcopy(gate)
    gates = torch.rand(8, 4)
    assert torch.equal(twin(gates, x), gate(gates, x))
    assert hooks_of(twin) == 0


def test_gates_have_gradients():
    gate = FilterGate(deep(), "stage1")
    gates = gate.ones(8).requires_grad_()
    gate(gates, images()).sum().backward()
    assert known(gates.grad).abs().sum() > 0


def test_number_of_filters_is_corrected_by_a_forward_pass():
    model, x = pool_linear(), images()
    gate = FilterGate(model, "2")  # a pool: guessed from the convolution before it
    assert gate.num_filters == 6
    alone = FilterGate(model.forward, nn.Identity())
    with pytest.raises(RuntimeError, match="does not declare"):
        alone.ones(1)
    wrong = FilterGate(model, "1", num_filters=9)
    with pytest.raises(ValueError, match=r"'1' has 6 filters: expected \(8, 6\)"):
        wrong(wrong.ones(8), x)
    assert wrong.num_filters == 6


def test_bad_layers():
    with pytest.raises(ValueError, match=r"no layer 'stage3'.*'stage2'"):
        FilterGate(deep(), "stage3")
    with pytest.raises(ValueError, match="neither a module nor a function"):
        FilterGate(lambda x: x, "stage3")
    with pytest.raises(ValueError, match="reached 2 times"):
        FilterGate(Reused(), "relu")(torch.ones(8, 4), images())
    with pytest.raises(ValueError, match="never reached"):
        FilterGate(Reused(), "unused")(torch.ones(8, 4), images())
    with pytest.raises(ValueError, match="single tensor"):
        FilterGate(TwoTensors(), "split")(torch.ones(8, 5), images())
    flat = nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (8, -1)))
    with pytest.raises(ValueError, match="no channel dimension"):
        FilterGate(flat, "0")(torch.ones(8, 5), images())


class Twice(nn.Module):
    """Two squashed convolutions, which may run again in the backward pass, and two outputs."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.first = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Sigmoid())
        self.second = nn.Sequential(nn.Conv2d(3, 5, 2), nn.Sigmoid())
        self.head = nn.Linear(5, 3)

    def maps(self, x: Tensor) -> Tensor:
        if self.how == "nested":
            return self.second(checkpoint(self.first, x, use_reentrant=False))
        return self.second(self.first(x))

    def scores(self, x: Tensor) -> Tensor:
        return self.head(self.maps(x).mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "whole":
            return checkpoint(self.scores, x, use_reentrant=False)
        if self.how == "plain":
            return self.scores(x)
        reentrant = self.how == "reentrant"
        return self.head(checkpoint(self.maps, x, use_reentrant=reentrant).mean((2, 3)))


def of_one_graph(model: Twice, layer: str) -> list[Tensor]:
    """Gradients of two gated runs and two plain ones that are differentiated together."""
    gate, x = FilterGate(model, layer), images(4)
    one, two = (torch.rand(4, gate.num_filters).requires_grad_() for _ in range(2))
    loss = gate(one, x).square().sum() + model(x).pow(3).sum()
    loss = loss + (gate(two, 2 * x).square() * model(-x)).sum()
    assert hooks_of(model) == 0
    for keep in (True, False):
        loss.backward(retain_graph=keep)
        assert hooks_of(model) == 0
    (slope,) = torch.autograd.grad(gate(one, x).square().sum(), one, create_graph=True)
    (second,) = torch.autograd.grad(slope.square().sum(), one)
    assert hooks_of(model) == 0
    found = [one.grad, two.grad, second, *(p.grad for p in model.parameters())]
    return [known(gradient) for gradient in found]


@pytest.mark.parametrize("layer", ["first.0", "first", "second.0", "second"])
@pytest.mark.parametrize("how", ["part", "nested", "whole"])
def test_checkpointed_layers_are_gated_when_they_run_again(how, layer):
    """Each in its own run, and no other run of the same model."""
    torch.manual_seed(1)
    expected = of_one_graph(Twice("plain"), layer)
    torch.manual_seed(1)
    torch.testing.assert_close(of_one_graph(Twice(how), layer), expected)


def slopes_of(run: Callable[[Tensor], Tensor], gates: Tensor) -> Tensor:
    own = gates.clone().requires_grad_()
    run(own).logsumexp(1).sum().backward()
    return known(own.grad)


def second_to(run: Callable[[Tensor, Tensor], Tensor], x: Tensor, own: Tensor) -> Tensor:
    return run(own, x)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("how", ["plain", "part", "nested", "whole"])
@pytest.mark.parametrize("layer", ["first", "second.0"])
def test_a_gate_that_is_checkpointed_gates_once_when_it_runs_again(layer, how, reentrant):
    model, x = Twice(how), images(4)
    gate = FilterGate(model, layer)
    gates = torch.linspace(0.1, 1, gate.num_filters).expand(4, -1)
    expected = slopes_of(lambda own: FilterGate(Twice("plain"), layer)(own, x), gates)

    def made_anew(own: Tensor, x: Tensor) -> Tensor:
        return FilterGate(model, layer)(own, x)

    for run in (gate, made_anew):
        again = functools.partial(checkpoint, run, use_reentrant=reentrant)
        found = slopes_of(functools.partial(second_to, again, x), gates)
        torch.testing.assert_close(found, expected)
        assert hooks_of(model) == 0


@pytest.mark.parametrize("outer", [False, True])
def test_a_gate_of_a_checkpointed_gate_of_the_same_layer(outer):
    """Where the inner one runs again, the outer one gates again, and the inner one gates by itself."""
    model, x = Twice("plain"), images(4)
    gates = torch.linspace(0.1, 1, 3).expand(4, -1)
    expected = slopes_of(lambda own: FilterGate(model, "first")(own * own.flip(1), x), gates)
    inner = FilterGate(model, "first")

    def run(own: Tensor) -> Tensor:
        again = functools.partial(checkpoint, inner, own.flip(1), use_reentrant=False)
        gate = FilterGate(again, model.first)
        return checkpoint(gate, own, x, use_reentrant=False) if outer else gate(own, x)

    torch.testing.assert_close(slopes_of(run, gates), expected)
    assert hooks_of(model) == 0


@pytest.mark.parametrize("how", ["plain", "part", "whole"])
def test_a_backward_pass_that_fails_leaves_no_hook(how):
    model = Twice(how)
    gate = FilterGate(model, "first")
    gates = gate.ones(4).requires_grad_()
    result = gate(gates, images(4))

    def fail(_gradient: Tensor) -> None:
        raise RuntimeError("no gradient, please")

    gates.register_hook(fail)
    with pytest.raises(RuntimeError, match="no gradient, please"):
        result.sum().backward()
    assert hooks_of(model) == 0


def test_gates_in_a_reentrant_checkpoint_have_no_gradient():
    model, x = Twice("reentrant"), images(4)
    gate = FilterGate(model, "first")
    options = {"target": 1, "additional_forward_args": x}
    with pytest.raises(ValueError, match=r"'first'.*FeatureAblation.*use_reentrant=False") as error:
        IntegratedGradients(gate).attribute(gate.ones(4), **options)
    assert hooks_of(model) == 0
    assert "FeatureAblation" in str(error.value)  # which is followed:
    found = FeatureAblation(gate).attribute(gate.ones(4), **options)
    expected = FeatureAblation(FilterGate(Twice("plain"), "first")).attribute(
        gate.ones(4), **options
    )
    torch.testing.assert_close(found, expected)
