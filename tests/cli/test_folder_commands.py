"""The commands on an image folder that explain, shrink and show; a model of the user's own; broken files."""

import csv
import json
import os
import shutil
import sys

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from captum_classfilters import LayerFilterContribution
from captum_classfilters._core.results_folder import ResultsFolder
from captum_classfilters.cli import folder_job
from captum_classfilters.cli.compare_folder import COMPARED
from captum_classfilters.cli.folder_job import FolderJob, open_folder
from captum_classfilters.cli.main import _parser, main
from tests.cli.test_commands import checkpoint, folder

__all__ = ["checkpoint", "folder"]  # fixtures

pytestmark = pytest.mark.filterwarnings("ignore")

MODULE = """
import torch

def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(), torch.nn.Linear(8, 3))

def binary():  # every image is one of class 1
    model = network()
    model[-1] = torch.nn.Linear(8, 1)
    torch.nn.init.constant_(model[-1].bias, 2)
    return model

def probability():
    return torch.nn.Sequential(*binary(), torch.nn.Sigmoid())

def two_layers():
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3), *network()[1:])

def nothing():
    return 3

class Neighbors(torch.nn.Module):  # needs its maps in memory channel after channel
    def __init__(self):
        super().__init__()
        self.maps, self.relu, self.head = (
            torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Linear(8, 3))

    def forward(self, images):
        maps = self.relu(self.maps(images))
        return self.head(maps.view(len(maps), 8, -1).view(len(maps) * 8, -1).mean(1).view(-1, 8))

def neighbors():
    torch.manual_seed(0)
    return Neighbors()
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module beside which the command is run."""
    (tmp_path / "own_networks.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return "own_networks:network"


def run(command, model, folder, output, *options):
    given = ["--model", model, "--data", str(folder), "--layer", "1", "--output", str(output)]
    given += ["--image-size", "32", "--num-filters", "2", "--batch-size", "4", "--quiet"]
    return main([command, *given, *map(str, options)])


def rows(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def opened_with(function, folder, tmp_path, **options):
    options = {"image_size": 32, "batch_size": 4, **options}
    return open_folder(FolderJob(f"own_networks:{function}", folder, "1", tmp_path, **options))


def test_images_lie_channels_last_where_the_model_takes_them_so(own, folder, tmp_path):
    """And the table is the same."""
    opened = opened_with("network", folder, tmp_path)
    batches = list(opened.loader(opened.images))
    for images, _ in batches:
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert not images.is_contiguous()
    plain = DataLoader(opened.images, batch_size=4)
    method = LayerFilterContribution(opened.model, "1")
    ours, others = [
        method.identify(loader, num_classes=3, show_progress=False).scores
        for loader in (opened.loader(opened.images), plain)
    ]
    assert torch.allclose(ours, others, atol=1e-6)


def test_a_model_that_counts_on_neighbors_in_memory_gets_them(own, folder, tmp_path):
    opened = opened_with("neighbors", folder, tmp_path)
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        opened.model(torch.rand(2, 3, 32, 32).contiguous(memory_format=torch.channels_last))
    assert all(images.is_contiguous() for images, _ in opened.loader(opened.images))
    function = own.partition(":")[0] + ":neighbors"
    for command in ("identify", "explain", "atlas"):
        options = ["--layer", "relu"]
        assert run(command, function, folder, tmp_path / command, *options) == 0


def test_explain(own, folder, tmp_path, capsys):
    output = tmp_path / "out"
    assert run("explain", own, folder, output, "--explain", 2) == 0
    found = rows(output / "explanations.csv")
    assert {row["class"] for row in found} <= {"cat", "dog", "fox"}
    for picture in {row["picture"] for row in found}:
        assert Image.open(output / picture).size[0] > 300
    assert json.loads((output / "manifest.json").read_text())["num_images"] == 9
    assert "contribution" in capsys.readouterr().out
    assert run("explain", own, folder, output) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run("explain", own, folder, tmp_path / "other", "--explain", 0) == 2
    assert "--explain 0 must be at least 1" in capsys.readouterr().err


def test_decompose(own, folder, tmp_path, capsys):
    output = tmp_path / "out"
    assert run("decompose", own, folder, output) == 0
    found = rows(output / "accuracy_curve.csv")
    assert [int(row["num_filters"]) for row in found][-1] == 8
    assert set(found[0]) == {"num_filters", "frequency", "contribution", "random"}
    assert (output / "weights.safetensors").stat().st_size > 100
    assert (output / "accuracy_curve.png").exists()
    assert run("decompose", own, folder, tmp_path / "other", "--limit", 1) == 2
    assert "1 images are too few" in capsys.readouterr().err


def test_prune(own, folder, tmp_path, capsys):
    output = tmp_path / "out"
    assert run("prune", own, folder, output, "--share", 0.5) == 0
    assert len(rows(output / "removed.csv")) == 4
    assert [row["network"] for row in rows(output / "accuracy.csv")] == ["before", "after"]
    assert "4 of 8 filters of 1 were removed" in capsys.readouterr().out
    for share in (0, 1, -2):
        assert run("prune", own, folder, tmp_path / "other", "--share", share) == 2
        assert f"--share {float(share)} must lie between 0 and 1" in capsys.readouterr().err


def test_weights_of_a_pruned_network_are_read_elsewhere(own, folder, tmp_path):
    from safetensors.torch import load_file

    assert run("prune", own, folder, tmp_path / "out", "--share", 0.5) == 0
    weights = load_file(tmp_path / "out" / "weights.safetensors")
    assert weights["0.weight"].shape == (4, 3, 3, 3)
    assert weights["4.weight"].shape == (3, 4)


def test_atlas(own, folder, tmp_path, capsys):
    labels = tmp_path / "labels.csv"
    labels.write_text("filter,label\n2,fur & whiskers\n")
    output = tmp_path / "out"
    options = ["--labels", labels, "--explain", 1, "--title", "my <animals>"]
    assert run("atlas", own, folder, output, *options) == 0
    text = (output / "index.html").read_text()
    assert "my &lt;animals&gt;" in text
    assert "fur &amp; whiskers" in (output / "filters" / "0002.html").read_text()
    assert len(list(output.glob("classes/*.html"))) == 3
    assert f"Open {output / 'index.html'}" in capsys.readouterr().out
    assert run("atlas", own, folder, output) == 2
    assert "holds an atlas already" in capsys.readouterr().err
    assert run("atlas", own, folder, output, "--overwrite", "--compare", "other") == 2
    assert "NAME=CHECKPOINT" in capsys.readouterr().err


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("command", "options", "again"),
    [
        ("identify", ["--explain", 1], ["--method", "frequency"]),
        ("compare", ["--explain", 1, "--limit", 2], ["--limit", 2]),
        ("explain", ["--explain", 3], ["--explain", 2]),
        ("decompose", [], None),
        ("prune", ["--share", 0.5], None),
        ("atlas", ["--explain", 1], ["--explain", 0]),
    ],
)
def test_overwrite_leaves_nothing_of_the_run_before(own, folder, tmp_path, command, options, again):
    """Nor does the manifest list what another has put there, or is it removed. A run that fails before it
    writes leaves the earlier one's results."""
    output, outside = tmp_path / "out", tmp_path / "outside.txt"
    output.mkdir()
    for path in (outside, output / "mine.txt"):
        path.write_text("kept")
    (output / "mine").mkdir()
    manifest = output / ("atlas.json" if command == "atlas" else "manifest.json")

    def files():
        return {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}

    methods = ["--method", "saliency"] if command == "compare" else []
    assert run(command, own, folder, output, *options, *methods) == 0
    listed = json.loads(manifest.read_text())
    assert set(listed["files"]) == files() - {manifest.name, "mine.txt"}
    (output / "old.txt").write_text("of an earlier version")
    listed["files"] += ["old.txt", "../outside.txt", "mine"]
    manifest.write_text(json.dumps(listed))
    # A run that is refused changes nothing.
    before = files()
    assert run(command, f"{own}_not_there", folder, output, "--overwrite", *options) == 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ResultsFolder, "place", interrupted)
        assert run(command, own, folder, output, "--overwrite", *options, *methods) == 130
    assert files() == before
    assert run(command, own, folder, output, "--overwrite", *(again or options), *methods) == 0
    new = set(json.loads(manifest.read_text())["files"])
    assert new == files() - {manifest.name, "mine.txt"}
    assert "old.txt" not in new
    assert again is None or new < set(listed["files"])
    assert (output / "mine.txt").read_text() == outside.read_text() == "kept"


@pytest.mark.parametrize("function", ["binary", "probability"])
@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("identify", ["--explain", 2]),
        ("explain", []),
        ("compare", ["--limit", 4]),
        ("decompose", []),
        ("prune", []),
        ("atlas", []),
    ],
)
def test_every_command_takes_one_output(own, folder, tmp_path, command, options, function):
    two = shutil.copytree(folder, tmp_path / "images", ignore=lambda *_: ["cat"])
    assert len(list(two.iterdir())) == 2
    methods = ["--method", *COMPARED] if command == "compare" else []
    model, output = f"own_networks:{function}", tmp_path / "out"
    assert run(command, model, two, output, *options, *methods) == 0


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_types_and_workers(own, folder, tmp_path, dtype):
    output = tmp_path / "out"
    assert run("identify", own, folder, output, "--dtype", dtype, "--num-workers", 1) == 0
    assert (output / "contribution.csv").exists()


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("own_networks:nothing", [], "returned an int, not a model"),
        ("own_networks:absent", [], "is no function of no arguments that returns a model"),
        ("no_such_module:network", [], "is no function of no arguments that returns a model"),
        (None, ["--dtype", "int8"], "--dtype int8 is unknown; choose from float32"),
        (None, ["--num-workers", "-1"], "--num-workers -1 must be at least 0"),
    ],
)
def test_errors_are_one_line(own, folder, tmp_path, capsys, model, options, message):
    assert run("identify", model or own, folder, tmp_path / "out", *options) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1


NUMBERS = {  # the least that is taken
    "--num-filters": 1, "--num-classes": 1, "--batch-size": 1, "--image-size": 1, "--limit": 1,
    "--num-workers": 0,
}  # fmt: skip
OWN_NUMBERS = {
    "identify": {"--explain": 0},
    "explain": {"--explain": 1},
    "compare": {"--explain": 0},
    "decompose": {},
    "prune": {},
    "atlas": {"--explain": 0, "--optimize": 0},
}


def test_all_numbers_of_all_commands_are_known_here():
    (commands,) = (a.choices for a in _parser()._actions if isinstance(a.choices, dict))
    for name, command in commands.items():
        own = {a.option_strings[0] for a in command._actions if a.type is int}
        if name not in ("demo", "layers"):
            assert own == {*NUMBERS, *OWN_NUMBERS[name]}, name
        else:
            assert own == {"demo": {"--epochs", "--seed"}, "layers": {"--image-size"}}[name]


@pytest.mark.parametrize(
    ("command", "option", "least"),
    [
        (command, option, least)
        for command, own in OWN_NUMBERS.items()
        for option, least in {**NUMBERS, **own}.items()
    ],
)
def test_numbers_are_checked_before_anything_is_read(
    own, folder, tmp_path, capsys, monkeypatch, command, option, least
):
    monkeypatch.setattr(folder_job, "model_source", lambda *_: pytest.fail("a model was read"))
    for value, bound in ((-1, "at least"), (least - 1, "at least"), (10**25, "at most")):
        line = [command, "--model", own, "--data", str(folder), "--layer", "1", option, str(value)]
        assert main([*line, "--output", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err.strip()
        assert f"{option} {value} must be {bound}" in error
        assert "\n" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("function", "outputs"), [("network", 3), ("binary", 2)])
def test_the_number_of_classes_of_an_own_model_is_its_own(
    own, folder, tmp_path, capsys, function, outputs
):
    model, options = f"own_networks:{function}", ["--limit", 2, "--num-classes"]
    assert run("identify", model, folder, tmp_path / "out", *options, 7) == 2
    error = capsys.readouterr().err.strip()
    assert f"--num-classes 7, but {model} has {outputs} outputs" in error
    assert "\n" not in error
    two = shutil.copytree(folder, tmp_path / "images", ignore=lambda *_: ["cat"][outputs - 2 :])
    assert run("identify", model, two, tmp_path / "out", *options, outputs) == 0


def test_a_layer_that_cannot_be_decomposed_is_told_in_options(own, folder, tmp_path, capsys):
    model = "own_networks:two_layers"
    assert run("decompose", model, folder, tmp_path / "out") == 2
    error = capsys.readouterr().err.strip()
    assert "--layer 1 does not feed the head: its filters" in error
    assert f"`captum-classfilters layers --model {model}`" in error
    assert "head=" not in error
    assert "\n" not in error


def test_shares_are_checked_before_anything_is_read(own, folder, tmp_path, capsys):
    for value in (-1, 0, 1, 1e30, float("nan")):
        assert run("prune", own, folder, tmp_path / "out", "--share", value) == 2
        assert f"--share {float(value)} must lie between 0 and 1" in capsys.readouterr().err


def test_broken_images_are_skipped_on_request(own, folder, tmp_path, capsys):
    mine = shutil.copytree(folder, tmp_path / "images")
    (mine / "dog" / "1.png").write_bytes(b"no image")
    assert run("identify", own, mine, tmp_path / "out") == 2
    assert "--skip-broken goes on without such files" in capsys.readouterr().err
    assert run("identify", own, mine, tmp_path / "out", "--skip-broken") == 0
    printed = capsys.readouterr().out
    assert f"skipped: {mine / 'dog' / '1.png'} is no image that can be read" in printed
    assert "1 of 9 files are broken and skipped" in printed
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["num_images"] == 8
    for path in mine.rglob("*.png"):
        path.write_bytes(b"no image")
    assert run("identify", own, mine, tmp_path / "other", "--skip-broken") == 2
    assert "All 9 files" in capsys.readouterr().err


@pytest.fixture
def unread(monkeypatch):
    """Standard output and error of a process that nobody reads any more."""
    streams = []

    def unread(name, buffering):
        reader, writer = os.pipe()
        os.close(reader)
        streams.append(os.fdopen(writer, "w", buffering=buffering))
        monkeypatch.setattr(sys, name, streams[-1])

    yield unread
    for stream in streams:
        stream.close()  # as at the end of a process: flushes what it holds


@pytest.mark.parametrize(
    "command", ["identify", "explain", "compare", "decompose", "prune", "atlas"]
)
@pytest.mark.parametrize("buffering", [1, -1])  # of a line, as of -u, and of a block
def test_readers_that_leave_cost_no_files(own, folder, tmp_path, unread, command, buffering):
    output = tmp_path / "out"
    given = ["--model", own, "--data", str(folder), "--layer", "1", "--output", str(output)]
    for name in ("stdout", "stderr"):
        unread(name, buffering)
    assert main([command, *given, "--image-size", "32", "--limit", "6"]) == 0
    assert (output / ("atlas.json" if command == "atlas" else "manifest.json")).exists()


def test_readers_that_leave_before_an_error(tmp_path, unread):
    unread("stderr", 1)
    assert main(["layers", "--model", "resnet19"]) == 2


@pytest.mark.parametrize("command", ["identify", "explain", "atlas", "demo", "layers"])
def test_an_interrupt_is_one_line(own, folder, tmp_path, monkeypatch, capsys, command):
    monkeypatch.setattr("captum_classfilters.cli.demo.load_digits", interrupted)
    monkeypatch.setattr("captum_classfilters.cli.identify_folder.load_model", interrupted)
    monkeypatch.setattr("captum_classfilters.cli.folder_job.load_model", interrupted)
    if command == "layers":
        code = main(["layers", "--model", "resnet18"])
    elif command == "demo":
        code = main(["demo", "--output", str(tmp_path / "out"), "--quiet"])
    else:
        code = run(command, own, folder, tmp_path / "out")
    assert code == 130
    assert capsys.readouterr().err == "captum-classfilters: interrupted\n"
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_networks_own_weights_are_taken(own, folder, tmp_path):
    """No checkpoint is asked for; the same function gives the same table."""
    from captum_classfilters import ClassFilters

    for name in ("one", "two"):
        assert run("identify", own, folder, tmp_path / name) == 0
    one, two = (
        ClassFilters.load(tmp_path / name / "contribution.safetensors") for name in ("one", "two")
    )
    assert torch.equal(one.scores, two.scores)
