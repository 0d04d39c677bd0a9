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
def test_a_cell_that_plots_shows_its_figure(path):
    cells = [cell for cell in path.read_text().split("# %%") if "figure, _ = plot" in cell]
    for cell in cells:  # figures are not pyplot's, which notebooks would show by themselves
        assert cell.rstrip().endswith("\nfigure"), cell


@pytest.mark.slow
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_tutorial_runs(path, tmp_path):
    environment = {**os.environ, "MPLBACKEND": "Agg", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, path], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
