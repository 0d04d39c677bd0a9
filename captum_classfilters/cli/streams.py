"""What the command line prints, to readers that may leave before the end: ``| head`` for example."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TextIO

from captum_classfilters._core.files import end_nowhere


class _Stream:
    """A stream that falls silent once nobody reads it, so that what is printed costs no result."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, if somebody reads."""
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._silence()
            return len(text)

    def flush(self) -> None:
        """Flush, if somebody reads."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._silence()

    def _silence(self) -> None:
        end_nowhere(self._stream)


@contextmanager
def readers_may_leave() -> Iterator[None]:
    """Go on without standard output, or standard error, once nobody reads it any more."""
    # Python itself has None for a stream that is closed from the start.
    output, errors = (stream and _Stream(stream) for stream in (sys.stdout, sys.stderr))
    with redirect_stdout(output), redirect_stderr(errors):
        try:
            yield
        finally:
            for stream in (output, errors):
                if stream is not None:
                    stream.flush()
