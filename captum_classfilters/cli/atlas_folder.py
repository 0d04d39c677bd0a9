"""An atlas of the user's own model and image folder."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from captum_classfilters._core.files import AnyPath
from captum_classfilters.atlas import atlas
from captum_classfilters.cli.folder_job import (
    FolderJob,
    Prepared,
    check_number,
    load_model,
    open_folder,
)


def run_atlas(
    job: FolderJob,
    filter_labels: AnyPath | None = None,
    compared: Sequence[str] = (),
    num_optimized: int = 0,
    title: str | None = None,
    write: Callable[[str], None] = print,
) -> Path:
    r"""
    Write an atlas: filters are found on every second image of the folder and measured on the rest.

    Args:

        job (FolderJob): What to do; ``layer`` may name several layers, with commas between them, and
                    ``explain`` is the number of right, and of wrong, images to explain for each class.
        filter_labels (path, optional): CSV of filter and text.
                    Default: None
        compared (sequence of str): ``NAME=CHECKPOINT`` of the same model with other weights.
                    Default: ()
        num_optimized (int): Filters that get an optimized image.
                    Default: 0
        title (str, optional): Title of the site.
                    Default: None
        write (Callable): Where the report goes.
                    Default: print

    Returns:
        *Path* of the first page.

    Raises:
        ValueError, OSError: With what was wrong, and what would be right.
    """
    check_number("optimize", num_optimized)
    opened = open_folder(job, write=write)
    find, test = opened.halves()
    others = {}
    for entry in compared:
        name, _, checkpoint = entry.partition("=")
        if not name or not checkpoint:
            raise ValueError(f"--compare {entry} must be NAME=CHECKPOINT.")
        others[name] = load_model(opened.source, checkpoint, None, len(opened.class_names)).to(
            job.device, getattr(torch, job.dtype)
        )
    normalize = _normalization(opened.dataset.transform)
    first = atlas(
        opened.model,
        opened.layer.split(","),
        opened.loader(find),
        opened.output.path,
        test_dataloader=opened.loader(test),
        title=title or f"{job.model} on {Path(job.data).name}",
        class_names=opened.class_names,
        filter_labels=filter_labels,
        compared=others,
        num_filters=job.num_filters,
        num_images=job.explain,
        num_optimized=num_optimized,
        to_display=None if normalize is None else normalize.undone,
        normalize=normalize,
        overwrite=job.overwrite,
        show_progress=job.show_progress,
    )
    write(f"\nOpen {first}")
    return first


class _Normalization:
    """A normalization of colors, and what undoes it."""

    def __init__(self, mean: Tensor, spread: Tensor) -> None:
        self.mean, self.spread = mean.reshape(-1, 1, 1), spread.reshape(-1, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        """Normalize images in [0, 1]."""
        return (images - self.mean.to(images)) / self.spread.to(images)

    def undone(self, image: Tensor) -> Tensor:
        """An image in [0, 1] again."""
        return (image * self.spread.to(image) + self.mean.to(image)).clamp(0, 1)


def _normalization(prepared: object) -> _Normalization | None:
    """The last step of how images are prepared, where it is a normalization."""
    steps = getattr(
        prepared.prepare if isinstance(prepared, Prepared) else prepared, "transforms", []
    )
    for step in reversed(steps):
        if hasattr(step, "mean") and hasattr(step, "std"):
            return _Normalization(torch.as_tensor(step.mean), torch.as_tensor(step.std))
    return None
