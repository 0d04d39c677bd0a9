"""Reading the batches of a user's loader."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor


def split_batch(batch: Any, number: int, device: Any) -> tuple[tuple[Tensor, ...], Any]:
    """Inputs, on a device, and labels of one batch of a loader."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise ValueError(
            f"Batch {number} is a {type(batch).__name__}; expected a pair (inputs, labels)."
        )
    inputs, labels = batch
    inputs = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    if not inputs or not all(isinstance(one, Tensor) for one in inputs):
        raise ValueError(f"The inputs of batch {number} are not Tensors.")
    return tuple(one.to(device) if device is not None else one for one in inputs), labels


def check_read_again(dataloader: Any) -> None:
    """Raise if a loader, read more than once here, would be empty the second time."""
    if isinstance(dataloader, Iterable) and iter(dataloader) is dataloader:
        raise ValueError("The dataloader can be read only once; pass a list or a DataLoader.")


def dataset_names(dataloader: Any) -> Sequence[str] | None:
    """Class names that a loader's data set knows, as torchvision's do."""
    names = getattr(getattr(dataloader, "dataset", None), "classes", None)
    return [str(name) for name in names] if isinstance(names, (list, tuple)) else None
