"""Methods against methods on ResNet-20 and CIFAR-10: agreement, sufficiency, cost; is it chance?

    python -m benchmarks.method_agreement [--picture agreement.png]
    python -m benchmarks.method_agreement --layers layer2 --train 1000 --test 500
    python -m benchmarks.method_agreement --calibration

The first forms compare all methods at each layer: filters found on training images, sufficiency on
test images. The last finds filters for labels without meaning, twenty times, and counts discoveries.
With `--cpu-time` costs are seconds of one thread, whatever else the machine does.
"""

import argparse
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks import cifar10, count_processor_time
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


def compare(model, layer, gate, train, test, picture) -> None:
    found = compare_methods(model, layer, train, test, num_filters=5, gate=gate)
    started = time.perf_counter()
    cifar10.accuracy(model, train)
    print(f"\nOne forward pass over the training images: {time.perf_counter() - started:.2f} s")
    print(f"\n{layer}, {found.tables['contribution'].num_filters} filters\n\n{found}", flush=True)
    if picture is not None:
        figure, _ = plot_method_comparison(found)
        figure.savefig(picture.with_stem(f"{picture.stem}_{layer}"), dpi=110)


def significant(model, layer, train) -> None:
    """Discoveries for the true labels, and stability over halves of the images."""
    methods = {
        "frequency": LayerFilterFrequency(model, layer, top_k=5),
        "contribution": LayerFilterContribution(model, layer),
    }
    started = time.perf_counter()
    plain = identify_class_filters(methods, train, num_filters=5, show_progress=False)
    middle = time.perf_counter()
    tables = identify_class_filters(methods, train, significance=True, show_progress=False)
    seconds = middle - started, time.perf_counter() - middle
    evidence = collect_evidence(methods, train, show_progress=False)
    print(f"\n{layer}: identification {seconds[0]:.1f} s, with significance {seconds[1]:.1f} s")
    print("| method | cells with q <= 0.05 | of these for the class | of the top 5 | stability |")
    print("|---|---|---|---|---|")
    for name, table in tables.items():
        passed = table.q_values <= 0.05
        chosen = table.select(fdr=0.05).selected
        top = plain[name].selected
        share = float((top & chosen).sum() / top.sum())
        print(
            f"| {name} | {int(passed.sum())} of {passed.numel()} | {int(chosen.sum())} | "
            f"{share:.2f} | {evidence[name].stability(num_filters=5)} |",
            flush=True,
        )


def calibrate(model, layers, runs: int = 20) -> None:
    """How often labels without meaning make a discovery, and cells a small p-value."""
    x, y = cifar10.images("test", 1000)
    print(
        f"\n{runs} permutations of the labels of 1,000 test images, 19,999 permutations in the test"
    )
    print(
        "| layer | method | runs with a discovery | 95 % interval of their share | cells p <= 0.05 |"
    )
    print("|---|---|---|---|---|")
    for layer in layers:
        methods = {
            "frequency": LayerFilterFrequency(model, layer, top_k=5),
            "contribution": LayerFilterContribution(model, layer),
        }
        if layer == "layer3":  # elsewhere replays would take most of an hour
            methods["ablation"] = LayerFilterAblation(model, layer)
        discoveries = dict.fromkeys(methods, 0)
        cells = {name: [] for name in methods}
        for seed in range(runs):
            order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
            shuffled = list(zip(x.split(250), y[order].split(250), strict=True))
            test = LabelPermutation(permutations=19_999, seed=seed)
            tables = identify_class_filters(
                methods, shuffled, num_filters=5, significance=test, show_progress=False
            )
            for name, table in tables.items():
                discoveries[name] += bool((table.q_values <= 0.05).any())
                cells[name].append((table.p_values <= 0.05).double().mean())
        for name, number in discoveries.items():
            interval = binomial_interval(torch.tensor(number), torch.tensor(runs)).tolist()
            shares = torch.stack(cells[name])
            print(
                f"| {layer} | {name} | {number} of {runs} | {interval[0]:.3f} to "
                f"{interval[1]:.3f} | {float(shares.mean()):.4f} +- "
                f"{float(shares.std() / runs**0.5):.4f} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", nargs="+", default=["layer3"])
    parser.add_argument("--train", type=int, default=5000)
    parser.add_argument("--test", type=int, default=2000)
    parser.add_argument("--calibration", action="store_true")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--cpu-time", action="store_true")
    arguments = parser.parse_args()
    if arguments.cpu_time:
        torch.set_num_threads(1)
        count_processor_time()
    if not cifar10.available():
        raise SystemExit(f"The data folder {cifar10.DATA.name} is absent; set CLASSFILTERS_DATA.")
    model = cifar10.pretrained(20)
    if arguments.calibration:
        calibrate(model, arguments.layers)
        return
    train = cifar10.loader("train", arguments.train)
    test = cifar10.loader("test", arguments.test)
    for layer in arguments.layers:
        compare(model, layer, None, train, test, arguments.picture)
        significant(model, layer, train)
    if "layer3" in arguments.layers:
        # The public network that was trained with a gate at its last stage.
        gated = cifar10.pretrained(20, "resnet20_csg_cifar10.safetensors")
        gate = load_file(cifar10.DATA / "resnet20_csg_cifar10.safetensors")["gate"]
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
