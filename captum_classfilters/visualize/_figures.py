"""What the pictures share: figures without pyplot's global state, and the colours."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#6b6b6b"


def new_figure(size: tuple[float, float]) -> "Figure":
    """A figure of its own, not one of pyplot's; it shows itself in a notebook all the same."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    class NotebookFigure(Figure):
        def _repr_png_(self) -> bytes:
            import io

            buffer = io.BytesIO()
            self.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
            return buffer.getvalue()

    figure = NotebookFigure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def axes_of(given: tuple[Any, Any] | None, size: tuple[float, float]) -> tuple[Any, Any]:
    """The figure and axes that the caller gave, or new ones."""
    if given is not None:
        return given
    figure = new_figure(size)
    return figure, figure.subplots()


def quiet(axes: Any) -> None:
    """Remove the frame's upper and right sides."""
    axes.spines[["top", "right"]].set_visible(False)
