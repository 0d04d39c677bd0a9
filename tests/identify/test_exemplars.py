"""Exemplars by hand and by brute force; receptive fields against arithmetic and gradients."""

import weakref
from typing import Literal

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from captum_classfilters.identify import exemplars, receptive_field
from tests.models import (
    QUIET,
    ChannelsLast,
    Reused,
    TwoInputs,
    batches,
    deep,
    images,
    joined,
    known,
    pool_linear,
)

SIDES: tuple[Literal["highest", "lowest"], ...] = ("highest", "lowest")
AGGREGATES = {
    "extreme": (lambda maps: maps.amax(2), lambda maps: maps.amin(2)),
    "mean": (lambda maps: maps.mean(2),) * 2,
    "max": (lambda maps: maps.amax(2),) * 2,
    "min": (lambda maps: maps.amin(2),) * 2,
    "abs_mean": (lambda maps: maps.abs().mean(2),) * 2,
    "l2": (lambda maps: maps.square().sum(2).sqrt(),) * 2,
}


def brute_force(values, number, highest):
    """Image indices by value, ties to the lower index, in plain Python."""
    columns = values.double().T.tolist()
    sign = -1 if highest else 1
    return [
        sorted(range(len(column)), key=lambda i: (sign * column[i], i))[:number]
        for column in columns
    ]


def pass_through(channels=1):
    """A model whose layer "0" puts out its input."""
    model = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.Flatten())
    model.get_parameter("0.weight").data.copy_(torch.eye(channels)[:, :, None, None])
    return model


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_equals_sorting_all_images(aggregate):
    model, data = deep(), batches()
    found = exemplars(
        model, ["stage1.0", "stage2"], data, num_exemplars=4, aggregate=aggregate, **QUIET
    )
    x, y = joined(data)
    with torch.no_grad():
        maps = {"stage1.0": model.stage1[0](x), "stage2": model.stage2(model.stage1(x))}
    for name, layer in maps.items():
        for side, reduce in zip(SIDES, AGGREGATES[aggregate], strict=True):
            values = reduce(layer.flatten(2))
            expected = torch.tensor(brute_force(values, 4, side == "highest"))
            mine = found[name].side(side)
            score = values.T.gather(1, expected)
            torch.testing.assert_close(mine.score, score)
            # Rounding may swap images whose aggregates differ in the last bit only.
            torch.testing.assert_close(values.T.gather(1, mine.image), score)
            assert torch.equal(known(mine.label), y[mine.image])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(-2, 2), min_size=4, max_size=4), min_size=1, max_size=9),
    st.integers(1, 6),
    st.integers(1, 4),
    st.sampled_from(sorted(AGGREGATES)),
)
def test_ties_and_short_data(rows, number, batch_size, aggregate):
    x = torch.tensor(rows, dtype=torch.float32).reshape(-1, 1, 2, 2)
    loader = DataLoader(TensorDataset(x, torch.zeros(len(x))), batch_size=batch_size)
    found = exemplars(
        pass_through(), "0", loader, num_exemplars=number, aggregate=aggregate, **QUIET
    )["0"]
    for side, reduce in zip(SIDES, AGGREGATES[aggregate], strict=True):
        values = reduce(x.flatten(2))
        expected = brute_force(values, number, side == "highest")[0]
        mine = found.side(side)
        assert mine.image[0].tolist() == expected + [-1] * (number - len(expected))
        assert mine.score[0, : len(expected)].tolist() == values[expected, 0].tolist()
        assert bool(mine.score[0, len(expected) :].isnan().all())
    assert found.num_images == len(x)


def test_a_unit_that_is_negative_everywhere_and_the_place_of_its_patch():
    x = -torch.arange(1.0, 13).reshape(3, 1, 2, 2)
    data = [(x, torch.arange(3))]
    found = exemplars(pass_through(), "0", data, num_exemplars=2, **QUIET)["0"]
    assert found.highest.image.tolist() == [[0, 1]]
    assert found.highest.score.tolist() == [[-1.0, -5.0]]
    assert found.highest.position.tolist() == [[[0, 0], [0, 0]]]
    assert found.lowest.score.tolist() == [[-12.0, -8.0]]
    assert known(found.lowest.box).tolist() == [[[1, 1, 2, 2], [1, 1, 2, 2]]]
    assert known(found.lowest.label).tolist() == [[2, 1]]
    largest = exemplars(pass_through(), "0", data, aggregate="l2", num_exemplars=1, **QUIET)["0"]
    assert largest.lowest.image.tolist() == [[0]]
    assert largest.lowest.position.tolist() == [[[1, 1]]]  # -4 is furthest from zero


def test_patches_are_cut_where_the_boxes_say():
    x = torch.arange(32.0).reshape(2, 1, 4, 4)
    dataset = TensorDataset(x, torch.arange(2))
    model = nn.Sequential(nn.MaxPool2d(2), nn.Flatten())
    found = exemplars(model, "0", DataLoader(dataset), num_exemplars=5, **QUIET)["0"]
    patches = found.patches(dataset, 0)
    assert len(patches) == 2
    assert patches[0].tolist() == [[[26.0, 27.0], [30.0, 31.0]]]
    assert found.patches(x, 0, "lowest")[0].tolist() == [[[0.0, 1.0], [4.0, 5.0]]]
    with pytest.raises(ValueError, match="unit=1; '0' has units 0 to 0"):
        found.patches(dataset, 1)
    with pytest.raises(ValueError, match="choose 'highest' or 'lowest'"):
        found.patches(dataset, 0, "top")  # type: ignore[arg-type]
    whole = exemplars(model, "0", DataLoader(dataset), boxes=False, **QUIET)["0"]
    assert whole.highest.box is None
    assert torch.equal(whole.patches(dataset, 0)[0], x[1])


@pytest.mark.parametrize("subtract_bias", [True, False])
def test_directions_are_projections_without_the_bias(subtract_bias):
    model, data = pool_linear(), batches()
    matrix = torch.randn(6, 2, generator=torch.Generator().manual_seed(3))
    found = exemplars(
        model,
        "0",
        data,
        directions={"0": matrix},
        aggregate="l2",
        subtract_bias=subtract_bias,
        num_exemplars=3,
        **QUIET,
    )["0"]
    x, _ = joined(data)
    maps = model[0](x).detach()
    maps = maps - model.get_parameter("0.bias").detach()[:, None, None] if subtract_bias else maps
    signals = torch.einsum("nkhw,kr->nrhw", maps, matrix)
    norms = signals.square().sum((2, 3)).sqrt().T
    torch.testing.assert_close(found.highest.score, norms.sort(1, descending=True).values[:, :3])
    torch.testing.assert_close(found.lowest.score, norms.sort(1).values[:, :3])
    assert found.directions
    assert found.num_units == 2


def test_unit_directions_are_filters():
    model, data = deep(), batches()
    plain = exemplars(model, "stage2", data, **QUIET)["stage2"]
    unit = exemplars(model, "stage2", data, directions={"stage2": torch.eye(6)}, **QUIET)["stage2"]
    assert torch.equal(plain.highest.image, unit.highest.image)
    assert torch.equal(plain.highest.position, unit.highest.position)


def test_channels_last_and_vectors():
    twin = pool_linear()
    data = batches()
    first = exemplars(twin, "1", data, num_exemplars=3, **QUIET)["1"]
    last = exemplars(
        ChannelsLast(twin), "transpose", data, num_exemplars=3, channel_dim=-1, **QUIET
    )["transpose"]
    for name in ("image", "position", "box"):
        assert torch.equal(getattr(first.highest, name), getattr(last.highest, name)), name
    logits = exemplars(twin, "4", data, num_exemplars=3, **QUIET)["4"]
    assert logits.highest.position.tolist() == [[[0]] * 3] * 3
    assert known(logits.highest.box)[0, 0].tolist() == [0, 0, 6, 6]


def test_images_of_two_sizes():
    model = pool_linear()
    data = [(images(3, 6), torch.zeros(3)), (images(3, 9, seed=2), torch.zeros(3))]
    found = exemplars(model, "0", data, num_exemplars=6, **QUIET)["0"]
    for image, position, box in zip(
        found.highest.image[0], found.highest.position[0], known(found.highest.box)[0], strict=True
    ):
        row, column = position.tolist()
        assert box.tolist() == [column, row, column + 3, row + 3]
        assert max(row, column) < (4 if image < 3 else 7)


def test_batches_are_not_kept():
    alive = []

    def stream():
        for seed in range(40):
            x = torch.randn(2, 2, 6, 6, generator=torch.Generator().manual_seed(seed))
            alive.append(weakref.ref(x))
            yield x, torch.zeros(2)
            del x
            assert sum(ref() is not None for ref in alive) <= 2

    found = exemplars(deep(), ["stage1", "stage2"], stream(), num_exemplars=3, **QUIET)
    assert found["stage1"].num_images == 80
    # No view of a larger tensor is left behind either.
    for tensor in (found["stage2"].highest.score, found["stage2"].highest.image):
        assert tensor.untyped_storage().nbytes() <= 4 * 6 * 3 * 8


def test_bad_input():
    model, data = pool_linear(), batches()
    with pytest.raises(ValueError, match="loader shuffles"):
        exemplars(model, "0", DataLoader(TensorDataset(images()), shuffle=True), **QUIET)
    with pytest.raises(ValueError, match="loader is empty"):
        exemplars(model, "0", [], **QUIET)
    with pytest.raises(ValueError, match="aggregate='median'; choose one of"):
        exemplars(model, "0", data, aggregate="median", **QUIET)  # type: ignore[arg-type]
    for number in (0, 2.5):
        with pytest.raises(
            ValueError, match=f"num_exemplars={number}; expected a (positive|whole)"
        ):
            exemplars(model, "0", data, num_exemplars=number, **QUIET)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"has 6 filters; expected \(6, r\)"):
        exemplars(model, "0", data, directions={"0": torch.ones(5, 2)}, **QUIET)
    with pytest.raises(ValueError, match="no directions for the layer '0'"):
        exemplars(model, "0", data, directions={"1": torch.ones(6, 2)}, **QUIET)
    with pytest.raises(ValueError, match="are list; expected a matrix"):
        exemplars(model, "0", data, directions={"0": [1.0]}, **QUIET)  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="reached 2 times"):
        exemplars(Reused(), "relu", data, **QUIET)
    with pytest.raises(ValueError, match="never reached"):
        exemplars(Reused(), "unused", data, **QUIET)
    with pytest.raises(ValueError, match="no layer 'stage'"):
        exemplars(deep(), "stage", data, **QUIET)
    broken = images()
    broken[5, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="layer '0' for image 5: batch 0, image 5"):
        exemplars(model, "0", [(broken, torch.zeros(8))], **QUIET)
    with pytest.raises(ValueError, match="have shape None"):
        exemplars(model, "0", data, boxes={}, **QUIET)
    pair = [((images(4), images(4, seed=2)), torch.zeros(4))]
    with pytest.raises(ValueError, match="boxes=False"):
        exemplars(TwoInputs(), "conv", pair, **QUIET)
    found = exemplars(TwoInputs(), "conv", pair, boxes=False, **QUIET)["conv"]
    assert found.num_images == 4


class Routed(nn.Module):
    """Bright images go through one layer, all others through another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bright, self.dark = nn.Conv2d(2, 5, 3), nn.Conv2d(2, 5, 3)

    def forward(self, x):
        bright = x.mean((1, 2, 3)) > 0
        made = x.new_zeros(len(x), 5)
        for chosen, layer in ((bright, self.bright), (~bright, self.dark)):
            if bool(chosen.any()):
                made[chosen] = layer(x[chosen]).mean((2, 3))
        return made


def test_without_boxes_where_none_can_be_measured():
    """Images of zeros, and of NaN, are not bright; all those of the data are."""
    model, data = (
        Routed(),
        [(images(5) + 9, torch.zeros(5)), (images(3, seed=2) + 9, torch.ones(3))],
    )
    with pytest.warns(UserWarning, match="no boxes: images of zeros.*never reached.*boxes=False"):
        found = exemplars(model, "bright", data, num_exemplars=2, **QUIET)["bright"]
    expected = exemplars(model, "bright", data, num_exemplars=2, boxes=False, **QUIET)["bright"]
    assert found.highest.box is None
    assert torch.equal(found.highest.image, expected.highest.image)
    assert found.num_images == 8


def test_boxes_measured_before_are_used():
    model, data = deep(), batches()
    field = receptive_field(model, "stage2", images())
    ready = exemplars(model, "stage2", data, boxes=field, **QUIET)["stage2"]
    measured = exemplars(model, "stage2", data, **QUIET)["stage2"]
    assert torch.equal(known(ready.highest.box), known(measured.highest.box))


# Receptive fields


def arithmetic(layers, size):
    """First and end pixel of every position, from which window holds which position."""
    pixels = [{pixel} for pixel in range(size)]
    for kernel, stride, padding, dilation in layers:
        length = (len(pixels) + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        taps = [
            [place * stride - padding + dilation * tap for tap in range(kernel)]
            for place in range(length)
        ]
        pixels = [
            set().union(*(pixels[tap] for tap in window if 0 <= tap < len(pixels)))
            for window in taps
        ]
    return [(min(field), max(field) + 1) for field in pixels]


@pytest.mark.parametrize(
    "layers",
    [
        [(3, 1, 1, 1)],
        [(3, 2, 1, 1), (3, 2, 1, 1)],
        [(5, 2, 2, 1), (2, 2, 0, 1), (3, 1, 2, 2)],
        [(7, 2, 3, 1), (3, 2, 1, 1), (3, 1, 1, 1), (3, 2, 1, 1), (3, 1, 1, 1)],
    ],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_receptive_field_of_stacked_windows(layers, layout):
    rows, columns = 33, 40
    modules: list[nn.Module] = []
    for at, (kernel, stride, padding, dilation) in enumerate(layers):
        if at % 2:
            modules += [nn.MaxPool2d(kernel, stride, padding, dilation)]
        else:
            modules += [nn.Conv2d(2, 2, kernel, stride, padding, dilation), nn.ReLU()]
    model = nn.Sequential(*modules)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.zeros_(module.weight)  # the architecture decides, not the weights
    last = str(len(modules) - 1)
    example = torch.zeros(2, 2, rows, columns).contiguous(memory_format=layout)
    boxes = receptive_field(model, last, example, batch_size=7)[last]
    for i, (top, bottom) in enumerate(arithmetic(layers, rows)):
        for j, (left, right) in enumerate(arithmetic(layers, columns)):
            assert boxes[i, j].tolist() == [left, top, right, bottom]
    assert boxes.shape[:2] == (len(arithmetic(layers, rows)), len(arithmetic(layers, columns)))


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "mobilenet_v2", "convnext_tiny"])
def test_gradients_stay_inside_the_boxes(name):
    torch.manual_seed(0)
    model = torchvision.models.get_model(name).eval()
    layer = {
        "resnet18": "layer2",
        "densenet121": "features.denseblock1",
        "mobilenet_v2": "features.6",
        "convnext_tiny": "features.1",
    }[name]
    x = torch.randn(1, 3, 64, 64).requires_grad_()
    boxes = receptive_field(model, layer, x.detach())[layer]
    kept = []
    handle = model.get_submodule(layer).register_forward_hook(lambda *a: kept.append(a[2]))
    model(x)
    handle.remove()
    for place in [(0, 0), (3, 4), (boxes.shape[0] - 1, 2)]:
        index = (0, slice(None), *place)
        unit = kept[0][index].sum()
        (gradient,) = torch.autograd.grad(unit, x, retain_graph=True)
        rows, columns = gradient[0].abs().sum(0).nonzero(as_tuple=True)
        left, top, right, bottom = boxes[place].tolist()
        assert left <= int(columns.min())
        assert int(columns.max()) < right
        assert top <= int(rows.min())
        assert int(rows.max()) < bottom
        assert right - left <= 2 * (int(columns.max()) - int(columns.min()) + 1)


def test_receptive_field_of_attention_is_the_image():
    torch.manual_seed(0)
    block = "encoder.layers.encoder_layer_0"
    vit = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=3)
    boxes = receptive_field(vit, ["conv_proj", block], torch.zeros(1, 3, 32, 32))
    assert boxes["conv_proj"][1, 2].tolist() == [16, 8, 24, 16]
    assert boxes[block].shape == (17, 4)
    assert boxes[block].unique(dim=0).tolist() == [[0, 0, 32, 32]]


def test_receptive_field_of_constants_and_bad_input():
    class Ignores(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(1, 1, 1)

        def forward(self, x):
            return self.layer(torch.zeros_like(x))

    boxes = receptive_field(Ignores(), "layer", torch.zeros(1, 1, 3, 3))["layer"]
    assert boxes.abs().sum() == 0
    with pytest.raises(ValueError, match="floating-point images"):
        receptive_field(pool_linear(), "0", torch.zeros(1, 2))
    broken = pool_linear()
    broken.get_parameter("0.weight").data[0] = float("nan")
    with pytest.raises(ValueError, match="NaN for an image of zeros"):
        receptive_field(broken, "0", images())
    with pytest.raises(ValueError, match="reached 2 times"):
        receptive_field(Reused(), ["conv", "relu"], images())
