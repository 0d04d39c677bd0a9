"""P- and q-values against enumeration and scipy; calibration; stability; random weights."""

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from captum.attr import LayerActivation, LayerGradientXActivation
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from captum_classfilters import (
    ClassFilters,
    LabelPermutation,
    LayerFilterAblation,
    LayerFilterContribution,
    LayerFilterFrequency,
    identify_class_filters,
)
from captum_classfilters.identify import (
    binomial_interval,
    collect_evidence,
    false_discovery_adjusted,
    permutation_p_values,
    random_weights_null,
    reinitialize,
    vote_p_values,
)
from captum_classfilters.identify.significance import foreign_labels
from tests.models import QUIET, batches, deep, images, joined, known, pool_linear


class TestPermutationPValues:
    def test_votes_are_fishers_exact_test(self):
        votes, counts = torch.tensor([[5, 2, 0], [1, 2, 0]]), torch.tensor([6, 9])
        found = vote_p_values(votes, counts)
        for class_ in range(2):
            for k in range(3):
                own, other = votes[class_, k].item(), votes[1 - class_, k].item()
                table = [
                    [own, counts[class_].item() - own],
                    [other, counts[1 - class_].item() - other],
                ]
                expected = scipy.stats.fisher_exact(table, alternative="greater").pvalue
                assert found[class_, k].item() == pytest.approx(expected, rel=1e-12)

    def test_relabeling_approaches_the_share_of_all_relabelings(self):
        values = torch.tensor([[0.3], [2.0], [1.1], [-0.4], [0.9], [1.7], [0.2]])
        labels = torch.tensor([1, 0, 0, 1, 1, 0, 1])
        observed = values[labels == 0].sum()
        subsets = [values[list(rows)].sum() for rows in combinations(range(7), 3)]
        exact = np.mean([float(total) >= float(observed) - 1e-9 for total in subsets])
        assert exact == pytest.approx(1 / 35)  # the three largest belong to class 0
        found = permutation_p_values(values, labels, permutations=20000)
        assert float(found[0, 0]) == pytest.approx(exact, abs=4 * (exact / 20000) ** 0.5)
        assert float(found[1, 0]) == 1.0

    def test_pool_of_own_and_foreign_evidence_is_scipys_permutation_test(self):
        generator = torch.Generator().manual_seed(0)
        own = torch.rand(5, 2, generator=generator) + 0.25
        foreign = torch.rand(6, 2, generator=generator)
        found = permutation_p_values(
            own,
            torch.zeros(5, dtype=torch.int64),
            foreign=foreign,
            foreign_targets=torch.zeros(6, dtype=torch.int64),
            permutations=20000,
        )
        for k in range(2):
            exact = scipy.stats.permutation_test(
                (own[:, k].numpy(), foreign[:, k].numpy()),
                lambda a, b: a.mean() - b.mean(),
                alternative="greater",
                n_resamples=np.inf,
            ).pvalue
            assert 0.001 < exact < 0.9
            error = float(exact * (1 - exact) / 20000) ** 0.5
            assert float(found[0, k]) == pytest.approx(exact, abs=4 * error)

    @pytest.mark.parametrize(("classes", "number"), [(2, 1), (2, 4), (3, 4), (6, 3)])
    def test_foreign_classes_of_an_image_differ_and_are_equally_likely(self, classes, number):
        labels, keys = torch.arange(6000) % classes, torch.arange(6000)
        drawn = torch.stack(foreign_labels(labels, classes, keys, 0, number))
        assert len(drawn) == min(number, classes - 1)
        for image, own in zip(drawn.T.tolist(), labels.tolist(), strict=True):
            assert len({*image, own}) == 1 + len(drawn)
        for row in drawn:
            shares = torch.bincount((row - labels) % classes, minlength=classes)[1:] / 6000
            assert shares.tolist() == pytest.approx([1 / (classes - 1)] * (classes - 1), abs=0.03)

    @pytest.mark.parametrize(("classes", "number"), [(2, 2), (2, 4), (3, 2), (3, 4)])
    def test_several_foreign_targets_leave_the_test_its_size(self, classes, number):
        """Labels that say nothing, and evidence for every class of its own, of many filters."""
        generator = torch.Generator().manual_seed(0)
        evidence = torch.randn(40, classes, 3000, generator=generator)
        labels, keys = torch.arange(40) % classes, torch.arange(40)
        drawn = foreign_labels(labels, classes, keys, 0, number)
        found = permutation_p_values(
            evidence[keys, labels],
            labels,
            foreign=torch.cat([evidence[keys, targets] for targets in drawn]),
            foreign_targets=torch.cat(drawn),
            permutations=199,
        )
        assert float((found <= 0.05).double().mean()) == pytest.approx(0.05, abs=0.01)

    @pytest.mark.parametrize("with_foreign", [False, True])
    def test_evidence_that_never_changes_is_no_discovery(self, with_foreign):
        values = torch.tensor([[0.1, 0.0]]).repeat(30, 1)  # 0.1 is not exact in binary
        labels = torch.arange(30) % 3
        foreign: dict[str, Any] = (
            {"foreign": values, "foreign_targets": (labels + 1) % 3} if with_foreign else {}
        )
        found = permutation_p_values(values, labels, num_classes=4, permutations=50, **foreign)
        assert (found[:3] == 1).all()
        assert found[3].isnan().all()

    @settings(max_examples=20, deadline=None)
    @given(st.integers(0, 10_000), st.integers(2, 4), st.booleans())
    def test_p_is_a_probability_whatever_the_order_and_unit_of_filters(
        self, seed, classes, with_foreign
    ):
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(20, 3, generator=generator)
        labels = torch.randint(classes, (20,), generator=generator)
        options: dict[str, Any] = {"num_classes": classes, "permutations": 39, "seed": seed}
        if with_foreign:
            options["foreign"] = torch.randn(20, 3, generator=generator)
            options["foreign_targets"] = (labels + 1) % classes
        found = permutation_p_values(values, labels, **options)
        seen = torch.bincount(labels, minlength=classes) > 0
        assert ((found[seen] >= 1 / 40) & (found[seen] <= 1)).all()
        assert found[~seen].isnan().all()
        # Neither the place of a filter nor its unit matters.
        for change in (lambda one: one.flip(1), lambda one: one * 8):
            changed = {name: change(one) for name, one in options.items() if name == "foreign"}
            other = permutation_p_values(change(values), labels, **{**options, **changed})
            expected = found.flip(1) if torch.equal(change(values), values.flip(1)) else found
            assert torch.equal(expected.nan_to_num(), other.nan_to_num())

    def test_adjusted_over_all_cells_that_were_tested(self):
        p_values = torch.tensor([[0.001, 0.04, 0.5], [float("nan")] * 3, [0.03, 0.2, 0.9]])
        for correction in ("bh", "by"):
            found = false_discovery_adjusted(p_values, correction)
            flat = [0.001, 0.04, 0.5, 0.03, 0.2, 0.9]
            expected = scipy.stats.false_discovery_control(flat, method=correction)
            assert found[[0, 2]].flatten().tolist() == pytest.approx(expected.tolist())
            assert found[1].isnan().all()
        with pytest.raises(ValueError, match="between 0 and 1"):
            false_discovery_adjusted(torch.tensor([0.1, 1.5]))


class TestIdentification:
    def test_frequency_needs_no_permutations(self):
        model, data = pool_linear(), batches()
        found = LayerFilterFrequency(model, "1", top_k=2).identify(data, significance=True, **QUIET)
        votes = (found.scores * found.counts[:, None]).round().long()
        assert torch.equal(known(found.p_values), vote_p_values(votes, found.counts))
        assert torch.equal(known(found.q_values), false_discovery_adjusted(known(found.p_values)))
        assert found.provenance["significance"]["null"] == "labels permuted"

    @pytest.mark.parametrize("layer", ["stage2", "stage1"])
    @pytest.mark.parametrize("method", [LayerFilterContribution, LayerFilterAblation])
    def test_foreign_evidence_is_the_methods_own_for_that_target(self, method, layer, monkeypatch):
        """The numbers that reach the test are those of ``attribute``, target by target."""
        from captum_classfilters.identify import identify_class_filters as module_function

        module = __import__("sys").modules[module_function.__module__]
        seen: dict[Any, Any] = {}

        def spy(evidence, labels, **options):
            seen.update(evidence=evidence, labels=labels, **options)
            return permutation_p_values(evidence, labels, **options)

        monkeypatch.setattr(module, "permutation_p_values", spy)
        model, data = deep(), batches()
        x, y = joined(data)
        bound = method(model, layer)
        bound.identify(data, significance=LabelPermutation(9, foreign_targets=2), **QUIET)
        explain = lambda x, y: bound.filter_scores(bound.attribute(x, target=y))  # noqa: E731
        assert torch.equal(seen["labels"], y.sort().values)  # in an order of their own
        for target in range(3):
            found, own = seen["evidence"][seen["labels"] == target], explain(x, y)[y == target]
            distance = torch.cdist(found.double(), own.double())
            assert distance.amin(0).max() < 1e-6
            assert distance.amin(1).max() < 1e-6
        targets = seen["foreign_targets"]
        assert len(targets) == 2 * len(y)
        assert set(targets.tolist()) == {0, 1, 2}
        for target in range(3):  # each row is some other image's evidence for its target
            foreign = seen["foreign"][targets == target].double()
            own = explain(x, target)[y != target].double()
            assert torch.cdist(foreign, own).amin(1).max() < 1e-6

    def test_scores_are_those_without_significance(self):
        model, data = deep(), batches()
        methods = [
            LayerFilterContribution(model, "stage1"),
            LayerFilterContribution(model, "stage2"),
            LayerGradientXActivation(model, model.stage2),
            LayerActivation(model, model.stage2),  # knows no target
        ]
        plain = identify_class_filters(methods, data, num_filters=2, **QUIET)
        tested = identify_class_filters(
            methods, data, num_filters=2, significance=LabelPermutation(19), **QUIET
        )
        for before, after in zip(plain, tested, strict=True):
            assert before.p_values is None
            assert torch.equal(before.scores, after.scores)
            assert torch.equal(before.selected, after.selected)
            assert (known(after.p_values) >= 1 / 20).all()

    def test_a_filter_that_knows_its_class_is_found_and_the_others_are_not(self):
        """Filter 0 sees channel 0, which marks class 0; filter 1 sees noise, filter 2 nothing."""
        model = nn.Sequential(
            nn.Conv2d(2, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)
        )
        with torch.no_grad():
            weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
            model.get_parameter("0.weight").copy_(weight[:, :, None, None])
            model.get_parameter("0.bias").copy_(torch.tensor([0.0, 0.0, 1.0]))
            model.get_parameter("3.weight").copy_(torch.tensor([[1.0, 1.0, 5.0], [-1.0, 1.0, 0.0]]))
        x, y = images(60), torch.arange(60) % 2
        x[y == 0, 0] += 3
        found = LayerFilterContribution(model, "0").identify(
            [(x, y)], significance=True, num_filters=1, **QUIET
        )
        discovered = known(found.q_values) <= 0.05
        # Filter 0 adds to class 0 on its images, and takes less from class 1 on the others'.
        assert discovered.tolist() == [[True, False, False], [True, False, False]]
        assert found.select(fdr=0.05).selected.tolist() == [
            [True, False, False],
            [False, False, False],
        ]
        assert found.filters_of(0).tolist() == [2]  # the largest score, and the same on all images
        assert float(known(found.p_values)[0, 2]) == 1.0

    @pytest.mark.parametrize("layer", ["stage1", "stage2"])
    def test_labels_without_meaning_are_discovered_at_the_nominal_rate(self, layer):
        """Twenty permutations of labels: runs with a discovery, and cells with p <= 0.05."""
        model, x = deep(), images(90)
        labels = torch.arange(90) % 3
        methods = {
            "frequency": LayerFilterFrequency(model, layer, top_k=2),
            "contribution": LayerFilterContribution(model, layer),
            "ablation": LayerFilterAblation(model, layer),
        }
        runs = dict.fromkeys(methods, 0)
        small: dict[str, list[torch.Tensor]] = {name: [] for name in methods}
        for seed in range(20):
            order = torch.randperm(90, generator=torch.Generator().manual_seed(seed))
            tables = identify_class_filters(
                methods,
                [(x, labels[order])],
                num_filters=1,
                significance=LabelPermutation(999, seed=seed),
                **QUIET,
            )
            for name, table in tables.items():
                runs[name] += bool((known(table.q_values) <= 0.05).any())
                small[name].append((known(table.p_values) <= 0.05).double().mean())
        for name in methods:
            low, high = binomial_interval(torch.tensor(runs[name]), torch.tensor(20)).tolist()
            assert low <= 0.05 <= high, (name, runs[name])
            shares = torch.stack(small[name])
            error = float(shares.std() / 20**0.5)
            if name == "frequency":  # discrete: below the nominal level
                assert float(shares.mean()) <= 0.05 + 3 * error
            else:
                assert float(shares.mean()) == pytest.approx(0.05, abs=3 * error), name

    @pytest.mark.parametrize(
        ("significance", "message"),
        [("yes", "expected True, False or a LabelPermutation"), (0.05, "expected True, False")],
    )
    def test_bad_significance(self, significance, message):
        with pytest.raises(ValueError, match=message):
            LayerFilterFrequency(pool_linear(), "1").identify(
                batches(), significance=significance, **QUIET
            )

    def test_bad_options(self):
        with pytest.raises(ValueError, match="permutations=0"):
            LabelPermutation(permutations=0)
        with pytest.raises(ValueError, match="foreign_targets=True"):
            LabelPermutation(foreign_targets=True)
        with pytest.raises(ValueError, match="choose 'bh' or 'by'"):
            LabelPermutation(correction="bonferroni")  # type: ignore[arg-type]
        values, labels = torch.rand(4, 2), torch.tensor([0, 1, 0, 1])
        with pytest.raises(ValueError, match="foreign and foreign_targets together"):
            permutation_p_values(values, labels, foreign=values)
        with pytest.raises(ValueError, match="expected class indices"):
            permutation_p_values(values, labels.float())
        with pytest.raises(ValueError, match="NaN or Inf"):
            permutation_p_values(values * float("nan"), labels)
        with pytest.raises(ValueError, match="out of range"):
            permutation_p_values(values, labels, num_classes=1)
        with pytest.raises(ValueError, match="between 0 and"):
            vote_p_values(torch.tensor([[3]]), torch.tensor([2]))
        with pytest.raises(ValueError, match="votes must be whole"):
            vote_p_values(torch.tensor([[2.7]]), torch.tensor([3]))
        with pytest.raises(ValueError, match="counts must be whole"):
            vote_p_values(torch.tensor([[2.0]]), torch.tensor([float("nan")]))
        for confidence in (2.0, -1, 0, 1, float("nan")):
            with pytest.raises(ValueError, match="must lie between 0 and 1"):
                binomial_interval(labels, labels, confidence)
        single = nn.Sequential(nn.Conv2d(2, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        with pytest.raises(ValueError, match="at least two classes"):
            LayerFilterContribution(single, "0").identify(
                [(images(), torch.zeros(8, dtype=torch.int64))],
                num_classes=1,
                significance=True,
                **QUIET,
            )


class TestEvidence:
    def test_its_table_is_that_of_identify(self):
        model, data = deep(), batches()
        methods = {
            "votes": LayerFilterFrequency(model, "stage2", top_k=2),
            "logits": LayerFilterContribution(model, "stage1"),
        }
        tables = identify_class_filters(methods, data, num_filters=2, **QUIET)
        kept = collect_evidence(methods, data, **QUIET)
        for name, evidence in kept.items():
            found = evidence.class_filters(num_filters=2)
            assert torch.allclose(found.scores, tables[name].scores, atol=1e-9)
            assert torch.allclose(
                known(found.standard_errors), known(tables[name].standard_errors), atol=1e-7
            )
            assert torch.equal(found.selected, tables[name].selected)
            assert (found.layer, found.method) == (tables[name].layer, tables[name].method)

    def test_bootstrap_errors_approach_those_of_the_mean(self):
        evidence = collect_evidence(LayerFilterContribution(deep(), "stage2"), batches(48), **QUIET)
        table = evidence.class_filters()
        found = evidence.bootstrap_standard_errors(4000)
        number = evidence.counts[:, None]
        expected = known(table.standard_errors) * ((number - 1) / number).sqrt()
        assert torch.allclose(found, expected, rtol=0.06)
        again = evidence.bootstrap_standard_errors(4000)
        assert torch.equal(found, again)

    def test_stability_of_parts(self):
        evidence = collect_evidence(LayerFilterContribution(deep(), "stage2"), batches(48), **QUIET)
        found = evidence.stability(num_filters=2, splits=3)
        assert [int(table.counts.sum()) for table in found.tables] == [18, 15, 15]
        whole = evidence.class_filters()
        merged = sum(table.scores * table.counts[:, None] for table in found.tables)
        assert torch.allclose(merged / whole.counts[:, None], whole.scores)  # disjoint, complete
        share = torch.stack([table.selected.double() for table in found.tables]).sum(0) / 3
        assert torch.equal(found.selection_share, share)
        pairs = [(0, 1), (0, 2), (1, 2)]
        overlap = [
            (found.tables[a].selected & found.tables[b].selected).sum(1).double() / 2
            for a, b in pairs
        ]
        assert torch.allclose(found.overlap, torch.stack(overlap).mean(0))
        assert found.chance == pytest.approx(2 / 6)
        scores = torch.stack([table.scores for table in found.tables])
        assert torch.allclose(found.standard_errors, scores.std(0) / 3**0.5)
        assert "3 parts" in str(found)

    def test_chance_level_of_stability_is_that_of_random_evidence(self):
        from captum_classfilters.identify import Evidence

        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(400) % 100
        evidence = Evidence(
            torch.randn(400, 20, generator=generator), labels, tuple(map(str, range(100)))
        )
        found = evidence.stability(num_filters=5, splits=4)
        error = float(found.overlap.std() / 10)
        assert float(found.overlap.mean()) == pytest.approx(found.chance, abs=4 * error)

    def test_bad_input(self):
        evidence = collect_evidence(LayerFilterContribution(deep(), "stage2"), batches(4), **QUIET)
        with pytest.raises(ValueError, match="fewer than splits=3"):
            evidence.stability(num_filters=1, splits=3)
        with pytest.raises(ValueError, match="splits=1"):
            evidence.stability(num_filters=1, splits=1)
        with pytest.raises(ValueError, match="repetitions=1"):
            evidence.bootstrap_standard_errors(1)


class TestRandomWeights:
    def test_p_values_by_hand(self):
        from captum_classfilters.identify.random_weights import _p_values

        counts = torch.tensor([4, 0])
        missing = [float("nan")] * 2
        table = ClassFilters(torch.tensor([[3.0, 1.0], missing]), counts)  # shares 0.75, 0.25
        random = [
            ClassFilters(torch.tensor([[6.0, 2.0], missing]), counts),  # 0.75, 0.25
            ClassFilters(torch.tensor([[-1.0, 1.0], missing]), counts),  # -0.5, 0.5
        ]
        found = _p_values(table, random)
        assert found[0].tolist() == pytest.approx([2 / 5, 4 / 5])
        assert found[1].isnan().all()

    def test_a_random_network_against_random_networks(self):
        """A model that is itself random: p-values are uniform up to dependence within rows."""
        model, data = deep(seed=5), batches(60)
        null = random_weights_null(
            LayerFilterFrequency(model, "stage2", top_k=2), data, repetitions=4, **QUIET
        )
        assert len(null.random) == 4
        p_values = known(null.class_filters.p_values)
        assert ((p_values >= 1 / 25) & (p_values <= 1)).all()
        assert null.class_filters.provenance["significance"]["null"] == "random weights"
        assert null.chance == pytest.approx(2 / 6)
        different = {str(table.scores.tolist()) for table in null.random}
        assert len(different) == 4
        again = random_weights_null(
            LayerFilterFrequency(model, "stage2", top_k=2), data, repetitions=4, **QUIET
        )
        assert torch.equal(known(again.class_filters.p_values), p_values)

    def test_bad_input(self):
        class Own(nn.Module):
            def __init__(self):
                super().__init__()
                self.scale = nn.Parameter(torch.ones(1))

            def forward(self, x):
                return x * self.scale

        with pytest.raises(ValueError, match=r"'1', an Own, has parameters"):
            reinitialize(nn.Sequential(nn.Conv2d(2, 2, 1), Own()))
        method = LayerFilterFrequency(pool_linear(), "1", top_k=2)
        with pytest.raises(ValueError, match="repetitions=0"):
            random_weights_null(method, batches(), repetitions=0)
        with pytest.raises(ValueError, match="read only once"):
            random_weights_null(method, iter(batches()))


def test_evidence_in_double_precision_stays_in_it():
    """Scores around a million with a spread of a hundredth: shifted, they mean the same."""

    class Offset(nn.Module):
        def __init__(self, offset):
            super().__init__()
            torch.manual_seed(0)
            self.keep, self.head, self.offset = nn.Identity(), nn.Linear(4, 2), offset

        def forward(self, x):
            return self.head(self.keep(x) - self.offset)

    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 2
    x = 0.01 * torch.randn(60, 4, generator=generator, dtype=torch.float64)
    x[labels == 1, 0] += 0.02
    tables, errors = [], []
    for offset in (0.0, 1e6):
        model = Offset(offset).double().eval()
        method = LayerActivation(model, model.keep)
        data = [(x + offset, labels)]
        null = LabelPermutation(199)
        tables.append(identify_class_filters(method, data, significance=null, **QUIET).p_values)
        errors.append(collect_evidence(method, data, **QUIET).class_filters().standard_errors)
    assert torch.allclose(tables[0], tables[1], atol=0.12)  # the order of the images is another
    assert torch.allclose(errors[0], errors[1], rtol=1e-4)
