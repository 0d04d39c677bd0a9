"""The main job on real images, offline: scikit-learn's handwritten digits and a small network."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from captum.attr import IntegratedGradients
from captum.metrics import infidelity, infidelity_perturb_func_decorator, sensitivity_max
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm

from captum_classfilters._core.batches import read_batches
from captum_classfilters._core.extras import extra
from captum_classfilters._core.files import check_writable_folder, write_figure, write_text
from captum_classfilters._core.tables import text_table
from captum_classfilters._core.types import JsonDict
from captum_classfilters.attr import (
    ClassFilterSaliency,
    LayerFilterContribution,
    LayerFilterFrequency,
)
from captum_classfilters.class_filters import ClassFilters
from captum_classfilters.gate_space import FilterGate
from captum_classfilters.heads import accuracy_curve, decompose, refit_head
from captum_classfilters.heads.accuracy_curve import AccuracyCurve
from captum_classfilters.identify import identify_class_filters
from captum_classfilters.metrics import evaluate_classifier
from captum_classfilters.visualize import plot_accuracy_curve, plot_class_filters, plot_explanations

NUM_FILTERS = 64
KEPT = (1, 2, 3, 5, 8, 12, 16, 24, 32, 48, 64)


@dataclass(frozen=True)
class Digits:
    """Handwritten digits, split in two.

    Args:

        train (DataLoader): Batches of (images (N, 1, 8, 8) in [0, 1], labels (N,)).
        test (DataLoader): Likewise.
        test_images (Tensor): All test images.
        test_labels (Tensor): Their labels.
    """

    train: DataLoader
    test: DataLoader
    test_images: Tensor
    test_labels: Tensor


def load_digits(seed: int = 0) -> Digits:
    """The 1,797 digits that come with scikit-learn, 60 per cent of them for training.

    Args:

        seed (int): Seed of the split.

    Returns:
        *Digits*.
    """
    digits = extra("sklearn.datasets", "load_digits", of="demo").load_digits()
    train_test_split = extra("sklearn.model_selection", "load_digits", of="demo").train_test_split
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target, dtype=torch.int64)
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels, test_size=0.4, random_state=seed, stratify=labels
    )
    order = torch.Generator().manual_seed(seed)
    return Digits(
        train=DataLoader(
            TensorDataset(train_x, train_y), batch_size=64, shuffle=True, generator=order
        ),
        test=DataLoader(TensorDataset(test_x, test_y), batch_size=256),
        test_images=test_x,
        test_labels=test_y,
    )


def small_cnn() -> nn.Sequential:
    """Three convolutions, an average over positions, one linear layer.

    Returns:
        *nn.Sequential*; the layer ``"filters"`` puts out (N, 64, 4, 4) and feeds the head.
    """

    def block(in_channels: int, channels: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        )

    model = nn.Sequential()
    model.add_module("first", block(1, 32))
    model.add_module("second", block(32, 32))
    model.add_module("pool", nn.MaxPool2d(2))
    model.add_module("filters", block(32, NUM_FILTERS))
    model.add_module("average", nn.AdaptiveAvgPool2d(1))
    model.add_module("flatten", nn.Flatten())
    model.add_module("head", nn.Linear(NUM_FILTERS, 10))
    return model


def train_classifier(
    model: nn.Module, dataloader: DataLoader, epochs: int = 20, show_progress: bool = True
) -> nn.Module:
    """Train with Adam and a falling learning rate; the model ends in evaluation mode.

    Args:

        model (nn.Module): The model.
        dataloader (DataLoader): Batches of (images, labels).
        epochs (int): Number of epochs.
        show_progress (bool): Show a progress bar.

    Returns:
        *nn.Module*: The model itself.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    model.train()
    for _ in tqdm(range(epochs), desc="training", unit="epoch", disable=not show_progress):
        with read_batches(
            model, dataloader, "training", training=True, show_progress=False
        ) as batches:
            for batch in batches:
                optimizer.zero_grad()
                logits = model(*batch.inputs)
                labels = batches.class_labels(batch, logits.shape[1])
                F.cross_entropy(logits, labels).backward()
                optimizer.step()
        schedule.step()
    return model.eval()


def run_demo(
    output: str | os.PathLike[str],
    *,
    epochs: int = 20,
    seed: int = 0,
    show_progress: bool = True,
    write: Callable[[str], None] = print,
) -> JsonDict:
    r"""
    Train, identify, decompose, explain, compare, and draw.

    Args:

        output (path): Folder for tables, pictures and results; it is made if it is missing, and
                    files of an earlier demo in it are replaced.
        epochs (int): Epochs of training.
                    Default: 20
        seed (int): Of everything random.
                    Default: 0
        show_progress (bool): Show progress bars.
                    Default: True
        write (Callable): Where the report goes, line by line.
                    Default: print

    Returns:
        *dict*: All results, as in ``results.json``.

    Raises:
        ValueError: The folder cannot be made or written.
        ImportError: The extra ``demo`` is not installed.
    """
    for package in ("sklearn", "matplotlib"):
        extra(package, "The demo", of="demo")
    folder = _writable_folder(output)
    seconds: dict[str, float] = {}
    torch.manual_seed(seed)
    digits = load_digits(seed)
    with _timed(seconds, "training"):
        model = train_classifier(small_cnn(), digits.train, epochs, show_progress)
    with _timed(seconds, "identification, two methods in one pass"):
        tables = identify_class_filters(
            {
                "frequency": LayerFilterFrequency(model, "filters"),
                "contribution": LayerFilterContribution(model, "filters"),
            },
            digits.train,
            num_filters=5,
            show_progress=show_progress,
        )
    with _timed(seconds, "accuracy curve"):
        curve = accuracy_curve(
            model, tables, digits.test, num_filters=KEPT, seed=seed, show_progress=show_progress
        )
    with _timed(seconds, "refitting of five heads"):
        refitted = _refitted(model, tables["contribution"], digits, show_progress)
    with _timed(seconds, "metrics"):
        metrics = _metrics(model, tables["contribution"], digits, seed)
    with _timed(seconds, "pictures"):
        _draw(folder, model, tables, curve, digits)
    for name, table in tables.items():
        table.save(folder / f"{name}.safetensors", overwrite=True)
    results = {
        "test_accuracy": evaluate_classifier(model, digits.test, show_progress=False).accuracy,
        "accuracy_by_filters_kept": {
            "num_filters": curve.num_filters,
            **curve.accuracy,
            "random": curve.random_mean,
        },
        "refitted": refitted,
        "metrics": metrics,
        "seconds": seconds,
    }
    write_text(folder / "results.json", json.dumps(results, indent=2) + "\n")
    _report(results, folder, write)
    return results


def _writable_folder(output: str | os.PathLike[str]) -> Path:
    folder = Path(output)
    check_writable_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class _timed:  # noqa: N801 (used as a statement)
    """Notes how long a block takes."""

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self.seconds, self.name = seconds, name

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.name] = round(time.perf_counter() - self.started, 3)


def _refitted(
    model: nn.Module, table: ClassFilters, digits: Digits, show_progress: bool
) -> dict[str, float]:
    """Test accuracy of decomposed heads, refitted on the training images."""
    accuracies = {}
    sizes = tqdm((1, 2, 3, 5, 8), desc="refitting", unit="head", disable=not show_progress)
    for num_filters in sizes:
        decomposed = decompose(model, table.select(num_filters=num_filters))
        refit_head(decomposed, digits.train, show_progress=False)
        scores = evaluate_classifier(decomposed, digits.test, show_progress=False)
        accuracies[str(num_filters)] = scores.accuracy
    return accuracies


@infidelity_perturb_func_decorator(True)
def _drop_pixels(inputs: Tensor, _baselines: object = None) -> Tensor:
    return inputs * (torch.rand_like(inputs) > 0.2)


@infidelity_perturb_func_decorator(True)
def _drop_filters(gates: Tensor, _baselines: object = None) -> Tensor:
    return gates * (torch.rand_like(gates) > 0.5)


def _metrics(
    model: nn.Module, table: ClassFilters, digits: Digits, seed: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Infidelity, max-sensitivity and time; pixel space and gate space are never compared."""
    images, labels = digits.test_images[:50], digits.test_labels[:50]
    integrated = IntegratedGradients(model)
    saliency = ClassFilterSaliency(model, "filters", table)
    pixels = {
        "class filters, 50 steps": lambda x, **k: saliency.attribute(x, n_steps=50, **k),
        "class filters, one gradient": saliency.attribute,
        "Integrated Gradients, 50 steps": lambda x, **k: integrated.attribute(x, **k),
    }
    pixel_space = {}
    for name, explain in pixels.items():
        started = time.perf_counter()
        attributions = explain(images, target=labels).detach().float()
        elapsed = time.perf_counter() - started
        torch.manual_seed(seed)
        unfaithful = infidelity(
            model,
            _drop_pixels,
            images,
            attributions,
            target=labels,
            n_perturb_samples=20,
            normalize=True,
        )
        sensitive = sensitivity_max(explain, images, target=labels, n_perturb_samples=5)
        pixel_space[name] = {
            "infidelity": float(unfaithful.mean()),
            "max_sensitivity": float(sensitive.mean()),
            "seconds": elapsed,
        }
    return {"pixel space": pixel_space, "gate space": _gate_space(model, images, labels, seed)}


def _gate_space(
    model: nn.Module, images: Tensor, labels: Tensor, seed: int
) -> dict[str, dict[str, float]]:
    gate = FilterGate(model, "filters", NUM_FILTERS)
    gates = gate.ones(len(images))
    contribution = LayerFilterContribution(model, "filters")
    integrated = IntegratedGradients(gate)
    options = {"target": labels, "additional_forward_args": images}

    def random_scores() -> Tensor:
        torch.manual_seed(seed)
        return torch.randn_like(gates)

    methods = {
        "contribution, closed form": lambda: contribution.filter_scores(
            contribution.attribute(images, target=labels)
        ),
        "Integrated Gradients, 50 steps": lambda: integrated.attribute(gates, **options).float(),
        "random scores": random_scores,
    }
    results = {}
    for name, explain in methods.items():
        started = time.perf_counter()
        scores = explain().detach()
        elapsed = time.perf_counter() - started
        torch.manual_seed(seed)
        unfaithful = infidelity(gate, _drop_filters, gates, scores, n_perturb_samples=20, **options)
        results[name] = {"infidelity": float(unfaithful.mean()), "seconds": elapsed}
    return results


def _draw(
    folder: Path,
    model: nn.Module,
    tables: dict[str, ClassFilters],
    curve: AccuracyCurve,
    digits: Digits,
) -> None:
    for name, table in tables.items():
        figure, _ = plot_class_filters(table, title=f"{name}: digits and their filters")
        write_figure(folder / f"class_filters_{name}.png", figure)
    figure, _ = plot_accuracy_curve(curve, title="How many filters does a digit need?")
    write_figure(folder / "accuracy_curve.png", figure)
    shown = [int((digits.test_labels == digit).nonzero()[0]) for digit in (0, 3, 4, 7)]
    images, labels = digits.test_images[shown], digits.test_labels[shown]
    table = tables["contribution"]
    maps = ClassFilterSaliency(model, "filters", table, mode="activation_map")
    saliency = ClassFilterSaliency(model, "filters", table)
    figure, _ = plot_explanations(
        images,
        {
            "Integrated Gradients": IntegratedGradients(model).attribute(images, target=labels),
            "through class filters": saliency.attribute(images, target=labels, n_steps=50),
            "class filter maps": maps.attribute(images, target=labels),
        },
        titles=[f"a {digit}" for digit in labels.tolist()],
    )
    write_figure(folder / "explanations.png", figure)


def _report(results: JsonDict, folder: Path, write: Callable[[str], None]) -> None:
    curve = results["accuracy_by_filters_kept"]
    refitted = results["refitted"]
    write(f"\nTest accuracy with all {NUM_FILTERS} filters: {results['test_accuracy']:.3f}")
    names = ("frequency", "contribution", "random")
    rows = [
        {
            "kept": num_filters,
            **{name: curve[name][place] for name in names},
            "refitted": refitted.get(str(num_filters)),
        }
        for place, num_filters in enumerate(curve["num_filters"])
    ]
    write("\nDecomposed head, test accuracy by filters kept for each class:")
    write(text_table(rows))
    for space, methods in results["metrics"].items():
        rows = [
            {
                "method": name,
                "infidelity": values["infidelity"],
                "max-sensitivity": values.get("max_sensitivity", float("nan")),
                "ms": 1000 * values["seconds"],
            }
            for name, values in methods.items()
        ]
        write(f"\nIn {space} (lower is better; the two spaces are not comparable):")
        write(text_table(rows, {"infidelity": ".2e", "ms": ".1f"}))
    write(
        "\nTime: " + ", ".join(f"{name} {took:.1f} s" for name, took in results["seconds"].items())
    )
    write(f"\nPictures, tables and results.json are in {folder}")
