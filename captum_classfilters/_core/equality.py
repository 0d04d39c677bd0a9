"""Whether two values are the same, Tensors and NaN in them too."""

import dataclasses
from collections.abc import Mapping

import numpy as np
from torch import Tensor


def same(left: object, right: object) -> bool:
    """Whether two values hold the same; NaN is the same as NaN."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        if (left.shape, left.dtype) != (right.shape, right.dtype):
            return False
        right = right.to(left.device)
        return bool(((left == right) | ((left != left) & (right != right))).all())
    if isinstance(left, (np.ndarray, np.generic)) and isinstance(right, (np.ndarray, np.generic)):
        return left.dtype == right.dtype and bool(
            np.array_equal(left, right, equal_nan=left.dtype.kind in "fc")
        )
    if isinstance(left, float) and isinstance(right, float):
        return left == right or (left != left and right != right)
    if type(left) is not type(right):
        return isinstance(left, (int, float)) and left == right
    if dataclasses.is_dataclass(left):
        names = [field.name for field in dataclasses.fields(left) if field.compare]
        return all(same(getattr(left, name), getattr(right, name)) for name in names)
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (tuple, list)) and isinstance(right, (tuple, list)):
        return len(left) == len(right) and all(map(same, left, right))
    if hasattr(left, "nnz") and hasattr(right, "nnz"):  # SciPy's sparse matrices
        return getattr(left, "shape", ()) == getattr(right, "shape", ()) and same(
            getattr(left != right, "nnz", None), 0
        )
    return left is right or bool(left == right)


def equal_by_value(cls: type) -> None:
    """Have objects of a dataclass compare by :func:`same`; the hash is of the texts, which
    are equal in one way only."""

    def equals(self: object, other: object) -> bool:
        return same(self, other) if type(other) is type(self) else NotImplemented

    def hashed(self: object) -> int:
        values = [getattr(self, field.name) for field in dataclasses.fields(cls) if field.compare]
        return hash((cls, *(value for value in values if isinstance(value, str))))

    cls.__eq__ = equals  # type: ignore[assignment]
    if cls.__hash__ is not None:
        cls.__hash__ = hashed  # type: ignore[assignment]
