"""What every test and every docstring's example begins with."""

import gc
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


def pytest_collection_finish() -> None:
    """Have the garbage collector pass over what stays: the modules and the tests themselves."""
    gc.collect()
    gc.freeze()
