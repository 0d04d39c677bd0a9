"""The demo and the command line, end to end on small images."""

import csv
import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import Subset
from torchvision.models import resnet18

from captum_classfilters import ClassFilters
from captum_classfilters._core.results_folder import ResultsFolder
from captum_classfilters.cli import compare_folder, demo
from captum_classfilters.cli.compare_folder import _class_filters
from captum_classfilters.cli.demo import run_demo
from captum_classfilters.cli.folder_classes import _categories, _places
from captum_classfilters.cli.main import main
from captum_classfilters.cli.model_sources import ModelSource, places_of
from captum_classfilters.metrics.compare_attributions import AttributionComparison
from tests.models import images, pool_linear


def test_demo_end_to_end(tmp_path, monkeypatch):
    lines: list[str] = []
    results = run_demo(tmp_path, epochs=4, show_progress=False, write=lines.append)
    assert results["test_accuracy"] > 0.8
    kept = results["accuracy_by_filters_kept"]
    five = kept["num_filters"].index(5)
    assert kept["contribution"][five] > kept["random"][five]
    gates = results["metrics"]["gate space"]
    assert gates["contribution, closed form"]["infidelity"] < 1e-8
    assert gates["random scores"]["infidelity"] > 1e-3
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {
        "accuracy_curve.png",
        "class_filters_contribution.png",
        "class_filters_frequency.png",
        "contribution.safetensors",
        "explanations.png",
        "frequency.safetensors",
        "results.json",
    }
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["refitted"] == results["refitted"]
    assert any("Test accuracy" in line for line in lines)
    # The metrics, which take longest, are no part of what is compared.
    monkeypatch.setattr(demo, "_metrics", lambda *_: results["metrics"])
    again = run_demo(tmp_path, epochs=4, show_progress=False, write=lines.append)
    for key in ("test_accuracy", "accuracy_by_filters_kept", "refitted"):
        assert again[key] == results[key]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(0)
    for name in ("cat", "dog", "fox"):
        (root / name).mkdir()
        for index in range(3):
            pixels = noise.integers(0, 255, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    state = resnet18(num_classes=3).state_dict()
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, path)
    save_file(state, path.with_suffix(".safetensors"))
    return path


def arguments(folder, checkpoint, output, **changes):
    options: dict[str, Any] = {
        "--model": "resnet18",
        "--checkpoint": checkpoint,
        "--data": folder,
        "--layer": "layer4",
        "--output": output,
        "--image-size": 32,
        **changes,
    }
    given = {name: value for name, value in options.items() if value is not None}
    flat = [str(part) for item in given.items() for part in item]
    return ["identify", *flat, "--quiet"]


ON_A_FOLDER = ("identify", "explain", "compare", "decompose", "prune", "atlas")


def empty(place):
    place.mkdir()
    return place


def of_texts(place):
    for name in ("cat", "dog"):
        (place / name).mkdir(parents=True)
        (place / name / "notes.txt").write_text("no image")
    return place


def renamed_texts(place):
    of_texts(place)
    for path in place.rglob("*.txt"):
        path.rename(path.with_suffix(".png"))
    return place


class TestEveryCommand:
    """What a newcomer gets wrong: exit code 2, and a line that says so."""

    @pytest.mark.parametrize("command", ON_A_FOLDER)
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"--data": empty}, "is not an image folder, one subfolder for each class"),
            ({"--data": of_texts}, "Found no valid file for the classes cat, dog"),
            (
                {"--data": renamed_texts},
                "cat/notes.png is no image that can be read: cannot identify image file; --skip-broken",
            ),
            ({"--checkpoint": of_texts}, "is a folder; expected a file"),
            ({"--model": "resnet81"}, "the nearest names: resnet18"),
            ({"--layer": "layer44"}, "no layer 'layer44'. Did you mean 'layer4'"),
            ({"--image-size": "large"}, "argument --image-size: invalid int value: 'large'"),
            ({"--image-size": -8}, "--image-size -8 must be at least 1"),
        ],
    )
    def test_on_a_folder(self, folder, checkpoint, tmp_path, capsys, command, changes, message):
        (option, value), *_ = changes.items()
        value = value(tmp_path / "given") if callable(value) else value
        line = arguments(folder, checkpoint, tmp_path / "out", **{option: value})
        self.refused([command, *line[1:]], message, capsys)

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            (["layers", "--model", "resnet81"], "the nearest names: resnet18"),
            (["layers", "--model", "resnet18", "--image-size", "x"], "invalid int value: 'x'"),
            (["layers", "--model", "resnet18", "--image-size", "-8"], "--image-size -8 must be"),
            (
                ["layers", "--model", "resnet18", "--image-size", "0"],
                "--image-size 0 must be at least",
            ),
            (["layers", "--model", "resnet18", "--image-size", "9" * 15], "must be at most"),
            (["demo", "--seed", "-1"], "--seed -1 must be at least 0"),
            (["demo", "--seed", "9" * 25], "must be at most"),
            (["demo", "--epochs", "9" * 25], "must be at most"),
            (["demo", "--epochs", "many"], "invalid int value: 'many'"),
            (["demo", "--epochs", "0"], "--epochs 0 must be at least 1"),
            (["demo", "--output", __file__], "cannot be written: it is a file; expected a folder"),
            (["identfy"], "invalid choice: 'identfy'"),
            ([], "the following arguments are required: COMMAND"),
        ],
    )
    def test_on_no_folder(self, capsys, line, message):
        self.refused(line, message, capsys)

    def refused(self, line, message, capsys):
        code: object
        try:
            code = main(line)
        except SystemExit as ended:  # as argparse ends a process
            code = ended.code
        error = capsys.readouterr().err.strip()
        assert code == 2
        assert message in error
        assert "\n" not in error


class TestCommands:
    def test_identify_on_a_folder(self, folder, checkpoint, tmp_path, capsys):
        output = tmp_path / "out"
        assert main(arguments(folder, checkpoint, output, **{"--explain": 2})) == 0
        manifest = json.loads((output / "manifest.json").read_text())
        assert manifest["num_images"] == 9
        assert set(manifest["files"]) == {
            f"{name}.{kind}"
            for name in ("frequency", "contribution")
            for kind in ("csv", "png", "safetensors")
        } | {"explanations.png"}
        found = ClassFilters.load(output / "contribution.safetensors")
        assert found.class_names == ("cat", "dog", "fox")
        assert found.counts.tolist() == [3, 3, 3]
        lines = (output / "frequency.csv").read_text().splitlines()
        assert len(lines) == 1 + 3 * 512
        assert "cat" in capsys.readouterr().out
        # Nothing is replaced unasked; safetensors weights give the same table.
        assert main(arguments(folder, checkpoint, output)) == 2
        assert "--overwrite" in capsys.readouterr().err
        other = tmp_path / "other"
        same = checkpoint.with_suffix(".safetensors")
        assert main(arguments(folder, same, other)) == 0
        again = ClassFilters.load(other / "contribution.safetensors")
        assert torch.equal(again.scores, found.scores)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"--layer": None}, "`captum-classfilters layers --model resnet18`"),
            ({"--model": "resnet19"}, "have no classifier 'resnet19'; the nearest names: resnet18"),
            ({"--layer": "layer5"}, "no layer 'layer5'. Did you mean 'layer4'"),
            ({"--model": "resnet34"}, "not one of resnet34: missing layer1.2.conv1.weight"),
            ({"--checkpoint": "nowhere.pth"}, "There is no checkpoint"),
            ({"--checkpoint": __file__}, "neither a safetensors file nor a PyTorch state dict"),
            ({"--data": "nowhere"}, "There is no folder nowhere"),
            ({"--method": "guess"}, "Unknown methods"),
            ({"--num-filters": 600}, "num_filters=600 is larger than the 512 filters"),
            ({"--limit": 0}, "--limit 0 must be at least 1"),
            ({"--batch-size": -3}, "--batch-size -3 must be"),
            ({"--device": "gpu"}, "--device gpu cannot be used"),
        ],
    )
    def test_errors_are_one_clear_line(
        self, folder, checkpoint, tmp_path, capsys, changes, message
    ):
        assert main(arguments(folder, checkpoint, tmp_path / "out", **changes)) == 2
        error = capsys.readouterr().err.strip()
        assert message in error
        assert len(error.splitlines()) == 1
        assert not (tmp_path / "out" / "manifest.json").exists()

    def test_folders_are_matched_with_outputs_by_name(self, folder, tmp_path, capsys):
        """Three folders of a model of five: counting them through would name the wrong outputs."""
        torch.manual_seed(0)
        weights = tmp_path / "five.safetensors"
        save_file(resnet18(num_classes=5).state_dict(), weights)
        assert main(arguments(folder, weights, tmp_path / "out")) == 2
        assert (
            "5 outputs, and no output is known by the name of 'cat', 'dog', 'fox'"
            in capsys.readouterr().err
        )
        names = tmp_path / "names.txt"
        names.write_text("ape\nfox, red\ncat\n\ncow\ndog dingo\n")
        command = arguments(folder, weights, tmp_path / "out", **{"--class-names": names})
        assert main(command) == 2
        assert "known by the name of 'fox';" in capsys.readouterr().err
        names.write_text("ape\nfox red\ncat\n\ncow\ndog dingo\n")
        with pytest.warns(UserWarning, match="2 class.*ape, cow"):
            assert main(command) == 0
        found = ClassFilters.load(tmp_path / "out" / "contribution.safetensors")
        assert found.class_names == ("ape", "fox red", "cat", "cow", "dog dingo")
        assert found.counts.tolist() == [0, 3, 3, 0, 3]

    def test_folders_called_like_torchvisions_categories(self):
        folders = ["goldfish", "tench"]
        source = ModelSource("resnet18")
        names, places = _categories(source, 1000, folders)
        assert [names.index(folder) for folder in folders] == [1, 0]
        assert [places[folder] for folder in folders] == [1, 0]
        assert _categories(source, 1000, ["goldfish", "a friend"]) == ([], {})
        assert _categories(source, 12, ["goldfish"]) == ([], {})
        assert places_of(["crane", "tench", "crane"]) == {"tench": 1}  # a bird and a machine

    def test_a_first_word_that_two_classes_share_finds_neither(self):
        places = _places(["great white shark", "great grey owl", "n01 tench", "great"])
        assert places == {
            "n01": 2, "great white shark": 0, "great grey owl": 1, "n01 tench": 2, "great": 3,
        }  # fmt: skip

    def test_files_of_class_names(self, folder, checkpoint, tmp_path, capsys):
        names = tmp_path / "names.txt"
        command = arguments(folder, checkpoint, tmp_path / "out", **{"--class-names": names})
        assert main(command) == 2
        assert "no file of class names" in capsys.readouterr().err
        names.write_text("cat\ndog\n")
        assert main(command) == 2
        assert "names 2 classes, but the model has 3 outputs" in capsys.readouterr().err

    def test_no_checkpoint_and_empty_folder(self, folder, tmp_path, capsys):
        assert main(arguments(folder, None, tmp_path / "out", **{"--checkpoint": None})) == 2
        assert "--random-weights" in capsys.readouterr().err
        empty = tmp_path / "empty"
        empty.mkdir()
        command = arguments(empty, None, tmp_path / "out", **{"--checkpoint": None})
        assert main([*command, "--random-weights"]) == 2
        assert "not an image folder" in capsys.readouterr().err

    def test_a_demo_that_cannot_be_written(self, tmp_path, capsys):
        blocked = tmp_path / "file"
        blocked.write_text("")
        assert main(["demo", "--output", str(blocked), "--quiet"]) == 2
        assert "cannot be written" in capsys.readouterr().err

    def test_compare_on_a_folder(self, folder, checkpoint, tmp_path, capsys):
        output = tmp_path / "out"
        one = arguments(folder, checkpoint, output, **{"--limit": 4})
        methods = [
            "--method",
            "saliency",
            "class_filters",
            "occlusion",
            "contribution",
            "frequency",
        ]
        command = ["compare", *one[1:], *methods]
        assert main(command) == 0
        manifest = json.loads((output / "manifest.json").read_text())
        assert manifest["num_images"] == 4
        expected = ["comparison.png", "comparison.txt", "filters.csv", "pixels.csv"]
        assert manifest["files"] == expected
        with open(output / "pixels.csv") as file:
            rows = {row["method"]: row for row in csv.DictReader(file)}
        assert list(rows) == ["saliency", "class_filters", "occlusion", "random"]
        assert float(rows["saliency"]["seconds_per_image"]) > 0
        assert rows["random"]["seconds_per_image"] == ""
        with open(output / "filters.csv") as file:
            names = [row["method"] for row in csv.DictReader(file)]
        assert names == ["contribution", "frequency", "random", "weight magnitude"]
        assert "filters of layer 'layer4': 4 images" in capsys.readouterr().out
        assert main(command) == 2
        assert "--overwrite" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("methods", "limit", "message"),
        [
            (["saliency", "lime"], 2, "Unknown methods ['lime']; choose from saliency"),
            (["class_filters"], 99, "leaves none to find class filters on"),
        ],
    )
    def test_compare_errors(self, folder, checkpoint, tmp_path, capsys, methods, limit, message):
        one = arguments(folder, checkpoint, tmp_path / "out", **{"--limit": limit})
        assert main(["compare", *one[1:], "--method", *methods]) == 2
        assert message in capsys.readouterr().err

    def test_compare_needs_images_of_the_classes_it_explains(self):
        data: Any = [(image, 0) for image in images(4)]
        job: Any = SimpleNamespace(batch_size=2, num_filters=2, device="cpu", show_progress=False)
        model = pool_linear()
        given = model, model[1], job, data, Subset(data, [0, 1])
        names = ["cat", "dog", "fox"]
        assert _class_filters(*given, torch.tensor([0, 0]), names).layer is model[1]
        message = "for the classes dog, fox, of which the folder's other"
        with pytest.raises(ValueError, match=message):
            _class_filters(*given, torch.tensor([2, 1]), names)

    def test_names_beside_compared_images_are_shortened_once(self, tmp_path, monkeypatch):
        pictures = torch.rand(3, 3, 8, 8)
        maps = {"saliency": torch.rand(3, 1, 8, 8)}
        comparison = AttributionComparison(None, {}, pictures, [0, 2, 1], maps)
        names = ["a long name of a kind of dog", "costs $5", "a long name of a kind of cat"]
        drawn: list[Any] = []
        monkeypatch.setattr(compare_folder, "write_figure", lambda _path, one: drawn.append(one))
        compare_folder._draw(ResultsFolder(tmp_path, "manifest.json"), comparison, names)
        beside = [axes.get_ylabel() for axes in drawn[0].axes if axes.get_ylabel()]
        assert beside == ["a long name of a… [0]", "a long name of a… [1]", r"costs \$5"]

    def test_layers(self, capsys):
        assert main(["layers", "--model", "squeezenet1_1", "--image-size", "32"]) == 0
        assert "classifier.1" in capsys.readouterr().out

    def test_as_a_process(self):
        command = [sys.executable, "-m", "captum_classfilters", "--version"]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        assert result.stdout.startswith("captum-classfilters 0.")
