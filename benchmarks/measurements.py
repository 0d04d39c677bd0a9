"""The paper's other measurements on ResNet-20 and CIFAR-10.

    python -m benchmarks.measurements

The figures that others measured on a copy of CIFAR-10 stored as JPEG are printed beside ours where
they help; there only orderings compare.
"""

import torch

from benchmarks import cifar10
from benchmarks.reproduce_badola import RELEASED
from captum_classfilters import ClassFilters, LayerFilterContribution, LayerFilterFrequency
from captum_classfilters.heads import (
    essentiality,
    gram_spectrum,
    layer_sweep,
    set_overlap,
    top_mass,
)
from captum_classfilters.identify import collect_features, identify_class_filters

LAYERS = [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(3)]


def main() -> None:
    if not cifar10.available():
        raise SystemExit(f"The data folder {cifar10.DATA.name} is absent; set CLASSFILTERS_DATA.")
    model = cifar10.pretrained(20)
    train, test = cifar10.loader("train", 10000), cifar10.loader("test")
    tables = identify_class_filters(
        {
            "frequency": LayerFilterFrequency(model, "layer3"),
            "contribution": LayerFilterContribution(model, "layer3"),
        },
        train,
        num_filters=5,
    )
    mask = torch.zeros(10, 64, dtype=torch.bool)
    for row, filters in enumerate(RELEASED):
        mask[row, filters] = True
    released = ClassFilters(mask.double(), torch.ones(10)).with_selection(mask)
    sets = {**tables, "authors' public sets": released}
    features, labels = collect_features(model, "layer3", test)
    trained, trained_labels = collect_features(model, "layer3", train)
    print_essentiality(model, sets, features, labels)
    print_overlap(sets)
    print_sparsity(model, trained, trained_labels, train)
    print_spectra(trained, trained_labels)


def print_essentiality(model, sets, features, labels) -> None:
    print(
        "\n| noise in place of filters, mean recall, test images | clean | at set | at complement |"
    )
    print("|---|---|---|---|")
    for name, table in sets.items():
        result = essentiality(
            features, labels, model.linear.weight, model.linear.bias, table, repeats=3
        )
        values = (result.clean, result.at_set, result.at_complement)
        print(f"| {name} | " + " | ".join(f"{float(value.mean()):.3f}" for value in values) + " |")
    values = (result.clean, result.random_at_set, result.random_at_complement)
    print("| random sets | " + " | ".join(f"{float(value.mean()):.3f}" for value in values) + " |")


def print_overlap(sets) -> None:
    print("\n| overlap of sets | MI, all pairs | MI, off-diagonal | Jaccard | distinct filters |")
    print("|---|---|---|---|---|")
    for name, table in sets.items():
        overlap = set_overlap(table, random_seeds=100)
        print(
            f"| {name} | {overlap.mean_all_pairs:.5f} | {overlap.mean_off_diagonal:.5f} | "
            f"{overlap.mean_jaccard:.3f} | {overlap.distinct_filters} |"
        )
    cells = " | ".join(
        f"{overlap.random[key][0]:.5f} +- {overlap.random[key][1]:.5f}"
        for key in ("mean_all_pairs", "mean_off_diagonal", "mean_jaccard", "distinct_filters")
    )
    print(f"| random sets | {cells} |")


def print_sparsity(model, features, labels, train) -> None:
    mass = top_mass(features, labels, [5, 10, 20])
    print("\nMean L1 mass of the top k filters, training images:")
    for number, share in zip(mass.num_filters, mass.overall.tolist(), strict=True):
        print(f"  k = {number:2d}: {share:.3f}")
    print("\n| layer | filters | Psi at 0.5, mean | class selectivity index |")
    print("|---|---|---|---|")
    for row in layer_sweep(model, LAYERS, train):
        print(f"| {row.layer} | {row.num_filters} | {row.psi:.3f} | {row.selectivity:.3f} |")


def print_spectra(features, labels) -> None:
    print("\n| Gram matrix of layer3 | share of the top eigenvalue | eigenvalues for 95 % |")
    print("|---|---|---|")
    for centred in (False, True):
        spectrum = gram_spectrum(features, labels, centred=centred)
        name = "centred" if centred else "uncentred"
        top = spectrum.top_share
        overall = float(spectrum.overall[0] / spectrum.overall.sum())
        print(f"| {name}, all images | {overall:.3f} | {spectrum.overall_number_for(0.95)} |")
        numbers = spectrum.number_for(0.95)
        print(
            f"| {name}, by class | {float(top.min()):.3f} to {float(top.max()):.3f} | "
            f"{int(numbers.min())} to {int(numbers.max())} |"
        )


if __name__ == "__main__":
    main()
