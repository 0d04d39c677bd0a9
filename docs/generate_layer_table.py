"""Generate the table of torchvision families in docs/families.md by running every method on each.

python docs/generate_layer_table.py            # writes the table between its markers
python docs/generate_layer_table.py --check    # only says whether the page is up to date
"""

import argparse
import copy
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.maxvit import MaxVit

from captum_classfilters import (
    FilterGate,
    LayerFilterContribution,
    LayerFilterFrequency,
    decompose,
    identify_class_filters,
    list_filter_layers,
)
from captum_classfilters._core.layers import find_layer
from captum_classfilters.layers import FilterLayer, FilterLayers

PAGE = Path(__file__).with_name("families.md")
BEGIN = "<!-- table: python docs/generate_layer_table.py -->"
END = "<!-- end of table -->"
NUM_CLASSES = 6
_COLUMNS = (
    "family",
    "member run",
    "layers that qualify",
    "identification",
    "contribution",
    "gate space",
    "decomposed head",
)


@dataclass(frozen=True)
class Member:
    """One member of a family, randomly initialized, and the images it accepts."""

    name: str
    size: int = 64
    build: Callable[[], nn.Module] | None = None

    def model(self) -> nn.Module:
        """The model in evaluation mode, its signals brought to a useful scale."""
        torch.manual_seed(0)
        if self.build is not None:
            model = self.build()
        else:
            model = torchvision.models.get_model(self.name, weights=None, num_classes=NUM_CLASSES)
        return _calibrated(model, self.images())

    def images(self) -> Tensor:
        """Four images (4, 3, H, W)."""
        generator = torch.Generator().manual_seed(1)
        return torch.rand(4, 3, self.size, self.size, generator=generator)


def _without_slow_start(name: str) -> Callable[[], nn.Module]:
    """A member whose own initialization takes long; PyTorch's default serves as well."""
    return lambda: torchvision.models.get_model(
        name, weights=None, num_classes=NUM_CLASSES, init_weights=False
    )


def _small_vit() -> nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=32,
        patch_size=8,
        num_layers=2,
        num_heads=2,
        hidden_dim=24,
        mlp_dim=48,
        num_classes=NUM_CLASSES,
    )


def _small_maxvit() -> nn.Module:
    return MaxVit(
        input_size=(64, 64),
        stem_channels=12,
        partition_size=2,
        block_channels=[12, 20],
        block_layers=[1, 1],
        head_dim=4,
        stochastic_depth_prob=0.0,
        num_classes=NUM_CLASSES,
    )


FAMILIES: dict[str, Member] = {
    "AlexNet": Member("alexnet", 96),
    "VGG": Member("vgg11", 64, _without_slow_start("vgg11")),
    "ResNet": Member("resnet18"),
    "ResNeXt": Member("resnext50_32x4d"),
    "DenseNet": Member("densenet121"),
    "Inception v3": Member("inception_v3", 107, _without_slow_start("inception_v3")),
    "GoogLeNet": Member("googlenet", 64, _without_slow_start("googlenet")),
    "SqueezeNet": Member("squeezenet1_1"),
    "MobileNet V2": Member("mobilenet_v2"),
    "MobileNet V3": Member("mobilenet_v3_small"),
    "ShuffleNet V2": Member("shufflenet_v2_x0_5"),
    "MNASNet": Member("mnasnet0_5"),
    "EfficientNet": Member("efficientnet_b0"),
    "EfficientNet V2": Member("efficientnet_v2_s"),
    "RegNet": Member("regnet_y_400mf"),
    "ConvNeXt": Member("convnext_tiny"),
    "ViT": Member("small VisionTransformer", 32, _small_vit),
    "Swin": Member("swin_t"),
    "Swin V2": Member("swin_v2_t"),
    "MaxViT": Member("small MaxVit", 64, _small_maxvit),
}


def _calibrated(model: nn.Module, images: Tensor) -> nn.Module:
    """Fill running statistics from the images; give weights and biases that start at zero values.

    Zero biases would make models look homogeneous that are not once they are trained.
    """
    model.eval()
    norms = [one for one in model.modules() if isinstance(one, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = None  # the average over all batches seen, here one
        norm.train()
    for module in model.modules():
        if isinstance(module, nn.Linear) and not bool(module.weight.any()):
            nn.init.normal_(module.weight, std=0.1)
        bias = getattr(module, "bias", None)
        if isinstance(bias, nn.Parameter) and not bool(bias.any()):
            nn.init.uniform_(bias, 0.2, 0.6)
    with torch.no_grad():
        model(images)
    return model.eval()


def chosen_layers(model: nn.Module, layers: FilterLayers) -> tuple[FilterLayer, FilterLayer]:
    """An inner block, and the last layer with maps: the one that feeds the head if there is one."""
    with_maps = [row for row in layers.qualifying if _num_positions(row) > 1]
    weighted = [row for row in with_maps if _has_weights(find_layer(model, row.name))]
    blocks = [row for row in weighted if any(find_layer(model, row.name).children())]
    feeding = [row for row in blocks if row.feeds_head] or [
        row for row in weighted if row.feeds_head
    ]
    last = (feeding or blocks)[-1]
    inner = [row for row in blocks if row is not last] or weighted
    return inner[len(inner) // 2], last


def _num_positions(row: FilterLayer) -> int:
    assert row.shape is not None
    assert row.num_filters is not None
    return int(torch.Size(row.shape[1:]).numel()) // row.num_filters


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def masked_model(model: nn.Module, head: str, mask: Tensor) -> nn.Module:
    """The model with its head's weights multiplied by a mask (C, F): decomposition spelt out."""
    masked = copy.deepcopy(model)
    weight = find_layer(masked, head).get_parameter("weight")
    with torch.no_grad():
        weight.mul_(mask.reshape(weight.shape))
    return masked


def table_row(family: str) -> tuple[str, ...]:
    """Run all methods on one family; each cell says what came out."""
    member = FAMILIES[family]
    model, images = member.model(), member.images()
    layers = list_filter_layers(model, images)
    inner, last = chosen_layers(model, layers)
    qualifying = f"{len(layers.qualifying)} of {len(layers)}"
    return (
        family,
        member.name,
        qualifying,
        _identification(model, images, (inner, last)),
        _contribution(model, images, last),
        _gate_space(model, images, (inner, last)),
        _decomposed_head(model, images, layers, last),
    )


def _identification(model: nn.Module, images: Tensor, rows: Iterable[FilterLayer]) -> str:
    labels = torch.arange(len(images)) % NUM_CLASSES
    methods = [
        kind(model, row.name, channel_dim=row.channel_dim)
        for row in rows
        for kind in (LayerFilterFrequency, LayerFilterContribution)
    ]
    tables = identify_class_filters(methods, [(images, labels)], show_progress=False)
    seen = all(bool(table.scores[: len(images)].any(1).all()) for table in tables)
    return "yes" if seen else "no class has scores"


def _contribution(model: nn.Module, images: Tensor, row: FilterLayer) -> str:
    method = LayerFilterContribution(model, row.name, channel_dim=row.channel_dim)
    attributions, delta = method.attribute(images, target=1, return_convergence_delta=True)
    total = method.filter_scores(attributions).sum(1)
    exact = bool((delta.abs() <= 1e-4 * total.abs().clamp(min=1e-3)).all())
    if exact and row.feeds_head:
        return f"exact at `{row.name}` ({row.feeds_head})"
    if exact:
        return f"exact at `{row.name}`, by gradient"
    why = row.reason.split(": ")[-1] if row.feeds_head else "no linear layer takes it directly"
    return f"gradient at `{row.name}`: {why}"


def _gate_space(model: nn.Module, images: Tensor, rows: Iterable[FilterLayer]) -> str:
    with torch.no_grad():
        expected = model(images)
        for row in rows:
            gate = FilterGate(model, row.name, row.num_filters, channel_dim=row.channel_dim)
            if not torch.equal(gate(gate.ones(len(images)), images), expected):
                return f"open gates at `{row.name}` change the output"
            if torch.equal(gate(0 * gate.ones(len(images)), images), expected):
                return f"closed gates at `{row.name}` change nothing"
    return "yes"


def _decomposed_head(
    model: nn.Module, images: Tensor, layers: FilterLayers, row: FilterLayer
) -> str:
    if layers.head is None:
        return "no linear layer"
    at_input = not row.feeds_head
    layer, channel_dim = (layers.head, None) if at_input else (row.name, row.channel_dim)
    table = LayerFilterFrequency(model, layer, channel_dim=channel_dim).identify(
        [(images, torch.arange(len(images)) % NUM_CLASSES)],
        attribute_to_layer_input=at_input,
        show_progress=False,
    )
    decomposed = decompose(model, table, missing="dense")
    mask = find_layer(decomposed, layers.head).mask
    assert isinstance(mask, Tensor)
    with torch.no_grad():
        same = torch.allclose(
            decomposed(images), masked_model(model, layers.head, mask)(images), atol=1e-5
        )
    source = "at its input" if at_input else f"of `{layer}`"
    return f"`{layers.head}`, filters {source}" if same else "differs from masked weights"


def generate(families: Iterable[str] = FAMILIES) -> list[str]:
    """The table's lines, header first."""
    rows = [_COLUMNS, tuple("---" for _ in _COLUMNS), *(table_row(family) for family in families)]
    return ["| " + " | ".join(row) + " |" for row in rows]


def committed() -> list[str]:
    """The table's lines as they are in the page."""
    text = PAGE.read_text()
    return text.split(BEGIN)[1].split(END)[0].strip().splitlines()


def main(arguments: list[str] | None = None) -> int:
    """Write or check the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    lines = generate()
    if options.check:
        print("up to date" if committed() == lines else "docs/families.md is out of date")
        return int(committed() != lines)
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"\n\n{END}{rest.split(END)[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
