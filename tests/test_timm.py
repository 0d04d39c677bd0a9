"""Every method on timm's image classifiers, made small and without network.

timm has maps with channels last and first in one model, normalizations that hold their activation, and
layer normalizations with forwards of their own: the axis of the filters is what is easily mistaken.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.whole_models import (
    NUM_CLASSES,
    Place,
    calibrated,
    check_decomposed,
    check_gates,
    check_identification,
    check_pruned,
    images_of,
    listed,
)
from captum_classfilters import list_filter_layers
from captum_classfilters.layers import FilterLayers

timm = pytest.importorskip("timm")
pytestmark = pytest.mark.filterwarnings(
    "ignore:Fewer filters than asked", "ignore:Filters that lower the class's logit"
)


def _made(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, pretrained=False, num_classes=NUM_CLASSES, **options)


def _mixer() -> nn.Module:
    mixer = timm.models.mlp_mixer.MlpMixer
    return mixer(num_classes=NUM_CLASSES, img_size=32, patch_size=8, num_blocks=2, embed_dim=24)


def _regnet() -> nn.Module:
    regnet = timm.models.regnet
    config = regnet.RegNetCfg(depth=8, w0=8, wa=16.0, wm=2.5, group_size=4)
    return regnet.RegNet(config, num_classes=NUM_CLASSES)


@dataclass(frozen=True)
class Family:
    """A small member, a layer in its middle, the layer before its head, and what is pruned."""

    build: Callable[[], nn.Module]
    size: int
    head: str
    middle: Place
    feeding: Place
    feeds: str | None
    prunes: tuple[str, Place] | None  # a layer whose filters go, and where they are masked
    refuses: tuple[Place, str]


_CONVOLUTIONS, _TOKENS = "tied by a sum to", "cannot be told from those of single weighted layers"
FOUR = {"depths": (1, 1, 1, 1)}
FAMILIES = {
    "ResNet": Family(
        _made("resnet10t", channels=(8, 12, 16, 24)),
        64,
        "fc",
        Place("layer2", 1),
        Place("layer4", 1),
        "mean",
        ("layer1.0.conv1", Place("layer1.0.act1", 1)),
        (Place("layer2", 1), _CONVOLUTIONS),
    ),
    "ConvNeXt": Family(
        _made("convnext_atto", dims=(8, 12, 16, 24), **FOUR),
        64,
        "head.fc",
        Place("stages.1", 1),
        Place("head.norm", 1),
        "identical",
        ("stages.0.blocks.0.mlp.fc1", Place("stages.0.blocks.0.mlp.act", 1)),
        (Place("stages.1", 1), _CONVOLUTIONS),
    ),
    "ViT": Family(
        _made("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=24),
        32,
        "head",
        Place("blocks.0", 2),
        Place("norm", 2),
        None,
        ("blocks.0.mlp.fc1", Place("blocks.0.mlp.act", 2)),
        (Place("blocks.0", 2), _TOKENS),
    ),
    "Swin": Family(
        _made(
            "swin_tiny_patch4_window7_224",
            img_size=32,
            window_size=4,
            embed_dim=12,
            depths=(1, 1),
            num_heads=(2, 2),
        ),
        32,
        "head.fc",
        Place("layers.0", 3),
        Place("norm", 3),
        "mean",
        ("layers.0.blocks.0.mlp.fc1", Place("layers.0.blocks.0.mlp.act", 2)),
        (Place("layers.1.blocks.0.attn.qkv", 2), "cannot be followed through reshape"),
    ),
    "MobileNetV3": Family(
        _made("mobilenetv3_small_050"),
        64,
        "classifier",
        Place("blocks.2", 1),
        Place("blocks.4", 1),
        None,
        ("blocks", Place("blocks", 1)),
        (Place("blocks.2", 1), _CONVOLUTIONS),
    ),
    "RegNet": Family(
        _regnet,
        64,
        "head.fc",
        Place("s2", 1),
        Place("s4", 1),
        "mean",
        ("stem", Place("stem", 1)),
        (Place("s3.b2.conv2", 1), "groups of .*which must stay equal"),
    ),
    "DenseNet": Family(
        _made("densenet121", growth_rate=8, block_config=(2, 2)),
        64,
        "classifier",
        Place("features.transition1", 1),
        Place("features", 1),
        "mean",
        ("features.transition1", Place("features.transition1", 1)),
        (Place("features", 1), "no bias can stand for"),
    ),
    "Mixer": Family(
        _mixer,
        32,
        "head",
        Place("blocks.0", 2),
        Place("norm", 2),
        "mean",
        ("blocks.0.mlp_channels.fc1", Place("blocks.0.mlp_channels.act", 2)),
        (Place("norm", 2), _CONVOLUTIONS),
    ),
    "MambaOut": Family(
        _made("mambaout_femto", dims=(8, 12, 16, 24), **FOUR),
        64,
        "head.fc",
        Place("stages.1", 3),
        Place("stages.3", 3),
        None,
        None,
        (Place("stages.0.blocks.0.fc1", 3), "cannot be followed through split"),
    ),
    "PVT v2": Family(
        _made("pvt_v2_b0", embed_dims=(8, 16, 20, 24), num_heads=(1, 2, 2, 2), **FOUR),
        64,
        "head",
        Place("stages.1.norm", 2),
        Place("stages.3", 1),
        "mean",
        ("stages.1.blocks.0.mlp.fc1", Place("stages.1.blocks.0.mlp.fc1", 2)),
        (Place("stages.2.downsample", 3), _CONVOLUTIONS),
    ),
    "LambdaNet": Family(
        _made("lambda_resnet26t", width_factor=0.125),
        64,
        "head.fc",
        Place("stages.2.1.self_attn", 1),
        Place("stages.3", 1),
        "mean",
        ("stages.0.0.conv2_kxk", Place("stages.0.0.conv2_kxk", 1)),
        (Place("stages", 1), _CONVOLUTIONS),
    ),
    "DPN": Family(
        _made(
            "dpn48b",
            num_init_features=4,
            k_r=16,
            groups=4,
            k_sec=(1, 1, 1, 1),
            inc_sec=(4, 4, 4, 4),
        ),
        64,
        "classifier",  # a convolution of one position
        Place("features.conv2_1.c1x1_c.bn.act", 1),
        Place("global_pool", 1),
        "identical",
        ("features.conv1_1", Place("features.conv1_1", 1)),
        (Place("features.conv2_1.c1x1_a", 1), "groups of .*which must stay equal"),
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
    family = FAMILIES[request.param]
    images = images_of(family.size)
    torch.manual_seed(0)
    model = calibrated(family.build(), images)
    return _Case(family, model, images, listed(model, images, family.head))


def test_the_list_knows_the_layers_and_how_they_feed_the_head(case: _Case) -> None:
    family = case.family
    for place, feeds in ((family.middle, None), (family.feeding, family.feeds)):
        row = case.layers[place.layer]
        assert (row.qualifies, row.channel_dim, row.feeds_head) == (True, place.axis, feeds)


def _shapes(model: nn.Module, images: Tensor) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    handles = []
    for name, module in model.named_modules():

        def keep(_module: nn.Module, _inputs: Any, output: Any, name: str = name) -> None:
            if isinstance(output, Tensor):
                shapes[name] = tuple(output.shape)

        handles.append(module.register_forward_hook(keep))
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return shapes


def _check_axes(model: nn.Module, sizes: tuple[int, int]) -> None:
    """Every layer's axis is one that keeps its size, whatever the size of the images."""
    images = torch.rand(2, 3, sizes[0], sizes[0])
    small, large = _shapes(model, images), _shapes(model, torch.rand(2, 3, sizes[1], sizes[1]))
    told = 0
    for row in list_filter_layers(model, images):
        before, after = small.get(row.name), large.get(row.name)
        if not row.qualifies or before is None or after is None or len(before) < 3:
            continue
        assert row.channel_dim is not None
        assert before[row.channel_dim] == after[row.channel_dim], row
        told += before[1] != after[1] or before[-1] != after[-1]
    assert told


_ANY_SIZE = [family for family in FAMILIES if family not in ("ViT", "Swin", "Mixer")]


@pytest.mark.parametrize("family", _ANY_SIZE)
def test_the_axis_of_the_filters_is_the_one_that_keeps_its_size(family: str) -> None:
    _check_axes(FAMILIES[family].build().eval(), (64, 96))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("naflexvit_base_patch16_gap", {"depth": 2, "embed_dim": 24, "num_heads": 2}),
        ("csatv2", {}),
        ("pvt_v2_b0", {}),  # 64 filters of 64 tokens
    ],
)
def test_the_axis_of_the_filters_in_models_that_mix_layouts(
    name: str, options: dict[str, Any]
) -> None:
    _check_axes(_made(name, **options)().eval(), (64, 96))


@pytest.mark.parametrize("where", ["middle", "feeding", "head"])
def test_identification(case: _Case, where: str) -> None:
    family = case.family
    places = {
        "middle": family.middle,
        "feeding": family.feeding,
        "head": Place(family.head, 1, at_input=True),
    }
    check_identification(case.model, case.images, places[where])


@pytest.mark.parametrize("where", ["middle", "feeding"])
def test_gate_space(case: _Case, where: str) -> None:
    check_gates(case.model, case.images, getattr(case.family, where))


def test_decomposed_head(case: _Case) -> None:
    family = case.family
    check_decomposed(case.model, case.images, family.head, Place(family.head, 1, at_input=True))
    if family.feeds:
        check_decomposed(case.model, case.images, family.head, family.feeding)


def test_pruned_filters(case: _Case) -> None:
    if case.family.prunes is not None:
        layer, masked_at = case.family.prunes
        check_pruned(case.model, case.images, layer, masked_at, None)


def test_filters_that_cannot_be_pruned(case: _Case) -> None:
    place, reason = case.family.refuses
    check_pruned(case.model, case.images, place.layer, place, reason)
