"""Decomposed heads against explicit masks, and through exports."""

import copy
import io
import logging
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captum.attr import LayerGradientXActivation
from torch import nn

from captum_classfilters import (
    ClassFilters,
    ClassScores,
    DecomposedLinear,
    LayerFilterAblation,
    LayerFilterContribution,
    LayerFilterFrequency,
    LayerFilterShapley,
    LayerSingularDirection,
    accuracy_curve,
    decompose,
    identify_class_filters,
)
from captum_classfilters.heads import find_head, replace_head
from tests.heads.common import QUIET, identified
from tests.models import batches, hooks_of, images, known, layer_at, pool_linear


class TestDecomposedLinear:
    weight = torch.arange(12.0).reshape(3, 4)
    bias = torch.tensor([1.0, 2.0, 3.0])
    mask = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1], [1, 1, 1, 1]], dtype=torch.bool)

    def head(self, **options):
        return DecomposedLinear(self.weight, self.bias, self.mask, **options)

    def test_is_the_masked_layer(self):
        x = torch.rand(5, 4)
        expected = F.linear(x, self.weight * self.mask, self.bias)
        assert torch.allclose(self.head()(x), expected)
        dense = self.head().to_dense()
        assert isinstance(dense, nn.Linear)
        assert torch.allclose(dense(x), expected)
        assert torch.equal(self.head().mask, self.mask)

    def test_only_kept_weights_are_parameters_and_learn(self):
        head = self.head()
        assert sum(parameter.numel() for parameter in head.parameters()) == 7 + 3
        head(torch.rand(5, 4)).sum().backward()
        assert head.weight.grad.shape == (7,)

    @pytest.mark.parametrize("dims", [1, 2, 3])
    def test_convolutions(self, dims):
        x = torch.rand(2, 4, *([3] * dims))
        kind = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
        kernel = (self.weight * self.mask).reshape(3, 4, *([1] * dims))
        head = self.head(convolution_dims=dims)
        assert torch.allclose(head(x), kind(x, kernel, self.bias), atol=1e-6)
        assert torch.allclose(head.to_dense()(x), head(x), atol=1e-6)

    def test_without_bias_and_with_an_empty_class(self):
        mask = self.mask.clone()
        mask[1] = False
        head = DecomposedLinear(self.weight, None, mask)
        assert head(torch.rand(2, 4))[:, 1].tolist() == [0, 0]
        assert head.to_dense().bias is None

    def test_state_dict_carries_the_indices(self):
        other = DecomposedLinear(torch.zeros(3, 4), torch.zeros(3), self.mask)
        other.load_state_dict(self.head().state_dict())
        x = torch.rand(2, 4)
        assert torch.equal(other(x), self.head()(x))
        assert {"weight", "bias", "class_index", "feature_index"} == set(other.state_dict())

    def test_bad_shapes(self):
        with pytest.raises(ValueError, match="do not fit"):
            DecomposedLinear(self.weight, None, self.mask[:, :3])
        with pytest.raises(ValueError, match="bias has shape"):
            DecomposedLinear(self.weight, torch.zeros(4), self.mask)


class TestDecompose:
    def test_equals_masking_and_leaves_the_model(self):
        model, table = identified()
        before = copy.deepcopy(model.state_dict())
        decomposed = decompose(model, table)
        x = images()
        means = model[:4](x)
        expected = F.linear(means, model[4].weight * table.selected, model[4].bias)
        assert torch.allclose(decomposed(x), expected, atol=1e-6)
        assert isinstance(model[4], nn.Linear)
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
        assert decomposed.get_parameter("0.weight") is not model.get_parameter("0.weight")

    def test_all_filters_is_the_model(self):
        model, table = identified(number=6)
        assert torch.allclose(decompose(model, table)(images()), model(images()), atol=1e-6)

    def test_decomposing_again(self):
        model, table = identified(number=4)
        again = decompose(decompose(model, table), table.select(2))
        direct = decompose(model, table.select(2))
        assert torch.allclose(again(images()), direct(images()), atol=1e-6)

    def test_dropped_means_go_into_the_bias(self):
        model, table = identified()
        means = torch.rand(6)
        folded = decompose(model, table, dropped_means=means)
        dropped = (model[4].weight * ~table.selected) @ means
        assert torch.allclose(
            folded.get_parameter("4.bias"), model.get_parameter("4.bias") + dropped, atol=1e-6
        )
        with pytest.raises(ValueError, match=r"dropped_means has shape \(5,\); expected \(6,\)"):
            decompose(model, table, dropped_means=means[:5])

    def test_last_of_several_linear_layers(self):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(2, 4, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64, 8),
            nn.ReLU(),
            nn.Linear(8, 3),
        )
        table = LayerFilterFrequency(model, "5", top_k=3).identify(
            batches(), attribute_to_layer_input=True, **QUIET
        )
        decomposed = decompose(model, table)
        x = images()
        expected = F.linear(
            model[:5](x),
            model.get_parameter("5.weight") * table.selected,
            model.get_parameter("5.bias"),
        )
        assert torch.allclose(decomposed(x), expected, atol=1e-6)
        inner = LayerFilterFrequency(model, "1", top_k=3).identify(batches(), **QUIET)
        with pytest.raises(ValueError, match=r"takes 8 features, but .* 4 filters of '1'"):
            decompose(model, inner)

    def test_flattening_head(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3))
        _, table = identified(model, number=1)
        decomposed = decompose(model, table)
        mask = table.selected.repeat_interleave(16, dim=1)
        expected = F.linear(
            model[:3](images()),
            model.get_parameter("3.weight") * mask,
            model.get_parameter("3.bias"),
        )
        assert torch.allclose(decomposed(images()), expected, atol=1e-6)

    def test_convolutional_head(self):
        torch.manual_seed(1)
        model = nn.Sequential(
            nn.Conv2d(2, 5, 3),
            nn.ReLU(),
            nn.Dropout(),
            nn.Conv2d(5, 3, 1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        ).eval()
        _, table = identified(model)
        assert table.provenance["feeds_head"] == {"name": "3", "by": "identical"}
        decomposed = decompose(model, table)
        kernel = model[3].weight * table.selected[:, :, None, None]
        expected = model[4:](F.conv2d(model[:3](images()), kernel, model.get_parameter("3.bias")))
        assert torch.allclose(decomposed(images()), expected, atol=1e-6)

    def test_a_layer_that_does_not_feed_the_head(self):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.Sigmoid(), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1)
        ).extend([nn.Flatten(), nn.Linear(4, 3)])
        _, table = identified(model, layer="0")
        with pytest.raises(ValueError, match=r"'0' does not feed the head '5'.*head='5'"):
            decompose(model, table)
        assert isinstance(decompose(model, table, head="5").get_submodule("5"), DecomposedLinear)

    def test_tables_of_unknown_origin_are_checked_on_examples(self, caplog):
        model = pool_linear()
        table = ClassFilters(torch.rand(3, 6), torch.ones(3), layer="1").select(2)
        with caplog.at_level(logging.WARNING, "captum_classfilters"):
            decompose(model, table)
        assert "pass example_inputs" in caplog.text
        decompose(model, table, example_inputs=images())
        wrong = ClassFilters(torch.rand(3, 6), torch.ones(3), layer="0").select(2)
        with pytest.raises(ValueError, match="does not feed"):
            decompose(model, wrong, example_inputs=images())
        assert hooks_of(model) == 0

    @pytest.mark.parametrize("at_input", [False, True])
    def test_maps_as_large_as_there_are_filters(self, at_input):
        """Four filters of 4 x 4 positions: which axis has the filters, the layer says."""
        model = pool_linear(filters=4)
        layer = "2" if at_input else "1"
        table = LayerFilterContribution(model, layer).identify(
            batches(), num_filters=2, attribute_to_layer_input=at_input, **QUIET
        )
        told = {key: value for key, value in table.provenance.items() if key != "feeds_head"}
        # What feeds the head is found anew, on examples.
        table = ClassFilters(table.scores, table.counts, layer=layer, provenance=told).select(2)
        expected = copy.deepcopy(model)
        with torch.no_grad():
            expected.get_parameter("4.weight").mul_(table.selected)
        found = decompose(model, table, example_inputs=images())
        assert torch.allclose(found(images()), expected(images()), atol=1e-6)

    def test_directions_are_not_filters(self):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(2, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)
        )
        table = LayerSingularDirection(model, "0").identify(batches(), num_filters=2, **QUIET)
        assert table.provenance["feeds_head"]["name"] == "3"  # the layer does
        for options in ({}, {"head": "3"}, {"example_inputs": images()}):
            with pytest.raises(
                ValueError, match=r"of '0\.directions', so its columns are not filt"
            ):
                decompose(model, table, **options)

    def test_classes_without_filters(self):
        model, table = identified()
        some = table.with_selection(table.selected & torch.tensor([[True], [False], [True]]))
        with pytest.raises(ValueError, match=r"1 class\(es\) have no selected filters \(1\)"):
            decompose(model, some)
        dense = decompose(model, some, missing="dense")
        assert torch.allclose(dense(images())[:, 1], model(images())[:, 1], atol=1e-6)
        bias = decompose(model, some, missing="bias")
        assert torch.allclose(bias(images())[:, 1], model[4].bias[1].expand(8))
        with pytest.raises(ValueError, match="missing='zero'"):
            decompose(model, some, missing="zero")  # type: ignore[arg-type]

    def test_heads_that_cannot_be_decomposed(self):
        _, table = identified()
        with pytest.raises(ValueError, match="has no linear head: it ends in Conv2d, ReLU"):
            find_head(nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU()))
        with pytest.raises(ValueError, match="is a Conv2d, which cannot be decomposed"):
            decompose(pool_linear(), table, head="0")
        with pytest.raises(ValueError, match="has 4 outputs, but class_filters has 3 classes"):
            decompose(pool_linear(classes=4), table, head="4")

    def test_replacing_keeps_the_original(self):
        model = pool_linear()
        copied = replace_head(model, "4", nn.Identity())
        assert isinstance(copied.get_submodule("4"), nn.Identity)
        assert isinstance(model[4], nn.Linear)


class TestExports:
    def test_torchscript_export_and_pickle(self):
        model, table = identified()
        decomposed, x = decompose(model, table), images()
        expected = decomposed(x)
        assert torch.allclose(torch.jit.trace(decomposed, x)(x), expected, atol=1e-6)
        assert isinstance(decomposed, nn.Sequential)
        head: Any = torch.jit.script(decomposed[4])
        assert torch.allclose(head(decomposed[:4](x)), expected, atol=1e-6)
        exported = torch.export.export(decomposed, (x,)).module()
        assert torch.allclose(exported(x), expected, atol=1e-6)
        assert torch.allclose(pickle.loads(pickle.dumps(decomposed))(x), expected)

    def test_onnx(self):
        onnxruntime = pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
        model, table = identified()
        decomposed, x = decompose(model, table), images()
        buffer = io.BytesIO()
        program = torch.onnx.export(decomposed, (x,), dynamo=True, verbose=False)
        known(program).save(buffer)  # type: ignore[arg-type]  # a path by its annotation, or a buffer
        session = onnxruntime.InferenceSession(buffer.getvalue())
        found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
        assert torch.allclose(torch.from_numpy(found), decomposed(x), atol=1e-5)


@pytest.mark.parametrize("at_input", [False, True])
@pytest.mark.parametrize(
    "method", [LayerFilterAblation, LayerFilterShapley, LayerGradientXActivation]
)
def test_tables_of_any_method_at_the_layer_that_feeds_the_head(method, at_input):
    model, data = pool_linear(), batches()
    layer = "4" if at_input else "1"
    module = model.get_submodule(layer)
    table, expected = (
        identify_class_filters(
            kind(model, module), data, num_filters=3, attribute_to_layer_input=at_input, **QUIET
        )
        for kind in (method, LayerFilterContribution)
    )
    assert table.provenance["feeds_head"] == expected.provenance["feeds_head"] != {}
    decomposed = decompose(model, table)
    weight = layer_at(decomposed, "4", DecomposedLinear).dense_weight()
    assert torch.equal(weight != 0, table.selected & (model[4].weight != 0))
    curve = accuracy_curve(model, {"own": table}, data, num_filters=[3], **QUIET)
    assert 0 <= float(curve.accuracy["own"][0]) <= 1
    before = method(model, model[0])  # which a ReLU follows
    earlier = identify_class_filters(before, data, num_filters=3, **QUIET)
    with pytest.raises(ValueError, match="The layer '0' does not feed the head '4'"):
        decompose(model, earlier)


class Ended(nn.Sequential):
    """A network that does something to its head's output."""

    end = staticmethod(lambda scores: scores)

    def forward(self, x):
        return self.end(super().forward(x))


def ended(end, dims=0):
    torch.manual_seed(0)
    front = [nn.Conv2d(2, 5, 3), nn.ReLU()]
    if not dims:
        front += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = Ended(*front, nn.Conv2d(5, 3, 1) if dims else nn.Linear(5, 3)).eval()
    model.end = end
    return model


def pooled(maps):
    return maps.relu().mean((2, 3))


IN_ORDER = {
    "a temperature": (lambda scores: scores / 3, 0),
    "a softmax": (lambda scores: scores.softmax(1), 0),
    "a clip": (lambda scores: scores.clip(-0.1, 0.1), 0),
    "a prior": (lambda scores: scores + torch.tensor([0.0, 4.0, 1.0]), 0),
    "an object": (lambda scores: {"logits": scores}, 0),
    "pooling": (pooled, 2),
}
IN_ANOTHER_ORDER = {
    "permuted": (lambda scores: scores[:, [2, 0, 1]], 0),
    "permuted, with a temperature": (lambda scores: scores[:, [0, 2, 1]] / 3, 0),
    "turned": (lambda scores: -scores, 0),
    "pooled and permuted": (lambda maps: pooled(maps)[:, [2, 0, 1]], 2),
}
METHODS = [LayerFilterContribution, LayerFilterAblation, LayerGradientXActivation]


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("name", [*IN_ORDER, *IN_ANOTHER_ORDER])
def test_a_head_in_another_order_than_the_classes_is_refused_without_a_batch(name, kind, tmp_path):
    """Row c of it is another class's, and would get the filters of class c."""
    right = name in IN_ORDER
    model = ended(*(IN_ORDER if right else IN_ANOTHER_ORDER)[name])
    data = [(torch.randn(6, 2, 5, 6), torch.arange(6) % 3) for _ in range(2)]
    table = identify_class_filters(kind(model, model[1]), data, num_filters=2, **QUIET)
    table.save(tmp_path / "table")
    for own in (table, ClassFilters.load(tmp_path / "table")):
        if right:
            small = decompose(model, own, missing="bias")
            head = layer_at(small, own.provenance["feeds_head"]["name"], DecomposedLinear)
            assert torch.equal(head.mask, own.selected)
            continue
        for given in (None, model[len(model) - 1]):
            with pytest.raises(ValueError, match="were not the scores of the classes, in their"):
                decompose(model, own, head=given)
        with pytest.raises(ValueError, match="is not the score of class"):
            decompose(model, own, example_inputs=data[0][0])


BESIDE_NORMALIZED = {
    "logit norm": lambda scores: F.normalize(scores, dim=1) / 0.04,
    "layer norm": lambda scores: F.layer_norm(scores, (3,)),
    "z-scores": lambda scores: (
        (scores - scores.mean(1, keepdim=True)) / scores.std(1, keepdim=True)
    ),
    "noise": lambda scores: scores + 3 * torch.randn_like(scores),
    "dropout": lambda scores: F.dropout(scores, 0.5, True),
    "dropout, normalized": lambda scores: F.normalize(F.dropout(scores, 0.3, True), dim=1),
    "noise and a softmax": lambda scores: (scores + torch.randn_like(scores)).softmax(1),
}
TURNS = {
    "permuted": (
        lambda scores: scores[:, [0, 2, 1]],
        r"Output [12] .* raises that of class [12]\.",
    ),
    "negated": (lambda scores: -scores, r"Output \d .* lowers that score\."),
    "one negated": (lambda scores: scores * torch.tensor([1.0, 1, -1]), "Output 2 .* class 2: it"),
}


@pytest.mark.filterwarnings("ignore:The model gives different", "ignore:Filters that lower")
@pytest.mark.parametrize("turn", [None, *TURNS])
@pytest.mark.parametrize("name", BESIDE_NORMALIZED)
def test_the_order_is_seen_behind_norms_and_noise(name, turn):
    """A class on top rises less there than one far below zero, which comes nearer to zero."""
    before, message = TURNS[turn] if turn else (lambda scores: scores, "")
    model = ended(lambda scores: BESIDE_NORMALIZED[name](before(scores)))
    with torch.no_grad():
        model[4].bias.copy_(torch.tensor([8.0, 1, -9]))
    x, y = torch.randn(18, 2, 5, 6), torch.arange(18) % 3
    table = LayerFilterContribution(model, model[1]).identify([(x, y)], num_filters=2, **QUIET)
    if turn is None:
        for given in (None, x):
            small = decompose(model, table, missing="bias", example_inputs=given)
            assert torch.equal(layer_at(small, "4", DecomposedLinear).mask, table.selected)
        return
    with pytest.raises(ValueError, match="were not the scores of the classes, in their"):
        decompose(model, table)
    general = name != "noise" and turn == "negated"  # the others rise, where scores are normalized
    with pytest.raises(ValueError, match=r"is not the score of class" if general else message):
        decompose(model, table, example_inputs=x)


@pytest.mark.filterwarnings("ignore:Filters that lower")
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("step", ["permuted", "negated"])
def test_the_advice_about_a_heads_order_works(step, wrapped):
    """The step leaves the forward, or the wrapper, and the head of the model inside gets its rows."""
    end = TURNS[step][0]
    inner = ended(lambda scores: scores)
    model = ClassScores(inner, end) if wrapped else ended(end)
    data = [(torch.randn(9, 2, 5, 6), torch.arange(9) % 3)]
    table = LayerFilterContribution(model, inner[1] if wrapped else "1").identify(data, **QUIET)
    with pytest.raises(ValueError, match=r"inner is the model without the step") as refused:
        decompose(model, table.select(2), missing="bias")
    assert "replace_head(inner, '4', layer)" in str(refused.value)
    layer = nn.Linear(5, 3)
    with torch.no_grad():
        layer.weight.copy_(end(inner[4].weight.T).T)
        layer.bias.copy_(end(inner[4].bias[None])[0])
    followed = replace_head(inner, "4", layer)
    torch.testing.assert_close(followed(data[0][0]), model(data[0][0]))
    table = LayerFilterContribution(followed, "1").identify(data, num_filters=2, **QUIET)
    assert table.provenance["feeds_head"] == {"name": "4", "by": "mean"}
    decompose(followed, table, missing="bias", example_inputs=data[0][0])


def test_a_run_that_goes_on_knows_the_order_of_the_head(tmp_path):
    model = ended(IN_ANOTHER_ORDER["permuted"][0])
    data = [(torch.randn(6, 2, 5, 6), torch.arange(6) % 3) for _ in range(4)]

    def stopped():
        yield from data[:2]
        raise KeyboardInterrupt

    method = LayerFilterContribution(model, "1")
    state = {"state_path": tmp_path / "state", **QUIET}
    with pytest.raises(KeyboardInterrupt):
        method.identify(stopped(), **state)
    table = method.identify(data, **state)
    assert table.provenance["feeds_head"]["in_order"] is False
