"""CIFAR-10, ResNet-20: attributions of pixels and of filters on the same test images.

    python -m benchmarks.compare_attributions [--images 500] [--threads 1] [--picture FILE]
    python -m benchmarks.compare_attributions --images 100 --cpu-time

The class explained is the network's own prediction. Class filters come from 2,000 training images.
The tables hold each method's milliseconds an image, with `--cpu-time` those of one thread whatever else
the machine does; a forward pass stands below. The infidelity of exact contributions, and of random
scores, is printed last and by itself.
"""

import statistics
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from captum.attr import (
    DeepLift,
    GradientShap,
    InputXGradient,
    IntegratedGradients,
    LayerConductance,
    LayerGradCam,
    LayerGradientXActivation,
    Occlusion,
    Saliency,
)
from torch import Tensor, nn

from benchmarks import cifar10
from benchmarks.shared import (
    QUIET,
    Table,
    count_processor_time,
    parsed,
    parser,
    prepare,
    timed,
)
from captum_classfilters import (
    ClassFilterSaliency,
    FilterGate,
    LayerFilterAblation,
    LayerFilterContribution,
    LayerFilterFrequency,
    identify_class_filters,
)
from captum_classfilters.metrics import compare_attributions, filter_infidelity
from captum_classfilters.visualize import plot_comparison


class ModularBlock(cifar10.BasicBlock):
    """The block with a module for each ReLU, which DeepLift needs to see."""

    def __init__(self, block: nn.Module) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(block.__dict__)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Block output."""
        out = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        if self.stride != 1 or self.padding:
            x = x[:, :, :: self.stride, :: self.stride]
            x = nn.functional.pad(x, (0, 0, 0, 0, self.padding, self.padding))
        return self.relu2(out + x)


class Modular(nn.Module):
    """The public network with modules in place of functions; the outputs are the same."""

    def __init__(self, model: cifar10.CifarResNet) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = model.conv1, model.bn1, nn.ReLU()
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(*map(ModularBlock, stage))
            for stage in (model.layer1, model.layer2, model.layer3)
        )
        self.pool, self.linear = nn.AdaptiveAvgPool2d(1), model.linear

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 10)."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.pool(x).flatten(1))


def methods_of(model: Modular, train: Iterable[Any]) -> dict[str, Any]:
    """Everything that is compared."""
    contribution = LayerFilterContribution(model, "layer3")
    table = identify_class_filters(contribution, train, num_filters=5, **QUIET)
    gated = FilterGate(model, "layer3")
    shap = {"baselines": torch.zeros(1, 3, 32, 32), "n_samples": 5, "stdevs": 0.1}
    occlusion = {"sliding_window_shapes": (3, 8, 8), "strides": (3, 8, 8)}
    steps = {"n_steps": 10, "internal_batch_size": 100}
    return {
        "Saliency": Saliency(model),
        "Input x Gradient": InputXGradient(model),
        "Integrated Gradients, 10 steps": (IntegratedGradients(model), steps),
        "Gradient SHAP": (GradientShap(model), shap),
        "DeepLift": DeepLift(model),
        "Occlusion 8x8": (Occlusion(model), {**occlusion, "perturbations_per_eval": 1}),
        "Grad-CAM, layer3": LayerGradCam(model, model.layer3),
        "class filters (5 of 64)": ClassFilterSaliency(model, "layer3", table),
        "class filters, 10 steps": (ClassFilterSaliency(model, "layer3", table), {"n_steps": 10}),
        "class filter maps": ClassFilterSaliency(model, "layer3", table, mode="activation_map"),
        "contribution": contribution,
        "ablation": LayerFilterAblation(model, "layer3"),
        "frequency": LayerFilterFrequency(model, "layer3", top_k=5),
        "Gradient x Activation": LayerGradientXActivation(model, model.layer3),
        "Layer Conductance, 10 steps": (LayerConductance(model, model.layer3), steps),
        "Integrated Gradients of gates": (IntegratedGradients(gated), steps),
        "contribution, layer2": LayerFilterContribution(model, "layer2"),
        "ablation, layer2": LayerFilterAblation(model, "layer2"),
    }


def main(given: Sequence[str] | None = None) -> None:
    """Print the tables."""
    known = parser(__doc__)
    known.add_argument("--images", type=int, default=500)
    known.add_argument("--threads", type=int, default=1)
    known.add_argument("--sensitivity-samples", type=int, default=1)
    known.add_argument("--picture")
    known.add_argument("--cpu-time", action="store_true")
    options = parsed(known, given, images=2)
    if options.cpu_time:
        options.threads = 1
        count_processor_time()
    torch.set_num_threads(options.threads)
    prepare(options.small, cifar10.TEST, cifar10.TRAIN)
    public = cifar10.pretrained(8 if options.small else 20)
    model = Modular(public).eval()
    x, _ = cifar10.images("test", options.images)
    with torch.no_grad():
        assert torch.allclose(model(x[:50]), public(x[:50]), atol=1e-4)
        target = torch.cat([model(part).argmax(1) for part in x.split(50)])
    methods = methods_of(model, cifar10.loader("train", 2000))
    seconds, comparison = timed(
        lambda: compare_attributions(
            model, methods, x, target, sensitivity_samples=options.sensitivity_samples
        )
    )
    print(comparison)
    print(f"{seconds:.0f} s for {len(x)} images and {len(methods)} methods")
    with torch.no_grad():
        times = [timed(partial(model, part))[0] / len(part) for part in x.split(50)]
    print(f"one forward pass: {1000 * statistics.median(times):.2f} ms an image, in batches of 50")
    if options.picture:
        figure, _ = plot_comparison(comparison)
        figure.savefig(options.picture, dpi=110)
    method = LayerFilterContribution(model, "layer3")
    exact = method.filter_scores(method.attribute(x, target=target))
    draw = torch.Generator().manual_seed(0)
    random = torch.randn(exact.shape, generator=draw) * exact.std()
    tables = {"exact contributions": exact, "normal scores, same spread": random}
    found = filter_infidelity(model, "layer3", x, tables, target=target)
    table = Table("scores of layer3's filters", "infidelity")
    for name, values in found.infidelity.items():
        table.row(name, f"{float(values.mean()):.1e}")


if __name__ == "__main__":
    main()
