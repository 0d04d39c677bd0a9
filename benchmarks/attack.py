r"""Attacks on what must not get lost or go wrong unseen: damaged files, killed runs, failing processes.

    python -m benchmarks.attack                # all parts
    python -m benchmarks.attack --part files   # 10,000 damaged and forged files of every kind
    python -m benchmarks.attack --part kills   # 200 kills of runs that are started again
    python -m benchmarks.attack --part threads # 300 calls of threads on one model, and from its hooks
    python -m benchmarks.attack --part ranks   # under torchrun, with 2, 3 and 4 processes

A damaged file survives if reading it raises ValueError, or gives exactly what was saved; a damaged cache,
if the numbers are those of a new computation. A forged file, whose checksum was made to fit, survives if
it is refused by ValueError, or holds values that are saved and read back the same.
"""

import argparse
import json
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from benchmarks import attack_runs
from benchmarks.shared import Table, parsed, parser
from captum_classfilters import ClassFilters, LayerFilterContribution
from captum_classfilters._core import checkpoints, tensor_files
from captum_classfilters.gates import ClassSpecificGate, GatedTrainer
from captum_classfilters.pruning.pruning_order import PruningOrder
from captum_classfilters.spectral import model_svd

Bytes = bytes | bytearray


@dataclass(frozen=True)
class Outcome:
    """What became of an attack."""

    attack: str
    tried: int
    survived: int
    failures: Sequence[str] = ()


def main(given: Sequence[str] | None = None) -> None:
    """Attack, and say what survived; fail if anything did not."""
    options = parser(__doc__)
    options.add_argument("--part", choices=list(PARTS), help="by default all")
    options.add_argument("--files", type=int, default=10_000, help="how many files")
    options.add_argument("--kills", type=int, default=200, help="how many kills")
    options.add_argument("--threads", type=int, default=100, help="how often three at once")
    options.add_argument("--ranks", type=int, nargs="*", default=[2, 3, 4], help="processes")
    options.add_argument("--seed", type=int, default=0)
    arguments = parsed(options, given, files=60, kills=5, threads=3, ranks=[])
    failures: list[str] = []
    table = Table("attack", "tried", "survived", "seconds")
    for name in [arguments.part] if arguments.part else PARTS:
        began = time.perf_counter()
        for outcome in PARTS[name](arguments):
            seconds, began = time.perf_counter() - began, time.perf_counter()
            table.row(
                outcome.attack, f"{outcome.tried:,}", f"{outcome.survived:,}", f"{seconds:.1f}"
            )
            failures += outcome.failures
    if failures:
        raise SystemExit("\n".join(["What did not survive:", *failures[:20]]))


# -- files ------------------------------------------------------------------------------------------


class Kind:
    """A kind of file: how one is made, and what reading one gives."""

    schema: tensor_files.Schema | None = None
    checked = True  # by a checksum

    def write(self, path: Path, seed: int) -> None:
        """Write the file that a seed stands for."""
        raise NotImplementedError

    def read(self, path: Path) -> object:
        """What can be compared with what another file gives."""
        raise NotImplementedError

    def read_again(self, path: Path) -> object:
        """The same after what was read has been saved; None where it is used up."""
        return self.read(path)


class TableKind(Kind):
    """Class filters."""

    schema = tensor_files.Schema("class_filters", "", 2, "", "")

    def write(self, path: Path, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        scores, errors, chances = torch.rand(3, 4, 5, generator=generator, dtype=torch.float64)
        table = ClassFilters(
            scores,
            torch.tensor([3, 1, 0, 7]),
            scores.gt(0.5) & torch.tensor([1, 1, 0, 1]).bool()[:, None],
            errors if seed % 3 else None,
            ["cat", "dög", "fox \ud800", f"{seed}"],
            "layer4",
            "Example",
            {"options": {"num_filters": 3, "nested": [1, [2.5, None]]}},
            chances if seed % 2 else None,
            chances.sqrt() if seed % 2 else None,
        )
        table.save(path, overwrite=True)

    def read(self, path: Path) -> object:
        return told(ClassFilters.load(path)._parts())

    def read_again(self, path: Path) -> object:
        ClassFilters.load(path).save(path, overwrite=True)
        return self.read(path)


class OrderKind(Kind):
    """Records of pruning runs."""

    schema = tensor_files.Schema("pruning_order", "", 2, "", "")

    def write(self, path: Path, seed: int) -> None:
        steps = seed % 3
        PruningOrder(
            {"conv": 6, "late.conv": 4},
            [("conv", 3), ("late.conv", 0)][:steps],
            [0.9, 0.8, 1.0][: steps + 1],
            [],
            [24, 20][:steps],
            [24, 24][:steps],
            f"{seed:064x}",
            {"schedule": "all_layers", "num_filters": 3, "fine_tune": {"function": "tune"}},
            {"conv": "replay"},
            24,
            0.31,
            f"{seed + 1:064x}",
            None,
            {"w": torch.full((2, 3), float(seed)), "n": torch.tensor(seed)} if seed % 2 else None,
        ).save(path)

    def read(self, path: Path) -> object:
        return told(vars(PruningOrder.load(path)))

    def read_again(self, path: Path) -> object:
        PruningOrder.load(path).save(path)
        return self.read(path)


class CacheKind(Kind):
    """Decompositions of weights, which are computed again where a file is damaged."""

    schema = tensor_files.Schema("layer_svd", "", 1, "", "")

    def _net(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(2, 3 + seed % 2, 2), nn.Flatten())

    def write(self, path: Path, seed: int) -> None:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            _ = model_svd(self._net(seed), right=True, cache=folder)["0"]
            (file,) = Path(folder).iterdir()
            file.replace(path)
        self.seed, self.name = seed, file.name

    def read(self, path: Path) -> object:
        place = path.with_name(self.name)
        path.replace(place)
        svd = model_svd(self._net(self.seed), right=True, cache=path.parent)["0"]
        place.replace(path)
        return told({**vars(svd), "route": svd.route.removesuffix(", from disk")})


class TrainerKind(Kind):
    """States of trainers."""

    schema = tensor_files.Schema("gated_trainer", "", 1, "", "")

    def _trainer(self, seed: int) -> GatedTrainer:
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        gate = ClassSpecificGate(2, 4, "uniform").attach(net, "1")
        plain = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        steps = torch.optim.lr_scheduler.MultiStepLR(plain, [1, 1, 2])
        return GatedTrainer(net, gate, plain, scheduler=steps)

    def write(self, path: Path, seed: int) -> None:
        trainer = self._trainer(seed)
        data = [(torch.rand(4, 3), torch.tensor([0, 1, 1, 0]))]
        trainer.fit(data, epochs=1 + seed % 2, show_progress=False)
        trainer.save(path)

    def read(self, path: Path) -> object:
        trainer = self._trainer(-1)
        before = told(trainer.state_dict())
        try:
            trainer.load(path)
        except ValueError:
            assert told(trainer.state_dict()) == before, "changed by a file that was refused"
            raise
        return told(trainer.state_dict())


class StopError(Exception):
    """What ends a pass."""


class PassKind(Kind):
    """States of passes over data, which go on where they were stopped."""

    schema = tensor_files.Schema("pass", "", 1, "", "")

    def _identify(self, path: Path, seed: int, stop: int | None = None) -> object:
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        data = [(torch.rand(4, 3), torch.tensor([0, 1, 1, 0])) for _ in range(3)]

        def batches() -> Iterator[object]:
            for number, batch in enumerate(data):
                if number == stop:
                    raise StopError
                yield batch

        table = LayerFilterContribution(net, "1").identify(
            batches(), state_path=path, save_every=0, show_progress=False
        )
        return told([table.scores, table.counts, table.standard_errors, table.selected])

    def write(self, path: Path, seed: int) -> None:
        path.unlink(missing_ok=True)
        self.seed = seed
        with suppress(StopError):
            self._identify(path, seed, stop=1 + seed % 2)

    def read(self, path: Path) -> object:
        return self._identify(path, self.seed)

    def read_again(self, path: Path) -> object:
        return None


class CheckpointKind(Kind):
    """Weights of other programs, which have no checksum."""

    checked = False

    def write(self, path: Path, seed: int) -> None:
        state = {"module.weight": torch.rand(3, 4), "module.bias": torch.arange(3)}
        if seed % 2:
            torch.save({"state_dict": state}, path)
        else:
            save_file(state, path)

    def read(self, path: Path) -> object:
        return told(checkpoints.read_state_dict(path))


KINDS: dict[str, Callable[[], Kind]] = {
    "tables": TableKind,
    "records of pruning runs": OrderKind,
    "caches": CacheKind,
    "states of passes": PassKind,
    "states of trainers": TrainerKind,
    "checkpoints": CheckpointKind,
}


def told(value: object) -> object:
    """A nested value that can be compared, bit by bit."""
    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return str(value.dtype), tuple(value.shape), data
    if isinstance(value, dict):
        return [(repr(key), told(part)) for key, part in value.items()]
    if isinstance(value, (list, tuple)):
        return [told(part) for part in value]
    return repr(value)


def attack_files(arguments: argparse.Namespace) -> Iterator[Outcome]:
    """Damage files of every kind."""
    for name, kind in KINDS.items():
        yield attack_kind(name, kind(), arguments.files // len(KINDS), arguments.seed)


def attack_kind(name: str, kind: Kind, number: int, seed: int) -> Outcome:
    """Damage so many files of one kind, and see what reading them gives."""
    chance = random.Random(f"{name} {seed}")
    failures: list[str] = []
    random_states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a cache is computed again, for example
        path, other = Path(folder) / "file", Path(folder) / "other"
        for trial in range(number):
            if trial % 25 == 0:
                kind.write(other, trial + 1)
                kind.write(path, trial)
                whole, donor = path.read_bytes(), other.read_bytes()
                saved = kind.read(path)
            forge = kind.schema is not None and chance.random() < 0.25
            how = forged if forge else chance.choice(DAMAGES)
            damaged = how(whole, donor, chance, kind)
            path.write_bytes(damaged)
            failure = _failure(kind, path, saved, forge or not kind.checked)
            if failure:
                failures.append(f"{name}, {trial}, {how.__name__}: {failure}")
    torch.set_rng_state(random_states[0])
    np.random.set_state(random_states[1])
    random.setstate(random_states[2])
    return Outcome(f"files: {name}", number, number - len(failures), failures)


def _failure(kind: Kind, path: Path, saved: object, may_differ: bool) -> str | None:
    """What went wrong, if anything."""
    try:
        found = kind.read(path)
        if not may_differ:
            return None if found == saved else "other values, and nothing was said"
        if kind.checked:
            again = kind.read_again(path)
            return None if again is None or again == found else "not read as it was saved"
    except ValueError as error:
        return None if str(error) else "a ValueError without words"
    except Exception as error:  # which is what is looked for
        return f"{type(error).__name__}: {error}"
    return None


# -- ways to damage a file ---------------------------------------------------------------------------


def flip_bits(whole: bytes, donor: bytes, chance: random.Random, kind: Kind) -> Bytes:
    """One to four bits, in the header as often as in the data."""
    damaged = bytearray(whole)
    end = header_end(whole)
    for _ in range(chance.randint(1, 4)):
        in_header = chance.random() < 0.5 or end >= len(whole)
        place = chance.randrange(end) if in_header else chance.randrange(end, len(whole))
        damaged[place] ^= 1 << chance.randrange(8)
    return damaged


def truncate(whole: bytes, donor: bytes, chance: random.Random, kind: Kind) -> Bytes:
    """The start of the file, nothing included."""
    return whole[: chance.choice([0, chance.randrange(16), chance.randrange(len(whole))])]


def splice(whole: bytes, donor: bytes, chance: random.Random, kind: Kind) -> Bytes:
    """A piece of another file in place of one, or as well, or a piece less."""
    start, stop = sorted(chance.choices(range(len(whole)), k=2))
    first, last = sorted(chance.choices(range(len(donor)), k=2))
    piece = chance.choice([donor[start:stop], donor[first:last], b"", whole[start:stop] * 2])
    return whole[:start] + piece + whole[stop:]


def swap_tensors(whole: bytes, donor: bytes, chance: random.Random, kind: Kind) -> Bytes:
    """The record of one file with the tensors of another."""
    return whole[: header_end(whole)] + donor[header_end(donor) :]


def change_length(whole: bytes, donor: bytes, chance: random.Random, kind: Kind) -> Bytes:
    """Another length of the header than it has."""
    length = header_end(whole) - 8
    others = [0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1, chance.randrange(2**64)]
    return chance.choice(others).to_bytes(8, "little") + whole[8:]


def change_header(whole: bytes, donor: bytes, chance: random.Random, kind: Kind) -> Bytes:
    """Other JSON in the header, or in the record, with the checksum as it was."""
    header = parsed_header(whole)
    if header is None:
        return flip_bits(whole, donor, chance, kind)
    metadata = header.get("__metadata__", {})
    if kind.schema is not None and chance.random() < 0.5:
        record = mutated(json.loads(metadata[kind.schema.key]), chance)
        metadata[kind.schema.key] = json.dumps(record)
    else:
        header = mutated(header, chance)
    return with_header(json.dumps(header), whole)


def be_another_file(whole: bytes, donor: bytes, chance: random.Random, kind: Kind) -> Bytes:
    """Something else under its name."""
    deep = "[" * 100_000 + "]" * 100_000
    metadata = {kind.schema.key if kind.schema else "x": deep}
    texts = ('{"__metadata__":' + deep + "}", json.dumps({"__metadata__": metadata}), "{}", deep)
    return chance.choice(
        [
            b"a text",
            b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94\x8c\x06system\x94\x93\x94.",
            b"PK\x03\x04" + bytes(40),
            bytes(chance.randrange(100)),
            *(len(text).to_bytes(8, "little") + text.encode() for text in texts),
        ]
    )


DAMAGES: tuple[Callable[[bytes, bytes, random.Random, Kind], Bytes], ...] = (
    flip_bits,
    flip_bits,
    truncate,
    splice,
    swap_tensors,
    change_length,
    change_header,
    change_header,
    be_another_file,
)


def forged(whole: bytes, donor: bytes, chance: random.Random, kind: Kind) -> Bytes:
    """Another record or other numbers, with a checksum that fits, or with none as in old files."""
    assert kind.schema is not None
    header = parsed_header(whole)
    assert header is not None
    metadata = header["__metadata__"]
    record = json.loads(metadata[kind.schema.key])
    data = bytearray(whole[header_end(whole) :])
    for _ in range(chance.randint(1, 2)):
        if data and chance.random() < 0.4:
            place = chance.randrange(len(data))
            data[place] = chance.choice([0, 1, 127, 255, chance.randrange(256)])
        else:
            record = mutated(record, chance)
    if isinstance(record, dict) and chance.random() < 0.5:
        record.pop("checksum", None)
        metadata.pop("checksum")
    metadata[kind.schema.key] = json.dumps(record)
    if "checksum" in metadata:
        names = [name for name in header if name != "__metadata__"]
        tensors = {}
        for name in names:
            start, end = header[name]["data_offsets"]
            raw = torch.frombuffer(data, dtype=torch.uint8)[start:end].clone()
            dtype = tensor_files.DTYPES[header[name]["dtype"]]
            tensors[name] = raw.view(dtype).reshape(header[name]["shape"])
        key = kind.schema.key
        metadata["checksum"] = tensor_files.checksum(key, metadata[key], tensors)
    return with_header(json.dumps(header), b"\0" * 8 + bytes(data))


VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2, 0.5, -0.5, 1e308, float("nan"), float("inf"), 10**30, 10**400, "", "a", "\ud800",
    [], [0], [[]], [None, 1], {}, {"a": 1}, {"tensor": "0"}, "x" * 10_000, ["a", "a", "a", "a"], 2**63,
)  # fmt: skip


def mutated(value: Any, chance: random.Random, depth: int = 0) -> Any:
    """The same JSON but for one place."""
    if not isinstance(value, (dict, list)) or not value or (depth and chance.random() < 0.25):
        return chance.choice(VALUES)
    if isinstance(value, list):
        parts = list(value)
        place = chance.randrange(len(parts))
        action = chance.choice(["change", "change", "remove", "repeat"])
        changed = [mutated(parts[place], chance, depth + 1)]
        parts[place : place + 1] = {
            "change": changed,
            "remove": [],
            "repeat": [parts[place], parts[place]],
        }[action]
        return parts
    names = list(value)
    name = chance.choice(names)
    action = chance.choice(["change", "change", "change", "remove", "rename", "add"])
    if action == "change":
        return {**value, name: mutated(value[name], chance, depth + 1)}
    if action == "add":
        return {
            **value,
            chance.choice(["", "a", "schema", "schema_version"]): chance.choice(VALUES),
        }
    kept = {other: part for other, part in value.items() if other != name}
    return kept if action == "remove" else {**kept, name + "x": value[name]}


def header_end(whole: bytes) -> int:
    """Where the data begin; somewhere in a file of another kind."""
    end = 8 + int.from_bytes(whole[:8], "little")
    return end if end <= len(whole) else min(len(whole), 100)


def parsed_header(whole: bytes) -> dict[str, Any] | None:
    """The header of a safetensors file."""
    if whole[8:9] != b"{":
        return None
    header: dict[str, Any] = json.loads(whole[8 : header_end(whole)])
    return header


def with_header(text: str, whole: bytes) -> bytes:
    """A file with another header."""
    encoded = text.encode("utf-8", "surrogatepass")
    return len(encoded).to_bytes(8, "little") + encoded + whole[header_end(whole) :]


# -- runs --------------------------------------------------------------------------------------------


def attack_by_kills(arguments: argparse.Namespace) -> Iterator[Outcome]:
    """Kill runs, and start them again."""
    for name, tried, failures in attack_runs.kills(arguments.kills, arguments.seed):
        yield Outcome(name, tried, tried - len(failures), failures)


def attack_by_threads(arguments: argparse.Namespace) -> Iterator[Outcome]:
    """Call the package from several threads, and from hooks of a running call."""
    for name, tried, failures in attack_runs.threads(arguments.threads, arguments.seed):
        yield Outcome(name, tried, max(0, tried - len(failures)), failures)


def attack_ranks(arguments: argparse.Namespace) -> Iterator[Outcome]:
    """Let one of several processes fail, die, or do something else."""
    for name, tried, failures in attack_runs.ranks(tuple(arguments.ranks)):
        yield Outcome(name, tried, tried - len(failures), failures)


PARTS: dict[str, Callable[[argparse.Namespace], Iterable[Outcome]]] = {
    "files": attack_files,
    "kills": attack_by_kills,
    "threads": attack_by_threads,
    "ranks": attack_ranks,
}

if __name__ == "__main__":
    main()
