"""Physical removal against masking, written out or by hooks on the full model."""

import copy
import warnings
from typing import Any

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from captum_classfilters import ClassFilters, prune_filters
from captum_classfilters._core.taps import hooked
from captum_classfilters.pruning import (
    ClassFilterImportance,
    GreedyFilterPruning,
    PruningOrder,
    compare_networks,
    multiply_adds,
    prunable_layers,
)
from tests.models import Layer, batches, conv_at, deep, hooks_of, images, known, layer_at

torch_pruning = pytest.importorskip("torch_pruning")


def settle(model: Layer) -> Layer:
    """Batch normalizations with shifts, so that a zeroed convolution is not a removed filter."""
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in (
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.5, 1.5),
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.5, 0.5),
            ):
                known(tensor).uniform_(low, high, generator=generator)
    return model.eval()


def masked_outputs(model, inputs, removed, at_input=False, axis=1):
    """The model's outputs with filters of some modules zeroed."""
    handles = []
    for name, places in removed.items():
        module = model.get_submodule(name)

        def hook(_owner, arguments, *output, places=places):
            tensor = (output or arguments)[0].clone()
            tensor.movedim(axis, 0)[places] = 0
            return tensor

        register = module.register_forward_pre_hook if at_input else module.register_forward_hook
        handles.append(register(hook))
    with torch.no_grad():
        outputs = model(inputs)
    for handle in handles:
        handle.remove()
    return outputs


def outputs_of(model, inputs):
    with torch.no_grad():
        return model(inputs)


def close(left, right):
    return torch.allclose(left, right, rtol=1e-5, atol=1e-5 * float(right.abs().max()))


class Residual(nn.Module):
    """A block as in ResNets: one ReLU used twice, a shortcut around two convolutions."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.conv1, self.bn1 = nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.stem(x)
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.head(self.relu(x + y).mean((2, 3)))


def test_a_plain_convolution_by_its_weights():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Conv2d(5, 3, 3), nn.Flatten()).eval()
    x = images()
    small = prune_filters(model, "0", x, keep=[0, 2, 3])
    assert torch.equal(small.get_parameter("0.weight"), model.get_parameter("0.weight")[[0, 2, 3]])
    assert torch.equal(small.get_parameter("0.bias"), model.get_parameter("0.bias")[[0, 2, 3]])
    assert torch.equal(
        small.get_parameter("2.weight"), model.get_parameter("2.weight")[:, [0, 2, 3]]
    )
    # Zero maps: nothing to fold.
    assert torch.equal(small.get_parameter("2.bias"), model.get_parameter("2.bias"))
    assert close(outputs_of(small, x), masked_outputs(model, x, {"1": [1, 4]}))
    assert model[0].out_channels == 5  # a copy was pruned


@pytest.mark.parametrize("named", ["stage1.0", "stage1.1", "stage1.2", "stage1"])
def test_masking_stands_behind_normalization_and_activation(named):
    model, x = settle(deep()), images()
    expected = masked_outputs(model, x, {"stage1.2": [1, 2]})
    assert close(outputs_of(prune_filters(model, named, x, remove=[1, 2]), x), expected)
    zeroed = masked_outputs(model, x, {"stage1.0": [1, 2]})
    assert not close(zeroed, expected)  # the batch normalization's shift is alive


@pytest.mark.parametrize("between", [lambda x: x + 1, lambda x: x.sigmoid(), nn.functional.relu])
def test_masking_stands_behind_an_activation_whatever_function_is_between(between):
    class Between(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.act = nn.Conv2d(2, 5, 3), nn.PReLU(5)
            self.last = nn.Linear(5, 3)

        def forward(self, x):
            return self.last(self.act(between(self.first(x))).mean((2, 3)))

    torch.manual_seed(0)
    model, x = Between().eval(), torch.randn(3, 2, 6, 7)
    small = prune_filters(model, "first", x, remove=[1, 4])
    keep = torch.tensor([1.0, 0, 1, 1, 0])[:, None, None]
    with hooked([model.act], lambda _module, _inputs, output: output * keep):
        torch.testing.assert_close(small(x), model(x))


def test_inner_convolution_of_a_residual_block():
    model, x = settle(Residual()), images()
    with torch.no_grad():
        stem = model.stem(x)
        inner = torch.relu(model.bn1(model.conv1(stem)))
        inner[:, [0, 5]] = 0
        expected = model.head(torch.relu(stem + model.bn2(model.conv2(inner))).mean((2, 3)))
    for layer in ("conv1", "bn1", model.conv1):
        small = prune_filters(model, layer, x, remove=[0, 5])
        assert (conv_at(small, "conv1").out_channels, conv_at(small, "conv2").in_channels) == (4, 4)
        assert close(outputs_of(small, x), expected)
    assert hooks_of(model) == 0


def test_a_filter_behind_a_flatten_takes_all_its_positions():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 3)
    ).eval()
    x = images()
    small = prune_filters(model, {"0": [True, False, True, True], "3": [0, 1, 4]}, x)
    hidden, head = (layer_at(small, name, nn.Linear) for name in ("3", "5"))
    assert (hidden.in_features, hidden.out_features, head.in_features) == (48, 3, 3)
    assert close(outputs_of(small, x), masked_outputs(model, x, {"1": [1], "4": [2, 3]}))


def family(name, **options):
    """A network whose random weights neither damp nor blow up what passes."""
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(num_classes=5, **options)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)
    for key, parameter in model.named_parameters():
        if key.endswith("layer_scale"):
            parameter.data.fill_(1.0)
    return settle(model)


def pictures(seed, size=32):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, 3, size, size, generator=generator)


# Model, layer to prune, where masking stands (a module that runs once), filters removed.
FAMILIES = {
    "ResNet": ("resnet18", "layer2.0.conv1", "layer2.0.bn1", [0, 5, 77]),
    "ResNet bottleneck": ("resnet50", "layer3.1.conv2", "layer3.1.bn2", range(0, 256, 3)),
    "SqueezeNet squeeze": (
        "squeezenet1_1",
        "features.4.squeeze",
        "features.4.squeeze_activation",
        [1, 9, 15],
    ),
    "SqueezeNet expand": (
        "squeezenet1_1",
        "features.6.expand3x3",
        "features.6.expand3x3_activation",
        range(0, 128, 2),
    ),
    "SqueezeNet block": ("squeezenet1_1", "features.7", "features.7", range(3, 256, 5)),
    "DenseNet inner": (
        "densenet121",
        "features.denseblock2.denselayer3.conv1",
        "features.denseblock2.denselayer3.relu2",
        range(0, 128, 7),
    ),
    "DenseNet growth": (
        "densenet121",
        "features.denseblock4.denselayer9",
        "features.denseblock4.denselayer9",
        [0, 3, 30],
    ),
    "MobileNet V2 expand": (
        "mobilenet_v2",
        "features.3.conv.0.0",
        "features.3.conv.0.2",
        range(0, 144, 4),
    ),
    "MobileNet V2 depthwise": (
        "mobilenet_v2",
        "features.3.conv.1.0",
        "features.3.conv.1.2",
        range(0, 144, 4),
    ),
    "MobileNet V3 before its gate": (
        "mobilenet_v3_small",
        "features.4.block.1.0",
        "features.4.block.1",
        range(0, 96, 5),
    ),
    "ConvNeXt": (
        "convnext_tiny",
        "features.3.0.block.3",
        "features.3.0.block.4",
        range(0, 768, 3),
    ),
    "VGG before flatten": ("vgg11_bn", "features.25", "features.27", [0, 4, 511]),
    "Inception branch": ("googlenet", "inception4b.branch2.1", "inception4b.branch2.1", [1, 2, 99]),
}


@pytest.mark.parametrize("case", FAMILIES)
def test_families_equal_masking(case):
    name, layer, masked, removed = FAMILIES[case]
    options: dict[str, Any] = (
        {"init_weights": True, "aux_logits": False} if name == "googlenet" else {}
    )
    model, removed = family(name, **options), list(removed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = prune_filters(model, layer, pictures(1)[:1], remove=removed)
    other = pictures(2)
    axis = -1 if name == "convnext_tiny" else 1
    expected = masked_outputs(model, other, {masked: removed}, axis=axis)
    size = float(expected.abs().max())
    assert float((outputs_of(small, other) - expected).abs().max()) < 1e-5 * size
    effect = float((outputs_of(model, other) - expected).abs().max())
    assert effect > 1e-3 * size  # the filters mattered
    before, after = (sum(p.numel() for p in one.parameters()) for one in (model, small))
    assert after < before


def test_constants_are_folded_or_dropped():
    model, removed = family("mobilenet_v2"), list(range(0, 144, 4))
    x = pictures(0)
    assert model.features[3].conv[2].bias is None
    folded = prune_filters(model, "features.3.conv.0.0", x, remove=removed)
    dropped = prune_filters(model, "features.3.conv.0.0", x, remove=removed, constants="drop")
    assert folded.get_parameter("features.3.conv.2.bias") is not None
    assert dropped.get_submodule("features.3.conv.2").bias is None
    masked = masked_outputs(model, x, {"features.3.conv.0.2": removed})
    at_readers = masked_outputs(model, x, {"features.3.conv.2": removed}, at_input=True)
    assert close(outputs_of(folded, x), masked)
    assert close(outputs_of(dropped, x), at_readers)
    assert not close(masked, at_readers)


def test_a_constant_that_padding_cuts_is_refused():
    torch.manual_seed(0)
    model = settle(
        nn.Sequential(
            nn.Conv2d(2, 4, 1),
            nn.Conv2d(4, 4, 1, groups=4),  # its bias is what is left of a filter that is zero
            nn.Conv2d(4, 3, 3, padding=1),
            nn.Flatten(),
        )
    )
    x = images()
    with pytest.raises(ValueError, match=r"'2' still reads .* padding .*constants='drop'"):
        prune_filters(model, "0", x, remove=[1])
    small = prune_filters(model, "0", x, remove=[1], constants="drop")
    assert close(outputs_of(small, x), masked_outputs(model, x, {"2": [1]}, at_input=True))


def test_values_that_one_image_does_not_show_to_vary_are_refused():
    model = family("mobilenet_v3_small")
    with pytest.raises(ValueError, match=r"'features.4.block.2.fc1' still reads values"):
        # Zero behind the gate; the gate itself goes on reading the filters before it.
        prune_filters(model, "features.4.block.2", pictures(0)[:1], remove=range(0, 96, 5))


def test_a_bias_behind_a_depthwise_convolution_by_hand():
    model = nn.Sequential(
        nn.Conv2d(1, 2, 1, bias=False),
        nn.Conv2d(2, 2, 1, groups=2),
        nn.Conv2d(2, 1, 1, bias=False),
    ).eval()
    with torch.no_grad():
        model.get_parameter("0.weight").copy_(torch.tensor([2.0, 3.0]).reshape(2, 1, 1, 1))
        model.get_parameter("1.weight").fill_(1.0)
        model.get_parameter("1.bias").copy_(torch.tensor([10.0, 100.0]))
        model.get_parameter("2.weight").copy_(torch.tensor([1.0, 5.0]).reshape(1, 2, 1, 1))
    small = prune_filters(model, "0", torch.ones(1, 1, 2, 2), remove=[1])
    # 2 x + 10 from the filter that stays, 5 * 100 from the bias behind the one that went.
    assert outputs_of(small, torch.full((1, 1, 1, 1), 7.0)).item() == 2 * 7 + 10 + 500


def test_tables_orders_and_mappings():
    model, x = settle(deep()), images()
    table = ClassFilters(
        torch.rand(3, 6, generator=torch.Generator().manual_seed(0)), torch.ones(3), layer="stage2"
    ).select(2)
    small = prune_filters(model, table, x)
    kept = table.selected.any(0)
    assert conv_at(small, "stage2.0").out_channels == int(kept.sum()) < 6
    gone = (~kept).nonzero()[:, 0].tolist()
    assert close(outputs_of(small, x), masked_outputs(model, x, {"stage2": gone}))
    order = PruningOrder({"stage1": 4}, [("stage1", 2), ("stage1", 0)])
    small = prune_filters(model, order, x)
    assert close(outputs_of(small, x), masked_outputs(model, x, {"stage1": [0, 2]}))
    both = prune_filters(model, {"stage1": order, "stage2": table}, x)
    expected = masked_outputs(model, x, {"stage1": [0, 2], "stage2": gone})
    assert close(outputs_of(both, x), expected)


def test_the_pruned_network_has_the_accuracy_that_greedy_pruning_reports():
    model, data = settle(deep(seed=2)), batches(60)
    order = GreedyFilterPruning(model, "stage1").run(data, num_filters=2, show_progress=False)
    small = prune_filters(model, order, data[0][0])
    right = sum(int((outputs_of(small, x).argmax(1) == y).sum()) for x, y in data)
    assert right / 60 == order.accuracy[-1]


@settings(deadline=None, max_examples=15)
@given(
    widths=st.tuples(*[st.integers(2, 6)] * 2),
    kernel=st.sampled_from([1, 3]),
    padding=st.sampled_from([0, 1]),
    norm=st.booleans(),
    activation=st.sampled_from([nn.ReLU, nn.GELU, nn.Sigmoid, nn.Tanh]),
    data=st.data(),
)
def test_any_mask_of_any_small_network(widths, kernel, padding, norm, activation, data):
    torch.manual_seed(0)
    first, second = widths
    norms = [nn.BatchNorm2d(first)] if norm else []
    model = settle(
        nn.Sequential(
            nn.Conv2d(2, first, 3, padding=1),
            *norms,
            activation(),
            nn.MaxPool2d(2),
            nn.Conv2d(first, second, kernel, padding=padding),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
    )
    keep = torch.tensor(data.draw(st.lists(st.booleans(), min_size=first, max_size=first)))
    x = images(3)
    if not keep.any():
        with pytest.raises(ValueError, match="Every one"):
            prune_filters(model, "0", x, keep=keep)
        return
    small = prune_filters(model, "0", x, keep=keep)
    gone = (~keep).nonzero()[:, 0].tolist()
    # A sigmoid of zero is a half: the mask stands behind the activation.
    expected = masked_outputs(model, x, {str(1 + len(norms)): gone})
    assert close(outputs_of(small, x), expected)
    assert conv_at(small, "0").out_channels == int(keep.sum())


def test_flags_stay_and_the_copy_is_free():
    model = settle(Residual()).train()
    model.bn1.eval()
    model.conv2.weight.requires_grad_(False)
    state = copy.deepcopy(model.state_dict())
    small = prune_filters(model, "conv1", images(), remove=[0])
    assert small.training
    assert not small.get_submodule("bn1").training
    assert not small.get_parameter("conv2.weight").requires_grad
    assert small.get_parameter("conv1.weight").requires_grad
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_in_place():
    model, x = settle(Residual()), images()
    conv, expected = model.conv1, prune_filters(model, "conv1", x, remove=[1, 3])
    kept = copy.deepcopy(model)
    with pytest.raises(ValueError, match="tied"):
        prune_filters(model, {"conv1": [0, 1], "conv2": [0]}, x, in_place=True)
    assert model.conv1.out_channels == 6  # an error in the second layer leaves the first
    assert torch.equal(outputs_of(model, x), outputs_of(kept, x))
    assert prune_filters(model, "conv1", x, remove=[1, 3], in_place=True) is model
    assert model.conv1 is conv
    assert (conv.out_channels, model.bn1.num_features, model.conv2.in_channels) == (4, 4, 4)
    assert torch.equal(outputs_of(model, x), outputs_of(expected, x))
    again = prune_filters(model, "conv1", x, remove=[0])
    assert conv_at(again, "conv1").out_channels == 3


def test_in_place_keeps_what_did_not_change():
    model, x = settle(Residual()), images()
    stem, head = model.stem.weight, model.head.weight
    prune_filters(model, "conv1", x, remove=[1, 3], in_place=True)
    assert model.stem.weight is stem
    assert model.head.weight is head
    assert model.conv1.weight.shape == (4, 4, 3, 3)


def test_bad_input():
    model, x = settle(Residual()), images()
    grouped = nn.Sequential(
        nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 2, 1), nn.Flatten()
    )
    normalized = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    cases: list[tuple[nn.Module, torch.Tensor, Any, dict[str, Any], str]] = [
        (model, x, "conv1", {"remove": range(6)}, "Every one of the 6 filters of 'conv1'"),
        (model, x, "stem", {"remove": [0]}, "'stem' cannot be removed: tied by a sum to 'conv2'"),
        (model, x, "bn2", {"remove": [0]}, r"made by 'conv2'\) .* tied by a sum to 'stem'"),
        (model, x, "head", {"remove": [0]}, "the model's outputs"),
        (model, x, "conv3", {"remove": [0]}, "has no layer 'conv3'. Did you mean"),
        (model, x, "zzz", {"remove": [0]}, "has no layer 'zzz'. The layers are '"),
        (model, x, "conv1", {"keep": torch.ones(5, dtype=torch.bool)}, r"\(5,\); expected \(6,\)"),
        (model, x, "conv1", {"remove": [6]}, "Filter 6 of 'conv1' is out of range"),
        (model, x, "conv1", {"remove": [-1]}, "Filter -1"),
        (model, x, "conv1", {"remove": [0.5]}, "float32"),
        (model, x, "conv1", {}, "exactly one of keep and remove"),
        (model, x, "conv1", {"keep": [1], "remove": [0]}, "exactly one of keep and remove"),
        (model, x, {}, {}, "mapping of layers to prune is empty"),
        (model, x, {"conv1": [1]}, {"keep": [1]}, "says itself"),
        (model, x, {"conv1": [1], "bn1": [0]}, {}, "given twice"),
        (model, x, "relu", {"remove": [0]}, "reached 2 times"),
        (model, x, nn.Conv2d(1, 1, 1), {"remove": [0]}, "not a layer of this Residual"),
        (model, x, "conv1", {"remove": [0], "constants": "keep"}, "constants='keep'"),
        (grouped, x, "0", {"remove": [0]}, "groups of '1'"),
        (grouped, x, "1", {"remove": [0]}, "groups of '1'"),
        (normalized, torch.rand(3, 4), "0", {"remove": [0]}, "'1' mixes its filters"),
    ]
    for network, inputs, layer, options, message in cases:
        with pytest.raises(ValueError, match=message):
            prune_filters(network, layer, inputs, **options)
    assert hooks_of(model) == 0


def test_prunable_layers_of_a_residual_block():
    layers = prunable_layers(Residual(), images())
    assert [layer.name for layer in layers] == ["stem", "conv1", "conv2", "head"]
    assert [layer.name for layer in layers.prunable] == ["conv1"]
    conv1 = layers["conv1"]
    assert (conv1.num_filters, conv1.groups, conv1.consumers) == (6, 1, ("conv2",))
    assert conv1.removed_with == ("bn1",)
    assert layers["stem"].tied_to == ("conv2",)
    assert layers["conv2"].tied_to == ("stem",)
    assert "model's outputs" in layers["head"].reason
    assert "tied by a sum to 'stem'" in str(layers)


def test_prunable_layers_of_resnet20s_kind_are_the_inner_convolutions():
    names = [layer.name for layer in prunable_layers(family("resnet18"), pictures(0)).prunable]
    assert names == [f"layer{stage}.{block}.conv1" for stage in (1, 2, 3, 4) for block in (0, 1)]
    layers = prunable_layers(family("mobilenet_v3_small"), pictures(0))
    assert layers["features.4.block.2.fc2"].reason == (
        "it is a gate of 'features.4.block.0.0'; remove the filters there"
    )


# Every layer listed as prunable is, in the families that are built most differently.
@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "squeezenet1_1", "efficientnet_b0"])
def test_listed_layers_can_be_pruned(name):
    model, x, fresh = family(name), pictures(1, 64), pictures(2, 64)
    listed = prunable_layers(model, x, show_progress=False)
    layers = listed.prunable
    assert layers
    for layer in (layers[0], layers[len(layers) // 2], layers[-1]):
        removed = [1, layer.num_filters // 2]
        small = prune_filters(model, layer.name, x, remove=removed)
        point = _behind(model, layer.name, fresh)
        expected = masked_outputs(model, fresh, {point: removed})
        size = float(expected.abs().max())
        assert float((outputs_of(small, fresh) - expected).abs().max()) < 1e-5 * size, layer.name
        assert float((outputs_of(model, fresh) - expected).abs().max()) > 1e-4 * size


def _behind(model, name, x):
    """The last of the norms and activations that take a layer's output, by the order of runs."""
    order = []
    handles = [
        module.register_forward_hook(lambda module, _i, output: order.append((module, output)))
        for module in model.modules()
        if not list(module.children())
    ]
    outputs_of(model, x)
    for handle in handles:
        handle.remove()
    names = {module: key for key, module in model.named_modules()}
    place = next(i for i, (module, _) in enumerate(order) if names[module] == name)
    kinds = (nn.BatchNorm2d, nn.ReLU, nn.ReLU6, nn.SiLU)
    while place + 1 < len(order) and isinstance(order[place + 1][0], kinds):
        place += 1
    return names[order[place][0]]


def test_what_a_shuffle_mixes_is_listed_with_its_reason():
    layers = prunable_layers(family("shufflenet_v2_x0_5"), pictures(0, 64), show_progress=False)
    assert layers["stage2.1.branch2.0"].prunable
    assert layers["stage2.1.branch2.5"].reason == (
        "its filters cannot be followed through view in 'stage2.1' (InvertedResidual)"
    )


def test_layers_that_lose_each_others_filters_are_tried_alone():
    """One factor for each filter of two layers: neither loses filters without the other."""

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(2, 6, 3), nn.Conv2d(2, 6, 3)
            self.third, self.factor = nn.Conv2d(12, 3, 1), nn.Parameter(torch.rand(6, 1, 1))

        def forward(self, x):
            maps = [torch.relu(layer(x)) * self.factor for layer in (self.first, self.second)]
            return self.third(torch.cat(maps, 1)).mean((2, 3))

    torch.manual_seed(0)
    model, x = Shared().eval(), images()
    layers = prunable_layers(model, x, show_progress=False)
    assert layers["first"].removed_with == ("second", "factor")
    assert not layers.prunable  # with one zero, the other is not
    removed = {"first": [0, 2], "second": [0, 2]}
    small = prune_filters(model, {name: [1, 3, 4, 5] for name in removed}, x)
    assert (conv_at(small, "first").out_channels, small.factor.shape) == (4, (4, 1, 1))
    assert close(outputs_of(small, x), masked_outputs(model, x, removed))


def test_a_single_filter_stays():
    model = nn.Sequential(nn.Conv2d(2, 1, 3), nn.ReLU(), nn.Conv2d(1, 3, 3), nn.Flatten()).eval()
    assert prunable_layers(model, images())["0"].reason == "it has a single filter"
    with pytest.raises(ValueError, match="Every one of the 1 filters of '0'"):
        prune_filters(model, "0", images(), remove=[0])


def test_costs_by_hand():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 2)
    ).eval()
    x = torch.rand(5, 3, 6, 6)
    small = prune_filters(model, "0", x, remove=[0, 1])
    comparison = compare_networks(model, small, x, repetitions=3)
    before, after = comparison.before, comparison.after
    assert before.multiply_adds == 8 * 27 * 16 + 128 * 2 == multiply_adds(model, x)
    assert after.multiply_adds == 6 * 27 * 16 + 96 * 2
    assert before.parameters == 8 * 28 + 16 + 128 * 2 + 2
    assert after.parameters == 6 * 28 + 12 + 96 * 2 + 2
    # float32 parameters and running statistics, and one int64 count of batches
    assert before.bytes == 4 * (before.parameters + 16) + 8
    assert after.bytes == 4 * (after.parameters + 12) + 8
    assert (before.filters, after.filters) == (10, 8)
    assert comparison.layers == {"0": (8, 6)}
    assert comparison.speed_up == before.seconds / after.seconds > 0
    assert "0: 8 -> 6" in str(comparison)
    with pytest.raises(ValueError, match="repetitions=0"):
        compare_networks(model, small, x, repetitions=0)


# -- Torch-Pruning's own pruners ------------------------------------------------------------------


def scored(layer, scores):
    return ClassFilters(torch.tensor(scores), torch.ones(len(scores)), layer=layer)


@pytest.mark.parametrize("pruner", ["BasePruner", "MetaPruner"])
@pytest.mark.parametrize("named", ["stage2", "stage2.0"])
def test_torch_prunings_pruners_remove_the_least_important(pruner, named):
    model, x = settle(deep()), images()
    full = copy.deepcopy(model)
    table = scored(named, [[9.0, 0, 0, 0, 5, 0], [0, 0, 8, 1, 0, 2], [0, 3, 0, 0, 0, 0]])
    importance = ClassFilterImportance(model, table, x)
    assert isinstance(importance, torch_pruning.importance.Importance)
    made = getattr(torch_pruning.pruner, pruner)(
        model, x, importance=importance, pruning_ratio=0.5, ignored_layers=[model.head]
    )
    made.step()
    # The largest score of each filter is 9, 3, 8, 1, 5, 2.
    assert torch.equal(
        model.get_parameter("stage2.0.weight"), full.get_parameter("stage2.0.weight")[[0, 2, 4]]
    )
    assert model.stage1[0].out_channels == 4  # a layer without a table stays
    assert close(outputs_of(model, x), masked_outputs(full, x, {"stage2": [1, 3, 5]}))


def test_importance_follows_the_pruners_steps():
    model, x = settle(deep()), images()
    full = copy.deepcopy(model)
    table = scored("stage2", [[6.0, 5, 1, 4, 2, 3]])
    importance = ClassFilterImportance(model, table, x, reduction="mean", normalize=False)
    pruner = torch_pruning.pruner.BasePruner(
        model,
        x,
        importance=importance,
        pruning_ratio=0.5,
        iterative_steps=3,
        ignored_layers=[model.head],
    )
    left = []
    for _ in range(3):
        pruner.step()
        left.append(model.stage2[0].out_channels)
    assert left == [5, 4, 3]
    assert torch.equal(
        model.get_parameter("stage2.0.weight"), full.get_parameter("stage2.0.weight")[[0, 1, 3]]
    )


def test_importance_of_chosen_classes_and_of_several_layers():
    model, x = settle(deep()), images()
    full = copy.deepcopy(model)
    one = scored("stage1", [[1.0, 2, 3, 4], [4.0, 3, 2, 1]])
    other = scored("stage2", [[1.0, 1, 1, 1, 1, 1], [6.0, 5, 4, 3, 2, 1]])
    importance = ClassFilterImportance(model, [one, other], x, classes=["1"], normalize=False)
    torch_pruning.pruner.BasePruner(
        model,
        x,
        importance=importance,
        pruning_ratio=0.4,
        global_pruning=True,
        ignored_layers=[model.head],
    ).step()
    # Of the ten filters the four with the scores 1, 1, 2, 2 of class 1 go.
    assert torch.equal(
        model.get_parameter("stage1.0.weight"), full.get_parameter("stage1.0.weight")[:2]
    )
    assert torch.equal(
        model.get_parameter("stage2.0.weight"), full.get_parameter("stage2.0.weight")[:4, :2]
    )


def test_importance_in_a_group_of_tied_layers():
    model, x = settle(Residual()), images()
    full = copy.deepcopy(model)
    importance = ClassFilterImportance(model, scored("bn2", [[4.0, 1, 3, 2]]), x)
    torch_pruning.pruner.BasePruner(
        model, x, importance=importance, pruning_ratio=0.5, ignored_layers=[model.head]
    ).step()
    assert torch.equal(model.stem.weight, full.stem.weight[[0, 2]])
    assert torch.equal(model.conv2.weight, full.conv2.weight[[0, 2]])


def test_importance_bad_input():
    model, x = settle(deep()), images()
    table = scored("stage2", [[1.0, 2, 3, 4, 5, 6]])
    cases: list[tuple[Any, dict[str, Any], str]] = [
        ([], {}, "empty"),
        (table, {"reduction": "median"}, "reduction='median'"),
        (table, {"classes": ["cat"]}, "No class named"),
        (table, {"classes": []}, "no class was given"),
        ([table, scored("stage2.0", [[1.0] * 6])], {}, "Two tables"),
        (scored("stage2", [[1.0] * 5]), {}, "has 5 filters, the layer 'stage2' 6"),
        (scored("stage3", [[1.0] * 5]), {}, "no layer 'stage3'"),
    ]
    for tables, options, message in cases:
        with pytest.raises(ValueError, match=message):
            ClassFilterImportance(model, tables, x, **options)
    importance = ClassFilterImportance(model, table, x)
    prune_filters(model, "stage2", x, remove=[0], in_place=True)
    pruner = torch_pruning.pruner.BasePruner(
        model, x, importance=importance, ignored_layers=[model.head]
    )
    with pytest.raises(ValueError, match=r"'stage2\.0' has 5 filters, .* are of 6"):
        pruner.step()


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_a_mask_of_numbers_is_not_taken_for_indices(dtype):
    """Filters 0 and 1 would be all that it names."""
    model = nn.Sequential(nn.Conv2d(2, 5, 1), nn.Conv2d(5, 3, 1))
    mask = torch.tensor([1, 0, 1, 1, 0])
    with pytest.raises(ValueError, match=r"is given 3 times; .* mask.bool\(\)"):
        prune_filters(model, "0", torch.rand(1, 2, 4, 3), keep=mask.to(dtype))
    smaller = prune_filters(model, "0", torch.rand(1, 2, 4, 3), keep=mask.bool())
    assert layer_at(smaller, "0", nn.Conv2d).out_channels == 3


def test_inference_mode_makes_no_difference():
    model = nn.Sequential(nn.Conv2d(2, 5, 1), nn.Flatten(), nn.Linear(5 * 12, 3)).eval()
    plain = prune_filters(model, "0", torch.rand(1, 2, 4, 3), remove=[1])
    with torch.inference_mode():
        x = torch.rand(2, 2, 4, 3)
        smaller = prune_filters(model, "0", x, remove=[1])
        found = smaller(x)
    assert torch.equal(found, plain(x.clone()))
    assert not any(parameter.is_inference() for parameter in smaller.parameters())
