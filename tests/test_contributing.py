"""The worked example of CONTRIBUTING.md is a method like all others."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from captum.attr import NoiseTunnel

from captum_classfilters import (
    LayerFilterContribution,
    LayerFilterFrequency,
    identify_class_filters,
)
from tests.attr import test_captum_contract as contract
from tests.models import ChannelsLast, batches, deep, hooks_of, images, joined, pool_linear

PAGE = Path(__file__).parent.parent / "CONTRIBUTING.md"
MAX_LINES = 40


def example():
    """The code block of the page that defines a method."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (block,) = [block for block in blocks if "(LayerFilterAttribution)" in block]
    return block


def make(model, layer, _arguments=None):
    return Peak(model, layer)


vars(make)["name"] = "peak"  # as Captum's suites call their methods
namespace: dict[str, Any] = {}
exec(compile(example(), str(PAGE), "exec"), namespace)
Peak = namespace["LayerFilterPeak"]


def by_hand(model, layer, x, num_positions=3):
    """Mean of the largest activations (N, K) of a channels-first layer, with a plain hook."""
    outputs = []
    handle = layer.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    with torch.no_grad():
        model(x)
    handle.remove()
    ranked = outputs[0].flatten(2).sort(dim=2, descending=True).values
    return ranked[:, :, :num_positions].mean(2)


def test_it_fits_the_page():
    assert len(example().splitlines()) <= MAX_LINES


def test_its_attributions_have_the_layers_shape_and_sum_to_its_scores():
    model, x = pool_linear(), images(5)
    method = Peak(model, "1")
    attributions = method.attribute(x)
    assert attributions.shape == (5, 6, 4, 4)
    scores = method.filter_scores(attributions)
    assert torch.allclose(scores, attributions.sum((2, 3)), atol=1e-6)
    assert torch.allclose(scores, by_hand(model, model[1], x), atol=1e-6)
    assert int((attributions != 0).flatten(2).sum(2).max()) <= 3


def test_more_positions_than_there_are():
    model, x = pool_linear(), images(2, size=3)  # maps of one position
    method = Peak(model, "1")
    assert torch.allclose(method.filter_scores(method.attribute(x)), by_hand(model, model[1], x))


def test_filters_on_the_last_axis():
    plain = pool_linear()
    twin, x = ChannelsLast(plain), images(3)
    attributions = Peak(twin, "transpose", channel_dim=-1).attribute(x)
    assert attributions.shape == (3, 4, 4, 6)
    assert torch.allclose(attributions.movedim(3, 1), Peak(plain, "1").attribute(x), atol=1e-6)


@pytest.mark.parametrize("layer", ["stage1", "stage2"])
def test_identify_gives_the_class_means_of_attribute(layer):
    model, data = deep(), batches(23)
    method = Peak(model, layer, num_positions=2)
    table = method.identify(data, num_filters=2, show_progress=False)
    x, y = joined(data)
    scores = method.filter_scores(method.attribute(x)).double()
    for class_index in range(3):
        expected = scores[y == class_index].mean(0)
        assert torch.allclose(table.scores[class_index], expected, atol=1e-6)
    assert table.method == "LayerFilterPeak"
    assert table.provenance["options"] == {"num_positions": 2}


def test_it_shares_one_forward_pass_with_other_methods():
    model, data, calls = deep(), batches(23), []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    tables = identify_class_filters(
        {
            "peak": Peak(model, "stage1"),
            "frequency": LayerFilterFrequency(model, "stage2", top_k=2),
            "contribution": LayerFilterContribution(model, "stage2"),
        },
        data,
        num_filters=2,
        show_progress=False,
    )
    handle.remove()
    assert len(calls) == len(data) + 1  # of the first batch, to see whether its scores repeat
    alone = Peak(model, "stage1").identify(data, num_filters=2, show_progress=False)
    assert torch.equal(tables["peak"].scores, alone.scores)


def test_noise_tunnel_averages_it():
    model, x, noisy = pool_linear(), images(4), []
    method = Peak(model, "1")
    handle = model.register_forward_pre_hook(lambda _module, inputs: noisy.append(inputs[0]))
    smooth = NoiseTunnel(method).attribute(x, nt_samples=6, nt_samples_batch_size=2, stdevs=0.5)
    handle.remove()
    draws = torch.cat([batch.unflatten(0, (4, 2)) for batch in noisy], 1)
    assert draws.shape[1] == 6
    assert not torch.allclose(draws[:, 0], draws[:, 1])
    expected = torch.stack([method.attribute(draws[:, n]) for n in range(6)]).mean(0)
    assert torch.allclose(smooth, expected, atol=1e-6)


@contract.cases
def test_captums_generic_suites(entry):
    contract.test_a_batch_is_its_examples(make, entry)
    contract.test_noise_tunnel_without_noise(make, entry)
    contract.test_data_parallel_configurations(make, entry, "DataParallel", None)


@contract.cases
def test_its_hooks_are_removed(entry):
    model, layer, arguments = contract.prepared(entry)
    Peak(model, layer).attribute(**arguments)
    assert hooks_of(model) == 0

    def failing(*_args, **_kwargs):
        raise AssertionError("a failing module")

    layer.forward = failing
    with pytest.raises(AssertionError, match="a failing module"):
        Peak(model, layer).attribute(**arguments)
    assert hooks_of(model) == 0
