"""Results print as a table or a line."""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from captum_classfilters._core.tables import described, short_repr, text_table


def test_a_table_by_hand():
    rows = [
        {"layer": "conv1", "filters": 1234, "share": 0.5, "told": True, "": None},
        {"layer": "fc", "filters": torch.tensor(7), "share": float("nan"), "told": False, "": "x"},
    ]
    assert text_table(rows, {"share": ".1%"}, "two layers") == (
        "two layers\n"
        "layer  filters  share   told\n"
        "conv1    1,234  50.0%   True\n"
        "fc           7      -  False  x"
    )
    assert text_table([], title="nothing") == "nothing"
    assert text_table([{"a": np.float64(2)}]) == "    a\n2.000"
    assert text_table([{"a": 1}, {"b": 2}]) == "a\n1\n"


def test_a_line_describes_tensors():
    @short_repr
    @dataclass(frozen=True)
    class Result:
        name: str
        values: torch.Tensor
        tables: dict
        model: nn.Module
        number: float
        classes: tuple
        hidden: int = field(default=0, repr=False)

        def __str__(self):
            return "a table"

    result = Result(
        "n" * 90,
        torch.zeros(2, 3, dtype=torch.bfloat16),
        {str(index): np.zeros(index) for index in range(5)},
        nn.Sequential(nn.Linear(2, 2)),
        1 / 3,
        ("a",),
    )
    assert repr(result) == (
        f"Result(name='{'n' * 58}…, values=bfloat16 (2, 3), "
        "tables={0: float64 (0,), 1: float64 (1,), 2: float64 (2,), … 2 more}, "
        "model=Sequential, number=0.3333, classes=('a',))"
    )
    assert str(result) == "a table"
    assert len(described([result] * 100)) < 60


def test_a_named_tuple_too():
    @short_repr
    class Pair(NamedTuple):
        left: torch.Tensor
        right: int

    assert repr(Pair(torch.zeros(3), 2)) == "Pair(left=float32 (3,), right=2)"
    assert Pair(torch.zeros(3), 2)[1] == 2
