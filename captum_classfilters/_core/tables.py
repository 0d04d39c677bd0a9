"""How results print: a short table or a line, never the numbers of a tensor."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence, Set, Sized
from typing import Any, TypeAlias, TypeVar

from torch import Tensor, nn

T = TypeVar("T")
Class = TypeVar("Class", bound=type)

#: A line of a table: titles of columns and cells.
Row: TypeAlias = dict[str, Any]

_MOST_ITEMS = 3
_LONGEST = 60


def text_table(
    rows: Sequence[Mapping[str, object]], formats: Mapping[str, str] | None = None, title: str = ""
) -> str:
    r"""
    Rows as lines of text: words stand left in their column, numbers right.

    Args:

        rows (sequence of mapping): Column titles and cells, in the order of the first row. A title may
                    be empty. Cells are text, numbers or tensors of one number; None leaves its cell
                    empty, and NaN prints as ``-``.
        formats (mapping, optional): Format specifications by column title, ``{"p": ".2g"}`` for
                    example; by default ``","`` for whole numbers and ``".3f"`` for others.
                    Default: None
        title (str): A line above the table.
                    Default: ""

    Returns:
        *str*, a line for the titles and one for each row.

    Examples::

        >>> from captum_classfilters._core.tables import text_table
        >>> print(text_table([{"layer": "conv", "filters": 1024, "p": 0.03},
        ...                   {"layer": "fc", "filters": 10, "p": float("nan")}], {"p": ".2g"}))
        layer  filters     p
        conv     1,024  0.03
        fc          10     -
    """
    if not rows:
        return title
    columns = list(rows[0])
    formats = formats or {}
    values = [[_plain(row.get(column)) for column in columns] for row in rows]
    cells = [
        [_cell(value, formats.get(column)) for column, value in zip(columns, row, strict=True)]
        for row in values
    ]
    words = [
        any(isinstance(value, str) for value in column) for column in zip(*values, strict=True)
    ]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(line, widths, words, strict=True)
        ).rstrip()
        for line in (columns, *cells)
    ]
    return "\n".join([title, *lines] if title else lines)


def short_repr(cls: Class) -> Class:
    r"""
    Give a dataclass or named tuple a ``repr`` of one line, with tensors by type and shape.

    To stand above ``@dataclass``. A class that also has a table prints it by ``__str__``.

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
        return f"{type(self).__name__}({parts})"

    cls.__repr__ = line  # type: ignore[assignment]
    return cls


def described(value: object) -> str:
    """A value in a few words: tensors by type and shape, the first few of many items."""
    if isinstance(value, nn.Module):
        return type(value).__name__
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
    return value.item() if isinstance(value, Tensor) or hasattr(value, "item") else value


def _cell(value: Any, form: str | None) -> str:
    if value is None:
        return ""
    if isinstance(value, (str, bool)):
        return str(value)
    if math.isnan(value):
        return "-"
    return format(value, form or ("," if isinstance(value, int) else ".3f"))
