"""Pixel attributions of a comparison beside each other."""

from typing import TYPE_CHECKING, Any

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.names import names_that_cover
from captum_classfilters._core.types import ClassNames
from captum_classfilters.visualize.explanations import plot_explanations
from captum_classfilters.visualize.figures import FigureAndGrid

if TYPE_CHECKING:
    from captum_classfilters.metrics.compare_attributions import AttributionComparison


@arguments_checked
def plot_comparison(
    comparison: "AttributionComparison",
    *,
    images: int | None = None,
    class_names: ClassNames | None = None,
    plt_fig_axis: FigureAndGrid | None = None,
    **options: Any,
) -> FigureAndGrid:
    r"""
    A grid of a comparison's first images and the pixel attributions of each method.

    Args:

        comparison (AttributionComparison): From
                    :func:`captum_classfilters.metrics.compare_attributions`.
        images (int, optional): How many of the images it kept; all by default.
        class_names (sequence of str, optional): C names; by default the classes' numbers.
        plt_fig_axis (tuple, optional): Figure and images (1 + number of methods) axes to draw on;
                    new ones by default.
        options: Further arguments of :func:`plot_explanations`.

    Returns:
        *tuple* of figure and array of axes (images, 1 + number of methods).

    Raises:
        ValueError: No method explains pixels, ``images`` is below 1, or a class has no name.
    """
    if not comparison.maps:
        raise ValueError(
            "No method of the comparison explains pixels; filters have no map to draw."
        )
    if images is not None and images < 1:
        raise ValueError(f"images={images}; expected a positive number.")
    num_images = len(comparison.images) if images is None else images
    targets = comparison.targets[:num_images]
    names = names_that_cover(class_names, comparison.targets)
    titles = [names[target] if names is not None else f"class {target}" for target in targets]
    return plot_explanations(
        comparison.images[:num_images],
        {name: maps[:num_images] for name, maps in comparison.maps.items()},
        **{"titles": titles, "plt_fig_axis": plt_fig_axis, **options},
    )
