"""Spectra of weights: eigenvalues with their fits, exponents against depth."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import numpy as np

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters.spectral.marchenko_pastur import positive_numbers
from captum_classfilters.spectral.model_spectra import (
    LayerSpectrum,
    ModelSpectra,
    SpectraComparison,
)
from captum_classfilters.visualize.figures import (
    COLORS,
    GRAY,
    FigureAndAxes,
    FigureAndGrid,
    axes_of,
    grid_of,
    headline,
    quiet,
    set_ticks,
    short_names,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.patches import Rectangle

_MARKERS = "osD^v"


@arguments_checked
def plot_spectrum(
    spectrum: LayerSpectrum,
    *,
    title: str | None = None,
    plt_fig_axis: FigureAndGrid | None = None,
) -> FigureAndGrid:
    r"""
    Eigenvalues of a layer's weight with the Marchenko-Pastur law of the bulk and the tail's power law.

    On the left the density of all eigenvalues that are not zero, with the law of a random matrix
    scaled to the share of eigenvalues in the bulk, and a tick for each eigenvalue above its edge. On
    the right the share of eigenvalues above each one, on logarithmic axes, where a power law is a
    straight line of slope :math:`1 - \alpha`.

    Args:

        spectrum (LayerSpectrum): From :func:`captum_classfilters.spectral.model_spectra`.
        title (str, optional): Title.
        plt_fig_axis (tuple, optional): Figure and a pair of axes to draw on; new ones by default.

    Returns:
        *tuple* of figure and the pair of axes.
    """
    figure, grid = grid_of(plt_fig_axis, 1, 2, (9.6, 3.8))
    pair = grid[0]
    values = positive_numbers(spectrum.values)
    _draw_bulk(pair[0], spectrum, values)
    _draw_tail(pair[1], spectrum, values)
    rows, columns = spectrum.shape
    headline(figure, title, f"{spectrum.name}, {rows} by {columns}", x=0.01, ha="left")
    return figure, pair


def _draw_bulk(axes: "Axes", spectrum: LayerSpectrum, values: np.ndarray) -> None:
    fit = spectrum.marchenko_pastur
    outliers = values[len(values) - fit.num_outliers :]
    # Bins that resolve the bulk, which outliers may make a small part of the axis.
    in_bulk = (fit.law.upper - fit.law.lower) / np.clip((len(values) - len(outliers)) ** 0.5, 4, 40)
    num_bins = int(np.clip(values[-1] / in_bulk, 8, 120))
    axes.hist(
        values,
        bins=np.linspace(0, values[-1], num_bins + 1).tolist(),
        density=True,
        color=COLORS[5],
        alpha=0.6,
        label=f"{len(values)} eigenvalues",
    )
    grid = np.linspace(max(fit.law.lower, values[-1] * 1e-4), fit.law.upper, 600)
    bulk = 1 - len(outliers) / len(values)
    density = bulk * fit.law.density(grid)
    axes.plot(grid, density, color=COLORS[1], label="Marchenko-Pastur")
    if len(outliers):
        base = [0.02] * len(outliers)
        axes.plot(
            outliers,
            base,
            "|",
            color=COLORS[0],
            markersize=12,
            transform=axes.get_xaxis_transform(),
            label=f"{len(outliers)} above the edge",
        )
    # A square matrix' density has a pole at zero; the histogram sets the height.
    highest = max(bar.get_height() for bar in cast("list[Rectangle]", axes.patches))
    axes.set_ylim(0, 1.15 * max(highest, float(np.quantile(density, 0.9))))
    axes.set_xlabel("eigenvalue $S^2/d$ of the weight")
    axes.set_ylabel("density")
    axes.legend(frameon=False)
    quiet(axes)


def _draw_tail(axes: "Axes", spectrum: LayerSpectrum, values: np.ndarray) -> None:
    law = spectrum.power_law
    above = 1 - np.arange(len(values)) / len(values)
    axes.plot(values, above, ".", color=COLORS[5], markersize=4, label="eigenvalues")
    x = np.geomspace(law.minimum, values[-1], 50)
    share = law.num_tail / len(values)
    axes.plot(
        x,
        share * (x / law.minimum) ** (1 - law.alpha),
        color=COLORS[0],
        label=f"power law, exponent {law.alpha:.2f} ± {law.standard_error:.2f} ({spectrum.verdict})",
    )
    axes.axvline(law.minimum, color=GRAY, linestyle=":", linewidth=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    # Eigenvalues near zero would take most of a logarithmic axis.
    left = max(values[0], values[-1] * 1e-4)
    axes.set_xlim(left * 0.95, values[-1] * 1.1)
    ticks = np.geomspace(left, values[-1], 4)
    axes.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])
    axes.xaxis.minorticks_off()
    axes.set_xlabel("eigenvalue")
    axes.set_ylabel("share of eigenvalues at least as large")
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 0.98))
    quiet(axes)


def plot_exponents(
    spectra: ModelSpectra | SpectraComparison | Mapping[str, ModelSpectra],
    *,
    title: str | None = None,
    plt_fig_axis: FigureAndAxes | None = None,
) -> FigureAndAxes:
    r"""
    Power-law exponents of a model's layers against depth, on a logarithmic axis.

    Bands show the verdicts ``"good"`` (exponent up to 3) and ``"fair"`` (up to 4.5). Give several
    models, a network and its random twin or a network at several epochs, to compare them.

    Args:

        spectra (ModelSpectra, SpectraComparison or mapping of ModelSpectra): From
                    :func:`captum_classfilters.spectral.model_spectra` or
                    :func:`captum_classfilters.spectral.compare_with_random`; several models must
                    have the same layers.
        title (str, optional): Title.
        plt_fig_axis (tuple, optional): Figure and axes to draw on; new ones by default.

    Returns:
        *tuple* of figure and axes.

    Raises:
        ValueError: There is no model, or the models have different layers.
    """
    if isinstance(spectra, SpectraComparison):
        spectra = {"model": spectra.model, "random twin": spectra.twin}
    models = dict(spectra) if isinstance(spectra, Mapping) else {"": spectra}
    if not models:
        raise ValueError("spectra is empty; pass at least one model's.")
    names = [layer.name for layer in next(iter(models.values()))]
    for label, model in models.items():
        if [layer.name for layer in model] != names:
            raise ValueError(f"The layers of {label!r} are not those of the first model.")
    figure, axes = axes_of(plt_fig_axis, (max(6.4, 1.5 + 0.28 * min(len(names), 40)), 4.2))
    axes.axhspan(1, 3, color=COLORS[2], alpha=0.15, linewidth=0)
    axes.axhspan(3, 4.5, color=COLORS[4], alpha=0.15, linewidth=0)
    for text, height in (("good", 1.05), ("fair", 3.1)):
        axes.annotate(text, (1.01, height), xycoords=("axes fraction", "data"), color=GRAY)
    place = np.arange(len(names))
    labels = dict(zip(models, short_names(models, synonyms=False), strict=True))
    for index, (label, model) in enumerate(models.items()):
        axes.errorbar(
            place,
            [layer.power_law.alpha for layer in model],
            yerr=[layer.power_law.standard_error for layer in model],
            color=COLORS[index % len(COLORS)],
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=5,
            linewidth=1,
            elinewidth=0.7,
            label=f"{labels[label]}, universal metric {model.universal_metric:.2f}".removeprefix(
                ", "
            ),
        )
    axes.set_yscale("log")
    highest = max(layer.power_law.alpha for model in models.values() for layer in model)
    ticks = [tick for tick in (1, 2, 3, 5, 10, 20, 50, 100, 200) if tick <= 1.6 * highest]
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(1, 1.4 * max(highest, 4.5))
    set_ticks(axes, "x", names, rotation=90 if len(names) > 6 else 0, fontsize=8)
    axes.set_ylabel("power-law exponent ± its standard error")
    headline(figure, title, "exponents of the layers' spectra", x=0.01, ha="left")
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    quiet(axes)
    return figure, axes
