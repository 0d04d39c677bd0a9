"""Identification: the table against explicit formulas, one pass, bad input."""

import math

import numpy as np
import pytest
import torch
from captum.attr import (
    LayerActivation,
    LayerConductance,
    LayerDeepLift,
    LayerFeatureAblation,
    LayerGradCam,
    LayerGradientXActivation,
    LayerIntegratedGradients,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from captum_classfilters import (
    ClassScores,
    LayerFilterAblation,
    LayerFilterContribution,
    LayerFilterFrequency,
    identify_class_filters,
)
from captum_classfilters.identify import ClassFilterSums, collect_evidence, collect_features
from tests.models import (
    QUIET,
    ChannelsLast,
    Reused,
    TwoInputs,
    TwoTensors,
    batches,
    deep,
    hooks_of,
    images,
    joined,
    known,
    pool_linear,
)


def means_of(model, layer, x):
    with torch.no_grad():
        for name, module in model.named_children():
            x = module(x)
            if name == layer:
                return x.mean((2, 3))
    raise KeyError(layer)


class TestExactness:
    def test_frequency_is_the_papers_histogram(self):
        model, data = pool_linear(), batches()
        x, y = joined(data)
        found = LayerFilterFrequency(model, "1", top_k=2).identify(data, **QUIET)
        z = means_of(model, "1", x).numpy()
        histogram = np.zeros((3, 6))
        for row, label in zip(z, y.tolist(), strict=True):
            histogram[label, np.argsort(-row, kind="stable")[:2]] += 1
        counts = np.bincount(y.numpy())
        assert found.counts.tolist() == counts.tolist()
        np.testing.assert_array_equal(found.scores.numpy() * counts[:, None], histogram)
        assert found.selected.sum(1).tolist() == [2, 2, 2]

    def test_contribution_is_the_mean_of_activation_times_weight(self):
        model, data = pool_linear(), batches()
        x, y = joined(data)
        found = LayerFilterContribution(model, "1").identify(data, **QUIET)
        each = means_of(model, "1", x) * model.get_parameter("4.weight").detach()[y]
        for class_ in range(3):
            own = each[y == class_].double()
            assert torch.allclose(found.scores[class_], own.mean(0), atol=1e-7)
            error = own.std(0) / len(own) ** 0.5
            assert torch.allclose(known(found.standard_errors)[class_], error, atol=1e-7)

    def test_inner_layer_equals_attribute(self):
        model, data = deep(), batches()
        x, y = joined(data)
        method = LayerFilterContribution(model, "stage1")
        found = method.identify(data, **QUIET)
        each = method.filter_scores(method.attribute(x, target=y)).double()
        for class_ in range(3):
            assert torch.allclose(found.scores[class_], each[y == class_].mean(0), atol=1e-6)

    @settings(max_examples=15, deadline=None)
    @given(st.integers(1, 24))
    def test_batches_do_not_matter(self, batch_size):
        model = pool_linear()
        methods = [LayerFilterFrequency(model, "1", top_k=2), LayerFilterContribution(model, "1")]
        whole = identify_class_filters(methods, batches(batch_size=24), **QUIET)
        parts = identify_class_filters(methods, batches(batch_size=batch_size), **QUIET)
        assert torch.equal(whole[0].scores, parts[0].scores)
        assert torch.allclose(whole[1].scores, parts[1].scores, rtol=1e-6, atol=1e-8)

    def test_a_batch_that_breaks_the_linear_relation_is_run_with_gradients(self):
        class Clamped(nn.Module):
            def __init__(self):
                super().__init__()
                torch.manual_seed(0)
                self.conv, self.head = nn.Conv2d(2, 4, 1), nn.Linear(4, 3)

            def forward(self, x):
                return self.head(self.conv(x).mean((2, 3)).clamp(max=1.0))

        model = Clamped()
        small, large = 0.01 * images(), 20 * images(seed=2)
        labels = torch.arange(8) % 3
        data = [(small, labels), (large, labels)]
        method = LayerFilterContribution(model, "conv")
        found = method.identify(data, **QUIET)
        each = torch.cat(
            [
                LayerGradientXActivation(model, model.conv).attribute(x, target=labels)
                for x in (small, large)
            ]
        ).sum((2, 3))
        labels = labels.repeat(2)
        for class_ in range(3):
            expected = each[labels == class_].mean(0).double()
            assert torch.allclose(found.scores[class_], expected, atol=1e-5)

    def test_layers_that_feed_the_head_say_so(self):
        data = batches()
        found = LayerFilterContribution(pool_linear(), "1").identify(data, **QUIET)
        assert found.provenance["feeds_head"] == {"name": "4", "by": "mean"}
        found = LayerFilterFrequency(deep(), "stage1", top_k=2).identify(data, **QUIET)
        assert found.provenance["feeds_head"] is None
        found = LayerFilterContribution(deep(), "head").identify(
            data, attribute_to_layer_input=True, **QUIET
        )
        assert found.provenance["feeds_head"] == {"name": "head", "by": "identical"}
        assert found.num_filters == 6

    def test_flattening_head(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3))
        data = batches()
        x, y = joined(data)
        method = LayerFilterContribution(model, "1")
        found = method.identify(data, num_filters=2, **QUIET)
        assert found.provenance["feeds_head"] == {"name": "3", "by": "flatten"}
        each = method.filter_scores(method.attribute(x, target=y)).double()
        assert torch.allclose(found.scores[1], each[y == 1].mean(0), atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [{"num_classes": value} for value in (0, -2, 1.5, True, "3")]
    + [{"target": value, "num_classes": 3} for value in (-1, "dog", 0.5)],
)
def test_numbers_that_cannot_be_meant_cost_no_pass(options):
    def data():
        raise AssertionError("read")
        yield

    model = pool_linear()
    name = "target" if "target" in options else "num_classes"
    message = f"{name}=.*; expected (a whole number or None|at least {int(name != 'target')})"
    with pytest.raises(ValueError, match=message):
        LayerFilterContribution(model, "1").identify(data(), **options, **QUIET)
    if name == "num_classes":
        with pytest.raises(ValueError, match=message):
            collect_evidence(LayerFilterContribution(model, "1"), data(), **options, **QUIET)
        with pytest.raises(ValueError, match=message):
            LayerFilterAblation(model, "1").identify(data(), metric="accuracy", **options, **QUIET)


class TestOnePass:
    def test_one_forward_for_all_methods_and_layers(self):
        model, data = deep(), batches()
        calls = []
        handle = model.register_forward_hook(lambda *_: calls.append(1))
        methods = [
            LayerFilterFrequency(model, layer, top_k=2) for layer in ("stage1", "stage2")
        ] + [LayerFilterContribution(model, "stage2")]
        identify_class_filters(methods, data, num_classes=3, **QUIET)
        # The first batch runs once more, to see whether its scores repeat.
        assert len(calls) == len(data) + 1
        calls.clear()
        methods.append(LayerFilterContribution(model, "stage1"))  # needs gradients
        identify_class_filters(methods, data, num_classes=3, **QUIET)
        # The first batch shows that and runs again; what the contributions miss takes three runs.
        assert len(calls) == len(data) + 1 + 3
        handle.remove()
        assert hooks_of(model) == 0

    def test_forms_of_methods_and_results(self):
        model, data = deep(), batches()
        one = LayerFilterFrequency(model, "stage2", top_k=2)
        several = LayerFilterFrequency(model, ["stage1", "stage2"], top_k=2)
        alone = identify_class_filters(one, data, **QUIET)
        assert alone.layer == "stage2"
        named = identify_class_filters({"a": one, "b": several}, data, **QUIET)
        tables = named["b"]
        assert isinstance(tables, list)
        assert [table.layer for table in tables] == ["stage1", "stage2"]
        assert torch.equal(named["a"].scores, alone.scores)
        listed = identify_class_filters([one], data, **QUIET)
        assert isinstance(listed, list)

    def test_loaders_names_and_label_types(self):
        model, (x, y) = pool_linear(), joined(batches())
        dataset = TensorDataset(x, y)
        vars(dataset)["classes"] = ["cat", "dog", "fox"]
        method = LayerFilterFrequency(model, "1", top_k=2)
        expected = method.identify(DataLoader(dataset, batch_size=7), **QUIET)
        assert expected.class_names == ("cat", "dog", "fox")
        for labels in (y.int(), y.numpy(), y.tolist(), y.to(torch.uint8)):
            found = method.identify([(x, labels)], **QUIET)
            assert torch.equal(found.scores, expected.scores)
        generator = ((x[i : i + 5], y[i : i + 5]) for i in range(0, 24, 5))
        assert torch.equal(method.identify(generator, **QUIET).scores, expected.scores)
        workers = DataLoader(dataset, batch_size=6, num_workers=1)
        assert torch.equal(method.identify(workers, **QUIET).scores, expected.scores)

    def test_layers_within_layers_and_forward_functions(self):
        model, data = deep(), batches()
        methods = [
            LayerFilterContribution(model, "stage2"),
            LayerFilterContribution(model, "stage2.2"),
            LayerFilterContribution(model.forward, model.stage2),
        ]
        tables = identify_class_filters(methods, data, **QUIET)
        for other in tables[1:]:
            assert torch.allclose(tables[0].scores, other.scores, atol=1e-6)
        by_function = LayerFilterContribution(lambda x: model(x), model.stage2)
        found = by_function.identify(data, num_classes=3, **QUIET)
        assert torch.allclose(tables[0].scores, found.scores, atol=1e-6)

    def test_deep_lift_hooks_gradients_before_the_layer(self):
        model, data = deep(), batches()
        model.stage1[2] = nn.ReLU()  # DeepLift takes no in-place ReLU
        model.stage2[2] = nn.ReLU()
        x, y = joined(data)
        found = identify_class_filters(LayerDeepLift(model, model.stage2), data, **QUIET)
        each = LayerDeepLift(model, model.stage2).attribute(x, target=y).detach().sum((2, 3))
        for class_ in range(3):
            expected = each[y == class_].double().mean(0)
            assert torch.allclose(found.scores[class_], expected, atol=1e-6)
        assert not x.requires_grad

    def test_several_inputs_and_channels_last(self):
        model = TwoInputs().eval()
        data = [((images(seed=1), images(seed=2)), torch.arange(8) % 3)]
        method = LayerFilterContribution(model, "conv")
        found = method.identify(data, num_filters=2, **QUIET)
        x, y = data[0]
        each = method.filter_scores(method.attribute(x, target=y)).double()
        assert torch.allclose(found.scores[2], each[y == 2].mean(0), atol=1e-6)
        twin = pool_linear()
        last = ChannelsLast(twin).eval()
        expected = LayerFilterContribution(twin, "1").identify(batches(), **QUIET)
        found = LayerFilterContribution(last, "transpose", channel_dim=-1).identify(
            batches(), **QUIET
        )
        assert torch.allclose(found.scores, expected.scores, atol=1e-6)

    def test_default_number_of_filters(self):
        found = LayerFilterFrequency(pool_linear(), "1", top_k=3).identify(batches(), **QUIET)
        assert found.selected.sum(1).tolist() == [3, 3, 3]
        found = LayerFilterContribution(pool_linear(filters=4), "1").identify(batches(), **QUIET)
        assert found.selected.sum(1).tolist() == [4, 4, 4]
        found = LayerFilterContribution(pool_linear(), "1").identify(batches(), mass=1e-6, **QUIET)
        assert found.selected.sum(1).tolist() == [1, 1, 1]


class TestCaptumsMethods:
    @pytest.mark.parametrize(
        ("method", "kwargs", "reduction"),
        [
            (LayerActivation, {}, "mean"),
            (LayerGradientXActivation, {}, "sum"),
            (LayerConductance, {"n_steps": 4}, "sum"),
            (LayerIntegratedGradients, {"n_steps": 4}, "abs_sum"),
            (
                LayerFeatureAblation,
                {"layer_mask": torch.arange(4).reshape(1, 4, 1, 1)},
                "max",
            ),
        ],
    )
    def test_equals_a_loop(self, method, kwargs, reduction):
        model, data = deep(), batches()
        captum_method = method(model, model.stage1)
        found = identify_class_filters(
            captum_method,
            data,
            attribute_kwargs=kwargs,
            reduction=reduction,
            num_filters=2,
            **QUIET,
        )
        reduce = {
            "mean": lambda maps: maps.mean((2, 3)),
            "sum": lambda maps: maps.sum((2, 3)),
            "abs_sum": lambda maps: maps.abs().sum((2, 3)),
            "max": lambda maps: maps.amax((2, 3)),
        }[reduction]
        total, counts = torch.zeros(3, 4, dtype=torch.float64), torch.zeros(3)
        for x, y in data:
            target = {} if method is LayerActivation else {"target": y}
            for scores, label in zip(
                reduce(captum_method.attribute(x, **target, **kwargs)), y, strict=True
            ):
                total[label] += scores.detach().double()
                counts[label] += 1
        assert torch.allclose(found.scores, total / counts[:, None], atol=1e-6)
        assert found.method == method.__name__

    def test_kwargs_by_name(self):
        model, data = deep(), batches()
        methods = {
            "cam": LayerGradCam(model, model.stage2),
            "path": LayerFilterContribution(model, "stage1"),
        }
        tables = identify_class_filters(
            methods,
            data,
            attribute_kwargs={"path": {"n_steps": 5}, "cam": {"attr_dim_summation": False}},
            **QUIET,
        )
        x, y = joined(data)
        maps = methods["cam"].attribute(x, target=y, attr_dim_summation=False)
        each = maps.detach().sum((2, 3)).double()
        assert torch.allclose(tables["cam"].scores[0], each[y == 0].mean(0), atol=1e-6)
        method = methods["path"]
        each = method.filter_scores(method.attribute(x, target=y, n_steps=5)).double()
        assert torch.allclose(tables["path"].scores[0], each[y == 0].mean(0), atol=1e-6)
        assert tables["path"].provenance["options"] == {"n_steps": 5}

    @pytest.mark.parametrize("size", [(1,), (1, 5), (1, 1)])
    @pytest.mark.parametrize(
        "method",
        [
            LayerActivation,
            LayerGradientXActivation,
            LayerConductance,
            lambda model, layer: LayerGradCam(model, layer),
        ],
    )
    def test_one_position_is_not_one_filter(self, method, size):
        model = nn.Sequential(
            nn.Flatten(),
            nn.Linear(72, 4 * math.prod(size)),
            nn.Unflatten(1, (*size, 4)),
            nn.Linear(4, 7),
            nn.Flatten(),
            nn.Linear(7 * math.prod(size), 3),
        )
        captum_method = method(model, model[3])
        kwargs = {"attr_dim_summation": False} if isinstance(captum_method, LayerGradCam) else {}
        data = [(images(12), torch.arange(12) % 3)]
        found = identify_class_filters(
            captum_method, data, num_filters=1, attribute_kwargs=kwargs, **QUIET
        )
        assert found.scores.shape == (3, 7)
        if isinstance(captum_method, LayerActivation):
            with torch.no_grad():
                means = model[:4](data[0][0]).reshape(12, -1, 7).sum(1)
            assert torch.allclose(found.scores[1], means[1::3].double().mean(0), atol=1e-5)

    def test_the_sum_over_one_filter_is_that_filter(self):
        model = nn.Sequential(
            nn.Conv2d(2, 1, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4, 3)
        )
        found = identify_class_filters(LayerGradCam(model, model[0]), batches(), **QUIET)
        assert found.scores.shape == (3, 1)
        with pytest.raises(ValueError, match="sums over the filters of '0'"):
            identify_class_filters(
                LayerGradCam(model, model[0]), batches(), attribute_to_layer_input=True, **QUIET
            )


class TestBadInput:
    method = staticmethod(lambda: LayerFilterFrequency(pool_linear(), "1", top_k=2))

    @pytest.mark.parametrize("kwargs", [{}, {"attr_dim_summation": True}])
    def test_what_sums_over_all_filters_is_refused(self, kwargs):
        model = deep()
        with pytest.raises(ValueError, match="LayerGradCam sums over the filters of 'stage2'"):
            identify_class_filters(
                LayerGradCam(model, model.stage2), batches(), attribute_kwargs=kwargs, **QUIET
            )

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            (torch.tensor([0, 1, 3]), "Batch 0 has the label 3, but there are 3 classes"),
            (torch.tensor([0, -1, 2]), "label -1"),
            (torch.tensor([0.0, 1.0, 2.0]), "torch.float32; expected whole numbers"),
            (torch.tensor([True, False, True]), "torch.bool"),
            (torch.tensor([[0], [1], [3]]), "label 3, but there are 3 classes"),
            (torch.full((3, 3), 0.5), "not multi-hot"),
            (torch.tensor([0, 1]), r"shape \(2,\)"),
        ],
    )
    def test_labels(self, labels, message):
        with pytest.raises(ValueError, match=message):
            self.method().identify([(images(3), labels)], **QUIET)

    def test_loaders(self):
        with pytest.raises(ValueError, match="loader is empty"):
            self.method().identify([], **QUIET)
        with pytest.raises(ValueError, match="Batch 0 is a Tensor; expected a pair"):
            self.method().identify([images(3)], **QUIET)
        with pytest.raises(ValueError, match="inputs of batch 0 are str"):
            self.method().identify([("x", torch.tensor([0]))], **QUIET)

    def test_a_class_without_images(self):
        with pytest.warns(UserWarning, match="without images: 2"):
            found = self.method().identify([(images(4), torch.tensor([0, 1, 0, 1]))], **QUIET)
        assert found.classes_without_images == ["2"]
        assert found.scores[2].isnan().all()
        assert not found.selected[2].any()

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("make", [LayerFilterFrequency, LayerFilterContribution])
    def test_activations_that_are_not_finite(self, make, value):
        x = images(8)
        x[5, 0, 2, 2] = value
        data = [(images(8), torch.arange(8) % 3), (x, torch.arange(8) % 3)]
        with pytest.raises(ValueError, match=r"layer '1': class 2, batch 1, image 5"):
            make(pool_linear(), "1").identify(data, **QUIET)

    def test_numbers_of_filters(self):
        with pytest.raises(ValueError, match="num_filters=7 is larger than the 6 filters"):
            self.method().identify(batches(), num_filters=7, **QUIET)
        with pytest.raises(ValueError, match="not both"):
            self.method().identify(batches(), num_filters=2, mass=0.5, **QUIET)

    def test_methods_and_options(self):
        model, data = pool_linear(), batches()
        with pytest.raises(ValueError, match="not a Captum LayerAttribution"):
            identify_class_filters(model, data)  # type: ignore[call-overload]
        with pytest.raises(ValueError, match="methods is empty"):
            identify_class_filters([], data)
        with pytest.raises(ValueError, match="reduction='median'"):
            identify_class_filters(self.method(), data, reduction="median")  # type: ignore[call-overload]
        with pytest.raises(ValueError, match="names no method: b"):
            identify_class_filters({"a": self.method()}, data, attribute_kwargs={"b": {}})
        for own in ("target", "inputs", "return_convergence_delta", "return_half_widths"):
            with pytest.raises(ValueError, match=f"attribute_kwargs holds '{own}', which the call"):
                identify_class_filters(self.method(), data, attribute_kwargs={own: 1})
        with pytest.raises(ValueError, match="class_names has 1 names; expected 3"):
            self.method().identify(data, class_names=["one"], **QUIET)
        with pytest.raises(ValueError, match="'abc' is one name"):
            self.method().identify(data, class_names="abc", **QUIET)

    def test_layers(self):
        data = batches()
        with pytest.raises(ValueError, match="no layer 'lay'"):
            LayerFilterFrequency(pool_linear(), "lay")
        with pytest.raises(ValueError, match="reached 2 times"):
            LayerFilterFrequency(Reused(), "relu", top_k=1).identify(data, **QUIET)
        with pytest.raises(ValueError, match="never reached"):
            LayerFilterFrequency(Reused(), "unused", top_k=1).identify(data, **QUIET)
        with pytest.raises(ValueError, match="not a single tensor"):
            LayerFilterFrequency(TwoTensors(), "split", top_k=1).identify(data, **QUIET)
        flat = nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (-1, 72)), nn.Linear(72, 3))
        with pytest.raises(ValueError, match="no channel dimension"):
            LayerFilterFrequency(flat, "0", top_k=1).identify(data, **QUIET)

    def test_outputs_that_are_not_logits(self):
        class Wrapped(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = pool_linear()

            def forward(self, x):
                return {"logits": self.inner(x)}

        class Pair(Wrapped):
            def forward(self, x):
                return self.inner(x), x

        data = batches()
        plain = LayerFilterContribution(pool_linear(), "1").identify(data, **QUIET)
        found = LayerFilterContribution(Wrapped(), "inner.1").identify(data, **QUIET)
        assert torch.equal(found.scores, plain.scores)
        with pytest.raises(ValueError, match=r"a tuple of 2 .* wrap the model: ClassScores"):
            LayerFilterContribution(Pair(), "inner.1").identify(data, **QUIET)
        wrapped = ClassScores(Pair(), lambda output: output[0])  # the advice, followed
        found = LayerFilterContribution(wrapped, "inner.1").identify(data, **QUIET)
        assert torch.equal(found.scores, plain.scores)
        assert found.layer == "inner.1"
        votes = LayerFilterFrequency(Pair(), "inner.1", top_k=1)
        assert votes.identify(data, num_classes=3, **QUIET).num_classes == 3


class TestSums:
    def test_merging_is_adding(self):
        scores, labels = torch.rand(20, 4), torch.arange(20) % 3
        whole = ClassFilterSums(3, 4)
        whole.update(scores, labels)
        parts = [ClassFilterSums(3, 4) for _ in range(2)]
        parts[0].update(scores[:7], labels[:7])
        parts[1].update(scores[7:], labels[7:])
        parts[0].merge_state(parts[1])
        for name, value in parts[0].compute().items():
            assert torch.allclose(value, whole.compute()[name], rtol=1e-12)

    def test_empty_classes_are_nan(self):
        sums = ClassFilterSums(2, 1)
        sums.update(torch.tensor([[1.0], [3.0]]), torch.tensor([0, 0]))
        table = sums.compute()
        assert table["mean"][0].tolist() == [2.0]
        assert table["standard_error"][0].tolist() == pytest.approx([1.0])
        assert table["mean"][1].isnan().all()


def test_collect_features():
    model, data = pool_linear(), batches()
    x, y = joined(data)
    features, labels = collect_features(model, "1", data, **QUIET)
    assert torch.allclose(features, means_of(model, "1", x), atol=1e-6)
    assert torch.equal(labels, y)
    at_head, _ = collect_features(model, "4", data, attribute_to_layer_input=True, **QUIET)
    assert torch.allclose(at_head, features, atol=1e-6)
    assert hooks_of(model) == 0
    with pytest.raises(ValueError, match="loader is empty"):
        collect_features(model, "1", [], **QUIET)
