"""What every test and every docstring's example begins with."""

import random

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The same random numbers, whatever ran before in the process."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


# A worker takes whole files: those that take longest first, or one is left alone with one at the end.
LONGEST = (
    "test_tutorials.py",
    "test_benchmarks.py",
    "test_pages.py",
    "test_torchvision_families.py",
    "test_pruning.py",
    "test_commands.py",
    "test_every_picture.py",
    "test_every_loader.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The order in which several workers take files; one worker alone keeps pytest's own."""
    if hasattr(config, "workerinput"):
        places = {name: place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: places.get(item.path.name, len(places)))
