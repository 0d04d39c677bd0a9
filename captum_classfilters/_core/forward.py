"""One forward pass over a batch for any number of layers, and derivatives of the scores there."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from captum_classfilters._core.captum import TargetType
from captum_classfilters._core.devices import without_autocast
from captum_classfilters._core.heads import (
    Feed,
    HeadRecord,
    alike,
    candidate_feed,
    in_another_row,
    record_head,
)
from captum_classfilters._core.layers import (
    check_numbers,
    layer_name,
    layer_tensors,
    module_of,
    no_gradient,
    only_tensor,
    positions_last,
    unwrapped,
    with_tensors,
)
from captum_classfilters._core.outputs import (
    as_rows,
    at_least_float32,
    class_scores,
    two_classes,
)
from captum_classfilters._core.taps import LayerTap, tapping
from captum_classfilters._core.targets import as_indices, class_indices, own_scores
from captum_classfilters._core.types import ForwardFunc, JsonDict, Keywords, ModelInputs


class MapsNeededError(RuntimeError):
    """Whole maps were asked for where only means were kept; run the batch again with them."""


@dataclass(frozen=True)
class Layout:
    """Where a layer's tensor has its filters.

    Args:

        axis (int): The axis of the filters.
        shape (tuple of int): Its shape.
        dtype (torch.dtype): Its type.
    """

    axis: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def num_positions(self) -> int:
        """P, positions of one filter for one image."""
        return self.shape[1:].numel() // max(1, self.shape[self.axis])

    def restored(self, maps: Tensor) -> Tensor:
        """Maps (N, K', P) in the layer's own layout and type, K' filters in place of its own."""
        positions = (*self.shape[1 : self.axis], *self.shape[self.axis + 1 :])
        own = maps.to(self.dtype).reshape(*maps.shape[:2], *positions)
        return own.movedim(1, self.axis)


@dataclass
class _Part:
    """One tensor of a layer on one device."""

    layout: Layout
    means: Tensor  # (N, K)
    maps: Tensor | None  # (N, K, P)
    leaf: Tensor | None = None  # differentiable, in the layer's own layout

    def whole(self) -> Tensor | None:
        """The maps, those of the differentiable tensor if no others were kept."""
        if self.maps is None and self.leaf is not None:
            return positions_last(self.leaf.detach(), self.layout.axis)
        return self.maps


class _Reading(LayerTap):
    """Keeps what a layer put out: means, whole maps if they are needed, what gradients need."""

    several = False  # allow layers of several tensors
    scale = 1.0  # what the layer's tensors are multiplied by first
    derivative = False  # derivatives at this layer are asked for
    by_weights = False  # and are the weights of the head
    feed: Feed | None = None
    keep_maps = maps_used = False
    differentiable = False

    def begin(self) -> None:
        """Forget the last forward pass."""
        super().begin()
        self.shares: list[list[_Part]] = []  # of each device, its tensors

    def take(self, value: Any) -> Any:
        """Read the layer's tensors; where gradients start at them, let copies go on."""
        tensors = self._tensors(value)
        if self.differentiable:
            self.check_recorded()
        if self.scale != 1:
            # A scale of zero removes even what is not finite.
            tensors = [t * self.scale if self.scale else torch.zeros_like(t) for t in tensors]
        parts = [self._read(tensor) for tensor in tensors]
        if not self.frozen:
            self.count(tensors[0])
            self.shares.append(parts)
        if self.differentiable:  # what follows may write into the tensor
            tensors = [part.leaf.clone() for part in parts if part.leaf is not None]
        elif self.scale == 1:
            return None
        return with_tensors(value, tensors)

    def _tensors(self, value: Any) -> list[Tensor]:
        tensors = layer_tensors(value)
        return tensors if self.several and tensors else [only_tensor(value, self.name)]

    def _read(self, tensor: Tensor) -> _Part:
        check_numbers(self.name, tensor)
        leaf = None
        if self.differentiable:
            leaf = tensor if tensor.requires_grad else tensor.detach().requires_grad_()
        layout = Layout(self.axis_of(tensor), tensor.shape, tensor.dtype)
        maps = positions_last(tensor.detach(), layout.axis)
        means = maps.mean(2, dtype=torch.promote_types(maps.dtype, torch.float32))
        # In-place successors overwrite a layer's output, so whole maps are copies.
        return _Part(layout, means, maps.clone() if self.keep_maps and leaf is None else None, leaf)


class FilterMaps:
    r"""
    What one layer put out for a batch, as maps of its filters: what a method's rule is written on.

    Args:

        means (Tensor): Shape (N, K), the mean activation of each filter.
        num_positions (int): P, positions of a filter's map.
        maps (Callable): Returns the maps (N, K, P).
        derivative (Callable): From a target to the derivative (N, K, P) or (N, K, 1) of its score.
        name (str): The layer's name.
        at_input (bool): They are maps of the layer's input.
    """

    def __init__(
        self,
        means: Tensor,
        num_positions: int,
        maps: Callable[[], Tensor],
        derivative: Callable[[TargetType], Tensor],
        name: str,
        at_input: bool = False,
    ) -> None:
        self.means, self.num_positions, self.name = means, num_positions, name
        self.at_input = at_input
        self._maps, self._derivative = maps, derivative

    @property
    def num_filters(self) -> int:
        """K."""
        return self.means.shape[1]

    @property
    def maps(self) -> Tensor:
        """The maps (N, K, P)."""
        return self._maps()

    def derivative(self, target: TargetType) -> Tensor:
        """The derivative of each image's own score with respect to the layer, (N, K, P); (N, K, 1)
        where it is the same at all positions."""
        return self._derivative(target)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """The sum (N, K) over positions of activations times weights (N, K, P) or (N, K, 1)."""
        weights = at_least_float32(weights)  # half precision may not hold the sums
        if weights.shape[2] == 1:
            return self.means * (weights[:, :, 0] * self.num_positions)
        return (self.maps * weights).sum(2)

    def projected(self, matrix: Tensor, offset: Tensor) -> "FilterMaps":
        """The maps of r directions, columns of a matrix (K, r), from their offset (r,)."""
        matrix, offset = matrix.to(self.means), offset.to(self.means)

        def project(maps: Tensor) -> Tensor:
            with without_autocast(matrix.device):
                return torch.einsum("nkp,kr->nrp", maps.to(matrix.dtype), matrix)

        return FilterMaps(
            project(self.means[:, :, None])[:, :, 0] - offset,
            self.num_positions,
            lambda: project(self.maps) - offset[:, None],
            lambda target: project(self.derivative(target)),
            self.name,
            self.at_input,
        )


@dataclass
class BatchReading:
    """What one forward pass showed.

    Args:

        output: What the model returned.
        layers (list): For each layer its tensors, as :class:`FilterMaps`.
        layouts (list): For each layer and tensor its :class:`Layout`.
        holds (list of Tensor): What must be true of this batch for derivatives that are read off
                    the head's weights, as bools of no axes on the device.
        earlier: What the model returned in a run before this one, if the batch needed two.
    """

    output: object
    layers: list[list[FilterMaps]]
    layouts: list[list["Layout"]]
    holds: list[Tensor]
    earlier: object = None


@dataclass
class Glimpse:
    """What one forward pass showed where means are enough, kept until several are looked at together.

    Args:

        means (list of Tensor): Mean activations (N, K) of each layer.
        layouts (list of Layout): Of each layer.
        features (Tensor or None): The head's input, where derivatives are the head's weights.
        logits (Tensor or None): The head's output.
    """

    means: list[Tensor]
    layouts: list["Layout"]
    features: Tensor | None
    logits: Tensor | None

    def fits(self, other: "Glimpse") -> bool:
        """Whether two batches can be looked at as one: rules may depend on how many positions a
        filter has, and images of another size have another number."""
        return all(
            (own.axis, own.num_positions, own.dtype) == (its.axis, its.num_positions, its.dtype)
            for own, its in zip(self.layouts, other.layouts, strict=True)
        )


@dataclass(frozen=True)
class LayerRequest:
    """A layer to read.

    Args:

        module (nn.Module): The layer.
        channel_dim (int, optional): Axis of its filters, where it cannot be told.
        derivative (bool): Derivatives of scores will be asked for.
    """

    module: nn.Module
    channel_dim: int | None = None
    derivative: bool = False


class SharedForward:
    r"""
    Runs a model on batch after batch and reads several layers in each run.

    Maps are reduced to means inside the hooks; whole maps are kept for the first batch, and later if
    they were asked for then. Where the model's output is the tensor of a linear layer fed by a
    layer, derivatives there are that layer's weights; it is checked on the numbers of every batch.
    The first batch that breaks it, and all that follow, run with gradients.

    Args:

        forward_func (Callable): The model.
        requests (sequence of LayerRequest): Layers to read.
        at_input (bool): Read the layers' inputs.
                    Default: False
        several (bool): Allow layers of several tensors.
                    Default: False
        device_ids (sequence of int, optional): Devices of a hidden data-parallel model.
                    Default: None
        grad_kwargs (mapping, optional): Passed on to ``torch.autograd.grad``.
                    Default: None
        scale (float): Multiply the layers' tensors by this number first.
                    Default: 1
    """

    def __init__(
        self,
        forward_func: ForwardFunc,
        requests: Sequence[LayerRequest],
        at_input: bool = False,
        several: bool = False,
        device_ids: Sequence[int] | None = None,
        grad_kwargs: Keywords | None = None,
        scale: float = 1.0,
    ) -> None:
        self.forward_func = forward_func
        self.grad_kwargs = dict(grad_kwargs or {})
        self.model = module_of(forward_func, [request.module for request in requests])
        devices = device_ids or getattr(forward_func, "device_ids", None) or []
        self.head_name: str | None = None
        self._head_module: nn.Module | None = None
        self._feeds_known = False
        self.in_order = True  # each of the head's outputs is the score of its own class
        self._order_open = False
        self._taps = []
        for request in requests:
            tap = _Reading(self.model, request.module, request.channel_dim, at_input)
            tap.several, tap.scale, tap.derivative = several, scale, request.derivative
            tap.by_weights = request.derivative and self.model is not None and len(devices) < 2
            self._taps.append(tap)

    def feed(self, index: int) -> Feed | None:
        """How a layer feeds the last linear layer, known after the first batch."""
        return self._taps[index].feed

    def exact(self, index: int) -> bool:
        """Whether derivatives at a layer were the head's weights, on every batch so far."""
        return self._taps[index].by_weights

    def use_gradients(self) -> None:
        """Give up the weights of the head: a batch was not as they say."""
        for tap in self._taps:
            tap.by_weights = False

    def keep_maps(self) -> None:
        """Keep whole maps of every layer from now on."""
        for tap in self._taps:
            tap.maps_used = True

    def learned(self) -> JsonDict:
        """What the batches so far have shown, for a run that goes on where this one stops."""
        layers = [[tap.feed, tap.by_weights, tap.maps_used] for tap in self._taps]
        return {
            "head": self.head_name,
            "known": self._feeds_known,
            "in_order": self.in_order,
            "layers": layers,
        }

    def recall(self, learned: JsonDict) -> None:
        """Go on from what an earlier run has learned."""
        self.head_name, self._feeds_known = learned["head"], learned["known"]
        self.in_order = learned.get("in_order", True)  # not in files of earlier versions
        if self.head_name is not None and self.model is not None:
            self._head_module = unwrapped(self.model).get_submodule(self.head_name)
        for tap, (feed, by_weights, maps_used) in zip(self._taps, learned["layers"], strict=True):
            tap.feed, tap.by_weights, tap.maps_used = feed, by_weights, maps_used

    @contextmanager
    def run(self, inputs: ModelInputs, num_images: int) -> Iterator[BatchReading]:
        """Run the model on a batch; derivatives can be asked for until the block ends."""
        earlier: object = None
        if not self._needs_gradients:
            with self._watched(differentiable=False) as head:
                earlier, reading = self._read(inputs, num_images, head, False)
                if reading is not None:
                    yield reading
                    return
        with self._watched(differentiable=True) as head:
            _, reading = self._read(inputs, num_images, head, True)
            assert reading is not None
            reading.earlier = earlier
            yield reading

    def see_order(self, inputs: ModelInputs, output: object) -> None:
        """After the first batch, see whether the head's outputs are in the order of the scores; the
        model runs again where it returned something else than the head's own tensor."""
        if not self._order_open:
            return
        self._order_open = False
        head = self._head_module
        assert head is not None
        scores = as_rows(class_scores(output)).detach()
        number, classes = len(head.weight), scores.shape[1]  # type: ignore[arg-type]
        if number == 1 and classes <= 2:
            return
        axis = -1 if isinstance(head, nn.Linear) else 1
        with torch.no_grad():
            self.in_order = (
                number == classes
                and in_another_row(self.forward_func, head, axis, inputs, scores) is None
            )

    @property
    def means_are_enough(self) -> bool:
        """Whether batches can be glimpsed at: known after the first one that was run."""
        return (
            self._feeds_known
            and not self._needs_gradients
            and not any(
                tap.maps_used or (tap.by_weights and tap.feed == "flatten") for tap in self._taps
            )
        )

    def glimpse(self, inputs: ModelInputs, num_images: int) -> Glimpse | None:
        """Run the model for means alone; None if the batch needs a closer look: :meth:`run`."""
        with self._watched(differentiable=False) as head:
            output = self.forward_func(*inputs)
            for tap in self._taps:
                tap.check(num_images)
            if any(len(tap.shares) != 1 or len(tap.shares[0]) != 1 for tap in self._taps):
                return None
            parts = [tap.shares[0][0] for tap in self._taps]
            features = logits = None
            if any(tap.by_weights for tap in self._taps):
                if not head.is_output(class_scores(output)):
                    return None
                features, logits = head.features, head.logits
            return Glimpse(
                [part.means for part in parts], [part.layout for part in parts], features, logits
            )

    def together(self, glimpses: Sequence[Glimpse]) -> BatchReading:
        """Several batches that fit as one."""
        means = [torch.cat(parts) for parts in zip(*(g.means for g in glimpses), strict=True)]
        weight, holds = None, []
        if glimpses[0].features is not None:
            features = torch.cat([g.features for g in glimpses if g.features is not None]).detach()
            logits = torch.cat([g.logits for g in glimpses if g.logits is not None])
            head = HeadRecord(self._head_module, features, logits)
            weight = two_classes(head.weight.T).T
            holds = [head.computes_its_weight()] + [
                alike(own, features)
                for tap, own in zip(self._taps, means, strict=True)
                if tap.by_weights
            ]
        batch = _BatchOfScores(None, len(means[0]), self._taps, weight, self.grad_kwargs)
        layers = [
            [_means_alone(tap, own, layout, batch)]
            for tap, own, layout in zip(self._taps, means, glimpses[0].layouts, strict=True)
        ]
        return BatchReading(None, layers, [[layout] for layout in glimpses[0].layouts], holds)

    @property
    def _needs_gradients(self) -> bool:
        return any(tap.derivative and not tap.by_weights for tap in self._taps)

    @contextmanager
    def _watched(self, differentiable: bool) -> Iterator[HeadRecord]:
        """Hooks on the layers, and on linear layers while the head matters."""
        by_weights = any(tap.by_weights for tap in self._taps)
        head_matters = by_weights or not self._feeds_known
        known = self._head_module if by_weights else None
        for tap in self._taps:
            tap.differentiable, tap.frozen = differentiable, False
            tap.keep_maps = tap.maps_used or not self._feeds_known
        try:
            with (
                torch.set_grad_enabled(differentiable),
                tapping(self._taps),
                record_head(self.model if head_matters else None, known) as head,
            ):
                yield head
        finally:
            for tap in self._taps:
                tap.begin()

    def _read(
        self, inputs: ModelInputs, num_images: int, head: HeadRecord, differentiable: bool
    ) -> tuple[object, BatchReading | None]:
        """One run: what the model returned, and how it was read; None if it turns out that gradients
        are needed and were not recorded."""
        output = self.forward_func(*inputs)
        head.settle(output)
        for tap in self._taps:
            tap.check(num_images)
            tap.frozen = True
        weighted = any(tap.by_weights for tap in self._taps)
        candidates: list[tuple[Feed, Tensor] | None] = [None] * len(self._taps)
        if weighted or not self._feeds_known:
            candidates = [_candidate(tap, head) for tap in self._taps]
        if not self._feeds_known:
            for tap, candidate in zip(self._taps, candidates, strict=True):
                tap.feed = candidate[0] if candidate and bool(candidate[1]) else None
            self.head_name = layer_name(self.model, head.module) if head.module else None
            self._head_module = head.module
            self._feeds_known = True
            with suppress(ValueError):  # scores that the model hides do not tell
                fed = head.module is not None and any(tap.feed for tap in self._taps)
                self._order_open = fed and not head.is_output(class_scores(output))
        holds = self._holds(output, candidates, head) if weighted else []
        if self._needs_gradients and not differentiable:
            return output, None
        weight = two_classes(head.weight.T).T if holds else None
        batch = _BatchOfScores(output, num_images, self._taps, weight, self.grad_kwargs)
        layers = [
            [_filter_maps(tap, place, batch) for place in range(len(tap.shares[0]))]
            for tap in self._taps
        ]
        layouts = [[part.layout for part in tap.shares[0]] for tap in self._taps]
        return output, BatchReading(output, layers, layouts, holds)

    def _holds(
        self, output: object, candidates: Sequence[tuple[Feed, Tensor] | None], head: HeadRecord
    ) -> list[Tensor]:
        """What must hold for the layers whose derivatives are weights; layers for which it is seen
        at once that they are not leave their ranks."""
        ends = head.is_output(class_scores(output))
        linear = head.computes_its_weight() if ends else None
        holds = []
        for tap, candidate in zip(self._taps, candidates, strict=True):
            if not tap.by_weights:
                continue
            if linear is None or candidate is None or candidate[0] != tap.feed:
                tap.by_weights = False
                continue
            right = linear & candidate[1]
            if right.device.type == "cpu" and not bool(right):
                tap.by_weights = False
                continue
            holds.append(right)
        return holds


def _candidate(tap: _Reading, head: HeadRecord) -> tuple[Feed, Tensor] | None:
    """How a layer may feed the head, from whole maps if they are there, else from means."""
    if head.features is None or len(tap.shares) != 1 or len(tap.shares[0]) != 1:
        return None
    part = tap.shares[0][0]
    features = head.features.detach()
    maps = part.whole()
    if maps is not None:
        return candidate_feed(features.flatten(2) if features.dim() > 2 else features, maps, 1)
    if features.shape == part.means.shape:
        single = part.layout.num_positions == 1
        return "identical" if single else "mean", alike(part.means, features)
    return None


class _BatchOfScores:
    """A batch's scores, and their derivatives at the layers: weights of the head, or gradients."""

    def __init__(
        self,
        output: object,
        num_images: int,
        taps: Sequence[_Reading],
        weight: Tensor | None,
        grad_kwargs: Keywords,
    ) -> None:
        self.output, self.num_images = output, num_images
        self.taps, self.weight = taps, weight
        self.grad_kwargs = {"retain_graph": True, "allow_unused": True, **grad_kwargs}
        self._last: tuple[TargetType, dict[int, Tensor]] | None = None

    def weights(self, feed: Feed | None, positions: int, target: TargetType) -> Tensor:
        """Derivatives of the targets' scores at a layer that feeds the head."""
        assert self.weight is not None
        classes = as_indices(target)
        if classes is None or classes.device != self.weight.device:
            if target is None and class_scores(self.output).numel() == self.num_images:
                target = 1  # the one logit itself
            indices = class_indices(len(self.weight), target, self.num_images)
            classes = indices.to(self.weight.device)
        rows = self.weight[classes]
        if feed == "flatten":
            return rows.reshape(self.num_images, -1, positions)
        return (rows / positions)[:, :, None]

    def gradients(self, target: TargetType) -> dict[int, Tensor]:
        """Gradients at every differentiable tensor of all layers, from one backward pass."""
        if self._last is not None and self._last[0] is target:
            return self._last[1]
        parts = {
            id(part): part.leaf
            for tap in self.taps
            for share in tap.shares
            for part in share
            if part.leaf is not None
        }
        own = own_scores(class_scores(self.output), target, self.num_images).sum()
        gradients: Sequence[Tensor | None] = [None] * len(parts)
        if own.requires_grad:
            gradients = torch.autograd.grad(own, [*parts.values()], **self.grad_kwargs)
        by_part = {
            key: gradient
            for key, gradient in zip(parts, gradients, strict=True)
            if gradient is not None
        }
        self._last = (target, by_part)
        return by_part


def _filter_maps(tap: _Reading, place: int, batch: _BatchOfScores) -> FilterMaps:
    """One tensor of a layer, the shares of several devices joined on the first."""
    shares = [share[place] for share in tap.shares]
    axis, positions = shares[0].layout.axis, shares[0].layout.num_positions
    name, feed, by_weights = tap.name, tap.feed, tap.by_weights

    def maps() -> Tensor:
        tap.maps_used = True
        whole = [part.whole() for part in shares]
        if any(share is None for share in whole):
            raise MapsNeededError(name)
        return _joined([share for share in whole if share is not None])

    def derivative(target: TargetType) -> Tensor:
        if by_weights:
            return batch.weights(feed, positions, target)
        gradients = batch.gradients(target)
        if not any(id(part) in gradients for share in tap.shares for part in share):
            raise no_gradient(name)
        # One of several tensors may be unused: the output does not change with it.
        return _joined([positions_last(_gradient(part, gradients), axis) for part in shares])

    means = _joined([part.means for part in shares])
    return FilterMaps(means, positions, maps, derivative, name, tap.at_input)


def _gradient(part: _Part, gradients: dict[int, Tensor]) -> Tensor:
    assert part.leaf is not None
    return gradients[id(part)] if id(part) in gradients else torch.zeros_like(part.leaf)


def _means_alone(tap: _Reading, means: Tensor, layout: Layout, batch: _BatchOfScores) -> FilterMaps:
    """A layer of which only means were kept."""
    positions, feed, by_weights, name = layout.num_positions, tap.feed, tap.by_weights, tap.name

    def maps() -> Tensor:
        raise MapsNeededError(name)

    def derivative(target: TargetType) -> Tensor:
        if not by_weights:
            raise MapsNeededError(name)
        return batch.weights(feed, positions, target)

    return FilterMaps(means, positions, maps, derivative, name, tap.at_input)


def _joined(shares: Sequence[Tensor]) -> Tensor:
    """The shares of several devices as one batch."""
    if len(shares) == 1:
        return shares[0]
    return torch.cat([share.to(shares[0].device) for share in shares])
