"""What the pictures share: figures that leave pyplot's global state alone, colors, ticks, names."""

import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from captum_classfilters._core.extras import extra
from captum_classfilters._core.names import LONGEST_NAME, kind_of, listed_names
from captum_classfilters._core.names import short_name as shortened
from captum_classfilters._core.types import ClassNames

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: What pictures are drawn on, and return: a figure and its axes, or an array of them.
FigureAndAxes: TypeAlias = tuple["Figure", "Axes"]
FigureAndGrid: TypeAlias = tuple["Figure", NDArray[np.object_]]

# Okabe and Ito's colors, told apart by color-blind readers too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GRAY = "#6b6b6b"
# Warm is positive and cold is negative, in maps and in bars.
POSITIVE, NEGATIVE = COLORS[1], COLORS[0]
SIGNED, UNSIGNED = "RdBu_r", "viridis"
MISSING = "0.85"

_TICK_INCHES = 0.14  # a label of eight points, and a little air


def new_figure(size: tuple[float, float]) -> "Figure":
    """A figure of its own; in IPython one of pyplot's, which a notebook shows below the cell."""
    if _in_ipython():
        own: Figure = drawing("pyplot").figure(figsize=size, layout="constrained")
        return own
    figure = drawing("figure").Figure(figsize=size, layout="constrained")
    drawing("backends.backend_agg").FigureCanvasAgg(figure)
    return figure


def drawing(module: str) -> ModuleType:
    """A module of matplotlib."""
    return extra(f"matplotlib.{module}", "Drawing")


def _in_ipython() -> bool:
    ipython = sys.modules.get("IPython")
    return ipython is not None and ipython.get_ipython() is not None


def axes_of(plt_fig_axis: FigureAndAxes | None, size: tuple[float, float]) -> FigureAndAxes:
    """The figure and axes that the caller gave, or new ones."""
    if plt_fig_axis is None:
        figure = new_figure(size)
        return figure, figure.subplots()
    figure, axes = _pair(plt_fig_axis)
    many = np.asarray(axes, dtype=object)
    if many.size != 1:
        raise ValueError(f"plt_fig_axis holds {many.size} axes; this picture needs one.")
    return figure, many.item()


def grid_of(
    plt_fig_axis: FigureAndGrid | None,
    rows: int,
    columns: int,
    size: tuple[float, float],
    **options: Any,
) -> FigureAndGrid:
    """The figure and axes that the caller gave as an array (rows, columns), or new ones; options are
    those of ``Figure.subplots``."""
    if plt_fig_axis is None:
        figure = new_figure(size)
        return figure, figure.subplots(rows, columns, squeeze=False, **options)
    figure, axes = _pair(plt_fig_axis)
    grid = np.asarray(axes, dtype=object)
    if grid.size != rows * columns:
        raise ValueError(
            f"plt_fig_axis holds {grid.size} axes; this picture needs {rows * columns}, in {rows} "
            f"rows and {columns} columns: figure.subplots({rows}, {columns})."
        )
    return figure, grid.reshape(rows, columns)


def sheet_of(
    plt_fig_axis: FigureAndGrid | None, num_axes: int, columns: int, size: tuple[float, float]
) -> FigureAndGrid:
    """A figure and this many axes in rows of so many; those that are left over are blank."""
    rows = -(-num_axes // columns)
    if (
        plt_fig_axis is not None
        and np.asarray(_pair(plt_fig_axis)[1], dtype=object).size == num_axes
    ):
        figure, grid = grid_of(plt_fig_axis, 1, num_axes, size)
    else:
        figure, grid = grid_of(plt_fig_axis, rows, columns, size)
    for axes in grid.flat[num_axes:]:
        axes.set_axis_off()
    return figure, grid.flatten()[:num_axes]


def _pair(plt_fig_axis: object) -> "tuple[Figure, object]":
    if not isinstance(plt_fig_axis, (tuple, list)) or len(plt_fig_axis) != 2:
        raise ValueError("plt_fig_axis must be a pair of figure and axes.")
    figure, axes = plt_fig_axis
    for part, kind in ((figure, "figure"), *((one, "axes") for one in np.ravel(axes))):
        if not hasattr(part, "suptitle" if kind == "figure" else "imshow"):
            raise ValueError(f"plt_fig_axis holds {kind_of(part)}; expected {kind} of Matplotlib.")
    return figure, axes


def headline(figure: "Figure", title: str | None, default: str = "", **options: Any) -> None:
    """Set a figure's title; the default one does not replace what the caller wrote there."""
    if title is not None or (default and not figure.get_suptitle()):
        figure.suptitle(default if title is None else title, **options)


def quiet(axes: "Axes") -> None:
    """Remove the frame's upper and right sides."""
    axes.spines[["top", "right"]].set_visible(False)


def bare(axes: "Axes") -> None:
    """A pale frame without ticks, for an image."""
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_color("0.8")


def short_number(value: float) -> str:
    """A number of two digits, or whole where it has more before its point."""
    return f"{value:,.0f}" if abs(value) >= 10 else f"{value:.2g}"


def short_name(name: object, length: int = LONGEST_NAME, *, synonyms: bool = True) -> str:
    """A name that fits beside a picture, of so many characters, and is no mathematics."""
    return no_mathematics(shortened(name, length, synonyms=synonyms))


def no_mathematics(text: str) -> str:
    """Text whose dollars Matplotlib draws; of a text once, as a second time it draws backslashes."""
    return text.replace("$", r"\$")


def lines_of(text: str, width: int) -> str:
    """A title in at most three lines, as narrow as its column."""
    return "\n".join(textwrap.wrap(text, width)[:3])


def short_names(
    names: Iterable[object], length: int = LONGEST_NAME, *, synonyms: bool = True
) -> list[str]:
    """Short names; different ones that are the same once shortened have their number beside them.
    Names of methods and models have no synonyms behind a comma."""
    full = [str(name) for name in names]
    short = [short_name(name, length, synonyms=synonyms) for name in full]
    meant: dict[str, set[str]] = {}
    for text, name in zip(short, full, strict=True):
        meant.setdefault(text, set()).add(name)
    for index, text in enumerate(short):
        if len(meant[text]) > 1:
            number = f" [{index}]"
            least = length - len(number)
            short[index] = short_name(full[index], least, synonyms=synonyms) + number
    return short


def exactness(provenance: Mapping[str, object]) -> str:
    """Whether contributions add up to the logits, as their table records it; empty if it does not."""
    exact = provenance.get("exact")
    return "" if exact is None else "exact" if exact else "not exact"


def names_of(class_names: ClassNames | None, num_classes: int) -> list[str]:
    """Short names of the classes; their numbers where none are given."""
    names = listed_names(class_names, num_classes)
    return [str(index) for index in range(num_classes)] if names is None else short_names(names)


def set_ticks(
    axes: "Axes",
    side: Literal["x", "y"],
    names: Sequence[str],
    positions: Sequence[float] | None = None,
    **options: Any,
) -> None:
    """Names at 0, 1, ... or at rising positions, as many of them as there is room for."""
    places = list(range(len(names))) if positions is None else list(positions)
    extent = axes.get_window_extent()
    dpi = getattr(axes.figure, "dpi", 100)
    room = max((extent.width if side == "x" else extent.height) / dpi / _TICK_INCHES, 1)
    span = (places[-1] - places[0] + 1) if positions is not None else len(names)
    kept: list[int] = []
    for index, place in enumerate(places):
        if not kept or place - places[kept[-1]] >= span / room:
            kept.append(index)
    setter = axes.set_xticks if side == "x" else axes.set_yticks
    setter([places[index] for index in kept], [names[index] for index in kept], **options)
