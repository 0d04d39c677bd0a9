"""Singular directions of one layer, and of all layers of a model."""

import json
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import prune

from captum_classfilters import ClassScores, LayerSingularDirection
from captum_classfilters.spectral import (
    direction_signals,
    layer_svd,
    model_spectra,
    model_svd,
    weight_matrix,
)
from tests.models import known

SIZES = {1: (13,), 2: (9, 8), 3: (7, 6, 5)}


def bias_of(layer):
    return 0 if layer.bias is None else layer.bias.reshape(-1, *[1] * (layer.weight.dim() - 2))


CONVOLUTIONS = [
    (kind, {"groups": groups, "stride": stride, "dilation": dilation, "bias": bias})
    for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    for groups, stride, dilation, bias in [
        (1, 1, 1, True),
        (1, 2, 2, False),
        (2, 2, 1, True),
        (4, 1, 2, True),
    ]
]


@pytest.mark.parametrize(("kind", "options"), CONVOLUTIONS)
@pytest.mark.parametrize("method", ["auto", "direct", "gram"])
def test_signals_from_outputs_are_those_from_inputs(kind, options, method):
    torch.manual_seed(0)
    layer = kind(4, 12, 3, padding=1, **options)
    images = torch.randn(3, 4, *SIZES[layer.weight.dim() - 2])
    svd = layer_svd(layer, method=method)
    with torch.no_grad():
        signals = svd.signals(layer(images) - bias_of(layer))
        expected = svd.signals_from_input(layer, images)
    assert signals.shape[1] == len(svd)
    assert (signals - expected).abs().max() < 1e-5


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", ["same", "valid", (2, 1)])
def test_any_padding(padding, padding_mode):
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, (5, 3), padding=padding, padding_mode=padding_mode, groups=2)
    images, svd = torch.randn(2, 4, 8, 9), layer_svd(layer)
    with torch.no_grad():
        signals = svd.signals(layer(images) - bias_of(layer))
        assert (signals - svd.signals_from_input(layer, images)).abs().max() < 1e-5


@pytest.mark.parametrize("kind", [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d])
@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions_too(kind, groups):
    torch.manual_seed(0)
    layer = kind(4, 6, 3, stride=2, padding=1, output_padding=1, groups=groups)
    images = torch.randn(2, 4, *SIZES[layer.weight.dim() - 2])
    svd = layer_svd(layer)
    with torch.no_grad():
        signals = svd.signals(layer(images) - bias_of(layer))
        assert (signals - svd.signals_from_input(layer, images)).abs().max() < 1e-5
    assert svd.left.shape == (6, len(svd))


@pytest.mark.parametrize("shape", [(7, 20), (20, 7), (90, 150), (150, 90), (90, 90)])
@pytest.mark.parametrize("method", ["auto", "direct", "gram"])
def test_linear_layers_of_any_aspect(shape, method):
    torch.manual_seed(0)
    layer = nn.Linear(shape[1], shape[0])
    svd = layer_svd(layer, method=method)
    weight = layer.weight.detach().double()
    assert torch.allclose(
        svd.left.double() * svd.values.double() @ known(svd.right).double(), weight, atol=1e-6
    )
    assert torch.allclose(svd.values.double(), torch.linalg.svdvals(weight), atol=2e-6)
    eye = torch.eye(min(shape))
    assert torch.allclose(svd.left.T @ svd.left, eye, atol=2e-3 if shape == (90, 90) else 1e-5)
    tokens = torch.randn(2, 5, shape[1])
    with torch.no_grad():
        signals = svd.signals(layer(tokens) - layer.bias)
        assert (signals - svd.signals_from_input(layer, tokens)).abs().max() < 1e-5


def test_a_decomposition_by_hand():
    layer = nn.Conv2d(1, 2, (1, 2), bias=False)
    layer.weight.data = torch.tensor([[0.0, -3.0], [2.0, 0.0]]).reshape(2, 1, 1, 2)
    svd = layer_svd(layer)
    assert torch.allclose(svd.values, torch.tensor([3.0, 2.0]))
    assert torch.allclose(svd.left, torch.eye(2))
    assert torch.allclose(known(svd.right).flatten(1), torch.tensor([[0.0, -1.0], [1.0, 0.0]]))


@pytest.mark.parametrize("method", ["direct", "gram", "randomized"])
def test_signs_are_fixed(method):
    torch.manual_seed(1)
    weight = torch.randn(40, 70)
    layer = nn.Linear(70, 40)
    for sign in (1, -1):
        layer.weight.data = sign * weight
        svd = layer_svd(layer, method=method, rank=5)
        largest = svd.left.gather(0, svd.left.abs().argmax(0, keepdim=True))
        assert (largest > 0).all()
        if sign == 1:
            first = svd
    assert torch.allclose(first.left, svd.left, atol=1e-4)
    assert torch.allclose(known(first.right), -known(svd.right), atol=1e-4)


def test_groups_are_decomposed_one_by_one():
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 8, 3, groups=2)
    svd = layer_svd(layer)
    for group in range(2):
        part = nn.Conv2d(3, 4, 3)
        part.weight.data = layer.weight.data[4 * group : 4 * group + 4]
        alone = layer_svd(part)
        own = slice(4 * group, 4 * group + 4)
        assert torch.allclose(svd.values[own], alone.values, atol=1e-6)
        assert torch.allclose(svd.left[own, own], alone.left, atol=1e-5)
        assert torch.allclose(known(svd.right)[own], known(alone.right), atol=1e-5)
    assert (svd.left[:4, 4:] == 0).all()
    assert svd.shape == (4, 27)
    first = svd.truncate(1)
    assert first.values.tolist() == [svd.values[0], svd.values[4]]
    assert torch.equal(first.left, svd.left[:, [0, 4]])


def test_depthwise_directions_are_the_filters():
    layer = nn.Conv2d(5, 5, 3, groups=5, bias=False)
    svd = layer_svd(layer)
    assert torch.equal(svd.left, torch.eye(5))
    assert torch.allclose(svd.values, layer.weight.detach().flatten(1).norm(dim=1))


def test_routes_are_chosen_by_size_and_reported():
    torch.manual_seed(0)
    assert layer_svd(nn.Linear(200, 64)).route == "direct"
    assert layer_svd(nn.Linear(200, 65)).route == "gram"
    large = nn.Linear(1030, 1024)
    before = torch.get_rng_state()
    svd = layer_svd(large, rank=4)
    assert svd.route == "randomized"
    assert not svd.complete
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(svd.left, layer_svd(large, rank=4).left)  # the same numbers every time
    exact = torch.linalg.svdvals(large.weight.detach())[:4]
    assert (svd.values <= exact * (1 + 1e-5)).all()
    assert (svd.values > 0.97 * exact).all()
    tokens = torch.randn(2, 1030)
    with torch.no_grad():
        signals = svd.signals(large(tokens) - large.bias)
        assert (signals - svd.signals_from_input(large, tokens)).abs().max() < 1e-5


def test_gram_route_of_a_singular_weight():
    layer = nn.Linear(100, 80)
    layer.weight.data[40:] = layer.weight.data[:40]
    svd = layer_svd(layer)
    assert svd.route == "direct, the weight being of lower rank"
    assert torch.allclose(svd.left.T @ svd.left, torch.eye(80), atol=1e-5)
    right = known(svd.right)
    assert torch.allclose(right @ right.T, torch.eye(80), atol=1e-5)
    left_only = layer_svd(layer, right=False)
    assert left_only.route == "gram"
    assert torch.allclose(left_only.left.T @ left_only.left, torch.eye(80), atol=1e-5)
    layer.weight.data.zero_()
    assert layer_svd(layer).values.sum() == 0
    square = nn.Linear(80, 80)
    square.weight.data[40:] = square.weight.data[:40]
    assert layer_svd(square, right=False).route == "gram"  # rows are the safe side


def test_precision_follows_the_weight():
    layer = nn.Linear(90, 70)
    assert layer_svd(layer.double()).left.dtype == torch.float64
    assert layer_svd(layer.bfloat16()).left.dtype == torch.float32
    signals = layer_svd(layer).signals(torch.randn(2, 70, dtype=torch.bfloat16))
    assert signals.dtype == torch.bfloat16


class TestModels:
    def net(self):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 70, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(70), nn.Flatten(),
            nn.Linear(70, 5),
        )  # fmt: skip

    def test_lazy(self):
        svds = model_svd(self.net())
        assert list(svds) == ["0", "4"]
        assert svds.routes() == {}
        assert svds["4"].left.shape == (5, 5)
        assert svds.routes() == {"4": "direct"}
        assert svds["4"] is svds["4"]
        svds.forget()
        assert svds.routes() == {}
        with pytest.raises(KeyError, match=r"'5' is not among the layers\. The names are '0', '4'"):
            svds["5"]

    @pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, ClassScores])
    def test_layers_of_wrapped_models_have_their_own_names(self, wrap):
        net = nn.Sequential(self.net()[:3], nn.Flatten(), nn.Linear(70, 5)).eval()
        wrapped, x = wrap(net), torch.randn(4, 3, 3, 3)
        svds = model_svd(wrapped, right=True)
        assert list(svds) == list(model_svd(net)) == ["0.0", "2"]
        assert [layer.name for layer in model_spectra(wrapped)] == ["0.0", "2"]
        inside = next(name for name, module in wrapped.named_modules() if module is net[2])
        assert list(model_svd(wrapped, [inside, net.get_submodule("0.0")])) == ["2", "0.0"]
        expected = LayerSingularDirection(net, "2").attribute(x, target=1)
        found = LayerSingularDirection(wrapped, "2", svds=svds).attribute(x, target=1)
        assert torch.allclose(found, expected, atol=1e-5)
        assert direction_signals(wrapped, x, ["0.0"], svds=svds)["0.0"].shape == (4, 27)

    def test_cache(self, tmp_path):
        net, folder = self.net(), tmp_path / "svds"
        first = model_svd(net, cache=folder, right=True)
        for name in first:
            assert "disk" not in first[name].route
        again = model_svd(net, cache=folder, right=True)
        for name in again:
            assert torch.equal(first[name].left, again[name].left)
            assert torch.equal(known(first[name].right), known(again[name].right))
            assert torch.equal(first[name].values, again[name].values)
            assert again[name].shape == first[name].shape
            assert again[name].route == first[name].route + ", from disk"
        assert "disk" not in model_svd(net, cache=folder)["0"].route  # without right vectors
        assert "disk" not in model_svd(net, cache=folder, rank=2, right=True)["0"].route
        net[0].weight.data[0, 0, 0, 0] += 1
        changed = model_svd(net, cache=folder, right=True)
        assert "disk" not in changed["0"].route
        assert "disk" in changed["4"].route

    def test_damaged_cache_is_replaced(self, tmp_path):
        net = self.net()
        expected = model_svd(net, cache=tmp_path)["4"]
        (file,) = tmp_path.iterdir()
        whole = file.read_bytes()
        flipped = bytearray(whole)
        flipped[-3] ^= 1  # a bit of a number, which no reader of the format sees
        for damaged in (whole[:-50], bytes(flipped), b"", b"text", whole + b"\0"):
            file.write_bytes(damaged)
            with pytest.warns(UserWarning, match=f"{file.name}.*'4' is decomposed again"):
                found = model_svd(net, cache=tmp_path)["4"]
            assert torch.equal(found.left, expected.left)
            assert "disk" not in found.route
            assert file.read_bytes() == whole  # rewritten

    def test_what_cannot_be_kept_is_not_lost(self, tmp_path, monkeypatch):
        net = self.net()
        expected = model_svd(net, cache=tmp_path)["4"]
        (file,) = tmp_path.iterdir()
        file.unlink()
        file.mkdir()
        with pytest.warns(UserWarning, match="is a folder; expected a file") as told:
            found = model_svd(net, cache=tmp_path)["4"]
        assert torch.equal(found.left, expected.left)
        assert ["is a folder" in str(warning.message) for warning in told] == [True, True]
        assert "was not kept" in str(told[1].message)

    def test_files_without_a_checksum_and_of_another_weight(self, tmp_path):
        net = self.net()
        svds = model_svd(net, cache=tmp_path)
        expected, other = svds["4"], svds["0"]
        file = next(path for path in tmp_path.iterdir() if load_file(path)["blocks"].shape[1] == 5)
        details = {"kind": "linear", "columns": expected.columns, "route": "direct"}
        details |= {"schema": "captum_classfilters/layer_svd/1"}
        tensors = {"blocks": expected.blocks, "values": expected.values}
        save_file(tensors, file, metadata={"layer_svd": json.dumps(details)})
        assert model_svd(net, cache=tmp_path)["4"].route == "direct, from disk"
        for parts in (
            {"blocks": other.blocks, "values": other.values},
            {"blocks": expected.blocks},
            {"blocks": expected.blocks, "values": -expected.values},
            {"blocks": expected.blocks / 0, "values": expected.values},
            {"blocks": expected.blocks.double(), "values": expected.values},
        ):
            save_file(parts, file, metadata={"layer_svd": json.dumps(details)})
            with pytest.warns(UserWarning, match="decomposed again"):
                assert model_svd(net, cache=tmp_path)["4"].route == "direct"

    def test_cache_that_is_a_file(self, tmp_path):
        file = tmp_path / "svds"
        file.touch()
        with pytest.raises(ValueError, match="is a file; expected a folder"):
            model_svd(self.net(), cache=file)

    def test_layers_as_modules(self):
        net = self.net()
        assert list(model_svd(net, [net[4], "0"])) == ["4", "0"]

    def test_rank_is_an_upper_bound(self):
        svds = model_svd(self.net(), rank=10)
        assert [len(svds[name]) for name in svds] == [10, 5]

    def test_attention_is_three_projections(self):
        torch.manual_seed(0)
        attention = nn.MultiheadAttention(8, 2)
        svds = model_svd(nn.Sequential(attention))
        assert list(svds) == ["0.query", "0.key", "0.value", "0.out_proj"]
        for part, name in enumerate(("0.query", "0.key", "0.value")):
            block = attention.in_proj_weight.detach()[8 * part : 8 * part + 8]
            assert torch.allclose(svds[name].values, torch.linalg.svdvals(block), atol=1e-5)
        different = nn.MultiheadAttention(8, 2, kdim=4, vdim=6)
        svds = model_svd(different)
        assert svds["key"].shape == (8, 4)
        assert svds["value"].shape == (8, 6)

    def test_bad_layers(self):
        with pytest.raises(ValueError, match="BatchNorm2d '2' has a weight of shape"):
            model_svd(self.net(), ["2"])
        with pytest.raises(ValueError, match="ReLU '1' has no weight"):
            model_svd(self.net(), ["1"])
        with pytest.raises(ValueError, match="no layer '9'"):
            model_svd(self.net(), ["9"])
        with pytest.raises(ValueError, match="layers='0'; pass a list of layers or names"):
            model_svd(self.net(), "0")
        with pytest.raises(ValueError, match="layers=empty; pass a list"):
            model_svd(self.net(), [])
        with pytest.raises(ValueError, match=r"rank=0 .* for any layer; .* from 1 up"):
            model_svd(self.net(), rank=0)
        with pytest.raises(ValueError, match="no convolution or linear layer"):
            model_svd(nn.ReLU())
        with pytest.raises(ValueError, match="method='svd'; choose one of auto"):
            model_svd(self.net(), method="svd")  # type: ignore[arg-type]
        net = self.net()
        net[4].weight.data[1, 2] = float("nan")
        with pytest.raises(ValueError, match=r"Linear '4' has 1 NaN .* first at \(1, 2\)"):
            model_svd(net)["4"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("resnet18", 21),
        ("vit_b_16", 2 + 6 * 12),
        ("convnext_tiny", None),
        ("mobilenet_v3_small", None),
        ("densenet121", None),
        ("shufflenet_v2_x0_5", None),
        ("swin_t", None),
        ("googlenet", None),
        ("regnet_y_400mf", None),
    ],
)
def test_torchvision_families(name, layers):
    options: dict[str, Any] = {"init_weights": False} if name == "googlenet" else {}
    model = torchvision.models.get_model(name, weights=None, **options)
    svds = model_svd(model)
    expected = sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules())
    expected += 3 * sum(isinstance(m, nn.MultiheadAttention) for m in model.modules())
    assert len(svds) == expected == (layers or expected)
    for layer in list(svds)[:: max(1, len(svds) // 6)]:
        matrix = svds.matrix(layer)
        energy = matrix.matrices.double().square().sum()
        assert svds[layer].values.double().square().sum() == pytest.approx(float(energy), rel=1e-5)
        assert svds[layer].num_filters == matrix.matrices.shape[0] * matrix.matrices.shape[1]


class TestBadLayers:
    def test_without_a_weight(self):
        with pytest.raises(ValueError, match="MaxPool2d has no weight of its own"):
            layer_svd(nn.MaxPool2d(2))
        with pytest.raises(ValueError, match="Sequential has no weight of its own"):
            layer_svd(nn.Sequential(nn.Linear(2, 2)))
        with pytest.raises(ValueError, match=r"Embedding has a weight of shape \(4, 3\)"):
            layer_svd(nn.Embedding(4, 3))

    @pytest.mark.parametrize("given", ["0", torch.ones(2, 2), None])
    def test_no_layer(self, given):
        with pytest.raises(ValueError, match="Expected a layer"):
            layer_svd(given)

    def test_no_values(self):
        with pytest.raises(
            ValueError, match=r"Conv2d .* \(4, 3, 3, 3\) without values, on the meta"
        ):
            layer_svd(nn.Conv2d(3, 4, 3, device="meta"))
        empty = nn.Linear(4, 2)
        empty.weight.data = empty.weight.data[:0]
        with pytest.raises(ValueError, match=r"\(0, 4\) without entries"):
            layer_svd(empty)

    def test_quantized(self):
        layer = torch.ao.nn.quantized.Conv2d(3, 4, 3)
        with pytest.raises(ValueError, match="Conv2d is quantized"):
            layer_svd(layer)

    def test_uninitialized(self):
        with pytest.raises(ValueError, match="LazyConv2d has no weight yet"):
            layer_svd(nn.LazyConv2d(4, 3))

    def test_attention(self):
        with pytest.raises(ValueError, match="`model_svd` lists its query"):
            layer_svd(nn.MultiheadAttention(4, 2))

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_not_finite(self, value):
        layer = nn.Conv2d(3, 4, 3)
        layer.weight.data[2, 1, 0, 2] = value
        with pytest.raises(ValueError, match=r"1 NaN or infinite .* first at \(2, 1, 0, 2\)"):
            layer_svd(layer)

    @pytest.mark.parametrize("rank", [0, 5, -1])
    def test_rank(self, rank):
        with pytest.raises(ValueError, match=r"not possible for Conv2d.* from 1 to 4"):
            layer_svd(nn.Conv2d(3, 4, 3), rank=rank)

    def test_rank_of_groups(self):
        with pytest.raises(ValueError, match="groups have matrices of 4 rows and 9 columns"):
            layer_svd(nn.Conv2d(2, 8, 3, groups=2), rank=5)

    def test_method_and_outputs(self):
        with pytest.raises(ValueError, match="method='svd'"):
            layer_svd(nn.Linear(3, 4), method="svd")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"of 4 filters; an output of shape \(2, 3\)"):
            layer_svd(nn.Linear(3, 4)).signals(torch.rand(2, 3))
        svd = layer_svd(nn.Linear(3, 4), right=False)
        with pytest.raises(ValueError, match="right=True"):
            svd.signals_from_input(nn.Linear(3, 4), torch.rand(2, 3))
        with pytest.raises(ValueError, match="rank=9 is not possible"):
            svd.truncate(9)


def test_pruned_and_parametrized_layers():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))
    assert torch.allclose(
        layer_svd(layer).values, torch.linalg.svdvals(layer.weight.detach()), atol=1e-6
    )
    pruned = prune.l1_unstructured(nn.Linear(6, 4), "weight", 0.5)
    assert np.count_nonzero(weight_matrix(pruned).matrices.numpy()) == 12


@pytest.mark.slow
def test_every_torchvision_classifier_is_listed_whole(monkeypatch):
    """No weight of two or more axes is missed, but tokens and tables of positions."""
    for initialize in ("kaiming_normal_", "kaiming_uniform_", "normal_", "trunc_normal_"):
        monkeypatch.setattr(
            nn.init, initialize, lambda tensor, *_, **__: tensor
        )  # no values needed
    names = torchvision.models.list_models(module=torchvision.models)
    assert len(names) >= 80
    for name in names:
        options: dict[str, Any] = (
            {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        )
        regnet = name.startswith("regnet")  # computes its widths with tensors, which meta cannot
        if regnet and not name.endswith("400mf"):
            continue
        with torch.device("cpu" if regnet else "meta"):
            model = torchvision.models.get_model(name, weights=None, **options)
        svds = model_svd(model)
        held = {id(svds.module(layer)) for layer in svds}
        missed = [
            f"{path}.{parameter}"
            for path, module in model.named_modules()
            for parameter, value in module.named_parameters(recurse=False)
            if value.dim() > 1 and id(module) not in held
        ]
        known = ("class_token", "pos_embedding", "relative_position_bias_table", "scale")
        assert not [one for one in missed if not one.endswith(known)], name
