"""A tutorial in a process of its own, forked from one that has imported what tutorials import."""

import os
import runpy
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from unittest import mock

# Once for all tutorials, and what lies behind the library's own late imports.
import torch

import captum_classfilters.atlas
import captum_classfilters.cli.demo
import captum_classfilters.cli.main
import captum_classfilters.gates
import captum_classfilters.spectral  # noqa: F401
from captum_classfilters._core import extras


def run_script(script: Path, folder: Path, said: Path, pipe: Connection) -> None:
    """Run a script in a folder, what it prints going to a file; send which packages of extras the
    library asked for meanwhile."""
    asked: set[str] = set()

    def recording(module: str) -> object:
        asked.add(module.partition(".")[0])
        return __import__(module)

    with said.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    torch.set_num_threads(1)
    os.chdir(folder)
    sys.argv = [str(script)]
    with mock.patch.object(extras, "__import__", recording, create=True):
        runpy.run_path(str(script), run_name="__main__")
    pipe.send(asked)
