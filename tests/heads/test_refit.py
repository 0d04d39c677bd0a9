"""Refitted heads."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from captum_classfilters import LayerFilterContribution, decompose, refit_head
from captum_classfilters.heads.refit import fit_linear
from captum_classfilters.metrics import evaluate_classifier
from tests.heads.common import HOLDING, QUIET, Net, data_for, separable, table_for
from tests.models import known, made_in_inference_mode, pool_linear


class TestRefit:
    def test_learns_and_touches_only_the_head(self):
        model, (x, y) = pool_linear(), separable()
        data = [(x, y)]
        table = LayerFilterContribution(model, "1").identify(data, num_filters=3, **QUIET)
        decomposed = decompose(model, table)
        before = copy.deepcopy(decomposed.state_dict())
        history = refit_head(decomposed, data, **QUIET)
        assert history[-1] < 0.5 * history[0]
        for key, value in decomposed.state_dict().items():
            assert torch.equal(before[key], value) != key.startswith(("4.weight", "4.bias"))
        again = decompose(model, table)
        refit_head(again, data, **QUIET)
        assert torch.equal(again.get_parameter("4.weight"), decomposed.get_parameter("4.weight"))
        assert decomposed.get_parameter("4.weight").grad is None
        assert evaluate_classifier(decomposed, data, **QUIET).accuracy > 0.9

    def test_strong_pull_keeps_the_weights(self):
        layer = nn.Linear(4, 3)
        before = layer.weight.detach().clone()
        fit_linear(layer, torch.rand(20, 4), torch.arange(20) % 3, weight_decay=1e6)
        assert torch.allclose(layer.weight, before, atol=1e-4)

    def test_bad_input(self):
        layer = nn.Linear(4, 3)
        with pytest.raises(ValueError, match=r"expected \(N, 4\)"):
            fit_linear(layer, torch.rand(5, 3), torch.zeros(5).long())
        with pytest.raises(ValueError, match="0 to 2"):
            fit_linear(layer, torch.rand(5, 4), torch.full((5,), 3))

    @pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
    def test_the_minimum_has_no_gradient(self, label_smoothing):
        x, y = torch.rand(40, 4, dtype=torch.float64), torch.arange(40) % 3
        layer = nn.Linear(4, 3).double()
        start = layer.weight.detach().clone()
        with torch.inference_mode():
            fit_linear(layer, x, y, weight_decay=0.1, label_smoothing=label_smoothing)
        assert layer.weight.grad is None
        loss = F.cross_entropy(layer(x), y, label_smoothing=label_smoothing)
        (loss + 0.05 * (layer.weight - start).square().sum()).backward()
        assert known(layer.weight.grad).abs().max() < 1e-4
        assert known(layer.bias.grad).abs().max() < 1e-4

    @pytest.mark.parametrize(
        "made",
        [made_in_inference_mode, lambda labels: labels.to(torch.uint8)],
        ids=["in inference mode", "of bytes"],
    )
    def test_labels_of_any_kind(self, made):
        x, y = torch.rand(20, 4), torch.arange(20) % 3
        layer = nn.Linear(4, 3)
        twin = copy.deepcopy(layer)
        assert fit_linear(layer, x, made(y)) == fit_linear(twin, x, y)

    def test_one_logit_minimizes_the_binary_cross_entropy(self):
        x, y = torch.rand(40, 4, dtype=torch.float64), torch.arange(40) % 2
        layer = nn.Linear(4, 1).double()
        start = layer.weight.detach().clone()
        fit_linear(layer, x, y, weight_decay=0.1)
        loss = F.binary_cross_entropy_with_logits(layer(x)[:, 0], y.double())
        (loss + 0.05 * (layer.weight - start).square().sum()).backward()
        assert known(layer.weight.grad).abs().max() < 1e-4
        assert known(layer.bias.grad).abs().max() < 1e-4

    @pytest.mark.parametrize("iterations", [1, 2, 5, 30])
    def test_the_history_is_the_objective_after_each_iteration(self, iterations):
        generator = torch.Generator().manual_seed(1)
        x = 20 * torch.rand(40, 4, dtype=torch.float64, generator=generator)
        y = torch.randint(0, 3, (40,), generator=generator)

        layer = nn.Linear(4, 3).double()
        nn.init.ones_(layer.weight)
        nn.init.zeros_(layer.bias)
        history = fit_linear(layer, x, y, weight_decay=0.1, max_iterations=iterations)
        reached = F.cross_entropy(layer(x), y) + 0.05 * (layer.weight - 1).square().sum()
        assert history[-1] == pytest.approx(float(reached.detach()), rel=1e-9)
        assert history == sorted(history, reverse=True)
        assert len(history) <= iterations + 1

    def test_flags_stay(self):
        layer = nn.Linear(4, 3)
        layer.bias.requires_grad_(False)
        before = layer.bias.detach().clone()
        fit_linear(layer, torch.rand(20, 4), torch.arange(20) % 3)
        assert layer.weight.requires_grad
        assert not layer.bias.requires_grad
        assert not torch.equal(layer.bias, before)

    def test_features_that_are_no_numbers(self):
        layer = nn.Linear(4, 3)
        before = layer.weight.detach().clone()
        with pytest.raises(ValueError, match="NaN or Inf"):
            fit_linear(layer, torch.full((5, 4), float("nan")), torch.zeros(5).long())
        assert torch.equal(layer.weight, before)


FITTED = {
    "plain",
    "log-softmax",
    "softmax",
    "half precision",
    "bfloat16",
    "autocast in forward",
    "one logit",
    "one logit, flat",
    "one probability",
    "an object with logits",
    "scores picked from a tuple",
    "data parallel",
    "compiled",
    "a hook that only looks",
}


@pytest.mark.parametrize("name", HOLDING)
def test_fits_the_model_or_says_why_not(name):
    model = HOLDING[name]().eval()
    data = data_for(model, name, number=60)
    before = copy.deepcopy(model.state_dict())
    if name in FITTED:
        decomposed = decompose(model, table_for(name, number=4))
        history = refit_head(decomposed, data, **QUIET)
        assert history[-1] < history[0]
        twin = HOLDING[name]().eval()
        refit_head(twin, data, **QUIET)
        assert evaluate_classifier(twin, data, **QUIET).accuracy > 0.4
    else:
        with pytest.raises(ValueError, match=r"freeze='backbone'|reached 2 times"):
            refit_head(model, data, **QUIET)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_the_plain_weights_of_a_decomposed_head_are_fitted():
    model = HOLDING["weight norm"]().eval()
    decomposed = decompose(model, table_for())
    history = refit_head(decomposed, data_for(model), **QUIET)
    assert history[-1] < history[0]


def test_a_convolutional_head_is_refused():
    model = HOLDING["a convolution"]()
    decomposed = decompose(model, table_for("a convolution"))
    with pytest.raises(ValueError, match=r"'2' .*a convolution.*fine_tune"):
        refit_head(decomposed, data_for(model), **QUIET)


def test_a_head_that_takes_tokens_is_refused():
    class Tokens(Net):
        def forward(self, x):
            return self.fc(self.relu(self.conv(x)).flatten(2).mT).mean(1)

    with pytest.raises(ValueError, match=r"takes \(5, 16, 6\) for 5 images"):
        refit_head(Tokens(), data_for(Net()), **QUIET)


def test_a_fit_that_is_not_finite_leaves_the_head():
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    before = copy.deepcopy(layer.state_dict())
    features, labels = 1e30 * torch.randn(40, 3).abs(), torch.arange(40) % 2
    with pytest.raises(ValueError, match=r"weights stay as they were: features reach .*e.30"):
        fit_linear(layer, features, labels)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])
