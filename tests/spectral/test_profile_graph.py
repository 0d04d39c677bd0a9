"""Contributions between layers, graphs, distances and persistence, by hand."""

import sys
from typing import Any

import networkx
import numpy as np
import pytest
import torch
from torch import nn

from captum_classfilters.spectral import (
    distance_matrix,
    influential,
    model_svd,
    persistence,
    profile_graph,
    profile_images,
)
from tests.models import QUIET, batches, deep, hooks_of, images


def linear_pair():
    """A 1x1 convolution and a linear layer, nothing between them."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 1), nn.Flatten(), nn.Linear(4, 3)).eval()


@pytest.mark.parametrize("share", [0.1, 0.6])
def test_between_linear_layers_contributions_are_weights_times_inputs(share):
    model = linear_pair()
    x = torch.randn(7, 2, 1, 1, generator=torch.Generator().manual_seed(1))
    data = [(x[:4], torch.zeros(4)), (x[4:], torch.zeros(3))]
    graph = profile_graph(model, ["0", "2"], data, share=0.5, contribution_share=share, **QUIET)
    hidden = model[0](x).detach()[..., 0, 0]
    chosen, _ = influential(model(x).detach(), share=0.5)
    weights, counts = torch.zeros(4, 3), torch.zeros(4, 3)
    for image, unit in chosen.nonzero().tolist():
        products = hidden[image] * model[2].weight.detach()[unit]
        mask, part = influential(products[None], share=share)
        weights[:, unit] += part[0].float() / len(x)
        counts[:, unit] += mask[0]
    assert graph.graph["num_images"] == 7
    assert graph.number_of_edges() == int((counts > 0).sum())
    for ((_, a), (_, b)), edge in graph.edges.items():
        assert edge["weight"] == pytest.approx(float(weights[a, b]), rel=1e-4)
        assert edge["count"] == int(counts[a, b])
        assert edge["length"] == pytest.approx(1 / edge["weight"])


def test_convolutions_with_in_place_relu_follow_the_gradient():
    model, x = deep(), images(1)
    graph = profile_graph(
        model, ["stage1.1", "stage2.1"], [(x, torch.zeros(1))], contribution_share=0.5, **QUIET
    )
    maps = model.stage1[1](model.stage1[0](x)).detach().requires_grad_()
    later = model.stage2[1](model.stage2[0](maps.relu()))
    scores = later.amax((2, 3))
    chosen, _ = influential(scores, share=0.1)
    edges = set()
    for unit in chosen[0].nonzero()[:, 0].tolist():
        (gradient,) = torch.autograd.grad(scores[0, unit], maps, retain_graph=True)
        products = (maps.detach() * gradient).sum((2, 3))
        mask, _ = influential(products, share=0.5)
        edges |= {(("stage1.1", a), ("stage2.1", unit)) for a in mask[0].nonzero()[:, 0].tolist()}
    assert set(graph.edges) == edges
    assert edges


@pytest.mark.parametrize("kind", ["order", "quantized"])
def test_layers_without_a_gradient_between_them_are_named(kind):
    model, names = deep(), ["stage1", "head"]
    if kind == "quantized":
        model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    else:
        names = names[::-1]
    message = f"{names[1]!r} reaches {names[0]!r}: .*order in which they run; quantized layers"
    with pytest.raises(ValueError, match=message):
        profile_graph(model, names, batches(5), **QUIET)


def test_directions():
    model = linear_pair()
    data = [
        (torch.randn(5, 2, 1, 1, generator=torch.Generator().manual_seed(2)), torch.arange(5) % 2)
    ]
    svds = model_svd(model)
    graph = profile_graph(
        model,
        ["0", "2"],
        data,
        kind="direction",
        directions=svds,
        share=0.9,
        contribution_share=0.99,
        **QUIET,
    )
    profiles = profile_images(
        model, ["0", "2"], data, kind="direction", directions=svds, share=0.9, **QUIET
    )
    influential_units = set(np.flatnonzero(profiles.of(range(5)).counts["2"].toarray()[0]))
    assert {b for (_, _), (_, b) in graph.edges} <= influential_units
    # One image by hand: the signal of the later direction is |sum_a P_a (g . u_a)|, up to a constant inside.
    one = profile_graph(
        model, ["0", "2"], [(data[0][0][:1], torch.zeros(1))], kind="direction", directions=svds,
        share=0.0, contribution_share=0.99, **QUIET,
    )  # fmt: skip
    hidden = model[0](data[0][0][:1]).detach()
    signal = (hidden[..., 0, 0] - model[0].bias.detach()) @ svds["0"].left
    later = (model[2](hidden.flatten(1)) - model[2].bias).detach() @ svds["2"].left
    unit = int(later.abs().argmax())
    sign = later[0, unit].sign()
    through = sign * svds["0"].left.T @ model[2].weight.detach().T @ svds["2"].left[:, unit]
    mask, weights = influential(signal * through, share=0.99)
    assert {a for (_, a), _ in one.edges} == set(mask[0].nonzero()[:, 0].tolist())
    for (_, a), (_, b) in one.edges:
        assert b == unit
        assert one.edges[("0", a), ("2", b)]["weight"] == pytest.approx(
            float(weights[0, a]), rel=1e-4
        )


def chain():
    graph = networkx.DiGraph()
    graph.add_edge("a", "b", length=2.0)
    graph.add_edge("b", "c", length=1.0)
    graph.add_edge("d", "e", length=4.0)
    return graph


def test_distances():
    nodes, undirected = distance_matrix(chain())
    inf = np.inf
    expected = [
        [0, 2, 3, inf, inf],
        [2, 0, 1, inf, inf],
        [3, 1, 0, inf, inf],
        [inf, inf, inf, 0, 4],
        [inf, inf, inf, 4, 0],
    ]
    assert nodes == ["a", "b", "c", "d", "e"]
    assert undirected.tolist() == expected
    directed = distance_matrix(chain(), directed=True)[1]
    assert directed[0].tolist() == [0, 2, 3, inf, inf]
    assert directed[2].tolist() == [inf, inf, 0, inf, inf]
    kernel = distance_matrix(chain(), kernel=True)[1]
    spread = np.std([2, 3, 1, 4])
    np.testing.assert_allclose(kernel, 1 - np.exp(-np.array(expected) / (2 * spread)))
    assert distance_matrix(networkx.DiGraph())[1].shape == (0, 0)


@pytest.mark.parametrize(
    ("pairs", "length"), [(1, 3.0), (5, 10 / 3), (6, 10 / 3), (7, 0.1), (2, 0.0)]
)
def test_the_kernel_of_equal_distances(pairs, length):
    """Rounding may leave a spread that is none."""
    graph = networkx.DiGraph()
    for pair in range(pairs):
        graph.add_edge(("a", pair), ("b", pair), length=length)
    kernel = distance_matrix(graph, kernel=True)[1]
    if length:
        np.testing.assert_allclose(kernel[::2, 1::2].diagonal(), 1 - np.exp(-0.5))
    assert (kernel.diagonal() == 0).all()
    assert np.isfinite(kernel).all()


def rounding_path():
    """0.1 + 0.2 + 0.3 is not 0.3 + 0.2 + 0.1."""
    graph = networkx.DiGraph()
    for ends, length in (("ab", 0.1), ("bc", 0.2), ("cd", 0.3)):
        graph.add_edge(*ends, length=length)
    return graph


@pytest.mark.parametrize("kernel", [False, True])
def test_undirected_distances_are_symmetric(kernel):
    distances = distance_matrix(rounding_path(), kernel=kernel)[1]
    assert (distances == distances.T).all()
    assert len(distances) == 4


def test_persistence_of_paths_that_round():
    pytest.importorskip("ripser")
    components, _ = persistence(distance_matrix(rounding_path())[1])
    np.testing.assert_allclose(components[:-1, 1], [0.1, 0.2, 0.3])


@pytest.mark.parametrize("length", [0.1, 0.7, 3.0])
def test_equal_distances_keep_their_scale(length):
    """Their deviation is not always zero."""
    all_alike = networkx.DiGraph()
    all_alike.add_edges_from([(a, b) for a in range(4) for b in range(a)], length=length)
    kernel = distance_matrix(all_alike, kernel=True)[1]
    np.testing.assert_allclose(kernel, (1 - np.exp(-0.5)) * (1 - np.eye(4)))


def test_persistence():
    pytest.importorskip("ripser")
    angles = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    points = np.stack([np.cos(angles), np.sin(angles)], 1)
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1)
    distances = (distances + distances.T) / 2
    components, loops = persistence(distances)
    step = 2 * np.sin(np.pi / 12)
    assert len(components) == 12
    np.testing.assert_allclose(np.sort(components[:-1, 1]), step, rtol=1e-5)
    assert len(loops) == 1  # a circle has one loop, born when neighbors meet
    assert loops[0, 0] == pytest.approx(step, rel=1e-5)
    with pytest.raises(ValueError, match="directed=False"):
        persistence(distance_matrix(chain(), directed=True)[1])
    single = np.linalg.norm((points[:, None] - points[None]).astype(np.float32), axis=-1)
    single[0, 5] *= 1 + 1e-7  # other ways of computing it round apart
    np.testing.assert_allclose(persistence(single)[1], loops, rtol=1e-5)
    uneven = np.array(distances)
    uneven[0, 5] *= 1.001
    missing = np.full((3, 3), np.nan)
    wrong: list[Any] = [chain(), distance_matrix(chain()), uneven, missing, np.zeros((1, 3))]
    for distances in wrong:
        with pytest.raises(ValueError, match=r"distances (is|have).*distance_matrix"):
            persistence(distances)


def test_missing_packages(monkeypatch):
    monkeypatch.setitem(sys.modules, "ripser", None)
    with pytest.raises(ImportError, match=r"captum-classfilters\[persistence\]"):
        persistence(np.zeros((2, 2)))
    monkeypatch.setitem(sys.modules, "networkx", None)
    with pytest.raises(ImportError, match=r"captum-classfilters\[hypergraph\]"):
        profile_graph(deep(), ["stage1", "stage2"], batches(), **QUIET)


def test_bad_input():
    model, data = deep(), batches()
    with pytest.raises(ValueError, match="two layers or more"):
        profile_graph(model, ["stage1"], data, **QUIET)
    with pytest.raises(ValueError, match="order in which they run"):
        profile_graph(model, ["stage2", "stage1"], data, **QUIET)
    with pytest.raises(ValueError, match="kind='element'"):
        profile_graph(model, ["stage1", "stage2"], data, kind="element", **QUIET)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs them"):
        profile_graph(model, ["stage1", "stage2"], data, kind="direction", **QUIET)
    with pytest.raises(ValueError, match=r"share=1.5; expected"):
        profile_graph(model, ["stage1", "stage2"], data, share=1.5, **QUIET)
    with pytest.raises(ValueError, match="loader is empty"):
        profile_graph(model, ["stage1", "stage2"], [], **QUIET)
    assert hooks_of(model) == 0
