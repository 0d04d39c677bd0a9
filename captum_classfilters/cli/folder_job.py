"""What all commands on an image folder share: their options, the model, the images, the results' folder."""

import csv
import io
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from captum_classfilters._core.checkpoints import read_state_dict
from captum_classfilters._core.files import open_regular, write_text
from captum_classfilters._core.guard import model_left_as_found
from captum_classfilters._core.outputs import scores_per_class
from captum_classfilters._core.results_folder import ResultsFolder
from captum_classfilters.cli.folder_classes import assign_outputs
from captum_classfilters.cli.model_sources import ModelSource, model_source

if TYPE_CHECKING:
    from PIL.Image import Image
    from torchvision.datasets import ImageFolder

SCHEMA_VERSION = 1
DTYPES = ("float32", "float64", "bfloat16", "float16")
_BROKEN_TOLD = 5
_TIFF_BITS = 258  # the tag that says how many bits a value has

_MANY = 2**31 - 1
#: The least and the most that the number of an option may be: what memory and processes can hold.
RANGES = {
    "num_filters": (1, _MANY),
    "num_classes": (1, 1_000_000),
    "batch_size": (1, _MANY),
    "image_size": (1, 16_384),
    "limit": (1, _MANY),
    "explain": (0, _MANY),
    "num_workers": (0, 256),
    "optimize": (0, _MANY),
    "epochs": (1, _MANY),
    "seed": (0, 2**32 - 1),  # as NumPy has them
}


@dataclass(frozen=True)
class FolderJob:
    r"""
    What all commands on an image folder are told: model, images, layer, and where results go.

    Args:

        model (str): Name of a classifier of torchvision, or of timm; or ``module:function``, which
                    returns one.
        data (path): An image folder, one subfolder for each class.
        layer (str): Dotted name of the layer.
        output (path): Folder for the results; it must not hold any yet.
        checkpoint (path, optional): Weights, safetensors or a PyTorch state dict.
        random_weights (bool): Do without a checkpoint.
        methods (sequence of str): Those of the command, where it has a choice.
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
        dtype (str): ``"float32"``, ``"float64"``, ``"bfloat16"`` or ``"float16"``.
        num_workers (int): Processes that read images; 0 reads them in this one.
        skip_broken (bool): Go on without files that are no images.
        overwrite (bool): Replace results that are there.
        show_progress (bool): Show progress bars.
    """

    model: str
    data: str | os.PathLike[str]
    layer: str | None
    output: str | os.PathLike[str]
    checkpoint: str | os.PathLike[str] | None = None
    random_weights: bool = False
    methods: Sequence[str] = ()
    num_filters: int = 5
    num_classes: int | None = None
    class_names: str | os.PathLike[str] | None = None
    batch_size: int = 32
    image_size: int | None = None
    limit: int | None = None
    explain: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    num_workers: int = 0
    skip_broken: bool = False
    overwrite: bool = False
    show_progress: bool = True


@dataclass(frozen=True)
class OpenedFolder:
    r"""
    A job's model and images, ready to run.

    Args:

        job (FolderJob): The job.
        output (ResultsFolder): Folder for the results; it is made when there are some.
        source (ModelSource): Where the model comes from.
        model (nn.Module): The model, where it computes.
        dataset (torchvision.datasets.ImageFolder): All images; labels are the model's outputs.
        class_names (list of str): A name for each output.
    """

    job: FolderJob
    output: ResultsFolder
    source: ModelSource
    model: nn.Module
    dataset: "ImageFolder"
    class_names: list[str]

    @property
    def layer(self) -> str:
        """Dotted name of the layer."""
        return named_layer(self.job)

    @property
    def images(self) -> Subset[object]:
        """The images that the job uses."""
        return evenly_spread(self.dataset, self.job.limit)

    def halves(self) -> tuple[Subset[object], Subset[object]]:
        """Images to find filters on, and others to measure them on: every second of each class."""
        places = list(self.images.indices)
        if len(places) < 2:
            raise ValueError(
                f"{self.job.data}: filters are found on one half of the images and measured on the other; "
                f"{len(places)} images are too few."
            )
        return Subset(self.dataset, places[::2]), Subset(self.dataset, places[1::2])

    def loader(self, images: Dataset[object]) -> "DataLoader[object]":
        """Batches of some of the images, in their order."""
        return DataLoader(
            images,
            batch_size=self.job.batch_size,
            num_workers=self.job.num_workers,
            collate_fn=_channels_last if self.takes_channels_last else None,
        )

    @cached_property
    def takes_channels_last(self) -> bool:
        """Whether images may lie in memory channels last, in which most networks take less time on a CPU:
        where the model takes them so, and answers the same."""
        convolves = any(isinstance(module, nn.Conv2d) for module in self.model.modules())
        if not convolves or torch.device(self.job.device).type != "cpu":
            return False
        size = self.source.size
        images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
        images = images.to(getattr(torch, self.job.dtype))
        with model_left_as_found(self.model, evaluation=True), torch.no_grad():
            try:
                scores = scores_per_class(self.model(images))
                other = scores_per_class(
                    self.model(images.contiguous(memory_format=torch.channels_last))
                )
            except (RuntimeError, ValueError):  # a view of neighbors in memory, say
                return False
        most = 100 * torch.finfo(scores.dtype).eps * float(scores.abs().max())
        return bool((scores - other).abs().max() <= most)


def _channels_last(rows: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """A batch whose images lie in memory channels last."""
    images, labels = default_collate(list(rows))
    return images.contiguous(memory_format=torch.channels_last), labels


def open_folder(
    job: FolderJob, known: Iterable[str] = (), write: Callable[[str], None] = print
) -> OpenedFolder:
    r"""
    Check a job's options, build its model and find its images.

    Args:

        job (FolderJob): The job.
        known (sequence of str): Methods that the command knows.
                    Default: ()
        write (Callable): Where it is told what was skipped.
                    Default: print

    Returns:
        *OpenedFolder*.

    Raises:
        ValueError, OSError: With what was wrong, and what would be right.
    """
    named_layer(job)
    output = prepared_output(job, known)
    source = model_source(job.model, job.image_size)
    prepare = Prepared(source.preparation(), getattr(torch, job.dtype))
    dataset = image_folder(job.data, prepare)
    if job.skip_broken:
        _leave_out_broken(dataset, write)
    model = load_model(
        source, job.checkpoint, job.num_classes, len(dataset.classes), job.random_weights
    ).to(job.device, getattr(torch, job.dtype))
    names = assign_outputs(dataset, model, source, job.class_names, job.num_classes)
    return OpenedFolder(job, output, source, model, dataset, names)


@dataclass(frozen=True)
class Prepared:
    """From an image to what the model takes, of the model's type."""

    prepare: Callable[..., Tensor]
    dtype: torch.dtype

    def __call__(self, image: object) -> Tensor:
        """Prepare an image."""
        return self.prepare(image).to(self.dtype)


def _leave_out_broken(dataset: "ImageFolder", write: Callable[[str], None]) -> None:
    """Take files that are no images out of a data set, and say which."""
    broken: dict[str, str] = {}
    for path, _ in dataset.samples:
        try:
            _image(path)
        except ValueError as error:
            broken[path] = str(error).partition(";")[0]
    samples = [sample for sample in dataset.samples if sample[0] not in broken]
    if not samples:
        raise ValueError(f"All {len(broken)} files of {dataset.root} are broken: none is left.")
    dataset.samples = dataset.imgs = samples
    dataset.targets = [label for _, label in samples]
    for reason in list(broken.values())[:_BROKEN_TOLD]:
        write(f"skipped: {reason}")
    if broken:
        write(f"{len(broken)} of {len(broken) + len(samples)} files are broken and skipped.")


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
        if not random_weights and not source.has_weights:
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


def image_folder(path: str | os.PathLike[str], prepare: Callable[..., Tensor]) -> "ImageFolder":
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
        ValueError: The file is damaged, no image, or one whose white is not known.
    """
    from PIL import Image

    try:
        with open_regular(path) as file:
            return _in_colors(Image.open(file))
    except (OSError, SyntaxError, EOFError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error).partition(" <")[0]  # without the file's name inside this process
        raise ValueError(
            f"{path} is no image that can be read: {reason}; --skip-broken goes on without such files."
        ) from error


def _in_colors(image: "Image") -> "Image":
    """An image as one of 8 bits in three colors. Pillow cuts values of more bits off at 255, so that all
    but the darkest of 16 bits would be white; here they are scaled."""
    from PIL import Image

    # Of integers of 32 bits, PNG and PGM hold 16; how white is what a TIFF holds, it does not say.
    integers = image.mode == "I" and image.format in ("PNG", "PPM")
    if image.mode in ("I", "F") and not integers:
        values = "floats" if image.mode == "F" else "integers of 32 bits"
        raise ValueError(
            f"its values are {values}, of which white is not known, so convert it to 8 bits"
        )
    if not (integers or image.mode.startswith("I;16")):
        return image.convert("RGB")
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(_TIFF_BITS, (16,))[0]  # a TIFF may hold 12
    gray, white = np.asarray(image), 2**bits - 1
    if not 0 <= gray.min() <= gray.max() <= white:
        raise ValueError(
            f"its values are {gray.min()} to {gray.max()}, not 0 to {white}, so convert it to 8 bits"
        )
    return Image.fromarray(np.round(gray * (255 / white)).astype(np.uint8)).convert("RGB")


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


def prepared_output(job: FolderJob, known: Iterable[str]) -> ResultsFolder:
    """The folder for a job's results, once its options are checked."""
    _check_numbers(job)
    unknown = [name for name in job.methods if name not in known]
    if unknown or (known and not job.methods):
        raise ValueError(f"Unknown methods {unknown}; choose from {', '.join(known)}.")
    output = ResultsFolder(Path(job.output), "manifest.json")
    if output.is_complete and not job.overwrite:
        raise ValueError(f"{output.path} holds results already; pass --overwrite to replace them.")
    return output


def _check_numbers(job: FolderJob) -> None:
    for name in RANGES:
        if hasattr(job, name):
            check_number(name, getattr(job, name))
    if job.dtype not in DTYPES:
        raise ValueError(f"--dtype {job.dtype} is unknown; choose from {', '.join(DTYPES)}.")
    try:
        torch.empty(0, device=job.device)
    except (RuntimeError, AssertionError) as error:  # as PyTorch refuses what is not there
        reason = str(error).split("\n")[0]
        raise ValueError(f"--device {job.device} cannot be used: {reason}") from error


def check_number(name: str, value: int | None, least: int | None = None) -> None:
    """Refuse an option's number that is too small, maybe by a command's own measure, or too large."""
    lowest, most = RANGES[name]
    lowest = lowest if least is None else least
    if value is None or lowest <= value <= most:
        return
    bound = f"at least {lowest}" if value < lowest else f"at most {most}"
    raise ValueError(f"--{name.replace('_', '-')} {value} must be {bound}.")


def evenly_spread(dataset: "ImageFolder", limit: int | None) -> Subset[object]:
    """A part of the images, spread evenly over a folder that is ordered by class."""
    count = len(dataset) if limit is None else min(limit, len(dataset))
    places = torch.linspace(0, len(dataset) - 1, count).round().long().tolist()
    return Subset(dataset, places)


def write_manifest(output: ResultsFolder, job: FolderJob, num_images: int) -> None:
    """Last of all: a folder without it is not complete."""
    facts = {
        "schema_version": SCHEMA_VERSION,
        "model": job.model,
        "layer": job.layer,
        "methods": list(job.methods),
        "num_filters": job.num_filters,
        "num_images": num_images,
    }
    output.finish(facts, indent=2)


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows as CSV, under the columns that any of them has."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    write_csv(path, columns, ([row.get(column, "") for column in columns] for row in rows))


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write cells as CSV, under the titles of their columns."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(columns)
    writer.writerows(rows)
    write_text(path, text.getvalue())
