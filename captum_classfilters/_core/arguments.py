"""Arguments that should be Tensors or objects of this package and are not, refused by name."""

import inspect
import operator
from collections.abc import Callable
from functools import wraps
from types import NoneType, UnionType
from typing import ParamSpec, TypeVar, get_args

import torch
from torch import Tensor

from captum_classfilters._core.names import kind_of

P = ParamSpec("P")
R = TypeVar("R")
_PACKAGE = __name__.partition(".")[0]


def arguments_checked(function: Callable[P, R]) -> Callable[P, R]:
    """Have a function raise a ValueError that names an argument of the wrong type.

    Looked at are the parameters that are annotated as ``Tensor``, as a class of this package, or as
    one of these or None.
    """
    signature = inspect.signature(function)
    expected = {name: _kinds(p.annotation) for name, p in signature.parameters.items()}
    expected = {name: kinds for name, kinds in expected.items() if kinds}

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        given = signature.bind_partial(*args, **kwargs).arguments
        for name, kinds in expected.items():
            if name in given and not isinstance(given[name], kinds):
                found = kind_of(given[name])
                raise ValueError(f"{name} is {found}; expected {_wanted(name, kinds)}.")
        return function(*args, **kwargs)

    return checked


def whole_number(value: object) -> int | None:
    """A whole number of any library, NumPy's for example, as an int; None of whatever is none: booleans
    and floats, too."""
    several = getattr(value, "shape", ()) != ()
    if isinstance(value, bool) or getattr(value, "dtype", None) == torch.bool or several:
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def _kinds(annotation: object) -> tuple[type, ...]:
    """The classes that an annotation allows, if all of them can be looked at."""
    kinds = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    own = [kind for kind in kinds if _is_own(kind)]
    return tuple(kinds) if own and {*kinds} <= {*own, NoneType} else ()


def _is_own(kind: object) -> bool:
    if not isinstance(kind, type) or getattr(kind, "_is_protocol", False):
        return False
    return kind is Tensor or kind.__module__.partition(".")[0] == _PACKAGE


def _wanted(name: str, kinds: tuple[type, ...]) -> str:
    if Tensor in kinds:
        return f"a Tensor, as torch.as_tensor({name}) gives"
    return " or ".join("None" if kind is NoneType else kind.__name__ for kind in kinds)
