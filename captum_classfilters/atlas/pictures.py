"""The pictures of an atlas: strips of patches, explained images, and maps of a pixel for each cell."""

import io
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from captum.attr import IntegratedGradients, LayerAttribution, LayerGradCam
from numpy.typing import NDArray
from torch import Tensor, nn

from captum_classfilters._core.devices import device_of, on_device
from captum_classfilters._core.files import write_atomically, write_figure
from captum_classfilters._core.guard import model_left_as_found
from captum_classfilters._core.layers import find_layer
from captum_classfilters._core.names import kind_of
from captum_classfilters._core.types import DatasetLike
from captum_classfilters.attr import ClassFilterSaliency, LayerFilterContribution
from captum_classfilters.class_filters import ClassFilters
from captum_classfilters.class_scores import per_class
from captum_classfilters.identify.exemplars import Exemplars
from captum_classfilters.visualize import plot_explanations
from captum_classfilters.visualize.arrays import picture_of
from captum_classfilters.visualize.class_filters import color_scale
from captum_classfilters.visualize.figures import drawing

if TYPE_CHECKING:
    from PIL.Image import Image

#: From the name of a picture to where it is written.
Place: TypeAlias = Callable[[str], Path]

PATCH, GAP = 96, 4  # pixels of a patch in a strip, and between two of them
_STEPS = 20  # of Integrated Gradients
_COARSE = 32  # a patch of fewer pixels is drawn as squares, and kept without loss
_KEPT_IMAGES = 512


class ShownImages:
    r"""
    A data set's images as they are drawn, (C, H, W) in [0, 1], the last few of them kept.

    The whole image sets the scale of its patches, so that a gray means the same in both.

    Args:

        dataset (sequence): ``dataset[i]`` is image i of the loader's order, or a pair that starts with it.
        to_display (Callable, optional): From an image to one in [0, 1].
    """

    def __init__(
        self, dataset: DatasetLike, to_display: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self._dataset, self._to_display = dataset, to_display
        self._kept = lru_cache(_KEPT_IMAGES)(self._shown)

    def __getitem__(self, index: int) -> Tensor:
        return self._kept(int(index))

    def inputs(self, indices: Sequence[int]) -> Tensor:
        """Some images as the model takes them, (N, C, H, W)."""
        return torch.stack([self._image(index) for index in indices])

    def _image(self, index: int) -> Tensor:
        item = self._dataset[index]
        image = item[0] if isinstance(item, (tuple, list)) else item
        if not isinstance(image, Tensor):
            raise ValueError(
                f"dataset[{index}] gives {kind_of(image)}; expected a Tensor (C, H, W), or a pair "
                "that starts with one."
            )
        return image

    def _shown(self, index: int) -> Tensor:
        image = self._image(index)
        picture = picture_of(
            image if self._to_display is None else self._to_display(image), what=f"image {index}"
        )
        shown = torch.as_tensor(picture, dtype=torch.float32)
        return shown.movedim(-1, 0) if shown.dim() == 3 else shown[None]


def write_strip(place: Place, strongest: Exemplars, images: ShownImages, unit: int) -> str:
    """The patches that drive a filter furthest, side by side; the name of the file, none without any."""
    from PIL import Image

    count = num_patches(strongest, unit)
    if not count:
        return ""
    patches = strongest.patches(images, unit)[:count]
    strip = Image.new("RGB", (count * (PATCH + GAP) - GAP, PATCH), (128, 128, 128))
    for column, patch in enumerate(patches):
        picture = _pil(patch.movedim(0, -1).numpy())
        scale = PATCH / max(picture.size)
        size = [max(1, round(scale * side)) for side in picture.size]
        how = Image.Resampling.NEAREST if max(picture.size) < _COARSE else Image.Resampling.BICUBIC
        left, top = ((PATCH - side) // 2 for side in size)
        strip.paste(picture.resize(size, how), (column * (PATCH + GAP) + left, top))
    coarse = max(max(patch.shape[1:]) for patch in patches) < _COARSE
    return _write_image(place(f"filter-{unit:04d}.{'png' if coarse else 'jpg'}"), strip)


def num_patches(strongest: Exemplars, unit: int) -> int:
    """How many exemplars of a filter are drawn: those with an image and a score that is not zero."""
    side = strongest.highest
    return int(((side.image[unit] >= 0) & (side.score[unit] != 0)).sum())


def write_image(path: Path, image: Tensor) -> str:
    """An image (C, H, W) in [0, 1], enlarged where it is small; the name of the file."""
    from PIL import Image

    picture = _pil(picture_of(image))
    if max(picture.size) < PATCH:
        times = -(-PATCH // max(picture.size))
        size = (times * picture.width, times * picture.height)
        picture = picture.resize(size, Image.Resampling.NEAREST)
    return _write_image(path, picture)


def write_map(path: Path, scores: Tensor, selected: Tensor) -> str:
    """Scores (C, K) as a picture of a pixel for each cell, and those that are selected in full color;
    the name of the file."""
    low, high, colors = color_scale(scores)
    mappable = drawing("cm").ScalarMappable(drawing("colors").Normalize(low, high), colors)
    pixels = mappable.to_rgba(scores.numpy())[..., :3]
    pale = ~selected.numpy()
    pixels[pale] = 0.45 + 0.55 * pixels[pale]
    # Few colors: the file of a thousand classes stays small.
    picture = _pil(pixels).quantize(64)
    return _write_image(path, picture)


def write_explained(
    place: Place,
    model: nn.Module,
    table: ClassFilters,
    images: ShownImages,
    indices: Sequence[int],
    targets: Sequence[int],
    *,
    channels_last: bool = False,
) -> Tensor:
    r"""
    Draw some images beside Integrated Gradients, Grad-CAM and the maps of their class's filters.

    Args:

        place (Callable): From the name of a picture, ``<index>.png``, to where it goes.
        model (nn.Module): The model.
        table (ClassFilters): A table with a selection for each target.
        images (ShownImages): All images.
        indices (sequence of int): Those to draw.
        targets (sequence of int): The class that each is explained for.
        channels_last (bool): How the model takes its images in memory.

    Returns:
        *Tensor* of shape (N, K): what each filter contributes to the target's score.
    """
    inputs = images.inputs(indices)
    if channels_last:
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    inputs = on_device(inputs, device_of(model))
    target = torch.tensor(list(targets)).to(inputs.device)
    with model_left_as_found(model, evaluation=True, freeze=True):
        maps = _maps(model, table, inputs, target)
        method = LayerFilterContribution(model, table.layer)
        scores = method.filter_scores(method.attribute(inputs, target=target)).detach().cpu()
    for row, index in enumerate(indices):
        columns = {name: values[row : row + 1].detach().cpu() for name, values in maps.items()}
        figure, _ = plot_explanations(images[index][None], columns, titles=[""])
        write_figure(place(f"{index}.png"), figure, dpi=72)
    return scores


def _maps(
    model: nn.Module, table: ClassFilters, inputs: Tensor, target: Tensor
) -> dict[str, Tensor]:
    maps = {
        "Integrated Gradients": integrated_gradients(
            model, inputs, target, internal_batch_size=len(inputs)
        )
    }
    with torch.no_grad():
        scored = per_class(model, model(inputs))
    seen = LayerGradCam(scored, find_layer(model, table.layer)).attribute(inputs, target=target)
    if isinstance(seen, Tensor) and seen.dim() == 4:
        maps["Grad-CAM"] = LayerAttribution.interpolate(
            seen, tuple(inputs.shape[2:]), interpolate_mode="bilinear"
        )
        own = ClassFilterSaliency(model, table.layer, table, mode="activation_map")
    else:
        own = ClassFilterSaliency(model, table.layer, table)
    maps["class filters"] = own.attribute(inputs, target=target)
    return maps


def integrated_gradients(
    model: nn.Module, images: Tensor, target: Tensor, internal_batch_size: int
) -> Tensor:
    """Captum's Integrated Gradients of each image's class, whatever a model returns."""
    with torch.no_grad():
        scored = per_class(model, model(images[:internal_batch_size]))
    attributions: Tensor = IntegratedGradients(scored).attribute(
        images, target=target, n_steps=_STEPS, internal_batch_size=internal_batch_size
    )
    return attributions


def _pil(picture: NDArray[np.floating]) -> "Image":
    """A picture (H, W), (H, W, 1) or (H, W, 3) in [0, 1] as one of Pillow's."""
    from PIL import Image

    values = np.round(255 * np.clip(picture, 0, 1)).astype(np.uint8)
    values = values[..., 0] if values.ndim == 3 and values.shape[2] == 1 else values
    return Image.fromarray(values).convert("RGB")


def _write_image(path: Path, picture: "Image") -> str:
    buffer = io.BytesIO()
    kind = path.suffix[1:].upper().replace("JPG", "JPEG")
    picture.save(buffer, format=kind, optimize=True, quality=85)
    write_atomically(path, buffer.getvalue())
    return path.name
