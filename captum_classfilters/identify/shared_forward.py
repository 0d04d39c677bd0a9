"""One forward pass over a batch for all of this package's methods on a model."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from captum_classfilters._core.heads import Feed, HeadRecord, how_layer_feeds, record_head
from captum_classfilters._core.layers import (
    check_batch,
    check_runs,
    filter_axis,
    layer_name,
    module_of,
    only_tensor,
    positions_last,
)
from captum_classfilters.attr import LayerFilterContribution, LayerFilterFrequency
from captum_classfilters.attr.base import LayerFilterAttribution
from captum_classfilters.attr.layer_filter_frequency import strongest


@dataclass
class _Tap:
    """What one layer put out in the current batch, and what is known of it."""

    layer: nn.Module
    name: str
    channel_dim: int | None
    whole: bool = True  # keep whole maps, not only their means
    feed: Feed | None = None
    runs: int = 0
    axis: int = 1
    maps: Tensor | None = None  # (N, K, P)
    means: Tensor | None = None  # (N, K)
    tensor: Tensor | None = None  # differentiable, in the layer's own layout


@dataclass
class SharedForward:
    r"""
    Scores of a batch under several methods, from one forward pass (and one backward, if needed).

    The layers' maps are reduced to means inside the hooks. Where the model's output is a linear
    layer fed by the mean of a layer's maps, contributions follow without gradients; that relation
    is checked on every batch, and a batch that breaks it is run again with gradients.

    Args:

        forward_func (Callable): The model.
        methods (sequence): This package's methods, one layer each, all on ``forward_func``.
        at_input (bool): Use the layers' inputs.
    """

    forward_func: Callable[..., Any]
    methods: Sequence[LayerFilterAttribution]
    at_input: bool = False
    output: Any = None
    head_name: str | None = None
    _taps: dict[tuple[int, int | None], _Tap] = field(default_factory=dict)
    _needs_gradient: bool = False
    _head: HeadRecord | None = None

    def __post_init__(self) -> None:
        self.model = module_of(self.forward_func)
        for method in self.methods:
            key = self._key(method)
            name = layer_name(self.model, method.layer)
            self._taps.setdefault(key, _Tap(method.layer, name, method.channel_dim))

    def scores(self, inputs: tuple[Tensor, ...], labels: Tensor | None) -> list[Tensor]:
        """Per-image filter scores (N, K) of each method, in their order."""
        return self.scores_for(inputs, [labels])[0]

    def scores_for(
        self, inputs: tuple[Tensor, ...], targets: Sequence[Tensor | None]
    ) -> list[list[Tensor]]:
        """The same for several sets of targets (N,), from one forward pass."""
        if not self._needs_gradient:
            with torch.no_grad():
                complete = self._run(inputs, differentiable=False)
            self._needs_gradient = not complete
        if self._needs_gradient:
            with torch.enable_grad():
                self._run(inputs, differentiable=True)
        scores = []
        for number, labels in enumerate(targets, start=1):
            gradients = self._gradients(labels, keep_graph=number < len(targets))
            scores.append([self._score(method, labels, gradients) for method in self.methods])
        for tap in self._taps.values():
            tap.whole = tap.feed == "flatten"
            tap.tensor = tap.maps = None
        self._head = None
        return scores

    def feed(self, method: LayerFilterAttribution) -> dict[str, str] | None:
        """Which head the method's layer feeds, and how; None if it feeds none directly."""
        tap = self._taps[self._key(method)]
        if tap.feed is None or self.head_name is None:
            return None
        return {"name": self.head_name, "by": tap.feed}

    def means(self, method: LayerFilterAttribution) -> Tensor:
        """Mean activations (N, K) of the last batch at a method's layer."""
        means = self._taps[self._key(method)].means
        assert means is not None
        return means

    def _key(self, method: LayerFilterAttribution) -> tuple[int, int | None]:
        return id(method.layer), method.channel_dim

    def _contribution_taps(self) -> list[_Tap]:
        keys = {self._key(m) for m in self.methods if isinstance(m, LayerFilterContribution)}
        return [tap for key, tap in self._taps.items() if key in keys]

    def _run(self, inputs: tuple[Tensor, ...], differentiable: bool) -> bool:
        """Run the model; say whether every contribution has a closed form on this batch."""
        with self._tapped(differentiable), record_head(self.model) as head:
            self.output = self.forward_func(*inputs)
        for tap in self._taps.values():
            check_runs(tap.name, tap.runs)
            if tap.means is not None:
                check_batch(tap.name, len(tap.means), len(inputs[0]))
        self.head_name = layer_name(self.model, head.module) if head.module else None
        for tap in self._taps.values():
            tap.feed = self._how(tap, head)
        # Only a model that ends in its head, with nothing after it, is linear in what feeds it.
        self._head = head if head.is_output(self.output) else None
        return self._head is not None and all(tap.feed for tap in self._contribution_taps())

    @staticmethod
    def _how(tap: _Tap, head: HeadRecord) -> Feed | None:
        if head.features is None or tap.means is None:
            return None
        features = head.features.detach()
        features = features.flatten(2) if features.dim() > 2 else features
        if tap.maps is not None:
            return how_layer_feeds(features, tap.maps, 1)
        if features.dim() != 2 or tap.feed == "flatten":
            return tap.feed  # means cannot show it again
        feed = how_layer_feeds(features, tap.means, 1)
        return None if feed is None else (tap.feed or "mean")

    @contextmanager
    def _tapped(self, differentiable: bool) -> Iterator[None]:
        handles = []
        try:
            for tap in self._taps.values():
                tap.runs = 0
                handles.append(self._register(tap, differentiable))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _register(self, tap: _Tap, differentiable: bool) -> Any:
        def take(value: Any) -> Any:
            tap.runs += 1
            tensor = only_tensor(value, tap.name)
            if differentiable:
                if not tensor.requires_grad:
                    tensor = tensor.detach().requires_grad_()
                tap.tensor = tensor
            tap.axis = filter_axis(None if self.at_input else tap.layer, tensor, tap.channel_dim)
            maps = positions_last(tensor.detach(), tap.axis)
            tap.means = maps.mean(2)
            # In-place successors overwrite a layer's output, so whole maps are copies.
            tap.maps = maps.clone() if tap.whole and not differentiable else None
            if not differentiable:
                return None
            tap.maps = maps if tap.whole else None
            return tensor.clone()

        if self.at_input:

            def pre_hook(_module: nn.Module, inputs: Any) -> Any:
                replaced = take(inputs)
                return None if replaced is None else (replaced,)

            return tap.layer.register_forward_pre_hook(pre_hook)
        return tap.layer.register_forward_hook(lambda _module, _inputs, output: take(output))

    def _gradients(self, labels: Tensor | None, keep_graph: bool = False) -> dict[int, Tensor]:
        """Gradients of each image's own logit at the layers that have no closed form."""
        wanted = [tap for tap in self._contribution_taps() if not (self._head and tap.feed)]
        if not wanted or labels is None:
            return {}
        logits = own_logits(self.output, labels)
        tensors = [tap.tensor for tap in wanted if tap.tensor is not None]
        gradients = torch.autograd.grad(logits.sum(), tensors, retain_graph=keep_graph)
        return {id(tap): gradient for tap, gradient in zip(wanted, gradients, strict=True)}

    def _score(
        self,
        method: LayerFilterAttribution,
        labels: Tensor | None,
        gradients: dict[int, Tensor],
    ) -> Tensor:
        tap = self._taps[self._key(method)]
        assert tap.means is not None
        if isinstance(method, LayerFilterFrequency):
            return strongest(tap.means, method.top_k)
        if id(tap) in gradients:
            assert tap.tensor is not None
            product = tap.tensor.detach() * gradients[id(tap)]
            return positions_last(product, tap.axis).sum(2)
        assert self._head is not None
        assert labels is not None
        weight = self._head.weight[labels.to(self._head.weight.device)]
        if tap.feed == "flatten":
            assert tap.maps is not None
            return (tap.maps * weight.reshape(tap.maps.shape)).sum(2)
        return tap.means * weight


def own_logits(output: Any, labels: Tensor) -> Tensor:
    """Each image's output for its own class (N,)."""
    if not isinstance(output, Tensor) or output.dim() != 2:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"The model puts out {shape}; contributions need logits (N, C).")
    return output.gather(1, labels.to(output.device)[:, None])[:, 0]
