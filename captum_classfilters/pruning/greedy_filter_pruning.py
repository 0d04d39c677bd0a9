"""Abbasi-Asl and Yu: remove the filter that costs the least accuracy, again and again."""

import functools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from numbers import Integral, Real
from types import CellType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from captum_classfilters._core.arguments import arguments_checked, whole_number
from captum_classfilters._core.batches import read_batches
from captum_classfilters._core.copies import copied
from captum_classfilters._core.data_fingerprint import DataFingerprint
from captum_classfilters._core.distributed import is_main_process
from captum_classfilters._core.files import check_writable
from captum_classfilters._core.filter_weights import filter_weights
from captum_classfilters._core.guard import model_left_as_found
from captum_classfilters._core.layers import find_layer, layer_name, module_of, unwrapped
from captum_classfilters._core.outputs import class_scores
from captum_classfilters._core.provenance import fingerprint
from captum_classfilters._core.replay.checks import same_outputs
from captum_classfilters._core.replay.suffix_replay import SuffixReplay
from captum_classfilters._core.score_reader import OutputKind
from captum_classfilters._core.tables import bound_repr
from captum_classfilters._core.types import Dataloader, JsonDict, Keywords, ModelInputs, Unpack
from captum_classfilters._core.warnings import warn
from captum_classfilters.pruning.candidates import (
    Candidates,
    LabeledReplay,
    Places,
    accuracy_without,
    checked_labels,
    margins,
    places_of,
)
from captum_classfilters.pruning.masked_filters import masked_filters
from captum_classfilters.pruning.pruning_order import PruningOrder

Schedule = Literal["layer_by_layer", "all_layers"]

# Candidates are compared after each of so many parts of the images, none smaller than this.
_PARTS, _SMALLEST_PART = 20, 32


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
    what follows the layer. Candidates meet those images first that are wrong or nearly so, and none
    runs further once it has more wrong than the best has in all; which filter goes is the same. The
    model is not changed: filters are masked in the layer's output, and fine-tuning works on a copy.
    A mask leaves what later modules make of a zero, the shift of a batch normalization for example,
    so name the module that ends with the activation.

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

    @arguments_checked
    def __init__(
        self,
        forward_func: Callable[..., Tensor],
        layer: nn.Module | str | Sequence[nn.Module | str],
        channel_dim: int | None = None,
    ) -> None:
        self.forward_func = forward_func
        several: list[nn.Module | str] = (
            [layer] if isinstance(layer, (nn.Module, str)) else list(layer)
        )
        if not several:
            raise ValueError("The list of layers is empty.")
        self.model = module_of(forward_func, several)
        modules = [
            find_layer(self.model, name) if isinstance(name, str) else name for name in several
        ]
        self.layers = {layer_name(self.model, module): module for module in modules}
        self.channel_dim = channel_dim

    def __repr__(self) -> str:
        modules = list(self.layers.values())
        return bound_repr(self, self.forward_func, modules if len(modules) > 1 else modules[0])

    @arguments_checked
    def run(
        self,
        dataloader: Dataloader,
        report_dataloader: Dataloader | None = None,
        *,
        num_filters: int | Mapping[str, int] | None = None,
        ratio: float | None = None,
        min_accuracy: float | None = None,
        schedule: Schedule = "layer_by_layer",
        fine_tune: Callable[[nn.Module], object] | None = None,
        fine_tune_every: int = 1,
        error_probability: float | None = None,
        state_path: str | os.PathLike[str] | None = None,
        perturbations_per_eval: int | None = None,
        seed: int = 0,
        unpack: Unpack | None = None,
        device: torch.device | str | None = None,
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
                        masked; :class:`LayerwiseFineTuning` for example.
                        Default: None
            fine_tune_every (int): Removals between two fine-tunings.
                        Default: 1
            error_probability (float, optional): Stop running a candidate once it is not the best
                        one beyond chance; each step removes another filter than the best with at
                        most this probability. Batches should be small and in random order.
                        Default: None
            state_path (str or path, optional): A safetensors file written after every removal; if
                        it exists, the run continues from it. All options must be the same but the
                        bounds, which may go further where one layer is pruned, or all compete, and
                        ``perturbations_per_eval`` and ``device``, which decide no number. So must the
                        images, in whatever order and batches. If the file cannot be written
                        during the run, a warning says so, and the run goes on.
            perturbations_per_eval (int, optional): Filters per replay. By default as many as a
                        memory budget allows.
            seed (int): Each fine-tuning starts from a random state of its own, made from this, so
                        that a run that was continued draws the same batches.
                        Default: 0
            unpack (Callable, optional): From a batch of another kind to the pair (inputs, labels).
                        Default: None
            device (torch.device or str, optional): Where the batches go; by default where the model
                        is.
            show_progress (bool): Show a progress bar over the removals.
                        Default: True

        Returns:
            *PruningOrder*.

        Raises:
            ValueError: No bound is given; a bound would remove every filter or lies above the
                        start; the loaders hold different classes; the state is damaged, belongs to
                        another run or cannot be written; an option is unknown; the model returns
                        NaN or Inf, with filters or without.
        """
        if num_filters is None and ratio is None and min_accuracy is None:
            raise ValueError("Give at least one of num_filters, ratio and min_accuracy.")
        num_filters = _checked_bounds(num_filters, ratio)
        self._check_options(schedule, fine_tune, error_probability, fine_tune_every)
        options: JsonDict = {
            "schedule": schedule,
            "channel_dim": self.channel_dim,
            "fine_tune": None if fine_tune is None else _described(fine_tune),
            "fine_tune_every": fine_tune_every,
            "error_probability": error_probability,
            "seed": seed,
            "num_filters": num_filters,
            "ratio": ratio,
            "min_accuracy": min_accuracy,
        }
        options = {name: _plain(value) for name, value in options.items()}
        together = schedule == "all_layers" or len(self.layers) == 1
        earlier = _earlier(state_path, options, bounds=not together)
        reading = {"unpack": unpack, "device": device, "show_progress": show_progress}
        with model_left_as_found(self.model, evaluation=True), torch.inference_mode(False):
            network = self._network(fine_tune is not None)
            network.read(dataloader, False, reading)
            if report_dataloader is not None:
                network.read(report_dataloader, True, reading)
            network.check_classes()
            totals = network.num_filters()
            groups = _groups(totals, schedule, num_filters, ratio, min_accuracy)
            plain = None if self.model is None else unwrapped(self.model)
            result = network.started(totals, options, fingerprint(plain))
            if error_probability is None and all(len(group) == 1 for group, _ in groups):
                network.put_hardest_first()
            if earlier is not None and state_path is not None:
                result = _continued(earlier, result, groups, state_path)
                network.resume(result)
            step = _Step(
                network, min_accuracy, fine_tune, fine_tune_every, error_probability, seed,
                perturbations_per_eval,
            )  # fmt: skip
            with tqdm(
                total=sum(sum(totals[name] for name in group) - keep for group, keep in groups),
                initial=len(result.removed),
                desc=f"pruning {', '.join(self.layers)}",
                disable=not (show_progress and is_main_process()),
            ) as bar:
                for group, keep in groups:
                    while _left(result, group) > keep and step(result, group):
                        if state_path is not None:
                            _save(result, state_path)
                        bar.update()
        return result

    def _check_options(
        self,
        schedule: str,
        fine_tune: object,
        error_probability: float | None,
        fine_tune_every: int,
    ) -> None:
        if schedule not in ("layer_by_layer", "all_layers"):
            raise ValueError(f"schedule={schedule!r}; choose 'layer_by_layer' or 'all_layers'.")
        if fine_tune is not None and not isinstance(self.forward_func, nn.Module):
            raise ValueError("Fine-tuning needs the model itself, not a function of it.")
        if fine_tune_every < 1:
            raise ValueError(f"fine_tune_every={fine_tune_every} must be at least 1.")
        if error_probability is not None and not 0 < error_probability < 1:
            raise ValueError(f"error_probability={error_probability} must lie between 0 and 1.")

    def _network(self, tuned: bool) -> "_Network":
        if not tuned:
            return _Network(self.forward_func, self.layers, self.channel_dim)
        assert isinstance(self.model, nn.Module)
        # A compiled copy would be compiled anew for every mask.
        model = copied(getattr(self.model, "_orig_mod", self.model))
        layers = {name: find_layer(model, name) for name in self.layers}
        return _Network(model, layers, self.channel_dim)


class _Network:
    """The network as it is by now, and the images to run it on: those that choose the filters, and
    those to report on."""

    def __init__(
        self,
        forward_func: Callable[..., Tensor],
        layers: dict[str, nn.Module],
        channel_dim: int | None,
    ) -> None:
        self.forward_func, self.layers, self.channel_dim = forward_func, layers, channel_dim
        self.model = module_of(forward_func, list(layers.values()))
        self.ways: dict[str, str] = {}
        self.images: dict[bool, list[tuple[ModelInputs, Tensor, Places]]] = {False: [], True: []}
        self.hardest_first = False
        self.fingerprints: dict[bool, str | None] = {False: None, True: None}
        self._kind = OutputKind(forward_func, list(layers.values()))
        # Batches held in memory, run up to one layer.
        self._recorded: dict[bool, list[LabeledReplay]] = {}
        self._recorded_at = next(iter(layers))

    # -- images ----------------------------------------------------------------------------------

    def read(self, dataloader: Dataloader, report: bool, options: Keywords) -> None:
        """Read a loader; each batch is run once, up to the first layer."""
        name = "report_dataloader" if report else "dataloader"
        recorded: list[LabeledReplay] = []
        images = DataFingerprint()
        with read_batches(
            self.model, dataloader, f"reading {name}", may_be_empty=True, **options
        ) as batches:
            for batch in batches:
                replay = self._replay(self._recorded_at, batch.inputs)
                batches.check_repeats(self.forward_func, batch, replay.output)
                labels = checked_labels(batches, batch, replay.output)
                self._probabilities = self._kind.probabilities(
                    batch.inputs, replay.output, batches.check, batch.number
                )
                places = places_of(batch)
                recorded.append(LabeledReplay(replay, labels, self._probabilities, places))
                self.images[report].append((batch.inputs, labels, places))
                images.add(batch.inputs, labels)
        if not recorded:
            raise ValueError(f"{name} is empty: the data loader gave no image.")
        self._recorded[report] = recorded
        self.fingerprints[report] = images.hexdigest()

    def put_hardest_first(self) -> None:
        """Have the images that are wrong, or nearly so, lead those that choose.

        Candidates are then soon told apart. That needs images that do not depend on their batch,
        and pays where they are many and more than a head runs for each candidate. An accelerator is
        not stopped to see who leads.
        """
        batches, images = self._recorded[False], self.images[False]
        num_images = sum(len(labels) for _, labels, _ in images)
        size = max(_SMALLEST_PART, -(-num_images // _PARTS))
        if num_images < 3 * size or any(
            batch.replay.way != "replay" or batch.labels.device.type != "cpu" for batch in batches
        ):
            return
        inputs = _joined([part for part, _, _ in images])
        if inputs is None or any(len(part) != num_images for part in inputs):
            return
        order = torch.cat([margins(batch) for batch in batches]).argsort(stable=True)
        hardest = _taken(inputs, images, order.split(size))
        outputs = torch.cat([class_scores(batch.replay.output) for batch in batches])[order]
        parts = list(zip(hardest, outputs.split(size), strict=True))
        if not all(self._gives(part[0], own) for part, own in (parts[0], parts[-1])):
            return
        self.images[False] = hardest
        del self._recorded[False]
        self.hardest_first = True

    def _gives(self, inputs: ModelInputs, outputs: Tensor) -> bool:
        """Whether images get the same outputs in another batch, if it may have this size at all."""
        try:
            again = self._replay(self._recorded_at, inputs).output
        except Exception:
            return False
        return bool(same_outputs(class_scores(again), outputs))

    def check_classes(self) -> None:
        """The images to report on must hold the classes of those that choose."""
        if not self.images[True]:
            return
        chosen, reported = (
            set(torch.cat([labels for _, labels, _ in self.images[part]]).tolist())
            for part in (False, True)
        )
        if chosen != reported:
            raise ValueError(
                "The loaders hold different classes: "
                f"{sorted(chosen - reported)} only among the images that choose, "
                f"{sorted(reported - chosen)} only among those that report."
            )

    def num_filters(self) -> dict[str, int]:
        """K of each layer."""
        inputs, _, _ = self.images[False][0]
        first = self._recorded_at
        return {
            name: self._recorded[False][0].replay.num_filters
            if name == first
            else self._replay(name, inputs).num_filters
            for name in self.layers
        }

    # -- running ---------------------------------------------------------------------------------

    def without_others(
        self, name: str, masks: Mapping[str, Tensor]
    ) -> AbstractContextManager[nn.Module]:
        """A block in which the other layers lack what they have lost."""
        others = {other: mask for other, mask in masks.items() if other != name}
        model = nn.Module() if self.model is None else self.model
        return masked_filters(model, others, self.channel_dim)

    def replays(self, name: str, report: bool, keep: bool) -> Iterable[LabeledReplay]:
        """Batches recorded up to a layer; held in memory on demand."""
        if not keep:
            self.forget()
            return self._run(name, report)
        if self._recorded_at != name:
            self.forget()
        self._recorded_at = name
        if report not in self._recorded:
            self._recorded[report] = list(self._run(name, report))
        return self._recorded[report]

    def forget(self) -> None:
        """Forget what was recorded: the network has changed."""
        self._recorded.clear()

    def measure(
        self, name: str, masks: Mapping[str, Tensor], report: bool, keep: bool
    ) -> tuple[float, float]:
        """Accuracy and cross-entropy of the network as it is."""
        with self.without_others(name, masks):
            return accuracy_without(self.replays(name, report, keep), ~masks[name])

    def _run(self, name: str, report: bool) -> Iterator[LabeledReplay]:
        for inputs, labels, places in self.images[report]:
            replay = self._replay(name, inputs)
            yield LabeledReplay(replay, labels, self._probabilities, places)

    def _replay(self, name: str, inputs: ModelInputs) -> SuffixReplay:
        layer = self.layers[name]
        replay = SuffixReplay(self.forward_func, layer, inputs, channel_dim=self.channel_dim)
        known = self.ways.get(name, replay.way).split(", ")
        self.ways[name] = ", ".join(sorted({*known, replay.way}))
        return replay

    # -- the record ------------------------------------------------------------------------------

    @property
    def module(self) -> nn.Module:
        """The network, where it is tuned."""
        assert self.model is not None
        return self.model

    def started(
        self, totals: dict[str, int], options: JsonDict, model_sha256: str | None
    ) -> PruningOrder:
        """A new record."""
        masks = {name: torch.ones(total, dtype=torch.bool) for name, total in totals.items()}
        first, floor = next(iter(totals)), options["min_accuracy"]
        start, loss = self.measure(first, masks, False, keep=True)
        if floor is not None and floor > start:
            raise ValueError(
                f"min_accuracy={floor} lies above the accuracy at the start, {start:.4f}."
            )
        report = self.measure(first, masks, True, keep=True)[:1] if self.images[True] else ()
        return PruningOrder(
            filters=totals,
            accuracy=[start],
            report_accuracy=list(report),
            model_sha256=model_sha256,
            options=options,
            ways=self.ways,
            num_images=sum(len(labels) for _, labels, _ in self.images[False]),
            start_loss=loss,
            images_sha256=self.fingerprints[False],
            report_images_sha256=self.fingerprints[True],
        )

    def resume(self, state: PruningOrder) -> None:
        """Bring the network to where another run stopped."""
        self.ways = state.ways = {**self.ways, **state.ways}
        if state.weights is not None:
            try:
                self.module.load_state_dict(state.weights)
            except RuntimeError as error:
                raise ValueError(
                    f"The state's weights are not those of this model: {error}"
                ) from error
            self.forget()


@dataclass
class _Step:
    """One removal."""

    network: _Network
    min_accuracy: float | None
    fine_tune: Callable[[nn.Module], object] | None
    fine_tune_every: int
    error_probability: float | None
    seed: int
    perturbations_per_eval: int | None

    def __call__(self, result: PruningOrder, group: Sequence[str]) -> bool:
        """Remove the next filter; False if that would break the accuracy bound."""
        keep = len(group) == 1
        measured = [(name, *self._candidates(result, name, keep)) for name in group]
        accuracy, removal = _best(measured)
        name, _ = removal
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
        result.evaluations.append(sum(part.evaluations for _, _, part, _ in measured))
        result.possible_evaluations.append(
            sum(part.possible_evaluations for _, _, part, _ in measured)
        )
        if self.network.images[True]:
            reported, _ = self.network.measure(name, result.masks(), True, keep)
            result.report_accuracy.append(reported)
        return True

    def _candidates(
        self, result: PruningOrder, name: str, keep: bool
    ) -> tuple[Tensor, Candidates, list[float]]:
        """A layer's remaining filters, what removing them does, and their L1 norms."""
        masks = result.masks()
        kept = masks[name]
        filters = kept.nonzero()[:, 0] if int(kept.sum()) > 1 else torch.zeros(0, dtype=torch.int64)
        removed = ~kept | (filters[:, None] == torch.arange(len(kept)))
        candidates = Candidates(removed, self.error_probability, len(self.network.images[False]))
        if len(filters):
            with self.network.without_others(name, masks):
                batches = self.network.replays(name, False, keep)
                if self.network.hardest_first:
                    wrong = round((1 - result.accuracy[-1]) * result.num_images)
                    expected = wrong - wrong // 20
                    candidates.race(list(batches), expected, self.perturbations_per_eval)
                else:
                    candidates.measure(batches, self.perturbations_per_eval)
        return filters, candidates, _norms(self.network.layers[name], filters, len(kept))

    def _tuned(self, result: PruningOrder, name: str, keep: bool) -> float:
        """Train the network without the removed filters; its accuracy then."""
        assert self.fine_tune is not None
        model, masks = self.network.module, result.masks()
        torch.manual_seed(self.seed + len(result.removed))
        with masked_filters(model, masks, self.network.channel_dim), torch.enable_grad():
            self.fine_tune(model)
        model.eval()
        result.weights = _state(model)
        self.network.forget()
        return self.network.measure(name, masks, False, keep)[0]


def _joined(batches: Sequence[ModelInputs]) -> ModelInputs | None:
    """The inputs of all batches as those of one; None where they are not all tensors of a kind."""
    joined = []
    for parts in zip(*batches, strict=True):
        if not all(isinstance(part, Tensor) and part.dim() for part in parts):
            return None
        if len({(part.dtype, part.device, part.shape[1:]) for part in parts}) > 1:
            return None
        joined.append(torch.cat(parts))
    return tuple(joined)


def _taken(
    inputs: ModelInputs,
    images: Sequence[tuple[ModelInputs, Tensor, Places]],
    parts: Sequence[Tensor],
) -> list[tuple[ModelInputs, Tensor, Places]]:
    """Images, their labels and their places, in other batches."""
    labels = torch.cat([labels for _, labels, _ in images])
    places = [place for _, _, some in images for place in some]
    return [
        (
            tuple(part[index.to(part.device)] for part in inputs),
            labels[index.to(labels.device)],
            [places[one] for one in index.tolist()],
        )
        for index in parts
    ]


def _best(
    measured: Sequence[tuple[str, Tensor, Candidates, list[float]]],
) -> tuple[float, tuple[str, int]]:
    """The accuracy without the filter that costs least, and its layer and index."""
    rows = [
        (-accuracy, loss, norm, place, row)
        for place, (_, _, candidates, norms) in enumerate(measured)
        for row, (accuracy, loss, norm) in enumerate(
            zip(candidates.accuracy.tolist(), candidates.mean_loss.tolist(), norms, strict=True)
        )
    ]
    lost, _, _, place, row = min(rows)
    name, filters, _, _ = measured[place]
    return -lost, (name, int(filters[row]))


def _described(function: object) -> JsonDict:
    """A function in words that another process finds the same: its name, and what it was given."""
    if isinstance(function, functools.partial):
        given = {"arguments": _plain(function.args), "keywords": _plain(function.keywords)}
        return {**_described(function.func), **given}
    name = getattr(function, "__qualname__", type(function).__qualname__)
    closed = [_content(cell) for cell in getattr(function, "__closure__", None) or ()]
    parts: JsonDict = {
        "defaults": list(getattr(function, "__defaults__", None) or ()),
        "closure": [value for value in closed if isinstance(value, (bool, int, float, str))],
    }
    told = {key: _plain(values) for key, values in parts.items() if values}
    return {"function": name, **told, **_plain(getattr(function, "options", {}))}


def _content(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # nothing yet
        return None


def _plain(value: object) -> Any:
    """A value as JSON has it, the same in every process."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Mapping):
        return {str(_plain(key)): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(part) for part in value]
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if callable(value) and not isinstance(value, nn.Module):
        return getattr(value, "__qualname__", type(value).__qualname__)
    return re.sub(" at 0x[0-9a-f]+", "", repr(value))


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _norms(layer: nn.Module, filters: Tensor, num_filters: int) -> list[float]:
    """L1 norm of each filter's weights; 0 where the layer itself has none."""
    weights = filter_weights(layer)
    if weights is None or len(weights) != num_filters:
        return [0.0] * len(filters)
    norms: list[float] = weights.flatten(1).abs().sum(1).cpu()[filters].tolist()
    return norms


def _earlier(
    path: str | os.PathLike[str] | None, options: JsonDict, bounds: bool
) -> PruningOrder | None:
    """The record of an earlier run, if there is any and it can be gone on with; nothing has run yet."""
    if path is None:
        return None
    check_writable(path)
    try:
        state = PruningOrder.load(path)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{error} Remove the file to begin anew, or name another.") from error
    if differences := state.other_options(options, bounds):
        raise _another_run(path, differences)
    return state


def _another_run(path: str | os.PathLike[str], differences: Sequence[str]) -> ValueError:
    return ValueError(
        f"{path} holds the state of another run, which differs in {'; '.join(differences)}. "
        "Remove it, or continue with the same options, model, layers and images."
    )


def _save(result: PruningOrder, path: str | os.PathLike[str]) -> None:
    """Write the state; what was computed is not lost if that fails."""
    try:
        result.save(path)
    except OSError as error:
        warn(
            f"The state of the pruning run was not written: {error}. The run goes on, and the state is "
            "written after the next removal if that is possible by then."
        )


def _continued(
    state: PruningOrder,
    start: PruningOrder,
    groups: Sequence[tuple[list[str], int]],
    path: str | os.PathLike[str],
) -> PruningOrder:
    """The record that is to be continued, if it is of the same run."""
    differences = state.differences(start, bounds=len(groups) > 1)
    if differences:
        raise _another_run(path, differences)
    floor = start.options["min_accuracy"]
    for group, keep in groups if len(groups) == 1 else ():
        if _left(state, group) < keep or min(state.accuracy) < (floor or 0):
            raise ValueError(
                f"{path} holds the state of a run that has gone beyond these bounds: "
                f"{_left(state, group)} filters are left, at an accuracy of "
                f"{min(state.accuracy):.4f} or more. PruningOrder.load reads what it removed."
            )
    state.options = start.options
    return state


def _left(result: PruningOrder, group: Sequence[str]) -> int:
    return sum(int(result.kept(layer=name).sum()) for name in group)


def _checked_bounds(
    num_filters: int | Mapping[str, int] | None, ratio: float | None
) -> int | dict[str, int] | None:
    """Numbers of filters as ints; raise, before any image is read, for bounds that no layer can have."""
    if ratio is not None and not ratio >= 1:
        raise ValueError(f"ratio={ratio}: expected 1 or more; filters before, for each one after.")
    if isinstance(num_filters, Mapping):
        return {name: _some(number) for name, number in num_filters.items()}
    return None if num_filters is None else _some(num_filters)


def _some(num_filters: object) -> int:
    number = whole_number(num_filters)
    if number is None or number < 1:
        raise ValueError(
            f"num_filters={num_filters!r}: expected a whole number of at least 1; a layer cannot lose "
            "every filter."
        )
    return number


def _groups(
    totals: dict[str, int],
    schedule: Schedule,
    num_filters: int | Mapping[str, int] | None,
    ratio: float | None,
    min_accuracy: float | None,
) -> list[tuple[list[str], int]]:
    """Layers that compete with each other, and how many filters they keep together."""
    if schedule == "all_layers":
        if isinstance(num_filters, Mapping):
            raise ValueError("num_filters must be one number where all layers compete.")
        total = sum(totals.values())
        return [(list(totals), _number_to_keep(total, len(totals), num_filters, ratio))]
    by_layer = (
        dict(num_filters)
        if isinstance(num_filters, Mapping)
        else {name: num_filters for name in totals if num_filters is not None}
    )
    if unknown := set(by_layer) - set(totals):
        raise ValueError(f"num_filters names {sorted(unknown)}, but the layers are {list(totals)}.")
    missing = [name for name in totals if name not in by_layer]
    if missing and ratio is None and min_accuracy is None:
        raise ValueError(f"num_filters must name every layer; it lacks {', '.join(missing)}.")
    return [
        ([name], _number_to_keep(total, 1, by_layer.get(name), ratio))
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
