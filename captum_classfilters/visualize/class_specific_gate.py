"""A gate beside the head's weights, mutual information, and correlation ordered by class."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from captum_classfilters.gates import assign_filters, filter_correlation
from captum_classfilters.visualize.class_filters import _by_class, _ticks
from captum_classfilters.visualize.figures import axes_of, new_figure


def plot_gate_and_weight(
    gate: Tensor,
    weight: Tensor,
    *,
    other_weight: Tensor | None = None,
    class_names: Sequence[str] | None = None,
    order: str = "class",
    title: str | None = None,
) -> tuple[Any, Any]:
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
        title (str, optional): Title of the figure.

    Returns:
        *tuple* of figure and array of axes.

    Raises:
        ValueError: Shapes do not fit, or the order is unknown.
    """
    if order not in ("class", "index"):
        raise ValueError(f"order={order!r}; choose 'class' or 'index'.")
    gate, weight = _table(gate), _table(weight)
    if gate.dim() != 2 or weight.shape != gate.shape:
        raise ValueError(
            f"gate {tuple(gate.shape)} and weight {tuple(weight.shape)} do not fit; expected two "
            "matrices (C, K)."
        )
    columns = _by_class(gate) if order == "class" else torch.arange(gate.shape[1])
    parts = [
        ("gate", gate[:, columns], False),
        ("weight of the head", weight[:, columns], True),
        ("gate times weight", (gate * weight)[:, columns], True),
    ]
    if other_weight is not None:
        other = _table(other_weight)
        if other.dim() != 2 or len(other) != len(gate):
            raise ValueError(
                f"other_weight has shape {tuple(other.shape)}; expected ({len(gate)}, K)."
            )
        by_weight = _by_class(other) if order == "class" else torch.arange(other.shape[1])
        parts.append(("weight of the head, without a gate", other[:, by_weight], True))
    limit = max(float(values.abs().max()) for _, values, signed in parts if signed) or 1.0
    width = max(7.0, min(14.0, 3.0 + 0.09 * gate.shape[1]))
    height = max(1.5, min(5.0, 0.9 + 0.14 * len(gate)))
    figure = new_figure((width, height * len(parts) + 0.3))
    grid = figure.subplots(len(parts), 1, squeeze=False)[:, 0]
    for axes, (name, values, signed) in zip(grid, parts, strict=True):
        image = axes.imshow(
            values.numpy(),
            aspect="auto",
            interpolation="nearest",
            cmap="RdBu_r" if signed else "viridis",
            vmin=-limit if signed else 0.0,
            vmax=limit if signed else max(1.0, float(gate.max())),
        )
        _ticks(axes.set_yticks, _names(class_names, len(values)))
        axes.set_xticks([])
        axes.tick_params(labelsize=7)
        axes.set_title(name, loc="left", size=9)
        figure.colorbar(image, ax=axes, pad=0.01)
    for place, name in ((2, "highest gate"), (3, "largest weight")):
        if place < len(parts):
            beside = f"filter, beside the class of its {name}" if order == "class" else "filter"
            grid[place].set_xlabel(beside, size=9)
    if title is not None:
        figure.suptitle(title, x=0.01, ha="left")
    return figure, grid


def plot_mutual_information(
    information: Tensor,
    *,
    bound: float | None = None,
    class_names: Sequence[str] | None = None,
    order: str = "class",
    title: str | None = None,
    plt_fig_axis: tuple[Any, Any] | None = None,
) -> tuple[Any, Any]:
    r"""
    Mutual information of every filter and class as a heat map, classes by filters.

    Args:

        information (Tensor): Shape (K, C), from ``mutual_information_matrix``.
        bound (float, optional): The largest value attainable, as the top of the scale; of
                    ``mutual_information_bound``, say. By default the largest value found, so that
                    colours of two pictures do not compare.
                    Default: None
        class_names (sequence of str, optional): C names.
        order (str): ``"class"`` puts filters beside the class they tell most of, ``"index"`` keeps
                    their order.
                    Default: "class"
        title (str, optional): Title; by default with the mean over filters of the highest value,
                    and the bound.
        plt_fig_axis (tuple, optional): Figure and axes to draw on; new ones by default.

    Returns:
        *tuple* of figure and axes.

    Raises:
        ValueError: The table is not a matrix, or the order is unknown.
    """
    if order not in ("class", "index"):
        raise ValueError(f"order={order!r}; choose 'class' or 'index'.")
    if information.dim() != 2:
        raise ValueError(f"information has shape {tuple(information.shape)}; expected (K, C).")
    table = _table(information).T
    columns = _by_class(table) if order == "class" else torch.arange(table.shape[1])
    size = (max(7.0, min(14.0, 3.0 + 0.09 * table.shape[1])), max(2.4, 1.2 + 0.2 * len(table)))
    figure, axes = axes_of(plt_fig_axis, size)
    image = axes.imshow(
        table[:, columns].numpy(),
        aspect="auto",
        interpolation="nearest",
        cmap="viridis",
        vmin=0.0,
        vmax=(bound if bound is not None else float(table.max())) or 1.0,
    )
    _ticks(axes.set_yticks, _names(class_names, len(table)))
    axes.set_xticks([])
    axes.tick_params(labelsize=8)
    axes.set_xlabel("filter, beside the class it tells most of" if order == "class" else "filter")
    score = float(table.max(0).values.mean())
    most = "" if bound is None else f" of at most {bound:.3f}"
    axes.set_title(title or f"mutual information; score {score:.3f}{most}", loc="left", size=10)
    figure.colorbar(image, ax=axes, pad=0.01, label="nats")
    return figure, axes


def plot_filter_correlation(
    weight: Tensor,
    scores: Tensor,
    *,
    class_names: Sequence[str] | None = None,
    title: str | None = None,
    plt_fig_axis: tuple[Any, Any] | None = None,
) -> tuple[Any, Any]:
    r"""
    Absolute cosine between filters' weights, filters grouped by their class.

    Where filters are class-specific, blocks on the diagonal stand out. Lines separate the groups; the
    title has the mean within and across groups.

    Args:

        weight (Tensor): Shape (K, ...), of the layer whose outputs are the filters.
        scores (Tensor): Shape (C, K): gates, contributions or transposed mutual information; a
                    filter's class is the one with its highest score.
        class_names (sequence of str, optional): C names.
        title (str, optional): Title.
        plt_fig_axis (tuple, optional): Figure and axes to draw on; new ones by default.

    Returns:
        *tuple* of figure and axes.

    Raises:
        ValueError: Shapes do not fit.
    """
    if scores.dim() != 2 or scores.shape[1] != len(weight):
        raise ValueError(
            f"scores {tuple(scores.shape)} do not fit {len(weight)} filters; expected "
            f"(C, {len(weight)})."
        )
    table = _table(scores)
    columns = _by_class(table)
    owner = assign_filters(table)[columns]
    correlation = filter_correlation(weight).cpu()[columns][:, columns]
    figure, axes = axes_of(plt_fig_axis, (6.4, 5.6))
    image = axes.imshow(correlation.numpy(), cmap="viridis", vmin=0.0, interpolation="nearest")
    edges = (owner[1:] != owner[:-1]).nonzero()[:, 0] + 0.5
    for edge in edges.tolist():
        axes.axhline(edge, color="white", linewidth=0.5)
        axes.axvline(edge, color="white", linewidth=0.5)
    names = _names(class_names, len(table))
    present = owner.unique().tolist()
    middles = [float((owner == class_).nonzero().double().mean()) for class_ in present]
    axes.set_yticks(middles, [names[class_] for class_ in present])
    axes.set_xticks(middles, [names[class_] for class_ in present], rotation=90)
    axes.tick_params(labelsize=8, length=0)
    within, across = _means(correlation, owner)
    shown = f"absolute cosine of weights: within a class {within:.2f}, across {across:.2f}"
    axes.set_title(title or shown, loc="left", size=10)
    figure.colorbar(image, ax=axes)
    return figure, axes


def _means(correlation: Tensor, owner: Tensor) -> tuple[float, float]:
    """Mean over pairs of filters of one class, and of two."""
    same = owner[:, None] == owner[None, :]
    pairs = ~torch.eye(len(owner), dtype=torch.bool)
    return float(correlation[same & pairs].mean()), float(correlation[~same].mean())


def _table(values: Tensor) -> Tensor:
    if not isinstance(values, Tensor):
        raise ValueError(f"Expected a Tensor, such as gate.weight; got {type(values).__name__}.")
    return values.detach().cpu().double()


def _names(class_names: Sequence[str] | None, number: int) -> list[str]:
    if class_names is None:
        return [str(class_) for class_ in range(number)]
    if len(class_names) != number:
        raise ValueError(f"{len(class_names)} class names for {number} classes.")
    return list(class_names)
