"""One table of measurements over many layers, from one pass over the data."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.tables import short_repr
from captum_classfilters._core.types import Dataloader, Unpack
from captum_classfilters.heads.sparsity import psi
from captum_classfilters.identify import unit_scores
from captum_classfilters.metrics.selectivity import class_means, class_selectivity_index

_NEGATIVE = "activations are negative; measure behind the ReLU"


@short_repr
@dataclass(frozen=True)
class LayerMeasurement:
    """What was measured at one layer.

    Args:

        layer (str): Its dotted name.
        num_filters (int): K.
        psi (float): Mean over classes of :func:`psi`; NaN where activations are negative.
        selectivity (float): Mean over filters of :func:`class_selectivity_index`; likewise.
        reason (str): Why there is no number; empty if there is.
    """

    layer: str
    num_filters: int
    psi: float
    selectivity: float
    reason: str = ""


@arguments_checked
def layer_sweep(
    model: nn.Module,
    layers: Sequence[str],
    dataloader: Dataloader,
    *,
    fraction: float = 0.5,
    statistic: Literal["median", "mean"] = "mean",
    unpack: Unpack | None = None,
    show_progress: bool = True,
) -> list[LayerMeasurement]:
    r"""
    Psi and class selectivity, layer by layer.

    Args:

        model (nn.Module): The model.
        layers (sequence of str): Dotted names of layers with activations after a ReLU.
        dataloader (iterable): Batches of (inputs, labels).
        fraction (float): Of :func:`psi`.
                    Default: 0.5
        statistic (str): Of :func:`psi`.
                    Default: "mean"
        unpack (Callable, optional): From a batch of another kind to the pair (inputs, labels).
                    Default: None
        show_progress (bool): Show a progress bar.
                    Default: True

    Returns:
        *list of LayerMeasurement*, in the order of the layers: ``layer``, ``num_filters``, ``psi``
        and ``selectivity``, both NaN where activations are negative; ``reason`` says so.

    Raises:
        ValueError: A layer is unknown or does not run exactly once, or the loader is empty.
    """
    features, labels = unit_scores(
        model, layers, dataloader, unpack=unpack, show_progress=show_progress
    )
    return [
        _measure(name, values, labels, fraction, statistic) for name, values in features.items()
    ]


def _measure(
    name: str,
    features: Tensor,
    labels: Tensor,
    fraction: float,
    statistic: Literal["median", "mean"],
) -> LayerMeasurement:
    num_filters = features.shape[1]
    if bool((features < 0).any()):
        return LayerMeasurement(name, num_filters, float("nan"), float("nan"), _NEGATIVE)
    selectivity = class_selectivity_index(class_means(features, labels)).mean()
    sparsity = psi(features, labels, fraction, statistic=statistic).nanmean()
    return LayerMeasurement(name, num_filters, float(sparsity), float(selectivity))
