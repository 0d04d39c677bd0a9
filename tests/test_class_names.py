"""Names of classes: in what forms they may be given, and where else they come from."""

from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

from captum_classfilters import ClassFilters, LayerFilterAblation, LayerFilterContribution
from captum_classfilters._core.batches import dataset_names
from captum_classfilters.answers import (
    audit_forgetting,
    build_specialist,
    find_shortcuts,
    forget_class,
    repair_confusion,
)
from captum_classfilters.identify import collect_evidence, confusion_filters, contrast_classes
from captum_classfilters.spectral import class_hypergraph
from captum_classfilters.visualize import plot_gate_and_weight
from tests.models import QUIET, batches, images, pool_linear

NAMES = ["cat", "dog", "eel"]
FORMS: dict[str, Any] = {
    "list": lambda: NAMES,
    "array": lambda: np.array(NAMES),
    "generator": lambda: (name for name in NAMES),
    "by index": lambda: {2: "eel", 0: "cat", 1: "dog"},
    "as JSON has it": lambda: {"2": "eel", "0": "cat", "1": "dog"},
    "keys": lambda: dict.fromkeys(NAMES).keys(),
}
REFUSED: list[tuple[Any, str]] = [
    ("abc", "class_names='abc' is one name"),
    ({"cat", "dog", "eel"}, "class_names is a set; expected a sequence of names in the classes' order"),
    (3, "class_names is an int"),
    ({"cat": 0, "dog": 1, "eel": 2}, r"the keys \['cat', 'dog', 'eel'\]; expected 0 to 2, as in"),
    ({1: "cat", 2: "dog", 3: "eel"}, r"the keys \[1, 2, 3\]; expected 0 to 2"),
    (["cat", "dog"], "class_names has 2 names; expected 3"),
]  # fmt: skip


def table(names):
    return ClassFilters(torch.ones(3, 2), torch.ones(3), class_names=names).class_names


def contributions(names):
    method = LayerFilterContribution(pool_linear(), "1")
    options = {"class_names": names, "num_filters": 1, **QUIET}
    return method.identify(batches(), **options).class_names


def by_accuracy(names):
    method = LayerFilterAblation(pool_linear(), "1")
    return method.identify(batches(), metric="accuracy", class_names=names, **QUIET).class_names


def evidence(names):
    method = LayerFilterContribution(pool_linear(), "1")
    return collect_evidence(method, batches(), class_names=names, **QUIET).class_names


def contrast(names):
    method = LayerFilterContribution(pool_linear(), "1")
    found = contrast_classes(method, batches(), 0, 2, class_names=names, **QUIET)
    return found.favored, "dog", found.against


def confusion(names):
    method = LayerFilterContribution(pool_linear(), "1")
    return confusion_filters(method, batches(), class_names=names, **QUIET).class_names


def hypergraph(names):
    return class_hypergraph(torch.eye(3), torch.arange(3), class_names=names).vertices


def picture(names):
    figure, axes = plot_gate_and_weight(torch.eye(3), torch.eye(3), class_names=names)
    shown = tuple(label.get_text() for label in axes[0].get_yticklabels())
    plt.close(figure)
    return shown


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "call",
    [table, contributions, by_accuracy, evidence, contrast, confusion, hypergraph, picture],
)
def test_forms_that_say_the_order(call, form):
    assert call(FORMS[form]()) == tuple(NAMES)


@pytest.mark.parametrize(("names", "message"), REFUSED)
@pytest.mark.parametrize("call", [table, contributions, evidence, contrast, confusion, picture])
def test_what_says_no_order_or_is_not_as_many_is_refused(call, names, message):
    with pytest.raises(ValueError, match=message):
        call(names)


@pytest.mark.parametrize(("names", "message"), REFUSED)
def test_answers_refuse_them_too(names, message):
    torch.manual_seed(0)
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    data = [(torch.rand(30, 4, 2, 2), torch.arange(30) % 3)]
    options: dict[str, Any] = {"class_names": names, **QUIET}
    for call in (
        lambda: find_shortcuts(model, data, lambda x: x + 1, **options),
        lambda: repair_confusion(model, data, data, 0, 1, **options),
        lambda: build_specialist(model, [0, 1], data, **options),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_class_to_forget_is_given_by_a_name():
    torch.manual_seed(0)
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    x = torch.rand(30, 4, 2, 2)
    data = [(x, torch.arange(30) % 3)]
    named = forget_class(model, data, "dog", class_names=iter(NAMES), **QUIET)
    assert torch.equal(named(x), forget_class(model, data, 1, **QUIET)(x))
    models = {"original": model, "forgotten": named}
    audits = [
        audit_forgetting(models, class_, data, data, class_names=names, **QUIET)
        for class_, names in (("dog", iter(NAMES)), (1, None))
    ]
    assert audits[0] == audits[1]
    with pytest.raises(ValueError, match="'dog'"):
        forget_class(model, data, "dog", **QUIET)
    with pytest.raises(ValueError, match="class_names has 2 names; expected 3"):
        audit_forgetting(models, 1, data, data, class_names=NAMES[:2], **QUIET)


class Named(TensorDataset):
    """A data set that knows its classes, as torchvision's."""

    def __init__(self, classes):
        super().__init__(images(6), torch.arange(6) % 3)
        self.classes = classes


def test_a_data_set_is_looked_for_in_its_parts():
    def found(dataset):
        return dataset_names(DataLoader(dataset))

    own, other = Named(NAMES), Named(["a", "b", "c"])
    assert found(own) == found(Subset(Subset(own, [0, 3]), [1])) == NAMES
    assert found(ConcatDataset([own, Subset(Named(NAMES), [2])])) == NAMES
    assert found(ConcatDataset([own, other])) is None
    assert found(ConcatDataset([own, TensorDataset(torch.rand(3, 3))])) is None
    assert found(Subset(TensorDataset(torch.rand(3, 3)), [0])) is None


def test_names_that_only_the_data_set_knows_may_be_more():
    """A model for some of a data set's classes, say; what the user gives is meant."""
    method = LayerFilterContribution(pool_linear(), "1")
    loader = DataLoader(Named([*NAMES, "fox"]), batch_size=3)
    assert confusion_filters(method, loader, **QUIET).class_names == ("0", "1", "2")
