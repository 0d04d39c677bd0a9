"""Which methods find the filters that decide in trained networks, by what makes it hard.

    python -m benchmarks.trained_networks
    python -m benchmarks.trained_networks --train PATH --networks 3

Every network of `testing.trained_network` that the package has is asked at the layer at which its axis
acts. A method is reduced to a table of classes by filters, and three numbers of it are means over classes:
precision of as many filters as decide the class, which is also the recall (a score of zero is a miss);
average precision of all filters in the table's order; and the rank correlation (Somers' D) with the
measured effect, of pairs of filters whose effects differ by .02 or more. The effect of a filter is, of the
class's images, by how much its presence raises the class's probability when each filter is removed with a
probability of one half (Banzhaf's value), from 512 sets for each image. Printed are means over the
networks of an axis, with half the width of their 95 % interval by Student's distribution.

The first table has, of five times 400 images that no network was trained on, the worst share of all networks
of an axis: see `testing.verification.Verification`. With `--train` networks of five seeds are trained anew,
and the first three of each axis and level of which all holds are written to a file; the package's are from
such runs of single axes.
"""

import argparse
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from captum.attr import (
    InternalInfluence,
    LayerActivation,
    LayerConductance,
    LayerDeepLift,
    LayerFeatureAblation,
    LayerGradientShap,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    ShapleyValueSampling,
)
from scipy.stats import t as student
from torch import Tensor, nn

from benchmarks.planted_filters import gate_table
from benchmarks.shared import QUIET, Batches, Table, in_batches, parsed, parser, timed
from captum_classfilters import (
    ClassFilters,
    FilterGate,
    LayerFilterAblation,
    LayerFilterContribution,
    LayerFilterFrequency,
    LayerFilterShapley,
    LayerSingularDirection,
    identify_class_filters,
)
from captum_classfilters._core.tensor_files import write_tensors
from captum_classfilters.attr import WeightedFilterAttribution
from captum_classfilters.identify import collect_features
from captum_classfilters.metrics import (
    class_means,
    correlation_filters,
    mutual_information_filters,
    selectivity_filters,
)
from captum_classfilters.testing import shipped_networks, trained_network
from captum_classfilters.testing.tasks import AXES, LEVELS
from captum_classfilters.testing.trained import SCHEMA, TrainedNetwork
from captum_classfilters.testing.verification import Verification

STEPS = 20
EVALUATIONS = 256  # of each image, for Shapley values
SETS = 512
APART = 0.02
MEASURES = ("precision", "average precision", "rank correlation")
Makers = dict[str, Callable[[], ClassFilters]]


class PooledGradient(WeightedFilterAttribution):
    """What Grad-CAM adds up over filters: activations times the gradient's mean over positions."""

    needs_derivative = True

    def weights_from(self, maps: Any, target: Any) -> Tensor:
        """The weight of each filter, alike at all positions."""
        derivative: Tensor = maps.derivative(target)
        return derivative.mean(-1, keepdim=True)


def our_methods(network: TrainedNetwork, data: Batches, epochs: int) -> Makers:
    """The methods of this package."""
    model, layer, (x, y) = network.model, network.layer, data[0]
    ablation = LayerFilterAblation(model, layer)
    known: dict[str, Any] = {"num_classes": network.num_classes, **QUIET}

    def table(method: Any, **options: Any) -> Callable[[], ClassFilters]:
        return lambda: identify_class_filters(method, data, attribute_kwargs=options, **known)

    def features() -> tuple[Tensor, Tensor]:
        return collect_features(model, layer, data, **QUIET)

    def reduced(soft: bool) -> ClassFilters:
        reduction = ablation.identify(data, metric="accuracy", **QUIET)
        return reduction.to_class_filters(1, soft=soft)

    truth = network.truth[layer]
    return {
        "LayerFilterFrequency, top 3": table(LayerFilterFrequency(model, layer, top_k=3)),
        "LayerFilterContribution": table(LayerFilterContribution(model, layer)),
        "LayerFilterContribution, path": table(
            LayerFilterContribution(model, layer), n_steps=STEPS
        ),
        "LayerFilterAblation": table(ablation),
        "LayerFilterAblation, mean": table(LayerFilterAblation(model, layer, replacement="mean")),
        "LayerFilterAblation, resample": table(
            LayerFilterAblation(model, layer, replacement="resample")
        ),
        "LayerFilterAblation, log-probability": table(
            LayerFilterAblation(model, layer, score="log_probability")
        ),
        "CAR per class": lambda: reduced(False),
        "CAR per class, soft": lambda: reduced(True),
        "LayerFilterShapley": table(
            LayerFilterShapley(model, layer, tolerance=None, max_evaluations=EVALUATIONS)
        ),
        "Shapley values in gate space": lambda: in_gate_space(model, layer, x, y),
        "singular directions, by filter": lambda: directions(network, data),
        "class selectivity": lambda: selectivity_filters(*features()),
        "mutual information": lambda: mutual_information_filters(*features()),
        "correlation_filters": lambda: correlation_filters(*features()),
        "class gate, network frozen": lambda: gate_table(model, layer, data, epochs, *truth.shape),
    }


def captum_methods(network: TrainedNetwork, data: Batches) -> Makers:
    """Captum's, each summed over a filter's positions."""
    model, layer = network.model, network.layer
    module = model.get_submodule(layer)
    x = data[0][0]
    with torch.no_grad():
        output = model[: network.layers.index(layer) + 1](x[:1])
    by_filter = torch.arange(output.shape[1])[None, :, None, None].expand_as(output)

    def table(method: Any, **options: Any) -> Callable[[], ClassFilters]:
        return lambda: identify_class_filters(
            method, data, num_classes=network.num_classes, attribute_kwargs=options, **QUIET
        )

    others, _ = network.images(20, seed=2)
    return {
        "Captum LayerActivation": table(LayerActivation(model, module)),
        "Captum LayerGradientXActivation": table(LayerGradientXActivation(model, module)),
        "Captum LayerGradCam, by filter": table(PooledGradient(model, layer)),
        "Captum LayerIntegratedGradients": table(
            LayerIntegratedGradients(model, module), n_steps=STEPS
        ),
        "Captum LayerConductance": table(LayerConductance(model, module), n_steps=STEPS),
        "Captum InternalInfluence": table(InternalInfluence(model, module), n_steps=STEPS),
        "Captum LayerDeepLift": table(LayerDeepLift(model, module)),
        "Captum LayerGradientShap": table(LayerGradientShap(model, module), baselines=others),
        "Captum LayerFeatureAblation": table(
            LayerFeatureAblation(model, module), layer_mask=by_filter
        ),
    }


def in_gate_space(model: nn.Module, layer: str, x: Tensor, y: Tensor) -> ClassFilters:
    """Shapley values of the gates, sampled, of the logit of each image's label."""
    gate = FilterGate(model, layer)
    torch.manual_seed(0)
    scores = ShapleyValueSampling(gate).attribute(
        gate.ones(len(x)), target=y, additional_forward_args=x, n_samples=STEPS
    )
    return ClassFilters(class_means(scores.detach(), y), y.bincount(), layer=layer)


def directions(network: TrainedNetwork, data: Batches) -> ClassFilters:
    """Contributions of the singular directions of the layer's weight, dealt out to its filters."""
    block = network.model.get_submodule(network.layer)
    name = f"{network.layer}.{len(block) - 2}"  # type: ignore[arg-type]
    method = LayerSingularDirection(network.model, name, evidence="contribution")
    table = identify_class_filters(method, data, num_classes=network.num_classes, **QUIET)
    left = method.svd().left
    return ClassFilters(table.scores @ left.T.double().square(), table.counts, layer=network.layer)


@torch.no_grad()
def measured_effect(network: TrainedNetwork, x: Tensor, y: Tensor, number: int) -> Tensor:
    """Banzhaf's value of each filter for the probability of each class (C, K)."""
    start = network.layers.index(network.layer) + 1
    maps, suffix = network.model[:start](x), network.model[start:]
    generator = torch.Generator().manual_seed(0)
    sums = torch.zeros(2, 2, network.num_classes, maps.shape[1], dtype=torch.float64)
    for _ in range(number):
        kept = torch.rand(maps.shape[:2], generator=generator) < 0.5
        logits = suffix(maps * kept[..., None, None])
        chance = logits.softmax(1).gather(1, y[:, None]).double()
        for place, here in enumerate((~kept, kept)):
            sums[0, place].index_add_(0, y, here * chance)
            sums[1, place].index_add_(0, y, here.double())
    absent, present = sums[0] / sums[1]
    return present - absent


def precision(scores: Tensor, truth: Tensor) -> float:
    """Mean over classes of the share of its filters among as many with the highest scores, not zero."""
    values = []
    for row, decides in zip(scores, truth, strict=True):
        number = int(decides.sum())
        best = row.argsort(descending=True, stable=True)[:number]
        values.append(float((decides[best] & (row[best] != 0)).sum()) / number)
    return sum(values) / len(values)


def average_precision(scores: Tensor, truth: Tensor) -> float:
    """Mean over classes of the average precision of filters by falling scores."""
    values = []
    for row, decides in zip(scores, truth, strict=True):
        hit = decides[row.argsort(descending=True, stable=True)].double()
        precision = hit.cumsum(0) / torch.arange(1, len(hit) + 1)
        values.append(float((precision * hit).sum() / hit.sum()))
    return sum(values) / len(values)


def rank_correlation(scores: Tensor, effect: Tensor) -> float:
    """Mean over classes of the share of pairs that are in the order of their effects, less that of others."""
    values = []
    for row, truth in zip(scores, effect, strict=True):
        apart = truth[:, None] - truth
        agree = (row[:, None] - row).sign() * apart.sign()
        values.append(float(agree[apart.abs() >= APART].mean()))
    return sum(values) / len(values)


def measures(table: ClassFilters, truth: Tensor, effect: Tensor) -> list[float]:
    """The three numbers of a method and a network."""
    scores = table.scores
    return [
        precision(scores, truth),
        average_precision(scores, truth),
        rank_correlation(scores, effect),
    ]


def with_interval(values: Sequence[float]) -> str:
    """Mean and half the width of its 95 % interval."""
    numbers = torch.tensor(values, dtype=torch.float64)
    if len(numbers) < 2:
        return f"{float(numbers.mean()):.2f}"
    half = student.ppf(0.975, len(numbers) - 1) * float(numbers.std()) / len(numbers) ** 0.5
    return f"{float(numbers.mean()):.2f} ± {half:.2f}"


def judged(network: TrainedNetwork, images: int, epochs: int, sets: int) -> dict[str, list[float]]:
    """The three numbers of every method."""
    truth = network.truth[network.layer]
    x, y = network.images(images)
    data = in_batches(x, y, len(x))
    effect = measured_effect(network, x, y, sets)
    makers = {**our_methods(network, data, epochs), **captum_methods(network, data)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of scores that are zero, or dead
        rows = {name: measures(maker(), truth, effect) for name, maker in makers.items()}
    chance = float(truth.double().mean())
    return {**rows, "share of filters that decide": [chance, chance, 0.0]}


def verified(network: TrainedNetwork, draws: int) -> Verification:
    """The worst of each share over draws of 400 images that no network was trained on."""
    found = [vars(network.verify(seed=seed)) for seed in range(1, draws + 1)]
    return Verification(**{name: min(one[name] for one in found) for name in found[0]})


def shares(found: Verification) -> list[str]:
    """They, as text."""
    return [f"{value:.3f}" for value in vars(found).values()]


def chosen(options: argparse.Namespace) -> list[tuple[str, int]]:
    """Axes and their levels."""
    return [(a, level) for a in options.axes for level in LEVELS[a] if level in options.levels]


def train_and_write(options: argparse.Namespace) -> None:
    """Train networks, print the worst share of each, and write those of which all holds."""
    shown = Table("axis", "level", "seed", "seconds", *Verification.__dataclass_fields__, "holds")
    tensors: dict[str, Tensor] = {}
    for axis, level in chosen(options):
        written = 0
        for seed in range(options.seeds):
            train = partial(trained_network, axis, level, seed, shipped=False)
            seconds, network = timed(train, clock=time.process_time)
            found = verified(network, options.draws)
            shown.row(axis, level, seed, f"{seconds:.0f}", *shares(found), found.holds)
            if found.holds and written < (options.networks or options.seeds):
                written += 1
                for name, value in network.model.state_dict().items():
                    tensors[f"{axis}-{level}-{seed}/{name}"] = value.half()
    write_tensors(options.train, SCHEMA, tensors, {})


def main(given: Sequence[str] | None = None) -> None:
    """Print what was verified, and a table for each measure: methods by axes."""
    known = parser(__doc__)
    known.add_argument("--images", type=int, default=200)
    known.add_argument("--epochs", type=int, default=30, help="of training the gate")
    known.add_argument("--sets", type=int, default=SETS, help="of filters removed, for each image")
    known.add_argument("--axes", nargs="+", default=AXES, choices=AXES)
    known.add_argument("--levels", type=int, nargs="+", default=(1, 2), choices=(1, 2))
    known.add_argument("--draws", type=int, default=5, help="of images to verify networks with")
    known.add_argument("--networks", type=int, help="at most so many of each axis and level")
    known.add_argument("--train", metavar="PATH", help="train, verify and write networks instead")
    known.add_argument("--seeds", type=int, default=5, help="to train for each axis and level")
    small: dict[str, Any] = {"images": 24, "epochs": 2, "sets": 8, "draws": 1, "networks": 1}
    options = parsed(known, given, **small, axes=("shared",), levels=(1,))
    if options.train:
        train_and_write(options)
        return
    networks = []
    for kind in chosen(options):
        names = [name for name in shipped_networks() if name[:2] == kind]
        networks += [trained_network(*name) for name in names[: options.networks]]
    show_verified(networks, options)
    results: dict[str, dict[str, list[list[float]]]] = {}
    for network in networks:
        rows = judged(network, options.images, options.epochs, options.sets)
        for method, row in rows.items():
            results.setdefault(method, {}).setdefault(network.axis, []).append(row)
    show(results, options.axes)


def show_verified(networks: Sequence[TrainedNetwork], options: argparse.Namespace) -> None:
    """Print the worst share of all networks of an axis."""
    shown = Table("axis", "networks", *Verification.__dataclass_fields__)
    for axis in options.axes:
        own = [network for network in networks if network.axis == axis]
        found = [vars(verified(network, options.draws)) for network in own]
        worst = {name: min(one[name] for one in found) for name in found[0]}
        shown.row(axis, len(own), *shares(Verification(**worst)))


def show(results: dict[str, dict[str, list[list[float]]]], axes: Sequence[str]) -> None:
    """Print what was measured."""
    for place, measure in enumerate(MEASURES):
        print(f"\n{measure}: mean of the networks of an axis ± half of its 95 % interval")
        shown = Table("method", *axes)
        for name, by_axis in results.items():
            cells = ([row[place] for row in by_axis[axis]] for axis in axes)
            shown.row(name, *map(with_interval, cells))


if __name__ == "__main__":
    main()
