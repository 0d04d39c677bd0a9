"""An accelerator: every method against the CPU, then times against a bare forward pass.

    python -m benchmarks.accelerator             # on a GPU, at most 6 minutes
    python -m benchmarks.accelerator --small     # on a CPU, a little of each table

Identification is compared with a bare forward pass under ``inference_mode`` over the same batches,
ablation with Captum's LayerFeatureAblation, a gated training step with a plain one. Times are medians
of runs that take turns in one process; the device is synchronized around each. Weights are random,
so that nothing has to be downloaded; times do not depend on them.
"""

import platform
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from benchmarks import ablation_speed
from benchmarks.cifar10 import CifarResNet
from benchmarks.shared import QUIET, Table, medians, parsed, parser
from captum_classfilters import (
    ClassFilterSaliency,
    ClassSpecificGate,
    LayerClassGate,
    LayerFilterAblation,
    LayerFilterContribution,
    LayerFilterFrequency,
    LayerSingularDirection,
    accuracy_curve,
    decompose,
    identify_class_filters,
)
from captum_classfilters.identify import collect_features, exemplars, unit_scores
from captum_classfilters.metrics import evaluate_classifier, filter_curves
from captum_classfilters.pruning import accuracy_after_removal


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    batches: int
    batch_size: int
    repetitions: int
    image: int
    images: int
    filters: int
    networks: slice  # of each list of networks, the largest of which come first


FULL = Size(50, 128, repetitions=3, image=224, images=32, filters=16, networks=slice(None))
SMALL = Size(1, 2, repetitions=1, image=32, images=1, filters=1, networks=slice(-1, None))


# -- against the CPU ----------------------------------------------------------------------------


class Small(nn.Module):
    """Two stages and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stage1 = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU())
        self.stage2 = nn.Sequential(nn.Conv2d(12, 20, 3, padding=1), nn.ReLU(inplace=True))
        self.head = nn.Linear(20, 5)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, 5)."""
        return self.head(self.stage2(self.stage1(images)).mean((2, 3)))


def results(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> Iterator[tuple[str, Any]]:
    """What every method gives, as tensors by name."""
    images, labels = data[0]
    target = labels.to(next(model.parameters()).device)
    images = images.to(target.device)
    contribution = LayerFilterContribution(model, "stage2")
    table = contribution.identify(data, num_filters=4, **QUIET)
    yield "identify: contribution at the head", table.scores
    for name, method in {
        "frequency": LayerFilterFrequency(model, "stage2"),
        "contribution, inner layer": LayerFilterContribution(model, "stage1"),
        "class gate": LayerClassGate(model, "stage2", torch.rand(5, 20).round(decimals=3)),
        "singular directions": LayerSingularDirection(model, "stage1.0"),
        "ablation, inner layer": LayerFilterAblation(model, "stage1"),
    }.items():
        torch.manual_seed(0)
        yield f"identify: {name}", method.identify(data, num_filters=2, **QUIET).scores.abs()
    ablation = LayerFilterAblation(model, "stage1")
    yield "accuracy reduction", ablation.identify(data, metric="accuracy", **QUIET).lost
    for name, method in {
        "contribution": contribution,
        "contribution, 8 steps": LayerFilterContribution(model, "stage1"),
        "ablation": ablation,
        "ablation at the head": LayerFilterAblation(model, "stage2"),
    }.items():
        steps = {"n_steps": 8} if "steps" in name else {}
        yield f"attribute: {name}", method.attribute(images, target=target, **steps)
    for mode in ("input_gradient", "activation_map"):
        saliency = ClassFilterSaliency(model, "stage2", table, mode=mode)
        yield f"saliency: {mode}", saliency.attribute(images, target=target)
    yield "decomposed head", decompose(model, table)(images)
    yield "accuracy", torch.tensor(evaluate_classifier(model, data, **QUIET).accuracy)
    curve = accuracy_curve(model, table, data, num_filters=(2,), **QUIET)
    yield "accuracy curve", torch.as_tensor(next(iter(curve.accuracy.values())))
    yield "features", collect_features(model, "stage2", data, **QUIET)[0]
    yield "unit scores", unit_scores(model, "stage1", data, **QUIET)[0]["stage1"]
    found = exemplars(model, "stage2", data, num_exemplars=2, boxes=False, **QUIET)["stage2"]
    yield "exemplars", found.highest.score
    scores = contribution.filter_scores(contribution.attribute(images, target=target))
    yield (
        "deletion curves",
        filter_curves(model, "stage2", images, scores, target=target).deletion["scores"],
    )
    order = torch.arange(12)
    removed = accuracy_after_removal(model, "stage1", {"first": order}, data, **QUIET)
    yield "removal curve", torch.as_tensor(removed.accuracy["first"])


def against_cpu(device: torch.device) -> None:
    """Print the largest difference of every result from the CPU's."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(24, 3, 15, 13, generator=generator)
    labels = torch.arange(24) * 7 % 5
    data = [(images[i : i + 7], labels[i : i + 7]) for i in range(0, 24, 7)]
    expected = dict(results(Small().eval(), data))
    table = Table("method", f"largest difference from the CPU, relative ({device.type})")
    there = [(x.to(device), y.to(device)) for x, y in data]
    for batches in (there,) if device.type == "cpu" else (data, there):
        for name, value in results(Small().eval().to(device), batches):
            size = expected[name].double().abs().max().clamp(min=1e-9)
            off = (value.detach().cpu().double() - expected[name].double()).abs().max() / size
            if batches is there:
                table.row(name, f"{float(off):.1e}")
            assert off < 1e-3, f"{name}: off by {float(off):.1e}"


# -- identification -------------------------------------------------------------------------------


def identification(device: torch.device, size: Size) -> None:
    """Print times of identification as multiples of a bare forward pass."""
    table = Table(
        "identification", "bare s", "frequency and contribution s", "ratio", "peak memory, MiB"
    )
    networks: list[tuple[str, Callable[[], nn.Module], str, int]] = [
        ("ResNet-50", torchvision.models.resnet50, "layer4", size.image),
        ("ResNet-20", CifarResNet, "layer3", 32),
    ]
    for name, make, layer, side in networks[size.networks]:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            if device.type == "cpu" and dtype == torch.float16:
                continue
            for pinned in (False, True):
                label = f"{name}, {str(dtype).removeprefix('torch.')}"
                label += ", pinned loader" if pinned else ", tensors on the device"
                table.row(label, *_identified(make, layer, side, dtype, pinned, device, size))


def _identified(
    make: Callable[[], nn.Module],
    layer: str,
    side: int,
    dtype: torch.dtype,
    pinned: bool,
    device: torch.device,
    size: Size,
) -> list[str]:
    torch.manual_seed(0)
    layout = torch.channels_last if dtype != torch.float32 else torch.contiguous_format
    model = make().eval().to(device, dtype).to(memory_format=layout)
    classes = 10 if side == 32 else 1000
    distinct = []
    for _ in range(min(4, size.batches)):
        images = torch.randn(size.batch_size, 3, side, side).to(dtype)
        labels = torch.randint(0, classes, (size.batch_size,))
        if pinned and device.type == "cuda":
            distinct.append((images.pin_memory(), labels.pin_memory()))
        elif pinned:
            distinct.append((images, labels))
        else:
            there = images.to(device).contiguous(memory_format=layout)
            distinct.append((there, labels.to(device)))
    data = [distinct[i % len(distinct)] for i in range(size.batches)]
    methods = [LayerFilterFrequency(model, layer), LayerFilterContribution(model, layer)]

    @torch.inference_mode()
    def bare() -> None:
        for images, _ in data:
            model(images.to(device, non_blocking=True))

    def own() -> None:
        identify_class_filters(methods, data, **QUIET)

    peaks = []
    for task in (bare, own):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        task()
        peaks.append(
            torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else 0
        )
    seconds = medians({"bare": bare, "own": own}, size.repetitions, device)
    ratio = seconds["own"] / seconds["bare"]
    cells = [f"{seconds['bare']:.3f}", f"{seconds['own']:.3f}", f"{ratio:.3f}x"]
    return [*cells, f"{peaks[0]:.0f} -> {peaks[1]:.0f}" if device.type == "cuda" else ""]


def autocast_and_compile(device: torch.device, size: Size) -> None:
    """Print how far autocast and a compiled model are from the plain one, and their times."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18().eval().to(device)
    images = [torch.randn(size.batch_size, 3, size.image, size.image, device=device)] * size.batches
    labels = torch.randint(0, 1000, (size.batch_size,), device=device)
    data = [(batch, labels) for batch in images]

    def tables(network: nn.Module) -> list[Tensor]:
        methods = [
            LayerFilterFrequency(network, "layer4"),
            LayerFilterContribution(network, "layer4"),
        ]
        return [
            table.scores[labels.cpu()] for table in identify_class_filters(methods, data, **QUIET)
        ]

    def with_autocast() -> list[Tensor]:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return tables(model)

    backend = "inductor" if device.type == "cuda" else "eager"
    compiled: Any = torch.compile(model, backend=backend)

    @torch.inference_mode()
    def bare() -> None:
        for batch in images:
            model(batch)

    runs: dict[str, Callable[[], list[Tensor]]] = {
        "plain": lambda: tables(model),
        "under autocast to bfloat16": with_autocast,
        "of a compiled model": lambda: tables(compiled),
    }
    seconds = medians({"bare forward pass, float32": bare, **runs}, size.repetitions, device)
    plain = tables(model)[1]
    shown = Table("identification of ResNet-18 `layer4`", "s", "largest difference")
    for name, value in seconds.items():
        off = ""
        if name in runs:
            off = f"{float((runs[name]()[1] - plain).abs().max() / plain.abs().max()):.1e}"
        shown.row(name, f"{value:.3f}", off)


# -- ablation -------------------------------------------------------------------------------------


def ablation(device: torch.device, size: Size) -> None:
    """Print times of ablation beside Captum's, and in forward passes."""
    table = ablation_speed.new_table()
    models = torchvision.models
    networks = [
        ("ResNet-50", models.resnet50, "layer4"),
        ("ResNet-50", models.resnet50, "layer3"),
        ("DenseNet-121", models.densenet121, "features.denseblock3"),
        ("SqueezeNet", models.squeezenet1_1, "features"),
        ("ResNet-18", models.resnet18, "layer3"),
        ("ResNet-18", models.resnet18, "layer2"),
    ]
    for name, make, layer in networks[size.networks]:
        torch.manual_seed(0)
        model = make().eval().to(device)
        images = torch.randn(size.images, 3, size.image, size.image, device=device)
        ablation_speed.measure(table, name, model, layer, images, size.filters, size.repetitions)


# -- a gated training step ------------------------------------------------------------------------


def gated_step(device: torch.device, size: Size) -> None:
    """Print the time of a training step through the gate beside a plain one."""
    torch.manual_seed(0)
    model = CifarResNet().to(device)
    gate = ClassSpecificGate(10, 64).to(device).attach(model, "layer3")
    images = torch.randn(size.batch_size, 3, 32, 32, device=device)
    labels = torch.randint(0, 10, (size.batch_size,), device=device)
    optimizer = torch.optim.SGD([*model.parameters(), *gate.parameters()], lr=0.01)

    def step(gated: bool) -> None:
        for _ in range(10):
            optimizer.zero_grad()
            with gate.gating(labels) if gated else nullcontext():
                logits = model(images)
            loss = nn.functional.cross_entropy(logits, labels)
            if gated:
                loss = loss + 1e-3 * gate.regularizer()
            loss.backward()
            optimizer.step()
            if gated:
                gate.project()

    tasks = {"plain": lambda: step(False), "gated": lambda: step(True)}
    seconds = medians(tasks, size.repetitions, device)
    table = Table("ten training steps of ResNet-20", "s", "ratio")
    for name, value in seconds.items():
        table.row(name, f"{value:.3f}", f"{value / seconds['plain']:.3f}x")


PARTS: dict[str, Callable[[torch.device, Size], None]] = {
    "identification": identification,
    "modes": autocast_and_compile,
    "ablation": ablation,
    "gate": gated_step,
}


def main(given: Sequence[str] | None = None) -> None:
    """Print the tables."""
    known = parser(__doc__)
    known.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    known.add_argument("--only", nargs="*", choices=list(PARTS), help="parts to measure")
    options = parsed(known, given)
    device = torch.device(options.device)
    size = SMALL if options.small or device.type == "cpu" else FULL
    warnings.simplefilter("ignore")
    machine = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    print(f"{time.strftime('%Y-%m-%d')}, {machine or device.type}, torch {torch.__version__}")
    started = time.perf_counter()
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    against_cpu(device)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
    for name, part in PARTS.items():
        if not options.only or name in options.only:
            part(device, size)
    print(f"\n{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
