"""The main job on the user's own model and images."""

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.data import Subset

from captum_classfilters._core.files import write_figure
from captum_classfilters._core.names import short_name
from captum_classfilters._core.results_folder import ResultsFolder
from captum_classfilters._core.tables import text_table
from captum_classfilters.atlas.pictures import integrated_gradients
from captum_classfilters.attr import (
    ClassFilterSaliency,
    LayerFilterContribution,
    LayerFilterFrequency,
)
from captum_classfilters.class_filters import ClassFilters
from captum_classfilters.cli.folder_classes import num_outputs
from captum_classfilters.cli.folder_job import (
    FolderJob,
    check_number,
    load_model,
    open_folder,
    write_csv,
    write_manifest,
)
from captum_classfilters.cli.model_sources import model_source
from captum_classfilters.identify import identify_class_filters
from captum_classfilters.layers import list_filter_layers

METHODS = {"frequency": LayerFilterFrequency, "contribution": LayerFilterContribution}
_CLASSES_TOLD = 20


def run_identify(job: FolderJob, write: Callable[[str], None] = print) -> dict[str, ClassFilters]:
    r"""
    Identify class filters of a model on an image folder, and write the results.

    For each method a table (safetensors), its long form (CSV) and a heat map; explanations of a few
    images; and last of all ``manifest.json``, which marks the results as complete.

    Args:

        job (FolderJob): What to do.
        write (Callable): Where the report goes, line by line.
                    Default: print

    Returns:
        *dict* of ClassFilters by method.

    Raises:
        ValueError, OSError: With what was wrong, and what would be right.
    """
    opened = open_folder(job, METHODS, write)
    model, chosen, output = opened.model, opened.images, opened.output
    methods = {name: METHODS[name](model, opened.layer) for name in job.methods}
    tables = identify_class_filters(
        methods,
        opened.loader(chosen),
        num_filters=job.num_filters,
        class_names=opened.class_names,
        device=job.device,
        show_progress=job.show_progress,
    )
    _report(tables, write)  # first, so that a full disk costs the files alone
    for name, table in tables.items():
        write_table(output, name, table)
    if job.explain:
        _explain(output, model, job, tables, chosen)
    write_manifest(output, job, len(chosen))
    write(f"\nTables, pictures and manifest.json are in {output.path}")
    return tables


def layer_table(name: str, image_size: int | None) -> str:
    """The layers of a classifier as a table.

    Args:

        name (str): Its name in torchvision or timm.
        image_size (int, optional): Side of the example images; by default the model's own.

    Returns:
        *str*.

    Raises:
        ValueError: There is no such classifier, or it takes no images of this size.
    """
    check_number("image_size", image_size)
    source = model_source(name, image_size)
    model = load_model(source, None, None, 1000, random_weights=True)
    images = torch.randn(2, 3, source.size, source.size)
    num_outputs(model, images)
    return str(list_filter_layers(model, images))


def write_table(output: ResultsFolder, name: str, table: ClassFilters) -> None:
    """Write a table, its long form as CSV, and its heat map."""
    from captum_classfilters.visualize import plot_class_filters

    table.save(output.place(f"{name}.safetensors"), overwrite=True)
    errors = table.standard_errors
    # Lists, not tensors: a thousand classes by hundreds of filters are a million cells.
    scores, selected = table.scores.tolist(), table.selected.int().tolist()
    spread = torch.full_like(table.scores, torch.nan) if errors is None else errors
    cells = zip(
        table.class_names, scores, spread.tolist(), selected, table.counts.tolist(), strict=True
    )
    rows = (
        (class_name, column, score, error, chosen, count)
        for class_name, own, own_errors, own_selected, count in cells
        for column, (score, error, chosen) in enumerate(
            zip(own, own_errors, own_selected, strict=True)
        )
    )
    columns = ("class", "filter", "score", "standard_error", "selected", "images")
    write_csv(output.place(f"{name}.csv"), columns, rows)
    figure, _ = plot_class_filters(table)
    write_figure(output.place(f"{name}.png"), figure)


def _explain(
    output: ResultsFolder,
    model: nn.Module,
    job: FolderJob,
    tables: dict[str, ClassFilters],
    chosen: Subset[object],
) -> None:
    from captum_classfilters.visualize import plot_explanations

    places = torch.linspace(0, len(chosen) - 1, min(job.explain, len(chosen))).round().long()
    images = torch.stack([chosen[place][0] for place in places.tolist()]).to(job.device)
    labels = torch.tensor([chosen[place][1] for place in places.tolist()]).to(job.device)
    columns = {"Integrated Gradients": integrated_gradients(model, images, labels, job.batch_size)}
    for name, table in tables.items():
        saliency = ClassFilterSaliency(model, job.layer, table, mode="activation_map")
        columns[f"{name} filters"] = saliency.attribute(images, target=labels)
    names = next(iter(tables.values())).class_names
    figure, _ = plot_explanations(
        images, columns, titles=[names[label] for label in labels.tolist()]
    )
    write_figure(output.place("explanations.png"), figure)


def _report(tables: dict[str, ClassFilters], write: Callable[[str], None]) -> None:
    for name, table in tables.items():
        write(f"\n{name}: {table}")
        seen = [index for index, count in enumerate(table.counts.tolist()) if count]
        rows = [
            {
                "class": short_name(table.class_names[row]),
                "filters": " ".join(map(str, table.filters_of(row).tolist())),
            }
            for row in seen[:_CLASSES_TOLD]
        ]
        write(text_table(rows))
        if len(seen) > _CLASSES_TOLD:
            write(f"... and {len(seen) - _CLASSES_TOLD} further classes")
