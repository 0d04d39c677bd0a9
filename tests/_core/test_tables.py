"""Results print as a table or a line."""

import re
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from captum_classfilters._core.tables import Row, Table, Tabular, described, short_repr, text_table


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


def test_html_by_hand():
    rows: list[Row] = [
        {"<b>": "a & b", "part": 0.5, "number": 3},
        {"<b>": '"c"', "part": -1.0, "number": 4},
        {"<b>": "d", "part": float("nan"), "number": None},
    ]
    html = Table(rows, {"part": ".1f"}, "<i>", ["note <3"], most=None).html()
    assert "<b>" not in html and "<i>" not in html  # noqa: PT018
    for text in ("&lt;b&gt;", "a &amp; b", "&quot;c&quot;", "&lt;i&gt;", "note &lt;3", ">-1.0<"):
        assert text in html
    # Half of the largest size, and all of it, in the colors of the two signs; whole numbers without.
    assert re.findall(r"rgba\((\d+),.*? (\d+)%", html) == [("213", "50"), ("0", "100")]
    few = Table(rows, most=1)
    assert few.html().count("<tr>") == 2
    assert str(few).splitlines()[-1] == "… 2 more rows, which to_pandas() has"
    assert "gradient" not in Table(rows, bars=()).html()
    assert Table(rows, bars=("number",)).html().count("gradient") == 2


def test_a_data_frame_by_hand():
    rows: list[Row] = [{"": "a", "x": torch.tensor(1.5)}, {"": "b", "x": float("nan")}]
    frame = Table(rows, most=1).frame()
    assert frame.index.tolist() == ["a", "b"]
    assert frame["x"].tolist()[0] == 1.5
    assert frame["x"].isna().tolist() == [False, True]
    by_name = Table([{"layer": "a", "x": 1}], index="layer").frame()
    assert by_name.loc["a", "x"] == 1


def test_an_empty_table():
    empty = Table([], title="nothing", index="layer")
    assert str(empty) == "nothing"
    assert len(empty.frame()) == 0
    assert "<table" in empty.html()


def test_several_tables():
    class Both(Tabular):
        def _tables(self):
            return [Table([{"x": 1}], title="one"), Table([{"x": 2}], title="two")]

    assert str(Both()) == "one\nx\n1\n\ntwo\nx\n2"
    assert Both()._repr_html_().count("<table") == 2
    assert Both().to_pandas().loc["two"]["x"].tolist() == [2]


def test_cells_of_any_kind():
    assert str(Table([{"a": (1, 2), "b": torch.zeros(2, 3)}])).splitlines()[1] == (
        "(1, 2)  float32 (2, 3)"
    )


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
