"""Our methods as explanation functions of Quantus; needs the extra ``quantus``."""

from typing import Any

import pytest
import torch
from captum.attr import IntegratedGradients, LayerGradCam
from torch import nn

from captum_classfilters import (
    ClassFilterSaliency,
    LayerFilterAblation,
    LayerFilterContribution,
)
from captum_classfilters.metrics import quantus_explanation
from tests.models import (
    ONE_OUTPUT,
    ChannelsLast,
    TwoScores,
    batches,
    deep,
    images,
    one_output,
    pool_linear,
)

TARGETS = torch.arange(8) % 3


def saliency(model):
    table = LayerFilterContribution(model, "stage2").identify(
        batches(), num_filters=2, show_progress=False
    )
    return ClassFilterSaliency(model, "stage2", table)


METHODS = {
    "contribution": lambda model: LayerFilterContribution(model, "stage2"),
    "contribution inside": lambda model: LayerFilterContribution(model, "stage1"),
    "ablation": lambda model: LayerFilterAblation(model, "stage1"),
    "Grad-CAM": lambda model: LayerGradCam(model, model.stage2),
    "saliency": saliency,
    "Integrated Gradients": IntegratedGradients,
}


def test_maps_are_sums_over_filters():
    model, x = deep(), images()
    explain = quantus_explanation(METHODS["contribution"])
    found = explain(model, x.numpy(), TARGETS.numpy())
    expected = METHODS["contribution"](model).attribute(x, target=TARGETS).sum(1, keepdim=True)
    assert found.shape == (8, 1, 6, 6)
    assert torch.allclose(torch.from_numpy(found), expected, atol=1e-6)


@pytest.mark.parametrize("kind", ONE_OUTPUT)
def test_captums_methods_explain_the_classes_of_one_output(kind):
    model, x, targets = one_output(kind), images().numpy(), TARGETS.clamp(max=1).numpy()
    explain = quantus_explanation(IntegratedGradients)
    found, expected = (explain(net, x, targets) for net in (model, TwoScores(model)))
    torch.testing.assert_close(torch.from_numpy(found), torch.from_numpy(expected))


def test_a_model_in_training_mode_stays_as_it_was():
    model, x = deep().train(), images()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    for method in ("contribution", "ablation"):
        quantus_explanation(METHODS[method])(model, x.numpy(), TARGETS.numpy())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_layers_with_filters_last_and_smaller_maps():
    twin = pool_linear()
    model, x = ChannelsLast(twin), images()
    make = quantus_explanation(
        lambda net: LayerFilterContribution(net, "transpose", channel_dim=-1)
    )
    other = quantus_explanation(lambda net: LayerFilterContribution(net, "1"))
    found, expected = (
        one(net, x.numpy(), TARGETS.numpy()) for one, net in ((make, model), (other, twin))
    )
    assert found.shape == (8, 1, 6, 6)
    assert torch.allclose(torch.from_numpy(found), torch.from_numpy(expected), atol=1e-5)


def test_a_layer_without_positions():
    explain = quantus_explanation(lambda net: LayerFilterContribution(net, "flatten"))
    with pytest.raises(ValueError, match="no positions"):
        explain(deep(), images().numpy(), TARGETS.numpy())
    with pytest.raises(ValueError, match="expected a function that makes a method"):
        quantus_explanation(LayerFilterContribution(deep(), "stage1"))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.filterwarnings("ignore")
def test_quantus_metrics_take_our_methods(name):
    quantus = pytest.importorskip("quantus", reason="needs the extra quantus")
    model, x = deep(), images(4)
    explain = quantus_explanation(METHODS[name])
    arguments: dict[str, Any] = {
        "model": model,
        "x_batch": x.numpy(),
        "y_batch": TARGETS[:4].numpy(),
    }
    flipping = quantus.PixelFlipping(
        features_in_step=6, perturb_baseline="black", disable_warnings=True
    )
    curves = flipping(**arguments, a_batch=None, explain_func=explain)
    assert len(curves) == 4
    given = explain(model, arguments["x_batch"], arguments["y_batch"])
    again = quantus.PixelFlipping(
        features_in_step=6, perturb_baseline="black", disable_warnings=True
    )(**arguments, a_batch=given)
    for left, right in zip(curves, again, strict=True):
        assert left == pytest.approx(right)


@pytest.mark.filterwarnings("ignore")
def test_quantus_randomizes_what_is_explained():
    """The model parameter randomization test hands over other models: the method must follow."""
    quantus = pytest.importorskip("quantus", reason="needs the extra quantus")
    model, x = deep(), images(4)
    seen: list[nn.Module] = []

    def make(given):
        seen.append(given)
        return LayerFilterContribution(given, "stage2")

    scores = quantus.MPRT(disable_warnings=True, return_average_correlation=True)(
        model=model,
        x_batch=x.numpy(),
        y_batch=TARGETS[:4].numpy(),
        a_batch=None,
        explain_func=quantus_explanation(make),
    )
    assert len({id(one) for one in seen}) > 1
    assert all(score < 0.999 for score in scores)
