"""Every benchmark starts, and prints a table of finite numbers, in a small run on random data."""

import importlib
import itertools
import logging
import pkgutil
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

import benchmarks
from benchmarks import shared
from tests.benchmark_worker import Forked

MODULES = sorted(module.name for module in pkgutil.iter_modules(benchmarks.__path__))
# What the others share, and measures that the package does not have.
WITHOUT_MAIN = {
    "adversarial_detection",
    "attack_runs",
    "breadth_scores",
    "cifar10",
    "shared",
    "whole_models",
    "zoo_members",
}
# Whose processes begin from nothing here, too: the way to them is the shell's.
FRESH = {"first_minutes"}
RULE = re.compile(r"^(\|---)+\|$")
COMMAND = re.compile(r"python -m benchmarks\.(\w+)((?:[^`|#\n]|\\\n)*)")
NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(\.\d+)?(e[-+]\d+)?")


def imported(name: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.{name}")


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shared, "_random", False)
    threads, random = torch.get_num_threads(), torch.get_rng_state()
    log = logging.getLogger("captum_classfilters")
    level = log.level  # of a benchmark that is silent
    yield
    log.setLevel(level)
    torch.set_num_threads(threads)
    torch.set_rng_state(random)


def tables_in(text: str) -> list[list[str]]:
    """The rows of each table, without its titles."""
    tables: list[list[str]] = []
    inside = False
    for line in text.splitlines():
        if RULE.match(line):
            tables.append([])
            inside = True
        elif inside and line.startswith("| "):
            tables[-1].append(line)
        else:
            inside = False
    return tables


def test_those_without_main_are_known():
    assert {name for name in MODULES if not hasattr(imported(name), "main")} == WITHOUT_MAIN


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in MODULES if name not in WITHOUT_MAIN])
def test_a_small_run_prints_finite_numbers(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    module = imported(name)
    if name not in FRESH:
        said = (tmp_path / str(number) for number in itertools.count())
        monkeypatch.setattr(shared, "started", lambda own, given: Forked(own, given, next(said)))
    module.main(["--small"])
    printed = capsys.readouterr().out
    tables = tables_in(printed)
    assert tables
    for rows in tables:
        assert rows
        assert all(NUMBER.search(row.split("|", 2)[2]) for row in rows), rows
    assert not re.search(r"\b(nan|inf)\b", printed, re.IGNORECASE)
    if "prepare" in vars(module):  # what would be read from public files is made up, and says so
        assert shared.made_up()
        assert "numbers mean nothing" in printed


def named_commands() -> dict[str, set[str]]:
    """The options that pages and docstrings name, by module."""
    root = Path(benchmarks.__path__[0]).parent
    pages = [root / "README.md", *root.glob("docs/**/*.md"), *root.glob("benchmarks/*.py")]
    found: dict[str, set[str]] = {}
    for page in pages:
        if "_build" not in page.parts:
            for module, rest in COMMAND.findall(page.read_text()):
                found.setdefault(module, set()).update(re.findall(r"--[a-z-]+", rest))
    return found


@pytest.mark.parametrize("name", sorted(named_commands()))
def test_commands_that_pages_name_exist(name: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as left:
        imported(name).main(["--help"])
    assert left.value.code == 0
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out.split("options:")[1]))
    assert named_commands()[name] <= known


def test_absent_data_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.setattr(shared, "DATA", tmp_path)
    with pytest.raises(SystemExit, match=r"digits\.npz.*CLASSFILTERS_DATA"):
        shared.prepare(False, "digits.npz")


def test_a_row_that_does_not_fit_its_table_is_refused():
    table = shared.Table("method", "accuracy")
    with pytest.raises(ValueError, match="3 cells for 2 columns"):
        table.row("a", 1, 2)
