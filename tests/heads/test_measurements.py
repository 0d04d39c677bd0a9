"""Measurements against explicit formulas, scikit-learn, and the constants of the released sets."""

import math
from typing import Any

import pytest
import torch
from sklearn.metrics import mutual_info_score
from torch import nn

from captum_classfilters import ClassFilters, LayerFilterContribution
from captum_classfilters._core.layers import unwrapped
from captum_classfilters.heads import (
    essentiality,
    gram_spectrum,
    layer_sweep,
    model_essentiality,
    psi,
    psi_floor,
    set_overlap,
    top_mass,
)
from captum_classfilters.heads.set_overlap import membership_information
from captum_classfilters.metrics import (
    class_means,
    class_selectivity_index,
    evaluate_classifier,
    selectivity_regularizer,
)
from tests.heads.common import HOLDING, QUIET, data_for, table_for
from tests.models import joined

# The public index file for ResNet-20 with five filters per class (Badola et al.).
RELEASED = [
    (7, 22, 23, 50, 54),
    (6, 9, 40, 47, 55),
    (1, 13, 23, 53, 61),
    (17, 49, 53, 57, 59),
    (25, 46, 48, 57, 61),
    (13, 37, 42, 49, 63),
    (9, 48, 52, 56, 61),
    (0, 16, 25, 53, 56),
    (2, 9, 21, 22, 29),
    (8, 21, 40, 54, 55),
]


def released_mask():
    mask = torch.zeros(10, 64, dtype=torch.bool)
    for row, filters in enumerate(RELEASED):
        mask[row, list(filters)] = True
    return mask


def table(scores, **options):
    return ClassFilters(scores, counts=torch.ones(len(scores)), **options)


class TestOverlap:
    def test_released_sets_give_the_published_constants(self):
        overlap = set_overlap(released_mask(), repetitions=200)
        assert overlap.mean_all_pairs == pytest.approx(0.034537759, abs=1e-8)
        assert overlap.mean_off_diagonal == pytest.approx(0.00791, abs=5e-6)
        assert overlap.distinct_filters == 32
        # They are no less entangled than chance: random sets of five do as well.
        assert overlap.random["mean_all_pairs"][0] == pytest.approx(0.0347, abs=5e-4)
        assert overlap.random["mean_off_diagonal"][0] == pytest.approx(0.0080, abs=5e-4)

    def test_information_is_scikit_learns(self):
        mask = torch.rand(4, 12, generator=torch.Generator().manual_seed(0)) < 0.4
        ours = membership_information(mask)
        for a in range(4):
            for b in range(4):
                expected = mutual_info_score(mask[a].numpy(), mask[b].numpy())
                assert float(ours[a, b]) == pytest.approx(expected, abs=1e-12)

    def test_jaccard_and_counts_are_those_of_the_table(self):
        mask = torch.rand(4, 9, generator=torch.Generator().manual_seed(2)) < 0.4
        mask[3] = False
        filters = table(torch.rand(4, 9)).with_selection(mask)
        overlap = set_overlap(filters, repetitions=3, seed=1)
        sets = [set(row.nonzero()[:, 0].tolist()) for row in mask]
        pairs = [(a, b) for a in range(4) for b in range(4) if a != b and sets[a] | sets[b]]
        expected = [len(sets[a] & sets[b]) / len(sets[a] | sets[b]) for a, b in pairs]
        assert overlap.mean_jaccard == pytest.approx(sum(expected) / len(expected))
        assert overlap.classes_per_filter.tolist() == mask.sum(0).tolist()
        assert overlap.random == set_overlap(mask, repetitions=3, seed=1).random
        assert overlap.random != set_overlap(mask, repetitions=3, seed=2).random
        assert set_overlap(mask, repetitions=0).random == {}

    def test_refuses_a_single_class(self):
        with pytest.raises(ValueError, match="two classes"):
            set_overlap(torch.ones(1, 4, dtype=torch.bool))


class TestTopMass:
    def test_shares_of_the_strongest(self):
        features = torch.tensor([[3.0, 1.0, 0.0], [1.0, 1.0, 2.0], [0.0, 0.0, 0.0]])
        mass = top_mass(features, torch.tensor([0, 1, 1]), [1, 2, 3])
        assert mass.mean.tolist() == [[0.75, 1.0, 1.0], [0.5, 0.75, 1.0]]
        assert mass.overall.tolist() == pytest.approx([0.625, 0.875, 1.0])

    def test_refuses_negative_features_and_large_k(self):
        with pytest.raises(ValueError, match="after a ReLU"):
            top_mass(torch.tensor([[-1.0, 1.0]]), torch.tensor([0]), [1])
        with pytest.raises(ValueError, match="1 to 2"):
            top_mass(torch.rand(1, 2), torch.tensor([0]), [3])


class TestPsi:
    def test_one_hot_is_one_and_uniform_is_the_floor(self):
        one_hot = torch.eye(8)[:1]
        uniform = torch.ones(1, 8)
        label = torch.tensor([0])
        assert float(psi(one_hot, label, 0.5)) == 1.0
        for fraction in (0.1, 0.5, 0.9):
            assert float(psi(uniform, label, fraction)) == pytest.approx(psi_floor(8, fraction))

    @pytest.mark.parametrize(("fraction", "floor"), [(0.5, 0.516), (0.9, 0.109), (0.1, 0.906)])
    def test_floor_for_64_filters(self, fraction, floor):
        assert psi_floor(64, fraction) == pytest.approx(floor, abs=6e-4)

    def test_median_and_mean_differ_as_they_should(self):
        # Prefix sums below one half: 0, 0 and 1 filters.
        features = torch.tensor([[1.0, 0, 0, 0], [1.0, 0, 0, 0], [0.4, 0.3, 0.3, 0.0]])
        labels = torch.zeros(3, dtype=torch.long)
        assert float(psi(features, labels, 0.5, statistic="median")) == 1.0
        assert float(psi(features, labels, 0.5, statistic="mean")) == pytest.approx(1 - 1 / 12)

    def test_a_class_without_images_has_none(self):
        features = torch.tensor([[0.3, 0.4, 0.3], [0.0, 9.0, 0.0]])
        labels = torch.tensor([0, 2])
        for fraction in ((), (0.5,)):  # which is the default
            found = psi(features, labels, *fraction, num_classes=4).tolist()
            assert found == pytest.approx([2 / 3, math.nan, 1, math.nan], nan_ok=True)

    def test_correction_counts_the_filters_needed_and_drops_dead_images(self):
        features = torch.tensor([[0.6, 0.4, 0.0], [0.0, 0.0, 0.0]])
        labels = torch.tensor([0, 1])
        assert psi(features, labels, 0.5).tolist() == [1.0, 1.0]
        corrected = psi(features, labels, 0.5, corrected=True, num_classes=2)
        assert float(corrected[0]) == pytest.approx(2 / 3)
        assert math.isnan(corrected[1])


class TestSelectivity:
    def test_formula_on_means(self):
        index = class_selectivity_index(torch.tensor([[4.0, 1.0, 0.0], [1.0, 1.0, 0.0]]))
        assert index.tolist() == pytest.approx([0.6, 0.0, 0.0])

    def test_class_sizes_do_not_matter(self):
        features = torch.tensor([[2.0], [2.0], [2.0], [1.0]])
        labels = torch.tensor([0, 0, 0, 1])
        index = class_selectivity_index(class_means(features, labels))
        assert float(index) == pytest.approx(1 / 3)  # sums would give (6 - 1) / 7

    def test_regularizer_is_the_index_and_has_its_gradient(self):
        labels = torch.tensor([0, 2, 0, 2])
        maps = torch.rand(4, 3, 2, 2, dtype=torch.float64, requires_grad=True)
        expected = class_selectivity_index(
            class_means(maps.detach().mean((2, 3)), labels)[[0, 2]]
        ).mean()
        assert float(selectivity_regularizer(maps, labels)) == pytest.approx(float(expected))
        assert torch.autograd.gradcheck(lambda x: selectivity_regularizer([x, x], labels), maps)

    def test_a_positive_coefficient_lowers_selectivity(self):
        torch.manual_seed(0)
        values = torch.rand(20, 4).requires_grad_()
        labels = torch.arange(20) % 2
        before = float(selectivity_regularizer(values, labels))
        optimizer = torch.optim.SGD([values], lr=1.0)
        for _ in range(50):
            optimizer.zero_grad()
            selectivity_regularizer(values.relu(), labels).backward()
            optimizer.step()
        assert float(selectivity_regularizer(values.relu(), labels)) < 0.5 * before

    def test_refuses_a_batch_of_one_class(self):
        with pytest.raises(ValueError, match="single class"):
            selectivity_regularizer(torch.rand(3, 2), torch.zeros(3, dtype=torch.long))


class TestEssentiality:
    # Class c fires feature c alone; features 2 and 3 are idle.
    features = torch.eye(2, 4).repeat(5, 1) * 10
    labels = torch.arange(2).repeat(5)
    weight = torch.eye(2, 4)
    mask = torch.eye(2, 4).bool()

    @pytest.mark.parametrize("replacement", ["zero", "noise"])
    def test_the_only_filter_is_necessary_and_sufficient(self, replacement):
        result = essentiality(
            self.features, self.labels, self.weight, None, self.mask, replacement=replacement
        )
        assert result.clean.tolist() == [1.0, 1.0]
        assert result.at_complement.tolist() == [1.0, 1.0]
        assert result.at_set[1] < 0.9  # class 0 wins ties by argmax, class 1 cannot
        assert float(result.at_set.mean()) < float(result.random_at_set.mean()) + 1e-9

    def test_mean_replacement_is_deterministic(self):
        first = essentiality(
            self.features, self.labels, self.weight, None, self.mask, replacement="mean", seed=0
        )
        second = essentiality(
            self.features, self.labels, self.weight, None, self.mask, replacement="mean", seed=1
        )
        assert torch.equal(first.at_set, second.at_set)

    def test_on_a_model(self):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)
        )
        data = [(torch.rand(30, 1, 6, 6), torch.arange(30) % 3)]
        filters = LayerFilterContribution(net, "1").identify(
            data, num_filters=2, show_progress=False
        )
        result = model_essentiality(net, filters, data, replacement="zero", show_progress=False)
        with torch.no_grad():
            predicted = net(data[0][0]).argmax(1)
        for class_ in range(3):
            recall = (predicted[class_::3] == class_).double().mean()
            assert float(result.clean[class_]) == pytest.approx(float(recall))

    def test_refuses_what_does_not_fit(self):
        with pytest.raises(ValueError, match="do not fit"):
            essentiality(self.features, self.labels, self.weight[:, :3], None, self.mask)
        with pytest.raises(ValueError, match=r"int64.* do not fit"):
            essentiality(self.features, self.labels, self.weight, None, self.mask.long())
        options: list[dict[str, Any]] = [{"replacement": "nothing"}, {"repetitions": 0}]
        for wrong in options:
            with pytest.raises(ValueError, match=next(iter(wrong))):
                essentiality(self.features, self.labels, self.weight, None, self.mask, **wrong)
        for weight, bias in ((self.weight * math.nan, None), (self.weight, self.weight[:, 0] / 0)):
            with pytest.raises(ValueError, match="The head's weight or bias holds NaN or Inf"):
                essentiality(self.features, self.labels, weight, bias, self.mask)

    def test_one_logit_is_two_classes(self):
        weight = torch.tensor([[-1.0, 1.0, 0, 0]])
        double = torch.cat([-weight, weight])
        for replacement in ("zero", "mean"):
            options: dict[str, Any] = {"replacement": replacement}
            single = essentiality(
                self.features, self.labels, weight, torch.tensor([0.5]), self.mask, **options
            )
            both = essentiality(
                self.features, self.labels, double, torch.tensor([-0.5, 0.5]), self.mask, **options
            )
            assert torch.equal(single.at_set, both.at_set)
            assert torch.equal(single.at_complement, both.at_complement)

    @pytest.mark.parametrize("name", HOLDING)
    @pytest.mark.parametrize("replacement", ["zero", "mean"])
    def test_a_model_is_run_where_its_head_is_not_its_end(self, name, replacement):
        """Against a plain hook that replaces the head's input image by image."""
        model = HOLDING[name]().eval()
        data, filters = data_for(model, name), table_for(name)
        options: dict[str, Any] = {"replacement": replacement, "repetitions": 1, **QUIET}
        if name in ("a head used twice", "a convolution"):
            with pytest.raises(ValueError, match=r"reached 2 times|takes \(5, 6, 4, 4\)"):
                model_essentiality(model, filters, data, **options)
            return
        found = model_essentiality(model, filters, data, **options)
        plain = getattr(model, "_orig_mod", model)
        inner: Any = unwrapped(model)
        x, y = joined(data)
        with torch.no_grad():
            mean = inner.features(x).float().mean(0)
        for part, mask in (
            (found.at_set, filters.selected),
            (found.at_complement, ~filters.selected),
        ):

            def before(_module, inputs, mask=mask):
                other = mean if replacement == "mean" else torch.zeros(6)
                return (torch.where(mask[y], other.to(inputs[0]), inputs[0]),)

            handle = inner.fc.register_forward_pre_hook(before)
            right = evaluate_classifier(plain, [(x, y)], **QUIET).recall
            handle.remove()
            # Coarse types may draw where the weight, in float64, does not.
            coarse = name in ("half precision", "bfloat16", "autocast in forward")
            assert torch.allclose(part, right, atol=0.13 if coarse else 0)

    def test_positions_of_flattened_maps_go_together(self):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(80, 3))
        data = data_for(net)
        filters = ClassFilters(
            torch.rand(3, 5),
            torch.ones(3),
            layer="1",
            provenance={"feeds_head": {"name": "3", "by": "flatten"}},
        ).select(2)
        found = model_essentiality(net, filters, data, replacement="zero", **QUIET)
        x, y = joined(data)
        with torch.no_grad():
            maps = net[1](net[0](x))
            maps = maps * ~filters.selected[y][:, :, None, None]
            right = net[3](maps.flatten(1)).argmax(1) == y
        for class_index in range(3):
            share = float(right[y == class_index].double().mean())
            assert float(found.at_set[class_index]) == pytest.approx(share)

    def test_noise_on_a_model_that_goes_on(self):
        options: dict[str, Any] = {"repetitions": 12, **QUIET}
        plain, cooled = HOLDING["plain"](), HOLDING["a temperature in place"]()
        data = data_for(plain, number=60)
        for replacement in ("noise", "scaled_noise"):
            results = [
                model_essentiality(model, table_for(), data, replacement=replacement, **options)
                for model in (plain, cooled)
            ]
            assert torch.equal(results[0].clean, results[1].clean)
            difference = (results[0].at_complement - results[1].at_complement).abs()
            assert difference.max() < 0.15

    def test_scaled_noise_has_each_features_mean_and_deviation(self):
        generator = torch.Generator().manual_seed(0)
        features = 10 + 2 * torch.randn(4000, 1, generator=generator)
        labels, weight = torch.zeros(4000, dtype=torch.int64), torch.tensor([[1.0], [0.0]])
        found = essentiality(
            features,
            labels,
            weight,
            torch.tensor([0.0, 8.0]),
            torch.tensor([[True], [False]]),
            replacement="scaled_noise",
        )
        # Right where 10 + 2 z > 8: with the probability that a normal deviate is above -1.
        assert float(found.at_set[0]) == pytest.approx(0.8413, abs=0.02)

    def test_a_loader_that_cannot_be_read_twice(self):
        model = HOLDING["a temperature in place"]()
        with pytest.raises(ValueError, match="read only once"):
            model_essentiality(model, table_for(), iter(data_for(model)), **QUIET)
        model_essentiality(HOLDING["plain"](), table_for(), iter(data_for(model)), **QUIET)


class TestSpectra:
    def test_eigenvalues_are_those_of_the_gram_matrix(self):
        features = torch.tensor([[3.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        spectrum = gram_spectrum(features, torch.tensor([0, 0, 1]))
        assert spectrum.eigenvalues[0].tolist() == pytest.approx([4.5, 0.5])
        assert spectrum.eigenvalues[1].tolist() == pytest.approx([2.0, 0.0], abs=1e-12)
        assert spectrum.top_share.tolist() == pytest.approx([0.9, 1.0])
        assert spectrum.number_for(0.95).tolist() == [2, 1]
        assert spectrum.overall_number_for(0.95) == 2
        assert spectrum.participation_ratio[0] == pytest.approx(25 / 20.5)

    def test_centered_is_the_covariance(self):
        features = torch.randn(50, 3, dtype=torch.float64)
        spectrum = gram_spectrum(features, torch.zeros(50, dtype=torch.long), centered=True)
        covariance = torch.cov(features.T, correction=0)
        assert torch.allclose(spectrum.overall, torch.linalg.eigvalsh(covariance).flip(0))


def test_layer_sweep_measures_each_layer_in_one_pass():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.ReLU())
    calls = []
    net.register_forward_hook(lambda *_: calls.append(1))
    data = [(torch.rand(8, 1, 8, 8), torch.arange(8) % 2)] * 2
    rows = layer_sweep(net, ["0", "1", "3"], data, show_progress=False)
    assert len(calls) == 3  # the first batch runs twice, to see that the scores are the same
    assert [row.num_filters for row in rows] == [4, 4, 3]
    with torch.no_grad():
        features = net[1](net[0](data[0][0])).mean((2, 3))
    expected = psi(features, data[0][1], 0.5, statistic="mean").mean()
    assert rows[1].psi == pytest.approx(float(expected))
    assert math.isnan(rows[0].psi)
    assert math.isnan(rows[0].selectivity)
    assert rows[0].reason == "activations are negative; measure behind the ReLU"
    assert rows[1].reason == ""
