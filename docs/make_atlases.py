"""Write the atlases that the documentation links to.

    python docs/make_atlases.py docs/_build/html/_static/atlas

The digits' atlas needs nothing from elsewhere. The one of photographs, of SqueezeNet and ten frequent
classes of the public set, is written where `shared/data` lies beside the checkout, or where
CLASSFILTERS_DATA points.
"""

import csv
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
from torchvision.models import SqueezeNet1_1_Weights

from captum_classfilters.atlas import atlas
from captum_classfilters.cli.demo import load_digits, small_cnn, train_classifier
from captum_classfilters.cli.main import main as command_line

DATA = Path(
    os.environ.get("CLASSFILTERS_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")
)
WEIGHTS, PHOTOGRAPHS = DATA / "squeezenet1_1_imagenet_fp16.safetensors", DATA / "imagenet_val1300"
NUM_CLASSES = 10
INDEX = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Atlases</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="digits/atlas.css">
<main>
<h1>Atlases</h1>
<ul>
{}
</ul>
</main>
</html>
"""


def digits(folder: Path) -> Path:
    """The demo's network on handwritten digits; its first page."""
    torch.manual_seed(0)
    data = load_digits()
    return atlas(
        train_classifier(small_cnn(), data.train, 5, show_progress=False),
        "filters",
        data.train,
        folder,
        test_dataloader=data.test,
        title="A small network on handwritten digits",
        class_names=[f"digit {digit}" for digit in range(10)],
        overwrite=True,
        show_progress=False,
    )


def photographs(folder: Path) -> Path:
    """SqueezeNet on photographs of their most frequent classes, by the command line as a reader would; its
    first page."""
    names = SqueezeNet1_1_Weights.IMAGENET1K_V1.meta["categories"]
    with (PHOTOGRAPHS / "labels.csv").open() as file:
        labels = {row["file"]: int(row["class_index"]) for row in csv.DictReader(file)}
    with tempfile.TemporaryDirectory() as place:
        for index, _ in Counter(labels.values()).most_common(NUM_CLASSES):
            images = Path(place) / names[index].replace("/", " ")
            images.mkdir()
            for name, label in labels.items():
                if label == index:
                    (images / name).symlink_to((PHOTOGRAPHS / name).resolve())
        line = ["atlas", "--model", "squeezenet1_1", "--checkpoint", str(WEIGHTS)]
        line += ["--layer", "features", "--data", place, "--output", str(folder), "--overwrite"]
        if command_line([*line, "--title", "SqueezeNet on photographs", "--quiet"]):
            raise SystemExit(1)
    return folder / "index.html"


def main(folder: Path) -> None:
    """Write them, and a page that lists them."""
    written = {"digits": "A small network on handwritten digits"}
    digits(folder / "digits")
    if WEIGHTS.exists() and PHOTOGRAPHS.exists():
        written["photographs"] = f"SqueezeNet on photographs of {NUM_CLASSES} classes"
        photographs(folder / "photographs")
    else:
        print(f"No atlas of photographs: {WEIGHTS} or {PHOTOGRAPHS} is not there.")
    links = [f'<li><a href="{name}/index.html">{what}</a></li>' for name, what in written.items()]
    (folder / "index.html").write_text(INDEX.format("\n".join(links)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
