"""Attributions of pixels and of filters side by side, each space in a table of its own."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from captum_classfilters._core.arguments import arguments_checked, check_confidence
from captum_classfilters._core.distributed import is_main_process
from captum_classfilters._core.guard import model_left_as_found
from captum_classfilters._core.names import counted
from captum_classfilters._core.tables import Row, Table, Tabular, import_pandas, short_repr
from captum_classfilters.metrics.attribution_space import METRICS, Settings, Space, spaces_of
from captum_classfilters.metrics.explained import PIXELS, explained_methods
from captum_classfilters.metrics.inputs import at_model

if TYPE_CHECKING:
    import pandas

_TITLES = {
    "infidelity": "infidelity",
    "scale_invariant_infidelity": "scale-inv.",
    "max_sensitivity": "max-sens.",
    "deletion_area": "deletion",
    "insertion_area": "insertion",
    "pointing_game": "pointing",
    "box_overlap": "overlap",
}


@short_repr
@dataclass(frozen=True)
class AttributionTable(Tabular):
    r"""
    Methods of one space, measured on the same images with the same perturbations.

    Args:

        space (str): ``"pixels"`` or ``"filters of layer ..."``.
        values (dict): For each method, and each control, its metrics by name, Tensors (N,).
        seconds (dict): For each method a Tensor: seconds an image, batch by batch.
        peak_memory (dict): For each method the bytes that it allocates on a CUDA device at most, for
                    one batch; empty elsewhere.
        batch_size (int): Images in that batch.
    """

    space: str
    values: dict[str, dict[str, Tensor]]
    seconds: dict[str, Tensor]
    peak_memory: dict[str, int]
    batch_size: int

    @arguments_checked
    def interval(
        self, method: str, metric: str, confidence: float = 0.95
    ) -> tuple[float, float, float]:
        """Mean over images and its interval, by Student's t.

        Args:

            method (str): The row.
            metric (str): The column.
            confidence (float): Coverage, between 0 and 1.
                        Default: 0.95

        Returns:
            *tuple* of mean, lower and upper end; NaN ends for a single image.

        Raises:
            ValueError: ``confidence`` is out of range.
        """
        from scipy.stats import t

        check_confidence(confidence)
        values = self.values[method][metric]
        mean, size = float(values.mean()), len(values)
        if size < 2:
            return mean, float("nan"), float("nan")
        error = float(values.std()) / size**0.5
        reach = float(t.ppf((1 + confidence) / 2, size - 1)) * error
        return mean, mean - reach, mean + reach

    @arguments_checked
    def rows(self, confidence: float = 0.95) -> list[Row]:
        """The table, one row for each method and control: means, ``_low`` and ``_high`` ends,
        ``seconds_per_image`` (median of the batches) and, on a CUDA device, ``peak_mebibytes``.

        Args:

            confidence (float): Of the intervals.
                        Default: 0.95

        Returns:
            *list of dict*.
        """
        rows = []
        for method, metrics in self.values.items():
            row: Row = {"method": method}
            for metric in metrics:
                ends = self.interval(method, metric, confidence)
                row.update(zip((metric, f"{metric}_low", f"{metric}_high"), ends, strict=True))
            if method in self.seconds:
                row["seconds_per_image"] = float(self.seconds[method].median())
            if method in self.peak_memory:
                row["peak_mebibytes"] = self.peak_memory[method] / 2**20
            rows.append(row)
        return rows

    @arguments_checked
    def to_pandas(self, confidence: float = 0.95) -> "pandas.DataFrame":
        """:meth:`rows` as a data frame indexed by method.

        Args:

            confidence (float): Of the intervals.
                        Default: 0.95

        Returns:
            *pandas.DataFrame*.

        Raises:
            ImportError: pandas is not installed.
        """
        return import_pandas().DataFrame(self.rows(confidence)).set_index("method")

    def _tables(self) -> list[Table]:
        shown = [m for m in _TITLES if any(m in metrics for metrics in self.values.values())]
        rows = []
        for method, metrics in self.values.items():
            row: Row = {"": method}
            for metric in shown:
                row[_TITLES[metric]] = self._cell(method, metric) if metric in metrics else None
            seconds, memory = self.seconds.get(method), self.peak_memory.get(method)
            row["ms/image"] = None if seconds is None else 1000 * float(seconds.median())
            if self.peak_memory:
                row["peak MiB"] = None if memory is None else memory / 2**20
            rows.append(row)
        num_images = len(next(iter(next(iter(self.values.values())).values())))
        title = (
            f"{self.space}: {counted(num_images, 'image')}, mean ± half width of the 95% interval"
        )
        return [Table(rows, {"ms/image": ".2f", "peak MiB": ".1f"}, title)]

    def _cell(self, method: str, metric: str) -> str:
        mean, low, _ = self.interval(method, metric)
        if low != low:  # one image has no interval
            return f"{mean:.3g}"
        reach = mean - low
        return f"{mean:.3g} ± {reach:.0f}" if reach >= 10 else f"{mean:.3g} ± {reach:.1g}"


@short_repr
@dataclass(frozen=True)
class AttributionComparison(Tabular):
    r"""
    Tables of pixel methods and of filter methods, never ranked against each other.

    An infidelity over pixels and one over filters answer different questions, as do those over the
    filters of two layers: each space is a table of its own.

    Args:

        pixels (AttributionTable or None): Methods that score pixels.
        filters (dict): For each layer, by name, the methods that score its filters.
        images (Tensor): The first images, for the picture.
        targets (list of int): Their targets.
        maps (dict): For each pixel method its attributions of these images.
    """

    pixels: AttributionTable | None
    filters: dict[str, AttributionTable]
    images: Tensor
    targets: list[int]
    maps: dict[str, Tensor]

    def _tables(self) -> list[Table]:
        tables = ([self.pixels] if self.pixels is not None else []) + list(self.filters.values())
        return [table for part in tables for table in part._tables()]


@arguments_checked
def compare_attributions(
    model: nn.Module,
    methods: Mapping[str, object],
    inputs: Tensor,
    target: Tensor | Sequence[int] | int,
    *,
    boxes: Tensor | None = None,
    baseline: Tensor | float = 0.0,
    n_perturb_samples: int = 20,
    sensitivity_samples: int = 5,
    perturb_radius: float = 0.02,
    drop_probability: Mapping[str, float] | None = None,
    points: int = 10,
    batch_size: int = 50,
    pictures: int = 4,
    seed: int = 0,
    show_progress: bool = True,
) -> AttributionComparison:
    r"""
    Measure any attributions on the same model, images and targets.

    Pixel methods are Captum's input attributions, :class:`~captum_classfilters.ClassFilterSaliency`,
    and layer attributions with one map for all filters (Grad-CAM), which are interpolated to the
    image. Filter methods are layer attributions with a map for each filter, scored by its sum over
    positions, and Captum's input attributions of a :class:`~captum_classfilters.FilterGate`. Every
    layer has a table of its own.

    In both spaces the metrics are the same: infidelity of removing random sets of features, plain and
    scale-invariant; max-sensitivity to noise on the image; areas under deletion and insertion, in
    both directions; with boxes, the pointing game and overlap. All methods of a space share one set
    of perturbed forward passes, and random scores (for filters also the norm of their weights) stand
    in the table as controls: normal, independent of every method, in each image as large as the
    first method's (root mean square), which matters to plain infidelity alone. Time is that of the
    attribution alone, memory what it allocates on a CUDA device at most.

    Args:

        model (nn.Module): The model, with outputs (N, C), that every method explains.
        methods (mapping): By name: an attribution; a pair of one and further arguments of its
                    ``attribute``, the same for all images; or a function of inputs and ``target``.
        inputs (Tensor): Images (N, channels, H, W).
        target (Tensor, sequence of int or int): The class to explain in each image (N,), or in all.
        boxes (Tensor, optional): Shape (N, 4), x_min, y_min, x_max, y_max in pixels, edge to edge.
                    Default: None
        baseline (Tensor or float): What stands in for a removed pixel.
                    Default: 0.0
        n_perturb_samples (int): Sets of features for each image's infidelity.
                    Default: 20
        sensitivity_samples (int): Noisy copies of each image.
                    Default: 5
        perturb_radius (float): Of the noise, in units of the inputs.
                    Default: 0.02
        drop_probability (mapping, optional): Probability of a feature to be in a set, for
                    ``"pixels"`` and ``"filters"``; 0.2 and 0.5 by default.
        points (int): Steps of the deletion and insertion curves.
                    Default: 10
        batch_size (int): Images explained, or run, at once.
                    Default: 50
        pictures (int): Images to keep for the picture.
                    Default: 4
        seed (int): Seed of sets and noise; the global random state is left as found.
                    Default: 0
        show_progress (bool): Show a progress bar.
                    Default: True

    Returns:
        *AttributionComparison*.

    Raises:
        ValueError: There are no methods, one explains another model, shapes do not fit, a number is
                    out of range, or the model returns NaN or Inf.

    Examples::

        >>> import torch
        >>> from captum.attr import IntegratedGradients, Saliency
        >>> from captum_classfilters import LayerFilterContribution
        >>> from captum_classfilters.metrics import compare_attributions
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        ...     torch.nn.Flatten(), torch.nn.Linear(8, 2))
        >>> images, labels = torch.rand(6, 3, 6, 6), torch.tensor([0, 1, 1, 0, 1, 0])
        >>> methods = {
        ...     "Integrated Gradients": (IntegratedGradients(net), {"n_steps": 20}),
        ...     "Saliency": Saliency(net),
        ...     "contribution": LayerFilterContribution(net, net[1]),
        ... }
        >>> comparison = compare_attributions(net, methods, images, labels, show_progress=False)
        >>> list(comparison.pixels.values), list(comparison.filters)
        (['Integrated Gradients', 'Saliency', 'random'], ['1'])
    """
    explained = explained_methods(methods, model)
    target = torch.as_tensor(target)
    target = target.expand(len(inputs)) if target.dim() == 0 else target
    _check_shapes(inputs, target, boxes)
    if min(n_perturb_samples, sensitivity_samples, points, batch_size) < 1:
        raise ValueError("Numbers of samples, points and images in a batch must be at least 1.")
    settings = Settings(
        torch.as_tensor(baseline, dtype=inputs.dtype),
        n_perturb_samples,
        sensitivity_samples,
        perturb_radius,
        _probabilities(drop_probability),
        points,
        batch_size,
        seed,
    )
    with (
        model_left_as_found(model, evaluation=True),
        _numpy_state_left_as_found(),
        torch.inference_mode(False),
        torch.no_grad(),
    ):
        spaces: dict[str, Space] = {}
        parts = range(0, len(inputs), batch_size)
        quiet = not (show_progress and is_main_process())
        for start in tqdm(parts, desc="comparing", unit="batch", disable=quiet):
            part = slice(start, start + batch_size)
            (images,), _, own_target = at_model(model, inputs[part], None, target[part])
            spaces = spaces or spaces_of(model, explained, images, own_target, settings)
            for space in spaces.values():
                space.add(images, own_target, None if boxes is None else boxes[part])
    pixels = spaces.pop(PIXELS, None)
    maps = {} if pixels is None else {name: own[:pictures] for name, own in pixels.maps.items()}
    return AttributionComparison(
        None if pixels is None else _table(pixels),
        {name: _table(space) for name, space in spaces.items()},
        inputs[:pictures].detach().cpu(),
        target[:pictures].tolist(),
        maps,
    )


def _table(space: Space) -> AttributionTable:
    """Everything that was measured in a space, controls last."""
    return AttributionTable(
        PIXELS if space.layer is None else f"filters of layer {space.name!r}",
        {
            name: {
                metric: torch.cat(space.values[name][metric])
                for metric in METRICS
                if metric in space.values[name]
            }
            for name in space.names
        },
        {
            name: torch.tensor(seconds, dtype=torch.float64)
            for name, seconds in space.seconds.items()
        },
        dict(space.memory),
        space.settings.batch_size,
    )


def _check_shapes(inputs: Tensor, target: Tensor, boxes: Tensor | None) -> None:
    if inputs.dim() != 4 or target.shape != inputs.shape[:1] or len(inputs) == 0:
        raise ValueError(
            f"inputs {tuple(inputs.shape)} and target {tuple(target.shape)} do not fit; expected "
            "(N, channels, H, W) and (N,)."
        )
    if boxes is not None and boxes.shape != (len(inputs), 4):
        raise ValueError(f"boxes have shape {tuple(boxes.shape)}; expected ({len(inputs)}, 4).")


def _probabilities(drop_probability: Mapping[str, float] | None) -> dict[str, float]:
    probabilities = {PIXELS: 0.2, "filters": 0.5, **(drop_probability or {})}
    if len(probabilities) > 2 or not all(0 < share < 1 for share in probabilities.values()):
        raise ValueError(
            f"drop_probability={dict(drop_probability or {})}; expected numbers between 0 and 1 for "
            "'pixels' and 'filters'."
        )
    return probabilities


@contextmanager
def _numpy_state_left_as_found() -> Iterator[None]:
    """Some of Captum's methods, Gradient SHAP for example, draw from NumPy's global generator."""
    state = numpy.random.get_state()
    try:
        yield
    finally:
        numpy.random.set_state(state)
