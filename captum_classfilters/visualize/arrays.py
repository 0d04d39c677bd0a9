"""What is drawn, as plain numbers: any type and device in, NaN named, images in [0, 1]."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from captum_classfilters._core.arguments import whole_number
from captum_classfilters._core.names import hint, kind_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Channels = tuple[int, int, int] | None
_SLACK = 1e-3  # what rounding leaves outside [0, 1] after a normalization is undone


def tensor_of(values: object, what: str) -> Tensor:
    """Values as a Tensor without a history, of the type and device that they have."""
    try:
        return torch.as_tensor(values).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{what} are {kind_of(values)}; expected a Tensor of numbers.") from error


def numbers_of(values: object, what: str, *, missing: bool = False) -> Tensor:
    r"""
    Values as float64 on the CPU, whatever their type and device.

    Args:

        values (Tensor, ndarray or sequence): The values.
        what (str): What error messages call them, a plural.
        missing (bool): Allow NaN, for what is not known.
                    Default: False

    Raises:
        ValueError: They are not real numbers, or some are NaN or infinite.
    """
    tensor = tensor_of(values, what)
    if tensor.is_complex():
        raise ValueError(f"{what} are {tensor.dtype}; expected real numbers.")
    tensor = tensor.cpu().double()
    wrong = tensor.isinf() if missing else ~tensor.isfinite()
    if bool(wrong.any()):
        first = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(
            f"{what} hold {int(wrong.sum())} NaN or infinite values of {tensor.numel()}, the first "
            f"at {first}; only finite numbers can be drawn."
        )
    return tensor


def pixels_of(values: object, what: str) -> Tensor:
    """Pixels as :func:`numbers_of` has numbers, bytes divided by 255."""
    tensor = tensor_of(values, what)
    numbers = numbers_of(tensor, what)
    return numbers / 255 if tensor.dtype == torch.uint8 else numbers


def picture_of(
    image: object, channels: Channels = None, what: str = "the image"
) -> NDArray[np.float64]:
    r"""
    An image (C, H, W) as one to draw: (H, W) in gray or (H, W, 3) in color, in [0, 1].

    One channel is gray and three are red, green and blue; any other number is drawn as its mean, in
    gray, unless three channels are chosen. Bytes are divided by 255; other values beyond [0, 1] are
    stretched to it.
    """
    values = pixels_of(image, f"The pixels of {what}")
    if values.dim() != 3 or not values.numel():
        raise ValueError(f"{what} has shape {tuple(values.shape)}; expected (C, H, W).")
    shown = _of_channels(values, channels)
    low, high = float(shown.min()), float(shown.max())
    if low < -_SLACK or high > 1 + _SLACK:
        shown = (shown - low) / max(high - low, 1e-12)
    picture: NDArray[np.float64] = shown.clamp(0, 1).numpy()
    return picture


def _of_channels(values: Tensor, channels: Channels) -> Tensor:
    """(C, H, W) as (H, W) or (H, W, 3)."""
    if channels is not None:
        check_channels(channels, len(values))
        return values[list(channels)].movedim(0, -1)
    return values.movedim(0, -1) if len(values) == 3 else values.mean(0)


def check_channels(channels: Channels, num_channels: int) -> None:
    """Raise if these are not three of the channels."""
    if channels is None:
        return
    if len(channels) != 3 or not all(0 <= channel < num_channels for channel in channels):
        raise ValueError(
            f"channels={channels}; choose three from 0 to {num_channels - 1}, for red, green and blue."
        )


def show_picture(axes: "Axes", picture: NDArray[np.float64], **options: Any) -> None:
    """Draw what :func:`picture_of` made."""
    axes.imshow(picture, cmap="gray", vmin=0, vmax=1, **options)


def by_class(scores: Tensor) -> Tensor:
    """Filters of a table (C, K) grouped by their best class, best first within a class."""
    best, owner = scores.nan_to_num(nan=-float("inf")).max(0)
    by_score = best.sort(descending=True, stable=True).indices
    return by_score[owner[by_score].sort(stable=True).indices]


def chosen(
    wanted: int | Sequence[int | str], sizes: Tensor, what: str, names: Sequence[str] = ()
) -> Tensor:
    r"""
    Which rows or columns of a large table to draw.

    Args:

        wanted (int or sequence): So many of the largest sizes, in their own order; or indices, or
                    names, in the order given.
        sizes (Tensor): Shape (n,). NaN is smallest.
        what (str): The argument's name, for messages.
        names (sequence of str): What the n are called.

    Returns:
        *Tensor* of int64.
    """
    size = len(sizes)
    number = whole_number(wanted)
    if number is not None:
        if number < 1:
            raise ValueError(f"{what}={wanted}; expected a positive number.")
        order = sizes.nan_to_num(nan=-float("inf")).sort(descending=True, stable=True).indices
        return order[:number].sort().values
    if isinstance(wanted, (str, int)) or not isinstance(wanted, Iterable):  # a bool, too
        raise ValueError(f"{what}={wanted!r}; expected a number, or a list.")
    known = {name: place for place, name in enumerate(names)}
    places = []
    for entry in wanted:
        place = known.get(entry) if isinstance(entry, str) else whole_number(entry)
        if place is None or not 0 <= place < size:
            near = f", or names. {hint(entry, names)}" if names and isinstance(entry, str) else "."
            raise ValueError(f"{what} hold {entry!r}; expected 0 to {size - 1}{near}")
        places.append(place)
    if not places:
        raise ValueError(f"{what} are empty; there is nothing to draw.")
    return torch.tensor(places)


def out_of(drawn: int, total: int, what: str) -> str:
    """Says how many of a table's rows or columns are drawn, where not all are."""
    return f"the {drawn:,} of {total:,} {what}" if drawn < total else ""
