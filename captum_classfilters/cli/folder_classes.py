"""Which output of a model each folder of images stands for."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from captum_classfilters._core.devices import device_of, on_device
from captum_classfilters._core.files import read_text
from captum_classfilters._core.outputs import scores_per_class

if TYPE_CHECKING:
    from torchvision.datasets import ImageFolder


def assign_outputs(
    dataset: "ImageFolder",
    model: nn.Module,
    model_name: str,
    class_names: str | os.PathLike[str] | None = None,
) -> list[str]:
    r"""
    Find each folder's output, make it the label of the folder's images, and name all outputs.

    With as many folders as outputs, they are taken in alphabetical order, as torchvision does. With
    fewer, their names are looked up: in the file, or among the categories that torchvision lists for
    the model's public weights. Counting them through would explain the wrong outputs.

    Args:

        dataset (torchvision.datasets.ImageFolder): The folders; its ``target_transform`` is set.
        model (nn.Module): The classifier.
        model_name (str): Its name in torchvision.
        class_names (path, optional): A text file with a line for each output, in their order. A
                    folder is called like a line, or like the first word of one.

    Returns:
        *list* of C class names.

    Raises:
        ValueError: Folders and outputs cannot be matched.
    """
    with torch.no_grad():
        image = on_device(dataset[0][0][None], device_of(model))
        num_outputs = scores_per_class(model(image)).shape[1]
    folders = list(dataset.classes)
    if len(folders) > num_outputs:
        raise ValueError(
            f"The folder has {len(folders)} classes, but the model has {num_outputs} outputs."
        )
    if class_names is not None:
        names = _lines(Path(class_names), num_outputs)
    elif len(folders) == num_outputs:
        # A folder's name may be no text; files and pictures then spell out what it is.
        return [name.encode("utf-8", "backslashreplace").decode() for name in folders]
    else:
        names = _categories(model_name, num_outputs, folders)
    places = _places(names)
    unknown = [folder for folder in folders if folder not in places]
    if unknown:
        raise ValueError(
            f"The folder has {len(folders)} classes, the model {num_outputs} outputs, and no output is known "
            f"by the name of {', '.join(map(repr, unknown[:3]))}; pass --class-names FILE, with a line "
            "for each output that begins with its folder's name."
        )
    outputs = [places[folder] for folder in folders]
    dataset.target_transform = outputs.__getitem__
    return names


def _lines(path: Path, num_outputs: int) -> list[str]:
    try:
        lines = read_text(path).splitlines()
    except FileNotFoundError as error:
        raise ValueError(f"There is no file of class names {path}.") from error
    names = [line.strip() for line in lines]
    names = [name for name in names if name]
    if len(names) != num_outputs:
        raise ValueError(
            f"{path} names {len(names)} classes, but the model has {num_outputs} outputs."
        )
    return names


def _categories(model_name: str, num_outputs: int, folders: Sequence[str]) -> list[str]:
    """The categories of public weights that hold all folders; else none."""
    from torchvision.models import get_model_weights

    for weights in get_model_weights(model_name):
        names = list(weights.meta.get("categories", ()))
        if len(names) == num_outputs and set(folders) <= set(names):
            return names
    return []


def _places(names: Sequence[str]) -> dict[str, int]:
    """Output by whole name, and by the first word where only one name begins with it."""
    words = [name.split()[0] for name in names]
    counts = Counter(words)
    places = {word: place for place, word in enumerate(words) if counts[word] == 1}
    return {**places, **{name: place for place, name in enumerate(names)}}


def short_name(name: str, length: int = 24) -> str:
    """A class's name for a table's column or beside a picture."""
    return name if len(name) <= length else f"{name[: length - 1]}…"
