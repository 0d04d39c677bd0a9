"""CAR by its definition, its intervals against SciPy, and identities that hold exactly."""

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, multinomial, norm, pearsonr
from torch import nn

from captum_classfilters import LayerFilterAblation
from captum_classfilters.identify import accuracy_reduction, binomial_interval
from captum_classfilters.identify.accuracy_reduction import paired_interval
from tests.models import batches, deep, hooks_of, joined


def one_hot_net() -> nn.Sequential:
    """Three features straight to three logits, with a bias for class 2."""
    net = nn.Sequential(nn.Identity(), nn.Linear(3, 3))
    net[1].weight.data = torch.eye(3)
    net[1].bias.data = torch.tensor([0.0, 0.0, 0.5])
    return net.eval()


def test_hand_computed_reduction():
    x = torch.tensor([[1.0, 0, 0], [2.0, 1, 0], [0, 3.0, 0], [1.0, 0, 0]])
    y = torch.tensor([0, 0, 1, 2])  # the last image is wrong until filter 0 goes
    car = LayerFilterAblation(one_hot_net(), "0").identify(
        [(x, y)], metric="accuracy", show_progress=False
    )
    assert car.counts.tolist() == [2, 1, 1]
    assert car.correct.tolist() == [2, 1, 0]
    assert car.accuracy == 0.75
    assert car.lost.tolist() == [[2, 0, 0], [0, 1, 0], [0, 0, 0]]
    assert car.gained.tolist() == [[0, 0, 0], [0, 0, 0], [1, 0, 0]]
    assert car.reduction.tolist() == [0.25, 0.25, 0.0]
    assert car.class_reduction.tolist() == [[1, 0, 0], [0, 1, 0], [-1, 0, 0]]
    table = car.to_class_filters(num_filters=1)
    assert table.filters_of(1).tolist() == [1]
    assert table.scores.tolist() == car.class_reduction.tolist()


@pytest.fixture(scope="module")
def deep_car():
    model = deep()
    # Random weights give every image one class; centered logits give all three.
    x, _ = joined(batches(60))
    with torch.no_grad():
        model.get_parameter("head.bias").sub_(model(x).mean(0))
    car = LayerFilterAblation(model, "stage1").identify(
        batches(60), metric="accuracy", show_progress=False
    )
    return model, car


def test_equals_the_definition(deep_car):
    model, car = deep_car
    x, y = joined(batches(60))
    with torch.no_grad():
        full = model(x)
        for filter_index in range(4):

            def zero(_module, _inputs, output, filter_index=filter_index):
                output = output.clone()
                output[:, filter_index] = 0
                return output

            handle = model.stage1.register_forward_hook(zero)
            without = model(x)
            handle.remove()
            reduction = (full.argmax(1) == y).double().mean()
            reduction -= (without.argmax(1) == y).double().mean()
            assert float(car.reduction[filter_index]) == pytest.approx(float(reduction), abs=1e-12)
            for name in ("log_softmax", "softmax"):
                drop = getattr(full, name)(1) - getattr(without, name)(1)
                for label in range(3):
                    expected = float(drop[y == label, label].mean())
                    soft = car.log_probability_drop if "log" in name else car.probability_drop
                    assert float(soft[label, filter_index]) == pytest.approx(expected, abs=1e-6)
            increase = nn.functional.cross_entropy(without, y) - nn.functional.cross_entropy(
                full, y
            )
            assert float(car.loss_increase[filter_index]) == pytest.approx(
                float(increase), abs=1e-6
            )
    assert car.lost.sum() > 0
    assert car.gained.sum() > 0
    assert hooks_of(model) == 0


def test_weighted_mean_over_classes_is_car(deep_car):
    _, car = deep_car
    shares = car.counts.double() / car.counts.sum()
    mean = (shares[:, None] * car.class_reduction).sum(0)
    torch.testing.assert_close(mean, car.reduction, rtol=0, atol=1e-12)


def test_batch_size_and_rows_per_replay_change_no_count(deep_car):
    model, car = deep_car
    method = LayerFilterAblation(model, "stage1")
    x, y = joined(batches(60))
    other = method.identify(
        [(x, y)], metric="accuracy", perturbations_per_eval=3, show_progress=False
    )
    assert torch.equal(other.lost, car.lost)
    assert torch.equal(other.gained, car.gained)
    assert torch.equal(other.counts, car.counts)


def test_exact_binomial_interval_is_scipys():
    successes, counts = torch.tensor([0, 3, 10, 7]), torch.tensor([10, 10, 10, 50])
    intervals = binomial_interval(successes, counts, 0.9)
    for hits, number, interval in zip(successes, counts, intervals, strict=True):
        expected = binomtest(int(hits), int(number)).proportion_ci(0.9, method="exact")
        assert interval.tolist() == pytest.approx([expected.low, expected.high], abs=1e-9)
    assert binomial_interval(torch.tensor([0]), torch.tensor([0])).isnan().all()


def test_interval_of_a_difference(deep_car):
    _, car = deep_car
    interval = car.class_interval(0.9)
    expected = paired_interval(car.lost[1, 2], car.gained[1, 2], car.counts[1], 0.9)
    assert torch.equal(interval[1, 2], expected)
    assert (interval[..., 0] <= car.class_reduction).all()
    assert (interval[..., 1] >= car.class_reduction).all()
    assert car.interval().shape == (4, 2)
    # The interval over all images is narrower than that of a class.
    assert (car.interval(0.9).diff(dim=1) < interval.diff(dim=2).amin(0)).all()
    with pytest.raises(ValueError, match="confidence=95"):
        car.interval(95)


def score(lost: int, gained: int, number: int, difference: float) -> float:
    """Tango's statistic, the likeliest share gained found by search."""
    shares = np.linspace(0, 1 - max(difference, 0), 200_001)[1:-1]
    shares = shares[(shares + difference > 0) & (2 * shares + difference < 1)]
    likelihood = (
        lost * np.log(shares + difference)
        + gained * np.log(shares)
        + (number - lost - gained) * np.log1p(-2 * shares - difference)
    )
    best = shares[likelihood.argmax()]
    variance = number * (2 * best + difference * (1 - difference))
    return float((lost - gained - number * difference) / variance**0.5)


@pytest.mark.parametrize(("lost", "gained", "number"), [(7, 2, 30), (1, 5, 24), (12, 12, 61)])
def test_ends_of_paired_intervals_are_where_the_score_test_rejects(lost, gained, number):
    low, high = paired_interval(torch.tensor(lost), torch.tensor(gained), torch.tensor(number), 0.9)
    z = norm.ppf(0.95)
    assert score(lost, gained, number, float(low)) == pytest.approx(z, abs=1e-3)
    assert score(lost, gained, number, float(high)) == pytest.approx(-z, abs=1e-3)


def test_paired_intervals_in_corners():
    z2 = norm.ppf(0.975) ** 2
    nothing = paired_interval(torch.tensor(0), torch.tensor(0), torch.tensor(40))
    assert nothing.tolist() == pytest.approx([-z2 / (40 + z2), z2 / (40 + z2)])
    every = paired_interval(torch.tensor(9), torch.tensor(0), torch.tensor(9))
    assert float(every[1]) == 1.0
    assert 0 < float(every[0]) < 1
    other = paired_interval(torch.tensor(0), torch.tensor(9), torch.tensor(9))
    assert other.tolist() == pytest.approx([-1.0, -float(every[0])])
    assert paired_interval(torch.tensor(0), torch.tensor(0), torch.tensor(0)).isnan().all()


@pytest.mark.parametrize(
    ("number", "lose", "gain"), [(50, 0.05, 0.05), (50, 0.2, 0.05), (120, 0.1, 0.02)]
)
def test_paired_intervals_cover_as_they_say(number, lose, gain):
    lost, gained = (
        axis.flatten() for axis in torch.meshgrid([torch.arange(number + 1)] * 2, indexing="ij")
    )
    possible = lost + gained <= number
    lost, gained = lost[possible], gained[possible]
    cells = torch.stack([lost, gained, number - lost - gained], 1)
    chance = torch.tensor(multinomial.pmf(cells.numpy(), number, [lose, gain, 1 - lose - gain]))
    low, high = paired_interval(lost, gained, torch.tensor(number)).unbind(1)
    covered = (low <= lose - gain) & (lose - gain <= high)
    assert float(chance[covered].sum()) == pytest.approx(0.95, abs=0.01)


def test_class_without_images_is_nan(deep_car):
    model, _ = deep_car
    x, y = joined(batches(12))
    car = LayerFilterAblation(model, "stage1").identify(
        [(x[y < 2], y[y < 2])], metric="accuracy", show_progress=False
    )
    assert car.counts.tolist() == [4, 4, 0]
    assert car.class_reduction[2].isnan().all()
    assert car.class_interval()[2].isnan().all()
    assert car.reduction.isfinite().all()
    assert car.loss_increase.isfinite().all()
    with pytest.warns(UserWarning, match="without images"):
        table = car.to_class_filters(2, soft=True)
    assert table.selected.sum(1).tolist() == [2, 2, 0]


def test_reduction_of_a_regression_metric():
    net = nn.Sequential(nn.Identity(), nn.Linear(3, 1, bias=False))
    net[1].weight.data = torch.tensor([[1.0, 2.0, 0.0]])
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    y = x[:, :1] + 2 * x[:, 1:2]

    def correlation(outputs, truth):
        return pearsonr(outputs[:, 0], truth[:, 0]).statistic

    data = [(x[:12], y[:12]), (x[12:], y[12:])]
    rar = LayerFilterAblation(net, "0").identify(data, metric=correlation, show_progress=False)
    assert rar.metric == pytest.approx(1)
    expected = [pearsonr(x[:, 1], y[:, 0]).statistic, pearsonr(x[:, 0], y[:, 0]).statistic, 1]
    assert rar.without.tolist() == pytest.approx(expected, abs=1e-6)
    assert rar.reduction.tolist() == pytest.approx([1 - one for one in expected], abs=1e-6)


def test_bad_input_and_training_flags():
    model = deep().train()
    method = LayerFilterAblation(model, "stage1")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    method.identify(batches(), metric="accuracy", show_progress=False)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match="empty"):
        method.identify([], metric="accuracy", show_progress=False)
    with pytest.raises(ValueError, match="empty"):
        method.identify([], metric=lambda a, b: 0, show_progress=False)
    x, y = joined(batches())
    with pytest.raises(ValueError, match="label 3"):
        method.identify([(x, y + 3)], metric="accuracy", show_progress=False)
    several = LayerFilterAblation(model, ["stage1", "stage2"])
    with pytest.raises(ValueError, match="stage1, stage2"):
        several.identify(batches(), metric="accuracy", show_progress=False)
    assert all(module.training for module in model.modules())


def test_the_default_type_changes_no_sum():
    """Sums of two kinds must not be one tensor."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)
    )
    data = [(torch.rand(9, 2, 4, 3), torch.arange(9) % 2)]
    drops = []
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            method = LayerFilterAblation(model, "1")
            found = accuracy_reduction(method, data, show_progress=False)
        finally:
            torch.set_default_dtype(torch.float32)
        drops.append((found.probability_drop, found.log_probability_drop))
    for plain, double in zip(*drops, strict=True):
        assert torch.allclose(plain, double)
