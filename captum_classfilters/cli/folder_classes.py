"""Which output of a model each folder of images stands for."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from captum_classfilters._core.batches import check_now
from captum_classfilters._core.devices import device_of, on_device
from captum_classfilters._core.files import read_text
from captum_classfilters._core.outputs import scores_per_class
from captum_classfilters._core.score_reader import OutputKind
from captum_classfilters.cli.model_sources import ModelSource, places_of

if TYPE_CHECKING:
    from torchvision.datasets import ImageFolder


def assign_outputs(
    dataset: "ImageFolder",
    model: nn.Module,
    source: ModelSource,
    class_names: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
) -> list[str]:
    r"""
    Find each folder's output, make it the label of the folder's images, and name all outputs.

    With as many folders as outputs, they are taken in alphabetical order, as torchvision does. With
    fewer, their names are looked up: in the file, or among the classes that torchvision or timm lists
    for the model's public weights. Counting them through would explain the wrong outputs.

    Args:

        dataset (torchvision.datasets.ImageFolder): The folders; its ``target_transform`` is set.
        model (nn.Module): The classifier.
        source (ModelSource): Where it comes from.
        class_names (path, optional): A text file with a line for each output, in their order. A
                    folder is called like a line, or like the first word of one.
        num_classes (int, optional): How many outputs there should be; a model of the user's own has as
                    many as it has.

    Returns:
        *list* of C class names.

    Raises:
        ValueError: Folders and outputs cannot be matched.
    """
    outputs = num_outputs(model, dataset[0][0][None])
    if num_classes not in (None, outputs):
        raise ValueError(
            f"--num-classes {num_classes}, but {source.name} has {outputs} outputs (one logit counts for "
            "two); leave --num-classes out."
        )
    folders = list(dataset.classes)
    if len(folders) > outputs:
        raise ValueError(
            f"The folder has {len(folders)} classes, but the model has {outputs} outputs."
        )
    if class_names is not None:
        names = _lines(Path(class_names), outputs)
        places = _places(names)
    elif len(folders) == outputs:
        # A folder's name may be no text; files and pictures then spell out what it is.
        return [name.encode("utf-8", "backslashreplace").decode() for name in folders]
    else:
        names, places = _categories(source, outputs, folders)
    unknown = [folder for folder in folders if folder not in places]
    if unknown:
        raise ValueError(
            f"The folder has {len(folders)} classes, the model {outputs} outputs, and no output is known "
            f"by the name of {', '.join(map(repr, unknown[:3]))}; pass --class-names FILE, with a line "
            "for each output that begins with its folder's name."
        )
    dataset.target_transform = [places[folder] for folder in folders].__getitem__
    return names


def num_outputs(model: nn.Module, images: Tensor) -> int:
    """C, the number of a model's outputs, from one run on images; refused if it does not take them."""
    try:
        with torch.no_grad():
            output = model(on_device(images, device_of(model)))
    except Exception as error:  # whatever a model raises at images of a wrong size
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"The model does not take color images of {images.shape[-1]} pixels ({reason}); where it is "
            "the size, choose another --image-size."
        ) from error
    return scores_per_class(output).shape[1]


def answers_of(model: nn.Module, parts: Sequence[Tensor]) -> Tensor:
    """The class (N,) that a model names for each image of some batches."""
    kind, answers = OutputKind(model), []
    for number, images in enumerate(parts):
        output = model(images)
        probabilities = kind.probabilities((images,), output, check_now, number)
        answers.append(scores_per_class(output, probabilities).argmax(1))
    return torch.cat(answers)


def _lines(path: Path, outputs: int) -> list[str]:
    try:
        lines = read_text(path).splitlines()
    except FileNotFoundError as error:
        raise ValueError(f"There is no file of class names {path}.") from error
    names = [line.strip() for line in lines]
    names = [name for name in names if name]
    if len(names) != outputs:
        raise ValueError(f"{path} names {len(names)} classes, but the model has {outputs} outputs.")
    return names


def _categories(
    source: ModelSource, outputs: int, folders: Sequence[str]
) -> tuple[list[str], dict[str, int]]:
    """The classes of public weights that have all folders, and where they are; else none."""
    for names, places in source.categories():
        if len(names) == outputs and set(folders) <= set(places):
            return names, places
    return [], {}


def _places(names: Sequence[str]) -> dict[str, int]:
    """Output by whole name, and by the first word where only one name begins with it."""
    words = [name.split()[0] for name in names]
    counts = Counter(words)
    places = {word: place for place, word in enumerate(words) if counts[word] == 1}
    return {**places, **places_of(names)}
