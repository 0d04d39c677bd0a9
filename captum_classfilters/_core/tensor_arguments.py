"""Arguments that should be Tensors and are not, refused by name."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def tensors_checked(function: Callable[P, R]) -> Callable[P, R]:
    """Have a function raise a ValueError that names what it takes as a Tensor and is something else.

    Looked at are the parameters that are annotated as ``Tensor``, or as that or None.
    """
    signature = inspect.signature(function)
    expected: dict[str, tuple[type, ...]] = {}
    for name, parameter in signature.parameters.items():
        if parameter.annotation is Tensor:
            expected[name] = (Tensor,)
        elif parameter.annotation == Tensor | None:
            expected[name] = (Tensor, type(None))

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        given = signature.bind_partial(*args, **kwargs).arguments
        for name, kinds in expected.items():
            if name in given and not isinstance(given[name], kinds):
                raise ValueError(
                    f"{name} is a {type(given[name]).__name__}; expected a Tensor, as "
                    f"torch.as_tensor({name}) gives."
                )
        return function(*args, **kwargs)

    return checked
