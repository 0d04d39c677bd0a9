r"""What :mod:`benchmarks.attack` does to runs: kills them, and spreads them over processes.

    python -m benchmarks.attack --part kills    # killed at random moments, and started again
    python -m benchmarks.attack --part threads  # several at once on one model, and from its hooks
    python -m benchmarks.attack --part ranks    # under torchrun, with 2, 3 and 4 processes

A killed run survives if the run that goes on from its state gives the result of one that was never killed,
bit for bit. Processes survive if all of them have the result of one process, or all raise the same error,
which says what is wrong with whom.
"""

import dataclasses
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.shared import QUIET
from captum_classfilters import (
    ClassFilters,
    LabelPermutation,
    LayerFilterAblation,
    LayerFilterContribution,
    LayerFilterFrequency,
    identify_class_filters,
)
from captum_classfilters.identify import collect_evidence, exemplars

Data = list[tuple[Tensor, Tensor]]
#: A kind of attack, how often it was tried, and what did not survive.
Report = tuple[str, int, list[str]]
_ROOT = Path(__file__).parents[1]


def small_net() -> nn.Sequential:
    """A network of two stages, the same in every process."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5),
    ).eval()  # fmt: skip


def small_data(number: int = 30) -> Data:
    """Batches of four images, the last of one."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4 * number - 3, 3, 12, 12, generator=generator)
    labels = torch.randint(0, 5, (len(images),), generator=generator)
    return list(zip(images.split(4), labels.split(4), strict=True))


# -- kills ------------------------------------------------------------------------------------------


def _tables(data: Data, net: nn.Module | None = None, **options: Any) -> object:
    net = net or small_net()
    methods = {
        "votes": LayerFilterFrequency(net, "2", top_k=2),
        "head": LayerFilterContribution(net, "4"),
        "inside": LayerFilterContribution(net, "2"),
    }
    return identify_class_filters(methods, data, num_filters=3, **QUIET, **options)


def _significance(data: Data, net: nn.Module | None = None, **options: Any) -> object:
    test = LabelPermutation(permutations=19)
    return LayerFilterContribution(net or small_net(), "4").identify(
        data, significance=test, **QUIET, **options
    )


def _accuracy(data: Data, net: nn.Module | None = None, **options: Any) -> object:
    return LayerFilterAblation(net or small_net(), "2").identify(
        data, metric="accuracy", **QUIET, **options
    )


def _evidence(data: Data, net: nn.Module | None = None, **options: Any) -> object:
    return collect_evidence(
        LayerFilterContribution(net or small_net(), "2"), data, **QUIET, **options
    )


def _exemplars(data: Data, net: nn.Module | None = None, **options: Any) -> object:
    return exemplars(net or small_net(), ["2", "4"], data, num_exemplars=3, **QUIET, **options)


PASSES: dict[str, Callable[..., object]] = {
    "tables": _tables,
    "tables with p-values": _significance,
    "accuracy reduction": _accuracy,
    "evidence": _evidence,
    "exemplars": _exemplars,
}


def kills(number: int, seed: int) -> Iterator[Report]:
    """Kill runs so many times, each up to four times before one may end."""
    torch.set_num_threads(1)  # processes are forked
    chance, data = random.Random(seed), small_data()
    for place, (name, call) in enumerate(PASSES.items()):
        share = number // len(PASSES) + (place < number % len(PASSES))
        with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
            warnings.simplefilter("ignore")
            yield _killed(name, call, data, share, chance, Path(folder) / "state")


def _killed(
    name: str,
    call: Callable[..., object],
    data: Data,
    number: int,
    chance: random.Random,
    path: Path,
) -> Report:
    whole, began = told(call(data)), time.perf_counter()
    call(data, state_path=path, save_every=0)
    duration = time.perf_counter() - began
    failures: list[str] = []
    left = number
    while left > 0:
        some = min(left, chance.randint(1, 4))
        left -= some
        for _ in range(some):
            _run_and_kill(call, data, path, duration * chance.random())
        states = path.exists()
        try:
            again = told(call(data, state_path=path, save_every=0))
        except Exception as error:
            again = f"{type(error).__name__}: {error}"
            path.unlink(missing_ok=True)
        if again != whole:
            failures.append(f"kills: {name}: another result (state: {states}): {str(again)[:200]}")
        left_over = [file.name for file in path.parent.iterdir()]
        if left_over:
            failures.append(f"kills: {name}: left over {left_over}")
    return f"kills: {name}", number, failures


def _run_and_kill(call: Callable[..., object], data: Data, path: Path, seconds: float) -> None:
    """Run in a process of its own, from memory that is warm, and kill it so soon after it began."""
    begun, pipe = os.pipe()

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        os.write(pipe, b".")
        yield from data

    def run() -> None:
        call(batches(), state_path=path, save_every=0)
        time.sleep(60)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    os.close(pipe)  # so that the other end is told if the process dies by itself
    if not os.read(begun, 1):
        raise SystemExit("A run ended before it was killed.")
    time.sleep(seconds)
    process.kill()
    process.join()
    os.close(begun)


# -- threads ----------------------------------------------------------------------------------------


def threads(number: int, seed: int) -> Iterator[Report]:
    """Calls of three threads at once on one model, and calls from a hook of a running call."""
    torch.set_num_threads(1)
    net, data, chance = small_net().train(), small_data(6), random.Random(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = {name: told(call(data, net)) for name, call in PASSES.items()}
        before, failures = _as_it_is(net), []
        for _ in range(number):
            names = chance.choices(list(PASSES), k=3)
            failures += _at_once(names, net, data, expected)
            if _as_it_is(net) != before:
                failures.append(f"{names} left the model changed")
        yield "three threads on one model", 3 * number, failures
        yield (
            "calls from a hook of a running call",
            len(PASSES) ** 2,
            _from_hooks(net, data, expected),
        )


def _as_it_is(net: nn.Module) -> list[object]:
    flags = [(module.training, len(module._forward_hooks)) for module in net.modules()]
    return [flags, [(told(p.data), p.requires_grad) for p in net.parameters()]]


def _at_once(
    names: list[str], net: nn.Module, data: Data, expected: Mapping[str, object]
) -> list[str]:
    failures: list[str] = []

    def work(name: str) -> None:
        try:
            if told(PASSES[name](data, net)) != expected[name]:
                failures.append(f"{name} beside {names}: another result")
        except Exception as error:
            failures.append(f"{name} beside {names}: {error!r}")

    running = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return failures


def _from_hooks(net: nn.Module, data: Data, expected: Mapping[str, object]) -> list[str]:
    failures = []
    for outer in PASSES:
        for inner in PASSES:
            refusals: list[str] = []

            def hook(*_: object, inner: str = inner, refusals: list[str] = refusals) -> None:
                try:
                    PASSES[inner](data, net)
                except ValueError as error:
                    refusals.append(str(error))

            handle = net.get_submodule("2").register_forward_hook(hook)
            result = PASSES[outer](data, net)
            handle.remove()
            if not refusals or not all("calls the package again" in text for text in refusals):
                failures.append(f"{inner} inside {outer}: {refusals[:1]}")
            if told(result) != expected[outer]:
                failures.append(f"{inner} inside {outer}: another result")
    return failures


def told(value: Any) -> Any:
    """A result as plain values that can be compared bit by bit; not when it was made."""
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().numpy().tobytes()
    if isinstance(value, ClassFilters):
        parts = ("scores", "counts", "selected", "standard_errors", "p_values", "q_values")
        return [told(getattr(value, part)) for part in parts] + [told(dict(value.provenance))]
    if dataclasses.is_dataclass(value):
        return [told(getattr(value, part.name)) for part in dataclasses.fields(value)]
    if isinstance(value, Mapping):
        return {key: told(part) for key, part in value.items() if key != "created"}
    if isinstance(value, (list, tuple)):
        return [told(part) for part in value]
    return value


# -- ranks ------------------------------------------------------------------------------------------

CASES = ("uneven", "one is empty", "one fails", "one is killed", "one differs")


def ranks(sizes: tuple[int, ...]) -> Iterator[Report]:
    """Run every case under torchrun with so many processes."""
    net, data = small_net(), small_data(12)
    expected = LayerFilterContribution(net, "2").identify(data, num_filters=3, **QUIET)
    for case in CASES:
        failures = []
        for size in sizes:
            with tempfile.TemporaryDirectory() as folder:
                failure = _launched(case, size, Path(folder), expected)
            if failure:
                failures.append(f"ranks: {case}, {size} processes: {failure}")
        yield f"ranks: {case}", len(sizes), failures


def _launched(case: str, size: int, folder: Path, expected: ClassFilters) -> str | None:
    """What went wrong, if anything."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={size}", "-m", "benchmarks.attack_runs", case, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        result = subprocess.run(
            command, cwd=_ROOT, env=environment, capture_output=True, text=True, timeout=300
        )
    except subprocess.TimeoutExpired:
        return "they wait for each other"
    if case == "one is killed":
        return None if result.returncode else "nobody noticed"
    answers = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    if len(answers) != size:
        return f"{len(answers)} processes answered: {result.stderr[-300:]}"
    if any(answer != answers[0] for answer in answers):
        return f"they say different things: {answers}"
    said = {"one fails": "rank 1 failed in batch 1: OSError", "one differs": "num_filters is 3"}
    if case in said:
        found = str(answers[0])
        return None if said[case] in found else f"they say {found}"
    for rank in range(size):
        table = ClassFilters.load(folder / f"{rank}.safetensors")
        close = torch.allclose(table.scores, expected.scores, rtol=1e-6, atol=1e-9)
        if not close or not torch.equal(table.counts, expected.counts):
            return f"rank {rank} has another table"
    return None


def one_rank(case: str, folder: Path) -> None:
    """What each process does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size, data = dist.get_rank(), dist.get_world_size(), small_data(12)
    own = data[rank::size] if case != "uneven" else data[rank * 2 : (rank + 1) * 2]
    if case == "uneven" and rank == size - 1:
        own = data[rank * 2 :]
    if case == "one is empty":
        own = data[rank - 1 :: size - 1] if rank else []

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for number, batch in enumerate(own):
            if rank == 1 and number == 1 and case == "one fails":
                raise OSError("the disk is gone")
            if rank == 1 and number == 1 and case == "one is killed":
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch

    answer = "a table"
    try:
        table = LayerFilterContribution(small_net(), "2").identify(
            batches(), num_filters=4 if case == "one differs" and rank else 3, **QUIET
        )
        table.save(folder / f"{rank}.safetensors")
    except ValueError as error:
        answer = str(error)
    (folder / f"{rank}.json").write_text(json.dumps(answer))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    one_rank(sys.argv[1], Path(sys.argv[2]))
