"""What is measured of attributions that score the same features, batch after batch."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy
import torch
from captum.metrics import sensitivity_max
from torch import Tensor, nn

from captum_classfilters._core.ranking import descending, random_orders
from captum_classfilters._core.types import Replay
from captum_classfilters.attr import LayerFilterAblation
from captum_classfilters.attr.filter_removal import lost_scores, score_reader
from captum_classfilters.metrics.explained import PIXELS, Explained, PixelRemoval
from captum_classfilters.metrics.filter_infidelity import infidelity_of
from captum_classfilters.metrics.filter_sensitivity import (
    explanation_for_sensitivity,
    moved_a_little,
)
from captum_classfilters.metrics.localization import localization
from captum_classfilters.metrics.removals import (
    MAGNITUDE,
    RANDOM,
    OrderedRemoval,
    areas,
    check_finite,
    curve_points,
    each_in_words,
    kept_alone,
    named_scores,
    reversed_name,
    weight_magnitudes,
)

T = TypeVar("T")

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
class Settings:
    """What is the same for all spaces; see :func:`compare_attributions`."""

    baseline: Tensor
    n_perturb_samples: int
    sensitivity_samples: int
    perturb_radius: float
    drop_probability: dict[str, float]
    points: int
    batch_size: int
    seed: int


def spaces_of(
    model: nn.Module,
    explained: Sequence[Explained],
    images: Tensor,
    target: Tensor,
    settings: Settings,
) -> "dict[str, Space]":
    """The methods sorted by what they score."""
    spaces: dict[str, Space] = {}
    for method in explained:
        name, layer = method.space(images, target)
        space = spaces.setdefault(name, Space(model, name, layer, settings))
        space.methods.append(method)
    return spaces


@dataclass
class Space:
    """Methods that score pixels, or the filters of one layer, and what was measured so far."""

    model: nn.Module
    name: str
    layer: nn.Module | None
    settings: Settings
    methods: list[Explained] = field(default_factory=list)
    values: dict[str, dict[str, list[Tensor]]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    maps: dict[str, Tensor] = field(default_factory=dict)
    batches: int = 0

    @property
    def names(self) -> list[str]:
        """The methods' names, then those of the controls."""
        controls = [name for name in (RANDOM, MAGNITUDE) if name in self.values]
        return [method.name for method in self.methods] + controls

    def add(self, images: Tensor, target: Tensor, boxes: Tensor | None) -> None:
        """Measure one batch."""
        order, cost = {}, {}
        baseline = self.settings.baseline.to(images.device)
        for method in self.methods:
            raw = self._measured(method, images, target)
            self._note(method.name, "max_sensitivity", self._sensitivity(method, images, target))
            if self.layer is not None:
                order[method.name] = cost[method.name] = raw
                continue
            self.maps.setdefault(method.name, raw.cpu())
            order[method.name] = raw.sum(1).flatten(1)
            cost[method.name] = method.pixel_contributions(raw, images, baseline)
            if boxes is not None:
                found = localization(raw.sum(1), boxes)
                self._note(method.name, "pointing_game", found.hit)
                self._note(method.name, "box_overlap", found.iou)
        self._perturb(self._replay(images, baseline), target, order, cost)
        self.batches += 1

    def _scores(self, method: Explained, images: Tensor, target: Tensor) -> Tensor:
        scored = method.pixels if self.layer is None else method.filters
        return scored(images, target)

    def _measured(self, method: Explained, images: Tensor, target: Tensor) -> Tensor:
        """A method's scores; its time and memory are noted, after a first run to warm up."""

        def run() -> Tensor:
            _seed(self.settings.seed)
            return self._scores(method, images, target)

        if method.name not in self.seconds:
            run()
        scores, took, memory = measured(run, images.device)
        self.seconds.setdefault(method.name, []).append(took / len(images))
        if memory is not None:
            self.memory[method.name] = max(memory, self.memory.get(method.name, 0))
        return scores

    def _sensitivity(self, method: Explained, images: Tensor, target: Tensor) -> Tensor:
        def explain(inputs: Tensor | tuple[Tensor, ...], target: Tensor) -> Tensor:
            return self._scores(method, inputs[0] if isinstance(inputs, tuple) else inputs, target)

        samples, size = self.settings.sensitivity_samples, self.settings.batch_size
        at_once = len(images) * max(1, size // len(images))
        _seed(self.settings.seed)
        return sensitivity_max(
            explanation_for_sensitivity(explain),
            images,
            target=target,
            perturb_func=moved_a_little,
            perturb_radius=self.settings.perturb_radius,
            n_perturb_samples=samples,
            max_examples_per_batch=at_once if samples * len(images) > size else None,
        )

    def _perturb(
        self, replay: Replay, target: Tensor, order: dict[str, Tensor], cost: dict[str, Tensor]
    ) -> None:
        """Infidelity and curves of all methods and controls from the same perturbed images."""
        shape = (replay.num_images, replay.num_filters)
        drawn = torch.Generator().manual_seed(self.settings.seed + self.batches)
        probability = self.settings.drop_probability[PIXELS if self.layer is None else "filters"]
        sets = (self.settings.n_perturb_samples, *shape)
        removed = torch.rand(sets, generator=drawn) < probability
        orders = {name: descending(own) for name, own in named_scores(order, shape).items()}
        orders.update(self._magnitude_order(shape))
        orders[RANDOM] = random_orders(shape, 1, drawn)[0]
        costs = named_scores(cost, shape)
        costs[RANDOM] = _random_scores(next(iter(costs.values())), drawn)
        lost = lost_scores(replay, removed, score_reader(replay, target, "logit"))
        check_finite(lost, each_in_words(removed))
        for name, own in costs.items():
            self._note(name, "infidelity", infidelity_of(own, removed, lost))
            scaled = infidelity_of(own, removed, lost, scaled=True)
            self._note(name, "scale_invariant_infidelity", scaled)
        self._note_areas(replay, target, orders)

    def _note_areas(self, replay: Replay, target: Tensor, orders: dict[str, Tensor]) -> None:
        read = score_reader(replay, target, "probability")
        sizes = curve_points(None, replay.num_filters, self.settings.points)
        removal = OrderedRemoval(
            replay, lambda outputs: torch.stack([read(output) for output in outputs]), sizes
        )
        deletion = removal.both_ways(orders)
        curves = {"deletion_area": deletion, "insertion_area": kept_alone(deletion)}
        for metric, by_name in curves.items():
            found = areas({name: curve.cpu().double() for name, curve in by_name.items()}, sizes, 0)
            for name in orders:
                self._note(name, metric, found[name])
                self._note(name, f"{metric}_reversed", found[reversed_name(name)])

    def _magnitude_order(self, shape: tuple[int, int]) -> dict[str, Tensor]:
        """The control by weights, where there are filters and they have any."""
        if self.layer is None:
            return {}
        norms = weight_magnitudes(self.model, self.layer, shape[1])
        if norms is not None:
            return {MAGNITUDE: descending(norms).expand(shape)}
        if not self.batches:
            logger.warning(
                "The control %r is left out: no weight has the %d filters of the layer %r.",
                MAGNITUDE, shape[1], self.name,
            )  # fmt: skip
        return {}

    def _replay(self, images: Tensor, baseline: Tensor) -> Replay:
        if self.layer is None:
            return PixelRemoval(self.model, images, baseline, 4 * self.settings.batch_size)
        channel_dim = getattr(self.methods[0].method, "channel_dim", None)
        ablation = LayerFilterAblation(self.model, self.layer, channel_dim=channel_dim)
        return ablation.replay(self.layer, (images,))

    def _note(self, name: str, metric: str, values: Tensor) -> None:
        noted = self.values.setdefault(name, {}).setdefault(metric, [])
        noted.append(values.detach().cpu().double())


def measured(function: Callable[[], T], device: torch.device) -> tuple[T, float, int | None]:
    """A function's result, the seconds it takes and, on a CUDA device, the bytes that it allocates at
    most beyond those there before."""
    cuda = device.type == "cuda" and torch.cuda.is_available()
    before = 0
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    started = time.perf_counter()
    result = function()
    if cuda:
        torch.cuda.synchronize(device)
    took = time.perf_counter() - started
    return result, took, torch.cuda.max_memory_allocated(device) - before if cuda else None


def _random_scores(like: Tensor, generator: torch.Generator) -> Tensor:
    """Normal scores of both signs, with the root mean square of each image's scores."""
    drawn = torch.randn(like.shape, generator=generator, dtype=like.dtype)
    return drawn * like.square().mean(1, keepdim=True).sqrt()


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    numpy.random.seed(seed)
