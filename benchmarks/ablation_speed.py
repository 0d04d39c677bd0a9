"""Time of one layer's ablation: this package against Captum's LayerFeatureAblation.

    python -m benchmarks.ablation_speed [--images 8] [--threads 1] [--only resnet20]

Both run on the same images in one process, in turn, beside a bare forward pass; weights are random, times
are medians, and the largest difference of the results is printed with them. Captum's time covers at
most `--filters` filters and is scaled to all of them; its cost per filter is constant. What lies
before the layer must run once, so that no method takes less than about one forward pass where the
layer is near the end.
"""

from collections.abc import Callable, Sequence

import torch
import torchvision
from captum.attr import LayerFeatureAblation
from torch import Tensor, nn

from benchmarks.cifar10 import CifarResNet
from benchmarks.shared import Table, medians, parsed, parser
from captum_classfilters import LayerFilterAblation

CASES: list[tuple[str, Callable[[], nn.Module], int, str]] = [
    ("resnet20", lambda: CifarResNet(20), 32, "layer3"),
    ("resnet20", lambda: CifarResNet(20), 32, "layer2"),
    ("resnet20", lambda: CifarResNet(20), 32, "layer1"),
    ("resnet18", torchvision.models.resnet18, 224, "layer4"),
    ("resnet18", torchvision.models.resnet18, 224, "layer3"),
    ("squeezenet1_1", torchvision.models.squeezenet1_1, 224, "features"),
    ("densenet121", torchvision.models.densenet121, 224, "features.denseblock3"),
]


def measure(
    table: Table,
    label: str,
    model: nn.Module,
    name: str,
    x: Tensor,
    filters: int,
    repetitions: int,
) -> None:
    """One row: a layer's ablation, Captum's, and a bare forward pass, in turn."""
    layer = model.get_submodule(name)
    with torch.no_grad():
        target = model(x).argmax(1)
    ours, theirs = LayerFilterAblation(model, layer), LayerFeatureAblation(model, layer)
    replay = ours.replay(layer, (x,))
    number = replay.num_filters
    some = min(filters, number)
    # Filters beyond the first few form one feature, which is left out of the comparison.
    mask = torch.arange(number, device=x.device).clamp(max=some).reshape(1, -1, 1, 1)
    found: dict[str, Tensor] = {}

    @torch.inference_mode()
    def forward() -> None:
        model(x)

    def own() -> None:
        found["own"] = ours.filter_scores(ours.attribute(x, target=target))

    @torch.no_grad()
    def captum() -> None:
        found["captum"] = theirs.attribute(x, target=target, layer_mask=mask)

    tasks = {"forward": forward, "own": own, "captum": captum}
    seconds = medians(tasks, repetitions, x.device)
    passes = min(some + 1, number) + 2  # one evaluation of the layer, one of the model
    scaled = seconds["captum"] * (number + 2) / passes
    scores, maps = found["own"], found["captum"].flatten(2)[..., 0]
    off = (maps[:, :some] - scores[:, :some]).abs().max() / scores.abs().max()
    table.row(
        label,
        f"`{name}`",
        number,
        replay.way,
        f"{scaled:.3f}",
        f"{seconds['own']:.4f}",
        f"{scaled / seconds['own']:.1f}x",
        f"{seconds['own'] / seconds['forward']:.2f}",
        f"{float(off):.1e}",
    )


def new_table() -> Table:
    """The table of `measure`'s rows."""
    return Table(
        *("model", "layer", "K", "way", "Captum s", "own s", "speed-up"),
        *("forward passes", "difference"),
    )


def main(given: Sequence[str] | None = None) -> None:
    """Print the table."""
    known = parser(__doc__)
    known.add_argument("--images", type=int, default=8)
    known.add_argument("--filters", type=int, default=16)
    known.add_argument("--threads", type=int, default=1)
    known.add_argument("--repetitions", type=int, default=3)
    known.add_argument("--only", default="")
    options = parsed(known, given, images=2, filters=2, repetitions=1, only="resnet20")
    torch.set_num_threads(options.threads)
    table = new_table()
    for label, make, size, name in CASES:
        if options.only in label:
            torch.manual_seed(0)
            model = make().eval()
            x = torch.randn(options.images, 3, size, size)
            measure(table, label, model, name, x, options.filters, options.repetitions)


if __name__ == "__main__":
    main()
