"""How far singular directions keep CIFAR-10's classes apart, layer by layer.

    python -m benchmarks.class_separation [--images 2000] [--permutations 200] [--depth 20]

For each convolution of a public CIFAR ResNet and its head, the hypergraph of classes and singular
directions, its separation scores under the true labels and the mean under permuted ones, with
p-values. A network of the same shape with random weights (seed 0) is measured beside it.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from benchmarks import cifar10
from benchmarks.shared import QUIET, Table, parsed, parser, prepare, timed
from captum_classfilters.identify import unit_scores
from captum_classfilters.spectral import model_svd, separation_test

RULES: dict[str, dict[str, Any]] = {
    "signal_share": {"rule": "signal_share"},
    "influential": {"rule": "influential", "share": 0.1},
    "exemplars": {"rule": "exemplars", "num_exemplars": 10},
}
SHOWN = ("jaccard", "components", "purity", "single_class_share")


def measure(name: str, model: nn.Module, images: int, permutations: int) -> None:
    """Print one model's table."""
    svds = model_svd(model)
    data = cifar10.loader("test", images)
    read, (scores, labels) = timed(
        lambda: unit_scores(model, list(svds), data, directions=svds, **QUIET)
    )
    print(f"\n{name}: {len(labels)} images, signals of {len(svds)} layers in {read:.1f} s")
    for rule, options in RULES.items():
        table = Table(rule, "edges", *(f"{score} (null, p)" for score in SHOWN))
        for layer in svds:
            test = separation_test(
                scores[layer],
                labels,
                class_names=cifar10.CLASSES,
                permutations=permutations,
                **options,
                **QUIET,
            )
            cells = []
            for score in SHOWN:
                drawn = torch.as_tensor(test.null[score])
                found = (test.observed[score], float(drawn.nanmean()), test.p_values[score])
                seen, null, p = ("-" if math.isnan(value) else f"{value:.3f}" for value in found)
                cells.append(f"{seen} ({null}, {p})")
            used = int(test.hypergraph.incidence.any(0).sum())
            table.row(layer, used, *cells)


def main(given: Sequence[str] | None = None) -> None:
    """Print the tables."""
    known = parser(__doc__)
    known.add_argument("--images", type=int, default=2000)
    known.add_argument("--permutations", type=int, default=200)
    known.add_argument("--depth", type=int, default=20)
    options = parsed(known, given, images=40, permutations=3, depth=8)
    prepare(options.small, cifar10.TEST)
    trained = cifar10.pretrained(options.depth)
    measure("trained", trained, options.images, options.permutations)
    torch.manual_seed(0)
    random = cifar10.CifarResNet(options.depth).eval()
    measure("random weights", random, options.images, options.permutations)


if __name__ == "__main__":
    main()
