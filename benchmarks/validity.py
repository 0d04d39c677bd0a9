"""Which scores speak of the label: two tests, stability and purity of each, on ResNet-20 and CIFAR-10.

    python -m benchmarks.validity

Each way to identify class filters is put through `validate`, whose first two tests are those of Oikarinen,
Yan and Weng (ICML 2025); and its table decomposes the head, with k filters for each class.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks import cifar10
from benchmarks.shared import QUIET, Table, parsed, parser, prepare
from captum_classfilters import (
    ClassFilters,
    LayerFilterAblation,
    LayerFilterContribution,
    LayerFilterFrequency,
)
from captum_classfilters.heads import accuracy_curve
from captum_classfilters.identify import collect_features
from captum_classfilters.metrics import (
    correlation_filters,
    mutual_information_filters,
    selectivity_filters,
    validate,
)

Loader = Iterable[tuple[Tensor, Tensor]]
Identify = Callable[[Loader], ClassFilters]


def main(given: Sequence[str] | None = None) -> None:
    """Print both tables."""
    options = parser(__doc__)
    options.add_argument("--images", type=int, default=4000, help="training images of the tests")
    options.add_argument("--num-filters", type=int, nargs="*", default=[1, 2, 3, 5, 10])
    options.add_argument("--seed", type=int, default=0)
    arguments = parsed(options, given, images=200, num_filters=[1, 5])
    prepare(arguments.small, cifar10.TEST, cifar10.TRAIN)
    model = cifar10.pretrained(20)
    loader = cifar10.loader("train", arguments.images)
    features, labels = collect_features(model, "layer3", loader, **QUIET)
    weight = model.linear.weight.detach()
    from_images, from_features = by_images(model), by_features(weight)
    print_cards(from_images, loader, features, arguments.seed)
    print_cards(from_features, [(features, labels)], features, arguments.seed)
    print_heads(model, from_images, from_features, arguments.num_filters)


def by_images(model: cifar10.CifarResNet) -> dict[str, Identify]:
    """Ways that run the network."""
    ablation = LayerFilterAblation(model, "layer3")

    def reduction(loader: Loader) -> ClassFilters:
        return ablation.identify(loader, metric="accuracy", **QUIET).to_class_filters(5)

    return {
        "frequency, share of votes": partial(
            LayerFilterFrequency(model, "layer3").identify, **QUIET
        ),
        "contribution, mean": partial(LayerFilterContribution(model, "layer3").identify, **QUIET),
        "ablation, accuracy (CAR)": reduction,
    }


def by_features(weight: Tensor) -> dict[str, Identify]:
    """Ways that need the layer's means and the labels alone."""

    def correlation(loader: Loader) -> ClassFilters:
        return correlation_filters(*joined(loader))

    def weighted(loader: Loader) -> ClassFilters:
        return correlation_filters(*joined(loader), weight)

    def selectivity(loader: Loader) -> ClassFilters:
        return selectivity_filters(*joined(loader))

    def information(loader: Loader) -> ClassFilters:
        return mutual_information_filters(*joined(loader))

    def votes(loader: Loader) -> ClassFilters:
        """Numbers of votes, as the authors count them."""
        features, labels = joined(loader)
        voted = torch.zeros_like(features).scatter_(1, features.topk(5, dim=1).indices, 1)
        sums = torch.zeros(len(weight), features.shape[1]).index_add_(0, labels, voted)
        return ClassFilters(sums, counts=labels.bincount(minlength=len(weight)), method="votes")

    return {
        "frequency, number of votes": votes,
        "correlation of activation": correlation,
        "correlation of contribution": weighted,
        "selectivity": selectivity,
        "mutual information": information,
    }


def joined(loader: Loader) -> tuple[Tensor, Tensor]:
    """All features and labels of a loader."""
    features, labels = zip(*loader, strict=True)
    return torch.cat(features), torch.cat(labels)


def print_cards(ways: Mapping[str, Identify], loader: Loader, features: Tensor, seed: int) -> None:
    """A line for each way."""
    table = Table(
        *("score", "missing labels", "extra labels", "passes"),
        *("filters in both halves", "purity of the strongest"),
    )
    for name, identify in ways.items():
        card = validate(identify, loader, features=features, seed=seed)
        assert card.purity is not None
        means = (card.missing.nanmean(), card.extra.nanmean())
        cells = [told(float(mean), "+.3f") for mean in means]
        shares = [told(float(share.nanmean()), ".2f") for share in (card.stability, card.purity)]
        table.row(name, *cells, "yes" if card.passes else "no", *shares)


def told(value: float, form: str) -> str:
    """A number, or a dash where no class has one."""
    return "-" if math.isnan(value) else format(value, form)


def print_heads(
    model: cifar10.CifarResNet,
    from_images: Mapping[str, Identify],
    from_features: Mapping[str, Identify],
    numbers: Sequence[int],
) -> None:
    """Accuracy of heads that keep k filters for each class, on test images."""
    train = cifar10.loader("train", 10000)
    rows = [collect_features(model, "layer3", train, **QUIET)]
    tables = {name: identify(train) for name, identify in from_images.items()}
    tables |= {name: identify(rows) for name, identify in from_features.items()}
    test = cifar10.loader("test")
    curve = accuracy_curve(model, tables, test, num_filters=list(numbers), head="linear", **QUIET)
    table = Table("decomposed head, test accuracy, k =", *numbers)
    for name, values in curve.accuracy.items():
        table.row(name, *(f"{100 * value:.2f}" for value in values))


if __name__ == "__main__":
    main()
