"""Every method on Hugging Face's image classifiers, from small configurations and without network.

They return objects, their blocks hand on tuples and objects, and modules are called by names.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.whole_models import (
    LABELS,
    NUM_CLASSES,
    Place,
    batches,
    calibrated,
    check_decomposed,
    check_gates,
    check_identification,
    check_pruned,
    images_of,
    listed,
)
from captum_classfilters import (
    LayerFilterContribution,
    LayerFilterFrequency,
    list_filter_layers,
)
from captum_classfilters.layers import FilterLayers

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings(
    "ignore:Fewer filters than asked", "ignore:Filters that lower the class's logit"
)


@dataclass(frozen=True)
class Family:
    """A small member, a layer in its middle, the layer that feeds its head, and what is pruned."""

    config: str
    options: dict[str, Any]
    head: str
    middle: Place
    feeding: Place
    feeds: str | None  # how it feeds the head; None where only the head's input is that
    prunes: str  # the layer whose filters go ...
    masked_at: Place  # ... and where they are zero in the network that is not pruned
    refuses: tuple[str, str]  # a layer whose filters cannot go, and what is said of it


FAMILIES = {
    "ResNet": Family(
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"},
        "classifier.1",
        Place("resnet.encoder.stages.0", 1),
        Place("resnet.encoder", 1),  # puts out an object
        "mean",
        "resnet.encoder.stages.0.layers.0.layer.0",
        Place("resnet.encoder.stages.0.layers.0.layer.0", 1),
        ("resnet.encoder", "tied by a sum to .*shortcut.convolution"),
    ),
    "ConvNeXt": Family(
        "ConvNextConfig",
        {"hidden_sizes": [8, 12], "depths": [1, 1], "num_stages": 2},
        "classifier",
        Place("convnext.encoder.stages.0", 1),  # 8 filters of 8 x 8, blocks between linear layers
        Place("convnext.layernorm", 1),
        "identical",
        "convnext.encoder.stages.0.layers.0.pwconv1",
        Place("convnext.encoder.stages.0.layers.0.act", 3),
        ("convnext.encoder.stages.0", "tied by a sum to .*pwconv2"),
    ),
    "ViT": Family(
        "ViTConfig",
        {
            "hidden_size": 12,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 20,
            "image_size": 32,
            "patch_size": 8,
        },
        "classifier",
        Place("vit.layers.0.attention", 2),  # puts out a tuple with None
        Place("vit", 2),  # puts out an object; the head sees one token
        None,
        "vit.layers.0.mlp.fc1",
        Place("vit.layers.0.mlp.activation_fn", 2),
        ("vit", "cannot be told from those of single weighted layers"),
    ),
    "Swin": Family(
        "SwinConfig",
        {
            "embed_dim": 8,
            "depths": [1, 1],
            "num_heads": [2, 2],
            "window_size": 4,
            "image_size": 32,
        },
        "classifier",
        Place("swin.encoder.layers.0.blocks.0", 2),  # puts out a tuple of one
        Place("swin.layernorm", 2),
        "mean",
        "swin.encoder.layers.0.blocks.0.mlp.fc1",
        Place("swin.encoder.layers.0.blocks.0.mlp.activation_fn", 2),
        ("swin.encoder.layers.1.blocks.0.attention.q_proj", "cannot be followed through view"),
    ),
    "RegNet": Family(
        "RegNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "groups_width": 4},
        "classifier.1",
        Place("regnet.encoder.stages.0", 1),
        Place("regnet.encoder", 1),
        "mean",
        "regnet.embedder.embedder",
        Place("regnet.embedder.embedder", 1),
        ("regnet.encoder.stages.0.layers.0.layer.1", "groups of .*which must stay equal"),
    ),
    "MobileNetV2": Family(
        "MobileNetV2Config",
        {"depth_multiplier": 0.1, "depth_divisible_by": 4, "finegrained_output": False},
        "classifier",
        Place("mobilenet_v2.layer.5.reduce_1x1", 1),
        Place("mobilenet_v2.conv_1x1", 1),
        "identical",  # one position
        "mobilenet_v2.layer.12.expand_1x1",
        Place("mobilenet_v2.layer.12.expand_1x1", 1),
        ("mobilenet_v2.layer.5.reduce_1x1", "tied by a sum to"),
    ),
}


@dataclass
class _Case:
    family: Family
    model: nn.Module
    images: Tensor
    layers: FilterLayers


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest) -> _Case:
    family, images = FAMILIES[request.param], images_of(32)
    config = getattr(transformers, family.config)(num_labels=NUM_CLASSES, **family.options)
    torch.manual_seed(0)
    model = transformers.AutoModelForImageClassification.from_config(config)
    model = calibrated(model, images)
    return _Case(family, model, images, listed(model, images, family.head))


def _places(family: Family) -> list[Place]:
    return [family.middle, family.feeding, Place(family.head, 1, at_input=True)]


def test_the_list_knows_the_layers_and_how_they_feed_the_head(case: _Case) -> None:
    family = case.family
    for place, feeds in ((family.middle, None), (family.feeding, family.feeds)):
        row = case.layers[place.layer]
        assert (row.qualifies, row.channel_dim, row.feeds_head) == (True, place.axis, feeds)
    assert bool(case.layers.feeding_head) == (family.feeds is not None)


@pytest.mark.parametrize("index", range(3))
def test_identification(case: _Case, index: int) -> None:
    check_identification(case.model, case.images, _places(case.family)[index])


@pytest.mark.parametrize("index", range(2))
def test_gate_space(case: _Case, index: int) -> None:
    check_gates(case.model, case.images, _places(case.family)[index])


def test_decomposed_head(case: _Case) -> None:
    family = case.family
    check_decomposed(case.model, case.images, family.head, _places(family)[2])
    if family.feeds:
        check_decomposed(case.model, case.images, family.head, family.feeding)


def test_pruned_filters(case: _Case) -> None:
    family = case.family
    check_pruned(case.model, case.images, family.prunes, family.masked_at, None)


def test_filters_that_cannot_be_pruned(case: _Case) -> None:
    layer, reason = case.family.refuses
    row = case.layers[layer]
    assert row.shape is not None
    # Of larger images a row is a window, so that the list has no axis for such a layer.
    axis = len(row.shape) - 1 if row.channel_dim is None else row.channel_dim
    check_pruned(case.model, case.images, layer, Place(layer, axis), reason)


def test_blocks_of_two_tensors_are_named_as_such() -> None:
    config = transformers.ViTConfig(
        num_labels=NUM_CLASSES, attn_implementation="eager", **FAMILIES["ViT"].options
    )
    model = transformers.AutoModelForImageClassification.from_config(config).eval()
    images = images_of(32)
    row = list_filter_layers(model, images)["vit.layers.0.attention"]
    assert (row.qualifies, row.reason) == (False, "puts out a tuple, not one tensor")
    method = LayerFilterContribution(model, "vit.layers.0.attention")
    with pytest.raises(ValueError, match=r"handles a tuple .*not a single tensor"):
        method.identify(batches(images), show_progress=False)
    frequency = LayerFilterFrequency(model, "vit.layers.0.attention")
    tensors = frequency.attribute(images)  # single images take layers of several tensors
    assert [tuple(tensor.shape) for tensor in tensors] == [(6, 17, 12), (6, 2, 17, 17)]


def test_binary_classifiers_of_one_logit() -> None:
    family = FAMILIES["ResNet"]
    config = transformers.ResNetConfig(num_labels=1, **family.options)
    torch.manual_seed(0)
    model = transformers.AutoModelForImageClassification.from_config(config)
    images = images_of(32)
    model = calibrated(model, images)
    data = [{"pixel_values": images, "labels": LABELS % 2}]
    table = LayerFilterContribution(model, "resnet.encoder").identify(data, show_progress=False)
    assert table.scores.shape == (2, 12)
    assert table.provenance["exact"] is True
