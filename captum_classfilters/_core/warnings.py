"""Warnings that point at the user's own line."""

import contextlib
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import captum
import torch

# Between a user's line and ours there may be decorators of these.
_INSIDE = (
    *(str(Path(module.__file__ or "").parent) for module in (captum, torch)),
    str(Path(__file__).parent.parent),
    contextlib.__file__,
)


def warn(message: str) -> None:
    """Warn as if the caller of this package had: at the first line outside of it."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


@contextlib.contextmanager
def unsaid(*beginnings: str) -> Iterator[None]:
    """No warnings that begin like this: for what a result tells by itself."""
    with warnings.catch_warnings():
        for beginning in beginnings:
            warnings.filterwarnings("ignore", re.escape(beginning), UserWarning)
        yield
