"""How far singular directions keep CIFAR-10's classes apart, layer by layer.

    python -m benchmarks.class_separation [--images 2000] [--permutations 200] [--depth 20]

For each convolution of a public CIFAR ResNet and its head, the hypergraph of classes and singular
directions, its separation scores under the true labels and the mean under permuted ones, with
p-values. A network of the same shape with random weights (seed 0) is measured beside it.
"""

import argparse
import time

import torch
from torch import nn

from benchmarks.cifar10 import CLASSES, CifarResNet, loader, pretrained
from captum_classfilters.identify import unit_scores
from captum_classfilters.spectral import model_svd, separation_test

RULES: dict[str, dict[str, object]] = {
    "signal_share": {"rule": "signal_share"},
    "influential": {"rule": "influential", "share": 0.1},
    "exemplars": {"rule": "exemplars", "num_exemplars": 10},
}
SHOWN = ("jaccard", "components", "purity", "single_class_share")


def measure(name: str, model: nn.Module, images: int, permutations: int) -> None:
    """Print one model's table."""
    svds = model_svd(model)
    start = time.perf_counter()
    scores, labels = unit_scores(
        model, list(svds), loader("test", images), directions=svds, show_progress=False
    )
    read = time.perf_counter() - start
    print(f"\n{name}: {len(labels)} images, signals of {len(svds)} layers in {read:.1f} s")
    header = "  ".join(f"{score + ' (null, p)':>28}" for score in SHOWN)
    for rule, options in RULES.items():
        print(f"\n{rule}\n{'layer':<20}{'edges':>6}  {header}")
        for layer in svds:
            test = separation_test(
                scores[layer],
                labels,
                class_names=CLASSES,
                permutations=permutations,
                show_progress=False,
                **options,  # type: ignore[arg-type]
            )
            cells = []
            for score in SHOWN:
                drawn = test.null[score][~torch.from_numpy(test.null[score]).isnan().numpy()]
                null = f"{drawn.mean():.3f}" if len(drawn) else "-"
                cells.append(f"{test.observed[score]:.3f} ({null}, {test.p_values[score]:.3f})")
            used = int(test.hypergraph.incidence.any(0).sum())
            print(f"{layer:<20}{used:>6}  " + "  ".join(f"{cell:>28}" for cell in cells))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--permutations", type=int, default=200)
    parser.add_argument("--depth", type=int, default=20)
    options = parser.parse_args()
    measure("trained", pretrained(options.depth), options.images, options.permutations)
    torch.manual_seed(0)
    random = CifarResNet(options.depth).eval()
    measure("random weights", random, options.images, options.permutations)


if __name__ == "__main__":
    main()
