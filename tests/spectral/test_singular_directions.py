"""Evidence along singular directions, their signals, and the model in which they are filters."""

import copy

import pytest
import torch
import torchvision
from torch import nn

import captum_classfilters
from captum_classfilters import (
    ClassScores,
    FilterGate,
    LayerFilterAblation,
    LayerFilterContribution,
    LayerSingularDirection,
    identify_class_filters,
)
from captum_classfilters._core.layers import find_layer
from captum_classfilters._core.units import Aggregate
from captum_classfilters.gates import masking_test
from captum_classfilters.spectral import (
    FactoredLayer,
    direction_signals,
    factor_layer,
    layer_svd,
    model_svd,
)
from tests.models import (
    QUIET,
    TwoInputs,
    TwoTensors,
    batches,
    deep,
    hooks_of,
    images,
    joined,
    known,
)


def in_place():
    """Convolutions without normalization whose ReLU overwrites their output."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 8, 3, stride=2, groups=2),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    ).eval()


def outputs_of(model, x):
    """Outputs of all convolutions and linear layers, computed without hooks."""
    kept = {}
    for name, module in model.named_children():
        x = module(x.clone())
        if hasattr(module, "weight"):
            kept[name] = x.detach().clone()
    return kept


def without_bias(output, layer, axis=1):
    return output.movedim(axis, -1).sub(layer.bias.detach()).movedim(-1, axis)


def test_public_name():
    assert captum_classfilters.LayerSingularDirection is LayerSingularDirection


class TestSignals:
    def test_are_projections_of_outputs_before_the_relu_overwrites_them(self):
        model, x = in_place(), images()
        kept = outputs_of(model, x)
        maps = direction_signals(model, x, aggregate=None)
        assert list(maps) == ["0", "2", "6"]
        for name, signals in maps.items():
            layer = model.get_submodule(name)
            left = layer_svd(layer).left
            expected = torch.einsum("dr,nd...->nr...", left, without_bias(kept[name], layer))
            assert torch.allclose(signals, expected, atol=1e-5)
            assert torch.allclose(
                LayerSingularDirection(model, name).signals(x), expected, atol=1e-5
            )

    @pytest.mark.parametrize("name", ["0", "2", "6"])
    def test_aggregates(self, name):
        model, x = in_place(), images()
        maps = direction_signals(model, x, [name], aggregate=None)[name]
        maps = maps.reshape(len(x), maps.shape[1], -1)
        expected: dict[Aggregate, torch.Tensor] = {
            "mean": maps.mean(2),
            "max": maps.amax(2),
            "min": maps.amin(2),
            "abs_mean": maps.abs().mean(2),
            "l2": maps.square().sum(2).sqrt(),
        }
        for aggregate, values in expected.items():
            found = direction_signals(model, x, [name], aggregate=aggregate)[name]
            assert torch.allclose(found, values, atol=1e-5), aggregate

    def test_tokens(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 7), nn.GELU(), nn.Linear(7, 7))
        x = torch.randn(3, 5, 4)
        maps = direction_signals(model, x, ["0"], aggregate=None)["0"]
        assert maps.shape == (3, 5, 4)  # four directions of a 7 x 4 weight
        mean = direction_signals(model, x, ["0"])["0"]
        assert torch.allclose(mean, maps.mean(1), atol=1e-6)

    def test_given_decompositions_and_layers_that_do_not_run(self):
        model, x = in_place(), images()
        svds = model_svd(model, rank=2)
        assert direction_signals(model, x, svds=svds)["0"].shape == (len(x), 2)
        plain = {"6": layer_svd(model[6])}
        assert list(direction_signals(model, x, svds=plain)) == ["6"]
        with pytest.raises(ValueError, match="no decomposition of '0'"):
            direction_signals(model, x, ["0", "6"], svds=plain)
        with pytest.raises(ValueError, match="aggregate='median'; choose one of 'mean', 'max'"):
            direction_signals(model, x, aggregate="median")  # type: ignore[arg-type]

        class Unused(nn.Module):
            def __init__(self):
                super().__init__()
                self.used, self.unused, self.twice = (nn.Linear(3, 3) for _ in range(3))

            def forward(self, x):
                return self.twice(self.twice(self.used(x)))

        assert list(direction_signals(Unused(), torch.rand(2, 3))) == ["used"]
        with pytest.raises(ValueError, match="'unused' was never reached"):
            direction_signals(Unused(), torch.rand(2, 3), ["unused"])
        with pytest.raises(ValueError, match="'twice' was reached 2 times"):
            direction_signals(Unused(), torch.rand(2, 3), ["twice"])

    def test_projections_have_no_signals(self):
        class Attends(nn.Module):
            def __init__(self):
                super().__init__()
                self.embed, self.attention = nn.Linear(3, 4), nn.MultiheadAttention(4, 2)

            def forward(self, x):
                x = self.embed(x)
                return self.attention(x, x, x)[0]

        model, x = Attends(), torch.rand(2, 5, 3)
        assert list(direction_signals(model, x, svds=model_svd(model))) == ["embed"]
        assert list(direction_signals(model, x, [model.embed])) == ["embed"]
        given = direction_signals(model, x, [model.embed], svds=model_svd(model))
        assert list(given) == ["embed"]
        with pytest.raises(ValueError, match=r"'attention.query' is a projection inside"):
            direction_signals(model, x, ["embed", "attention.query"])

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["resnet18", "vit_b_16", "convnext_tiny", "mobilenet_v2"])
    def test_torchvision_families(self, name):
        torch.manual_seed(0)
        model = torchvision.models.get_model(name, weights=None).eval()
        svds = model_svd(model)
        layers = [key for key in svds if key.rpartition(".")[2] not in ("query", "key", "value")]
        layers = [key for key in layers if not key.endswith("out_proj")][:: len(layers) // 4]
        x = torch.rand(2, 3, 224, 224)
        inputs: dict[str, torch.Tensor] = {}
        handles = [
            model.get_submodule(key).register_forward_pre_hook(
                lambda _m, args, key=key: inputs.__setitem__(key, args[0].clone())
            )
            for key in layers
        ]
        maps = direction_signals(model, x, layers, aggregate=None)
        for handle in handles:
            handle.remove()
        for key in layers:
            module = model.get_submodule(key)
            with torch.no_grad():
                expected = layer_svd(module).signals_from_input(module, inputs[key])
            assert (maps[key] - expected).abs().max() < 1e-5 * max(1, float(expected.abs().max()))


class TestEvidence:
    def test_signals_sum_to_their_mean(self):
        model, x = in_place(), images()
        method = LayerSingularDirection(model, "2")
        scores = method.filter_scores(method.attribute(x, target=1))
        assert torch.allclose(scores, direction_signals(model, x, ["2"])["2"], atol=1e-6)

    @pytest.mark.parametrize("name", ["0", "2", "6"])
    def test_contributions_by_the_chain_rule(self, name):
        model, x = in_place(), images()
        layer = model.get_submodule(name)
        rest = copy.deepcopy(model)
        kept = outputs_of(model, x)[name].requires_grad_()
        value = kept.clone()
        for module in list(rest)[int(name) + 1 :]:
            value = module(value)
        (gradient,) = torch.autograd.grad(value[:, 2].sum(), kept)
        left = layer_svd(layer).left
        project = lambda y: torch.einsum("dr,nd...->nr...", left, y)  # noqa: E731
        expected = project(without_bias(kept.detach(), layer)) * project(gradient)
        method = LayerSingularDirection(model, name, evidence="contribution")
        found = method.attribute(x, target=2)
        assert torch.allclose(found, expected, atol=1e-6)
        whole = (without_bias(kept.detach(), layer) * gradient).flatten(1).sum(1)
        assert torch.allclose(found.flatten(1).sum(1), whole, atol=1e-5)

    def test_contributions_at_a_linear_head_are_exact(self):
        model, x = in_place(), images()
        method = LayerSingularDirection(model, "6", evidence="contribution")
        logits = model(x)[:, 1] - model[6].bias[1]
        assert torch.allclose(method.attribute(x, target=1).sum(1), logits, atol=1e-5)

    def test_are_those_of_the_factored_model(self):
        model, x = in_place(), images()
        targets = torch.arange(len(x)) % 3
        for name in ("0", "2"):
            found = LayerSingularDirection(model, name, evidence="contribution").attribute(
                x, target=targets
            )
            factored = factor_layer(model, name)
            expected = LayerFilterContribution(factored, f"{name}.directions").attribute(
                x, target=targets
            )
            assert torch.allclose(found, expected, atol=1e-6)

    def test_several_layers_ranks_and_inputs(self):
        model, x = in_place(), images()
        both = LayerSingularDirection(model, ["0", "2"], rank=2).attribute(x)
        assert [part.shape[1] for part in both] == [2, 4]  # two groups
        whole = LayerSingularDirection(model, "0").attribute(x)
        assert torch.allclose(both[0], whole[:, :2], atol=1e-7)
        two = TwoInputs()
        method = LayerSingularDirection(two, "conv", evidence="contribution")
        left, right = torch.rand(2, 3, 2, 5, 5)
        found = method.attribute((left, right), target=0, additional_forward_args=(2.0,))
        assert found.shape == (3, 4, 3, 3)

    def test_a_changed_weight_is_decomposed_again(self):
        model, x = in_place(), images()
        method = LayerSingularDirection(model, "0")
        first = method.attribute(x)
        assert method.svd() is method.svd("0")
        with torch.no_grad():
            model[0].weight.mul_(torch.arange(1.0, 7).reshape(6, 1, 1, 1))
        fresh = LayerSingularDirection(model, "0").attribute(x)
        assert torch.equal(method.attribute(x), fresh)
        assert not torch.allclose(first, fresh)

    def test_given_decompositions(self, tmp_path):
        model, x = in_place(), images()
        svds = model_svd(model, cache=tmp_path)
        given = LayerSingularDirection(model, "0", svds=svds, rank=2)
        assert torch.allclose(
            given.attribute(x), LayerSingularDirection(model, "0", rank=2).attribute(x), atol=1e-7
        )
        with pytest.raises(ValueError, match="no decomposition of '0'"):
            LayerSingularDirection(model, "0", svds={})

    def test_bad_input(self):
        model, x = in_place(), images()
        with pytest.raises(ValueError, match="evidence='gradient'"):
            LayerSingularDirection(model, "0", evidence="gradient")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="ReLU '1' has no weight"):
            LayerSingularDirection(model, "1")
        with pytest.raises(ValueError, match="no layer '9'"):
            LayerSingularDirection(model, "9")
        with pytest.raises(ValueError, match=r"rank=7 is not possible for the layer '0', 6 x 18"):
            LayerSingularDirection(model, "0", rank=7)
        with pytest.raises(ValueError, match="directions combine a layer's outputs"):
            LayerSingularDirection(model, "0").attribute(x, attribute_to_layer_input=True)
        with pytest.raises(ValueError, match="'x' is not one of the layers 0"):
            LayerSingularDirection(model, "0").svd("x")
        with pytest.raises(AssertionError):
            LayerSingularDirection(model, "0", evidence="contribution").attribute(x)
        model[0].weight.data[0, 0, 0, 0] = float("nan")
        with pytest.raises(ValueError, match="Conv2d '0' has 1 NaN"):
            LayerSingularDirection(model, "0")

    def test_hooks_are_gone(self):
        model = in_place()
        before = hooks_of(model)
        LayerSingularDirection(model, "0", evidence="contribution").attribute(images(), target=0)
        LayerSingularDirection(model, "0").attribute(images())
        direction_signals(model, images())
        assert hooks_of(model) == before


class TestTables:
    def test_table_is_the_mean_over_each_class(self):
        model = deep()
        method = LayerSingularDirection(model, "stage2.0", evidence="contribution")
        table = method.identify(batches(), num_filters=2, **QUIET)
        assert table.layer == "stage2.0.directions"
        assert table.method == "LayerSingularDirection"
        assert table.provenance["options"]["evidence"] == "contribution"
        each = [method.filter_scores(method.attribute(x, target=y)) for x, y in batches()]
        scores, labels = torch.cat(each).double(), joined(batches())[1]
        for row in range(3):
            assert torch.allclose(table.scores[row], scores[labels == row].mean(0), atol=1e-6)

    def test_beside_other_methods(self):
        model = deep()
        tables = identify_class_filters(
            {
                "directions": LayerSingularDirection(model, "stage2.0"),
                "filters": LayerFilterContribution(model, "stage2"),
            },
            batches(),
            num_filters=2,
            **QUIET,
        )
        assert tables["directions"].layer == "stage2.0.directions"
        assert tables["filters"].layer == "stage2"

    def test_table_goes_to_the_factored_model(self):
        model = deep()
        table = LayerSingularDirection(model, "stage2.0", evidence="contribution").identify(
            batches(), num_filters=2, **QUIET
        )
        factored = factor_layer(model, "stage2.0")
        result = masking_test(factored, table.layer, table, batches(), mode="keep", **QUIET)
        assert result.recall.shape == (3, 3)
        with pytest.raises(ValueError, match=r"no layer 'stage2.0.directions'"):
            masking_test(model, table.layer, table, batches(), **QUIET)


class TestFactoredLayer:
    LAYERS = (
        nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2),
        nn.Conv2d(4, 6, 3, padding="same", padding_mode="circular"),
        nn.Conv1d(4, 6, 3, bias=False),
        nn.Conv3d(4, 20, 1),
        nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2),
        nn.ConvTranspose1d(4, 6, 2, bias=False),
        nn.Linear(4, 9),
        nn.Linear(4, 2, bias=False),
    )

    @pytest.mark.parametrize("layer", LAYERS, ids=lambda one: str(one).replace(" ", ""))
    def test_is_equal(self, layer):
        torch.manual_seed(0)
        shape = (2, 4, *[8] * (layer.weight.dim() - 2)) if layer.weight.dim() > 2 else (2, 3, 4)
        x = torch.randn(shape)
        factored = FactoredLayer(layer)
        assert torch.allclose(factored(x), layer(x), atol=1e-5)
        assert factored.directions.bias is None
        signals = layer_svd(layer).signals_from_input(layer, x)
        assert torch.allclose(factored.directions(x), signals, atol=1e-5)

    def test_model_is_copied(self):
        model, x = in_place(), images()
        state = copy.deepcopy(model.state_dict())
        factored = factor_layer(model, model[2])
        assert torch.allclose(factored(x), model(x), atol=1e-5)
        with torch.no_grad():
            for parameter in factored.parameters():
                parameter.add_(1)
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
        assert isinstance(model[2], nn.Conv2d)
        assert isinstance(factored.get_submodule("2"), FactoredLayer)
        assert not factored.get_submodule("2").training

    @pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, ClassScores])
    def test_layers_inside_of_wrapped_models(self, wrap):
        model, x = nn.Sequential(in_place()).eval(), images()
        for layer in ("0.2", model.get_submodule("0.2")):
            factored = factor_layer(wrap(model), layer)
            assert isinstance(find_layer(factored, "0.2"), FactoredLayer)
            assert torch.allclose(factored(x), model(x), atol=1e-5)
        for attention in (nn.MultiheadAttention(4, 2), nn.Sequential(nn.MultiheadAttention(4, 2))):
            name = "out_proj" if isinstance(attention, nn.MultiheadAttention) else "0.out_proj"
            with pytest.raises(ValueError, match="belongs to a MultiheadAttention"):
                factor_layer(wrap(attention), name)

    def test_gates_and_ablation_of_directions(self):
        model, x = in_place(), images()
        factored = factor_layer(model, "0")
        svd = layer_svd(model[0])
        gates = torch.ones(1, 6)
        gates[0, 3] = 0
        direct = copy.deepcopy(model)  # the same direction taken out of the weight by hand
        with torch.no_grad():
            removed = svd.values[3] * torch.outer(svd.left[:, 3], known(svd.right)[3].flatten())
            direct[0].weight.sub_(removed.reshape(direct[0].weight.shape))
        gate = FilterGate(factored, "0.directions")
        assert torch.allclose(gate(gates, x), direct(x), atol=1e-5)
        drop = LayerFilterAblation(factored, "0.directions")
        scores = drop.filter_scores(drop.attribute(x, target=1))
        assert torch.allclose(scores[:, 3], (model(x) - direct(x))[:, 1], atol=1e-5)

    def test_low_rank_is_the_best_approximation(self):
        model = in_place()
        factored = factor_layer(model, "0", rank=2)
        combination, directions = (
            factored.get_parameter(f"0.{name}.weight").flatten(1)
            for name in ("combination", "directions")
        )
        product = combination @ directions
        error = (product - model[0].weight.flatten(1)).norm().detach()
        values = torch.linalg.svdvals(model[0].weight.detach().flatten(1))
        assert float(error) == pytest.approx(float(values[2:].norm()), rel=1e-4)

    def test_bad_input(self):
        model = nn.Sequential(nn.MultiheadAttention(4, 2))
        with pytest.raises(ValueError, match="belongs to a MultiheadAttention"):
            factor_layer(model, "0.out_proj")
        with pytest.raises(ValueError, match="ReLU has no weight"):
            factor_layer(in_place(), "1")
        with pytest.raises(ValueError, match="no layer 'x'"):
            factor_layer(in_place(), "x")
        linear = nn.Linear(2, 2)
        with pytest.raises(ValueError, match="the whole model"):
            factor_layer(linear, linear)
        with pytest.raises(ValueError, match="rank=99"):
            factor_layer(in_place(), "0", rank=99)

    def test_layers_of_several_tensors(self):
        with pytest.raises(ValueError, match="has no weight"):
            LayerSingularDirection(TwoTensors(), "split")
