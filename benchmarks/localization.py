"""Do the maps find the object? SqueezeNet 1.1 on boxes of Tiny-ImageNet's validation images.

    python -m benchmarks.localization               # about ten minutes on one core
    python -m benchmarks.localization --images 2    # images of each class to score on; the default is 10
    python -m benchmarks.localization --filters     # all filters one by one, about a minute

Class filters, thresholds and blurs are chosen on 10 images of each of the 20 classes; the table is of
other images. Maps explain the true class. Images of 64 pixels are enlarged to 224; maps are averaged
down to 56 before they are compared with the boxes. The boxes cover half of these images on average,
so that nearly the whole image is a good answer; a second table has only images whose box covers less
than 40 %, with thresholds chosen on such images.
"""

import csv
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from captum.attr import IntegratedGradients, LayerAttribution, LayerGradCam
from torch import Tensor, nn
from torchvision.io import ImageReadMode, read_image

from benchmarks import cifar10
from benchmarks.shared import (
    DATA,
    QUIET,
    Table,
    in_batches,
    made_up,
    parsed,
    parser,
    prepare,
    random_images,
    squeezenet,
    timed,
)
from captum_classfilters import ClassFilters, ClassFilterSaliency, LayerFilterContribution
from captum_classfilters.attr import filter_activation_maps, filter_gradient_maps
from captum_classfilters.attr.filter_maps import blurred
from captum_classfilters.identify import collect_features
from captum_classfilters.metrics import (
    center_box_maps,
    choose_threshold,
    filter_localization,
    localization,
)

BOXES = "tiny_imagenet_boxes/boxes.csv"
LAYER, SIZE, BATCH = "features", 224, 20
SCORED = 56
BLURS = (None, 2.0, 4.0, 8.0)  # at SCORED pixels
SMALL = 0.4
TUNING = 10
Part = tuple[Tensor, Tensor, Tensor]
Explain = Callable[[Tensor, Tensor], Tensor]
Rule = Literal["share", "level"]


def splits(scored: int) -> tuple[Part, Part]:
    """Images, labels and boxes to tune on, and to score on; boxes from edge to edge at SCORED."""
    if made_up():
        images, labels = random_images(4, 3, SIZE // 2, 2)
        low, high = torch.tensor([10.0, 10.0]), torch.tensor([30.0, 40.0])
        boxes = torch.cat([low, high]) + torch.arange(4)[:, None] % 3
        return (images[:2], labels[:2], boxes[:2]), (images[2:], labels[2:], boxes[2:])
    with open(DATA / BOXES) as file:
        rows = list(csv.DictReader(file))
    tuning: list[dict[str, str]] = []
    others: list[dict[str, str]] = []
    for class_ in sorted({row["class_index"] for row in rows}):
        own = [row for row in rows if row["class_index"] == class_]
        tuning += own[:TUNING]
        others += own[TUNING : TUNING + scored]
    return _loaded(tuning), _loaded(others)


def _loaded(rows: list[dict[str, str]]) -> Part:
    folder = (DATA / BOXES).parent / "images"
    pixels = torch.stack([read_image(str(folder / row["file"]), ImageReadMode.RGB) for row in rows])
    scale = SCORED / pixels.shape[-1]
    images = F.interpolate(
        pixels.float() / 255, size=(SIZE, SIZE), mode="bilinear", align_corners=False
    )
    corners = torch.tensor(
        [[float(row[key]) for key in ("x_min", "y_min", "x_max", "y_max")] for row in rows]
    )
    boxes = (corners + torch.tensor([0.0, 0.0, 1.0, 1.0])) * scale  # the last pixel belongs
    labels = torch.tensor([int(row["class_index"]) for row in rows])
    return (images - cifar10.MEAN) / cifar10.STD, labels, boxes


def class_table(model: nn.Module, images: Tensor, labels: Tensor) -> ClassFilters:
    """The filters that contribute most to each class, from the tuning images."""
    batches = in_batches(images, labels, BATCH)
    return LayerFilterContribution(model, LAYER).identify(batches, num_classes=1000, **QUIET)


def methods(model: nn.Module, table: ClassFilters) -> dict[str, tuple[Explain, bool]]:
    """Title -> (maps of a batch, whether they are fine enough to need a blur)."""

    def own(labels: Tensor, number: int) -> Tensor:
        selected = table.select(num_filters=number)
        return torch.stack([selected.filters_of(int(label)) for label in labels])

    def saliency(number: int, mode: Literal["input_gradient", "activation_map"]) -> Explain:
        chosen = table.select(num_filters=number)
        method = ClassFilterSaliency(model, LAYER, chosen, mode=mode)
        return lambda x, y: method.attribute(x, target=y)

    def class_map(number: int) -> Explain:
        found = saliency(number, "activation_map")
        return lambda x, y: found(x, y).sum(1)

    def grad_cam(x: Tensor, y: Tensor) -> Tensor:
        maps = LayerGradCam(model, model.get_submodule(LAYER)).attribute(
            x, target=y, relu_attributions=True
        )
        return LayerAttribution.interpolate(maps, (SIZE, SIZE), "bilinear").squeeze(1)

    gradient = saliency(20, "input_gradient")
    integrated = IntegratedGradients(model)
    return {
        "center box": (lambda x, y: center_box_maps(len(x), (SIZE, SIZE)), False),
        "class filters' activation map, 20 filters": (class_map(20), False),
        "class filters' activation map, all 512 (CAM)": (class_map(512), False),
        "10 class filters' activations, one by one": (
            lambda x, y: filter_activation_maps(model, LAYER, x, own(y, 10), size=(SIZE, SIZE)),
            False,
        ),
        "10 class filters' activations, summed": (
            lambda x, y: filter_activation_maps(model, LAYER, x, own(y, 10)).sum(1),
            False,
        ),
        "5 class filters' gradients, one by one": (
            lambda x, y: filter_gradient_maps(model, LAYER, x, own(y, 5)),
            True,
        ),
        "gradient through 20 class filters": (lambda x, y: gradient(x, y).abs().sum(1), True),
        "Grad-CAM (Captum)": (grad_cam, False),
        "Integrated Gradients (Captum), 10 steps": (
            lambda x, y: integrated.attribute(x, target=y, n_steps=10).abs().sum(1),
            True,
        ),
    }


def maps_of(explain: Explain, images: Tensor, labels: Tensor) -> Tensor:
    """Maps (N, SCORED, SCORED), or several for each image."""
    parts = []
    for x, y in in_batches(images, labels, BATCH):
        maps = explain(x, y).detach().float()
        parts.append(F.adaptive_avg_pool2d(maps, SCORED))
    return torch.cat(parts)


def tuned(maps: Tensor, boxes: Tensor, fine: bool) -> tuple[float | None, Rule, float]:
    """Blur, rule and threshold with the best mean overlap on the tuning images."""
    options: list[tuple[float, float | None, Rule, float]] = []
    rules: tuple[Rule, ...] = ("share", "level")
    for blur in BLURS if fine else (None,):
        smooth = maps if blur is None else blurred(maps, blur)
        for rule in rules:
            threshold, overlap = choose_threshold(smooth, boxes, rule=rule)
            options.append((overlap, blur, rule, threshold))
    return max(options, key=lambda option: option[0])[1:]


def main(given: Sequence[str] | None = None) -> None:
    """Print the tables."""
    known = parser(__doc__)
    known.add_argument("--images", type=int, default=10)
    known.add_argument("--filters", action="store_true")
    arguments = parsed(known, given)
    prepare(arguments.small, BOXES)
    warnings.filterwarnings("ignore", message="No filters are selected")  # 980 classes lack images
    tuning, scored = splits(arguments.images)
    model = squeezenet()
    if arguments.filters or arguments.small:
        one_by_one(model, tuning, scored)
    if arguments.filters:
        return
    table = class_table(model, *tuning[:2])
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in in_batches(*scored[:2], BATCH))
    print(
        f"{len(tuning[0])} tuning and {len(scored[0])} scored images; top-1 accuracy on the latter "
        f"{right / len(scored[0]):.3f}."
    )
    rows: dict[bool, list[list[str]]] = {False: [], True: []}
    for title, (explain, fine) in methods(model, table).items():
        chosen_on = maps_of(explain, *tuning[:2])
        seconds, maps = timed(partial(maps_of, explain, *scored[:2]))
        for small in rows:
            cells = measured((chosen_on, *tuning[1:]), (maps, *scored[1:]), fine, small)
            rows[small].append([title, *cells, f"{1000 * seconds / len(maps):.0f}"])
        print(title, file=sys.stderr, flush=True)
    for small, lines in rows.items():
        kept = covered(scored[2]) < (SMALL if small else 2)
        print(
            f"\n{int(kept.sum())} images, boxes cover {float(covered(scored[2])[kept].mean()):.3f} of "
            "the image on average"
        )
        shown = Table(
            *("maps", "chosen: threshold, blur", "Avg-IoU", "+-", "AP30", "AP50"),
            *("box IoU >= .5", "pointing game", "ms an image"),
        )
        for line in lines:
            shown.row(*line)


def one_by_one(model: nn.Module, tuning: Part, scored: Part) -> None:
    """Every filter with the class whose objects it overlaps most, found on the tuning images."""

    def activations(images: Tensor) -> Tensor:
        batches = [(x, torch.zeros(len(x), dtype=torch.int64)) for x in images.split(BATCH)]
        flat, _ = collect_features(model, LAYER, batches, flatten=True, **QUIET)
        side = math.isqrt(flat.shape[1] // 512)
        return flat.reshape(len(flat), 512, side, side)

    def found(part: Part, maps: Tensor, labels: Tensor, **given: Any) -> Any:
        size = (SCORED, SCORED)
        return filter_localization(maps, part[2], labels, size=size, num_classes=1000, **given)

    maps = activations(tuning[0]), activations(scored[0])
    shuffled = tuning[1][torch.randperm(len(tuning[1]), generator=torch.Generator().manual_seed(0))]
    table = Table("filter's class from", "Avg-IoU, tuning", "AP30, tuning", "Avg-IoU", "AP30")
    for name, labels in (("the labels", tuning[1]), ("shuffled labels", shuffled)):
        first = found(tuning, maps[0], labels)
        known = {"thresholds": first.thresholds, "filter_class": first.filter_class}
        second = found(scored, maps[1], scored[1], **known)
        figures = [(one.average_iou, one.average_precision) for one in (first, second)]
        table.row(name, *(f"{value:.3f}" for pair in figures for value in pair))


def covered(boxes: Tensor) -> Tensor:
    """Share of the image that each box covers."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / SCORED**2


def measured(tuning: Part, scored: Part, fine: bool, small: bool) -> list[str]:
    """The figures of one method, on all images or on those with small boxes."""
    limit = SMALL if small else 2
    chosen_on, maps = tuning[0], scored[0]
    known, kept = covered(tuning[2]) < limit, covered(scored[2]) < limit
    blur, rule, threshold = tuned(chosen_on[known], tuning[2][known], fine)
    maps = maps[kept] if blur is None else blurred(maps[kept], blur)
    result = localization(maps, scored[2][kept], rule=rule, value=threshold)
    error = float(result.iou.std()) / math.sqrt(len(result.iou))
    return [
        f"{rule} {threshold:.2f}" + ("" if blur is None else f", blur {blur:.0f}"),
        f"{result.average_iou:.3f}",
        f"{error:.3f}",
        f"{result.average_precision(0.3):.3f}",
        f"{result.average_precision(0.5):.3f}",
        f"{result.average_precision(0.5, boxes=True):.3f}",
        f"{result.pointing_game:.3f}",
    ]


if __name__ == "__main__":
    main()
