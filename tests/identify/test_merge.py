"""Tables of disjoint shares, joined, are the table of one pass over all images."""

import numpy as np
import pytest
import torch
from captum.attr import LayerActivation, LayerConductance, LayerGradientXActivation

from captum_classfilters import (
    ClassFilters,
    LayerFilterAblation,
    LayerFilterContribution,
    LayerFilterFrequency,
    identify_class_filters,
)
from captum_classfilters.identify import LabelPermutation
from tests.models import QUIET, batches, deep, joined, known, pool_linear


def methods(model):
    return {
        "votes": LayerFilterFrequency(model, "stage1", top_k=2),
        "head": LayerFilterContribution(model, "stage2"),
        "inside": LayerFilterContribution(model, "stage1"),
    }


def identified(data, model=None, **options):
    model = model or deep()
    return identify_class_filters(methods(model), data, num_filters=2, **QUIET, **options)


def shares(data, sizes):
    """Uneven parts of some images, one batch each."""
    x, y = joined(data)
    return [[pair] for pair in zip(x.split(sizes), y.split(sizes), strict=True)]


def assert_alike(merged, whole):
    assert torch.equal(merged.counts, whole.counts)
    assert torch.allclose(merged.scores, whole.scores, rtol=1e-12, atol=1e-14, equal_nan=True)
    errors = known(merged.standard_errors), known(whole.standard_errors)
    assert torch.allclose(*errors, rtol=1e-9, atol=1e-14, equal_nan=True)


@pytest.mark.parametrize("sizes", [[1, 22, 1], [7, 17], [1] * 24, [24]])
def test_uneven_shares_are_one_pass(sizes):
    whole = identified(batches())
    parts = [identified(share) for share in shares(batches(), sizes)]
    for name in whole:
        merged = ClassFilters.merge(*[part[name] for part in parts])
        # In float64 the order of additions matters a little; scores themselves are float32.
        assert torch.equal(merged.counts, whole[name].counts)
        assert torch.allclose(merged.scores, whole[name].scores, rtol=1e-6, atol=1e-8)
        errors = known(merged.standard_errors), known(whole[name].standard_errors)
        assert torch.allclose(*errors, rtol=1e-4, atol=1e-8)
        assert torch.equal(merged.selected, whole[name].selected)
        assert merged.provenance["num_images"] == 24
        if name == "votes":
            assert torch.equal(merged.scores, whole[name].scores)
            assert torch.equal(*errors)


def test_the_formula_on_numbers_far_from_zero():
    generator = torch.Generator().manual_seed(0)
    values = 1e6 + 0.01 * torch.randn(30, 4, generator=generator, dtype=torch.float64)

    def table(part):
        number = len(part)
        errors = part.std(0) / number**0.5 if number > 1 else torch.full((4,), torch.nan)
        return ClassFilters(
            part.mean(0)[None], torch.tensor([number]), standard_errors=errors[None]
        )

    merged = ClassFilters.merge(*map(table, values.split([1, 4, 25])))
    assert torch.allclose(merged.scores[0], values.mean(0), rtol=1e-15)
    assert torch.allclose(known(merged.standard_errors)[0], values.std(0) / 30**0.5, rtol=1e-6)


def test_classes_that_are_absent_from_shares():
    x, y = joined(batches())
    order = y.argsort(stable=True)  # a class after the other
    parts = [identified([(x[rows], y[rows])]) for rows in order.split([8, 3, 13])]
    whole = identified([(x[order], y[order])])
    assert (parts[0]["head"].counts == 0).any()
    for name in whole:
        assert torch.equal(
            ClassFilters.merge(*[part[name] for part in parts]).counts, whole[name].counts
        )
        assert torch.allclose(
            ClassFilters.merge(*[part[name] for part in parts]).scores,
            whole[name].scores,
            rtol=1e-6,
            atol=1e-8,
        )


def test_a_class_without_any_image_stays_without():
    x, y = joined(batches())
    kept = y != 1
    parts = [identified([(x[kept][i::2], y[kept][i::2])])["head"] for i in range(2)]
    merged = ClassFilters.merge(*parts)
    assert merged.classes_without_images == ["1"]
    assert bool(merged.scores[1].isnan().all())
    assert not bool(merged.selected[1].any())
    assert merged.selected[0].sum() == 2


def test_multi_hot_labels():
    x, _ = joined(batches())
    hot = (torch.rand(24, 3, generator=torch.Generator().manual_seed(3)) > 0.5).long()
    hot[0] = 0
    whole = identified([(x, hot)])
    parts = [identified([pair]) for pair in zip(x.split([5, 19]), hot.split([5, 19]), strict=True)]
    for name in whole:
        merged = ClassFilters.merge(*[part[name] for part in parts])
        assert torch.equal(merged.counts, hot.sum(0))
        assert torch.allclose(merged.scores, whole[name].scores, rtol=1e-6, atol=1e-8)


def test_merging_in_two_steps_is_merging_at_once():
    parts = [identified(share)["head"] for share in shares(batches(), [5, 8, 11])]
    at_once = ClassFilters.merge(*parts)
    in_steps = ClassFilters.merge(ClassFilters.merge(*parts[:2]), parts[2])
    assert_alike(in_steps, at_once)
    assert [share["num_images"] for share in in_steps.provenance["merged"]] == [5, 8, 11]
    assert in_steps.provenance["num_images"] == 24
    assert parts[0].merge(parts[1]).counts.sum() == 13  # as a method, the table itself is one


def test_merged_tables_survive_a_file(tmp_path):
    parts = [identified(share)["head"] for share in shares(batches(), [5, 19])]
    merged = ClassFilters.merge(*parts)
    merged.save(tmp_path / "table")
    assert ClassFilters.load(tmp_path / "table") == merged


@pytest.mark.parametrize(
    ("method", "options", "others"),
    [
        (LayerActivation, {"reduction": "sum"}, {"reduction": "max"}),
        (LayerGradientXActivation, {}, {"multiply_by_inputs": False}),
        (
            LayerConductance,
            {"attribute_kwargs": {"n_steps": np.int64(2)}},
            {"attribute_kwargs": {"n_steps": np.int64(3)}},
        ),
        (
            LayerFilterAblation,
            {"attribute_kwargs": {"layer_baselines": torch.zeros(1, 4, 1, 1)}},
            {"attribute_kwargs": {"layer_baselines": torch.full((1, 4, 1, 1), 9.0)}},
        ),
        (
            LayerFilterAblation,
            {"attribute_kwargs": {"layer_baselines": np.zeros((1, 4, 1, 1))}},
            {"attribute_kwargs": {"layer_baselines": np.full((1, 4, 1, 1), 9.0)}},
        ),
    ],
)
def test_other_options_are_other_evidence(method, options, others, tmp_path):
    model = deep()

    def table(share, multiply_by_inputs=True, **options):
        bound = method(model, model.stage1)
        if not multiply_by_inputs:
            bound = method(model, model.stage1, multiply_by_inputs=False)
        return identify_class_filters(bound, share, num_filters=2, **QUIET, **options)

    left, right = shares(batches(), [12, 12])
    first = table(left, **options)
    assert ClassFilters.merge(first, table(right, **options)).counts.sum() == 24
    with pytest.raises(ValueError, match="do not measure the same thing: options"):
        ClassFilters.merge(first, table(right, **others))
    first.save(tmp_path / "table")
    assert ClassFilters.load(tmp_path / "table") == first


def test_what_differs_is_named():
    def first(model=None, method=None, **options):
        model = model or pool_linear()
        method = (method or LayerFilterContribution)(model, options.pop("layer", "1"))
        return method.identify(batches(), num_filters=2, **QUIET, **options)

    own = first()
    others = {
        "model_sha256": first(pool_linear(seed=1)),
        "layer": first(layer="0"),
        "method": first(method=LayerFilterFrequency),
        "number of filters": first(pool_linear(filters=7)),
        "number of classes": first(pool_linear(classes=4)),
        "class_names": first(class_names=["a", "b", "c"]),
        "target": first(target=1, num_classes=3),
        "standard errors": ClassFilters(
            own.scores, own.counts, layer=own.layer, method=own.method, provenance=own.provenance
        ),
    }
    for name, other in others.items():
        with pytest.raises(ValueError, match=f"do not measure the same thing.*{name}"):
            ClassFilters.merge(own, other)
    votes = [
        LayerFilterFrequency(pool_linear(), "1", top_k=k).identify(batches(), **QUIET)
        for k in (2, 3)
    ]
    with pytest.raises(ValueError, match=r"options is \{'top_k': 2\} in table 0"):
        ClassFilters.merge(*votes)


def test_refusals():
    table = LayerFilterContribution(pool_linear(), "1").identify(batches(), **QUIET)
    with pytest.raises(ValueError, match="no tables"):
        ClassFilters.merge()
    with pytest.raises(ValueError, match="one by one"):
        ClassFilters.merge([table, table])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="twice"):
        ClassFilters.merge(table, table)
    again = LayerFilterContribution(pool_linear(), "1").identify(batches(), **QUIET)
    with pytest.warns(UserWarning, match="same numbers"):
        ClassFilters.merge(table, again)


def test_p_values_are_left_out_with_a_warning():
    parts = [
        LayerFilterContribution(pool_linear(), "1").identify(
            share, significance=LabelPermutation(permutations=9), **QUIET
        )
        for share in shares(batches(), [12, 12])
    ]
    with pytest.warns(UserWarning, match="no p-values"):
        merged = ClassFilters.merge(*parts)
    assert merged.p_values is None
    assert merged.q_values is None
    assert "significance" not in merged.provenance


def test_another_selection_is_not_guessed():
    parts = [identified(share)["head"] for share in shares(batches(), [12, 12])]
    odd = torch.zeros_like(parts[0].selected)
    odd[:, 0] = True
    assert not bool(ClassFilters.merge(parts[0].with_selection(odd), parts[1]).selected.any())
