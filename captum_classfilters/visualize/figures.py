"""What the pictures share: figures that leave pyplot's global state alone, and the colours."""

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#6b6b6b"


def new_figure(size: tuple[float, float]) -> "Figure":
    """A figure of its own; in IPython one of pyplot's, which a notebook shows below the cell."""
    if _in_ipython():
        import matplotlib.pyplot as plt

        return plt.figure(figsize=size, layout="constrained")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _in_ipython() -> bool:
    ipython = sys.modules.get("IPython")
    return ipython is not None and ipython.get_ipython() is not None


def axes_of(given: tuple[Any, Any] | None, size: tuple[float, float]) -> tuple[Any, Any]:
    """The figure and axes that the caller gave, or new ones."""
    if given is not None:
        return given
    figure = new_figure(size)
    return figure, figure.subplots()


def quiet(axes: Any) -> None:
    """Remove the frame's upper and right sides."""
    axes.spines[["top", "right"]].set_visible(False)
