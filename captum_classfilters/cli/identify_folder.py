"""The main job on the user's own model and images."""

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from captum.attr import IntegratedGradients
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from captum_classfilters._core.checkpoints import read_state_dict
from captum_classfilters._core.files import (
    check_writable_folder,
    open_regular,
    write_figure,
    write_text,
)
from captum_classfilters._core.tables import text_table
from captum_classfilters.attr import (
    ClassFilterSaliency,
    LayerFilterContribution,
    LayerFilterFrequency,
)
from captum_classfilters.class_filters import ClassFilters
from captum_classfilters.cli.folder_classes import assign_outputs, num_outputs, short_name
from captum_classfilters.cli.model_sources import ModelSource, model_source
from captum_classfilters.identify import identify_class_filters
from captum_classfilters.layers import list_filter_layers

if TYPE_CHECKING:
    from PIL.Image import Image
    from torchvision.datasets import ImageFolder

METHODS = {"frequency": LayerFilterFrequency, "contribution": LayerFilterContribution}
SCHEMA_VERSION = 1
_CLASSES_TOLD = 20


@dataclass(frozen=True)
class FolderJob:
    r"""
    What to identify, on what, and where the results go.

    Args:

        model (str): Name of a classifier of torchvision, or of timm.
        data (path): An image folder, one subfolder for each class.
        layer (str): Dotted name of the layer.
        output (path): Folder for the results; it must not hold any yet.
        checkpoint (path, optional): Weights, safetensors or a PyTorch state dict.
        random_weights (bool): Do without a checkpoint.
        methods (sequence of str): ``"frequency"``, ``"contribution"``.
        num_filters (int): Filters to select for each class.
        num_classes (int, optional): C; by default as the checkpoint's head, or the folder's classes.
        class_names (path, optional): A text file with a line for each output; needed where there are
                    fewer folders than outputs.
        batch_size (int): Images in a batch.
        image_size (int, optional): Side of the images in pixels; by default 224, or as timm has it for
                    the model.
        limit (int, optional): Use this many images at most, evenly spread over the folder.
        explain (int): Number of images to explain beside Integrated Gradients.
        device (str): Where to compute.
        overwrite (bool): Replace results that are there.
        show_progress (bool): Show progress bars.
    """

    model: str
    data: str | os.PathLike[str]
    layer: str | None
    output: str | os.PathLike[str]
    checkpoint: str | os.PathLike[str] | None = None
    random_weights: bool = False
    methods: Sequence[str] = ("frequency", "contribution")
    num_filters: int = 5
    num_classes: int | None = None
    class_names: str | os.PathLike[str] | None = None
    batch_size: int = 32
    image_size: int | None = None
    limit: int | None = None
    explain: int = 0
    device: str = "cpu"
    overwrite: bool = False
    show_progress: bool = True


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
    layer = named_layer(job)
    output = prepared_output(job)
    source = model_source(job.model, job.image_size)
    dataset = image_folder(job.data, source.preparation())
    model = load_model(
        source, job.checkpoint, job.num_classes or None, len(dataset.classes), job.random_weights
    ).to(job.device)
    chosen = evenly_spread(dataset, job.limit)
    loader = DataLoader(chosen, batch_size=job.batch_size)
    methods = {name: METHODS[name](model, layer) for name in job.methods}
    names = assign_outputs(dataset, model, source, job.class_names)
    tables = identify_class_filters(
        methods,
        loader,
        num_filters=job.num_filters,
        class_names=names,
        device=job.device,
        show_progress=job.show_progress,
    )
    _report(tables, write)  # first, so that a full disk costs the files alone
    output.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        _write_table(output, name, table)
    if job.explain:
        _explain(output, model, job, tables, chosen)
    _write_manifest(output, job, len(chosen))
    write(f"\nTables, pictures and manifest.json are in {output}")
    return tables


def load_model(
    source: ModelSource,
    checkpoint: str | os.PathLike[str] | None,
    num_classes: int | None,
    folder_classes: int,
    random_weights: bool = False,
) -> nn.Module:
    """A classifier with a checkpoint's weights, in evaluation mode.

    Args:

        source (ModelSource): The classifier.
        checkpoint (path, optional): safetensors, or from PyTorch 2.10 on a state dict that
                    ``torch.load`` reads with ``weights_only=True``.
        num_classes (int, optional): C; by default as the checkpoint's last layer.
        folder_classes (int): C without a checkpoint.
        random_weights (bool): Allow no checkpoint.

    Returns:
        *nn.Module*.

    Raises:
        ValueError: The checkpoint does not fit.
    """
    if checkpoint is None:
        if not random_weights:
            raise ValueError(
                "No checkpoint is given; pass --checkpoint FILE, or --random-weights to go on with "
                "an untrained model."
            )
        return source.build(num_classes or folder_classes).eval()
    state = read_state_dict(checkpoint)
    # Heads of auxiliary classifiers are used in training alone.
    state = {key: value for key, value in state.items() if not key.lower().startswith("aux")}
    model = source.build(folder_classes)
    last = source.head_tensor(model)
    outputs = num_classes or (_rows(state, last) or folder_classes)
    if outputs != folder_classes:
        model = source.build(outputs)
    own = model.state_dict()
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if missing or unexpected or shapes:
        raise ValueError(
            f"The checkpoint {checkpoint} is not one of {source.name}: "
            f"missing {_few(missing)}; unexpected {_few(unexpected)}; other shapes {_few(shapes)}."
        )
    model.load_state_dict({key: value.to(own[key].dtype) for key, value in state.items()})
    return model.eval()


def image_folder(path: str | os.PathLike[str], prepare: Callable[[Any], Tensor]) -> "ImageFolder":
    """An image folder.

    Args:

        path (path): The folder, one subfolder for each class.
        prepare (Callable): From an image to what the model takes.

    Returns:
        *torchvision.datasets.ImageFolder*.

    Raises:
        ValueError: There is no such folder, or no class or image in it.
    """
    from torchvision.datasets import ImageFolder

    if not Path(path).is_dir():
        raise ValueError(f"There is no folder {path}.")
    try:
        return ImageFolder(str(path), prepare, loader=_image)
    except FileNotFoundError as error:
        raise ValueError(
            f"{path} is not an image folder, one subfolder for each class with images in it: {error}"
        ) from error


def _image(path: str) -> "Image":
    """An image in three colors.

    Raises:
        ValueError: The file is damaged, or no image.
    """
    from PIL import Image

    try:
        with open_regular(path) as file:
            return Image.open(file).convert("RGB")
    except (OSError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is no image that can be read: {error}") from error


def layer_table(name: str, image_size: int | None) -> str:
    """The layers of a classifier as a table.

    Args:

        name (str): Its name in torchvision or timm.
        image_size (int, optional): Side of the example images; by default the model's own.

    Returns:
        *str*.
    """
    source = model_source(name, image_size)
    model = load_model(source, None, None, 1000, random_weights=True)
    images = torch.randn(2, 3, source.size, source.size)
    num_outputs(model, images)
    return str(list_filter_layers(model, images))


def _rows(state: dict[str, Tensor], name: str) -> int:
    """The rows of a tensor; 0 where there is none."""
    return len(state[name]) if name in state and state[name].dim() else 0


def _few(items: Sequence[str]) -> str:
    if not items:
        return "nothing"
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")


def named_layer(job: FolderJob) -> str:
    """The layer that a job names."""
    if job.layer is None:
        raise ValueError(
            f"No layer is named; `captum-classfilters layers --model {job.model}` lists which layers "
            "qualify, and which of them feed the head."
        )
    return job.layer


def prepared_output(job: FolderJob, known: Iterable[str] = tuple(METHODS)) -> Path:
    """The folder for a job's results, once its options are checked; older results count no more."""
    _check_numbers(job)
    unknown = [name for name in job.methods if name not in known]
    if unknown or not job.methods:
        raise ValueError(f"Unknown methods {unknown}; choose from {', '.join(known)}.")
    output = Path(job.output)
    if (output / "manifest.json").exists() and not job.overwrite:
        raise ValueError(f"{output} holds results already; pass --overwrite to replace them.")
    check_writable_folder(output)
    (output / "manifest.json").unlink(missing_ok=True)
    return output


def _check_numbers(job: FolderJob) -> None:
    for name in ("num_filters", "batch_size", "image_size", "limit"):
        value = getattr(job, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be at least 1.")
    try:
        torch.empty(0, device=job.device)
    except (RuntimeError, AssertionError) as error:  # as PyTorch refuses what is not there
        reason = str(error).split("\n")[0]
        raise ValueError(f"--device {job.device} cannot be used: {reason}") from error


def evenly_spread(dataset: "ImageFolder", limit: int | None) -> Subset[object]:
    """A part of the images, spread evenly over a folder that is ordered by class."""
    count = len(dataset) if limit is None else min(limit, len(dataset))
    places = torch.linspace(0, len(dataset) - 1, count).round().long().tolist()
    return Subset(dataset, places)


def _write_table(output: Path, name: str, table: ClassFilters) -> None:
    from captum_classfilters.visualize import plot_class_filters

    table.save(output / f"{name}.safetensors", overwrite=True)
    scores, errors, selected = table.scores, table.standard_errors, table.selected
    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerow(["class", "filter", "score", "standard_error", "selected", "images"])
    for row, class_name in enumerate(table.class_names):
        for column in range(table.num_filters):
            error = float(errors[row, column]) if errors is not None else float("nan")
            rows.writerow(
                [
                    class_name,
                    column,
                    float(scores[row, column]),
                    error,
                    int(selected[row, column]),
                    int(table.counts[row]),
                ]
            )
    write_text(output / f"{name}.csv", text.getvalue())
    figure, _ = plot_class_filters(table)
    write_figure(output / f"{name}.png", figure)


def _explain(
    output: Path,
    model: nn.Module,
    job: FolderJob,
    tables: dict[str, ClassFilters],
    chosen: Subset[object],
) -> None:
    from captum_classfilters.visualize import plot_explanations

    places = torch.linspace(0, len(chosen) - 1, min(job.explain, len(chosen))).round().long()
    images = torch.stack([chosen[place][0] for place in places.tolist()]).to(job.device)
    labels = torch.tensor([chosen[place][1] for place in places.tolist()], device=job.device)
    columns = {
        "Integrated Gradients": IntegratedGradients(model).attribute(
            images, target=labels, n_steps=20, internal_batch_size=job.batch_size
        )
    }
    for name, table in tables.items():
        saliency = ClassFilterSaliency(model, job.layer, table, mode="activation_map")
        columns[f"{name} filters"] = saliency.attribute(images, target=labels)
    names = next(iter(tables.values())).class_names
    figure, _ = plot_explanations(
        images, columns, titles=[names[label] for label in labels.tolist()]
    )
    write_figure(output / "explanations.png", figure)


def _write_manifest(output: Path, job: FolderJob, num_images: int) -> None:
    """Last of all: a folder without it is not complete."""
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "model": job.model,
        "layer": job.layer,
        "methods": list(job.methods),
        "num_filters": job.num_filters,
        "num_images": num_images,
        "files": sorted(path.name for path in output.iterdir() if path.name != "manifest.json"),
    }
    write_text(output / "manifest.json", json.dumps(manifest, indent=2) + "\n")


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
