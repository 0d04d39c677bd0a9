"""Color, removal order, groups and classes of filters against explicit formulas, scipy, sklearn."""

from itertools import combinations
from math import comb, exp, log

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from captum_classfilters import LayerFilterAblation
from captum_classfilters.heads import coverage, diversity, effective_rank, filter_clusters
from captum_classfilters.identify.accuracy_reduction import AccuracyReduction
from captum_classfilters.pruning import (
    PruningOrder,
    class_interpretation,
    interpretation_table,
    response_chroma,
    selectivity_test,
    weight_chroma,
)
from captum_classfilters.pruning.color import grayed
from tests.models import QUIET, batches, deep, hooks_of
from tests.pretend_device import host_reads, pretend

pytest.importorskip("sklearn")


def color_images(number=12, seed=0):
    return torch.rand(number, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


# -- color ----------------------------------------------------------------------------------------


def test_weight_chroma_by_hand():
    weights = torch.zeros(4, 3, 1, 2)
    weights[0] = 2.0  # brightness alone
    weights[1, 0, 0] = torch.tensor([1.0, -1])
    weights[1, 1, 0] = torch.tensor([-1.0, 1])  # red against green alone
    weights[2, 0, 0, 0] = 3.0  # one color: (3/sqrt(3))^2 = 3 of 9 is brightness
    index = weight_chroma(weights)
    assert index[:3].tolist() == pytest.approx([0, 1, 2 / 3])
    assert bool(index[3].isnan())
    random = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    unit = torch.full((3,), 3**-0.5).double()
    along = torch.einsum("kcij,c->kij", random, unit)
    residual = random - along[:, None] * unit.reshape(1, 3, 1, 1)
    expected = residual.square().sum((1, 2, 3)) / random.square().sum((1, 2, 3))
    assert torch.allclose(weight_chroma(random), expected)
    assert torch.allclose(weight_chroma(random / 1e6), expected)  # however small they are
    with pytest.raises(ValueError, match=r"\(4, 1, 3, 3\)"):
        weight_chroma(torch.ones(4, 1, 3, 3))


def color_model():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.Flatten())
    with torch.no_grad():
        model.get_parameter("0.weight").copy_(
            torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(1)) / 3
        )
        model.get_parameter("0.bias").zero_()
        weight = model.get_parameter("0.weight")
        weight[0] = 0.1  # brightness
        weight[1, 0], weight[1, 1], weight[1, 2] = 0.1, -0.1, 0.0
    return model.train()


def test_response_chroma_against_a_loop():
    model, x = color_model(), color_images()
    found = response_chroma(model, "1", [(x[:5], 0), (x[5:], 0)], top=3, **QUIET)
    with torch.no_grad():
        maps = model[1](model[0](x)).flatten(2)
        gray = model[1](model[0](x.mean(1, keepdim=True).expand_as(x))).flatten(2)
    for filter_ in range(4):
        largest, place = maps[:, filter_].max(1)
        best = largest.argsort(descending=True)[:3]
        without = sum(float(gray[image, filter_, place[image]]) for image in best)
        assert float(found[filter_]) == pytest.approx(
            1 - without / float(largest[best].sum()), abs=1e-5
        )
    assert float(found[0]) == pytest.approx(0, abs=1e-5)
    assert float(found[1]) == pytest.approx(1, abs=1e-5)
    assert model.training
    assert hooks_of(model) == 0
    with torch.no_grad():
        model[0].weight[2], model[0].bias[2] = 0.0, -1.0
    assert bool(response_chroma(model, "1", [x], **QUIET)[2].isnan())
    nine = response_chroma(model, "1", [x], top=9, **QUIET)  # which are the default
    assert torch.equal(nine.nan_to_num(), response_chroma(model, "1", [x], **QUIET).nan_to_num())
    assert not torch.equal(nine[3], response_chroma(model, "1", [x], top=10, **QUIET)[3])


def test_gray_in_the_original_colors():
    x, mean, spread = color_images(), [0.5, 0.2, 0.1], [0.3, 0.2, 0.5]
    normalized = (x - torch.tensor(mean).reshape(3, 1, 1)) / torch.tensor(spread).reshape(3, 1, 1)
    gray = grayed(normalized, mean, spread) * torch.tensor(spread).reshape(3, 1, 1)
    gray = gray + torch.tensor(mean).reshape(3, 1, 1)
    assert torch.allclose(gray, x.mean(1, keepdim=True).expand_as(x), atol=1e-6)
    with pytest.raises(ValueError, match="no color to remove"):
        grayed(x[:, :1])
    with pytest.raises(ValueError, match="top=0"):
        response_chroma(color_model(), "1", [x], top=0)
    with pytest.raises(ValueError, match="loader is empty"):
        response_chroma(color_model(), "1", [], **QUIET)


def test_response_chroma_on_an_accelerator_and_of_further_inputs():
    model, x = color_model(), color_images()
    expected = response_chroma(model, "1", [x[:5], x[5:]], top=3, **QUIET)
    for there in (True, False):
        with pretend("cuda") as device:
            moved = color_model().to(device)
            data = [x[:5].to(device), x[5:].to(device)] if there else [x[:5], x[5:]]
            host_reads.clear()
            got = response_chroma(moved, "1", data, top=3, **QUIET)
            assert len(host_reads) <= 3
        assert got.device.type == "cpu"
        assert torch.equal(got, expected)

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = color_model()

        def forward(self, images, scale):
            return self.net(images * scale[:, None, None, None])

    twice = [((x[:5], torch.full((5,), 2.0)), 0), ((x[5:], torch.full((7,), 2.0)), 0)]
    assert torch.allclose(response_chroma(Scaled(), "net.1", twice, top=3, **QUIET), expected)


# -- order ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "kind", "count", "p"), [(96, 48, 17, 3.8e-4), (256, 128, 14, 0.051)]
)
def test_published_counts_at_a_base_rate_of_a_half(number, kind, count, p):
    selective = torch.arange(number) < kind
    first = [*range(count), *range(kind, kind + 20 - count)]
    order = first + [one for one in range(number) if one not in first]
    found = selectivity_test(order, selective)
    assert found.count == count
    assert found.base_rate == 0.5
    assert found.expected == 10
    assert found.hypergeometric_p == pytest.approx(p, rel=0.02)
    tail = sum(comb(kind, k) * comb(number - kind, 20 - k) for k in range(count, 21))
    assert found.hypergeometric_p == pytest.approx(tail / comb(number, 20))


def test_ranks_against_scipy_and_by_hand():
    selective = torch.tensor([True, False, True, False, False, True])
    order = PruningOrder({"layer": 6}, [("layer", one) for one in (2, 1, 0, 4)])
    found = selectivity_test(order, selective, top=3)
    # Places: 3, 2, 1, -, 4, -; the two that stayed share 5.5.
    rank = np.array([3, 2, 1, 5.5, 4, 5.5])
    expected = stats.mannwhitneyu(rank[[0, 2, 5]], rank[[1, 3, 4]], alternative="less").pvalue
    assert found.rank_p == expected
    assert found.mean_rank == pytest.approx((3 + 1 + 5.5) / 3)
    assert found.mean_rank_others == pytest.approx((2 + 5.5 + 4) / 3)
    assert (found.count, found.top) == (2, 3)
    assert "2 of the first 3" in str(found)


def test_selectivity_bad_input():
    kind = torch.tensor([True, False, True])
    for order, selective, top, message in [
        ([0, 0], kind, 1, "at most once"),
        ([3], kind, 1, "at most once"),
        ([0, 1], kind, 3, "top=3"),
        ([0, 1], kind | True, 1, "nothing to tell apart"),
        ([0, 1], kind.float(), 1, "expected a mask"),
    ]:
        with pytest.raises(ValueError, match=message):
            selectivity_test(order, selective, top)


# -- groups ---------------------------------------------------------------------------------------


def test_clusters_of_weights_and_of_activations():
    a, b = torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 1, 0])
    vectors = torch.stack([b, a, 3 * a + 0.1 * b, 2 * b, -a])
    assert filter_clusters(vectors).tolist() == [0, 1, 1, 0, 2]
    assert filter_clusters(vectors, num_clusters=1).tolist() == [0] * 5
    assert len(filter_clusters(vectors, num_clusters=4).unique()) == 4
    assert len(filter_clusters(vectors, threshold=1.0).unique()) == 4  # only b and 2 b are equal
    shifted = torch.stack([a, 5 + 2 * a, b])  # correlation ignores the shift, cosine does not
    assert filter_clusters(shifted, similarity="correlation").tolist() == [0, 0, 1]
    assert filter_clusters(shifted, threshold=0.9).tolist() == [0, 1, 2]
    assert filter_clusters(vectors[:1]).tolist() == [0]


def test_coverage_against_all_subsets():
    clusters = torch.tensor([0, 0, 0, 1, 1, 2])
    kept = torch.tensor([True, False, False, True, True, False])
    found = coverage(clusters, kept)
    assert found.share == pytest.approx(2 / 3)
    assert found.lost == (2,)
    every = [
        len(clusters[list(some)].unique()) / 3 for some in combinations(range(6), int(kept.sum()))
    ]
    assert found.chance == pytest.approx(sum(every) / len(every))
    assert coverage(clusters, torch.ones(6, dtype=torch.bool)).share == 1
    with pytest.raises(ValueError, match="bool mask"):
        coverage(clusters, kept[:5])


def test_diversity_and_effective_rank():
    vectors = torch.randn(5, 20, generator=torch.Generator().manual_seed(0))
    table = np.corrcoef(vectors.numpy())
    pairs = [1 - abs(table[i, j]) for i, j in combinations(range(5), 2)]
    assert diversity(vectors) == pytest.approx(np.mean(pairs), abs=1e-6)
    kept = torch.tensor([True, True, False, False, False])
    assert diversity(vectors, kept) == pytest.approx(1 - abs(table[0, 1]), abs=1e-6)
    assert diversity(torch.stack([vectors[0], 2 * vectors[0] + 1])) == pytest.approx(0, abs=1e-6)
    assert effective_rank(torch.eye(4)) == pytest.approx(4)
    assert effective_rank(torch.ones(4, 3)) == pytest.approx(1)
    expected = exp(-(0.75 * log(0.75) + 0.25 * log(0.25)))
    assert effective_rank(torch.diag(torch.tensor([3.0, 1]))) == pytest.approx(expected)
    assert effective_rank(torch.eye(4), kept[:4]) == pytest.approx(2)


def test_groups_bad_input():
    vectors = torch.eye(3)
    for call, message in [
        (lambda: filter_clusters(vectors, similarity="overlap"), "similarity='overlap'"),  # type: ignore[arg-type]
        (lambda: filter_clusters(vectors, num_clusters=4), "expected 1 to 3"),
        (lambda: filter_clusters(vectors, threshold=2), "threshold=2"),
        (lambda: filter_clusters(torch.zeros(2, 3)), "Filter 0 is constant"),
        (lambda: filter_clusters(torch.ones(3)), r"\(3,\); expected \(K, D\)"),
        (lambda: diversity(torch.tensor([[1.0, 2], [1, 1]])), "Filter 1 is constant"),
        (lambda: diversity(vectors[:1]), "two or more"),
        (lambda: effective_rank(torch.zeros(2, 2)), "not all zero"),
        (lambda: coverage(vectors, vectors[0] > 0), r"clusters have shape \(3, 3\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int16, torch.uint8, torch.float32])
@pytest.mark.parametrize(
    "call",
    [diversity, effective_rank, lambda vectors, kept: coverage(vectors[:, 0].long(), kept)],
    ids=["diversity", "effective_rank", "coverage"],
)
def test_zeros_and_ones_are_no_mask_and_no_indices(call, dtype):
    vectors = torch.rand(4, 9, generator=torch.Generator().manual_seed(0))
    with pytest.raises(
        ValueError, match=r"kept is torch\.\w+ of shape \(4,\); expected a bool mask"
    ):
        call(vectors, torch.tensor([1, 0, 1, 1]).to(dtype))


# -- classes --------------------------------------------------------------------------------------


def made_reduction():
    return AccuracyReduction(
        counts=torch.tensor([100, 20, 0, 10]),
        correct=torch.tensor([80, 15, 0, 9]),
        lost=torch.tensor([[50, 0], [1, 0], [0, 0], [0, 2]]),
        gained=torch.tensor([[0, 0], [5, 0], [0, 0], [0, 0]]),
        log_probability_drop=torch.zeros(4, 2),
        probability_drop=torch.tensor([[0.3, 0.1], [-0.2, 0.2], [float("nan")] * 2, [0.0, 0.4]]),
        class_names=("a", "b", "c", "d"),
        layer="layer",
    )


def test_classes_of_a_filter_by_hand():
    reduction = made_reduction()
    first, second = class_interpretation(reduction, num_classes=2)
    assert [one.name for one in first.top] == ["a", "d"]
    assert [one.name for one in first.bottom] == ["b", "d"]
    assert [one.reduction for one in first.top] == [0.5, 0.0]
    assert first.bottom[0].reduction == -0.2
    assert first.reduction == (50 + 1 - 5) / 130
    assert [one.name for one in second.top] == ["d", "b"]  # a tie of a and b: probability decides
    assert [one.name for one in second.bottom] == ["a", "b"]
    effect = first.top[0]
    assert (effect.low, effect.high) == tuple(reduction.class_interval()[0, 0].tolist())
    assert effect.low <= 0.5 <= effect.high
    assert effect.certain
    assert not first.top[1].certain
    assert len(class_interpretation(reduction)[0].top) == 3  # the class without images is left out
    assert "filter 0" in str(first)
    with pytest.raises(ValueError, match="num_classes=0"):
        class_interpretation(reduction, 0)


def test_classes_of_a_measured_reduction():
    pytest.importorskip("pandas")
    car = LayerFilterAblation(deep(seed=2), "stage2").identify(
        batches(60), metric="accuracy", **QUIET
    )
    found = class_interpretation(car, num_classes=1)
    assert len(found) == 6
    for one in found:
        assert one.top[0].reduction == float(car.class_reduction[:, one.filter].max())
        assert one.bottom[0].reduction == float(car.class_reduction[:, one.filter].min())
    table = interpretation_table(found)
    assert len(table) == 12
    assert set(table["end"]) == {"most", "least"}
