"""Attributions of pixels and of filters side by side, each space in a table of its own."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy
import torch
from captum.metrics import sensitivity_max
from scipy import stats
from torch import Tensor, nn
from tqdm.auto import tqdm

from captum_classfilters._core.guard import model_left_as_found
from captum_classfilters.attr import LayerFilterAblation
from captum_classfilters.attr.layer_filter_ablation import lost_scores, score_reader
from captum_classfilters.metrics.explained import PIXELS, Explained, PixelRemoval, explains
from captum_classfilters.metrics.filter_curves import both_ways
from captum_classfilters.metrics.filter_infidelity import _infidelity
from captum_classfilters.metrics.filter_sensitivity import explanation_for_sensitivity
from captum_classfilters.metrics.localization import localization
from captum_classfilters.metrics.removals import (
    MAGNITUDE,
    RANDOM,
    OrderedRemoval,
    area,
    curve_points,
    named_scores,
    order_of,
    reversed_name,
    weight_magnitudes,
)
from captum_classfilters.metrics.resources import peak_memory, seconds

if TYPE_CHECKING:
    import pandas

logger = logging.getLogger("captum_classfilters")

METRICS = {
    "infidelity": "squared error of predicting what removed features cost; lower is better",
    "scale_invariant_infidelity": "the same after the best factor for each image",
    "max_sensitivity": "largest relative change under noise; lower is better",
    "deletion_area": "area under the probability as the best features go; lower is better",
    "insertion_area": "area under the probability as they come; higher is better",
    "deletion_area_reversed": "the same, worst features first",
    "insertion_area_reversed": "the same, worst features first",
    "pointing_game": "whether the map's maximum lies in the box",
    "box_overlap": "overlap of the map's highest 30 per cent with the box",
}


@dataclass(frozen=True)
class AttributionTable:
    r"""
    Methods of one space, measured on the same images with the same perturbations.

    Args:

        space (str): ``"pixels"`` or ``"filters of layer ..."``.
        values (dict): For each method, and each control, its metrics by name, Tensors (N,).
        seconds (dict): For each method a Tensor: seconds an image, batch by batch.
        peak_memory (dict): For each method the bytes that its tensors hold at most, for one batch.
        batch_size (int): Images in that batch.
    """

    space: str
    values: dict[str, dict[str, Tensor]]
    seconds: dict[str, Tensor]
    peak_memory: dict[str, int]
    batch_size: int

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
        """
        values = self.values[method][metric]
        mean, number = float(values.mean()), len(values)
        if number < 2:
            return mean, float("nan"), float("nan")
        error = float(values.std()) / number**0.5
        reach = float(stats.t.ppf((1 + confidence) / 2, number - 1)) * error
        return mean, mean - reach, mean + reach

    def rows(self, confidence: float = 0.95) -> list[dict[str, Any]]:
        """The table, one row for each method and control: means, ``_low`` and ``_high`` ends,
        ``seconds_per_image`` (median of the batches) and ``peak_mebibytes``.

        Args:

            confidence (float): Of the intervals.
                        Default: 0.95

        Returns:
            *list of dict*.
        """
        rows = []
        for method, metrics in self.values.items():
            row: dict[str, Any] = {"method": method}
            for metric in metrics:
                ends = self.interval(method, metric, confidence)
                row.update(zip((metric, f"{metric}_low", f"{metric}_high"), ends, strict=True))
            if method in self.seconds:
                row["seconds_per_image"] = float(self.seconds[method].median())
                row["peak_mebibytes"] = self.peak_memory[method] / 2**20
            rows.append(row)
        return rows

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
        try:
            import pandas
        except ImportError as error:
            raise ImportError(
                "to_pandas needs pandas: pip install 'captum-classfilters[pandas]'."
            ) from error
        return pandas.DataFrame(self.rows(confidence)).set_index("method")

    def __str__(self) -> str:
        number = len(next(iter(next(iter(self.values.values())).values())))
        short = {
            "infidelity": "infidelity",
            "scale_invariant_infidelity": "scale-inv.",
            "max_sensitivity": "max-sens.",
            "deletion_area": "deletion",
            "insertion_area": "insertion",
            "pointing_game": "pointing",
            "box_overlap": "overlap",
        }
        shown = {m: s for m, s in short.items() if any(m in v for v in self.values.values())}
        rows = [["", *shown.values(), "ms/image", "peak MiB"]]
        for method, metrics in self.values.items():
            cells = [self._cell(method, metric) if metric in metrics else "" for metric in shown]
            rows.append([method, *cells, *self._cost(method)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [f"{self.space}: {number} images, mean ± half width of the 95% interval"]
        for name, *cells in rows:
            padded = (f"{cell:>{width}s}" for cell, width in zip(cells, widths[1:], strict=True))
            lines.append("  ".join([f"{name:{widths[0]}s}", *padded]).rstrip())
        return "\n".join(lines)

    def _cell(self, method: str, metric: str) -> str:
        mean, low, _ = self.interval(method, metric)
        if low != low:  # one image has no interval
            return f"{mean:.3g}"
        reach = mean - low
        return f"{mean:.3g} ± {reach:.0f}" if reach >= 10 else f"{mean:.3g} ± {reach:.1g}"

    def _cost(self, method: str) -> tuple[str, str]:
        if method not in self.seconds:
            return "", ""
        milliseconds = 1000 * float(self.seconds[method].median())
        return f"{milliseconds:.2f}", f"{self.peak_memory[method] / 2**20:.1f}"


@dataclass(frozen=True)
class AttributionComparison:
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

    def __str__(self) -> str:
        tables = ([self.pixels] if self.pixels is not None else []) + list(self.filters.values())
        return "\n\n".join(str(table) for table in tables)


def compare_attributions(
    model: nn.Module,
    methods: Mapping[str, Any],
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
    attribution alone, memory what its tensors hold at most.

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
        ValueError: There are no methods, one explains another model, shapes do not fit, or a number
                    is out of range.

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
    explained = _explained(methods, model)
    target = torch.as_tensor(target, device=inputs.device)
    target = target.expand(len(inputs)) if target.dim() == 0 else target
    _check_shapes(inputs, target, boxes)
    if min(n_perturb_samples, sensitivity_samples, points, batch_size) < 1:
        raise ValueError("Numbers of samples, points and images in a batch must be at least 1.")
    probabilities = {PIXELS: 0.2, "filters": 0.5, **(drop_probability or {})}
    if len(probabilities) > 2 or not all(0 < one < 1 for one in probabilities.values()):
        raise ValueError(
            f"drop_probability={dict(drop_probability or {})}; expected numbers between 0 and 1 for "
            "'pixels' and 'filters'."
        )
    settings = _Settings(
        torch.as_tensor(baseline, dtype=inputs.dtype, device=inputs.device),
        n_perturb_samples,
        sensitivity_samples,
        perturb_radius,
        probabilities,
        points,
        batch_size,
        seed,
    )
    with model_left_as_found(model, evaluation=True), _numpy_state_left_as_found():
        spaces = _spaces(model, explained, inputs, target, settings)
        starts = range(0, len(inputs), batch_size)
        for start in tqdm(starts, desc="comparing", unit="batch", disable=not show_progress):
            part = slice(start, start + batch_size)
            own_boxes = None if boxes is None else boxes[part]
            for space in spaces.values():
                space.add(inputs[part], target[part], own_boxes)
    pixels = spaces.pop(PIXELS, None)
    maps = {} if pixels is None else {name: one[:pictures] for name, one in pixels.maps.items()}
    return AttributionComparison(
        None if pixels is None else pixels.table(),
        {name: space.table() for name, space in spaces.items()},
        inputs[:pictures].detach().cpu(),
        target[:pictures].tolist(),
        maps,
    )


def _check_shapes(inputs: Tensor, target: Tensor, boxes: Tensor | None) -> None:
    if inputs.dim() != 4 or target.shape != inputs.shape[:1] or len(inputs) == 0:
        raise ValueError(
            f"inputs {tuple(inputs.shape)} and target {tuple(target.shape)} do not fit; expected "
            "(N, channels, H, W) and (N,)."
        )
    if boxes is not None and boxes.shape != (len(inputs), 4):
        raise ValueError(f"boxes have shape {tuple(boxes.shape)}; expected ({len(inputs)}, 4).")


@dataclass(frozen=True)
class _Settings:
    baseline: Tensor
    n_perturb_samples: int
    sensitivity_samples: int
    perturb_radius: float
    drop_probability: dict[str, float]
    points: int
    batch_size: int
    seed: int


@contextmanager
def _numpy_state_left_as_found() -> Iterator[None]:
    """Some of Captum's methods, Gradient SHAP say, draw from NumPy's global generator."""
    state = numpy.random.get_state()
    try:
        yield
    finally:
        numpy.random.set_state(state)


def _random_scores(like: Tensor, generator: torch.Generator) -> Tensor:
    """Normal scores of both signs, with the root mean square of each image's scores."""
    drawn = torch.randn(like.shape, generator=generator, dtype=like.dtype)
    return drawn * like.square().mean(1, keepdim=True).sqrt()


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    numpy.random.seed(seed)


def _explained(methods: Mapping[str, Any], model: nn.Module) -> list[Explained]:
    if not isinstance(methods, Mapping) or not methods:
        raise ValueError(
            f"methods is {'empty' if not methods else f'a {type(methods).__name__}'}; expected "
            'attributions by name, {"saliency": Saliency(model)} say.'
        )
    taken = {RANDOM, MAGNITUDE} & set(methods)
    if taken:
        raise ValueError(f"The name {taken.pop()!r} is the control's own; choose another one.")
    result = []
    for name, given in methods.items():
        method, options = given if isinstance(given, tuple) else (given, {})
        if isinstance(method, type):
            raise ValueError(f"{name!r} is a class; pass {method.__name__}(model).")
        if not callable(getattr(method, "attribute", method)):
            raise ValueError(f"{name!r} is a {type(method).__name__}; expected an attribution.")
        if explains(method, model) is False:
            raise ValueError(f"{name!r} explains another model than the one given.")
        result.append(Explained(name, method, dict(options)))
    return result


def _spaces(
    model: nn.Module,
    explained: list[Explained],
    inputs: Tensor,
    target: Tensor,
    settings: _Settings,
) -> "dict[str, _Space]":
    """The methods sorted by what they score."""
    spaces: dict[str, _Space] = {}
    for one in explained:
        name, layer = one.space(inputs[: settings.batch_size], target[: settings.batch_size])
        space = spaces.setdefault(name, _Space(model, name, layer, settings))
        space.methods.append(one)
    return spaces


@dataclass
class _Space:
    """What is measured of the methods that score the same features, batch after batch."""

    model: nn.Module
    name: str
    layer: nn.Module | None
    settings: _Settings
    methods: list[Explained] = field(default_factory=list)
    values: dict[str, dict[str, list[Tensor]]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    maps: dict[str, Tensor] = field(default_factory=dict)
    batches: int = 0

    def add(self, inputs: Tensor, target: Tensor, boxes: Tensor | None) -> None:
        """Measure one batch."""
        order, cost = {}, {}
        baseline = self.settings.baseline
        for one in self.methods:
            raw = self._timed(one, inputs, target)
            self._note(one.name, "max_sensitivity", self._sensitivity(one, inputs, target))
            if self.layer is not None:
                order[one.name] = cost[one.name] = raw
                continue
            self.maps.setdefault(one.name, raw.cpu())
            order[one.name] = raw.sum(1).flatten(1)
            cost[one.name] = one.pixel_contributions(raw, inputs, baseline)
            if boxes is not None:
                found = localization(raw.sum(1), boxes)
                self._note(one.name, "pointing_game", found.hit)
                self._note(one.name, "box_overlap", found.iou)
        with torch.no_grad():
            self._perturb(inputs, target, order, cost)
        self.batches += 1

    def table(self) -> AttributionTable:
        """Everything that was measured, controls last."""
        controls = [name for name in (RANDOM, MAGNITUDE) if name in self.values]
        names = [one.name for one in self.methods] + controls
        return AttributionTable(
            PIXELS if self.layer is None else f"filters of layer {self.name!r}",
            {
                name: {
                    metric: torch.cat(self.values[name][metric])
                    for metric in METRICS
                    if metric in self.values[name]
                }
                for name in names
            },
            {
                name: torch.tensor(parts, dtype=torch.float64)
                for name, parts in self.seconds.items()
            },
            dict(self.memory),
            self.settings.batch_size,
        )

    def _scores(self, one: Explained, inputs: Tensor, target: Tensor) -> Tensor:
        scored = one.pixels if self.layer is None else one.filters
        return scored(inputs, target)

    def _timed(self, one: Explained, inputs: Tensor, target: Tensor) -> Tensor:
        def run() -> Tensor:
            return self._scores(one, inputs, target)

        _seed(self.settings.seed)
        if one.name not in self.memory:  # which is also the warm-up
            self.memory[one.name] = peak_memory(run, inputs.device)
        took, result = seconds(run, inputs.device)
        self.seconds.setdefault(one.name, []).append(took / len(inputs))
        return result

    def _sensitivity(self, one: Explained, inputs: Tensor, target: Tensor) -> Tensor:
        def explain(given: Any, target: Tensor) -> Tensor:
            given = given[0] if isinstance(given, tuple) else given
            return self._scores(one, given, target)

        _seed(self.settings.seed)
        return sensitivity_max(
            explanation_for_sensitivity(explain),
            inputs,
            target=target,
            perturb_radius=self.settings.perturb_radius,
            n_perturb_samples=self.settings.sensitivity_samples,
            max_examples_per_batch=len(inputs) * max(1, self.settings.batch_size // len(inputs))
            if self.settings.sensitivity_samples * len(inputs) > self.settings.batch_size
            else None,
        )

    def _perturb(
        self, inputs: Tensor, target: Tensor, order: dict[str, Tensor], cost: dict[str, Tensor]
    ) -> None:
        """Infidelity and curves of all methods and controls from the same perturbed images."""
        settings, replay = self.settings, self._replay(inputs)
        shape = (replay.num_images, replay.num_filters)
        drawn = torch.Generator().manual_seed(settings.seed + self.batches)
        probability = settings.drop_probability[PIXELS if self.layer is None else "filters"]
        removed = torch.rand(settings.n_perturb_samples, *shape, generator=drawn) < probability
        random_order = torch.rand(shape, generator=drawn).argsort(1)
        lost = lost_scores(replay, removed, score_reader(replay.output, target, shape[0], "logit"))
        costs = named_scores(cost, shape)
        costs[RANDOM] = _random_scores(next(iter(costs.values())), drawn)
        for name, one in costs.items():
            plain, scaled = _infidelity(one, removed, lost)
            self._note(name, "infidelity", plain)
            self._note(name, "scale_invariant_infidelity", scaled)
        orders = {name: order_of(one) for name, one in named_scores(order, shape).items()}
        if self.layer is not None:
            orders.update(self._magnitude_order(shape))
        orders[RANDOM] = random_order

        read = score_reader(replay.output, target, shape[0], "probability")

        def value(outputs: Tensor) -> Tensor:
            return torch.stack([read(output) for output in outputs])

        numbers = curve_points(None, shape[1], settings.points)
        curves = both_ways(OrderedRemoval(replay, value, numbers), orders)
        shares = torch.tensor(numbers, dtype=torch.float64) / shape[1]
        for metric, found in zip(("deletion_area", "insertion_area"), curves, strict=True):
            for name in orders:
                self._note(name, metric, area(found[name], shares, 0))
                self._note(name, f"{metric}_reversed", area(found[reversed_name(name)], shares, 0))

    def _magnitude_order(self, shape: tuple[int, int]) -> dict[str, Tensor]:
        """The control by weights, where the layer's filters have any."""
        assert self.layer is not None
        norms = weight_magnitudes(self.model, self.layer, shape[1])
        if norms is not None:
            return {MAGNITUDE: order_of(norms).expand(shape)}
        if not self.batches:
            logger.warning(
                "The control %r is left out: no weight has the %d filters of the layer %r.",
                MAGNITUDE, shape[1], self.name,
            )  # fmt: skip
        return {}

    def _replay(self, inputs: Tensor) -> Any:
        if self.layer is None:
            return PixelRemoval(
                self.model, inputs, self.settings.baseline, 4 * self.settings.batch_size
            )
        channel_dim = getattr(self.methods[0].method, "channel_dim", None)
        ablation = LayerFilterAblation(self.model, self.layer, channel_dim=channel_dim)
        return ablation.replay(self.layer, (inputs,))

    def _note(self, name: str, metric: str, values: Tensor) -> None:
        found = self.values.setdefault(name, {}).setdefault(metric, [])
        found.append(values.detach().double().cpu())
