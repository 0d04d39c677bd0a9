"""Arguments that should be Tensors, numbers or objects of this package and are not, refused by name."""

import dataclasses
import inspect
import operator
from collections.abc import Callable
from functools import wraps
from numbers import Number
from types import NoneType, UnionType
from typing import ParamSpec, TypeVar, get_args

import torch
from torch import Tensor, nn

from captum_classfilters._core.linear_maps import holds_weight
from captum_classfilters._core.names import check_list, kind_of, shortened

P = ParamSpec("P")
R = TypeVar("R")
_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_PACKAGE = __name__.partition(".")[0]


def arguments_checked(function: Callable[P, R]) -> Callable[P, R]:
    """Have a function raise a ValueError that names an argument of the wrong type.

    Looked at are the parameters that are annotated as ``Tensor``, as a class of this package, as
    ``int`` or ``float``, or as one of these or None. Numbers of NumPy, and whole ones that a division
    left as floats, arrive as Python's.
    """
    signature = inspect.signature(function)
    annotations = {name: p.annotation for name, p in signature.parameters.items()}
    expected = {name: kinds for name, a in annotations.items() if (kinds := _kinds(a))}
    numbers = {name: kinds for name, a in annotations.items() if (kinds := _numbers(a))}

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            bound = signature.bind_partial(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)  # which says in whose call
        given = bound.arguments
        for name, kinds in expected.items():
            if name in given and not isinstance(given[name], kinds):
                found = kind_of(given[name])
                wanted = _wanted(name, kinds, given[name])
                raise ValueError(f"{name} is {found}; expected {wanted}.")
        for name, kinds in numbers.items():
            if name in given and (given[name] is not None or NoneType not in kinds):
                given[name] = _number(name, given[name], kinds)
        return function(*bound.args, **bound.kwargs)

    return checked


def check_numbers(instance: object) -> None:
    """The same of a dataclass's fields, for its ``__post_init__``."""
    for field in dataclasses.fields(instance):  # type: ignore[arg-type]
        kinds, value = _numbers(field.type), getattr(instance, field.name)
        if kinds and (value is not None or NoneType not in kinds):
            object.__setattr__(instance, field.name, _number(field.name, value, kinds))


def whole_number(value: object) -> int | None:
    """A whole number of any library, NumPy's for example, or one that a division left as a float, as an
    int; None of whatever is none: booleans, too."""
    if _is_bool(value) or getattr(value, "shape", ()) != ():
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = real_number(value)
    # Above, floats do not tell whole numbers apart.
    whole = number is not None and number.is_integer() and abs(number) < 2**53
    return int(number) if whole else None  # type: ignore[arg-type]


def real_number(value: object) -> float | None:
    """A number, also of an array of none dimensions, as a float; None of whatever is none."""
    single = getattr(value, "shape", None) == ()
    if _is_bool(value) or not (single or isinstance(value, Number)):
        return None
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        return None


def indices_of(name: str, given: object, number: int | None = None) -> list[int]:
    """Indices that are given as such, or, where they are some of ``number`` in no order of their own, as
    a mask. As indices a mask would be 0 and 1, and floats be cut off.

    Examples::

        >>> from captum_classfilters._core.arguments import indices_of
        >>> indices_of("images", [4, 0]), indices_of("images", [True, False, True], 3)
        ([4, 0], [0, 2])
    """
    check_list(name, given)
    try:
        values = torch.as_tensor(given if hasattr(given, "shape") else list(given))  # type: ignore[call-overload]
    except (TypeError, ValueError, RuntimeError):
        values, found = torch.tensor(torch.nan), shortened(given)
    else:
        found = f"{values.dtype} of shape {tuple(values.shape)}"
    if values.dtype == torch.bool and number is not None and values.shape == (number,):
        return values.nonzero()[:, 0].tolist()
    if values.shape == (0,):
        return []
    if values.dim() != 1 or values.dtype not in _WHOLE:
        mask = "" if number is None else f", or a bool mask of shape ({number},)"
        raise ValueError(f"{name}: {found}; expected whole numbers of shape (n,), indices{mask}.")
    return values.tolist()


def check_confidence(confidence: float) -> None:
    """Raise unless an interval can have this coverage."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must lie between 0 and 1.")


def _is_bool(value: object) -> bool:
    """Whether a value is true or false, of any library."""
    return isinstance(value, bool) or "bool" in str(getattr(value, "dtype", ""))


def _kinds(annotation: object) -> tuple[type, ...]:
    """The classes that an annotation allows, if all of them can be looked at."""
    kinds = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    own = [kind for kind in kinds if _is_own(kind)]
    return tuple(kinds) if own and {*kinds} <= {*own, NoneType} else ()


def _is_own(kind: object) -> bool:
    if not isinstance(kind, type) or getattr(kind, "_is_protocol", False):
        return False
    return kind is Tensor or kind.__module__.partition(".")[0] == _PACKAGE


def _numbers(annotation: object) -> tuple[type, ...]:
    """The kinds of number that an annotation allows, and None, if it allows nothing else."""
    kinds = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    return tuple(kinds) if {*kinds} & {int, float} and {*kinds} <= {int, float, NoneType} else ()


def _number(name: str, value: object, kinds: tuple[type, ...]) -> int | float:
    """A number of Python's; what has a gradient, which it would lose, stays as it is."""
    if isinstance(value, Tensor) and value.requires_grad and value.dim() == 0 and float in kinds:
        return value  # type: ignore[return-value]
    whole = None if isinstance(value, float) and float in kinds else whole_number(value)
    if whole is not None:
        return whole
    number = real_number(value) if float in kinds else None
    if number is None:
        right = "a number" if float in kinds else "a whole number"
        right += " or None" if NoneType in kinds else ""
        raise ValueError(f"{name}={shortened(value)}; expected {right}.")
    return number


def _wanted(name: str, kinds: tuple[type, ...], given: object) -> str:
    if Tensor in kinds and isinstance(given, nn.Module) and holds_weight(given):  # a gate, a head
        return f"a Tensor, as {name}.weight is"
    if Tensor in kinds:
        return f"a Tensor, as torch.as_tensor({name}) gives"
    return " or ".join("None" if kind is NoneType else kind.__name__ for kind in kinds)
