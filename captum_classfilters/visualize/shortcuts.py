"""Outputs that a shortcut raises, and what repairs change."""

import torch

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.names import counted, plural
from captum_classfilters.answers.confusion import ConfusionRepair
from captum_classfilters.answers.repair import Repair, edited_units
from captum_classfilters.answers.shortcuts import Shortcuts
from captum_classfilters.visualize.arrays import out_of
from captum_classfilters.visualize.figures import (
    COLORS,
    GRAY,
    POSITIVE,
    FigureAndAxes,
    axes_of,
    quiet,
    short_names,
)


@arguments_checked
def plot_shortcuts(
    result: Shortcuts | Repair,
    *,
    most: int = 12,
    title: str | None = None,
    plt_fig_axis: FigureAndAxes | None = None,
) -> FigureAndAxes:
    r"""
    The outputs that a shortcut raises, with the filters that carry it; or what a repair changes.

    Of shortcuts, bars are the rise of an output's score in standard deviations over images without
    it; beside them stand the images that it is the largest for, without and with, and its strongest
    filters. Of a repair, dots are shares of images before and after it and after random edits, and
    lines the paired intervals of the change.

    Args:

        result (Shortcuts or Repair): From :func:`captum_classfilters.answers.find_shortcuts` or
                    :func:`captum_classfilters.answers.repair`.
        most (int): Draw at most so many outputs.
                    Default: 12
        title (str, optional): Title.
        plt_fig_axis (tuple, optional): Figure and axes to draw on; new ones by default.

    Returns:
        *tuple* of figure and axes.

    Raises:
        ValueError: ``most`` is below 1.
    """
    if most < 1:
        raise ValueError(f"most={most}; expected a positive number.")
    if isinstance(result, Repair):
        return _draw_repair(result, title, plt_fig_axis)
    return _draw_shortcuts(result, most, title, plt_fig_axis)


@arguments_checked
def plot_confusion_repair(
    repair: ConfusionRepair,
    *,
    title: str | None = None,
    plt_fig_axis: FigureAndAxes | None = None,
) -> FigureAndAxes:
    r"""
    What a repair of a confusion changes: the cell, and what it costs elsewhere.

    Dots are changes in points of each row's images, with Tango's paired intervals; beside them stand a
    lowered bias and random edits of the same size. Shares before and after stand beside the rows.

    Args:

        repair (ConfusionRepair): From :func:`captum_classfilters.answers.repair_confusion`.
        title (str, optional): Title.
        plt_fig_axis (tuple, optional): Figure and axes to draw on; new ones by default.

    Returns:
        *tuple* of figure and axes.
    """
    figure, axes = axes_of(plt_fig_axis, (7.2, 3.2))
    rows, shares = range(len(repair.counts)), 100 * repair.shares
    changes, interval = shares - shares[:, :1], 100 * repair.interval()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.hlines(rows, interval[:, 0].numpy(), interval[:, 1].numpy(), color=COLORS[0], linewidth=1)
    if shares.shape[1] > 3:
        random = changes[:, 3:].mean(1)
        axes.plot(random.numpy(), rows, "x", color=GRAY, label="random edits, mean")
    bias = changes[:, 2].numpy()
    axes.plot(bias, rows, "s", color=COLORS[1], fillstyle="none", label="a lowered bias")
    axes.plot(changes[:, 1].numpy(), rows, "o", color=COLORS[0], label="the edit")
    true, predicted = short_names([repair.true, repair.predicted])
    names = (
        f"{true}, taken for\n{predicted}",
        f"{true}, right",
        f"{predicted}, right",
        "other classes, right",
        "all, right",
    )
    told = [
        f"{name}\n{before:.1f} → {after:.1f} %" if count else f"{name}\nno image"
        for name, (before, after), count in zip(
            names, shares[:, :2].tolist(), repair.counts.tolist(), strict=True
        )
    ]
    axes.set_yticks(rows, told, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("change, points of these images")
    size = int(repair.removed.sum())
    edited = (
        f"{size:,} of the head's {counted(repair.removed.numel(), 'weight')} edited"
        if size
        else "No edit was found: model unchanged"
    )
    axes.set_title(title or edited, loc="left", fontsize=10)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    axes.grid(axis="x", color="0.9")
    quiet(axes)
    return figure, axes


def _draw_shortcuts(
    shortcuts: Shortcuts, most: int, title: str | None, plt_fig_axis: FigureAndAxes | None
) -> FigureAndAxes:
    shown = shortcuts.outputs[:most].tolist()
    figure, axes = axes_of(plt_fig_axis, (7.0, 1.3 + 0.3 * max(1, len(shown))))
    sizes = (shortcuts.output_change / shortcuts.output_spread)[shown].nan_to_num(posinf=0.0)
    axes.barh(range(len(shown)), sizes.numpy(), color=POSITIVE, alpha=0.75)
    names = short_names(shortcuts.class_names[output] for output in shown)
    axes.set_yticks(range(len(shown)), names, fontsize=8)
    axes.invert_yaxis()
    for row, output in enumerate(shown):
        before, after = shortcuts.predicted[output].tolist()
        filters = shortcuts.carriers(output, 3).tolist()
        text = f" {before:,} → {counted(after, 'image')}"
        if filters:
            text += f"; {plural(len(filters), 'filter')} {', '.join(map(str, filters))}"
        axes.text(float(sizes[row]), row, text, va="center", fontsize=7)
    axes.set_xlim(0, 1.8 * float(sizes.max()) if len(shown) and float(sizes.max()) > 0 else 1)
    axes.set_xlabel("rise of the output, standard deviations without it")
    told = f"carried by {counted(len(shortcuts.filters), 'filter')} of {shortcuts.head}"
    count = out_of(len(shown), len(shortcuts.outputs), "outputs") or counted(len(shown), "output")
    axes.set_title(title or f"{told}, into {count}", loc="left", fontsize=10)
    quiet(axes)
    return figure, axes


def _draw_repair(
    repair: Repair, title: str | None, plt_fig_axis: FigureAndAxes | None
) -> FigureAndAxes:
    figure, axes = axes_of(plt_fig_axis, (7.0, 2.8))
    shares = torch.cat([repair.accuracy, repair.taken_rate])
    interval = repair.interval().transpose(0, 1).reshape(4, 2)
    rows = range(4)
    before, after = (100 * shares[:, place] for place in range(2))
    ends = 100 * (shares[:, :1] + interval)
    axes.hlines(rows, ends[:, 0].numpy(), ends[:, 1].numpy(), color=COLORS[0], linewidth=1)
    if shares.shape[1] > 2:
        random = 100 * shares[:, 2:].mean(1)
        axes.plot(random.numpy(), rows, "x", color=GRAY, label="random edits, mean")
    axes.plot(before.numpy(), rows, "o", color="black", fillstyle="none", label="before")
    axes.plot(after.numpy(), rows, "o", color=COLORS[0], label="after")
    told = repair.outputs[0] if len(repair.outputs) == 1 else counted(len(repair.outputs), "output")
    (taken,) = short_names([f"taken for {told}"])
    names = [f"{name}, {where}" for name in ("accuracy", taken) for where in ("without", "with")]
    axes.set_yticks(rows, names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("% of the images")
    edited = f"{edited_units(repair.edit, repair.size)} edited"
    axes.set_title(title or edited, loc="left", fontsize=10)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    axes.grid(axis="x", color="0.9")
    quiet(axes)
    return figure, axes
