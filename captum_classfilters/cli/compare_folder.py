"""Attributions compared on the user's own model and images."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from captum.attr import (
    Attribution,
    DeepLift,
    GradientShap,
    InputXGradient,
    IntegratedGradients,
    LayerConductance,
    LayerGradCam,
    Occlusion,
    Saliency,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from captum_classfilters._core.files import write_figure, write_text
from captum_classfilters._core.layers import find_layer
from captum_classfilters._core.results_folder import ResultsFolder
from captum_classfilters._core.types import Keywords
from captum_classfilters.attr import (
    ClassFilterSaliency,
    LayerFilterAblation,
    LayerFilterContribution,
    LayerFilterFrequency,
)
from captum_classfilters.cli.folder_classes import answers_of
from captum_classfilters.cli.folder_job import (
    FolderJob,
    open_folder,
    write_manifest,
    write_rows,
)
from captum_classfilters.gate_space import FilterGate
from captum_classfilters.identify import identify_class_filters
from captum_classfilters.metrics import compare_attributions
from captum_classfilters.metrics.compare_attributions import AttributionComparison

if TYPE_CHECKING:
    from torchvision.datasets import ImageFolder

STEPS = 20

#: A method, with the options of its ``attribute`` if it has some.
Compared = Attribution | tuple[Attribution, Keywords]


def _occlusion(model: nn.Module, layer: nn.Module, images: Tensor) -> Compared:
    side = max(1, images.shape[-1] // 7)
    window = {
        "sliding_window_shapes": (images.shape[1], side, side),
        "strides": (images.shape[1], side, side),
    }
    return Occlusion(model), window


def _integrated(model: nn.Module, layer: nn.Module, images: Tensor) -> Compared:
    return IntegratedGradients(model), {"n_steps": STEPS, "internal_batch_size": len(images)}


def _conductance(model: nn.Module, layer: nn.Module, images: Tensor) -> Compared:
    options = {"n_steps": STEPS, "internal_batch_size": len(images)}
    return LayerConductance(model, layer), options


def _gates(model: nn.Module, layer: nn.Module, images: Tensor) -> Compared:
    options = {"n_steps": STEPS, "internal_batch_size": len(images)}
    return IntegratedGradients(FilterGate(model, layer)), options


COMPARED: dict[str, Callable[[nn.Module, nn.Module, Tensor], Compared]] = {
    "saliency": lambda model, layer, images: Saliency(model),
    "input_x_gradient": lambda model, layer, images: InputXGradient(model),
    "integrated_gradients": _integrated,
    "gradient_shap": lambda model, layer, images: (
        GradientShap(model),
        {"baselines": torch.zeros_like(images[:1]), "stdevs": 0.1},
    ),
    "deep_lift": lambda model, layer, images: DeepLift(model),
    "occlusion": _occlusion,
    "grad_cam": lambda model, layer, images: LayerGradCam(model, layer),
    "contribution": lambda model, layer, images: LayerFilterContribution(model, layer),
    "ablation": lambda model, layer, images: LayerFilterAblation(model, layer),
    "frequency": lambda model, layer, images: LayerFilterFrequency(model, layer),
    "conductance": _conductance,
    "gate_integrated_gradients": _gates,
}
CLASS_FILTERS = "class_filters"
DEFAULT = (
    "saliency",
    "integrated_gradients",
    "grad_cam",
    CLASS_FILTERS,
    "contribution",
    "ablation",
    "frequency",
)


def run_compare(job: FolderJob, write: Callable[[str], None] = print) -> AttributionComparison:
    r"""
    Compare attributions of a model on an image folder, and write the results.

    ``job.limit`` images, spread evenly over the folder, are explained for the class that the model
    gives them. For ``"class_filters"`` each class's filters are found on the folder's other images.
    For each table a CSV with means and intervals, the picture grid, the printed tables, and last of
    all ``manifest.json``.

    Args:

        job (FolderJob): What to do; ``explain`` is the number of images to draw.
        write (Callable): Where the report goes.
                    Default: print

    Returns:
        *AttributionComparison*.

    Raises:
        ValueError, OSError: With what was wrong, and what would be right.
    """
    opened = open_folder(job, (*COMPARED, CLASS_FILTERS), write)
    model, dataset, names, output = (
        opened.model,
        opened.dataset,
        opened.class_names,
        opened.output,
    )
    layer = find_layer(model, opened.layer)
    chosen = opened.images
    images = torch.stack([chosen[place][0] for place in range(len(chosen))]).to(job.device)
    with torch.no_grad():
        targets = answers_of(model, images.split(job.batch_size))
    methods = {
        name: _class_filters(model, layer, job, dataset, chosen, targets, names)
        if name == CLASS_FILTERS
        else COMPARED[name](model, layer, images[: job.batch_size])
        for name in job.methods
    }
    comparison = compare_attributions(
        model,
        methods,
        images,
        targets,
        batch_size=job.batch_size,
        pictures=max(1, job.explain),
        show_progress=job.show_progress,
    )
    write(str(comparison))  # first, so that a full disk costs the files alone
    if comparison.maps and job.explain:
        _draw(output, comparison, names)
    _write_results(output, job, comparison, len(images))
    write(f"\nTables, pictures and manifest.json are in {output.path}")
    return comparison


def _class_filters(
    model: nn.Module,
    layer: nn.Module,
    job: FolderJob,
    dataset: "ImageFolder",
    chosen: Subset[object],
    targets: Tensor,
    names: list[str],
) -> ClassFilterSaliency:
    """Saliency through class filters found on images that are not compared."""
    compared = set(chosen.indices)
    others = [place for place in range(len(dataset)) if place not in compared]
    if not others:
        raise ValueError(
            f"All {len(dataset)} images are compared, which leaves none to find class filters on; "
            "lower --limit, or leave class_filters out."
        )
    table = identify_class_filters(
        LayerFilterContribution(model, layer),
        DataLoader(Subset(dataset, others), batch_size=job.batch_size),
        num_filters=job.num_filters,
        class_names=names,
        device=job.device,
        show_progress=job.show_progress,
    )
    without = sorted({row for row in targets.tolist() if not bool(table.selected[row].any())})
    if without:
        raise ValueError(
            "The model takes images for the classes "
            f"{', '.join(table.class_names[row] for row in without)}, of which the folder's other images "
            "show none, so that they have no class filters; add images, or leave class_filters out "
            "of --method."
        )
    return ClassFilterSaliency(model, layer, table)


def _draw(output: ResultsFolder, comparison: AttributionComparison, names: list[str]) -> None:
    from captum_classfilters.visualize import plot_comparison

    figure, _ = plot_comparison(comparison, class_names=names)
    write_figure(output.place("comparison.png"), figure)


def _write_results(
    output: ResultsFolder, job: FolderJob, comparison: AttributionComparison, num_images: int
) -> None:
    tables = {"pixels": comparison.pixels, "filters": next(iter(comparison.filters.values()), None)}
    for name, table in tables.items():
        if table is None:
            continue
        write_rows(output.place(f"{name}.csv"), table.rows())
    write_text(output.place("comparison.txt"), f"{comparison}\n")
    write_manifest(output, job, num_images)
