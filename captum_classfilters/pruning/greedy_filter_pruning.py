"""Abbasi-Asl and Yu: remove the filter that costs the least accuracy, again and again."""

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from captum_classfilters._core.guard import model_left_as_found
from captum_classfilters._core.layers import find_layer, layer_name, module_of
from captum_classfilters._core.provenance import fingerprint
from captum_classfilters._core.replay.suffix_replay import SuffixReplay
from captum_classfilters.identify.statistics import labels_of_scores
from captum_classfilters.pruning.candidates import Candidates, accuracy_without
from captum_classfilters.pruning.masked_filters import masked_filters
from captum_classfilters.pruning.pruning_order import PruningOrder

Schedule = Literal["layer_by_layer", "all_layers"]
Batches = list[tuple[tuple[Tensor, ...], Any]]
Replays = Iterable[tuple[SuffixReplay, Tensor]]


class GreedyFilterPruning:
    r"""
    CAR compression: greedy removal of filters by classification accuracy reduction.

    In each step the accuracy without each remaining filter is measured on the network as it is by
    then, and the filter whose removal leaves the highest accuracy goes. Equal accuracies are
    decided by the lower increase of the mean cross-entropy, then by the smaller L1 norm of the
    filter's weights where the layer has any, then by the lower index. Ranking once instead misses
    that filters stand in for each other.

    Source: Abbasi-Asl and Yu: *Structural Compression of Convolutional Neural Networks with
    Applications in Interpretability*, Frontiers in Big Data 4 (2021),
    https://arxiv.org/abs/1705.07356.

    What comes before a layer runs once and is held in memory for all steps, so a step costs only
    what follows the layer. The model is not changed: filters are masked in the layer's output, and
    fine-tuning works on a copy. A mask leaves what later modules make of a zero, the shift of a
    batch normalisation say, so name the module that ends with the activation.

    Args:

        forward_func (Callable): The forward function of the model.
        layer (nn.Module, str or list of these): The layer or layers, or their dotted names.
        channel_dim (int, optional): Axis of the filters, where it cannot be told from the layers.
                    Default: None

    Examples::

        >>> import torch
        >>> from captum_classfilters.pruning import GreedyFilterPruning
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        ...     torch.nn.Flatten(), torch.nn.Linear(8, 2))
        >>> data = [(torch.rand(4, 3, 6, 6), torch.tensor([0, 1, 1, 0]))]
        >>> pruning = GreedyFilterPruning(net, net[1])
        >>> order = pruning.run(data, num_filters=5, show_progress=False)
        >>> len(order.order), int(order.kept().sum())
        (3, 5)
    """

    def __init__(
        self,
        forward_func: Callable[..., Tensor],
        layer: nn.Module | str | Sequence[nn.Module | str],
        channel_dim: int | None = None,
    ) -> None:
        self.forward_func = forward_func
        self.model = module_of(forward_func)
        several: list[Any] = list(layer) if isinstance(layer, (list, tuple)) else [layer]
        if not several:
            raise ValueError("The list of layers is empty.")
        modules = [find_layer(self.model, one) if isinstance(one, str) else one for one in several]
        self.layers = {layer_name(self.model, one): one for one in modules}
        self.channel_dim = channel_dim

    def run(
        self,
        dataloader: Iterable[Any],
        report_dataloader: Iterable[Any] | None = None,
        *,
        num_filters: int | Mapping[str, int] | None = None,
        ratio: float | None = None,
        min_accuracy: float | None = None,
        schedule: Schedule = "layer_by_layer",
        fine_tune: Callable[[nn.Module], Any] | None = None,
        fine_tune_every: int = 1,
        error_probability: float | None = None,
        state_path: str | os.PathLike[str] | None = None,
        perturbations_per_eval: int | None = None,
        seed: int = 0,
        show_progress: bool = True,
    ) -> PruningOrder:
        r"""
        Remove filters until any of the bounds is reached.

        Args:

            dataloader (iterable): Batches of (inputs, labels) that choose the filters.
            report_dataloader (iterable, optional): Other batches to report the accuracy on; the
                        accuracy on the images that chose is too good.
                        Default: None
            num_filters (int or dict of str to int, optional): Keep this many filters of each layer,
                        or of all together where ``schedule`` is ``"all_layers"``.
            ratio (float, optional): Stop when K over the number of filters left reaches this, for
                        each layer, or for all together where ``schedule`` is ``"all_layers"``.
            min_accuracy (float, optional): Stop before the accuracy on ``dataloader``, after
                        fine-tuning, falls below this.
            schedule (str): ``"layer_by_layer"``, in the order given, or ``"all_layers"``: each step
                        removes the filter of any layer whose removal costs the least.
                        Default: "layer_by_layer"
            fine_tune (Callable, optional): Trains the network it is given in place, filters
                        masked; :class:`LayerwiseFineTuning` say.
                        Default: None
            fine_tune_every (int): Removals between two fine-tunings.
                        Default: 1
            error_probability (float, optional): Stop running a candidate once it is not the best
                        one beyond chance; each step removes another filter than the best with at
                        most this probability. Batches should be small and in random order.
                        Default: None
            state_path (str or path, optional): A safetensors file written after every removal; if
                        it exists, the run continues from it.
            perturbations_per_eval (int, optional): Filters per replay. By default as many as a
                        memory budget allows.
            seed (int): Each fine-tuning starts from a random state of its own, made from this, so
                        that a run that was continued draws the same batches.
                        Default: 0
            show_progress (bool): Show a progress bar over the removals.
                        Default: True

        Returns:
            *PruningOrder*.

        Raises:
            ValueError: No bound is given; a bound would remove every filter or lies above the
                        start; the loaders hold different classes; the state belongs to another
                        model or other layers; an option is unknown.
        """
        if num_filters is None and ratio is None and min_accuracy is None:
            raise ValueError("Give at least one of num_filters, ratio and min_accuracy.")
        _check_options(schedule, fine_tune, self.model, error_probability, fine_tune_every)
        with model_left_as_found(self.model, evaluation=True):
            network = self._network(dataloader, report_dataloader, fine_tune is not None)
            totals = network.num_filters()
            groups = _groups(totals, schedule, num_filters, ratio)
            result = network.started(totals, min_accuracy, state_path)
            step = _Step(
                network, min_accuracy, fine_tune, fine_tune_every, error_probability, seed,
                perturbations_per_eval,
            )  # fmt: skip
            with tqdm(
                total=sum(sum(totals[name] for name in group) - keep for group, keep in groups),
                initial=len(result.removed),
                desc=f"pruning {', '.join(self.layers)}",
                disable=not show_progress,
            ) as bar:
                for group, keep in groups:
                    while _left(result, group) > keep and step(result, group):
                        if state_path is not None:
                            result.save(state_path)
                        bar.update()
        return result

    def _network(
        self, dataloader: Iterable[Any], report: Iterable[Any] | None, tuned: bool
    ) -> "_Network":
        forward_func, layers = self.forward_func, self.layers
        if tuned:
            assert isinstance(self.model, nn.Module)
            forward_func = copy.deepcopy(self.model)
            layers = {name: find_layer(forward_func, name) for name in layers}
        network = _Network(
            forward_func,
            layers,
            self.channel_dim,
            _batches(dataloader, "dataloader"),
            [] if report is None else _batches(report, "report_dataloader"),
            fingerprint(self.model),
        )
        network.check_classes()
        return network


@dataclass
class _Network:
    """The network as it is by now, and the images to run it on."""

    forward_func: Callable[..., Tensor]
    layers: dict[str, nn.Module]
    channel_dim: int | None
    images: Batches
    report: Batches
    model_sha256: str | None
    _recorded: dict[bool, list[tuple[SuffixReplay, Tensor]]] = field(default_factory=dict)
    _recorded_at: str | None = None

    def num_filters(self) -> dict[str, int]:
        """K of each layer."""
        first = self.images[:1]
        return {name: next(self._run(name, first))[0].num_filters for name in self.layers}

    def without_others(self, name: str, masks: Mapping[str, Tensor]) -> Any:
        """A block in which the other layers lack what they have lost."""
        model = module_of(self.forward_func)
        others = {other: mask for other, mask in masks.items() if other != name}
        return masked_filters(model or nn.Module(), others, self.channel_dim)

    def replays(self, name: str, report: bool, keep: bool) -> Replays:
        """Batches recorded up to a layer; held in memory on demand."""
        batches = self.report if report else self.images
        if not keep:
            return self._run(name, batches)
        if self._recorded_at != name:
            self.forget()
        self._recorded_at = name
        if report not in self._recorded:
            self._recorded[report] = list(self._run(name, batches))
        return self._recorded[report]

    def forget(self) -> None:
        """Forget what was recorded: the network has changed."""
        self._recorded.clear()
        self._recorded_at = None

    @property
    def module(self) -> nn.Module:
        """The network, where it is tuned."""
        model = module_of(self.forward_func)
        assert model is not None
        return model

    def _run(self, name: str, batches: Batches) -> Iterator[tuple[SuffixReplay, Tensor]]:
        layer = self.layers[name]
        for number, (inputs, labels) in enumerate(batches):
            replay = SuffixReplay(self.forward_func, layer, inputs, channel_dim=self.channel_dim)
            yield replay, labels_of_scores(replay.output, labels, number)

    def check_classes(self) -> None:
        """The images to report on must hold the classes of those that choose."""
        if not self.report:
            return
        one, other = (
            set(torch.cat([torch.as_tensor(labels).cpu() for _, labels in part]).tolist())
            for part in (self.images, self.report)
        )
        if one != other:
            raise ValueError(
                "The loaders hold different classes: "
                f"{sorted(one - other)} only among the images that choose, "
                f"{sorted(other - one)} only among those that report."
            )

    def measure(self, name: str, masks: dict[str, Tensor], report: bool, keep: bool) -> float:
        """Accuracy of the network as it is."""
        with self.without_others(name, masks):
            return accuracy_without(self.replays(name, report, keep), ~masks[name])[0]

    def started(
        self,
        totals: dict[str, int],
        min_accuracy: float | None,
        state_path: str | os.PathLike[str] | None,
    ) -> PruningOrder:
        """A new record, or the one that is to be continued."""
        masks = {name: torch.ones(total, dtype=torch.bool) for name, total in totals.items()}
        first = next(iter(totals))
        start = self.measure(first, masks, False, keep=True)
        if min_accuracy is not None and min_accuracy > start:
            raise ValueError(
                f"min_accuracy={min_accuracy} lies above the accuracy at the start, {start:.4f}."
            )
        if state_path is not None and Path(state_path).exists():
            return self._continued(PruningOrder.load(state_path), totals, start, state_path)
        return PruningOrder(
            filters=totals,
            accuracy=[start],
            report_accuracy=[self.measure(first, masks, True, keep=True)] if self.report else [],
            model_sha256=self.model_sha256,
        )

    def _continued(
        self, state: PruningOrder, totals: dict[str, int], start: float, path: Any
    ) -> PruningOrder:
        same = (state.filters, state.model_sha256, state.accuracy[0], bool(state.report_accuracy))
        if same != (totals, self.model_sha256, start, bool(self.report)):
            raise ValueError(
                f"{path} holds the state of another run, over {state.filters}; remove it, or "
                "continue with the same model, layers and images."
            )
        if state.weights is not None:
            self.module.load_state_dict(state.weights)
            self.forget()
        return state


@dataclass
class _Step:
    """One removal."""

    network: _Network
    min_accuracy: float | None
    fine_tune: Callable[[nn.Module], Any] | None
    fine_tune_every: int
    error_probability: float | None
    seed: int
    at_once: int | None

    def __call__(self, result: PruningOrder, group: Sequence[str]) -> bool:
        """Remove the next filter; False if that would break the accuracy bound."""
        keep = len(group) == 1
        measured = [(name, *self._candidates(result, name, keep)) for name in group]
        best = min(
            (-float(candidates.accuracy[row]), float(candidates.mean_loss[row]), size, place, row)
            for place, (_, _, candidates, sizes) in enumerate(measured)
            for row, size in enumerate(sizes)
        )
        name, filters, _, _ = measured[best[3]]
        accuracy, removal = -best[0], (name, int(filters[best[4]]))
        result.removed.append(removal)
        weights = result.weights
        due = self.fine_tune is not None and len(result.removed) % self.fine_tune_every == 0
        before = _state(self.network.module) if due else {}
        if due:
            accuracy = self._tuned(result, name, keep)
        if self.min_accuracy is not None and accuracy < self.min_accuracy:
            result.removed.pop()
            if due:
                result.weights = weights
                self.network.module.load_state_dict(before)
                self.network.forget()
            return False
        result.accuracy.append(accuracy)
        result.evaluations.append(sum(one.evaluations for _, _, one, _ in measured))
        result.possible_evaluations.append(
            sum(one.possible_evaluations for _, _, one, _ in measured)
        )
        if self.network.report:
            result.report_accuracy.append(self.network.measure(name, result.masks(), True, keep))
        return True

    def _candidates(
        self, result: PruningOrder, name: str, keep: bool
    ) -> tuple[Tensor, Candidates, list[float]]:
        """A layer's remaining filters, what removing them does, and their L1 norms."""
        masks = result.masks()
        kept = masks[name]
        filters = kept.nonzero()[:, 0] if int(kept.sum()) > 1 else torch.zeros(0, dtype=torch.int64)
        removed = ~kept | (filters[:, None] == torch.arange(len(kept)))
        candidates = Candidates(removed, self.error_probability, len(self.network.images))
        if len(filters):
            with self.network.without_others(name, masks):
                candidates.measure(self.network.replays(name, False, keep), self.at_once)
        return filters, candidates, _norms(self.network.layers[name], filters, len(kept))

    def _tuned(self, result: PruningOrder, name: str, keep: bool) -> float:
        """Train the network without the removed filters; its accuracy then."""
        assert self.fine_tune is not None
        model, masks = self.network.module, result.masks()
        torch.manual_seed(self.seed + len(result.removed))
        with masked_filters(model, masks, self.network.channel_dim):
            self.fine_tune(model)
        model.eval()
        result.weights = _state(model)
        self.network.forget()
        return self.network.measure(name, masks, False, keep)


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: one.detach().clone() for name, one in model.state_dict().items()}


def _norms(layer: nn.Module, filters: Tensor, number: int) -> list[float]:
    """L1 norm of each filter's weights; 0 where the layer itself has none."""
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() < 2 or len(weight) != number:
        return [0.0] * len(filters)
    sums = weight.detach().flatten(1).abs().sum(1).cpu()
    return [float(one) for one in sums[filters]]


def _batches(dataloader: Iterable[Any], name: str) -> Batches:
    batches = []
    for inputs, labels in dataloader:
        images = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
        if len(images[0]):
            batches.append((images, labels))
    if not batches:
        raise ValueError(f"{name} is empty: the data loader gave no image.")
    return batches


def _left(result: PruningOrder, group: Sequence[str]) -> int:
    return sum(int(result.kept(layer=name).sum()) for name in group)


def _groups(
    totals: dict[str, int],
    schedule: Schedule,
    num_filters: int | Mapping[str, int] | None,
    ratio: float | None,
) -> list[tuple[list[str], int]]:
    """Layers that compete with each other, and how many filters they keep together."""
    if schedule == "all_layers":
        if isinstance(num_filters, Mapping):
            raise ValueError("num_filters must be one number where all layers compete.")
        total = sum(totals.values())
        return [(list(totals), _number_to_keep(total, len(totals), num_filters, ratio))]
    given = dict(num_filters) if isinstance(num_filters, Mapping) else {}
    if unknown := set(given) - set(totals):
        raise ValueError(f"num_filters names {sorted(unknown)}, but the layers are {list(totals)}.")
    one = None if isinstance(num_filters, Mapping) else num_filters
    return [
        ([name], _number_to_keep(total, 1, given.get(name, one), ratio))
        for name, total in totals.items()
    ]


def _number_to_keep(total: int, least: int, num_filters: int | None, ratio: float | None) -> int:
    if num_filters is not None and not least <= num_filters <= total:
        raise ValueError(
            f"num_filters={num_filters}: expected {least} to {total}; a layer cannot lose every "
            "filter."
        )
    if ratio is not None and not 1 <= ratio <= total / least:
        raise ValueError(
            f"ratio={ratio}: expected 1 to {total / least:g}; a layer cannot lose every filter."
        )
    by_ratio = least if ratio is None else int(total / ratio)
    return max(least if num_filters is None else num_filters, by_ratio, least)


def _check_options(
    schedule: str,
    fine_tune: Any,
    model: nn.Module | None,
    error_probability: float | None,
    fine_tune_every: int,
) -> None:
    if schedule not in ("layer_by_layer", "all_layers"):
        raise ValueError(f"schedule={schedule!r}; choose 'layer_by_layer' or 'all_layers'.")
    if fine_tune is not None and model is None:
        raise ValueError("Fine-tuning needs the model itself, not a function of it.")
    if fine_tune_every < 1:
        raise ValueError(f"fine_tune_every={fine_tune_every} must be at least 1.")
    if error_probability is not None and not 0 < error_probability < 1:
        raise ValueError(f"error_probability={error_probability} must lie between 0 and 1.")
