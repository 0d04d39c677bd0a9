"""One table of measurements over many layers, from one pass over the data."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from captum_classfilters._core.guard import model_left_as_found
from captum_classfilters._core.layers import check_runs, filter_axis, find_layer, positions_last
from captum_classfilters.heads.sparsity import psi
from captum_classfilters.metrics.selectivity import class_means, class_selectivity_index


@dataclass(frozen=True)
class LayerMeasurement:
    """What was measured at one layer.

    Args:

        layer (str): Its dotted name.
        num_filters (int): K.
        psi (float): Mean over classes of :func:`psi`; NaN where activations are negative.
        selectivity (float): Mean over filters of :func:`class_selectivity_index`; likewise.
    """

    layer: str
    num_filters: int
    psi: float
    selectivity: float


def layer_sweep(
    model: nn.Module,
    layers: Sequence[str],
    dataloader: Iterable[Any],
    *,
    fraction: float = 0.5,
    statistic: Any = "mean",
    show_progress: bool = True,
) -> list[LayerMeasurement]:
    r"""
    Psi and class selectivity, layer by layer.

    Args:

        model (nn.Module): The model.
        layers (sequence of str): Dotted names of layers with activations after a ReLU.
        dataloader (iterable): Batches of (images, labels).
        fraction (float): Of :func:`psi`.
                    Default: 0.5
        statistic (str): Of :func:`psi`.
                    Default: "mean"
        show_progress (bool): Show a progress bar.
                    Default: True

    Returns:
        *list of LayerMeasurement*, in the order of the layers.

    Raises:
        ValueError: A layer is unknown or does not run exactly once, or the loader is empty.
    """
    modules = {name: find_layer(model, name) for name in layers}
    batch: dict[str, list[Tensor]] = {name: [] for name in layers}
    kept: dict[str, list[Tensor]] = {name: [] for name in layers}
    labels: list[Tensor] = []

    def hook_of(name: str) -> Any:
        def hook(module: nn.Module, _inputs: Any, output: Tensor) -> None:
            batch[name].append(positions_last(output, filter_axis(module, output)).mean(2))

        return hook

    handles = [module.register_forward_hook(hook_of(name)) for name, module in modules.items()]
    device = next((one.device for one in model.parameters()), torch.device("cpu"))
    bar = tqdm(dataloader, desc="layers", unit="batch", disable=not show_progress)
    try:
        with model_left_as_found(model, evaluation=True), torch.no_grad():
            for images, targets in bar:
                model(images.to(device))
                labels.append(targets.cpu())
                for name, means in batch.items():
                    check_runs(name, len(means))
                    kept[name].append(means.pop().cpu())
    finally:
        for handle in handles:
            handle.remove()
    if not labels:
        raise ValueError("The data loader is empty.")
    return [
        _measure(name, torch.cat(kept[name]), torch.cat(labels), fraction, statistic)
        for name in layers
    ]


def _measure(
    name: str, features: Tensor, labels: Tensor, fraction: float, statistic: Any
) -> LayerMeasurement:
    number = features.shape[1]
    if bool((features < 0).any()):
        return LayerMeasurement(name, number, float("nan"), float("nan"))
    selectivity = class_selectivity_index(class_means(features, labels)).mean()
    sparsity = psi(features, labels, fraction, statistic=statistic).nanmean()
    return LayerMeasurement(name, number, float(sparsity), float(selectivity))
