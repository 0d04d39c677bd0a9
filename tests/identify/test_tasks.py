"""Binary, multi-label and other outputs and labels, for this package's methods and for Captum's."""

from types import SimpleNamespace

import pytest
import torch
from captum.attr import LayerDeepLift, LayerGradientXActivation
from torch import nn

from captum_classfilters import (
    ClassScores,
    LayerFilterAblation,
    LayerFilterContribution,
    LayerFilterFrequency,
    identify_class_filters,
)
from tests.models import QUIET, batches, deep, joined, known, pool_linear


class Squeezed(nn.Module):
    """One logit for each image, (N,)."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x).squeeze(1)


class Named(Squeezed):
    """Scores in an object, as Hugging Face's models return them."""

    def forward(self, x):
        return SimpleNamespace(logits=self.inner(x), hidden_states=None)


def class_means(each, y, classes):
    return torch.stack([each[y == c].double().mean(0) for c in range(classes)])


@pytest.mark.parametrize("layer", ["1", "0"])
@pytest.mark.parametrize("shape", ["(N, 1)", "(N,)"])
def test_one_logit_is_two_classes(layer, shape):
    inner = pool_linear(classes=1)
    model, name = (inner, layer) if shape == "(N, 1)" else (Squeezed(inner), f"inner.{layer}")
    model = model.eval()
    data = [(x, y % 2) for x, y in batches()]
    x, y = joined(data)
    maps = LayerGradientXActivation(inner, inner[int(layer)]).attribute(x, target=0)
    each = maps.flatten(2).sum(2) * (2 * y - 1)[:, None]  # +z speaks for class 1, -z for class 0
    expected = class_means(each, y, 2)
    method = LayerFilterContribution(model, name)
    table = method.identify(data, **QUIET)
    assert table.num_classes == 2
    assert torch.allclose(table.scores, expected, atol=1e-6)
    assert table.provenance["exact"] is (layer == "1")
    attributions = method.filter_scores(method.attribute(x, target=y))
    assert torch.allclose(class_means(attributions, y, 2), expected, atol=1e-6)
    assert torch.allclose(method.attribute(x), maps, atol=1e-6)  # without a target the logit itself
    floats = [(x, y.float()[:, None]) for x, y in data]  # as BCEWithLogitsLoss takes them
    assert torch.equal(method.identify(floats, **QUIET).scores, table.scores)
    captum = identify_class_filters(
        {"gradient": LayerGradientXActivation(model, method.layer)}, data, **QUIET
    )
    assert torch.allclose(captum["gradient"].scores, expected, atol=1e-6)


def test_a_function_of_one_logit_is_what_captums_method_explains():
    """Not the model inside it."""
    model = pool_linear(classes=1)
    data = [(x, y % 2) for x, y in batches()]
    plain, tripled = (
        identify_class_filters(LayerGradientXActivation(function, model[1]), data, **QUIET).scores
        for function in (model, lambda x: 3 * model(x))
    )
    torch.testing.assert_close(tripled, 3 * plain)


def test_one_logit_ablation_and_accuracy():
    model = pool_linear(classes=1)
    data = [(x, y % 2) for x, y in batches()]
    x, y = joined(data)
    with torch.no_grad():
        z = model(x)[:, 0]
        logits = []
        for k in range(6):
            handle = model[1].register_forward_hook(
                lambda _m, _i, o, k=k: o.index_fill(1, torch.tensor([k]), 0.0)
            )
            logits.append(model(x)[:, 0])
            handle.remove()
    without = torch.stack(logits, 1)
    sign = 2 * y - 1
    table = LayerFilterAblation(model, "1").identify(data, **QUIET)
    each = sign[:, None] * (z[:, None] - without)
    assert torch.allclose(table.scores, class_means(each, y, 2), atol=1e-5)
    probability = LayerFilterAblation(model, "1", score="probability")
    drops = probability.filter_scores(probability.attribute(x, target=1))
    assert torch.allclose(drops, z.sigmoid()[:, None] - without.sigmoid(), atol=1e-5)
    car = LayerFilterAblation(model, "1").identify(data, metric="accuracy", **QUIET)
    right, still = (z > 0) == (y == 1), (without > 0) == (y == 1)[:, None]
    assert car.correct.tolist() == [int(right[y == c].sum()) for c in (0, 1)]
    lost = (right[:, None] & ~still).long()
    assert torch.equal(car.lost, torch.stack([lost[y == c].sum(0) for c in (0, 1)]))


@pytest.mark.parametrize("kind", [torch.int64, torch.float32, torch.bool])
def test_multi_hot_images_count_for_each_of_their_classes(kind):
    model = deep()
    hot = (torch.rand(24, 3, generator=torch.Generator().manual_seed(3)) < 0.5).to(kind)
    data = [(x, hot[5 * i : 5 * i + len(x)]) for i, (x, _) in enumerate(batches())]
    x = torch.cat([images for images, _ in data])
    method = LayerFilterContribution(model, "stage1")
    tables = identify_class_filters(
        {
            "ours": method,
            "votes": LayerFilterFrequency(model, "stage1", top_k=2),
            "captum": LayerGradientXActivation(model, model.stage1),
        },
        data,
        **QUIET,
    )
    counts = hot.long().sum(0)
    for class_index in range(3):
        rows = hot[:, class_index].bool()
        own = method.filter_scores(method.attribute(x[rows], target=class_index)).double()
        for name in ("ours", "captum"):
            assert torch.allclose(tables[name].scores[class_index], own.mean(0), atol=1e-6)
        error = own.std(0) / len(own) ** 0.5
        assert torch.allclose(known(tables["ours"].standard_errors)[class_index], error, atol=1e-6)
    for table in tables.values():
        assert table.counts.tolist() == counts.tolist()


def test_outputs_that_are_objects():
    data = batches()
    plain = LayerFilterContribution(deep(), "stage1").identify(data, **QUIET)
    model = Named(deep()).eval()
    for method in (
        LayerFilterContribution(model, "inner.stage1"),
        LayerGradientXActivation(model, model.inner.stage1),
    ):
        found = identify_class_filters(method, data, **QUIET)
        assert torch.allclose(found.scores, plain.scores, atol=1e-6)
        assert found.layer == "inner.stage1"
    lift = identify_class_filters(LayerDeepLift(model, model.inner.stage1), data, **QUIET)
    inner = model.inner
    expected = identify_class_filters(LayerDeepLift(inner, inner.stage1), data, **QUIET)
    assert torch.allclose(lift.scores, expected.scores, atol=1e-6)


def test_scores_that_are_picked():
    class Segmenter(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.head = nn.Conv2d(2, 6, 3), nn.Conv2d(6, 3, 1)

        def forward(self, x):
            return {"maps": self.head(self.conv(x).relu())}

    data = batches()
    x, y = joined(data)
    model = ClassScores(Segmenter().eval(), lambda output: output["maps"].mean((2, 3)))
    table = LayerFilterContribution(model, "conv").identify(data, **QUIET)
    each = LayerGradientXActivation(model, model.wrapped_model.conv).attribute(x, target=y)
    assert torch.allclose(table.scores, class_means(each.flatten(2).sum(2), y, 3), atol=1e-6)
    assert table.layer == "conv"
    drops = LayerFilterAblation(model, "conv").identify(data, **QUIET)
    assert drops.num_filters == 6


def test_groups_that_are_not_the_outputs():
    model, data = deep(), batches()
    x, _ = joined(data)
    site = (torch.arange(24) // 3) % 2
    grouped = [(images, site[5 * i : 5 * i + len(images)]) for i, (images, _) in enumerate(data)]
    method = LayerFilterContribution(model, "stage1")
    names = ["hospital A", "hospital B"]
    table = method.identify(grouped, target=2, class_names=names, significance=True, **QUIET)
    each = method.filter_scores(method.attribute(x, target=2))
    assert torch.allclose(table.scores, class_means(each, site, 2), atol=1e-6)
    assert table.class_names == tuple(names)
    assert table.provenance["target"] == 2
    assert table.p_values is not None
    assert table.p_values.shape == (2, 4)
    captum = identify_class_filters(
        LayerGradientXActivation(model, model.stage1), grouped, target=2, num_classes=2, **QUIET
    )
    assert torch.allclose(captum.scores, table.scores, atol=1e-6)
    with pytest.raises(ValueError, match="pass class_names or num_classes"):
        method.identify(grouped, target=2, **QUIET)


@pytest.mark.parametrize("votes", [False, True])
def test_one_group_of_all_images(votes):
    """The plain mean; torchmetrics takes the axes off a table of one number."""
    data = batches()
    x, y = joined(data)
    for model, width in ((pool_linear(classes=1), 6), (one_filter(), 1)):
        method = LayerFilterContribution(model, "1")
        found = LayerFilterFrequency(model, "1", top_k=1) if votes else method
        table = found.identify(
            [(x, torch.zeros_like(y))], target=1, class_names=["all"], num_filters=1, **QUIET
        )
        assert table.counts.tolist() == [24]
        assert table.scores.shape == (1, width)
        assert known(table.standard_errors).shape == (1, width)
        if not votes:
            each = method.filter_scores(method.attribute(x, target=1))
            assert torch.allclose(table.scores[0], each.double().mean(0), atol=1e-6)


def one_filter():
    return nn.Sequential(
        nn.Conv2d(2, 1, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 1)
    )
