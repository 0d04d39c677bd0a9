"""Methods against methods on ResNet-20 and CIFAR-10: agreement, sufficiency, cost; is it chance?

    python -m benchmarks.method_agreement [--picture agreement.png]
    python -m benchmarks.method_agreement --layers layer2 --train 1000 --test 500
    python -m benchmarks.method_agreement --calibration

The first forms compare all methods at each layer: filters found on training images, sufficiency on
test images. The last finds filters for labels without meaning, twenty times, and counts discoveries.
With `--cpu-time` costs are seconds of one thread, whatever else the machine does.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import cifar10
from benchmarks.shared import (
    QUIET,
    Table,
    count_processor_time,
    in_batches,
    parsed,
    parser,
    prepare,
    timed,
)
from captum_classfilters import (
    LabelPermutation,
    LayerFilterAblation,
    LayerFilterContribution,
    LayerFilterFrequency,
    identify_class_filters,
)
from captum_classfilters.identify import binomial_interval, collect_evidence
from captum_classfilters.metrics import compare_methods
from captum_classfilters.visualize import plot_method_comparison


def compare(
    model: nn.Module,
    layer: str,
    gate: Tensor | None,
    train: Iterable[Any],
    test: Iterable[Any],
    picture: Path | None,
) -> None:
    """All methods at a layer."""
    found = compare_methods(model, layer, train, test, num_filters=5, gate=gate, **QUIET)
    seconds, _ = timed(lambda: cifar10.accuracy(model, train))
    print(f"\nOne forward pass over the training images: {seconds:.2f} s")
    print(f"\n{layer}, {found.tables['contribution'].num_filters} filters\n\n{found}", flush=True)
    if picture is not None:
        figure, _ = plot_method_comparison(found)
        figure.savefig(picture.with_stem(f"{picture.stem}_{layer}"), dpi=110)


def two_methods(model: nn.Module, layer: str) -> dict[str, Any]:
    """Votes and contributions."""
    return {
        "frequency": LayerFilterFrequency(model, layer, top_k=5),
        "contribution": LayerFilterContribution(model, layer),
    }


def significant(model: nn.Module, layer: str, train: Iterable[Any]) -> None:
    """Discoveries for the true labels, and stability over halves of the images."""
    methods = two_methods(model, layer)
    plainly, plain = timed(lambda: identify_class_filters(methods, train, num_filters=5, **QUIET))
    tested, tables = timed(
        lambda: identify_class_filters(methods, train, significance=True, **QUIET)
    )
    evidence = collect_evidence(methods, train, **QUIET)
    print(f"\n{layer}: identification {plainly:.1f} s, with significance {tested:.1f} s")
    rows = Table(
        *("method", "cells with q <= 0.05", "of these for the class", "of the top 5"),
        "stability",
    )
    for name, table in tables.items():
        assert table.q_values is not None  # significance was asked for
        passed = table.q_values <= 0.05
        chosen = table.select(fdr=0.05).selected
        top = plain[name].selected
        share = float((top & chosen).sum() / top.sum())
        rows.row(
            name,
            f"{int(passed.sum())} of {passed.numel()}",
            int(chosen.sum()),
            f"{share:.2f}",
            evidence[name].stability(num_filters=5),
        )


def calibrate(
    model: nn.Module, layers: Sequence[str], images: int, runs: int, permutations: int
) -> None:
    """How often labels without meaning make a discovery, and cells a small p-value."""
    x, y = cifar10.images("test", images)
    print(
        f"\n{runs} permutations of the labels of {len(x):,} test images, {permutations:,} "
        "permutations in the test"
    )
    rows = Table(
        *("layer", "method", "runs with a discovery", "95 % interval of their share"),
        "cells p <= 0.05",
    )
    for layer in layers:
        methods = two_methods(model, layer)
        if layer == "layer3":  # elsewhere replays would take most of an hour
            methods["ablation"] = LayerFilterAblation(model, layer)
        discoveries = dict.fromkeys(methods, 0)
        cells: dict[str, list[Tensor]] = {name: [] for name in methods}
        for seed in range(runs):
            order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
            shuffled = in_batches(x, y[order], 250)
            test = LabelPermutation(permutations=permutations, seed=seed)
            tables = identify_class_filters(
                methods, shuffled, num_filters=5, significance=test, **QUIET
            )
            for name, table in tables.items():
                assert table.q_values is not None
                assert table.p_values is not None
                discoveries[name] += bool((table.q_values <= 0.05).any())
                cells[name].append((table.p_values <= 0.05).double().mean())
        for name, number in discoveries.items():
            interval = binomial_interval(torch.tensor(number), torch.tensor(runs)).tolist()
            shares = torch.stack(cells[name])
            rows.row(
                layer,
                name,
                f"{number} of {runs}",
                f"{interval[0]:.3f} to {interval[1]:.3f}",
                f"{float(shares.mean()):.4f} +- {float(shares.std() / runs**0.5):.4f}",
            )


def main(given: Sequence[str] | None = None) -> None:
    """Print the tables; a small run prints all of them."""
    known = parser(__doc__)
    known.add_argument("--layers", nargs="+", default=["layer3"])
    known.add_argument("--train", type=int, default=5000)
    known.add_argument("--test", type=int, default=2000)
    known.add_argument("--calibration", action="store_true")
    known.add_argument("--images", type=int, default=1000, help="for --calibration")
    known.add_argument("--runs", type=int, default=20, help="for --calibration")
    known.add_argument("--permutations", type=int, default=19_999, help="for --calibration")
    known.add_argument("--picture", type=Path)
    known.add_argument("--cpu-time", action="store_true")
    arguments = parsed(known, given, train=40, test=20, images=20, runs=2, permutations=99)
    if arguments.cpu_time:
        torch.set_num_threads(1)
        count_processor_time()
    prepare(arguments.small, cifar10.TEST, cifar10.TRAIN, cifar10.GATED)
    model = cifar10.pretrained(20)
    if arguments.calibration or arguments.small:
        calibrate(model, arguments.layers, arguments.images, arguments.runs, arguments.permutations)
    if arguments.calibration:
        return
    train = cifar10.loader("train", arguments.train)
    test = cifar10.loader("test", arguments.test)
    for layer in arguments.layers:
        compare(model, layer, None, train, test, arguments.picture)
        significant(model, layer, train)
    if "layer3" in arguments.layers:
        # The public network that was trained with a gate at its last stage.
        gated, gate = cifar10.gated()
        print("\nThe network trained with a class-specific gate:")
        picture = arguments.picture
        compare(
            gated,
            "layer3",
            gate,
            train,
            test,
            picture and picture.with_stem(f"{picture.stem}_gated"),
        )


if __name__ == "__main__":
    main()
