"""Spectra of weights: which values matter, Marchenko-Pastur, power laws, the universal metric."""

import copy
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy.integrate import quad, trapezoid
from scipy.stats import ks_2samp
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

from benchmarks import cifar10
from captum_classfilters.spectral import (
    compare_with_random,
    effective_rank,
    eigenvalues,
    fit_marchenko_pastur,
    fit_power_law,
    gavish_donoho_threshold,
    layer_svd,
    marchenko_pastur_edge,
    model_spectra,
    model_svd,
    permutation_threshold,
    power_law,
    select_rank,
    stable_rank,
    universal_metric,
    weight_matrix,
)
from captum_classfilters.spectral.marchenko_pastur import MarchenkoPastur
from captum_classfilters.spectral.model_spectra import SpectraComparison, layer_verdict
from captum_classfilters.spectral.power_law import random_exponents
from captum_classfilters.visualize import plot_exponents, plot_spectrum
from tests.models import known

# Shapes of He-initialized convolutions, with their effective ranks.
HE_INITIALIZED = [
    ((64, 3, 7), 59.9),
    ((64, 64, 3), 63.1),
    ((128, 64, 3), 124.1),
    ((256, 256, 3), 252.4),
    ((512, 512, 3), 504.6),
]


def he_initialized(filters, channels, size):
    torch.manual_seed(0)
    layer = nn.Conv2d(channels, filters, size, bias=False)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return layer


def spiked(rows=120, columns=480, spikes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise = 0.05 * torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    left = torch.linalg.qr(torch.randn(rows, spikes, generator=generator).double())[0]
    right = torch.linalg.qr(torch.randn(columns, spikes, generator=generator).double())[0]
    return noise + 4 * left @ right.T


class TestEigenvalues:
    def test_by_hand(self):
        layer = nn.Linear(3, 2)
        layer.weight.data = torch.tensor([[3.0, 0, 0], [0, 4.0, 0]])
        assert eigenvalues(layer).tolist() == pytest.approx([8.0, 4.5])
        assert eigenvalues(layer_svd(layer)).tolist() == pytest.approx([8.0, 4.5])

    @pytest.mark.parametrize("shape", [(30, 20), (20, 30), (100, 70)])
    def test_are_squares_over_rows(self, shape):
        layer = nn.Linear(shape[1], shape[0])
        expected = torch.linalg.svdvals(layer.weight.detach().double()).square() / shape[0]
        assert torch.allclose(eigenvalues(layer), expected, rtol=1e-6, atol=1e-12)

    def test_groups_are_pooled(self):
        layer = nn.Conv2d(4, 6, 3, groups=2)
        one, two = weight_matrix(layer).matrices.detach().double()
        expected = torch.cat([torch.linalg.svdvals(one), torch.linalg.svdvals(two)]) ** 2 / 3
        assert torch.allclose(eigenvalues(layer), expected.sort(descending=True).values)

    def test_truncated_decompositions_are_refused(self):
        with pytest.raises(ValueError, match="keeps only its first directions"):
            eigenvalues(layer_svd(nn.Linear(5, 5), rank=2))


class TestMarchenkoPastur:
    @pytest.mark.parametrize("aspect", [0.01, 0.25, 0.7, 1.0])
    @pytest.mark.parametrize("variance", [0.3, 2.0])
    def test_density_integrates_to_the_cumulative_share(self, aspect, variance):
        law = MarchenkoPastur(variance, aspect)
        for share in (0.1, 0.5, 0.9, 1.0):
            x = law.lower + share * (law.upper - law.lower)
            exact, _ = quad(lambda t: float(law.density(t)), law.lower, x, limit=500)
            assert float(law.cumulative(x)) == pytest.approx(exact, abs=1e-4)
        mean, _ = quad(lambda t: t * float(law.density(t)), law.lower, law.upper, limit=500)
        assert mean == pytest.approx(variance, rel=1e-6)
        assert float(law.cumulative(law.quantile(0.3))) == pytest.approx(0.3, abs=1e-6)
        assert law.density([law.lower / 2 - 1, law.upper + 1]).tolist() == [0, 0]

    @pytest.mark.parametrize("shape", [(200, 900), (900, 200), (300, 300)])
    def test_fits_random_matrices_whatever_side_is_longer(self, shape):
        torch.manual_seed(0)
        layer = nn.Linear(shape[1], shape[0])
        nn.init.normal_(layer.weight, std=0.3)
        fit = fit_marchenko_pastur(eigenvalues(layer), shape)
        assert fit.num_outliers == 0
        assert fit.entry_deviation == pytest.approx(0.3, rel=0.01)
        assert fit.distance < 0.02
        largest = float(eigenvalues(layer)[0])
        assert largest == pytest.approx(fit.law.upper, rel=0.05)
        edge = marchenko_pastur_edge(shape, fit.entry_deviation)
        assert edge**2 / shape[0] == pytest.approx(fit.law.upper, rel=1e-9)

    @pytest.mark.parametrize("spikes", [1, 5, 20])
    def test_outliers_do_not_stretch_the_bulk(self, spikes):
        values = torch.linalg.svdvals(spiked(spikes=spikes)).square() / 120
        fit = fit_marchenko_pastur(values, (120, 480))
        assert fit.num_outliers == spikes
        assert fit.entry_deviation == pytest.approx(0.05, rel=0.03)

    def test_bad_input(self):
        with pytest.raises(ValueError, match="no positive eigenvalues"):
            fit_marchenko_pastur(torch.zeros(3), (3, 4))
        with pytest.raises(ValueError, match="not all finite"):
            fit_marchenko_pastur(torch.tensor([1.0, float("nan")]), (2, 4))
        with pytest.raises(ValueError, match=r"shape=\(0, 4\)"):
            fit_marchenko_pastur(torch.ones(2), (0, 4))
        with pytest.raises(ValueError, match=r"aspect=1\.5"):
            MarchenkoPastur(1.0, 1.5)
        with pytest.raises(ValueError, match="variance=0"):
            MarchenkoPastur(0, 0.5)
        with pytest.raises(ValueError, match="sigma=-1 must be positive"):
            marchenko_pastur_edge((3, 4), -1)


class TestPowerLaw:
    def test_by_hand(self):
        law = fit_power_law(torch.tensor([1.0, math.e, math.e**2]), minimum=1.0)
        assert law.alpha == pytest.approx(1 + 3 / 3)
        shares = [0, 1 - math.exp(-1), 1 - math.exp(-2)]
        assert law.distance == pytest.approx(max(shares[1] - 1 / 3, shares[2] - 2 / 3))
        assert law.standard_error == pytest.approx(1 / math.sqrt(3))
        assert fit_power_law(torch.tensor([1.0, math.e])).alpha == pytest.approx(1 + 2 / 1)

    @pytest.mark.parametrize("alpha", [1.5, 3.0, 5.0, 20.0])
    def test_recovers_exponents_without_a_bound(self, alpha):
        sample = np.random.default_rng(0).pareto(alpha - 1, 4000) + 1
        law = fit_power_law(torch.from_numpy(sample))
        assert law.alpha == pytest.approx(alpha, rel=0.08)
        assert abs(law.alpha - alpha) < 4 * law.standard_error

    def test_finds_where_the_tail_begins(self):
        generator = np.random.default_rng(0)
        body, tail = generator.uniform(0, 2, 3000), 2 * (generator.pareto(2.0, 3000) + 1)
        law = fit_power_law(torch.from_numpy(np.concatenate([body, tail])))
        assert law.minimum > 1.9  # the uniform body is left out
        assert law.alpha == pytest.approx(3, rel=0.06)

    @settings(max_examples=50, deadline=None)
    @given(
        st.lists(st.integers(1, 10**6), min_size=2, max_size=30, unique=True),
        st.floats(1e-3, 1e3),
    )
    def test_scale_changes_nothing(self, values, scale):
        numbers = torch.tensor(values, dtype=torch.float64) / 1000  # apart by more than rounding
        one = fit_power_law(numbers, minimum=float(numbers.min()))
        two = fit_power_law(numbers * scale, minimum=float((numbers * scale).min()))
        assert two.alpha == pytest.approx(one.alpha, rel=1e-6)
        assert two.num_tail == one.num_tail == len(values)

    def test_is_the_best_of_all_beginnings(self):
        values = eigenvalues(nn.Linear(60, 40))
        best = fit_power_law(values)
        each = [fit_power_law(values, minimum=float(start)) for start in values[1:]]
        assert best.distance == pytest.approx(min(one.distance for one in each))

    def test_bad_input(self):
        with pytest.raises(ValueError, match="two different positive"):
            fit_power_law(torch.ones(5))
        with pytest.raises(ValueError, match="two different positive"):
            fit_power_law(torch.tensor([3.0, 0.0]))
        with pytest.raises(ValueError, match="minimum=7"):
            fit_power_law(torch.tensor([3.0, 1.0]), minimum=7)
        with pytest.raises(ValueError, match=r"minimum=2.5 .* not above the next, 2"):
            fit_power_law(torch.tensor([1.0, 2.0, 3.0]), minimum=2.5)
        assert fit_power_law(torch.tensor([1.0, 2.0, 3.0]), minimum=2.0).num_tail == 2

    def test_verdicts(self):
        names = [layer_verdict(alpha) for alpha in (1.5, 3.0, 3.01, 4.5, 4.51, 30)]
        assert names == ["good", "good", "fair", "fair", "untrained", "untrained"]
        assert [layer_verdict(2.0, p) for p in (0.05, 0.051)] == ["good", "untrained"]
        with pytest.raises(ValueError, match="alpha=1"):
            layer_verdict(1.0)

    @pytest.mark.parametrize(("rows", "columns", "groups"), [(12, 7, 1), (5, 30, 1), (3, 8, 4)])
    def test_random_exponents_are_those_of_gaussian_matrices(self, rows, columns, groups):
        generator = torch.Generator().manual_seed(3)
        gaussian = []
        for _ in range(300):
            weight = torch.randn(groups, rows, columns, generator=generator, dtype=torch.float64)
            values = torch.linalg.svdvals(weight).square().flatten()
            gaussian.append(fit_power_law(values).alpha)
        drawn = random_exponents(rows, columns, groups, repetitions=300)
        assert list(drawn) == sorted(drawn)
        assert ks_2samp(gaussian, drawn).pvalue > 0.01
        assert random_exponents(columns, rows, groups, 300) == drawn  # whichever side is longer

    def test_large_matrices_are_replaced_by_smaller_ones_of_the_same_ratio(self, monkeypatch):
        monkeypatch.setattr(power_law, "_MOST_ROWS", 10)
        assert random_exponents(41, 123, 1, 7, 2) == random_exponents(10, 30, 1, 7, 2)

    def test_a_verdict_of_a_small_random_layer_counts_random_ones(self):
        torch.manual_seed(2)
        layer = nn.Conv2d(3, 64, 3)  # (64, 27)
        found = [model_spectra(reset(layer))["0"] for _ in range(40)]
        low = [spectrum for spectrum in found if spectrum.power_law.alpha <= 4.5]
        null = random_exponents(64, 27)
        for spectrum in low:
            as_low = sum(alpha <= spectrum.power_law.alpha for alpha in null)
            assert spectrum.p_value == (1 + as_low) / 40
            assert (spectrum.verdict == "untrained") == (spectrum.p_value > 0.05)
        assert len(low) > 10  # that is what an exponent alone would be taken for
        assert sum(spectrum.verdict != "untrained" for spectrum in found) <= 5

    def test_a_heavy_tail_is_told_from_random_ones(self):
        layer = nn.Linear(512, 64, bias=False)
        uniform = (torch.arange(64, dtype=torch.float64) + 0.5) / 64
        pareto = (1 - uniform) ** -0.5  # exponent 3
        layer.weight.data = torch.eye(64, 512) * pareto.sqrt().float()[:, None]
        spectrum = model_spectra(nn.Sequential(layer))["0"]
        assert spectrum.p_value == 1 / 40
        assert spectrum.verdict in ("good", "fair")


def reset(layer):
    layer.reset_parameters()
    return nn.Sequential(layer)


class TestSelectRank:
    OPTIONS = ("elbow", "gap", "marchenko_pastur", "gavish_donoho")

    def test_signal_in_noise_is_found_by_every_edge(self):
        weight = spiked()
        values = torch.linalg.svdvals(weight)
        for rule in ("gap", "marchenko_pastur", "gavish_donoho"):
            assert select_rank(values, (120, 480), rule) == 5
        assert select_rank(values, (120, 480), "marchenko_pastur", sigma="bulk") == 5
        assert select_rank(values, (120, 480), "marchenko_pastur", sigma=0.05) == 5
        assert select_rank(values, (120, 480), "permutation", weight=weight) == 5
        assert abs(select_rank(values, (120, 480), "elbow") - 5) <= 2

    def test_rules_by_hand(self):
        values = torch.tensor([4.0, 2.0, 1.0, 0.5])
        shape = (4, 16)
        assert select_rank(values, shape, "top_k", k=3) == 3
        for number in (True, 2.5, 5, -1):
            with pytest.raises(ValueError, match=rf"k={number} must be a whole number from 0 to 4"):
                select_rank(values, shape, "top_k", k=number)
        assert select_rank(values, shape, "energy", share=0.75) == 1  # 16 of 21.25 is 0.7529
        assert select_rank(values, shape, "energy", share=0.76) == 2
        assert select_rank(values, shape, "energy", share=1.0) == 4
        # Heights over the chord's places 0, 1/3, 2/3, 1: 1, .429, .143, 0; farthest at 1.
        assert select_rank(values, shape, "elbow") == 1
        assert select_rank(torch.tensor([4.0, 2.0, 1.5, 0.1]), shape, "gap") == 3
        assert select_rank(torch.tensor([4.0, 2.0, 0.0, 0.0]), shape, "gap") == 2
        # sigma = sqrt(21.25 / 64) = .576, edge .576 * (4 + 2) = 3.457
        assert select_rank(values, shape) == 1
        assert select_rank(values, shape, tolerance=0.2) == 0
        assert select_rank(values, shape, sigma=0.1) == 3
        # (.56/64 - .95/16 + 1.82/4 + 1.43) * 1.5 = 2.752
        assert gavish_donoho_threshold(values, shape) == pytest.approx(2.7516, abs=1e-3)
        assert select_rank(values, shape, "gavish_donoho") == 1
        assert stable_rank(values) == pytest.approx(21.25 / 16)
        assert select_rank(values, shape, "stable_rank") == 1
        shares = [4 / 7.5, 2 / 7.5, 1 / 7.5, 0.5 / 7.5]
        entropy = -sum(share * math.log(share) for share in shares)
        assert effective_rank(values) == pytest.approx(math.exp(entropy))
        assert select_rank(values, shape, "effective_rank") == round(math.exp(entropy))

    def test_flat_spectra(self):
        flat = torch.ones(5)
        assert effective_rank(flat) == pytest.approx(5)
        assert stable_rank(flat) == 5
        assert select_rank(flat, (5, 7), "elbow") == 5

    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.floats(0.01, 10), min_size=1, max_size=12), st.integers(0, 9))
    def test_every_rule_stays_in_range(self, values, extra):
        falling = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
        shape = (len(values) + extra, len(values))
        weight = torch.randn(shape)
        for rule in ("energy", "effective_rank", "stable_rank", *self.OPTIONS):
            assert 0 <= select_rank(falling, shape, rule) <= len(values)
        assert 0 <= select_rank(falling, shape, "permutation", weight=weight) <= len(values)

    def test_permutation_leaves_random_state(self):
        before = torch.get_rng_state()
        one = permutation_threshold(spiked(), rounds=3)
        assert one == permutation_threshold(spiked(), rounds=3)
        assert torch.equal(before, torch.get_rng_state())

    def test_permutation_is_a_quantile_of_the_largest_values(self):
        weight = spiked(rows=20, columns=30)
        generator = torch.Generator().manual_seed(1)
        orders = [torch.randperm(600, generator=generator) for _ in range(5)]
        largest = [torch.linalg.norm(weight.flatten()[one].reshape(20, 30), 2) for one in orders]
        found = permutation_threshold(weight, quantile=0.75, rounds=5, seed=1)
        assert found == pytest.approx(float(sorted(largest)[3]))

    @pytest.mark.parametrize(("shape", "effective"), HE_INITIALIZED)
    def test_he_initialized_convolutions_have_no_signal(self, shape, effective):
        layer = he_initialized(*shape)
        values = layer_svd(layer, right=False).values
        matrix = weight_matrix(layer).matrices[0]
        rows, columns = matrix.shape
        unfolded = (rows, columns)
        assert effective_rank(values) == pytest.approx(effective, rel=0.005)
        assert select_rank(values, unfolded) == 0
        assert select_rank(values, unfolded, "gavish_donoho") == 0
        assert fit_marchenko_pastur(eigenvalues(layer), unfolded).num_outliers == 0
        edge = marchenko_pastur_edge(unfolded, float(matrix.std()))
        assert 0.95 < float(values[0]) / edge < 1

    def test_bad_input(self):
        values = torch.tensor([2.0, 1.0])
        with pytest.raises(ValueError, match="rule='best'; choose one of top_k"):
            select_rank(values, (2, 3), "best")
        with pytest.raises(ValueError, match="k=3 must be"):
            select_rank(values, (2, 3), "top_k", k=3)
        with pytest.raises(ValueError, match=r"do not fit: .*missing.*'k'"):
            select_rank(values, (2, 3), "top_k")
        with pytest.raises(ValueError, match=r"do not fit: .*unexpected.*'k'"):
            select_rank(values, (2, 3), "energy", k=1)
        with pytest.raises(ValueError, match="energy=0"):
            select_rank(values, (2, 3), "energy", share=0)
        with pytest.raises(ValueError, match="sigma='noise'"):
            select_rank(values, (2, 3), sigma="noise")
        with pytest.raises(ValueError, match=r"2 singular values .* shape \(3, 3\)"):
            select_rank(values, (3, 3))
        with pytest.raises(ValueError, match="falling"):
            select_rank(values.flip(0), (2, 3))
        with pytest.raises(ValueError, match="finite"):
            select_rank(torch.tensor([float("nan"), 1.0]), (2, 3))
        for rank in (effective_rank, stable_rank, lambda zeros: select_rank(zeros, (2, 3))):
            with pytest.raises(ValueError, match="All singular values are zero"):
                rank(torch.zeros(2))
        with pytest.raises(ValueError, match="'marchenko_pastur' and its options do not fit"):
            select_rank(values, (2, 3), tolerance="much")
        with pytest.raises(ValueError, match=r"weight has the shape \(3, 3\)"):
            select_rank(values, (2, 3), "permutation", weight=torch.ones(3, 3))
        with pytest.raises(ValueError, match="quantile=2"):
            permutation_threshold(torch.ones(2, 3), quantile=2)


ROUNDING = [0.0, 2e-17, -2e-17]


class TestRounding:
    """What is zero, or equal, is so on every machine."""

    @pytest.mark.parametrize("noise", ROUNDING)
    def test_zeros_are_no_eigenvalues(self, noise):
        values = torch.tensor([4.0, 2.0, 1.0, 0.5], dtype=torch.float64)
        zeros = torch.tensor([noise, noise / 3, 0.0, 0.0, 0.0], dtype=torch.float64)
        noisy = torch.cat([values, zeros]).sort(descending=True).values
        assert fit_power_law(noisy) == fit_power_law(values)
        assert fit_marchenko_pastur(noisy, (9, 12)) == fit_marchenko_pastur(values, (9, 12))
        with pytest.raises(ValueError, match="two different positive"):
            fit_power_law(torch.cat([values[:1], zeros]))

    @pytest.mark.parametrize("noise", [-2e-16, 2e-16, 9e-16])
    def test_equal_eigenvalues_are_equal(self, noise):
        equal = torch.tensor([3.0, 3.0, 2.0, 1.0, 1.0], dtype=torch.float64)
        noisy = equal + torch.tensor([0, -1, 0, 0, 1]) * noise
        one, two = fit_power_law(noisy), fit_power_law(equal)
        assert (one.alpha, one.distance) == pytest.approx((two.alpha, two.distance), rel=1e-9)
        assert one.num_tail == two.num_tail
        with pytest.raises(ValueError, match="two different positive"):
            fit_power_law(noisy[:2])

    @pytest.mark.parametrize("noise", ROUNDING)
    @pytest.mark.parametrize("rule", ["gap", "gavish_donoho", "elbow", "energy", "effective_rank"])
    def test_ranks_do_not_count_zeros(self, rule, noise):
        zeros = [0.0] * 5
        values = torch.tensor([4.0, 2.0, 1.0, *zeros], dtype=torch.float64)
        noisy = values.clone()
        noisy[3:6] = torch.tensor([abs(noise), abs(noise) / 2, abs(noise) / 1e9])
        assert select_rank(noisy, (8, 9), rule) == select_rank(values, (8, 9), rule)
        assert select_rank(noisy, (8, 9), "gap") == 3

    @pytest.mark.parametrize("noise", [0.0, 2e-16, 4e-16])
    @pytest.mark.parametrize(("rule", "rank"), [("elbow", 5), ("gap", 1)])
    def test_ranks_of_flat_spectra(self, rule, rank, noise):
        falling = torch.tensor([2.0, 2, 1, 0, 0], dtype=torch.float64)
        assert select_rank(1 + noise * falling, (5, 7), rule) == rank

    def test_layers_of_lower_rank(self):
        basis = torch.linalg.qr(
            torch.randn(12, 8, generator=torch.Generator().manual_seed(0)).double()
        )
        net = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 6)).double()
        scale = torch.tensor([5.0, 4, 3, 2, 1, 0, 0, 0], dtype=torch.float64)
        net.get_parameter("0.weight").data = scale[:, None] * basis.Q.T
        net.get_parameter("1.weight").data = basis.Q[:8, :1] @ basis.Q[:6, :1].T  # of rank one
        spectra = model_spectra(net)
        assert [layer.name for layer in spectra] == ["0"]
        assert spectra.skipped == {"1": "fewer than two different positive eigenvalues"}
        _, (left, right) = plot_spectrum(spectra["0"])
        assert known(left.get_legend()).get_texts()[0].get_text() == "5 eigenvalues"
        assert right.lines[0].get_xdata() == pytest.approx([x / 8 for x in (1, 4, 9, 16, 25)])
        assert right.lines[0].get_ydata() == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])


class TestModels:
    def net(self):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 20))

    def test_universal_metric_is_the_mean_over_layers(self):
        net = self.net()
        each = []
        for layer in (net[0], net[3]):
            values = eigenvalues(layer)
            each.append(fit_power_law(values).alpha * math.log(values[0]))
        assert universal_metric(net) == pytest.approx(sum(each) / 2)
        assert universal_metric(net, ["3"]) == pytest.approx(each[1])
        svds = model_svd(net)
        svds["0"]
        assert universal_metric(svds) == pytest.approx(sum(each) / 2, rel=1e-4)

    def test_tables_and_skipped_layers(self):
        net = nn.Sequential(self.net(), nn.Linear(20, 1))
        spectra = model_spectra(net)
        assert [layer.name for layer in spectra] == ["0.0", "0.3"]
        assert spectra.skipped == {"1": "fewer than two different positive eigenvalues"}
        with pytest.raises(KeyError, match="fewer than two"):
            spectra["1"]
        with pytest.raises(
            KeyError, match=r"'x' is not among the layers\. The names are '0\.0', '0\.3'"
        ):
            spectra["x"]
        table = spectra.to_pandas()
        assert table.loc["0.3", "alpha"] == spectra["0.3"].power_law.alpha
        assert table.loc["0.0", "columns"] == 27
        with pytest.raises(ValueError, match="No layer has two"):
            model_spectra(nn.Linear(20, 1))

    @pytest.mark.parametrize("key", [0, 1.5, None, b"0", ["0.0"], slice(0, 1)], ids=repr)
    @pytest.mark.parametrize("read", [model_spectra, model_svd])
    def test_a_key_that_is_no_name_is_named(self, read, key):
        found: Any = read(self.net())
        message = re.escape(f"{key!r} is not among the layers. The names are '0', '3'.")
        with pytest.raises(KeyError, match=message):
            found[key]
        if read is model_svd:
            assert key not in found
            for ask in (found.module, found.matrix):
                with pytest.raises(KeyError, match=message):
                    ask(key)

    def test_no_layer_stops_the_others(self):
        torch.manual_seed(0)
        net = nn.Sequential(self.net(), *(nn.Linear(9, 8) for _ in range(4)), nn.LazyLinear(3))
        net.get_parameter("1.weight").data[2, 3] = float("nan")
        net.get_parameter("2.weight").data = net.get_parameter("2.weight").data[:0]
        net[3].forward = lambda x: 2 * nn.functional.linear(x, net.get_parameter("3.weight"))
        net.get_parameter("4.weight").data.zero_()
        net.append(nn.Linear(3, 4, device="meta"))
        spectra = model_spectra(net)
        assert [layer.name for layer in spectra] == ["0.0", "0.3"]
        assert set(spectra.skipped) == set("123456")
        for name, reason in (
            ("1", "1 NaN or infinite entries in its weight, the first at (2, 3)"),
            ("2", "without entries"),
            ("3", "gives other numbers than its weight and bias do, off by 1"),
            ("4", "fewer than two different positive eigenvalues"),
            ("5", "run the model once"),
            ("6", "on the meta device"),
        ):
            assert reason in spectra.skipped[name]
            assert f"\n{name} has no spectrum: " in str(spectra)
        assert len(compare_with_random(net).twin) == 2
        with pytest.raises(ValueError, match=r"no spectrum to describe \('1': .* NaN"):
            model_spectra(net, ["1", "4"])
        with pytest.raises(ValueError, match="'3' cannot be decomposed by its weight"):
            model_spectra(net, ["0.0", "3"])

    def test_printed_as_tables(self):
        net = self.net()
        spectra = model_spectra(net)
        head, first, second = str(spectra).splitlines()
        assert head.split()[:4] == ["layer", "rows", "columns", "alpha"]
        assert first.split()[:3] == ["0", "16", "27"]
        assert f"{spectra['3'].power_law.alpha:.3f}" in second
        assert (
            repr(spectra) == "ModelSpectra(layers=(LayerSpectrum(…), LayerSpectrum(…)), skipped={})"
        )
        assert "values=float64 (16,)" in repr(spectra["0"])
        compared = compare_with_random(net)
        lines = str(compared).splitlines()
        assert len(lines) == 3
        assert "alpha of twin" in lines[0]
        assert f"{compared.twin['0'].power_law.alpha:.3f}" in lines[1]
        assert len(repr(compared)) < 100
        svds = model_svd(net)
        assert len(svds["0"].values) == 16
        assert repr(svds) == "ModelSVD(2 layers of Sequential, 1 decomposed)"
        assert "values=float32 (16,)" in repr(svds["0"])
        assert repr(svds.matrix("3")).startswith("WeightMatrix(matrices=float32 (1, 20, 64),")

    @pytest.mark.parametrize("derive", [weight_norm, lambda layer: prune.identity(layer, "weight")])
    def test_a_derived_weight_has_no_twin_by_reset(self, derive):
        net = nn.Sequential(nn.Linear(9, 8), derive(nn.Linear(8, 7)))
        with pytest.raises(ValueError, match=r"does not renew the weight .*shuffled"):
            compare_with_random(net)
        assert len(compare_with_random(net, "shuffled").twin) == 2

    def test_comparison_with_a_twin(self):
        net = self.net()
        with torch.no_grad():  # one strong direction that no random layer has
            signs = torch.arange(64) % 2 * 2.0 - 1
            net[3].weight += 3 * torch.outer(torch.ones(20), signs) / 64
        state, before = copy.deepcopy(net.state_dict()), torch.get_rng_state()
        for twin in ("reset", "shuffled", self.net()):
            result = compare_with_random(net, twin)
            assert result.model["3"].marchenko_pastur.num_outliers >= 1
            assert result.twin["3"].marchenko_pastur.num_outliers == 0
            assert list(result.to_pandas()["alpha of twin"])[1] > result.model["3"].power_law.alpha
        assert torch.equal(before, torch.get_rng_state())
        assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
        shuffled = compare_with_random(net, "shuffled").twin["3"]
        entries = net[3].weight.detach().double().square().sum() / 20
        assert float(shuffled.values.sum()) == pytest.approx(float(entries), rel=1e-6)
        one, two = (compare_with_random(net, seed=seed).twin["0"].values for seed in (0, 1))
        assert not torch.equal(one, two)
        assert torch.equal(one, compare_with_random(net, seed=0).twin["0"].values)

    def test_twins_of_attention_and_bad_twins(self):
        attention = nn.MultiheadAttention(16, 2)
        compared = compare_with_random(attention)
        assert [layer.name for layer in compared.twin] == ["query", "key", "value", "out_proj"]
        with pytest.raises(ValueError, match="choose 'reset', 'shuffled'"):
            compare_with_random(self.net(), "other")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="The twin has no layers 3"):
            compare_with_random(self.net(), self.net()[:2])


class TestPictures:
    def spectra(self, spikes):
        layer = nn.Linear(480, 120)
        layer.weight.data = spiked(spikes=spikes).float()
        return model_spectra(nn.Sequential(layer, nn.Linear(120, 30)))

    def test_spectrum_shows_the_law_of_the_bulk_and_the_power_law(self):
        spectrum = self.spectra(5)["0"]
        figure, (left, right) = plot_spectrum(spectrum)
        drawn = {line.get_label(): line for line in left.lines}
        x, density = drawn["Marchenko-Pastur"].get_data()
        # The law's area is the share of eigenvalues in the bulk, and it ends at the edge.
        assert trapezoid(density, x) == pytest.approx(115 / 120, abs=0.01)
        assert x[-1] == pytest.approx(spectrum.marchenko_pastur.law.upper)
        marked = drawn["5 above the edge"].get_xdata()
        assert sorted(marked) == pytest.approx(sorted(spectrum.values[:5].tolist()))
        area = sum(bar.get_height() * bar.get_width() for bar in left.patches)
        assert area == pytest.approx(1)
        eigenvalues, law = right.lines[:2]
        assert len(eigenvalues.get_xdata()) == 120
        slope = np.diff(np.log(law.get_ydata())) / np.diff(np.log(law.get_xdata()))
        assert slope == pytest.approx(np.full(49, 1 - spectrum.power_law.alpha))
        figure.canvas.draw()

    def test_exponents_of_several_models(self):
        one, two = self.spectra(5), self.spectra(0)
        _, axes = plot_exponents({"spiked": one, "random": two})
        lines = [line for line in axes.lines if np.size(line.get_xdata()) == 2]
        for line, spectra in zip(lines, (one, two), strict=True):
            assert line.get_ydata() == pytest.approx([layer.power_law.alpha for layer in spectra])
        assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1"]
        _, axes = plot_exponents(one)
        assert known(axes.get_legend()).get_texts()[0].get_text().startswith("universal metric")
        _, axes = plot_exponents(SpectraComparison(one, two))
        texts = [text.get_text() for text in known(axes.get_legend()).get_texts()]
        assert [text.split(",")[0] for text in texts] == ["model", "random twin"]
        with pytest.raises(ValueError, match="'other' are not those of the first"):
            plot_exponents({"spiked": one, "other": model_spectra(nn.Linear(9, 9))})
        with pytest.raises(ValueError, match="spectra is empty"):
            plot_exponents({})


def test_untrained_resnet18():
    torch.manual_seed(0)
    model = torchvision.models.resnet18(weights=None)
    spectra = model_spectra(model)
    assert len(spectra) == 21
    assert spectra.universal_metric == pytest.approx(-57.37, abs=0.005)
    exponents = sorted(layer.power_law.alpha for layer in spectra)
    assert exponents[0] == pytest.approx(5.13, abs=0.005)
    assert exponents[10] == pytest.approx(10.67, abs=0.005)
    assert exponents[-1] == pytest.approx(54.44, abs=0.005)
    assert {layer.verdict for layer in spectra} == {"untrained"}


class LeNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)


@pytest.mark.reference
@pytest.mark.skipif(
    not (cifar10.DATA / "lenet_cifar10_epochs").is_dir(),
    reason="the LeNet checkpoints are absent (set CLASSFILTERS_DATA)",
)
def test_exponents_fall_and_the_metric_rises_as_lenet_learns():
    metric, exponent, largest = [], [], []
    for epoch in range(10):
        net = LeNet()
        net.load_state_dict(
            load_file(cifar10.DATA / "lenet_cifar10_epochs" / f"epoch{epoch}.safetensors")
        )
        spectra = model_spectra(net)
        metric.append(spectra.universal_metric)
        exponent.append(spectra["fc1"].power_law.alpha)
        largest.append(spectra["fc1"].largest)
    assert metric == pytest.approx(
        [-16.7726, -8.9037, -7.5772, -6.4000, -5.7097, -5.6305, -4.6440, -4.3024, -4.2241, -4.0153],
        abs=1e-3,
    )
    assert exponent == pytest.approx(
        [4.903, 3.721, 3.125, 2.883, 2.639, 2.554, 2.453, 2.350, 2.270, 2.253], abs=1e-3
    )
    assert (largest[0], largest[-1]) == pytest.approx((0.0105, 0.0422), abs=1e-4)
