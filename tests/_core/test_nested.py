"""Nested states as tensors and JSON, and back."""

import json
from collections import Counter, OrderedDict

import pytest
import torch

from captum_classfilters._core.nested import flattened, unflattened

STATE = {
    "model": OrderedDict([("b.weight", torch.ones(2)), ("a", torch.zeros(0, 3))]),
    "model.b": {"weight": torch.ones(1)},
    "steps": {0: {"step": torch.tensor(3.0)}, 1.5: None, True: "x"},
    "pairs": (1, (2.5, [float("inf"), ()])),
    "milestones": Counter([1, 1, 4]),
    "tensor": {"tensor": "model.a"},
    "empty": [{}, [], ()],
}


def told(value):
    if isinstance(value, torch.Tensor):
        return value.tolist(), value.shape
    if isinstance(value, dict):
        return Counter if isinstance(value, Counter) else dict, [
            (key, type(key), told(part)) for key, part in value.items()
        ]
    if isinstance(value, (list, tuple)):
        return type(value), [told(part) for part in value]
    return value, type(value)


def test_round_trip():
    tree, tensors = flattened(STATE)
    assert len(tensors) == 4
    assert {"model.a", "model.b.weight", "model.b.weight'", "steps.0.step"} == set(tensors)
    assert told(unflattened(json.loads(json.dumps(tree)), tensors)) == told(STATE)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": [1, {"b": print}]}, r"a\.1\.b is a builtin_function_or_method"),
        ({"a": {(1, 2): 3}}, r"a has the key \(1, 2\)"),
        (object(), "The value is an object"),
        ({"a": {1, 2}}, "a is a set"),
        ({"a": b"x"}, "a is a bytes"),
    ],
)
def test_what_only_code_could_make_again(value, message):
    with pytest.raises(ValueError, match=message):
        flattened(value)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({}, "branch of 0 kinds"),
        ({"dict": [], "tuple": []}, "branch of 2 kinds"),
        ({"set": []}, "kind 'set' that means nothing"),
        ({"tensor": "b"}, "kind 'tensor' that means nothing"),
        ({"tensor": ["a"]}, "kind 'tensor' that means nothing"),
        ([{"tensor": "a"}, {"tensor": "a"}], "kind 'tensor' that means nothing"),
        ({"tuple": "a"}, "kind 'tuple' that means nothing"),
        ({"dict": ["ab"]}, "not of keys and values"),
        ({"dict": [[[], 1]]}, "not of keys and values"),
        ({"dict": [["a"]]}, "not of keys and values"),
        ({"dict": [["a", 1], ["a", 2]]}, "a key twice"),
        ({"dict": [[1, 1], [True, 2]]}, "a key twice"),
        ([1, 2], "does not name the tensors 'a'"),
    ],
)
def test_trees_that_are_none(tree, message):
    with pytest.raises(ValueError, match=message):
        unflattened(tree, {"a": torch.ones(1)})


def test_deep_trees():
    tree: object = []
    for _ in range(100_000):
        tree = [tree]
    with pytest.raises(ValueError, match="nested too deeply"):
        unflattened(tree, {})
