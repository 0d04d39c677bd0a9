"""The paper's other measurements on ResNet-20 and CIFAR-10.

    python -m benchmarks.measurements

The figures that others measured on a copy of CIFAR-10 stored as JPEG are printed beside ours where
they help; there only orderings compare.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from benchmarks import cifar10
from benchmarks.reproduce_badola import released_filters
from benchmarks.shared import QUIET, Table, parsed, parser, prepare
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


def main(given: Sequence[str] | None = None) -> None:
    """Print the tables."""
    options = parsed(parser(__doc__), given)
    prepare(options.small, cifar10.TEST, cifar10.TRAIN)
    model = cifar10.pretrained(20)
    train, test = cifar10.loader("train", 10000), cifar10.loader("test")
    tables = identify_class_filters(
        {
            "frequency": LayerFilterFrequency(model, "layer3"),
            "contribution": LayerFilterContribution(model, "layer3"),
        },
        train,
        num_filters=5,
        **QUIET,
    )
    sets = {**tables, "authors' public sets": released_filters()}
    features, labels = collect_features(model, "layer3", test, **QUIET)
    trained, trained_labels = collect_features(model, "layer3", train, **QUIET)
    print_essentiality(model, sets, features, labels)
    print_overlap(sets)
    print_sparsity(model, trained, trained_labels, train)
    print_spectra(trained, trained_labels)


def print_essentiality(
    model: cifar10.CifarResNet,
    sets: Mapping[str, ClassFilters],
    features: Tensor,
    labels: Tensor,
) -> None:
    """Recall with noise in place of each class's filters, and of all others."""
    table = Table(
        "noise in place of filters, mean recall, test images", "clean", "at set", "at complement"
    )
    head = model.linear.weight, model.linear.bias
    for name, filters in sets.items():
        result = essentiality(features, labels, *head, filters)
        means = (result.clean.mean(), result.at_set.mean(), result.at_complement.mean())
        table.row(name, *(f"{float(mean):.3f}" for mean in means))
    at_random = (result.clean, result.random_at_set, result.random_at_complement)
    table.row("random sets", *(f"{float(values.mean()):.3f}" for values in at_random))


def print_overlap(sets: Mapping[str, ClassFilters]) -> None:
    """How much the classes' sets share."""
    titles = {
        "mean_all_pairs": "MI, all pairs",
        "mean_off_diagonal": "MI, off-diagonal",
        "mean_jaccard": "Jaccard",
        "distinct_filters": "distinct filters",
    }
    table = Table("overlap of sets", *titles.values())
    for name, filters in sets.items():
        overlap = set_overlap(filters, repetitions=100)
        table.row(name, *(f"{getattr(overlap, key):.5g}" for key in titles))
    drawn = [overlap.random[key] for key in titles]
    table.row("random sets", *(f"{mean:.5f} +- {spread:.5f}" for mean, spread in drawn))


def print_sparsity(
    model: cifar10.CifarResNet, features: Tensor, labels: Tensor, train: Iterable[Any]
) -> None:
    """How few filters hold most of the activation, and how selective each layer is."""
    mass = top_mass(features, labels, [5, 10, 20])
    table = Table("k", "mean L1 mass of the top k filters, training images")
    for number, share in zip(mass.num_filters, mass.overall.tolist(), strict=True):
        table.row(number, f"{share:.3f}")
    table = Table("layer", "filters", "Psi at 0.5, mean", "class selectivity index")
    for row in layer_sweep(model, LAYERS, train, **QUIET):
        table.row(row.layer, row.num_filters, f"{row.psi:.3f}", f"{row.selectivity:.3f}")


def print_spectra(features: Tensor, labels: Tensor) -> None:
    """How many directions the features of the last stage take."""
    table = Table("Gram matrix of layer3", "share of the top eigenvalue", "eigenvalues for 95 %")
    for centered in (False, True):
        spectrum = gram_spectrum(features, labels, centered=centered)
        name = "centered" if centered else "uncentered"
        overall = float(spectrum.overall[0] / spectrum.overall.sum())
        table.row(f"{name}, all images", f"{overall:.3f}", spectrum.overall_number_for(0.95))
        top, numbers = spectrum.top_share, spectrum.number_for(0.95)
        shares = f"{float(top.min()):.3f} to {float(top.max()):.3f}"
        table.row(f"{name}, by class", shares, f"{int(numbers.min())} to {int(numbers.max())}")


if __name__ == "__main__":
    main()
