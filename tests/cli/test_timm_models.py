"""timm's models in the command line: their own preparation of images, sizes and class names."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from captum_classfilters import ClassFilters, LayerFilterContribution
from captum_classfilters.cli import model_sources
from captum_classfilters.cli.folder_classes import _categories
from captum_classfilters.cli.main import main
from captum_classfilters.cli.model_sources import ModelSource, TimmSource, model_source

timm = pytest.importorskip("timm")
NAME = "test_resnet"  # timm's own small model
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two pictures that are not square in each of three classes."""
    root = tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(0)
    for name in ("cat", "dog", "fox"):
        (root / name).mkdir()
        for index in range(2):
            pixels = noise.integers(0, 255, (90, 120, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root


def command(folder, output, *more: str) -> list[str]:
    given = ["--data", folder, "--output", output, "--layer", "layer2", "--num-filters", 2, *more]
    return ["identify", *map(str, given), "--quiet"]


@pytest.mark.parametrize("name", [NAME, f"timm:{NAME}"])
def test_tables_are_those_of_images_prepared_as_timm_prepares_them(name, folder, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model(NAME, num_classes=3).eval()
    weights = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), weights)
    output = tmp_path / "out"
    assert main(command(folder, output, "--model", name, "--checkpoint", str(weights))) == 0
    assert json.loads((output / "manifest.json").read_text())["model"] == name
    found = ClassFilters.load(output / "contribution.safetensors")
    config = timm.data.resolve_model_data_config(model)
    prepare = timm.data.create_transform(**config, is_training=False)
    pictures = [Image.open(path) for path in sorted(folder.glob("*/*.png"))]
    images = torch.stack([prepare(picture) for picture in pictures])
    assert images.shape[2:] == config["input_size"][1:] != (224, 224)
    labels = torch.arange(3).repeat_interleave(2)
    expected = LayerFilterContribution(model, "layer2").identify(
        [(images, labels)], num_filters=2, show_progress=False
    )
    torch.testing.assert_close(found.scores, expected.scores)
    assert found.class_names == ("cat", "dog", "fox")


def test_a_size_is_as_asked_also_of_a_model_of_one_size(folder, tmp_path, capsys):
    output = ["--model", "timm:test_vit", "--image-size", "64", "--random-weights"]
    wanted = command(folder, tmp_path / "out", *output)
    wanted[wanted.index("layer2")] = "norm"
    assert main(wanted) == 0
    assert main(["layers", "--model", "timm:test_vit", "--image-size", "64"]) == 0
    assert "2x17x64" in capsys.readouterr().out  # 16 patches and a class token
    assert main(["layers", "--model", "timm:test_vit"]) == 0
    assert "2x101x64" in capsys.readouterr().out  # 160 pixels are the model's own


def test_sizes_that_a_model_does_not_take_are_one_clear_line(capsys, monkeypatch):
    assert main(["layers", "--model", "timm:efficientformer_l1", "--image-size", "64"]) == 2
    error = capsys.readouterr().err.strip()
    assert "does not take color images of 64 pixels" in error
    assert len(error.splitlines()) == 1

    def without_option(name, **options):
        raise TypeError("unexpected keyword argument 'img_size'")

    monkeypatch.setattr(timm, "create_model", without_option)
    assert main(["layers", "--model", "timm:test_vit", "--image-size", "64"]) == 2
    assert "takes images of 160 pixels only; leave --image-size out" in capsys.readouterr().err


def test_torchvision_goes_first_and_timm_is_asked_by_name():
    assert type(model_source("resnet18")) is ModelSource
    assert model_source("timm:resnet18") == TimmSource("resnet18")
    assert model_source("resnet10t.c3_in1k") == TimmSource("resnet10t.c3_in1k")
    with pytest.raises(ValueError, match=r"timm has no classifier 'resnet10'.*timm:resnet10t"):
        model_source("timm:resnet10")
    with pytest.raises(ValueError, match=r"torchvision and timm have no.*timm:mobilenetv4"):
        model_source("mobilenetv4_conv")


def test_without_timm_it_is_said_to_be_needed(monkeypatch, folder, tmp_path, capsys):
    monkeypatch.setattr(model_sources, "find_spec", lambda name: None)
    assert main(command(folder, tmp_path / "out", "--model", f"timm:{NAME}")) == 2
    error = capsys.readouterr().err.strip()
    assert error == f"captum-classfilters: The model 'timm:{NAME}' needs timm: pip install timm."
    assert main(command(folder, tmp_path / "out", "--model", "resnet19")) == 2
    assert "nearest names: resnet18" in (error := capsys.readouterr().err.strip())
    assert "pip install timm" in error
    assert len(error.splitlines()) == 1


def test_folders_are_called_as_timm_calls_the_outputs():
    source = TimmSource("resnet10t")
    for folders in (["n01443537", "n01440764"], ["goldfish", "tench"], ["tench, Tinca tinca"]):
        names, places = _categories(source, 1000, folders)
        assert [places[name] for name in folders] == ([1, 0] if len(folders) == 2 else [0])
        assert names[0] == "tench, Tinca tinca"
    assert _categories(source, 1000, ["goldfish", "a friend"]) == ([], {})
    assert _categories(source, 1000, ["crane"]) == ([], {})  # a bird and a machine
    assert _categories(source, 12, ["goldfish"]) == ([], {})


def test_the_head_says_how_many_outputs_a_checkpoint_has():
    for name in ("mobilenetv3_small_050", "levit_128s", "test_vit"):
        source = TimmSource(name)
        model = source.build(7)
        assert len(model.state_dict()[source.head_tensor(model)]) == 7
