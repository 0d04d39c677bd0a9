"""How results show themselves: a short line, a table as text, as HTML or as a data frame."""

import dataclasses
import html
import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence, Set, Sized
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from captum_classfilters._core.equality import equal_by_value
from captum_classfilters._core.extras import extra
from captum_classfilters._core.layers import layer_name, module_of, unwrapped
from captum_classfilters._core.types import ForwardFunc

if TYPE_CHECKING:
    import pandas

T = TypeVar("T")
Class = TypeVar("Class", bound=type)

#: A line of a table: titles of columns and cells.
Row: TypeAlias = dict[str, Any]

_MOST_ITEMS = 3
_LONGEST = 60
_LONGEST_LINE = 1000
_WIDEST = 80  # of a printed column
_UNPRINTED = ("Cc", "Cs", "Zl", "Zp")  # controls, half pairs, and what parts lines
_MOST_ROWS = 40  # of a thousand classes, a cell of a notebook shows the first

# Half transparent, so that text stays readable on a white and on a black page.
_POSITIVE, _NEGATIVE = "rgba(213,94,0,.4)", "rgba(0,114,178,.4)"
_CELL = "padding:.2em .7em;max-width:40em;overflow-wrap:anywhere;"


@dataclass(frozen=True)
class Table:
    r"""
    A result's numbers, row by row: printed, in a notebook, or as a data frame. What is printed has a
    line for each row; control characters are escaped, and text of more than 80 characters is cut.

    Args:

        rows (sequence of mapping): Column titles and cells, in the order of the first row. A title may
                    be empty. Cells are text, numbers or tensors of one number; None leaves its cell
                    empty, and NaN prints as ``-``.
        formats (mapping, optional): Format specifications by column title, ``{"p": ".2g"}`` for
                    example; by default ``","`` for whole numbers and ``".3f"`` for others.
        title (str): A line above the table.
                    Default: ""
        notes (sequence of str): Lines below the table.
                    Default: ()
        bars (sequence of str, optional): Columns that have bars in HTML; by default those whose
                    numbers are not whole.
                    Default: None
        index (str, optional): The column that is a data frame's index; a first column without a
                    title always is.
                    Default: None
        most (int, optional): Print at most so many rows; all with None.
                    Default: 40

    Examples::

        >>> from captum_classfilters._core.tables import Table
        >>> table = Table([{"layer": "conv", "filters": 1024, "p": 0.03},
        ...                {"layer": "fc", "filters": 10, "p": float("nan")}], {"p": ".2g"})
        >>> print(table)
        layer  filters     p
        conv     1,024  0.03
        fc          10     -
        >>> table.frame()["filters"].tolist()
        [1024, 10]
        >>> "<td" in table.html()
        True
    """

    rows: Sequence[Mapping[str, object]]
    formats: Mapping[str, str] = field(default_factory=dict)
    title: str = ""
    notes: Sequence[str] = ()
    bars: Sequence[str] | None = None
    index: str | None = None
    most: int | None = _MOST_ROWS

    def __str__(self) -> str:
        values = self._values()
        columns, *cells = (
            [_printed(cell) for cell in line]
            for line in (self._columns(), *map(self._cells, values[: self.most]))
        )
        widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
        words = self._are_words(values)
        lines = [
            "  ".join(
                cell.ljust(width) if left else cell.rjust(width)
                for cell, width, left in zip(line, widths, words, strict=True)
            ).rstrip()
            for line in ((columns, *cells) if columns else ())
        ]
        title = [_in_one_line(self.title)] if self.title else []
        return "\n".join([*title, *lines, *map(_in_one_line, self._notes())])

    def html(self) -> str:
        """An HTML table with bars behind its numbers, its text escaped."""
        columns, values = self._columns(), self._values()
        words = self._are_words(values)
        scales = [self._scale(place, values, words) for place in range(len(columns))]
        sides = ["left" if word else "right" for word in words]
        head = "".join(
            f'<th scope="col" style="text-align:{side};{_CELL}">{_escaped(title)}</th>'
            for title, side in zip(columns, sides, strict=True)
        )
        body = "".join(
            "<tr>"
            + "".join(
                f'<td style="text-align:{side};{_CELL}{_bar(value, scale)}">{_escaped(cell)}</td>'
                for value, cell, side, scale in zip(
                    row, self._cells(row), sides, scales, strict=True
                )
            )
            + "</tr>"
            for row in values[: self.most]
        )
        caption = (
            f'<caption style="text-align:left">{_escaped(self.title)}</caption>'
            if self.title
            else ""
        )
        table = (
            f'<table style="border-collapse:collapse">{caption}'
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        )
        notes = "".join(f"<p>{_escaped(note)}</p>" for note in self._notes())
        return f'<div style="overflow-x:auto">{table}{notes}</div>'

    def frame(self) -> "pandas.DataFrame":
        """All rows as a data frame, numbers as they are."""
        columns = self._columns()
        frame = import_pandas().DataFrame(self._values(), columns=columns)
        index = self.index if self.index is not None else ("" if columns[:1] == [""] else None)
        if index is None or not columns:
            return frame
        frame = frame.set_index(index)
        return frame if index else frame.rename_axis(None)

    def _columns(self) -> list[str]:
        return list(self.rows[0]) if self.rows else []

    def _values(self) -> list[list[object]]:
        return [[_plain(row.get(column)) for column in self._columns()] for row in self.rows]

    def _cells(self, row: Sequence[object]) -> list[str]:
        return [
            _cell(value, self.formats.get(column))
            for column, value in zip(self._columns(), row, strict=True)
        ]

    def _are_words(self, values: Sequence[Sequence[object]]) -> list[bool]:
        return [
            any(isinstance(value, str) for value in column) for column in zip(*values, strict=True)
        ]

    def _scale(self, place: int, values: list[list[object]], words: list[bool]) -> float:
        """The largest size in a column that has bars; 0 where it has none."""
        numbers = [row[place] for row in values if _is_number(row[place])]
        wanted = any(isinstance(number, float) for number in numbers)
        if self.bars is not None:
            wanted = self._columns()[place] in self.bars
        if words[place] or not wanted:
            return 0.0
        return max((abs(float(number)) for number in numbers), default=0.0)  # type: ignore[arg-type]

    def _notes(self) -> list[str]:
        left = 0 if self.most is None else len(self.rows) - self.most
        more = [f"… {left:,} more rows, which to_pandas() has"] if left > 0 else []
        return [*more, *self.notes]


class Tabular:
    """A result that is a table, or several: it prints and shows as such, and becomes a data frame."""

    __slots__ = ()

    def _tables(self) -> Sequence[Table]:
        """The tables, the first first."""
        raise NotImplementedError

    def __str__(self) -> str:
        return "\n\n".join(map(str, self._tables()))

    def _repr_html_(self) -> str:
        return "".join(table.html() for table in self._tables())

    def to_pandas(self) -> "pandas.DataFrame":
        """What is printed as a data frame, with all rows. Needs the extra ``pandas``.

        Returns:
            *pandas.DataFrame*; several tables stand below each other, under their titles.

        Raises:
            ImportError: pandas is not installed.
        """
        tables = self._tables()
        if len(tables) == 1:
            return tables[0].frame()
        frames = {table.title: table.frame() for table in tables}
        return import_pandas().concat(frames)


def import_pandas() -> Any:
    """The package pandas.

    Raises:
        ImportError: It is not installed; the extra that has it is named.
    """
    return extra("pandas", "to_pandas")


def text_table(
    rows: Sequence[Mapping[str, object]], formats: Mapping[str, str] | None = None, title: str = ""
) -> str:
    """Rows as lines of text, all of them; see :class:`Table`."""
    return str(Table(rows, formats or {}, title, most=None))


def short_repr(cls: Class) -> Class:
    r"""
    Give a dataclass or named tuple a ``repr`` of one line, with tensors by type and shape; dataclasses
    are equal if their fields are, tensors by value.

    To stand above ``@dataclass``. A class that is :class:`Tabular` prints its table by ``__str__``
    and shows it in a notebook; another shows its fields there.

    Examples::

        >>> from dataclasses import dataclass
        >>> import torch
        >>> from captum_classfilters._core.tables import short_repr
        >>> @short_repr
        ... @dataclass(frozen=True)
        ... class Scores:
        ...     layer: str
        ...     values: torch.Tensor
        >>> Scores("conv", torch.zeros(3, 512))
        Scores(layer='conv', values=float32 (3, 512))
    """

    def line(self: object) -> str:
        parts = ", ".join(f"{name}={described(getattr(self, name))}" for name in _fields(self))
        text = f"{type(self).__name__}({parts})"
        return text if len(text) <= _LONGEST_LINE else f"{text[: _LONGEST_LINE - 2]}…)"

    cls.__repr__ = line  # type: ignore[assignment]
    if dataclasses.is_dataclass(cls):
        equal_by_value(cls)
    if not hasattr(cls, "_repr_html_"):
        cls._repr_html_ = _fields_as_html  # type: ignore[attr-defined]
    return cls


def bound_repr(
    method: object, forward_func: ForwardFunc | None, layers: object, **options: object
) -> str:
    """What a method is called and bound to: ``LayerFilterContribution(ResNet, layer='layer4')``.

    Args:

        method (object): An instance of the method.
        forward_func (Callable): Its model, or the function that runs it.
        layers (nn.Module, sequence of these or None): Its layers.
        options (object): What else it was made with and is worth telling.
    """
    several = isinstance(layers, (list, tuple))
    modules = list(layers) if isinstance(layers, (list, tuple)) else [layers]
    model = module_of(forward_func, modules)
    names = [layer_name(model, part) if isinstance(part, nn.Module) else part for part in modules]
    told = {"layer": names if several else names[0], **options}
    parts = [f"{name}={described(value)}" for name, value in told.items()]
    of = model_name(forward_func if model is None else model)
    return f"{type(method).__name__}({', '.join([of, *parts])})"


def model_name(model: object) -> str:
    """The class of a model, inside of what wraps it, or the name of a function."""
    if isinstance(model, nn.Module):
        return type(unwrapped(model)).__name__
    return str(getattr(model, "__name__", type(model).__name__))


def described(value: object) -> str:
    """A value in a few words: tensors by type and shape, the first few of many items."""
    if isinstance(value, nn.Module):
        return type(value).__name__
    if isinstance(value, np.generic):
        return described(value.item())
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return "{" + _some(
            [f"{key}: {described(item)}" for key, item in _first(value.items())], value
        )
    if isinstance(value, (tuple, list, Set)) and not hasattr(value, "_fields"):
        return "(" + _some([described(item) for item in _first(value)], value)
    text = repr(value)
    if len(text) <= _LONGEST and "\n" not in text:
        return text
    return f"{text[: _LONGEST - 1]}…" if isinstance(value, str) else f"{type(value).__name__}(…)"


def _fields_as_html(self: object) -> str:
    """The fields of a result in a few words each, and the range of their numbers."""
    values = {name: getattr(self, name) for name in _fields(self)}
    rows: list[Row] = [{"": name, "value": described(value)} for name, value in values.items()]
    ranges = [_range(value) for value in values.values()]
    if any(ranges):
        rows = [row | (range_ or _NO_RANGE) for row, range_ in zip(rows, ranges, strict=True)]
    formats = dict.fromkeys(_NO_RANGE, ".4g")
    return Table(rows, formats, type(self).__name__, bars=(), most=None).html()


_NO_RANGE: Row = dict.fromkeys(("lowest", "mean", "highest"))


def _range(value: object) -> Row:
    """The lowest, mean and highest number of a tensor or an array; empty for anything else."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        value = torch.from_numpy(np.ascontiguousarray(value))
    if not isinstance(value, Tensor):
        return {}
    tensor = value.detach()
    if tensor.is_complex() or tensor.is_meta or tensor.layout != torch.strided:
        return {}
    numbers = tensor.double().flatten()
    numbers = numbers[~numbers.isnan()]
    if not len(numbers):
        return {}
    return {"lowest": numbers.min(), "mean": numbers.mean(), "highest": numbers.max()}


def _in_one_line(text: str) -> str:
    """Text without what would break a line of a table, or move a terminal's cursor."""
    return "".join(
        repr(sign)[1:-1] if unicodedata.category(sign) in _UNPRINTED else sign for sign in text
    )


def _printed(cell: str) -> str:
    """A cell in one line; a long one is cut in its middle, as similar names often differ in their ends."""
    line = _in_one_line(cell)
    if len(line) <= _WIDEST:
        return line
    end = _WIDEST // 2
    return f"{line[: _WIDEST - end - 1].rstrip()}…{line[-end:].lstrip()}"


def _escaped(text: str) -> str:
    return html.escape(text, quote=True)


def _bar(value: object, scale: float) -> str:
    """The bar behind a number, warm where it is positive and cold where it is negative."""
    if not scale or not _is_number(value):
        return ""
    share = 100 * abs(float(value)) / scale  # type: ignore[arg-type]
    color = _POSITIVE if float(value) > 0 else _NEGATIVE  # type: ignore[arg-type]
    return f"background:linear-gradient(90deg,{color} {share:.0f}%,transparent {share:.0f}%);"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _first(items: Iterable[T]) -> list[T]:
    return [item for item, _ in zip(items, range(_MOST_ITEMS), strict=False)]


def _some(shown: list[str], value: Sized) -> str:
    more = len(value) - len(shown)
    end = "}" if isinstance(value, Mapping) else ",)" if len(value) == 1 else ")"
    return ", ".join([*shown, f"… {more} more"] if more else shown) + end


def _fields(value: object) -> tuple[str, ...]:
    if dataclasses.is_dataclass(value):
        return tuple(field.name for field in dataclasses.fields(value) if field.repr)
    names: tuple[str, ...] = value._fields  # type: ignore[attr-defined]
    return names


def _plain(value: object) -> object:
    """A number of Python's own in place of a tensor or an array of one."""
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else value
    if isinstance(value, (np.ndarray, np.generic)):
        return value.item() if value.size == 1 else value
    return value


def _cell(value: Any, form: str | None) -> str:
    if value is None:
        return ""
    if isinstance(value, (str, bool)):
        return str(value)
    if not isinstance(value, (int, float)):
        return described(value)
    if math.isnan(value):
        return "-"
    return format(value, form or ("," if isinstance(value, int) else ".3f"))
