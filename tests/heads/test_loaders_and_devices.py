"""Every entry that reads data takes the same loaders, on any device, and waits for none."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from captum_classfilters import accuracy_curve, fine_tune, refit_head, select_by_accuracy
from captum_classfilters.heads import (
    compare_heads,
    decompose,
    layer_sweep,
    model_essentiality,
    remove_class,
)
from captum_classfilters.metrics import evaluate_classifier
from tests.heads.common import QUIET, Net, data_for, table_for, temperature
from tests.models import joined
from tests.pretend_device import host_reads, pretend


@torch.inference_mode(False)
def twin(model):
    return copy.deepcopy(model)


# Each gives numbers that can be compared, and leaves the model's own weights alone.
ENTRIES = {
    "evaluate_classifier": lambda m, data, **o: evaluate_classifier(m, data, **o).recall.tolist(),
    "accuracy_curve": lambda m, data, **o: accuracy_curve(
        m, {"t": table_for()}, data, repetitions=1, **o
    ).accuracy["t"],
    "select_by_accuracy": lambda m, data, **o: select_by_accuracy(
        m, table_for(), data, keep=0.3, **o
    ).selected.tolist(),
    "model_essentiality": lambda m, data, **o: model_essentiality(
        m, table_for(), data, replacement="mean", repetitions=1, **o
    ).at_set.tolist(),
    "refit_head": lambda m, data, **o: refit_head(twin(m), data, max_iterations=3, **o)[:1],
    "layer_sweep": lambda m, data, **o: [row.psi for row in layer_sweep(m, ["relu"], data, **o)],
    "fine_tune": lambda m, data, **o: [
        fine_tune(twin(m), data, [joined(data_for(Net()))], **o)[0].validation_accuracy
    ],
}


@pytest.fixture(scope="module")
def expected():
    return {name: entry(Net(), data_for(Net()), **QUIET) for name, entry in ENTRIES.items()}


LOADERS = {
    "more members": lambda x, y: [(x[:23], y[:23], "a"), (x[23:], y[23:], "b")],
    "a tuple of inputs": lambda x, y: [((x,), y)],
    "labels as a list": lambda x, y: [(x, y.tolist())],
    "an empty first batch": lambda x, y: [(x[:0], y[:0]), (x, y)],
    "a mapping": lambda x, y: [{"pixel_values": x, "labels": y}],
}


@pytest.mark.parametrize("name", ENTRIES)
class TestLoaders:
    @pytest.mark.parametrize("kind", LOADERS)
    def test_of_all_kinds(self, name, kind, expected):
        loader = LOADERS[kind](*joined(data_for(Net())))
        model = Net().train()
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                found = ENTRIES[name](model, loader, **QUIET)
            assert torch.allclose(
                torch.tensor(found).double(), torch.tensor(expected[name]).double(), atol=1e-5
            )
        assert model.training

    def test_of_a_kind_of_their_own(self, name, expected):
        x, y = joined(data_for(Net()))
        loader: list[Any] = [{"picture": x, "kind": y, "weight": torch.ones(len(x))}]
        if name == "fine_tune":  # one function unpacks both loaders
            loader = [(x, y)]
            options: dict[str, Any] = {"unpack": lambda batch: (batch[0], batch[1])}
        else:
            options = {"unpack": lambda batch: (batch["picture"], batch["kind"])}
            with pytest.raises(ValueError, match="Batch 0 is a mapping"):
                ENTRIES[name](Net(), loader, **QUIET)
        found = ENTRIES[name](Net(), loader, **options, **QUIET)
        assert torch.allclose(
            torch.tensor(found).double(), torch.tensor(expected[name]).double(), atol=1e-5
        )

    def test_that_are_refused(self, name):
        x, y = joined(data_for(Net()))
        used = iter([(x, y)])
        next(used)
        refused = {
            "empty": used,
            "0 to 2": [(x, y + 1)],
            r"whole numbers|one class for each": [(x, y.float())],
        }
        if name == "layer_sweep":  # takes any number of classes
            del refused["0 to 2"]
        for message, loader in refused.items():
            with pytest.raises(ValueError, match=message):
                ENTRIES[name](Net(), loader, **QUIET)


@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.parametrize("after", [None, temperature])
@pytest.mark.parametrize("batches_on_device", [False, True])
def test_a_model_on_an_accelerator(name, after, batches_on_device):
    plain, data = Net(after=after), data_for(Net())
    if name == "refit_head" and after is not None:
        with pretend("meta") as device, pytest.raises(ValueError, match="changes the output"):
            refit_head(plain.to(device), data, **QUIET)
        return
    expected = ENTRIES[name](plain, data, **QUIET)
    reads = []
    with pretend("meta" if name in ("refit_head", "fine_tune") else "cuda") as device:
        model = Net(after=after)
        model.load_state_dict(plain.state_dict())
        model.to(device)
        for times in (1, 3):
            loader = data * times
            if batches_on_device:
                loader = [(x.to(device), y.to(device)) for x, y in loader]
            host_reads.clear()
            found = ENTRIES[name](model, loader, **QUIET)
            reads.append(len(host_reads))
            if times == 1:
                assert torch.allclose(
                    torch.tensor(found).double(), torch.tensor(expected).double(), atol=1e-5
                )
    if name != "refit_head":  # whose fit looks at its objective
        assert reads[1] - reads[0] <= 4  # for ten more batches, in two passes at most


def test_heads_on_an_accelerator():
    table, plain, x = table_for(), Net(), data_for(Net())[0][0]
    expected = decompose(plain, table, dropped_means=torch.ones(6))(x)
    with pretend("cuda") as device:
        model = Net().to(device)
        for examples in (None, x, x.to(device)):
            smaller = decompose(model, table, dropped_means=torch.ones(6), example_inputs=examples)
            assert torch.allclose(smaller(x.to(device)).cpu(), expected, atol=1e-6)
        assert compare_heads(model, smaller, x, repetitions=1).after.head_multiply_adds == 6
        removed = remove_class(smaller.get_submodule("fc"), 1)
        features = model.features(x.to(device))
        assert torch.allclose(removed.head(features).cpu(), expected[:, [0, 2]], atol=1e-6)
        assert removed.unused_features.device.type == "cpu"
        assert isinstance(remove_class(model.fc, 1).head, nn.Linear)


def test_a_model_that_takes_only_batches_of_its_own_size():
    class Rigid(Net):
        def forward(self, x):
            return super().forward(x.reshape(5, 2, 6, 6))

    data = data_for(Net())[:4]
    for name, entry in ENTRIES.items():
        if name == "fine_tune":
            continue
        assert entry(Rigid(), data, **QUIET) == entry(Net(), data, **QUIET), name
