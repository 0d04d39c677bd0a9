"""Hypergraphs of class separation, and their scores against depth."""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from captum_classfilters._core.arguments import arguments_checked, whole_number
from captum_classfilters._core.extras import extra
from captum_classfilters._core.names import listed_names
from captum_classfilters._core.types import ClassNames
from captum_classfilters.spectral.class_separation import SeparationTest
from captum_classfilters.spectral.hypergraph import Hypergraph
from captum_classfilters.visualize.arrays import chosen, out_of
from captum_classfilters.visualize.figures import (
    COLORS,
    GRAY,
    UNSIGNED,
    FigureAndAxes,
    axes_of,
    headline,
    quiet,
    set_ticks,
    short_names,
)

_LABELS = {
    "jaccard": "mean Jaccard similarity of classes",
    "components": "connected components",
    "purity": "mean purity of directions",
    "single_class_share": "share of directions with one class",
}


@arguments_checked
def plot_hypergraph(
    hypergraph: Hypergraph,
    *,
    style: Literal["incidence", "bands"] = "incidence",
    class_names: ClassNames | None = None,
    classes: int | Sequence[int | str] = 40,
    edges: int | Sequence[int | str] = 100,
    title: str | None = None,
    plt_fig_axis: FigureAndAxes | None = None,
) -> FigureAndAxes:
    r"""
    Draw a hypergraph of classes, or images, and directions.

    Args:

        hypergraph (Hypergraph): With classes. Directions that hold nothing are left out.
        style (str): ``"incidence"`` draws classes by directions, those with the fewest classes
                    first; where vertices are images, a cell is the share of the class's images.
                    ``"bands"`` draws HyperNetX's rubber bands around vertices, readable for some
                    ten directions, and needs the extra ``hypergraph``.
                    Default: "incidence"
        class_names (sequence of str, optional): Names of the classes, where vertices are images.
                    Default: None
        classes (int or sequence): Draw at most so many classes, those in most directions; or these.
                    Of the style ``"incidence"``, as is the next.
                    Default: 40
        edges (int or sequence): Draw at most so many directions, those that hold most; or these, by
                    their indices or names.
                    Default: 100
        title (str, optional): Title.
        plt_fig_axis (tuple, optional): Figure and axes to draw on; new ones by default.

    Returns:
        *tuple* of figure and axes.

    Raises:
        ValueError: The hypergraph has no classes or no incidences, or the style is unknown.
        ImportError: HyperNetX is missing.
    """
    if style not in ("incidence", "bands"):
        raise ValueError(f"style={style!r}; choose 'incidence' or 'bands'.")
    if not hypergraph.incidence.any():
        raise ValueError(
            "The hypergraph has no incidences: its rule found nothing. Lower the rule's threshold."
        )
    if style == "bands":
        return _draw_bands(hypergraph, title, plt_fig_axis)
    if hypergraph.classes is None:
        raise ValueError("The hypergraph is a dual, whose vertices have no classes.")
    share = _shares(hypergraph)
    full = _class_names(hypergraph, class_names)
    names = short_names(full)
    rows = chosen(classes, torch.from_numpy(share.sum(1)), "classes", full).numpy()
    share = share[rows]
    used = np.flatnonzero(share.any(0))
    if whole_number(edges) is not None:
        used = used[chosen(edges, torch.from_numpy(share[:, used].sum(0)), "edges").numpy()]
        strongest = share[:, used].argmax(0)
        used = used[np.lexsort((strongest, (share[:, used] > 0).sum(0)))]
    else:
        size = torch.zeros(len(hypergraph.edges))
        used = chosen(edges, size, "edges", list(hypergraph.edges)).numpy()
    width = min(16.0, 2.2 + 0.2 * len(used))
    figure, axes = axes_of(plt_fig_axis, (max(width, 5.0), 1.4 + 0.26 * len(share)))
    image = axes.imshow(share[:, used], cmap=UNSIGNED, vmin=0, vmax=1, aspect="auto")
    set_ticks(axes, "y", [names[row] for row in rows])
    edge_names = short_names(hypergraph.edges[edge] for edge in used)
    set_ticks(axes, "x", edge_names, rotation=90)
    axes.set_xticks(np.arange(1, len(used)) - 0.5, minor=True)
    axes.set_yticks(np.arange(1, len(rows)) - 0.5, minor=True)
    axes.grid(which="minor", color="white", lw=1)
    axes.tick_params(which="minor", length=0)
    axes.tick_params(labelsize=8)
    told = [
        "direction, those of few classes first" if whole_number(edges) is not None else "direction",
        out_of(len(rows), hypergraph.num_classes, "classes"),
        out_of(len(used), len(hypergraph.edges), "directions"),
    ]
    axes.set_xlabel("; ".join(filter(None, told)))
    axes.set_title(title or "classes and the directions they are in", loc="left")
    if len(hypergraph.vertices) > hypergraph.num_classes:
        figure.colorbar(image, ax=axes, label="share of the class's images", pad=0.01)
    return figure, axes


def _draw_bands(
    hypergraph: Hypergraph, title: str | None, plt_fig_axis: FigureAndAxes | None
) -> FigureAndAxes:
    hypernetx = extra("hypernetx", "plot_hypergraph(style='bands')")
    converted = hypergraph.to_hypernetx()
    figure, axes = axes_of(plt_fig_axis, (5.6, 4.0))
    hypernetx.drawing.rubber_band.draw(
        converted,
        ax=axes,
        layout_kwargs={"seed": 0},
        node_labels=dict(zip(hypergraph.vertices, short_names(hypergraph.vertices), strict=True)),
        edge_labels_kwargs={"fontsize": 8},
        node_labels_kwargs={"fontsize": 9},
    )
    axes.set_title(title or "", loc="left")
    return figure, axes


def _shares(hypergraph: Hypergraph) -> NDArray[np.float64]:
    """Share of each class's vertices in each edge (C, E)."""
    share = np.zeros((hypergraph.num_classes, len(hypergraph.edges)))
    assert hypergraph.classes is not None
    np.add.at(share, hypergraph.classes, hypergraph.incidence)
    count = np.bincount(hypergraph.classes, minlength=hypergraph.num_classes)
    return np.asarray(share / np.maximum(count, 1)[:, None])


@arguments_checked
def plot_class_separation(
    tests: Mapping[str, SeparationTest],
    *,
    score: Literal["jaccard", "components", "purity", "single_class_share"] = "jaccard",
    level: float = 0.05,
    title: str | None = None,
    plt_fig_axis: FigureAndAxes | None = None,
) -> FigureAndAxes:
    r"""
    A separation score layer by layer, beside what permuted labels give.

    Args:

        tests (mapping): Layer names, in order of depth, and their
                    :class:`~captum_classfilters.spectral.class_separation.SeparationTest`.
                    A layer whose rule found nothing has no score and is a gap.
        score (str): Which score.
                    Default: "jaccard"
        level (float): Layers with a p-value of at most this have a filled marker. The p-values are
                    not corrected for the number of layers.
                    Default: 0.05
        title (str, optional): Title.
        plt_fig_axis (tuple, optional): Figure and axes to draw on; new ones by default.

    Returns:
        *tuple* of figure and axes.

    Raises:
        ValueError: There are no layers, none has the score, or the score is unknown.
    """
    if not tests:
        raise ValueError("There are no layers to draw.")
    if score not in _LABELS:
        raise ValueError(f"score={score!r}; choose one of {list(_LABELS)}.")
    places = np.arange(len(tests))
    observed = np.array([test.observed[score] for test in tests.values()])
    if np.isnan(observed).all():
        raise ValueError(
            f"No layer has the score {score!r}: the rule found no incidences, or too few. Lower its "
            "threshold."
        )
    bands = np.full((3, len(tests)), np.nan)
    for place, test in enumerate(tests.values()):
        drawn = test.null[score][~np.isnan(test.null[score])]
        if len(drawn):
            bands[:, place] = np.quantile(drawn, [0.025, 0.5, 0.975])
    figure, axes = axes_of(plt_fig_axis, (min(16.0, max(5.0, 1.8 + 0.28 * len(tests))), 3.4))
    axes.fill_between(places, bands[0], bands[2], color=GRAY, alpha=0.25, lw=0)
    axes.plot(places, bands[1], color=GRAY, lw=1, label="permuted labels, median and 95 %")
    axes.plot(places, observed, color=COLORS[0], lw=1.5)
    significant = np.array([test.p_values[score] <= level for test in tests.values()])
    known = ~np.isnan(observed)
    for which, face, label in (
        (significant & known, COLORS[0], f"true labels, p ≤ {level:g}"),
        (~significant & known, "white", f"true labels, p > {level:g}"),
    ):
        if which.any():
            axes.scatter(
                places[which],
                observed[which],
                s=28,
                c=face,
                edgecolors=COLORS[0],
                zorder=3,
                label=label,
            )
    set_ticks(axes, "x", list(tests), rotation=90)
    axes.tick_params(labelsize=8)
    axes.set_ylabel(_LABELS[score])
    headline(figure, title, "class separation against depth", x=0.01, ha="left")
    axes.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
    quiet(axes)
    return figure, axes


def _class_names(hypergraph: Hypergraph, class_names: ClassNames | None) -> list[str]:
    """The names given, those of the vertices where these are the classes, or numbers."""
    num_classes = hypergraph.num_classes
    names = listed_names(class_names, num_classes)
    if names is not None:
        return names
    if np.array_equal(hypergraph.classes, np.arange(num_classes)):  # type: ignore[arg-type]
        return list(hypergraph.vertices)
    return [str(index) for index in range(num_classes)]
