"""Records of pruning runs in files: kept whole, and refused if they cannot be meant."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from captum_classfilters.pruning.pruning_order import PruningOrder

SHA = "0123456789abcdef" * 4
ORDER = PruningOrder(
    {"conv": 6, "late": 4},
    [("conv", 3), ("late", 0), ("conv", 0)],
    [0.5, 0.75, 1.0, 0.0],
    [0.1, 0.2, 0.3, 0.4],
    [10, 8, 0],
    [10, 9, 8],
    SHA,
    {"schedule": "all_layers", "num_filters": {"conv": 1}, "ratio": None},
    {"conv": "replay", "late": "closed form, replay"},
    24,
    0.25,
    SHA,
    SHA,
)


@pytest.mark.parametrize(
    "order",
    [
        ORDER,
        PruningOrder({"conv": 1}),
        PruningOrder({"": 3, "ä\ud800": 2}, start_loss=float("inf")),
        replace(ORDER, weights={}),
        replace(ORDER, weights={"a.weight": torch.ones(2, 3).half().T, "n": torch.tensor(3)}),
        replace(ORDER, report_accuracy=[], report_images_sha256=None, model_sha256=None),
    ],
)
def test_round_trip(tmp_path, order):
    order.save(tmp_path / "order")
    found = PruningOrder.load(tmp_path / "order")
    assert found == order
    assert (found.weights is None) == (order.weights is None)
    for name, tensor in (order.weights or {}).items():
        assert found.weights is not None
        assert torch.equal(found.weights[name], tensor)
        assert found.weights[name].dtype == tensor.dtype
    assert all(isinstance(pair, tuple) for pair in found.removed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"filters": {}}, "filters are {}"),
        ({"filters": {"conv": 6, "late": 0}}, "filters must hold whole numbers of at least 1"),
        ({"filters": {"conv": 6.0, "late": 4}}, "filters must hold whole numbers"),
        (
            {"removed": [("conv", 3), ("late", 4), ("conv", 0)]},
            "The filter 4 of 'late'.*which has 4",
        ),
        ({"removed": [("conv", 3), ("late", -1), ("conv", 0)]}, "The filter -1 of 'late'"),
        ({"removed": [("conv", 3), ("late", True), ("conv", 0)]}, "The filter True of 'late'"),
        ({"removed": [("conv", 3), ("late", 0), ("conv", 3)]}, "3 of 'conv' was removed twice"),
        ({"removed": [("conv", 3), ("head", 0), ("conv", 0)]}, "'head' was removed from"),
        ({"removed": [("conv", 3), ("late", 0, 1), ("conv", 0)]}, "None was removed from"),
        ({"removed": [("conv", 3), ([], 0), ("conv", 0)]}, "was removed from"),
        ({"accuracy": [0.5, 0.75, 1.0]}, "accuracy has 3 values; expected 4"),
        ({"accuracy": [0.5, 0.75, 1.0, 1.5]}, r"accuracy must lie in \[0, 1\]"),
        ({"accuracy": [0.5, 0.75, 1.0, float("nan")]}, r"accuracy must lie in \[0, 1\]"),
        ({"report_accuracy": [0.5, 0.75, -1.0, 0]}, r"report_accuracy must lie in \[0, 1\]"),
        ({"evaluations": [1, 2]}, "evaluations has 2 values; expected 3"),
        ({"evaluations": [1, 2, -1]}, "evaluations must hold whole numbers"),
        ({"evaluations": [11, 8, 0]}, "more evaluations than possible"),
        ({"possible_evaluations": [10, 9.5, 8]}, "possible_evaluations"),
        ({"num_images": -1}, "num_images must hold whole numbers"),
        ({"start_loss": -0.1}, "start_loss is -0.1"),
        ({"start_loss": float("nan")}, "start_loss is nan"),
        ({"start_loss": "0.1"}, "start_loss is '0.1'"),
        ({"model_sha256": "abc"}, "model_sha256 is 'abc'; expected 64 hexadecimal digits"),
        ({"images_sha256": 3}, "images_sha256 is 3"),
        ({"ways": {"head": "replay"}}, "ways name 'head'"),
        ({"ways": {"conv": 3}}, "ways name 'conv'"),
        ({"options": [1]}, "options is"),
        ({"has_weights": 1}, "has_weights is 1"),
        ({"more": 1}, "it holds 'more'"),
    ],
)
def test_values_that_cannot_be_meant(tmp_path, changed, message):
    """They are in no file that we write, and refused in one of another make."""
    path = tmp_path / "order"
    if not {"options", "has_weights", "more"} & set(changed):
        with pytest.raises(ValueError, match=message):
            replace(ORDER, **changed).save(path)
        assert not path.exists()
    save_file({}, path, metadata={"pruning_order": json.dumps({**old_record(), **changed})})
    with pytest.raises(ValueError, match=f"{path} .*({message}|expected (type|a value))"):
        PruningOrder.load(path)


def old_record() -> dict[str, Any]:
    """As versions without a checksum wrote it."""
    record = {
        name: value
        for name, value in vars(ORDER).items()
        if name not in ("weights", "images_sha256", "report_images_sha256")
    }
    return {**record, "has_weights": False}


def test_files_of_earlier_versions(tmp_path):
    path = tmp_path / "order"
    save_file({}, path, metadata={"pruning_order": json.dumps(old_record())})
    expected = replace(ORDER, images_sha256=None, report_images_sha256=None)
    assert PruningOrder.load(path) == expected
    assert expected.differences(ORDER) == []  # what is not known does not differ
    for name in ("removed", "accuracy", "filters", "has_weights"):
        less = {key: value for key, value in old_record().items() if key != name}
        save_file({}, path, metadata={"pruning_order": json.dumps(less)})
        with pytest.raises(ValueError, match=f"{path} lacks parts of a PruningOrder.*'{name}'"):
            PruningOrder.load(path)
