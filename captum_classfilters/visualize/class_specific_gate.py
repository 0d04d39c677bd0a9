"""A gate beside the head's weights, mutual information, and correlation ordered by class."""

from collections.abc import Sequence

import torch
from torch import Tensor

from captum_classfilters._core.arguments import whole_number
from captum_classfilters._core.names import listed_names
from captum_classfilters._core.types import ClassNames
from captum_classfilters.gates import assign_filters, filter_correlation
from captum_classfilters.visualize.arrays import by_class, chosen, numbers_of, out_of
from captum_classfilters.visualize.class_filters import check_order
from captum_classfilters.visualize.figures import (
    SIGNED,
    UNSIGNED,
    FigureAndAxes,
    FigureAndGrid,
    axes_of,
    grid_of,
    headline,
    names_of,
    set_ticks,
)

_MOST_LINES = 60  # more of them between groups would hide the picture


def plot_gate_and_weight(
    gate: Tensor,
    weight: Tensor,
    *,
    other_weight: Tensor | None = None,
    class_names: ClassNames | None = None,
    order: str = "class",
    classes: int | Sequence[int | str] = 40,
    filters: int | Sequence[int] = 200,
    title: str | None = None,
    plt_fig_axis: FigureAndGrid | None = None,
) -> FigureAndGrid:
    r"""
    The gate, the head's weights, and their product, as heat maps one above the other.

    In a network with class-specific filters a class's open gates and its large weights are the same
    cells (Liang et al.'s figure of gate and weights). All maps have the same order of filters,
    given by the gate; weights share one scale.

    Args:

        gate (Tensor): Shape (C, K), the trained gate.
        weight (Tensor): Shape (C, K), the weight of the head behind the gated layer.
        other_weight (Tensor, optional): Shape (C, K), the head of a network without a gate, for
                    comparison. Its filters stand beside the class of their largest weight, as they
                    have nothing to do with the gate's.
                    Default: None
        class_names (sequence of str, optional): C names.
        order (str): ``"class"`` puts filters beside the class whose gate is highest, ``"index"`` keeps
                    their order.
                    Default: "class"
        classes (int or sequence): Draw at most so many classes, those with the largest products of
                    gate and weight; or these.
                    Default: 40
        filters (int or sequence): Draw at most so many filters, chosen likewise (of ``other_weight``
                    as many, those with the largest weights); or these.
                    Default: 200
        title (str, optional): Title of the figure.
        plt_fig_axis (tuple, optional): Figure and 3 axes, or 4 with ``other_weight``, to draw on;
                    new ones by default.

    Returns:
        *tuple* of figure and array of axes.

    Raises:
        ValueError: Shapes do not fit, the order is unknown, or a number is NaN or infinite.
    """
    check_order(order)
    gate, weight = numbers_of(gate, "The gates"), numbers_of(weight, "The weights")
    if gate.dim() != 2 or weight.shape != gate.shape or not gate.numel():
        raise ValueError(
            f"gate {tuple(gate.shape)} and weight {tuple(weight.shape)} do not fit; expected two "
            "matrices (C, K), not empty."
        )
    class_names = listed_names(class_names)
    names = names_of(class_names, len(gate))
    product = gate * weight
    rows = chosen(classes, product.abs().amax(1), "classes", class_names or ())
    columns = chosen(filters, product[rows].abs().amax(0), "filters")
    if order == "class":
        columns = columns[by_class(gate[rows][:, columns])]
    parts = [
        ("gate", gate[rows][:, columns], False),
        ("weight of the head", weight[rows][:, columns], True),
        ("gate times weight", product[rows][:, columns], True),
    ]
    if other_weight is not None:
        other = numbers_of(other_weight, "The other weights")
        if other.dim() != 2 or len(other) != len(gate):
            raise ValueError(
                f"other_weight has shape {tuple(other.shape)}; expected ({len(gate)}, K)."
            )
        shown = other[rows]
        most = filters if whole_number(filters) is not None else len(columns)
        beside = chosen(most, shown.abs().amax(0), "filters")
        if order == "class":
            beside = beside[by_class(shown[:, beside])]
        parts.append(("weight of the head, without a gate", shown[:, beside], True))
    limit = max(float(values.abs().max()) for _, values, signed in parts if signed) or 1.0
    width = max(7.0, min(14.0, 3.0 + 0.09 * len(columns)))
    height = max(1.5, min(5.0, 0.9 + 0.14 * len(rows)))
    figure, grid = grid_of(plt_fig_axis, len(parts), 1, (width, height * len(parts) + 0.3))
    grid = grid[:, 0]
    for axes, (name, values, signed) in zip(grid, parts, strict=True):
        image = axes.imshow(
            values.numpy(),
            aspect="auto",
            interpolation="nearest",
            cmap=SIGNED if signed else UNSIGNED,
            vmin=-limit if signed else 0.0,
            vmax=limit if signed else max(1.0, float(gate.max())),
        )
        set_ticks(axes, "y", [names[row] for row in rows.tolist()])
        axes.set_xticks([])
        axes.tick_params(labelsize=7)
        axes.set_title(name, loc="left", size=9)
        figure.colorbar(image, ax=axes, pad=0.01)
    told = [out_of(len(rows), len(gate), "classes"), out_of(len(columns), gate.shape[1], "filters")]
    for place, name in ((2, "highest gate"), (3, "largest weight")):
        if place < len(parts):
            by = f"filter, beside the class of its {name}" if order == "class" else "filter"
            grid[place].set_xlabel("; ".join(filter(None, [by, *told])), size=9)
    headline(figure, title, x=0.01, ha="left")
    return figure, grid


def plot_mutual_information(
    information: Tensor,
    *,
    bound: float | Tensor | None = None,
    class_names: ClassNames | None = None,
    order: str = "class",
    classes: int | Sequence[int | str] = 40,
    filters: int | Sequence[int] = 200,
    title: str | None = None,
    plt_fig_axis: FigureAndAxes | None = None,
) -> FigureAndAxes:
    r"""
    Mutual information of every class and filter as a heat map.

    Args:

        information (Tensor): Shape (C, K), from ``mutual_information_matrix``.
        bound (float or Tensor, optional): The largest value attainable, as the top of the scale; of
                    ``mutual_information_bound`` for example. By default the largest value drawn, so
                    that colors of two pictures do not compare.
                    Default: None
        class_names (sequence of str, optional): C names.
        order (str): ``"class"`` puts filters beside the class they tell most of, ``"index"`` keeps
                    their order.
                    Default: "class"
        classes (int or sequence): Draw at most so many classes, those with the most information; or
                    these.
                    Default: 40
        filters (int or sequence): Draw at most so many filters, chosen likewise; or these.
                    Default: 200
        title (str, optional): Title; by default with the mean over all filters of the highest value,
                    and the bound.
        plt_fig_axis (tuple, optional): Figure and axes to draw on; new ones by default.

    Returns:
        *tuple* of figure and axes.

    Raises:
        ValueError: The table is not a matrix, the order is unknown, or a number is NaN or infinite.
    """
    check_order(order)
    table = numbers_of(information, "The values of the information")
    if table.dim() != 2 or not table.numel():
        raise ValueError(f"information has shape {tuple(table.shape)}; expected (C, K), not empty.")
    most = None if bound is None else _highest_bound(bound, len(table))
    class_names = listed_names(class_names)
    names = names_of(class_names, len(table))
    rows = chosen(classes, table.amax(1), "classes", class_names or ())
    columns = chosen(filters, table[rows].amax(0), "filters")
    if order == "class":
        columns = columns[by_class(table[rows][:, columns])]
    shown = table[rows][:, columns]
    size = (max(7.0, min(14.0, 3.0 + 0.09 * len(columns))), max(2.4, 1.2 + 0.2 * len(rows)))
    figure, axes = axes_of(plt_fig_axis, size)
    image = axes.imshow(
        shown.numpy(),
        aspect="auto",
        interpolation="nearest",
        cmap=UNSIGNED,
        vmin=0.0,
        vmax=(float(shown.max()) if most is None else most) or 1.0,
    )
    set_ticks(axes, "y", [names[row] for row in rows.tolist()])
    axes.set_xticks([])
    axes.tick_params(labelsize=8)
    told = ["filter, beside the class it tells most of" if order == "class" else "filter"]
    told += [
        out_of(len(rows), len(table), "classes"),
        out_of(len(columns), table.shape[1], "filters"),
    ]
    axes.set_xlabel("; ".join(filter(None, told)))
    score = float(table.max(0).values.mean())
    limit = "" if most is None else f" of at most {most:.3f}"
    axes.set_title(title or f"mutual information; score {score:.3f}{limit}", loc="left", size=10)
    figure.colorbar(image, ax=axes, pad=0.01, label="nats")
    return figure, axes


def _highest_bound(bound: float | Tensor, num_classes: int) -> float:
    one = torch.tensor(bound, dtype=torch.float64) if isinstance(bound, float) else bound
    bounds = numbers_of(one, "The bounds")
    if bounds.numel() != 1 and bounds.shape != (num_classes,):
        raise ValueError(
            f"bound has shape {tuple(bounds.shape)}; expected a number, or one of each class, "
            f"({num_classes},)."
        )
    return float(bounds.max())


def plot_filter_correlation(
    weight: Tensor,
    scores: Tensor,
    *,
    class_names: ClassNames | None = None,
    filters: int | Sequence[int] = 400,
    title: str | None = None,
    plt_fig_axis: FigureAndAxes | None = None,
) -> FigureAndAxes:
    r"""
    Absolute cosine between filters' weights, filters grouped by their class.

    Where filters are class-specific, blocks on the diagonal stand out. Lines separate the groups; the
    title has the mean within and across groups of all filters.

    Args:

        weight (Tensor): Shape (K, ...), of the layer whose outputs are the filters.
        scores (Tensor): Shape (C, K): gates, contributions or mutual information; a
                    filter's class is the one with its highest score.
        class_names (sequence of str, optional): C names.
        filters (int or sequence): Draw at most so many filters, those with the largest scores; or
                    these.
                    Default: 400
        title (str, optional): Title.
        plt_fig_axis (tuple, optional): Figure and axes to draw on; new ones by default.

    Returns:
        *tuple* of figure and axes.

    Raises:
        ValueError: Shapes do not fit, or a number is NaN or infinite.
    """
    table, weight = numbers_of(scores, "The scores"), numbers_of(weight, "The weights")
    if table.dim() != 2 or table.shape[1] != len(weight) or not table.numel():
        raise ValueError(
            f"scores {tuple(table.shape)} do not fit {len(weight)} filters; expected "
            f"(C, {len(weight)}), not empty."
        )
    class_names = listed_names(class_names)
    names = names_of(class_names, len(table))
    columns = chosen(filters, table.abs().amax(0), "filters")
    columns = columns[by_class(table[:, columns])]
    all_owners, correlation = assign_filters(table), filter_correlation(weight)
    owner, shown = all_owners[columns], correlation[columns][:, columns]
    present = owner.unique().tolist()
    labels = [names[index] for index in present]
    beside = 0.06 * max(map(len, labels))  # inches of the longest label
    figure, axes = axes_of(plt_fig_axis, (6.0 + beside, 5.2 + beside))
    top = float(shown.max()) or 1.0
    image = axes.imshow(shown.numpy(), cmap=UNSIGNED, vmin=0.0, vmax=top, interpolation="nearest")
    edges = ((owner[1:] != owner[:-1]).nonzero()[:, 0] + 0.5).tolist()
    for edge in edges if len(edges) <= _MOST_LINES else []:
        axes.axhline(edge, color="white", linewidth=0.5)
        axes.axvline(edge, color="white", linewidth=0.5)
    middles = [float((owner == index).nonzero().double().mean()) for index in present]
    set_ticks(axes, "y", labels, middles)
    set_ticks(axes, "x", labels, middles, rotation=90)
    axes.tick_params(labelsize=8, length=0)
    if len(columns) < len(weight):
        axes.set_xlabel(out_of(len(columns), len(weight), "filters"), size=9)
    parts = [
        f"{where} {mean:.2f}"
        for where, mean in zip(
            ("within a class", "across"), _means(correlation, all_owners), strict=True
        )
        if mean == mean
    ]
    told = "\n".join(filter(None, ["absolute cosine of weights", ", ".join(parts)]))
    axes.set_title(title or told, loc="left", size=10)
    figure.colorbar(image, ax=axes)
    return figure, axes


def _means(correlation: Tensor, owner: Tensor) -> tuple[float, float]:
    """Mean over pairs of filters of one class, and of two; NaN without such pairs."""
    same = owner[:, None] == owner[None, :]
    pairs = ~torch.eye(len(owner), dtype=torch.bool)
    return float(correlation[same & pairs].mean()), float(correlation[~same].mean())
