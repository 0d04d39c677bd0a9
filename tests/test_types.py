"""What type checkers are told of results: mypy reads this file, and pytest runs it."""

import torch
from captum.attr import LayerGradCam
from torch import Tensor, nn
from typing_extensions import assert_type

from captum_classfilters import (
    ClassFilters,
    LayerFilterAblation,
    LayerFilterContribution,
    LayerFilterFrequency,
    identify_class_filters,
)
from captum_classfilters.identify import collect_evidence
from captum_classfilters.identify.accuracy_reduction import AccuracyReduction, MetricReduction
from captum_classfilters.identify.evidence import Evidence
from captum_classfilters.layers import FilterLayer, list_filter_layers


def small() -> tuple[nn.Sequential, list[tuple[Tensor, Tensor]]]:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    return model, [(torch.rand(4, 3, 6, 6), torch.tensor([0, 1, 1, 0]))]


def test_tables_come_in_the_form_of_the_methods() -> None:
    model, data = small()
    one = LayerFilterContribution(model, "1")
    table = identify_class_filters(one, data, num_filters=2, show_progress=False)
    assert_type(table, ClassFilters)
    several = identify_class_filters(
        [one, LayerFilterFrequency(model, "1", top_k=2)], data, show_progress=False
    )
    assert_type(several, list[ClassFilters])
    named = identify_class_filters(
        {"ours": one, "Captum's": LayerGradCam(model, model[1])},
        data,
        attribute_kwargs={"Captum's": {"attr_dim_summation": False}},
        show_progress=False,
    )
    assert_type(named, dict[str, ClassFilters])
    assert isinstance(table, ClassFilters)
    assert [type(part) for part in several] == [ClassFilters] * 2
    assert sorted(named) == ["Captum's", "ours"]


def test_evidence_comes_in_the_form_of_the_methods() -> None:
    model, data = small()
    method = LayerFilterContribution(model, "1")
    one = collect_evidence(method, data, show_progress=False)
    assert_type(one, Evidence)
    assert_type(collect_evidence([method], data, show_progress=False), list[Evidence])
    assert_type(collect_evidence({"a": method}, data, show_progress=False), dict[str, Evidence])
    assert isinstance(one, Evidence)


def test_a_method_identifies_a_table_or_what_its_metric_measures() -> None:
    model, data = small()
    assert_type(
        LayerFilterFrequency(model, "1", top_k=2).identify(data, show_progress=False), ClassFilters
    )
    ablation = LayerFilterAblation(model, "1")
    table = ablation.identify(data, num_filters=2, show_progress=False)
    accuracy = ablation.identify(data, metric="accuracy", show_progress=False)

    def share_right(outputs: Tensor, labels: Tensor) -> float:
        return float((outputs.argmax(1) == labels).float().mean())

    measured = ablation.identify(data, metric=share_right, show_progress=False)
    assert_type(table, ClassFilters)
    assert_type(accuracy, AccuracyReduction)
    assert_type(measured, MetricReduction)
    assert isinstance(table, ClassFilters)
    assert isinstance(accuracy, AccuracyReduction)
    assert isinstance(measured, MetricReduction)


def test_lists_of_layers_are_read_by_place_name_and_slice() -> None:
    model, data = small()
    layers = list_filter_layers(model, data[0][0])
    assert_type(layers[0], FilterLayer)
    assert_type(layers["1"], FilterLayer)
    assert_type(layers[:2], tuple[FilterLayer, ...])
    assert layers["1"] is layers[1]
