"""Results print as a table or a line."""

import re
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pytest
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


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("new\nline", r"new\nline"),
        ("a\r\tb", r"a\r\tb"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("two\u2028lines\x85", r"two\u2028lines\x85"),
        ("half \ud83d", r"half \ud83d"),
        ("猫\u3000の\xa0子 👩\u200d🔬", "猫\u3000の\xa0子 👩\u200d🔬"),  # spaces and joiners stay
        (r"back\nslash", r"back\nslash"),
    ],
)
def test_a_row_is_a_line_whatever_its_names_hold(name, shown):
    table = Table([{"class": name, name: 3}, {"class": "dog", name: 12}], title=name, notes=[name])
    title, *lines, note = str(table).split("\n")
    width = len(shown)
    assert title == note == shown
    assert lines == [
        f"{'class'.ljust(width)}  {shown}",
        f"{shown}  {'3'.rjust(width)}",
        f"{'dog'.ljust(width)}  {'12'.rjust(width)}",
    ]
    assert name in table.html()
    assert table.frame()["class"].tolist() == [name, "dog"]


def test_long_names_are_cut_in_print_alone():
    names = [f"{'a long name ' * 25}{end}" for end in ("one", "two")]
    table = Table([{"class": name, "images": 7} for name in names])
    lines = str(table).split("\n")
    assert 80 < max(map(len, lines)) <= 80 + 2 + len("images")
    for line, end in zip(lines[1:], ("one", "two"), strict=True):
        assert re.fullmatch(rf"a long name .*….*a long name {end} +7", line)
    assert str(Table([{"": "x" * 80}])).split("\n") == ["", "x" * 80]
    assert len(str(Table([{"": "x" * 81}])).split("\n")[1]) == 80
    assert all(name in table.html() for name in names)
    assert table.frame()["class"].tolist() == names


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
