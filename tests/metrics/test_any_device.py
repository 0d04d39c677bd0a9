"""Every metric with the model on an accelerator, the data there or on the CPU: the CPU's numbers."""

import dataclasses

import numpy as np
import pytest
import torch
from captum.attr import (
    IntegratedGradients,
    LayerGradCam,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    Saliency,
)
from captum.metrics import sensitivity_max
from torch.utils._pytree import tree_map_only

from captum_classfilters import (
    ClassFilters,
    FilterGate,
    LayerFilterAblation,
    LayerFilterContribution,
    LayerFilterFrequency,
)
from captum_classfilters.metrics import (
    assign_filters,
    boxes_to_masks,
    cascading_randomization,
    choose_threshold,
    class_curves,
    class_means,
    class_selectivity_index,
    collateral_damage,
    compare_attributions,
    compare_methods,
    explanation_for_sensitivity,
    filter_curves,
    filter_infidelity,
    filter_localization,
    filter_max_sensitivity,
    localization,
    mutual_information_bound,
    mutual_information_filters,
    mutual_information_matrix,
    quantus_explanation,
    remove_and_retrain,
    selectivity_filters,
)
from tests.models import QUIET, batches, deep, images, made_in_inference_mode
from tests.pretend_device import pretend

LABELS = torch.arange(8) % 3


def table(scale=1.0):
    scores = scale * torch.tensor([[4.0, 3, 2, 1], [1.0, 4, 3, 2], [2.0, 1, 4, 3]])
    return ClassFilters(scores, torch.ones(3), layer="stage1").select(2)


def scores(number=4):
    return torch.randn(8, number, generator=torch.Generator().manual_seed(3))


def maps():
    return torch.rand(8, 4, 6, 6, generator=torch.Generator().manual_seed(3))


def boxes(place):
    return place(torch.tensor([[1, 2, 4, 5]]).expand(8, 4))


def features():
    return torch.rand(60, 4, generator=torch.Generator().manual_seed(3))


def classes():
    return torch.arange(60) * 7 % 3


def attributions(model):
    gate = FilterGate(model, "stage1")
    return {
        "saliency": Saliency(model),
        "cam": LayerGradCam(model, model.stage2),
        "contribution": LayerFilterContribution(model, "stage1"),
        "ablation": LayerFilterAblation(model, "stage1"),
        "gates": (IntegratedGradients(gate), {"n_steps": 3}),
    }


def methods(model):
    return {
        "votes": LayerFilterFrequency(model, "stage1", top_k=2),
        "logits": LayerFilterContribution(model, "stage1"),
        "captum": LayerGradientXActivation(model, model.stage1),
    }


# From a model and a function that puts data where they are to be: what is to be the same everywhere.
WITHOUT_GRADIENTS = {
    "class_curves": lambda m, p: class_curves(
        m, "stage1", {"a": table(), "b": table(-1)}, p(batches()), **QUIET
    ),
    "class_curves of probabilities": lambda m, p: class_curves(
        m, "stage2", table6(), p(batches()), measure="probability", **QUIET
    ),
    "collateral_damage": lambda m, p: collateral_damage(
        m, "stage1", table(), p(batches()), **QUIET
    ),
    "filter_curves": lambda m, p: filter_curves(
        m, "stage1", p(images()), {"a": p(scores())}, target=p(LABELS)
    ),
    "filter_curves of logits": lambda m, p: filter_curves(
        m, "stage2", p(images()), scores(6), target=1, score="logit", replacement="mean"
    ),
    "filter_infidelity": lambda m, p: filter_infidelity(
        m, "stage1", p(images()), p(scores()), target=p(LABELS), each_filter=True
    ),
    "compare_methods": lambda m, p: without_seconds(
        compare_methods(
            m,
            "stage1",
            p(batches()),
            p(batches(20)),
            methods={"t": table()},
            num_filters=2,
            **QUIET,
        )
    ),
    "localization": lambda m, p: localization(p(maps()[:, 0]), boxes(p), labels=p(LABELS)),
    "choose_threshold": lambda m, p: choose_threshold(p(maps()), boxes(p)),
    "boxes_to_masks": lambda m, p: boxes_to_masks(boxes(p), (6, 6)),
    "filter_localization": lambda m, p: filter_localization(
        p(maps()), boxes(p), p(LABELS), size=(6, 6)
    ),
    "filter_localization of known classes": lambda m, p: filter_localization(
        p(maps()),
        boxes(p),
        p(LABELS),
        size=(6, 6),
        thresholds=p(torch.full((4,), 0.5)),
        filter_class=p(torch.tensor([0, 1, 2, 0])),
    ),
    "assign_filters": lambda m, p: assign_filters(p(table().scores)),
    "mutual_information_matrix": lambda m, p: mutual_information_matrix(
        p(features()), p(classes())
    ),
    "mutual_information_filters": lambda m, p: (
        mutual_information_filters(p(features()), p(classes())).scores
    ),
    "mutual_information_bound": lambda m, p: mutual_information_bound(p(classes())),
    "selectivity_filters": lambda m, p: selectivity_filters(p(features()), p(classes())).scores,
    "class_means": lambda m, p: class_means(p(features()), p(classes())),
    "class_selectivity_index": lambda m, p: class_selectivity_index(p(features()[:3])),
}
WITH_GRADIENTS = {
    "standard methods": lambda m, p: without_seconds(
        compare_methods(m, "stage1", p(batches()), p(batches(20)), num_filters=2, **QUIET)
    ),
    "compare_methods": lambda m, p: without_seconds(
        compare_methods(
            m, "stage1", p(batches()), p(batches(20)), methods=methods(m), num_filters=2, **QUIET
        )
    ),
    "compare_attributions": lambda m, p: measured(
        compare_attributions(
            m,
            attributions(m),
            p(images()),
            p(LABELS),
            boxes=boxes(p),
            batch_size=3,
            baseline=p(torch.tensor(0.1)),
            **QUIET,
        )
    ),
    "filter_max_sensitivity": lambda m, p: filter_max_sensitivity(
        LayerFilterContribution(m, "stage1"), p(images()), target=p(LABELS), n_perturb_samples=3
    ),
    "filter_max_sensitivity to gates": lambda m, p: filter_max_sensitivity(
        LayerFilterContribution(m, "stage1"), p(images()), target=1, space="gates"
    ),
    "filter_max_sensitivity of Captum's method": lambda m, p: filter_max_sensitivity(
        LayerIntegratedGradients(m, m.stage1),
        p(images()),
        target=p(LABELS),
        n_perturb_samples=2,
        baselines=p(torch.zeros_like(images())),
    ),
    "explanation_for_sensitivity": lambda m, p: sensitivity_max(
        explanation_for_sensitivity(LayerGradCam(m, m.stage2)),
        images().to(device_of(m)),
        target=1,
        n_perturb_samples=2,
    ),
    "cascading_randomization": lambda m, p: cascading_randomization(
        m, lambda twin: LayerFilterContribution(twin, "stage1"), p(images()), target=p(LABELS)
    ),
    "cascading_randomization of Captum's method": lambda m, p: cascading_randomization(
        m,
        lambda twin: LayerIntegratedGradients(twin, twin.stage1),
        p(images()),
        target=p(LABELS),
        baselines=p(torch.zeros_like(images())),
    ),
    "remove_and_retrain": lambda m, p: remove_and_retrain(
        m, "stage1", table(), p(batches()), p(batches(20)), num_filters=[2], epochs=1,
        repetitions=2, **QUIET,
    ),
    "quantus_explanation": lambda m, p: torch.from_numpy(
        quantus_explanation(lambda net: LayerFilterContribution(net, "stage1"))(
            m, images().numpy(), np.arange(8) % 3
        )
    ),
}  # fmt: skip


def table6():
    drawn = torch.randn(3, 6, generator=torch.Generator().manual_seed(5))
    return ClassFilters(drawn, torch.ones(3), layer="stage2")


def device_of(model):
    return next(model.parameters()).device


def without_seconds(comparison):
    return dataclasses.replace(comparison, seconds={})


def measured(comparison):
    return [
        table.values
        for table in [comparison.pixels, *comparison.filters.values()]
        if table is not None
    ]


def tensors_of(value):
    """All tensors of a result, in order; floats as tensors."""
    if dataclasses.is_dataclass(value):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    if isinstance(value, ClassFilters):
        return [value.scores, value.selected.double()]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for part in value for tensor in tensors_of(part)]
    if isinstance(value, float):
        return [torch.tensor(value)]
    return [value] if isinstance(value, torch.Tensor) else []


def same_everywhere(kind, call, at_hand):
    expected = tensors_of(call(deep(), lambda data: data))
    with pretend(kind) as device:

        def place(data):
            if at_hand:
                return data
            if isinstance(data, list):
                return [(x.to(device), y.to(device)) for x, y in data]
            return data.to(device)

        found = tensors_of(call(deep().to(device), place))
        assert found
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours.cpu(), theirs, equal_nan=True, rtol=1e-3, atol=1e-5)
    return found


@pytest.mark.parametrize("at_hand", [True, False], ids=["data on the CPU", "data there"])
@pytest.mark.parametrize("name", WITHOUT_GRADIENTS)
def test_on_an_accelerator(name, at_hand):
    found = same_everywhere("cuda", WITHOUT_GRADIENTS[name], at_hand)
    if name != "class_selectivity_index":  # part of a loss
        assert all(tensor.device.type == "cpu" for tensor in found)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("at_hand", [True, False], ids=["data on the CPU", "data there"])
@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_on_an_accelerator_with_gradients(name, at_hand):
    found = same_everywhere("meta", WITH_GRADIENTS[name], at_hand)
    if name != "explanation_for_sensitivity":  # Captum's own metric
        assert all(tensor.device.type == "cpu" for tensor in found)


def of_gradients(data):
    """Images, and all else of floats, that require gradients."""
    wanted = lambda tensor: tensor.clone().requires_grad_(tensor.is_floating_point())  # noqa: E731
    return tree_map_only(torch.Tensor, wanted, data)


def of_small_numbers(dtype):
    """Classes and filters, and all else of whole numbers, in another type."""
    small = lambda tensor: tensor.to(dtype) if tensor.dtype == torch.int64 else tensor  # noqa: E731
    return lambda data: tree_map_only(torch.Tensor, small, data)


KINDS_OF_DATA = {
    "made in inference mode": made_in_inference_mode,
    "that require gradients": of_gradients,
    "of bytes": of_small_numbers(torch.uint8),
    "of 16 bits": of_small_numbers(torch.int16),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS_OF_DATA)
@pytest.mark.parametrize("name", WITHOUT_GRADIENTS | WITH_GRADIENTS)
def test_data_of_any_kind_give_the_same(name, kind):
    call = (WITHOUT_GRADIENTS | WITH_GRADIENTS)[name]
    expected = tensors_of(call(deep(), lambda data: data))
    found = tensors_of(call(deep(), KINDS_OF_DATA[kind]))
    assert len(found) == len(expected) > 0
    for own, plain in zip(found, expected, strict=True):
        assert torch.equal(own.nan_to_num(), plain.nan_to_num())
