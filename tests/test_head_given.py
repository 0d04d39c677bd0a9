"""Where a head may be named it may be given: what a model holds, as by ``model.fc``."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_classfilters import ClassFilters, LayerFilterContribution
from captum_classfilters._core.equality import same
from captum_classfilters.answers import (
    ClassFilterOOD,
    audit_forgetting,
    build_specialist,
    find_shortcuts,
    forget_class,
    repair_confusion,
)
from captum_classfilters.heads import (
    accuracy_curve,
    decompose,
    decomposed_head,
    model_essentiality,
    refit_head,
    select_by_accuracy,
)
from captum_classfilters.pruning import specialize
from tests.models import QUIET
from tests.test_arguments import public_objects

IMAGES = torch.rand(90, 3, 4, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(90) % 3


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    ).eval()  # fmt: skip


def data() -> list[tuple[Tensor, Tensor]]:
    return [(IMAGES, LABELS)]


def table(net: nn.Module) -> ClassFilters:
    return LayerFilterContribution(net, "1").identify(data(), num_filters=3, **QUIET)


def scores(net: nn.Module) -> Tensor:
    return net(IMAGES).detach()


def refitted(net: nn.Module, head: Any) -> object:
    losses = refit_head(net, data(), head=head, max_iterations=5, **QUIET)
    return losses, scores(net)


CALLS: dict[str, Callable[[nn.Module, Any], object]] = {
    "ClassFilterOOD": lambda m, h: (
        ClassFilterOOD(m, table(m), head=h).fit(data(), **QUIET).predict(IMAGES)
    ),
    "accuracy_curve": lambda m, h: accuracy_curve(m, table(m), data(), head=h, **QUIET),
    "build_specialist": lambda m, h: scores(
        build_specialist(m, [0, 1], data(), budget=0.8, head=h, repetitions=0, **QUIET).model
    ),
    "decompose": lambda m, h: scores(decompose(m, table(m), head=h)),
    "decomposed_head": lambda m, h: decomposed_head(m, table(m), head=h)[0],
    "find_shortcuts": lambda m, h: (
        find_shortcuts(m, data(), lambda x: x + 1, head=h, permutations=999, **QUIET).filter_change
    ),
    "forget_class": lambda m, h: scores(forget_class(m, data(), 1, head=h, **QUIET)),
    "model_essentiality": lambda m, h: model_essentiality(m, table(m), data(), head=h, **QUIET),
    "refit_head": refitted,
    "repair_confusion": lambda m, h: (
        repair_confusion(m, data(), [(IMAGES + 0.1, LABELS)], *cell(m), head=h, **QUIET).removed
    ),
    "select_by_accuracy": lambda m, h: (
        select_by_accuracy(m, table(m), data(), head=h, **QUIET).selected
    ),
    "specialize": lambda m, h: scores(specialize(m, table(m), [0, 1], IMAGES, head=h).model),
}


def cell(net: nn.Module) -> tuple[int, int]:
    """A class, and another that some of its images are taken for."""
    wrong = (scores(net).argmax(1) != LABELS).nonzero()[0, 0]
    return int(LABELS[wrong]), int(scores(net).argmax(1)[wrong])


def test_all_are_here():
    found = set()
    for _, public in public_objects():
        parameters = inspect.signature(public).parameters
        if parameters.get("head") and parameters["head"].annotation == nn.Module | str | None:
            found.add(public.__name__)
    assert found == CALLS.keys()


@pytest.mark.parametrize("call", CALLS)
def test_the_module_is_as_good_as_its_name(call):
    named, given = model(), model()
    assert same(CALLS[call](named, "4"), CALLS[call](given, given[4]))


@pytest.mark.parametrize("call", CALLS)
def test_what_is_no_layer_of_the_model_is_refused(call):
    net = model()
    with pytest.raises(
        ValueError, match="The given Linear is not a layer of this Sequential; pass"
    ):
        CALLS[call](net, nn.Linear(8, 3))
    with pytest.raises(ValueError, match="given by itself or by its dotted name, not by an int"):
        CALLS[call](net, 4)


@pytest.mark.parametrize("given", [None, "", "0"])
def test_a_model_that_is_the_head_is_wrapped_as_the_message_says(given):
    features, layer = torch.rand(60, 12), nn.Linear(12, 4)
    data = [(features, torch.arange(60) % 4)]
    with pytest.raises(
        ValueError, match=r"itself a Linear, .* wrap it: torch.nn.Sequential\(model"
    ):
        forget_class(layer, data, 0, head=given, **QUIET)
    forgotten = forget_class(nn.Sequential(layer), data, 0, head="0", **QUIET)
    assert [name for name, _ in forgotten.named_children()] == ["0"]
    assert "0.forget.weight" in forgotten.state_dict()


def test_several_models_have_no_one_head():
    net = model()
    audited = {"a": net, "b": model()}
    with pytest.raises(ValueError, match="head is a Linear; expected its dotted name"):
        audit_forgetting(audited, 1, data(), data(), head=net[4], **QUIET)  # type: ignore[arg-type]
