"""Under torchrun, with two processes and uneven shares, the table is one process's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from captum_classfilters import ClassFilters
from tests.distributed_worker import reduction, tables
from tests.models import batches, deep, known

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("split", [1, 5], ids=["uneven shares", "one share is empty"])
def test_two_ranks_give_the_table_of_one_process(tmp_path, split):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(ROOT / "tests" / "distributed_worker.py"),
        str(tmp_path),
        str(split),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr[-3000:]
    for name, expected in tables(deep(), batches()).items():
        for rank in range(2):
            found = ClassFilters.load(tmp_path / f"{split}-{rank}-{name}.safetensors")
            assert torch.equal(found.counts, expected.counts)
            assert torch.equal(found.selected, expected.selected)
            if name == "frequency":
                assert torch.equal(found.scores, expected.scores)
                assert torch.equal(known(found.q_values), known(expected.q_values))
            # Each rank draws foreign targets of its own; all ranks get one and the same test.
            first = ClassFilters.load(tmp_path / f"{split}-0-{name}.safetensors")
            assert torch.equal(known(found.p_values), known(first.p_values))
            assert torch.allclose(known(found.p_values), known(expected.p_values), atol=0.5)
            assert torch.allclose(found.scores, expected.scores, rtol=1e-6, atol=1e-9)
            assert torch.allclose(
                known(found.standard_errors), known(expected.standard_errors), rtol=1e-5, atol=1e-9
            )
    expected = reduction(deep(), batches())
    for rank in range(2):
        found = torch.load(tmp_path / f"{split}-{rank}-reduction.pt")
        for name in ("counts", "correct", "lost", "gained"):
            assert torch.equal(found[name], getattr(expected, name))
        assert torch.allclose(found["log_probability_drop"], expected.log_probability_drop)
    assert int(expected.counts.sum()) == sum(len(labels) for _, labels in batches())
