"""Contrastive filters against explicit formulas and scipy's intervals."""

import math

import pytest
import scipy.stats
import torch
from captum.attr import LayerGradientXActivation
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from captum_classfilters import (
    LayerFilterAblation,
    LayerFilterContribution,
    LayerFilterFrequency,
)
from captum_classfilters.identify import confusion_filters, contrast_classes
from captum_classfilters.identify.contrastive import FilterContrast
from captum_classfilters.pruning import response_chroma
from captum_classfilters.testing import planted_network
from tests.models import QUIET, batches, deep, images, joined, pool_linear


def difference(method, x, a, b):
    """Evidence for targets a minus evidence for targets b."""
    first, second = (method.filter_scores(method.attribute(x, target=one)) for one in (a, b))
    return (first - second).double()


class TestTwoClasses:
    @pytest.mark.parametrize("layer", ["stage1", "stage2"])
    @pytest.mark.parametrize("make", [LayerFilterContribution, LayerFilterAblation])
    def test_formula_and_welchs_interval(self, make, layer):
        model, data = deep(), batches(31)
        x, y = joined(data)
        method = make(model, layer)
        found = contrast_classes(method, data, 2, 0, **QUIET)
        on_a, on_b = (difference(method, x[y == c], 2, 0) for c in (2, 0))
        assert torch.allclose(found.scores, on_a.mean(0) - on_b.mean(0), atol=1e-6)
        assert found.num_images == len(on_a) + len(on_b)
        for confidence in (0.9, 0.99):
            expected = scipy.stats.ttest_ind(on_a, on_b, equal_var=False).confidence_interval(
                confidence
            )
            interval = found.interval(confidence)
            for side, bound in enumerate(expected):
                assert torch.allclose(interval[:, side], torch.as_tensor(bound), atol=1e-5)
        wide = found.interval(0.9, simultaneous=True)
        one = found.interval(1 - 0.1 / len(found.scores))
        assert torch.allclose(wide, one)

    @settings(max_examples=15, deadline=None)
    @given(st.integers(0, 999), st.integers(0, 2), st.integers(1, 2))
    def test_scores_share_out_the_difference_of_margins(self, seed, a, step):
        """Exactly, at a linear head: what all images share, biases included, cancels."""
        b = (a + step) % 3
        model, data = pool_linear(seed=seed), batches()
        x, y = joined(data)
        found = contrast_classes(LayerFilterContribution(model, "1"), data, a, b, **QUIET)
        with torch.no_grad():
            logits = model(x).double()
        margin = logits[:, a] - logits[:, b]
        expected = float(margin[y == a].mean() - margin[y == b].mean())
        assert found.margin == pytest.approx(expected, abs=1e-6)
        assert found.unexplained == pytest.approx(0, abs=1e-5)
        reverse = contrast_classes(LayerFilterContribution(model, "1"), data, b, a, **QUIET)
        # For b rather than a, on b's images rather than a's: the same numbers.
        assert torch.allclose(reverse.scores, found.scores, atol=1e-6)

    def test_by_hand(self):
        """Mean responses (2, 1) and (1, 1); weights for a (1, 5), for b (0, 5)."""
        model = nn.Sequential(
            nn.Conv2d(2, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2)
        )
        with torch.no_grad():
            model.get_parameter("0.weight").copy_(torch.eye(2)[:, :, None, None])
            model.get_parameter("0.bias").zero_()
            model.get_parameter("3.weight").copy_(torch.tensor([[1.0, 5.0], [0.0, 5.0]]))
        x = torch.ones(4, 2, 3, 3)
        x[:2, 0] = 2
        y = torch.tensor([0, 0, 1, 1])
        found = contrast_classes(LayerFilterContribution(model, "0"), [(x, y)], 0, 1, **QUIET)
        assert found.scores.tolist() == pytest.approx([1.0, 0.0])
        assert found.standard_errors.tolist() == pytest.approx([0.0, 0.0], abs=1e-6)
        assert found.strongest(1).tolist() == [0]
        assert torch.isfinite(found.interval()).all()

    def test_planted_filters_of_the_two_classes_separate_them(self):
        planted = planted_network()
        truth = planted.truth["deep"]
        method = LayerFilterContribution(planted.model, "deep")
        found = contrast_classes(method, planted.loader(200), 0, 1, **QUIET)
        both = truth[0] & truth[1]
        expected = set(((truth[0] | truth[1]) & ~both).nonzero()[:, 0].tolist())
        assert set(found.strongest(len(expected)).tolist()) == expected
        low, high = found.interval(simultaneous=True).unbind(1)
        assert (low[list(expected)] > 0).all()
        neither = [k for k, kind in enumerate(planted.kinds["deep"]) if kind in ("echo", "loud")]
        assert ((low[neither] <= 0) & (high[neither] >= 0)).all()

    def test_captums_methods_and_names(self):
        model, data = deep(), batches()
        x, y = joined(data)
        dataset = TensorDataset(x, y)
        vars(dataset)["classes"] = ["cat", "dog", "fox"]
        loader = DataLoader(dataset, batch_size=7)
        found = contrast_classes(
            LayerGradientXActivation(model, model.stage2), loader, "fox", "cat", **QUIET
        )
        ours = contrast_classes(LayerFilterContribution(model, "stage2"), data, 2, 0, **QUIET)
        assert torch.allclose(found.scores, ours.scores, atol=1e-6)
        assert (found.favored, found.against) == ("fox", "cat")
        frame = found.to_pandas()
        assert frame["filter"][0] == int(found.strongest(1))
        assert (frame["low"] < frame["score"]).all()

    def test_bad_input(self):
        model, data = pool_linear(), batches()
        method = LayerFilterContribution(model, "1")
        with pytest.raises(ValueError, match="same evidence for every target"):
            contrast_classes(LayerFilterFrequency(model, "1"), data, 0, 1, **QUIET)
        with pytest.raises(ValueError, match="give two different ones"):
            contrast_classes(method, data, 1, 1, **QUIET)
        with pytest.raises(ValueError, match="Class 3 is out of range"):
            contrast_classes(method, data, 0, 3, **QUIET)
        with pytest.raises(ValueError, match="No class named 'cow'"):
            contrast_classes(method, data, "cow", 1, **QUIET)
        few = [(images(3), torch.tensor([0, 0, 1]))]
        with pytest.raises(ValueError, match="1 images of class '1'"):
            contrast_classes(method, few, 1, 0, **QUIET)
        with pytest.raises(ValueError, match="loader is empty"):
            contrast_classes(method, [], 1, 0, **QUIET)
        found = contrast_classes(method, data, 0, 1, **QUIET)
        with pytest.raises(ValueError, match="confidence=2"):
            found.interval(2)
        with pytest.raises(ValueError, match="num_filters=7 is out of range"):
            found.strongest(7)
        several = LayerFilterContribution(model, ["0", "1"])
        with pytest.raises(ValueError, match="several layers"):
            contrast_classes(several, data, 0, 1, **QUIET)


class TestConfusion:
    @pytest.mark.parametrize("layer", ["stage1", "stage2"])
    def test_every_cell_by_its_formula(self, layer):
        model, data = deep(seed=3), batches(60)
        x, y = joined(data)
        with torch.no_grad():
            logits = model(x).double()
        predicted = logits.argmax(1)
        method = LayerFilterContribution(model, layer)
        found = confusion_filters(method, data, **QUIET)
        assert sum(cell.num_images for cell in found.cells.values()) == int((predicted != y).sum())
        assert len(found.cells) >= 2
        for true in range(3):
            for other in range(3):
                rows = (y == true) & (predicted == other)
                assert int(found.confusion[true, other]) == int(rows.sum())
                if true == other or not rows.any():
                    assert (true, other) not in found.cells
                    continue
                cell = found.cell(true, other)
                each = difference(method, x[rows], other, true)
                assert torch.allclose(cell.scores, each.mean(0), atol=1e-6)
                margin = (logits[rows, other] - logits[rows, true]).mean()
                assert cell.margin == pytest.approx(float(margin), abs=1e-6)
                assert (cell.favored, cell.against) == (str(other), str(true))
                if layer == "stage2":
                    bias = model.get_parameter("head.bias").detach()
                    left = float(bias[other] - bias[true])
                    assert cell.unexplained == pytest.approx(left, abs=1e-5)
                if len(each) > 1:
                    test = scipy.stats.ttest_1samp(each, 0).confidence_interval(0.95)
                    interval = cell.interval()
                    for side, bound in enumerate(test):
                        assert torch.allclose(interval[:, side], torch.as_tensor(bound), atol=1e-5)
        largest = found.largest(2)
        assert found.cells[largest[0]].num_images >= found.cells[largest[1]].num_images

    def test_a_filter_planted_to_confuse_is_the_driver(self):
        """An echo of class 2 that is wired to class 3 makes the error, and heads its list."""
        planted = planted_network()
        model, kinds = planted.model, planted.kinds["deep"]
        x, y = planted.images(200)
        with torch.no_grad():
            responses = model[:3](x).mean((2, 3))
        echoes = [k for k, kind in enumerate(kinds) if kind == "echo"]
        echo = max(echoes, key=lambda k: float(responses[y == 2, k].mean()))
        with torch.no_grad():
            model.get_parameter("head.weight")[3, echo] = 20.0
        method = LayerFilterContribution(model, "deep")
        found = confusion_filters(method, [(x, y)], **QUIET)
        cell = found.cell(2, 3)
        assert cell.num_images > 25
        assert cell.strongest(1).tolist() == [echo]
        assert float(cell.interval(0.99, simultaneous=True)[echo, 0]) > 0
        own = planted.truth["deep"][2].nonzero()[:, 0].tolist()
        assert set(cell.opposing(len(own)).tolist()) == set(own)

    def test_no_errors_and_bad_input(self):
        planted = planted_network()
        method = LayerFilterContribution(planted.model, "deep")
        found = confusion_filters(method, planted.loader(40), **QUIET)
        assert found.cells == {}
        assert found.confusion.diagonal().tolist() == [10] * 4
        assert found.largest() == []
        with pytest.raises(ValueError, match="No image of class '0' was taken for '1'"):
            found.cell(0, 1)
        with pytest.raises(ValueError, match="loader is empty"):
            confusion_filters(method, [], **QUIET)
        with pytest.raises(ValueError, match="same evidence for every target"):
            confusion_filters(LayerFilterFrequency(planted.model, "deep"), [], **QUIET)

    def test_one_image_has_no_interval(self):
        model = pool_linear()
        x = images(1)
        with torch.no_grad():
            label = (model(x).argmax(1) + 1) % 3
        found = confusion_filters(LayerFilterContribution(model, "1"), [(x, label)], **QUIET)
        (cell,) = found.cells.values()
        assert isinstance(cell, FilterContrast)
        assert cell.interval().isnan().all()
        assert torch.isfinite(cell.scores).all()


class Returns(nn.Module):
    """A mapping with the logits of two classes; one logit z, half their difference; or its sigmoid."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net, self.kind = pool_linear(classes=2), kind

    def forward(self, x: Tensor) -> object:
        scores = self.net(x)
        if self.kind == "mapping":
            return {"logits": scores}
        z = (scores[:, 1:] - scores[:, :1]) / 2
        return z if self.kind == "logit" else z.sigmoid()


@pytest.mark.parametrize("kind", ["mapping", "logit", "probability"])
def test_captums_methods_see_two_classes_whatever_the_model_returns(kind):
    model, plain = Returns(kind).eval(), pool_linear(classes=2)
    x, y = images(30), torch.arange(30) % 2
    found = contrast_classes(LayerGradientXActivation(model, model.net[1]), [(x, y)], 1, 0, **QUIET)
    expected = contrast_classes(LayerGradientXActivation(plain, plain[1]), [(x, y)], 1, 0, **QUIET)
    if kind != "probability":
        torch.testing.assert_close(found.scores, expected.scores)
    counts = [
        confusion_filters(LayerGradientXActivation(net, layer), [(x, y)], **QUIET).confusion
        for net, layer in ((model, model.net[1]), (plain, plain[1]))
    ]
    assert torch.equal(*counts)


def test_evidence_that_is_not_finite_is_refused():
    """A clamp behind the layer hides an infinity from the scores."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu, self.head = nn.ReLU(), nn.Linear(3, 2)

        def forward(self, x):
            return self.head(self.relu(x).clamp(max=1).mean((2, 3)))

    torch.manual_seed(0)
    images = torch.rand(8, 3, 2, 2)
    images[5, 1, 0, 0] = math.inf
    method = LayerFilterContribution(model := Net().eval(), model.relu)
    with pytest.raises(ValueError, match=r"'relu': batch 0, image 5 of the batch"):
        contrast_classes(method, [(images, torch.arange(8) % 2)], 0, 1, show_progress=False)
    with pytest.raises(ValueError, match=r"'relu' for image 5"):
        response_chroma(model, "relu", [images], show_progress=False)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_that_are_not_finite_are_no_predictions(value):
    """``argmax`` takes NaN for the largest score, so that the image counted as one of class 0."""
    model = pool_linear()
    x, y = images(6), torch.arange(6) % 3
    x[4] = value
    method = LayerFilterContribution(model, "1")
    data = [(x[:3], y[:3]), (x[3:], y[3:])]
    with pytest.raises(ValueError, match="NaN or Inf for image 1 of batch 1"):
        confusion_filters(method, data, **QUIET)
    with pytest.raises(ValueError, match="NaN or Inf for image 1 of batch 1"):
        contrast_classes(method, data, 0, 2, **QUIET)


class OneSize(nn.Sequential):
    """Takes batches of six images only."""

    def forward(self, x):
        return super().forward(x.view(6, 2, 5, 7))


@pytest.mark.parametrize("kind", [LayerFilterContribution, LayerGradientXActivation])
def test_a_model_of_one_batch_size_has_contrasts(kind):
    torch.manual_seed(0)
    parts = [nn.Conv2d(2, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3)]
    fixed, free = OneSize(*parts).eval(), nn.Sequential(*parts).eval()
    x = torch.randn(12, 2, 5, 7)
    data = [(part, torch.tensor([0, 1, 2, 0, 1, 1])) for part in x.split(6)]
    own, expected = (contrast_classes(kind(m, m[1]), data, 0, 1, **QUIET) for m in (fixed, free))
    torch.testing.assert_close(own.scores, expected.scores)
    assert own.num_images == expected.num_images == 10
    errors, without = (confusion_filters(kind(m, m[1]), data, **QUIET) for m in (fixed, free))
    assert torch.equal(errors.confusion, without.confusion)
    assert without.confusion.sum() > without.confusion.trace()
    for pair in ((i, j) for i in range(3) for j in range(3) if i != j):
        if without.confusion[pair]:
            torch.testing.assert_close(errors.cell(*pair).scores, without.cell(*pair).scores)
