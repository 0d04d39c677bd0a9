"""Exemplars: patches, boxes and crosses for images, signals and volumes; zeros are left out."""

import numpy as np
import pytest
import torch
from matplotlib.patches import Rectangle
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from captum_classfilters.identify import exemplars, receptive_field
from captum_classfilters.visualize import plot_exemplars
from tests.models import QUIET

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SIZES = {1: (9,), 2: (9, 11), 3: (7, 9, 11)}


def smoother(dims, rectified=False):
    """One filter: the mean of 3 x ... neighbors, every second of them."""
    conv = CONVOLUTIONS[dims](1, 1, 3, padding=1, stride=2, bias=False)
    nn.init.constant_(conv.weight, 1.0)
    return nn.Sequential(conv, nn.ReLU() if rectified else nn.Identity(), nn.Flatten())


def bright(dims, places, values):
    """Black images with one pixel each."""
    images = torch.zeros(len(places), 1, *SIZES[dims])
    for image, place, value in zip(images, places, values, strict=True):
        where = (0, *place)
        image[where] = value
    return TensorDataset(images, torch.arange(len(places)))


def found(net, data, layer="0", **options):
    return exemplars(net, layer, DataLoader(data, batch_size=2), **options, **QUIET)[layer]


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_receptive_fields_of_signals_images_and_volumes(dims):
    images = torch.zeros(2, 1, *SIZES[dims])
    boxes = receptive_field(smoother(dims), "0", images)["0"]
    maps = tuple((size + 1) // 2 for size in SIZES[dims])
    assert boxes.shape == (*maps, 2 * dims)
    for position in np.ndindex(*maps):
        first = [max(0, 2 * at - 1) for at in position]
        end = [min(size, 2 * at + 2) for at, size in zip(position, SIZES[dims], strict=True)]
        # The last axis comes first: left, top, front.
        assert boxes[position].tolist() == [*first[::-1], *end[::-1]]


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_patches_of_signals_images_and_volumes(dims):
    place = (4, 6, 8)[:dims]
    data = bright(dims, [place, place], [1.0, 3.0])
    seen = found(smoother(dims), data)
    assert seen.positions == tuple((size + 1) // 2 for size in SIZES[dims])
    patch = seen.patches(data, 0)[0]
    assert patch.shape == (1, *[3] * dims)
    middle = (0, *[1] * dims)
    assert float(patch[middle]) == float(patch.sum()) == 3.0


def test_a_box_that_does_not_fit_is_refused():
    data = bright(1, [(4,)], [1.0])
    with pytest.raises(ValueError, match=r"shape \(5, 4\); its positions need \(5, 2\)"):
        found(smoother(1), data, boxes={"0": torch.zeros(5, 4, dtype=torch.long)})
    with pytest.raises(ValueError, match=r"signals \(N, C, L\)"):
        receptive_field(smoother(2), "0", torch.zeros(3, 4))


def test_patches_are_drawn_by_default_and_boxes_on_request():
    data = bright(2, [(4, 6), (0, 0)], [3.0, 2.0])
    seen = found(smoother(2), data)
    _, grid = plot_exemplars(seen, data, [0])
    assert grid.shape == (1, 2)  # the lowest are zero in both images
    assert grid[0, 1].get_title() == "3"
    np.testing.assert_array_equal(grid[0, 1].images[0].get_array(), data[0][0][0, 3:6, 5:8] / 3)
    _, grid = plot_exemplars(seen, data, [0], patches=False)
    assert grid[0, 1].images[0].get_array().shape == (9, 11)
    (box,) = [patch for patch in grid[0, 1].patches if isinstance(patch, Rectangle)]
    assert box.get_bbox().bounds == (4.5, 2.5, 3, 3)
    (cross,) = grid[0, 1].lines  # on the strongest position, (2, 3) of (5, 6)
    height, width = 2.5 / 5 * 9 - 0.5, 3.5 / 6 * 11 - 0.5
    np.testing.assert_allclose(cross.get_xydata(), [[width, height]])
    assert grid[0, 1].get_xlim() == (-0.5, 10.5)


def test_without_boxes_whole_images_are_drawn():
    data = bright(2, [(4, 6), (0, 0)], [3.0, 2.0])
    seen = found(smoother(2), data, boxes=False)
    _, grid = plot_exemplars(seen, data, [0])
    assert grid[0, 1].images[0].get_array().shape == (9, 11)
    assert not grid[0, 1].patches
    assert len(grid[0, 1].lines) == 1


def test_zeros_are_left_out():
    data = bright(2, [(4, 6), (0, 0), (2, 2)], [3.0, -2.0, -1.0])
    seen = found(smoother(2, rectified=True), data, layer="1")
    _, grid = plot_exemplars(seen, data, [0])  # of the lowest side nothing is left
    assert grid.shape == (1, 1)
    assert grid[0, 0].images
    _, grid = plot_exemplars(seen, data, [0], sides="lowest")
    assert grid.shape == (1, 1)
    assert not grid[0, 0].images
    assert [text.get_text() for text in grid[0, 0].texts] == ["scores of zero"]
    both = found(smoother(2), data)
    _, grid = plot_exemplars(both, data, [0])
    assert [axes.get_title() for axes in grid[0]] == ["-2", "-1", "3"]
    assert grid[0, 0].get_xlabel() == "lowest"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_images_of_any_type_and_number_of_channels(dtype, channels):
    torch.manual_seed(0)
    images = (torch.rand(2, channels, 12, 12) * (255 if dtype == torch.uint8 else 1)).to(dtype)
    net = nn.Sequential(nn.Conv2d(channels, 2, 3), nn.Flatten())
    data = TensorDataset(images.float(), torch.zeros(2).long())
    seen = found(net, data)
    figure, grid = plot_exemplars(seen, list(images), [0, 1])
    assert grid[0, 0].images
    figure.canvas.draw()
    chosen = (channels - 1, 0, 0) if channels > 1 else (0, 0, 0)
    _, grid = plot_exemplars(seen, list(images), [0], channels=chosen, patches=False)
    assert grid[0, 0].images[0].get_array().shape == (12, 12, 3)


def test_nan_is_named():
    data = bright(2, [(4, 6), (0, 0)], [3.0, 2.0])
    seen = found(smoother(2), data)
    broken = [torch.full((1, 9, 11), float("nan"))] * 2
    with pytest.raises(ValueError, match=r"The pixels of image . hold 99 NaN"):
        plot_exemplars(seen, broken, [0])


@pytest.mark.parametrize("patches", [True, False, None])
def test_signals_are_curves(patches):
    data = bright(1, [(4,), (8,)], [3.0, 2.0])
    seen = found(smoother(1), data)
    figure, grid = plot_exemplars(seen, data, [0], patches=patches)
    figure.canvas.draw()
    strongest = grid[0, 1]
    np.testing.assert_array_equal(strongest.lines[0].get_ydata(), data[0][0][0])
    if patches is False:
        assert strongest.patches[0].get_extents() is not None
    else:
        assert strongest.get_xlim() == (2.5, 5.5)
    assert list(strongest.lines[1].get_xdata()) == [pytest.approx(2.5 / 5 * 9 - 0.5)] * 2


def test_volumes_are_drawn_at_the_slice_of_the_position():
    data = bright(3, [(4, 6, 8), (0, 0, 0)], [3.0, 2.0])
    seen = found(smoother(3), data)
    figure, grid = plot_exemplars(seen, data, [0], patches=False)
    figure.canvas.draw()
    strongest = grid[0, 1]
    # Position 2 of 4 along a depth of 7 is slice 4.
    assert [text.get_text() for text in strongest.texts] == ["slice 4"]
    drawn = np.asarray(strongest.images[0].get_array())
    np.testing.assert_array_equal(drawn, data[0][0][0, 4] / 3)
    assert strongest.patches[0].get_bbox().bounds == (6.5, 4.5, 3, 3)
    _, grid = plot_exemplars(seen, data, [0])
    np.testing.assert_array_equal(grid[0, 1].images[0].get_array(), data[0][0][0, 4, 5:8, 7:10] / 3)


def test_tokens_of_an_image_have_boxes_but_no_cross():
    class Tokens(nn.Module):
        def forward(self, maps):
            return maps.flatten(2).transpose(1, 2)

    data = bright(2, [(4, 6), (0, 0)], [3.0, 2.0])
    net = nn.Sequential(smoother(2)[0], Tokens(), nn.Identity())
    seen = found(net, data, layer="2", channel_dim=-1)
    assert seen.positions == (30,)
    _, grid = plot_exemplars(seen, data, [0], patches=False)
    assert not grid[0, 1].lines
    assert grid[0, 1].patches[0].get_bbox().bounds == (4.5, 2.5, 3, 3)
