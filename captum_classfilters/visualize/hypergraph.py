"""Hypergraphs of class separation, and their scores against depth."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from captum_classfilters.spectral import Hypergraph, SeparationTest
from captum_classfilters.visualize.figures import COLOURS, GREY, axes_of, quiet

_LABELS = {
    "jaccard": "mean Jaccard similarity of classes",
    "components": "connected components",
    "purity": "mean purity of directions",
    "single_class_share": "share of directions with one class",
}


def plot_hypergraph(
    hypergraph: Hypergraph,
    *,
    style: Literal["incidence", "bands"] = "incidence",
    class_names: Sequence[str] | None = None,
    title: str | None = None,
    plt_fig_axis: tuple[Any, Any] | None = None,
) -> tuple[Any, Any]:
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
        raise ValueError("The hypergraph has no incidences; lower the threshold of its rule.")
    if style == "bands":
        figure, axes = axes_of(plt_fig_axis, (5.6, 4.0))
        converted = hypergraph.to_hypernetx()
        import hypernetx

        hypernetx.drawing.rubber_band.draw(
            converted,
            ax=axes,
            layout_kwargs={"seed": 0},
            edge_labels_kwargs={"fontsize": 8},
            node_labels_kwargs={"fontsize": 9},
        )
        axes.set_title(title or "", loc="left")
        return figure, axes
    if hypergraph.classes is None:
        raise ValueError("The hypergraph is a dual, whose vertices have no classes.")
    share = np.zeros((hypergraph.num_classes, len(hypergraph.edges)))
    np.add.at(share, hypergraph.classes, hypergraph.incidence)
    count = np.bincount(hypergraph.classes, minlength=hypergraph.num_classes)
    share = share / np.maximum(count, 1)[:, None]
    used = np.flatnonzero(share.any(0))
    strongest = share[:, used].argmax(0)
    used = used[np.lexsort((strongest, (share[:, used] > 0).sum(0)))]
    width = min(16.0, 2.2 + 0.2 * len(used))
    figure, axes = axes_of(plt_fig_axis, (max(width, 5.0), 1.4 + 0.26 * len(share)))
    image = axes.imshow(share[:, used], cmap="Blues", vmin=0, vmax=1, aspect="auto")
    names = _names(hypergraph, class_names)
    axes.set_yticks(range(len(names)), names)
    axes.set_xticks(range(len(used)), [hypergraph.edges[edge] for edge in used], rotation=90)
    axes.set_xticks(np.arange(1, len(used)) - 0.5, minor=True)
    axes.set_yticks(np.arange(1, len(names)) - 0.5, minor=True)
    axes.grid(which="minor", color="white", lw=1)
    axes.tick_params(which="minor", length=0)
    axes.tick_params(labelsize=8)
    axes.set_xlabel("direction, those of few classes first")
    axes.set_title(title or "classes and the directions they are in", loc="left")
    if len(hypergraph.vertices) > hypergraph.num_classes:
        figure.colorbar(image, ax=axes, label="share of the class's images", pad=0.01)
    return figure, axes


def plot_class_separation(
    tests: Mapping[str, SeparationTest],
    *,
    score: Literal["jaccard", "components", "purity", "single_class_share"] = "jaccard",
    level: float = 0.05,
    title: str | None = None,
    plt_fig_axis: tuple[Any, Any] | None = None,
) -> tuple[Any, Any]:
    r"""
    A separation score layer by layer, beside what permuted labels give.

    Args:

        tests (mapping): Layer names, in order of depth, and their
                    :class:`~captum_classfilters.spectral.SeparationTest`.
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
        ValueError: There are no layers, or the score is unknown.
    """
    if not tests:
        raise ValueError("There are no layers to draw.")
    if score not in _LABELS:
        raise ValueError(f"score={score!r}; choose one of {list(_LABELS)}.")
    figure, axes = axes_of(plt_fig_axis, (max(5.0, 1.8 + 0.28 * len(tests)), 3.4))
    places = np.arange(len(tests))
    observed = np.array([test.observed[score] for test in tests.values()])
    bands = np.full((3, len(tests)), np.nan)
    for place, test in enumerate(tests.values()):
        drawn = test.null[score][~np.isnan(test.null[score])]
        if len(drawn):
            bands[:, place] = np.quantile(drawn, [0.025, 0.5, 0.975])
    axes.fill_between(places, bands[0], bands[2], color=GREY, alpha=0.25, lw=0)
    axes.plot(places, bands[1], color=GREY, lw=1, label="permuted labels, median and 95 %")
    axes.plot(places, observed, color=COLOURS[0], lw=1.5)
    significant = np.array([test.p_values[score] <= level for test in tests.values()])
    for chosen, face, label in (
        (significant, COLOURS[0], f"true labels, p ≤ {level:g}"),
        (~significant, "white", f"true labels, p > {level:g}"),
    ):
        if chosen.any():
            options = {"c": face, "edgecolors": COLOURS[0], "zorder": 3, "s": 28}
            axes.scatter(places[chosen], observed[chosen], label=label, **options)
    axes.set_xticks(places, list(tests), rotation=90)
    axes.tick_params(labelsize=8)
    axes.set_ylabel(_LABELS[score])
    axes.set_title(title or "class separation against depth", loc="left")
    axes.legend(frameon=False, fontsize=8)
    quiet(axes)
    return figure, axes


def _names(hypergraph: Hypergraph, class_names: Sequence[str] | None) -> list[str]:
    if len(hypergraph.vertices) == hypergraph.num_classes:
        return list(hypergraph.vertices)
    return [str(name) for name in class_names or range(hypergraph.num_classes)]
