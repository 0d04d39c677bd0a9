"""Processes of their own for tests: forked from one that has imported all there is and started no threads."""

import multiprocessing
import os
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WORKERS = ("benchmark", "distributed", "killed", "tutorial")


def clean_context() -> ForkServerContext:
    """A process that has started threads must not be forked, and tests before may have."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"tests.{name}_worker" for name in WORKERS])
    with pytest.MonkeyPatch.context() as patched:  # some versions leave the path out
        patched.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
        patched.setenv("MPLBACKEND", "Agg")
        patched.setenv("HF_HUB_OFFLINE", "1")
        forkserver.ensure_running()
    return context
