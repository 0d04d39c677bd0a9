"""Decomposed heads: against explicit masks, through exports, refitted, tuned, measured."""

import copy
import io
import logging
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from captum_classfilters import (
    ClassFilters,
    DecomposedLinear,
    LayerFilterContribution,
    LayerFilterFrequency,
    accuracy_curve,
    decompose,
    fine_tune,
    refit_head,
    select_by_accuracy,
)
from captum_classfilters.heads import (
    compare_heads,
    find_head,
    fit_linear,
    remove_class,
    replace_head,
)
from captum_classfilters.metrics import evaluate_classifier
from tests.models import batches, deep, hooks_of, images, joined, pool_linear

QUIET = {"show_progress": False}


def identified(model=None, layer="1", number=2, **options):
    model = model or pool_linear()
    table = LayerFilterContribution(model, layer).identify(
        batches(), num_filters=number, **QUIET, **options
    )
    return model, table


def separable(number=120):
    """Images whose class is the brighter channel, or neither."""
    torch.manual_seed(0)
    x = 0.1 * torch.randn(number, 2, 6, 6)
    y = torch.arange(number) % 3
    x[y == 0, 0] += 1
    x[y == 1, 1] += 1
    return x, y


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
        assert decomposed[0].weight is not model[0].weight

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
        assert torch.allclose(folded[4].bias, model[4].bias + dropped, atol=1e-6)
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
        expected = F.linear(model[:5](x), model[5].weight * table.selected, model[5].bias)
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
        expected = F.linear(model[:3](images()), model[3].weight * mask, model[3].bias)
        assert torch.allclose(decomposed(images()), expected, atol=1e-6)

    def test_convolutional_head(self):
        torch.manual_seed(0)
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
        expected = model[4:](F.conv2d(model[:3](images()), kernel, model[3].bias))
        assert torch.allclose(decomposed(images()), expected, atol=1e-6)

    def test_a_layer_that_does_not_feed_the_head(self):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.Sigmoid(), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1)
        ).extend([nn.Flatten(), nn.Linear(4, 3)])
        _, table = identified(model, layer="0")
        with pytest.raises(ValueError, match=r"'0' does not feed the head '5'.*head='5'"):
            decompose(model, table)
        assert isinstance(decompose(model, table, head="5")[5], DecomposedLinear)

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
            decompose(model, some, missing="zero")

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
        assert isinstance(copied[4], nn.Identity)
        assert isinstance(model[4], nn.Linear)


class TestExports:
    def test_torchscript_export_and_pickle(self):
        model, table = identified()
        decomposed, x = decompose(model, table), images()
        expected = decomposed(x)
        assert torch.allclose(torch.jit.trace(decomposed, x)(x), expected, atol=1e-6)
        head = torch.jit.script(decomposed[4])
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
        torch.onnx.export(decomposed, (x,), dynamo=True, verbose=False).save(buffer)
        session = onnxruntime.InferenceSession(buffer.getvalue())
        found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
        assert torch.allclose(torch.from_numpy(found), decomposed(x), atol=1e-5)


class TestRefit:
    def test_learns_and_touches_only_the_head(self):
        model, (x, y) = pool_linear(), separable()
        data = [(x, y)]
        table = LayerFilterContribution(model, "1").identify(data, num_filters=3, **QUIET)
        decomposed = decompose(model, table)
        before = copy.deepcopy(decomposed.state_dict())
        history = refit_head(decomposed, data, **QUIET)
        assert history[-1] < 0.5 * history[0]
        for key, value in decomposed.state_dict().items():
            assert torch.equal(before[key], value) != key.startswith(("4.weight", "4.bias"))
        again = decompose(model, table)
        refit_head(again, data, **QUIET)
        assert torch.equal(again[4].weight, decomposed[4].weight)
        assert decomposed[4].weight.grad is None
        assert evaluate_classifier(decomposed, data, **QUIET).accuracy > 0.9

    def test_strong_pull_keeps_the_weights(self):
        layer = nn.Linear(4, 3)
        before = layer.weight.detach().clone()
        fit_linear(layer, torch.rand(20, 4), torch.arange(20) % 3, weight_decay=1e6)
        assert torch.allclose(layer.weight, before, atol=1e-4)

    def test_bad_input(self):
        layer = nn.Linear(4, 3)
        with pytest.raises(ValueError, match=r"expected \(N, 4\)"):
            fit_linear(layer, torch.rand(5, 3), torch.zeros(5).long())
        with pytest.raises(ValueError, match="0 to 2"):
            fit_linear(layer, torch.rand(5, 4), torch.full((5,), 3))


class TestFineTune:
    def loaders(self):
        x, y = separable()
        train = DataLoader(TensorDataset(x[:90], y[:90]), batch_size=16)
        return train, DataLoader(TensorDataset(x[90:], y[90:]), batch_size=16)

    def test_ends_in_its_best_state(self):
        train, validation = self.loaders()
        model = deep().train()
        history = fine_tune(model, train, validation, epochs=6, learning_rate=1e-2, **QUIET)
        accuracies = [epoch.validation_accuracy for epoch in history]
        assert len(history) == 7
        assert max(accuracies) > accuracies[0]
        best = evaluate_classifier(model, validation, **QUIET).accuracy
        assert best == pytest.approx(max(accuracies))
        assert model.training
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_an_interruption_leaves_the_best_state(self):
        train, validation = self.loaders()
        model = deep()
        before = copy.deepcopy(model.state_dict())

        def interrupted():
            yield from train
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fine_tune(model, interrupted(), validation, epochs=1, learning_rate=10.0, **QUIET)
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())

    def test_freezing(self):
        train, validation = self.loaders()
        model = deep()
        before = copy.deepcopy(model.state_dict())
        fine_tune(model, train, validation, epochs=3, learning_rate=0.1, freeze="backbone", **QUIET)
        changed = {
            key for key, value in model.state_dict().items() if not torch.equal(before[key], value)
        }
        assert changed == {"head.weight", "head.bias"}
        assert all(parameter.requires_grad for parameter in model.parameters())
        model = deep()
        fine_tune(
            model,
            train,
            validation,
            epochs=3,
            learning_rate=1e-2,
            freeze="batch_norm_statistics",
            **QUIET,
        )
        after = model.state_dict()
        assert torch.equal(after["stage1.1.running_mean"], before["stage1.1.running_mean"])
        assert not torch.equal(after["stage1.1.weight"], before["stage1.1.weight"])

    def test_teacher_is_followed_and_left_as_found(self):
        train, validation = self.loaders()
        teacher = deep(seed=1).train()
        fine_tune(teacher, train, validation, epochs=6, learning_rate=1e-2, **QUIET)
        before = copy.deepcopy(teacher.state_dict())
        wrong = [(x, (y + 1) % 3) for x, y in train]  # labels mislead, the teacher does not
        model = deep(seed=2)
        fine_tune(
            model,
            wrong,
            validation,
            epochs=8,
            learning_rate=1e-2,
            teacher=teacher,
            teacher_weight=1.0,
            **QUIET,
        )
        assert evaluate_classifier(model, validation, **QUIET).accuracy > 0.8
        assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())
        assert teacher.training

    def test_bad_input(self, caplog):
        train, validation = self.loaders()
        with pytest.raises(ValueError, match="freeze='all'"):
            fine_tune(deep(), train, validation, freeze="all", **QUIET)
        with pytest.raises(ValueError, match="training loader is empty"):
            fine_tune(deep(), [], validation, **QUIET)
        with caplog.at_level(logging.WARNING, "captum_classfilters"):
            fine_tune(deep(), validation, validation, **QUIET)
        assert "same data" in caplog.text
        broken = [(torch.full((4, 2, 6, 6), float("nan")), torch.zeros(4).long())]
        with pytest.raises(ValueError, match="loss is NaN"):
            fine_tune(deep(), broken, validation, **QUIET)


class TestCurve:
    def test_points_are_the_decomposed_models(self):
        model, table = identified()
        data = batches()
        curve = accuracy_curve(
            model, {"ours": table}, data, num_filters=(1, 3, 6), random_seeds=3, **QUIET
        )
        for number, accuracy in zip(curve.num_filters, curve.accuracy["ours"], strict=True):
            scores = evaluate_classifier(
                decompose(model, table.select(num_filters=number)), data, **QUIET
            )
            assert accuracy == pytest.approx(scores.accuracy)
            recall = curve.recall["ours"][curve.num_filters.index(number)]
            assert torch.allclose(recall, scores.recall)
        assert curve.accuracy["ours"][-1] == curve.full_accuracy
        assert curve.random_mean[-1] == pytest.approx(curve.full_accuracy)
        assert len(curve.random_standard_deviation) == 3

    def test_selection_by_accuracy_is_the_smallest(self):
        model, (x, y) = pool_linear(filters=8), separable()
        data = [(x, y)]
        refit_head(model, data, **QUIET)
        table = LayerFilterContribution(model, "1").identify(data, **QUIET)
        chosen = select_by_accuracy(model, table, data, keep=0.95, **QUIET)
        number = int(chosen.selected.sum(1)[0])
        curve = accuracy_curve(model, table, data, num_filters=range(1, 9), **QUIET)
        values = next(iter(curve.accuracy.values()))
        assert values[number - 1] >= 0.95 * curve.full_accuracy
        assert all(value < 0.95 * curve.full_accuracy for value in values[: number - 1])
        with pytest.raises(ValueError, match="keep=0"):
            select_by_accuracy(model, table, data, keep=0)

    def test_default_numbers_end_at_all_filters(self):
        model, table = identified()
        assert accuracy_curve(model, table, batches(), **QUIET).num_filters == [1, 2, 3, 5, 6]

    def test_refuses_convolutional_heads_and_too_many_filters(self):
        model, table = identified()
        with pytest.raises(ValueError, match="out of range"):
            accuracy_curve(model, table, batches(), num_filters=(7,), **QUIET)


class TestOthers:
    def test_evaluate_classifier(self):
        model, data = pool_linear(classes=7), batches(classes=7)
        x, y = joined(data)
        scores = evaluate_classifier(model, data, **QUIET)
        with torch.no_grad():
            logits = model(x)
        assert scores.accuracy == pytest.approx(float((logits.argmax(1) == y).float().mean()))
        five = (logits.topk(5).indices == y[:, None]).any(1).float().mean()
        assert scores.top5_accuracy == pytest.approx(float(five))
        assert int(scores.confusion[2, 3]) == int(((y == 2) & (logits.argmax(1) == 3)).sum())
        assert scores.num_images == 24
        assert evaluate_classifier(pool_linear(), batches(), **QUIET).top5_accuracy is None
        with pytest.raises(ValueError, match="empty"):
            evaluate_classifier(model, [], **QUIET)

    def test_compare_heads_counts(self):
        model, table = identified()
        comparison = compare_heads(model, decompose(model, table), images(), repetitions=3)
        assert comparison.before.head_parameters == 6 * 3 + 3
        assert comparison.after.head_parameters == 2 * 3 + 3
        assert comparison.after.head_multiply_adds == 6
        assert comparison.after.head_bytes == 9 * 4 + 6 * 2 * 8
        saved = comparison.before.parameters - comparison.after.parameters
        assert saved == 12
        assert comparison.before.seconds > 0
        assert "head parameters" in str(comparison)

    def test_remove_class(self):
        weight, bias = torch.rand(3, 4), torch.rand(3)
        mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0]], dtype=torch.bool)
        head, x = DecomposedLinear(weight, bias, mask), torch.rand(5, 4)
        removed = remove_class(head, 0)
        assert torch.allclose(removed.head(x), head(x)[:, 1:])
        assert removed.unused_features.tolist() == [0]
        dense = nn.Linear(4, 3)
        removed = remove_class(dense, 2)
        assert torch.allclose(removed.head(x), dense(x)[:, :2])
        assert len(removed.unused_features) == 0
        with pytest.raises(ValueError, match="out of range"):
            remove_class(dense, 3)
        with pytest.raises(ValueError, match="only class"):
            remove_class(nn.Linear(4, 1), 0)
