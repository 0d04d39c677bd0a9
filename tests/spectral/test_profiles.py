"""The selection rule, profiles and their similarities, by hand and by brute force."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import jaccard_score
from torch import nn

from captum_classfilters._core.units import Aggregate
from captum_classfilters.identify import unit_scores
from captum_classfilters.spectral import (
    influential,
    instance_jaccard,
    jaccard,
    layer_svd,
    model_svd,
    profile_images,
    similarity_matrix,
)
from captum_classfilters.spectral.profile_similarity import average_jaccard
from tests.models import QUIET, ChannelsLast, batches, deep, images, joined, pool_linear


def rule(scores, share):
    """The rule in plain Python: units in order of acceptance."""
    order = sorted(
        (unit for unit, score in enumerate(scores) if score > 0), key=lambda u: (-scores[u], u)
    )
    total, held, chosen = sum(scores[unit] for unit in order), 0.0, []
    for unit in order:
        held += scores[unit]
        chosen.append(unit)
        if held / total > share:
            break
    return chosen


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(-3, 9), min_size=1, max_size=12),
    st.sampled_from([0.0, 0.05, 0.1, 0.3, 0.5, 0.9, 0.99]),
)
def test_share_rule(scores, share):
    # "Accept while the share is at most theta, then one more" is "stop after it is exceeded".
    mask, weights = influential(torch.tensor([scores], dtype=torch.float32), share=share)
    chosen = rule(scores, share)
    assert mask[0].nonzero()[:, 0].tolist() == sorted(chosen)
    total = sum(scores[unit] for unit in chosen)
    expected = [scores[u] / total if u in chosen else 0.0 for u in range(len(scores))]
    assert weights[0].tolist() == pytest.approx(expected)


def test_weights_sum_to_one_where_the_released_ones_do_not():
    scores = torch.tensor([[5.0, 3.0, 1.0, 1.0]])
    mask, weights = influential(scores, share=0.5)
    assert mask.tolist() == [[True, True, False, False]]
    assert weights.tolist() == [[0.625, 0.375, 0.0, 0.0]]  # 5/5 and 3/5, sum 1.6, with its rule


def test_count_quantile_and_at_most():
    scores = torch.tensor([[4.0, 4.0, 1.0, 4.0, -9.0], [0.0, -1.0, 0.0, 0.0, 0.0]])
    mask, weights = influential(scores, count=2)
    assert mask.tolist() == [[True, True, False, False, False], [False] * 5]
    assert weights.sum(1).tolist() == [1.0, 0.0]
    mask, _ = influential(scores, count=1)
    assert mask.tolist() == [[True, False, False, False, False], [False] * 5]
    mask, _ = influential(scores, quantile=0.5)
    assert mask[0].tolist() == [True, True, False, True, False]
    mask, _ = influential(scores, quantile=0.0, at_most=3)
    assert mask[0].tolist() == [True, True, False, True, False]
    assert not mask[1].any()


def test_influential_refuses():
    x = torch.rand(2, 3)
    for options, message in (
        ({}, "not none"),
        ({"share": 0.1, "count": 2}, "Give one of"),
        ({"share": 1.0}, r"expected a number in \[0, 1\)"),
        ({"quantile": 1.5}, r"in \[0, 1\]"),
        ({"count": 0}, "count=0"),
        ({"share": 0.1, "at_most": 0}, "at_most=0"),
    ):
        with pytest.raises(ValueError, match=message):
            influential(x, **options)
    with pytest.raises(ValueError, match=r"expected \(N, U\)"):
        influential(x[0], share=0.1)
    with pytest.raises(ValueError, match="NaN"):
        influential(x / torch.zeros(1) * 0, share=0.1)


def test_unit_scores_are_the_maps_reduced():
    model, data = deep(), batches()
    x, y = joined(data)
    with torch.no_grad():
        maps = {"stage1.0": model.stage1[0](x), "stage2": model.stage2(model.stage1(x))}
    ways: dict[Aggregate, Callable[[torch.Tensor], torch.Tensor]] = {
        "mean": lambda m: m.mean((2, 3)),
        "max": lambda m: m.amax((2, 3)),
        "min": lambda m: m.amin((2, 3)),
        "sum": lambda m: m.sum((2, 3)),
        "abs_mean": lambda m: m.abs().mean((2, 3)),
        "abs_sum": lambda m: m.abs().sum((2, 3)),
        "l2": lambda m: m.square().sum((2, 3)).sqrt(),
    }
    for how, reduce in ways.items():
        scores, labels = unit_scores(model, list(maps), data, aggregate=how, **QUIET)
        for name in maps:
            torch.testing.assert_close(scores[name], reduce(maps[name]))
        assert torch.equal(labels, y)
    with pytest.raises(ValueError, match="aggregate='median'"):
        unit_scores(model, "stage2", data, aggregate="median", **QUIET)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="loader is empty"):
        unit_scores(model, "stage2", [], **QUIET)
    with pytest.raises(ValueError, match="multi-hot"):
        unit_scores(model, "stage2", [(images(), torch.zeros(8, 3))], **QUIET)


def test_direction_profiles_on_a_residual_net_with_in_place_relu():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3, padding=1)
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x):
            return self.relu(self.conv(x)) + x  # in place: overwrites what the convolution put out

    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block(), nn.Flatten(), nn.Linear(72, 3)).eval()
    data = batches()
    svds = model_svd(model)
    profiles = profile_images(
        model, ["0.conv", "1.conv", "3"], data, kind="direction", directions=svds, **QUIET
    )
    x, y = joined(data)
    hidden = model[0](x)
    inputs = {"0.conv": x, "1.conv": hidden, "3": model[1](hidden).flatten(1)}
    for name, layer_input in inputs.items():
        svd, module = svds[name], model.get_submodule(name)
        output = module(layer_input).detach()
        bias = module.get_parameter("bias").detach()
        centered = output - (bias if name == "3" else bias[:, None, None])
        signal = torch.einsum("nk...,kr->nr...", centered, svd.left)
        means = signal.flatten(2).mean(2) if name != "3" else signal
        mask, weights = influential(means.abs(), share=0.1)
        dense = torch.from_numpy(profiles.weights[name].toarray())
        torch.testing.assert_close(dense, weights, atol=1e-5, rtol=1e-4)
        assert torch.equal(dense > 0, mask)
        torch.testing.assert_close(dense.sum(1), torch.ones(len(x), dtype=torch.float64))
    assert torch.equal(profiles.labels, y)
    one = profiles[4]
    assert one.num_images == 1
    assert one.units("0.conv") == rule(
        np.abs(_mean_signal(model, svds["0.conv"], x[4])).tolist(), 0.1
    )


def _mean_signal(model, svd, image):
    conv = model[0].conv
    with torch.no_grad():
        output = conv(image[None]) - conv.bias[:, None, None]
    return svd.signals(output).mean((2, 3))[0].numpy()


def test_channel_element_and_position_profiles():
    model, data = deep(), batches()
    x, _ = joined(data)
    with torch.no_grad():
        maps = model.stage1[:2](x)  # before the ReLU: negative values, too
    channel = profile_images(model, "stage1.1", data, share=0.6, **QUIET)
    mask, weights = influential(maps.amax((2, 3)), share=0.6)
    np.testing.assert_allclose(channel.weights["stage1.1"].toarray(), weights.numpy(), rtol=1e-5)
    element = profile_images(model, "stage1.1", data, kind="element", share=0.6, **QUIET)
    dense = element.weights["stage1.1"].toarray().reshape(len(x), 4, 36)
    np.testing.assert_allclose(dense.sum(2), weights.numpy(), rtol=1e-5, atol=1e-12)
    for image, unit in mask.nonzero().tolist():
        assert dense[image, unit].argmax() == int(maps[image, unit].flatten().argmax())
    position = profile_images(model, "stage1.1", data, kind="position", **QUIET)
    norms = maps.square().sum(1).sqrt().flatten(1)
    expected = norms >= norms.quantile(0.97, dim=1, keepdim=True)
    assert np.array_equal(position.weights["stage1.1"].toarray() > 0, expected.numpy())
    assert position.positions["stage1.1"] == (6, 6)
    few = profile_images(model, "stage1.1", data, kind="position", quantile=0.5, at_most=3, **QUIET)
    assert set((few.weights["stage1.1"].toarray() > 0).sum(1)) == {3}
    norm = profile_images(model, "stage1.1", data, aggregate="l2", share=0.3, **QUIET)
    mask, _ = influential(maps.square().sum((2, 3)).sqrt(), share=0.3)
    assert np.array_equal(norm.weights["stage1.1"].toarray() > 0, mask.numpy())


def test_channels_last_layers_give_the_same_profiles():
    twin, data = pool_linear(), batches()
    for kind in ("channel", "element", "position"):
        first = profile_images(twin, "1", data, kind=kind, **QUIET)
        last = profile_images(
            ChannelsLast(twin), "transpose", data, kind=kind, channel_dim=-1, **QUIET
        )
        assert (first.weights["1"] != last.weights["transpose"]).nnz == 0


def test_class_profiles_are_sums():
    model, data = deep(), batches()
    profiles = profile_images(model, ["stage1", "stage2"], data, share=0.4, **QUIET)
    _, y = joined(data)
    classes = profiles.by_class()
    assert sorted(classes) == [0, 1, 2]
    for label, profile in classes.items():
        members = [profiles[i] for i in (y == label).nonzero()[:, 0].tolist()]
        total = members[0]
        for member in members[1:]:
            total = total + member
        assert total.num_images == profile.num_images == len(members)
        for name in profile.layers:
            assert (total.counts[name] != profile.counts[name]).nnz == 0
            np.testing.assert_allclose(
                total.totals[name].toarray(), profile.totals[name].toarray(), rtol=1e-12
            )
            assert profile.weights(name).sum() == pytest.approx(1)
            assert profile.counts[name].max() <= profile.num_images
    assert len(profiles) == 24
    assert profiles[-1].counts["stage1"].sum() == profiles[23].counts["stage1"].sum()


def test_images_are_taken_by_a_mask():
    profiles = profile_images(deep(), "stage1", batches(), share=0.4, **QUIET)
    expected = profiles.by_class()[1].totals["stage1"].toarray()
    mask = profiles.labels == 1
    for chosen in (mask, mask.numpy(), mask.tolist(), mask.nonzero()[:, 0]):
        summed = profiles.of(chosen)  # type: ignore[arg-type]
        assert summed.num_images == int(mask.sum())
        np.testing.assert_array_equal(summed.totals["stage1"].toarray(), expected)
    assert profiles.of([]).num_images == 0
    assert profiles.of(range(5)).num_images == 5


def test_similarities_equal_scikit_learn():
    model, data = deep(), batches()
    profiles = profile_images(model, ["stage1", "stage2"], data, share=0.4, **QUIET)
    some = [profiles[i] for i in range(5)] + [profiles.by_class()[0]]
    members = [
        {name: (one.counts[name].toarray()[0] > 0) for name in ("stage1", "stage2")} for one in some
    ]
    whole = similarity_matrix(some)
    mean = similarity_matrix(some, "average")
    inside = similarity_matrix(some, "instance")
    for i, first in enumerate(members):
        for j, second in enumerate(members):
            a, b = (np.concatenate(list(one.values())) for one in (first, second))
            assert whole[i, j] == pytest.approx(jaccard_score(a, b))
            layers = [jaccard_score(first[name], second[name]) for name in first]
            assert mean[i, j] == pytest.approx(np.mean(layers))
            assert inside[i, j] == pytest.approx((a & b).sum() / a.sum())
    assert jaccard(some[0], some[1]) == whole[0, 1]
    assert average_jaccard(some[0], some[1]) == mean[0, 1]
    assert instance_jaccard(some[0], some[5]) == inside[0, 5]
    only = jaccard(some[0], some[1], layers=["stage2"])
    assert only == pytest.approx(jaccard_score(members[0]["stage2"], members[1]["stage2"]))


def test_profiles_without_units():
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Flatten())
    nn.init.zeros_(model.get_parameter("0.weight"))
    nn.init.constant_(model.get_parameter("0.bias"), -1.0)
    profiles = profile_images(model, "0", batches(), **QUIET)
    assert profiles[0].size == 0
    assert jaccard(profiles[0], profiles[1]) == 1
    assert instance_jaccard(profiles[0], profiles[1]) == 1
    assert profiles[0].weights("0").sum() == 0


def test_bad_input():
    model, data = deep(), batches()
    svd = {"stage1.0": layer_svd(model.stage1[0])}
    for options, message in (
        ({"kind": "synapse"}, "choose one of"),
        ({"kind": "direction"}, "needs them"),
        ({"directions": svd}, "directions go with"),
        ({"kind": "element", "aggregate": "mean"}, "does not apply"),
        ({"aggregate": "median"}, "aggregate='median'"),
        ({"share": 0.1, "quantile": 0.5}, "Give one of"),
    ):
        with pytest.raises(ValueError, match=message):
            profile_images(model, "stage1.0", data, **options, **QUIET)
    with pytest.raises(ValueError, match="no directions for the layer 'stage2'"):
        profile_images(model, "stage2", data, kind="direction", directions=svd, **QUIET)
    zeros = torch.zeros(2, dtype=torch.int64)
    sizes = [(images(2, 6), zeros), (images(2, 8), zeros)]
    with pytest.raises(ValueError, match="differ in size"):
        profile_images(model, "stage1", sizes, kind="position", **QUIET)
    profiles = profile_images(model, "stage1", data, **QUIET)
    other = profile_images(model, "stage2", data, **QUIET)
    with pytest.raises(ValueError, match="do not add"):
        profiles[0] + other[0]
    with pytest.raises(ValueError, match="same layers"):
        jaccard(profiles[0], other[0])
    with pytest.raises(ValueError, match="the profiles have"):
        jaccard(profiles[0], profiles[1], layers=["stage2"])
    with pytest.raises(ValueError, match="measure='cosine'"):
        similarity_matrix([profiles[0]], "cosine")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no profiles"):
        similarity_matrix([])
    with pytest.raises(IndexError, match="24 images"):
        profiles[24]
    with pytest.raises(IndexError, match="not one with index -25"):
        profiles.of([0, -25])
    for key, kind in (("0", "a str"), (1.5, "a float"), (None, "a NoneType")):
        with pytest.raises(TypeError, match=f"the index of an image, not {kind}"):
            profiles[key]  # type: ignore[call-overload]
    assert profiles[np.int64(3)].size == profiles[3].size
