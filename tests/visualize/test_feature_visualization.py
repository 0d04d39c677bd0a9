"""Optimized images against optima known by hand; the options; what is left behind."""

from typing import Any

import pytest
import torch
from torch import nn

from captum_classfilters.visualize import (
    FeatureObjective,
    RandomTransform,
    color_root,
    plot_features,
    visualize_features,
)
from tests.models import QUIET, ChannelsLast, Reused, deep, hooks_of, pool_linear
from tests.pretend_device import pretend

of_filter, of_direction = FeatureObjective.of_filter, FeatureObjective.of_direction


def hand_made():
    """Two filters of three channels, 3x3; no entry is zero."""
    model = nn.Sequential(nn.Conv2d(3, 2, 3, bias=False))
    generator = torch.Generator().manual_seed(5)
    model.get_parameter("0.weight").data.copy_(torch.randn(2, 3, 3, 3, generator=generator))
    return model


def optimum(weight):
    """The best image in [0, 1] for one linear unit: 1 where its weight is positive, else 0."""
    return (weight > 0).float()


@pytest.mark.parametrize("parametrization", ["pixel", "fourier"])
def test_a_linear_unit_gets_its_own_pattern(parametrization):
    model = hand_made()
    weight = model[0].weight.detach()
    up = of_filter("0", 0, position="center")
    direction = torch.tensor([0.6, -0.8])
    both = of_direction("0", direction, position=(1, 1))
    seen = visualize_features(
        model,
        [up, -up, both],
        (3, 5, 5),
        steps=400,
        learning_rate=0.2,
        parametrization=parametrization,
        transform=None,
        **QUIET,
    )
    combined = torch.einsum("k,kchw->chw", direction, weight)
    patterns = [weight[0], -weight[0], combined]
    for image, pattern, value in zip(seen.images, patterns, seen.values, strict=True):
        window = image[:, 1:4, 1:4]  # what the unit sees: position (1, 1) of a 3 x 3 map
        torch.testing.assert_close(window, optimum(pattern), atol=0.03, rtol=0)
        best = float((optimum(pattern) * pattern).sum())
        assert 0.97 * best < float(value) <= best
    if parametrization == "pixel":
        outside = torch.ones(5, 5, dtype=torch.bool)
        outside[1:4, 1:4] = False
        # Pixels without a gradient stay at their start, sigmoid(N(0, 0.01)).
        assert float((seen.images[..., outside] - 0.5).abs().max()) < 0.02


@pytest.mark.filterwarnings("ignore:Nothing was optimized")
def test_sums_are_sums():
    model = deep()
    a, b = of_filter("stage1", 1), of_filter("stage2", 2, position="center")
    options: dict[str, Any] = {"steps": 1, "transform": None, "seed": 3, **QUIET}
    alone = [visualize_features(model, one, (2, 8, 8), **options).initial for one in (a, b)]
    mixed = visualize_features(model, a - 0.5 * b, (2, 8, 8), **options).initial
    torch.testing.assert_close(mixed, alone[0] - 0.5 * alone[1])


@pytest.mark.parametrize("shape", [(2, 8, 8), (2, 15, 22)])
@pytest.mark.parametrize("parametrization", ["pixel", "fourier"])
def test_far_above_start_and_random_images(shape, parametrization):
    model = deep()
    objectives = [of_filter("stage2.1", k) for k in range(6)]
    seen = visualize_features(
        model, objectives, shape, steps=60, parametrization=parametrization, **QUIET
    )
    assert seen.images.shape == (6, *shape)
    assert seen.history.shape == (60, 6)
    assert bool((seen.images >= 0).all())
    assert bool((seen.images <= 1).all())
    noise = torch.rand(200, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        means = model.stage2[1](model.stage2[0](model.stage1(noise))).mean((2, 3))
        again = model.stage2[1](model.stage2[0](model.stage1(seen.images))).mean((2, 3))
    torch.testing.assert_close(again.diagonal(), seen.values)
    assert bool((seen.values > means.amax(0) + means.std(0)).all())
    assert bool((seen.values > seen.initial + means.std(0)).all())


def test_same_seed_same_images_and_no_global_randomness():
    model, objective = deep(), of_filter("stage2", 0)
    torch.manual_seed(11)
    before = torch.get_rng_state()
    runs = [
        visualize_features(model, [objective] * 2, (2, 8, 8), steps=5, seed=seed, **QUIET).images
        for seed in (0, 0, 1)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(runs[0], runs[1])
    assert not torch.allclose(runs[0], runs[2])
    assert not torch.allclose(runs[0][0], runs[0][1])  # two starts
    assert hooks_of(model) == 0


def test_inside_no_grad_and_with_in_place_successors():
    model = deep()
    with torch.no_grad():  # "stage1.1" is followed by an in-place ReLU
        seen = visualize_features(model, of_filter("stage1.1", 0), (2, 6, 6), steps=20, **QUIET)
    assert float(seen.values) > float(seen.initial)


def test_normalization_is_applied():
    model = hand_made()
    seen = visualize_features(
        model, of_filter("0", 0), (3, 6, 6), normalize=lambda x: 2 * x - 1, steps=1, **QUIET
    )
    with torch.no_grad():
        expected = model(2 * seen.images - 1)[0, 0].mean()
    torch.testing.assert_close(seen.values[0], expected)


def test_channels_last_layer():
    twin = pool_linear()
    options: dict[str, Any] = {"steps": 3, **QUIET}
    first = visualize_features(twin, of_filter("1", 2, position=(1, 2)), (2, 6, 6), **options)
    last = visualize_features(
        ChannelsLast(twin),
        of_filter("transpose", 2, position=(1, 2), channel_dim=-1),
        (2, 6, 6),
        **options,
    )
    torch.testing.assert_close(first.images, last.images)


def test_one_channel_and_colors():
    model = nn.Sequential(nn.Conv2d(1, 2, 3))
    assert visualize_features(
        model, of_filter("0", 0), (1, 7, 9), steps=2, **QUIET
    ).images.shape == (
        1,
        1,
        7,
        9,
    )
    gray = color_root(torch.rand(4, 1, 8, 8).expand(4, 3, 8, 8))
    seen = visualize_features(
        hand_made(), of_filter("0", 0), (3, 8, 8), steps=5, color_root=gray, **QUIET
    )
    spread = seen.images.amax(1) - seen.images.amin(1)
    assert float(spread.max()) < 1e-3  # colors that only vary together stay gray
    assert float(seen.images.std()) > 0.01


def test_color_root_is_the_root_of_the_covariance():
    mixing = torch.tensor([[1.0, 0.3, 0.0], [0.0, 0.5, 0.2], [0.4, 0.0, 0.8]])
    noise = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images = torch.einsum("dc,nchw->ndhw", mixing, noise)
    root = color_root(images)
    covariance = torch.cov(images.movedim(1, 0).flatten(1), correction=0)
    squared = root @ root
    torch.testing.assert_close(squared / squared.trace(), covariance / covariance.trace())
    assert float(root.norm(dim=0).max()) == pytest.approx(1)
    with pytest.raises(ValueError, match=r"expected \(N, C, H, W\)"):
        color_root(torch.rand(3, 4))


# Types of number


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("parametrization", ["pixel", "fourier"])
def test_models_of_any_type(dtype, parametrization):
    options: dict[str, Any] = {"steps": 20, "parametrization": parametrization, **QUIET}
    objectives = [of_filter("0", 1), of_direction("0", torch.tensor([0.6, -0.8]))]
    plain = visualize_features(hand_made(), objectives, (3, 8, 8), **options)
    seen = visualize_features(hand_made().to(dtype), objectives, (3, 8, 8), **options)
    coarse = {torch.bfloat16: 0.05, torch.float16: 0.01, torch.float64: 1e-5}[dtype]
    torch.testing.assert_close(seen.images, plain.images, atol=coarse, rtol=0)
    torch.testing.assert_close(seen.values.float(), plain.values, atol=coarse, rtol=coarse)
    assert seen.values.dtype in (torch.float32, torch.float64)
    plot_features(seen)


def test_a_model_of_two_types():
    class Mixed(nn.Sequential):
        def forward(self, x):
            return self[1](self[0](x).float())

    torch.manual_seed(0)
    model = Mixed(nn.Conv2d(3, 2, 3).bfloat16(), nn.Conv2d(2, 4, 3))
    mixed = of_filter("1", 3) + 2 * of_filter("0", 1, position="center")
    seen = visualize_features(model, mixed, (3, 9, 9), steps=20, **QUIET)
    assert float(seen.values) > float(seen.initial) + 0.1


@pytest.mark.parametrize("parametrization", ["pixel", "fourier"])
def test_a_model_on_an_accelerator(parametrization):
    objectives = [of_filter("0", 1), of_direction("0", torch.tensor([0.6, -0.8]))]
    options: dict[str, Any] = {
        "steps": 3,
        "parametrization": parametrization,
        "color_root": torch.eye(3),
        **QUIET,
    }
    plain = visualize_features(hand_made(), objectives, (3, 8, 8), **options)
    with pretend("meta") as device:
        seen = visualize_features(hand_made().to(device), objectives, (3, 8, 8), **options)
    for name in ("images", "values", "initial", "history", "optimized"):
        torch.testing.assert_close(getattr(seen, name), getattr(plain, name))


# Nothing to optimize


def test_a_filter_without_a_gradient_is_named():
    model = deep()
    model.get_parameter("stage2.1.bias").data[3] = -1e3  # dead behind its ReLU
    objectives = [of_filter("stage2", 0), of_filter("stage2", 3), of_filter("stage2.1", 3)]
    with pytest.warns(
        UserWarning, match=r"1 of 3 objectives, 1 \(filter 3 of 'stage2'\): the grad"
    ):
        seen = visualize_features(model, objectives, (2, 8, 8), steps=3, **QUIET)
    assert seen.optimized.tolist() == [True, False, True]
    _, axes = plot_features(seen)
    assert [one.get_title().split("\n")[1] == "not optimized" for one in axes] == [0, 1, 0]
    start = visualize_features(model, of_filter("stage1.0", 0), (2, 8, 8), steps=1, **QUIET)
    assert start.optimized.tolist() == [True]
    nothing = 0 * of_filter("stage1", 1, position="center")
    with pytest.warns(UserWarning, match=r"0 \(0 \* filter 1 of 'stage1' at center\)"):
        visualize_features(model, nothing, (2, 8, 8), steps=2, **QUIET)


def test_a_gradient_at_one_step_is_enough(recwarn):
    model = hand_made()
    calls = []

    def first_only(images, generator):
        calls.append(1)
        return images if len(calls) == 1 else images.detach() * 0 + images * 0

    seen = visualize_features(
        model, of_filter("0", 0), (3, 5, 5), steps=4, transform=first_only, **QUIET
    )
    assert seen.optimized.tolist() == [True]
    assert not recwarn.list


def test_a_forward_pass_that_detaches_is_refused():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 3)

        def forward(self, x):
            with torch.no_grad():
                return self.conv(x)

    with pytest.raises(ValueError, match="no gradient towards the image"):
        visualize_features(Frozen(), of_filter("conv", 0), (3, 6, 6), steps=2, **QUIET)


def test_inside_inference_mode():
    model = hand_made()
    with torch.inference_mode():
        seen = visualize_features(model, of_filter("0", 0), (3, 6, 6), steps=9, **QUIET)
    assert float(seen.values) > float(seen.initial)


def test_infinite_values_are_named():
    model = hand_made()
    model[0].weight.data.fill_(3e38)
    with pytest.raises(ValueError, match="Objective 0 became NaN or infinite"):
        visualize_features(model, of_filter("0", 0), (3, 6, 6), steps=1, **QUIET)


def test_results_print_in_a_line():
    seen = visualize_features(hand_made(), of_filter("0", 0), (3, 6, 6), steps=2, **QUIET)
    assert str(seen) == (
        "FeatureVisualization(images=float32 (1, 3, 6, 6), values=float32 (1,), "
        "initial=float32 (1,), history=float32 (2, 1), optimized=bool (1,))"
    )
    objective = 2 * of_direction(deep().stage1, torch.ones(4))
    assert repr(objective) == "FeatureObjective(2 * a direction of 'Sequential')"


# Transforms


def disk(height=40, width=60):
    rows = torch.arange(height)[:, None] - (height - 1) / 2
    columns = torch.arange(width)[None] - (width - 1) / 2
    return (-(rows**2 + columns**2) / 40).exp()[None, None]


def center(image):
    mass = image[0, 0] / image.sum()
    rows, columns = torch.meshgrid(*map(torch.arange, mass.shape), indexing="ij")
    return float((mass * rows).sum()), float((mass * columns).sum())


def test_transform_without_change_is_the_identity():
    x = torch.rand(3, 2, 7, 9)
    same = RandomTransform(0.0, (1.0, 1.0), 0.0)(x, torch.Generator())
    torch.testing.assert_close(same, x, atol=1e-5, rtol=1e-5)


def test_transforms_do_what_they_say():
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        turned = RandomTransform(0.0, (1.0, 1.0), 180.0)(disk(), generator)
        # Round also in a rectangle; beyond 19 pixels from its center the mirror shows.
        torch.testing.assert_close(turned[..., 12:48], disk()[..., 12:48], atol=0.03, rtol=0)
    larger = RandomTransform(0.0, (1.5, 1.5), 0.0)(disk(), generator)
    assert float(larger.sum() / disk().sum()) == pytest.approx(1.5**2, rel=0.02)
    moved = [center(RandomTransform(0.1, (1.0, 1.0), 0.0)(disk(), generator)) for _ in range(30)]
    rows = torch.tensor([row - 19.5 for row, _ in moved]).abs()
    columns = torch.tensor([column - 29.5 for _, column in moved]).abs()
    assert 2 < float(rows.max()) <= 4.1
    assert 3 < float(columns.max()) <= 6.1
    stripe = torch.zeros(1, 1, 21, 21)
    stripe[..., 10, :] = 1
    turned = RandomTransform(0.0, (1.0, 1.0), 45.0)(stripe, generator)
    assert float((turned - stripe).abs().max()) > 0.5


def test_bad_input():
    model, objective = deep(), of_filter("stage2", 0)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"objectives": []}, "objectives hold nothing"),
        ({"objectives": ["stage2"]}, "objectives hold str; expected objects"),
        ({"objectives": of_filter("stage2", 0, position="middle")}, "position='middle'"),  # type: ignore[arg-type]
        ({"image_shape": (3, 8)}, r"expected \(C, H, W\)"),
        ({"steps": 0}, "steps=0"),
        ({"parametrization": "wavelet"}, "choose 'fourier' or 'pixel'"),
        ({"transform": "none"}, "expected a callable"),
        ({"color_root": torch.eye(3)}, "images of 2 channels need"),
        ({"objectives": of_filter("stage2", 6)}, "has filters 0 to 5"),
        ({"objectives": of_filter("stage2", -1)}, "has filters 0 to 5"),
        ({"objectives": of_filter("stage3", 1)}, "no layer 'stage3'"),
        ({"objectives": of_direction("stage2", torch.ones(5))}, "5 entries; the layer"),
        ({"objectives": of_filter("stage2", 0, position=(8, 0))}, "positions of shape"),
        ({"objectives": of_filter("stage2", 0, position=(1,))}, "positions of shape"),
    ]
    for options, message in cases:
        arguments: dict[str, Any] = (
            dict(objectives=objective, image_shape=(2, 8, 8), steps=1, **QUIET) | options
        )
        with pytest.raises(ValueError, match=message):
            visualize_features(model, **arguments)
    with pytest.raises(ValueError, match="expected a vector"):
        of_direction("stage2", torch.ones(6, 2))
    with pytest.raises(ValueError, match="reached 2 times"):
        visualize_features(Reused(), of_filter("relu", 0), (2, 6, 6), steps=1, **QUIET)
    broken = deep()
    broken.get_parameter("stage1.0.weight").data[0] = float("nan")
    with pytest.raises(ValueError, match="became NaN"):
        visualize_features(broken, objective, (2, 8, 8), steps=1, **QUIET)
    assert hooks_of(model) == hooks_of(broken) == 0


@pytest.mark.parametrize("side", [16, 96])
def test_fourier_steps_move_images_of_any_size_alike(side):
    objective = of_filter("0", 0, position="center")
    seen = visualize_features(
        hand_made(), objective, (3, side, side), steps=5, transform=None, **QUIET
    )
    # Scaled by frequency per pixel, the deviations would be 2.9 and 7.6, and most pixels 0 or 1.
    assert 0.2 < float(seen.images.logit(1e-6).std()) < 0.5


def test_sheet_of_optimized_images():
    seen = visualize_features(hand_made(), [of_filter("0", 0)] * 3, (3, 5, 5), steps=1, **QUIET)
    figure, axes = plot_features(seen, ["a", "b", "c"], columns=2, title="title")
    assert len(figure.axes) == 4  # two rows of two
    assert [one.get_title() for one in axes] == [
        f"{name}\n{value:.2g}" for name, value in zip("abc", seen.values.tolist(), strict=True)
    ]
    assert torch.equal(
        torch.as_tensor(axes[1].images[0].get_array()), seen.images[1].permute(1, 2, 0)
    )
    assert axes[0].images[0].get_clim() == (0, 1)  # gray means the same in every picture
    assert [one.get_title()[0] for one in plot_features(seen)[1]] == ["0", "1", "2"]
    with pytest.raises(ValueError, match="2 names and 8 columns for 3 images"):
        plot_features(seen, ["a", "b"])


class _Bounded(nn.Module):
    """Takes images of one size only, as vision transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, images):
        assert images.shape[2:] == (8, 6), "8 x 6 only"
        return self.conv(images)


NO_IMAGES = {
    "sequences": lambda: nn.Sequential(nn.ReLU(), nn.Conv1d(3, 4, 3)),
    "volumes": lambda: nn.Sequential(nn.ReLU(), nn.Conv3d(2, 4, 3)),
    "tokens": lambda: nn.Sequential(nn.ReLU(), nn.Linear(6, 4)),
    "normalized": lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3)),
    "indices": lambda: nn.Sequential(nn.ReLU(), nn.Embedding(5, 4)),
    "nested": lambda: nn.Sequential(nn.ReLU(), nn.Sequential(nn.ReLU(), nn.Conv1d(3, 4, 3))),
}


@pytest.mark.parametrize("kind", NO_IMAGES)
def test_models_that_take_no_such_images_are_told_by_their_layer(kind):
    model = NO_IMAGES[kind]()
    name = "1.1" if kind == "nested" else "1"
    failed = type(model.get_submodule(name)).__name__
    message = rf"images \(N, C, H, W\), here of shape \(1, 3, 9, 7\).*layer '{name}' \({failed}\)\."
    with pytest.raises(ValueError, match=message) as caught:
        visualize_features(model, of_filter("0", 1), (3, 9, 7), steps=1, transform=None, **QUIET)
    assert caught.value.__cause__ is not None
    assert not any(hooks_of(module) for module in model.modules())


def test_errors_of_objectives_and_of_foreign_modules_are_their_own():
    with pytest.raises(AssertionError, match="8 x 6 only"):
        visualize_features(
            nn.Sequential(nn.ReLU(), _Bounded()), of_filter("0", 1), (3, 9, 7), steps=1, **QUIET
        )
    with pytest.raises(ValueError, match=r"^filter=9; the layer '0' has filters 0 to 3"):
        visualize_features(
            nn.Sequential(nn.Conv2d(3, 4, 3)), of_filter("0", 9), (3, 9, 7), steps=1, **QUIET
        )
