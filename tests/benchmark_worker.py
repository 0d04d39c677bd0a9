"""A benchmark in a process of its own, forked from one that has imported what benchmarks import."""

import importlib
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

import torch

import benchmarks.memory
import benchmarks.scale  # noqa: F401  (once for all)
from tests.processes import clean_context


class Forked:
    """Stands in for the process that `benchmarks.shared.started` begins."""

    def __init__(self, module: str, arguments: Sequence[str], said: Path) -> None:
        self._said = said
        self._process = clean_context().Process(target=_run, args=(module, arguments, said))
        self._process.start()

    def communicate(self) -> tuple[str, None]:
        """What it printed until it ended."""
        self._process.join()
        return self._said.read_text("utf-8"), None

    @property
    def returncode(self) -> int | None:
        """How it ended."""
        return self._process.exitcode


def _run(module: str, arguments: Sequence[str], said: Path) -> None:
    torch.set_num_threads(1)
    with said.open("w", encoding="utf-8") as file, redirect_stdout(file):
        importlib.import_module(module).main(list(arguments))
