"""Pictures of exemplars, hypergraphs and profiles draw what they are given."""

from typing import Any

import matplotlib.colors
import numpy as np
import pytest
import torch
from matplotlib.patches import Rectangle
from torch.utils.data import DataLoader, TensorDataset

from captum_classfilters.identify import exemplars
from captum_classfilters.spectral import class_hypergraph, separation_test
from captum_classfilters.spectral.hypergraph import Hypergraph
from captum_classfilters.visualize import (
    plot_class_separation,
    plot_exemplars,
    plot_hypergraph,
    plot_profile_similarity,
)
from tests.models import QUIET, deep, images, known


def dataset(number=5):
    pixels = images(number)[:, :1].expand(-1, 2, -1, -1).sigmoid()
    return TensorDataset(pixels.contiguous(), torch.arange(number) % 3)


def sheet_of(data, **options):
    found = exemplars(
        deep(), "stage1.0", DataLoader(data, batch_size=2), num_exemplars=3, **options, **QUIET
    )
    return found["stage1.0"]


class OneChannel:
    """The data set's first channel, so that it can be drawn."""

    def __init__(self, data):
        self.data = data

    def __getitem__(self, index):
        return self.data[index][0][:1]


def test_exemplar_sheet_draws_images_and_boxes():
    data = dataset()
    found = sheet_of(data)
    _, grid = plot_exemplars(found, OneChannel(data), [2, 0], patches=False, class_names=[*"abc"])
    assert grid.shape == (2, 6)
    places = [("lowest", 0), ("lowest", 1), ("lowest", 2)]
    places += [("highest", 2), ("highest", 1), ("highest", 0)]
    for row, unit in enumerate([2, 0]):
        for axes, (side, place) in zip(grid[row], places, strict=True):
            chosen = found.side(side)
            drawn = np.asarray(axes.images[0].get_array())
            expected = data[int(chosen.image[unit, place])][0][0].numpy()
            np.testing.assert_array_equal(drawn, expected)
            (box,) = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
            left, top, right, bottom = chosen.box[unit, place].tolist()
            assert box.get_bbox().bounds == (left - 0.5, top - 0.5, right - left, bottom - top)
            assert axes.get_title().startswith("abc"[int(chosen.label[unit, place])])
    assert grid[0, 0].get_ylabel() == "filter 2"


def test_exemplar_sheet_draws_patches_and_leaves_gaps():
    data = dataset(2)
    found = sheet_of(data)
    _, grid = plot_exemplars(found, OneChannel(data), [1], sides="highest", patches=True)
    assert grid.shape == (1, 2)  # there are two images only
    for place in range(2):
        drawn = np.asarray(grid[0, 1 - place].images[0].get_array())
        left, top, right, bottom = found.highest.box[1, place].tolist()
        image = data[int(found.highest.image[1, place])][0][0].numpy()
        np.testing.assert_array_equal(drawn, image[top:bottom, left:right])
    _, grid = plot_exemplars(
        found,
        OneChannel(data),
        [1],
        num_images=1,
        sides="lowest",
        patches=False,
        to_display=lambda x: 1 - x,
    )
    drawn = np.asarray(grid[0, 0].images[0].get_array())
    index = int(found.lowest.image[1, 0])
    np.testing.assert_allclose(drawn, 1 - data[index][0][0].numpy(), rtol=1e-6)


def test_exemplar_sheet_refuses():
    data = dataset()
    found = sheet_of(data, boxes=False)
    with pytest.raises(ValueError, match="boxes=True"):
        plot_exemplars(found, OneChannel(data), [0], patches=True)
    with pytest.raises(ValueError, match="units 0 to 3"):
        plot_exemplars(found, OneChannel(data), [4])
    with pytest.raises(ValueError, match="sides='top'"):
        plot_exemplars(found, OneChannel(data), [0], sides="top")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Nothing to draw"):
        plot_exemplars(found, OneChannel(data), [])


def graph():
    incidence = np.array([[1, 1, 0, 0], [0, 1, 1, 0]], dtype=bool)
    return Hypergraph(incidence, ("cat", "dog"), ("u0", "u1", "u2", "u3"), np.arange(2), 2)


def test_incidence_picture():
    _, axes = plot_hypergraph(graph())
    drawn = np.asarray(axes.images[0].get_array())
    assert [label.get_text() for label in axes.get_xticklabels()] == ["u0", "u2", "u1"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "dog"]
    assert drawn.tolist() == [[1, 0, 1], [0, 1, 1]]


def test_incidence_picture_of_images_shows_shares():
    scores = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    made = class_hypergraph(scores, torch.tensor([0, 0, 1, 1]), vertices="image", threshold=0.5)
    _, axes = plot_hypergraph(made, class_names=["cat", "dog"])
    drawn = np.asarray(axes.images[0].get_array())
    assert [label.get_text() for label in axes.get_xticklabels()] == ["u1", "u0"]
    assert drawn.tolist() == [[0, 1], [0.5, 0.5]]


def test_bands_draw_every_edge_and_vertex():
    pytest.importorskip("hypernetx")
    _, axes = plot_hypergraph(graph(), style="bands", title="two classes")
    texts = {text.get_text() for text in axes.texts}
    assert {"cat", "dog"} <= texts
    assert axes.get_title(loc="left") == "two classes"


def test_hypergraph_picture_refuses():
    with pytest.raises(ValueError, match="choose 'incidence' or 'bands'"):
        plot_hypergraph(graph(), style="circles")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is a dual"):
        plot_hypergraph(graph().dual())
    empty = Hypergraph(np.zeros((2, 1), dtype=bool), ("a", "b"), ("u0",), np.arange(2), 2)
    for style in ("incidence", "bands"):
        with pytest.raises(ValueError, match="no incidences: its rule found nothing"):
            plot_hypergraph(empty, style=style)
    with pytest.raises(ValueError, match="class_names has 1 names; expected 2"):
        plot_hypergraph(graph(), class_names=["a"])


def test_as_many_images_as_classes_are_not_taken_for_them():
    scores = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    made = class_hypergraph(scores, torch.tensor([1, 0]), vertices="image", threshold=0.5)
    _, axes = plot_hypergraph(made)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "1"]
    drawn = np.asarray(axes.images[0].get_array())
    names = [label.get_text() for label in axes.get_xticklabels()]
    assert drawn[0].tolist() == [float(name == "u1") for name in names]


def test_which_directions_are_drawn():
    _, axes = plot_hypergraph(graph(), classes=["dog", "cat"], edges=["u3", "u1"])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["u3", "u1"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["dog", "cat"]
    assert np.asarray(axes.images[0].get_array()).tolist() == [[0, 1], [0, 1]]
    _, axes = plot_hypergraph(graph(), edges=1)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["u1"]  # in two classes
    assert "the 1 of 4 directions" in axes.get_xlabel()


def test_layers_whose_rule_found_nothing_are_gaps():
    labels = torch.arange(12) % 3
    options: dict[str, Any] = {"permutations": 5, "threshold": 0.3, **QUIET}
    nothing = separation_test(torch.zeros(12, 6), labels, **options)
    some = separation_test(torch.eye(3).repeat(1, 2)[labels], labels, **options)
    _, axes = plot_class_separation({"a": nothing, "b": some}, score="purity")
    assert np.isnan(np.asarray(axes.lines[1].get_ydata())[0])
    assert np.asarray(axes.lines[1].get_ydata())[1] == 1
    with pytest.raises(ValueError, match="No layer has the score 'components': the rule found no"):
        plot_class_separation({"a": nothing}, score="components")


def test_class_separation_against_depth():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    noise = torch.rand(60, 24, generator=generator)
    apart = noise + torch.eye(3).repeat_interleave(8, dim=1)[labels]
    options: dict[str, Any] = {"threshold": 0.05, "permutations": 39, **QUIET}
    tests = {
        "early": separation_test(noise, labels, **options),
        "late": separation_test(apart, labels, **options),
    }
    _, axes = plot_class_separation(tests, score="purity")
    line = np.asarray(axes.lines[1].get_ydata())
    assert line.tolist() == [test.observed["purity"] for test in tests.values()]
    median = np.asarray(axes.lines[0].get_ydata())
    assert median.tolist() == [np.nanmedian(test.null["purity"]) for test in tests.values()]
    points = [(np.asarray(c.get_offsets()), str(c.get_label())) for c in axes.collections]
    filled = [offsets for offsets, label in points if len(offsets) and "≤" in label]
    chosen = [int(x) for x, _ in filled[0]] if filled else []
    assert chosen == [i for i, t in enumerate(tests.values()) if t.p_values["purity"] <= 0.05]
    assert 1 in chosen
    with pytest.raises(ValueError, match="no layers"):
        plot_class_separation({})
    with pytest.raises(ValueError, match="score='depth'"):
        plot_class_separation(tests, score="depth")  # type: ignore[arg-type]


def test_profile_similarity():
    values = np.array([[1.0, 0.25], [0.5, 1.0]])
    figure, axes = plot_profile_similarity(values, ["a", "b"], label="share")
    drawn = np.ma.masked_invalid(known(axes.images[0].get_array()))
    assert drawn.mask.tolist() == [[True, False], [False, True]]
    assert drawn.compressed().tolist() == [0.25, 0.5]
    assert {text.get_text() for text in axes.texts} == {"0.25", "0.50"}
    assert figure.axes[1].get_ylabel() == "share"
    assert values[0, 0] == 1  # the caller's matrix is not changed
    assert matplotlib.colors.to_rgb(axes.get_facecolor()) == (0.85, 0.85, 0.85)
    with pytest.raises(ValueError, match="for 3 names"):
        plot_profile_similarity(values, ["a", "b", "c"])
