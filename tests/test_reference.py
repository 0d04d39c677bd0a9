"""Published numbers on public weights; skipped where the data folder is absent."""

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import TensorDataset

from benchmarks import cifar10
from benchmarks.reproduce_badola import RELEASED
from captum_classfilters import (
    LayerClassGate,
    LayerFilterContribution,
    LayerFilterFrequency,
    accuracy_curve,
    decompose,
    identify_class_filters,
    prune_filters,
    refit_head,
)
from captum_classfilters.heads import find_head, model_essentiality
from captum_classfilters.pruning import prunable_layers
from tests.models import QUIET

pytestmark = [
    pytest.mark.reference,
    pytest.mark.slow,
    pytest.mark.skipif(
        not cifar10.available(),
        reason="CIFAR-10 and the public ResNet checkpoints are absent (set CLASSFILTERS_DATA)",
    ),
]


@pytest.fixture(scope="module")
def model():
    return cifar10.pretrained(20)


@pytest.fixture(scope="module")
def train():
    return cifar10.loader("train", 8000)


@pytest.fixture(scope="module")
def test_images():
    return cifar10.loader("test")


@pytest.fixture(scope="module")
def tables(model, train):
    methods = {
        "frequency": LayerFilterFrequency(model, "layer3"),
        "contribution": LayerFilterContribution(model, "layer3"),
    }
    return identify_class_filters(methods, train, num_filters=5, **QUIET)


def test_accuracy_with_five_filters_a_class(model, tables, test_images):
    curve = accuracy_curve(model, tables, test_images, num_filters=(5,), repetitions=3, **QUIET)
    assert 100 * curve.full_accuracy == pytest.approx(91.73, abs=0.1)
    assert 100 * curve.accuracy["frequency"][0] == pytest.approx(88.7, abs=0.4)
    assert 100 * curve.accuracy["contribution"][0] >= 89.0
    assert 100 * curve.random_mean[0] < 50


def test_frequency_sets_are_the_authors(tables):
    released = torch.zeros(10, 64, dtype=torch.bool)
    for row, filters in enumerate(RELEASED):
        released[row, filters] = True
    assert (tables["frequency"].selected & released).sum() / 10 >= 4.5


def test_refitted_head(model, tables, train, test_images):
    decomposed = decompose(model, tables["contribution"])
    backbone = model.layer3[2].conv2.weight.detach().clone()
    refit_head(decomposed, train, **QUIET)
    assert torch.equal(decomposed.get_parameter("layer3.2.conv2.weight"), backbone)
    assert cifar10.accuracy(decomposed, test_images) >= 90.6  # 90.85 with all training images
    assert sum(p.numel() for p in find_head(decomposed)[1].parameters()) == 60


def test_class_filters_are_necessary_and_sufficient(model, tables):
    result = model_essentiality(
        model, tables["contribution"], cifar10.loader("test", 2000), **QUIET
    )
    assert result.at_set.mean() < 0.6 < 0.8 < result.at_complement.mean()
    assert result.random_at_set.mean() > 0.85
    assert result.random_at_complement.mean() < 0.3


def test_contributions_are_exact(model):
    images, labels = cifar10.images("test", 64)
    method = LayerFilterContribution(model, "layer3")
    attributions, delta = method.attribute(images, target=labels, return_convergence_delta=True)
    assert delta.abs().max() < 1e-4
    with torch.no_grad():
        logits = model(images).gather(1, labels[:, None])[:, 0] - model.linear.bias[labels]
    assert torch.allclose(method.filter_scores(attributions).sum(1), logits, atol=1e-4)


def test_high_gates_of_the_public_gated_network_are_its_class_filters():
    gated = cifar10.pretrained(20, "resnet20_csg_cifar10.safetensors")
    gates = load_file(cifar10.DATA / "resnet20_csg_cifar10.safetensors")["gate"]
    test = cifar10.loader("test", 2000)
    found = {}
    for descending in (True, False):
        method = LayerClassGate(gated, "layer3", gates, descending=descending)
        found[descending] = model_essentiality(
            gated, method.class_filters(num_filters=5), test, head="linear", **QUIET
        )
    # Read the right way round, five filters per class are nearly all that the network needs.
    assert found[True].at_set.mean() < 0.4
    assert found[True].at_complement.mean() > 0.85
    assert found[False].at_set.mean() > 0.8
    assert found[False].at_complement.mean() < 0.2


def test_pruned_first_convolutions_of_resnet20_equal_masking(model):
    pytest.importorskip("torch_pruning")
    dataset = cifar10.loader("test").dataset
    assert isinstance(dataset, TensorDataset)
    images = dataset.tensors[0][:64]
    listed = [layer.name for layer in prunable_layers(model, images[:2]).prunable]
    assert listed == [f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in (0, 1, 2)]
    pruned = prune_filters(model, {name: _even(model, name) for name in listed}, images[:2])
    handles = [
        model.get_submodule(name.replace("conv", "bn")).register_forward_hook(_odd_zeroed)
        for name in listed
    ]
    with torch.no_grad():
        masked, found = model(images), pruned(images)
    for handle in handles:
        handle.remove()
    assert torch.allclose(found, masked, rtol=1e-5, atol=1e-5 * float(masked.abs().max()))


def _even(model, name):
    return torch.arange(model.get_submodule(name).out_channels) % 2 == 0


def _odd_zeroed(_module, _inputs, output):
    return output * (torch.arange(output.shape[1]) % 2 == 0).reshape(1, -1, 1, 1)
