"""The tutorials run from the first cell to the last, offline, on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TUTORIALS = sorted((Path(__file__).parents[1] / "tutorials").glob("*.py"))


def test_there_are_tutorials():
    assert {path.stem for path in TUTORIALS} >= {
        "01_class_filters_in_five_minutes",
        "02_compare_with_integrated_gradients",
        "03_decompose_the_head",
        "04_prune_with_car",
        "05_train_class_specific_filters",
        "06_spectral_view",
    }


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_tutorial_shows_its_pictures(path):
    """Figures are no part of pyplot's state: a notebook shows one that is a cell's last value."""
    cells = path.read_text().split("# %%")
    drawn = [cell for cell in cells if "\nfigure, _ = " in cell]
    assert drawn
    assert all(cell.rstrip().endswith("\nfigure") for cell in drawn)


@pytest.mark.slow
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_tutorial_runs(path, tmp_path):
    environment = {**os.environ, "MPLBACKEND": "Agg", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, path], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
