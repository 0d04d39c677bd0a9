"""Several processes, with uneven, empty, failing, killed and mismatched shares of the data."""

import os
import pickle
import subprocess
import sys
from functools import lru_cache

import pytest
import torch

from captum_classfilters import ClassFilters
from tests import distributed_worker as worker
from tests.models import batches, deep, joined, known
from tests.processes import ROOT, clean_context

SIZES = [2, 3, 4]


def run(world, folder, *checks, answers=None):
    """What each check gave on each rank."""
    context = clean_context()
    pipes, processes = [], []
    for rank in range(world):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(
            target=worker.one_rank, args=(rank, world, folder / "store", theirs, checks)
        )
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        results = []
        for _ in checks:
            of_all = []
            for rank in range(world) if answers is None else answers:
                assert pipes[rank].poll(300), f"rank {rank} does not answer"
                of_all.append(pickle.loads(pipes[rank].recv_bytes()))
            results.append(of_all)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return results


def assert_alike(found, expected, exactly=()):
    assert torch.equal(found.counts, expected.counts)
    assert torch.equal(found.selected, expected.selected)
    assert torch.allclose(found.scores, expected.scores, rtol=1e-6, atol=1e-9)
    errors = known(found.standard_errors), known(expected.standard_errors)
    assert torch.allclose(*errors, rtol=1e-5, atol=1e-9)
    for name in exactly:
        assert torch.equal(known(getattr(found, name)), known(getattr(expected, name)))


@lru_cache
def one_process():
    return worker.all_results(0, 1)


@pytest.mark.parametrize("world", SIZES)
def test_uneven_and_empty_shares_give_the_results_of_one_process(world, tmp_path):
    of_ranks, said, shapes = run(
        world, tmp_path, ("all_results",), ("merging",), ("merging", (5, 6))
    )
    whole = one_process()
    assert sum(len(worker.share(rank, world)) for rank in range(world)) == 12
    for found in of_ranks:
        assert isinstance(found, dict), found
        for name, expected in whole["tables"].items():
            assert_alike(found["tables"][name], expected, ("p_values", "q_values"))
            assert found["tables"][name].provenance["num_images"] == 47
        votes = found["tables"]["frequency"], whole["tables"]["frequency"]
        assert torch.equal(votes[0].scores, votes[1].scores)
        assert_alike(found["evidence"], whole["evidence"])  # counted once
        for name in ("counts", "correct", "lost", "gained"):
            assert torch.equal(getattr(found["reduction"], name), getattr(whole["reduction"], name))
        assert torch.allclose(
            found["reduction"].log_probability_drop, whole["reduction"].log_probability_drop
        )
        assert found["classifier"].accuracy == whole["classifier"].accuracy
    table, classes = 3 * 5 * 8, 3 * 8  # bytes, however many ranks there are
    means, whole_numbers = [table + classes, table], [2 * table + classes]
    accuracy = [2 * table + 2 * classes, 2 * table]
    others = {"confusion": [3 * 3 * 8], "curves": [5 * classes + classes]}
    expected = {"means": means, "votes": whole_numbers, "accuracy": accuracy, **others}
    assert said == [expected] * world
    places = ", ".join(map(str, range(1, world)))
    differing = f"(3, 5) on rank 0 and (3, 6) on rank{'s' if world > 2 else ''} {places}"
    for kind, message, _ in shapes:
        assert kind == "ValueError"
        assert f"do not measure the same thing: the shape of 'mean' is {differing}" in message


@pytest.mark.slow
def test_under_torchrun(tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(ROOT / "tests" / "distributed_worker.py"),
        str(tmp_path),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=500, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr[-3000:]
    expected_counts = worker.reduction(deep(), batches(**worker.DATA))
    for rank in range(2):
        for name, expected in worker.tables(deep(), batches(**worker.DATA)).items():
            found = ClassFilters.load(tmp_path / f"{rank}-{name}.safetensors")
            assert_alike(found, expected, ("p_values", "q_values"))
        found = torch.load(tmp_path / f"{rank}-reduction.pt")
        for name in ("counts", "correct", "lost", "gained"):
            assert torch.equal(found[name], getattr(expected_counts, name))


@pytest.mark.parametrize("world", SIZES)
def test_where_one_fails_all_raise_the_same_error(world, tmp_path):
    checks = [*(("failing", entry) for entry in worker.ENTRIES), ("failing_on_nan",)]
    *failing, on_nan = run(world, tmp_path, *checks)
    for entry, of_ranks in zip(worker.ENTRIES, failing, strict=True):
        kinds, messages, partials = zip(*of_ranks, strict=True)
        assert set(kinds) == {"ValueError"}, messages
        assert len(set(messages)) == 1
        assert "rank 1 failed in batch 2: OSError: the disk is gone" in messages[0]
        if entry != "classifier":
            assert all(partial is not None for partial in partials)
    kinds, messages, partials = zip(*on_nan, strict=True)
    assert set(kinds) == {"ValueError"}
    assert len(set(messages)) == 1
    assert f"rank {world - 1} failed in batch 3: ValueError: NaN or Inf" in messages[0]
    counts = [int(partial["inner contribution"].counts.sum()) for partial in partials]
    assert counts == [24] * (world - 1) + [15]


def test_what_differs_is_named_on_all_ranks(tmp_path):
    whats = (
        "the model",
        "the layer",
        "the method",
        "num_filters",
        "class_names",
        "target",
        "attribute_to_layer_input",
        "significance",
    )
    checks = [("mismatched", what) for what in whats]
    *mismatched, early, classes, measurement = run(
        2,
        tmp_path,
        *checks,
        ("failing_early",),
        ("other_numbers_of_classes",),
        ("another_measurement",),
    )
    for what, of_ranks in zip(whats, mismatched, strict=True):
        kinds, messages, _ = zip(*of_ranks, strict=True)
        assert set(kinds) == {"ValueError"}
        assert len(set(messages)) == 1
        assert "do not measure the same thing" in messages[0]
        assert what in messages[0]
        assert "on rank 0 and" in messages[0]
        assert "on rank 1" in messages[0]
    assert "'stage2'" in mismatched[1][0][1]
    assert "'stage1'" in mismatched[1][0][1]
    assert {message for _, message, _ in early} == {early[0][1]}
    assert "rank 1 failed: ValueError: num_filters=0" in early[0][1]
    assert "the number of classes is 3 on rank 0 and 4 on rank 1" in classes[1][1]
    assert "do not measure the same thing" in measurement[0][1]


def test_a_killed_rank_does_not_leave_the_others_waiting(tmp_path):
    ((found,),) = run(2, tmp_path, ("killed",), answers=[0])
    kind, message, partial = found
    assert kind == "ValueError"
    assert "got no answer from the others" in message
    assert int(partial["inner contribution"].counts.sum()) == 24
    assert "imed out" not in message  # after the time that `worker.one_rank` gives the others


def test_images_that_a_sampler_repeats_count_once(tmp_path):
    checks = [
        ("sampled", shuffle, drop_last, number)
        for shuffle, drop_last, number in (
            (False, False, 47),  # 48 with one repeated
            (True, False, 46),
            (True, True, 47),
            (False, False, 2),  # fewer than ranks
            (False, False, 45),
        )
    ]
    for (_, shuffle, drop_last, number), of_ranks in zip(
        checks, run(3, tmp_path, *checks), strict=True
    ):
        x, y = joined(batches(**worker.DATA))
        for found in of_ranks:
            assert isinstance(found, dict), found
            table = found["tables"]["inner contribution"]
            if drop_last:
                assert int(table.counts.sum()) == 45
                continue
            data = [(x[:number], y[:number])]
            expected = worker.tables(deep(), data)["inner contribution"]
            assert torch.equal(table.counts, expected.counts)
            assert torch.allclose(
                table.scores, expected.scores, rtol=1e-5, atol=1e-8, equal_nan=True
            )
            lost = worker.reduction(deep(), data).lost
            assert torch.equal(found["reduction"].lost, lost), shuffle


def test_a_run_goes_on_where_its_ranks_were(tmp_path):
    folder = tmp_path / "states"
    folder.mkdir()
    (of_ranks,) = run(3, tmp_path, ("interrupted", str(folder)))
    whole = worker.tables(deep(), batches(**worker.DATA))
    for rank, found in enumerate(of_ranks):
        assert isinstance(found, dict), found
        assert found["left"] == ["state.rank0", "state.rank1"]  # rank 2 has no image
        assert found["then"] == []
        assert (found["counted"] is None) == (rank == 2)
        for name, expected in whole.items():
            assert_alike(found["tables"][name], expected, ("p_values",))


def test_every_entry_is_summed_or_refused(tmp_path):
    (of_ranks,) = run(2, tmp_path, ("survey",))
    summed = {name for name, said in of_ranks[0].items() if said == "has a result"}
    assert of_ranks[1].keys() == of_ranks[0].keys()
    for name, said in of_ranks[0].items():
        if name not in summed:
            assert "not added up over processes" in said, name
            assert "in a single process" in said
    assert summed == {
        "identify, votes",
        "identify, contributions at the head",
        "identify, contributions inside",
        "identify, ablation",
        "accuracy reduction",
        "evidence",
        "random weights",
        "accuracy",
        "accuracy curve",
        "selection by accuracy",
    }
