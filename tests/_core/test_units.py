"""Maps of units as numbers, and rows of many images, by formulas."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from captum_classfilters._core import units
from captum_classfilters._core.batches import Batch
from captum_classfilters._core.taps import tapping
from captum_classfilters._core.units import (
    Rows,
    UnitTap,
    aggregated,
    given_classes,
    num_outputs,
    projected_bias,
    read_units,
    units_of,
)
from tests.models import batches, deep, hooks_of, images, known, pool_linear
from tests.pretend_device import host_reads, pretend

FORMULAS = {
    "mean": lambda m: m.sum(2) / m.shape[2],
    "max": lambda m: m.max(2).values,
    "min": lambda m: m.min(2).values,
    "sum": lambda m: m.sum(2),
    "abs_mean": lambda m: m.abs().sum(2) / m.shape[2],
    "abs_sum": lambda m: m.abs().sum(2),
    "l2": lambda m: m.square().sum(2).sqrt(),
}


@pytest.mark.parametrize("aggregate", FORMULAS)
def test_aggregates_in_any_precision(aggregate):
    maps = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)).double()
    expected = FORMULAS[aggregate](maps)
    torch.testing.assert_close(aggregated(maps, aggregate), expected)
    large = (300 * maps).half()  # whose squares and sums half precision cannot hold
    found = aggregated(large, aggregate)
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found, FORMULAS[aggregate](large.double()).float(), rtol=1e-5, atol=0
    )


def test_unknown_aggregate():
    with pytest.raises(ValueError, match=r"aggregate='median'; choose one of 'mean', .* and 'l2'"):
        aggregated(torch.zeros(1, 1, 1), "median")


def tapped_maps(model, tap, x):
    with torch.no_grad(), tapping([tap]):
        model(x)
    tap.check(len(x))
    return tap.seen[0]


def test_maps_of_filters_and_of_directions():
    model, x = pool_linear(), images(3)
    output = model[0](x).detach()
    tap = UnitTap(model, model[0])
    assert torch.equal(tapped_maps(model, tap, x), output.flatten(2))
    assert tap.positions == (4, 4)
    matrix = torch.randn(6, 2, generator=torch.Generator().manual_seed(3))
    centered = output - model.get_parameter("0.bias").detach()[:, None, None]
    for subtract, maps in ((True, centered), (False, output)):
        tap = UnitTap(model, model[0], directions=matrix, subtract_bias=subtract)
        expected = torch.einsum("nkhw,kr->nrhw", maps, matrix).flatten(2)
        torch.testing.assert_close(tapped_maps(model, tap, x), expected)
        tap.average_first = True
        torch.testing.assert_close(tapped_maps(model, tap, x), expected.mean(2, keepdim=True))
    same = UnitTap(model, model[0], directions=SimpleNamespace(left=matrix))
    assert torch.equal(known(same.matrix), matrix)
    assert torch.equal(projected_bias(model[1], matrix), torch.zeros(2))  # a ReLU has none


@pytest.mark.parametrize("recorded", [True, False])
def test_a_tap_that_is_frozen_lets_the_model_run_again(recorded):
    """As whoever asks whether one output is a probability does, without gradients."""
    model, x = pool_linear(), images(3)
    tap = UnitTap(model, model[0])
    tap.differentiable = True
    with tapping([tap]):
        output = model(x)
        source, (seen,) = tap.source, tap.seen
        tap.frozen = True
        with torch.set_grad_enabled(recorded):
            assert torch.equal(model(2 * x), model[1:](model[0](2 * x)))
        tap.check(3)
        assert tap.source is source
        assert tap.seen[0] is seen
        assert torch.autograd.grad(output.sum(), source)[0].abs().sum() > 0
        tap.frozen = False
        with torch.no_grad(), pytest.raises(ValueError, match=r"layer '0' under torch.no_grad\(\)"):
            model(x)


def test_projections_keep_their_precision_under_autocast():
    model = pool_linear()
    tap = UnitTap(model, model[1], directions=torch.eye(6)[:, :2])
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad(), tapping([tap]):
        maps = model[1](torch.randn(3, 6, 4, 4) / 3)
    assert torch.equal(tap.seen[0], maps[:, :2].flatten(2))


def test_a_differentiable_layer_takes_gradients_and_is_not_overwritten():
    model, x = deep(), images(3)
    tap = UnitTap(model, model.stage1[1])
    tap.differentiable = True
    with torch.enable_grad(), tapping([tap]):
        model.requires_grad_(False)
        output = model(x)  # the ReLU after the layer works in place
        (gradient,) = torch.autograd.grad(output[:, 1].sum(), tap.source)
    assert bool((tap.source < 0).any())
    leaf = tap.source.detach().requires_grad_()
    later = model[1:](model.stage1[2](leaf.clone()))
    torch.testing.assert_close(gradient, torch.autograd.grad(later[:, 1].sum(), leaf)[0])


def test_layers_that_are_no_maps():
    embedding = nn.Sequential(nn.Identity(), nn.Embedding(5, 4))
    tap = UnitTap(embedding, embedding[0])
    with pytest.raises(ValueError, match=r"handles torch\.int64, not floating-point"):
        tapped_maps(embedding, tap, torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="There are no layers"):
        units_of(deep(), [])
    assert hooks_of(embedding) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_named(value):
    data = batches()
    data[2][0][3, 1, 2, 2] = value
    message = "activations of the layer 'stage1.0' for image 13: batch 2, image 3 of the batch"

    def read(model):
        (tap,) = units_of(model, "stage1.0")
        tap.reduce = lambda maps: (aggregated(maps, "mean"),)
        with pytest.raises(ValueError, match=message):
            read_units(model, [tap], data, "t", lambda *_: None, unpack=None, show_progress=False)
        assert hooks_of(model) == 0

    read(deep())
    with pretend("cuda") as device:
        read(deep().to(device))


def batch(labels, size=3):
    return Batch(0, 0, (images(size),), labels)


def test_given_classes():
    labels: object
    for labels in ([2, 0, 1], torch.tensor([2, 0, 1]), torch.tensor([[2], [0], [1]]).int()):
        assert known(given_classes(batch(labels))).tolist() == [2, 0, 1]
    for labels in (
        None,
        torch.zeros(3),
        torch.zeros(3, dtype=torch.bool),
        torch.zeros(3, 2, dtype=torch.int64),
        [True, False, True],
        ["a", "b", "c"],
        torch.tensor([1, 2]),
    ):
        assert given_classes(batch(labels)) is None
    assert known(given_classes(batch(torch.tensor([[4]]), 1))).tolist() == [4]


def test_num_outputs():
    assert num_outputs(torch.zeros(3, 5)) == 5
    assert num_outputs(torch.zeros(3, 1)) == 2
    assert num_outputs(torch.zeros(3, 5, 2, 2)) is None
    assert num_outputs((torch.zeros(3, 5),)) is None


def test_rows_are_moved_together(monkeypatch):
    monkeypatch.setattr(units, "_BYTES_ON_DEVICE", 4 * 6 * 5)  # five rows of six float32
    values = torch.randn(14, 6, generator=torch.Generator().manual_seed(0))
    with pretend("cuda") as device:
        rows, pairs = Rows(), Rows(lambda a, b: (a + b).sum(1).cpu())
        for part in values.split(3):
            rows.add(part.to(device))
            pairs.add(part.to(device), part.to(device))
        host_reads.clear()
        assert [len(piece) for piece in rows.pieces()] == [6, 6, 2]
        assert len(host_reads) == 1  # the last piece
        assert torch.equal(torch.cat(rows.pieces()), values)
        assert [len(piece) for piece in pairs.pieces()] == [3, 3, 3, 3, 2]
        assert torch.equal(torch.cat(pairs.pieces()), (2 * values).sum(1))
