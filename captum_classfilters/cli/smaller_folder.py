"""Smaller networks for the user's folder: the decomposed head, and a layer without its weakest filters."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from captum_classfilters._core.batches import first_batch
from captum_classfilters._core.files import write_figure, write_text
from captum_classfilters._core.tensor_files import Schema, write_tensors
from captum_classfilters.attr import LayerFilterContribution, LayerFilterFrequency
from captum_classfilters.class_filters import ClassFilters
from captum_classfilters.cli.folder_job import (
    FolderJob,
    OpenedFolder,
    open_folder,
    write_manifest,
    write_rows,
)
from captum_classfilters.heads import accuracy_curve, decompose
from captum_classfilters.heads.accuracy_curve import AccuracyCurve
from captum_classfilters.identify import identify_class_filters
from captum_classfilters.metrics import evaluate_classifier
from captum_classfilters.pruning import compare_networks, prune_filters
from captum_classfilters.pruning.compare_networks import NetworkComparison

_WEIGHTS = Schema("network", "captum_classfilters.Weights", 1, "a network's", "weights")
_TIMED = 5


def run_decompose(job: FolderJob, write: Callable[[str], None] = print) -> AccuracyCurve:
    r"""
    Give each class its own filters only, and measure what that costs on other images.

    Filters are found on every second image and measured on the rest. Written are accuracy against the
    number of filters as a picture and as CSV, the tables, and the weights of the network whose head
    keeps ``num_filters`` for each class; classes without images keep their bias alone.

    Args:

        job (FolderJob): What to do.
        write (Callable): Where the report goes.
                    Default: print

    Returns:
        *AccuracyCurve*.

    Raises:
        ValueError, OSError: With what was wrong, and what would be right.
    """
    from captum_classfilters.visualize import plot_accuracy_curve

    opened = open_folder(job, write=write)
    find, test = opened.halves()
    tables = identify_class_filters(
        {
            "frequency": LayerFilterFrequency(opened.model, opened.layer),
            "contribution": LayerFilterContribution(opened.model, opened.layer),
        },
        opened.loader(find),
        num_filters=job.num_filters,
        class_names=opened.class_names,
        show_progress=job.show_progress,
    )
    if not tables["contribution"].provenance.get("feeds_head"):
        raise ValueError(
            f"--layer {opened.layer} does not feed the head: its filters, or their means over positions, "
            f"are not the head's inputs. `captum-classfilters layers --model {job.model}` lists which "
            "layers do; `prune` takes others, too."
        )
    curve = accuracy_curve(
        opened.model, tables, opened.loader(test), show_progress=job.show_progress
    )
    small = decompose(opened.model, tables["contribution"], missing="bias")
    write(str(curve))
    figure, _ = plot_accuracy_curve(curve)
    write_figure(opened.output.place("accuracy_curve.png"), figure)
    rows = [
        {
            "num_filters": number,
            **{name: values[place] for name, values in curve.accuracy.items()},
            "random": curve.random_mean[place],
        }
        for place, number in enumerate(curve.num_filters)
    ]
    write_rows(opened.output.place("accuracy_curve.csv"), rows)
    for name, table in tables.items():
        table.save(opened.output.place(f"{name}.safetensors"), overwrite=True)
    _finish(opened, small, len(find) + len(test), write)
    return curve


def run_prune(
    job: FolderJob, share: float, write: Callable[[str], None] = print
) -> NetworkComparison:
    r"""
    Take the filters out of a layer that matter least to any class, and measure what that costs.

    A filter counts as much as it contributes to the class that it contributes most to, found on every
    second image. Accuracy is measured on the rest, before and after, without any training.

    Args:

        job (FolderJob): What to do.
        share (float): Share of the layer's filters to remove, between 0 and 1.
        write (Callable): Where the report goes.
                    Default: print

    Returns:
        *NetworkComparison*.

    Raises:
        ValueError, OSError: With what was wrong, and what would be right.
    """
    if not 0 < share < 1:
        raise ValueError(f"--share {share} must lie between 0 and 1.")
    opened = open_folder(job, write=write)
    find, test = opened.halves()
    table = identify_class_filters(
        LayerFilterContribution(opened.model, opened.layer),
        opened.loader(find),
        num_filters=job.num_filters,
        class_names=opened.class_names,
        show_progress=job.show_progress,
    )
    weakest = _weakest(table, share)
    images = first_batch(opened.model, opened.loader(test)).inputs[0]
    small = prune_filters(opened.model, opened.layer, images, remove=weakest)
    comparison = compare_networks(opened.model, small, images, repetitions=_TIMED)
    scores = {
        name: evaluate_classifier(
            network, opened.loader(test), show_progress=job.show_progress
        ).accuracy
        for name, network in {"before": opened.model, "after": small}.items()
    }
    write(str(comparison))
    write(
        f"\naccuracy on {len(test):,} other images: {scores['before']:.4f} before, {scores['after']:.4f} "
        f"after {len(weakest)} of {table.num_filters} filters of {opened.layer} were removed"
    )
    write_text(opened.output.place("networks.txt"), f"{comparison}\n")
    rows = [{"network": name, "accuracy": accuracy} for name, accuracy in scores.items()]
    write_rows(opened.output.place("accuracy.csv"), rows)
    write_rows(
        opened.output.place("removed.csv"),
        [{"filter": index} for index in sorted(weakest.tolist())],
    )
    table.save(opened.output.place("contribution.safetensors"), overwrite=True)
    _finish(opened, small, len(find) + len(test), write)
    return comparison


def _weakest(table: ClassFilters, share: float) -> Tensor:
    """The filters whose best score for any class is lowest."""
    best = table.scores.nan_to_num(nan=-torch.inf).amax(0)
    number = min(max(1, round(share * table.num_filters)), table.num_filters - 1)
    return best.sort(stable=True).indices[:number]


def _finish(
    opened: OpenedFolder, small: nn.Module, num_images: int, write: Callable[[str], None]
) -> None:
    """Write the smaller network's weights, and last of all the manifest."""
    details = {"model": opened.job.model, "layer": opened.layer}
    write_tensors(opened.output.place("weights.safetensors"), _WEIGHTS, small.state_dict(), details)
    write_manifest(opened.output, opened.job, num_images)
    write(f"\nWeights, tables and manifest.json are in {opened.output.path}")
