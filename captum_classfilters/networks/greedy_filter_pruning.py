"""Abbasi-Asl and Yu: remove the filter that costs the least accuracy, again and again."""

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from captum_classfilters._internal.guard import model_left_as_found
from captum_classfilters._internal.layers import find_layer, layer_name, module_of
from captum_classfilters._internal.provenance import fingerprint
from captum_classfilters._internal.suffix import SuffixReplay
from captum_classfilters.identify.statistics import class_labels


@dataclass
class PruningOrder:
    r"""
    The order in which a layer's filters were removed, and the accuracy on the way.

    Args:

        layer (str): Dotted name of the layer.
        num_filters (int): K.
        order (list of int): Filters in the order of their removal.
        accuracy (list of float): Accuracy before the first removal and after each, on the images
                    that chose the filters.
        report_accuracy (list of float): The same on the images kept for reporting; empty without
                    these.
        model_sha256 (str or None): Fingerprint of the model.
    """

    layer: str
    num_filters: int
    order: list[int] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    report_accuracy: list[float] = field(default_factory=list)
    model_sha256: str | None = None

    def kept(self, number: int | None = None) -> Tensor:
        """Which filters are left (K,), bool: after all removals, or when ``number`` were left."""
        removed = len(self.order) if number is None else self.num_filters - number
        if not 0 <= removed <= len(self.order):
            raise ValueError(
                f"number={number}: the order leaves {self.num_filters - len(self.order)} to "
                f"{self.num_filters} filters."
            )
        kept = torch.ones(self.num_filters, dtype=torch.bool)
        kept[self.order[:removed]] = False
        return kept


class GreedyFilterPruning:
    r"""
    CAR compression: greedy removal of a layer's filters by classification accuracy reduction.

    In each step the accuracy without each remaining filter is measured on the network as it is by
    then, and the filter whose removal leaves the highest accuracy goes. Equal accuracies are
    decided by the lower increase of the mean cross-entropy, then by the lower index. Ranking once
    instead misses that filters stand in for each other.

    Source: Abbasi-Asl and Yu: *Structural Compression of Convolutional Neural Networks with
    Applications in Interpretability*, Frontiers in Big Data 4 (2021),
    https://arxiv.org/abs/1705.07356.

    The batches' prefixes are recorded once and held in memory for all steps, so a step costs only
    what follows the layer. The model is not changed: filters are masked in the layer's output.

    Args:

        forward_func (Callable): The forward function of the model.
        layer (nn.Module or str): The layer, or its dotted name.
        channel_dim (int, optional): Axis of the filters, where it cannot be told from the layer.
                    Default: None

    Examples::

        >>> import torch
        >>> from captum_classfilters.networks import GreedyFilterPruning
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
        layer: nn.Module | str,
        channel_dim: int | None = None,
    ) -> None:
        self.forward_func = forward_func
        self.model = module_of(forward_func)
        self.layer = find_layer(self.model, layer) if isinstance(layer, str) else layer
        self.layer_name = layer_name(self.model, self.layer)
        self.channel_dim = channel_dim

    def run(
        self,
        dataloader: Iterable[Any],
        report_dataloader: Iterable[Any] | None = None,
        *,
        num_filters: int | None = None,
        ratio: float | None = None,
        min_accuracy: float | None = None,
        state_path: str | os.PathLike[str] | None = None,
        perturbations_per_eval: int | None = None,
        show_progress: bool = True,
    ) -> PruningOrder:
        r"""
        Remove filters until any of the bounds is reached.

        Args:

            dataloader (iterable): Batches of (inputs, labels) that choose the filters.
            report_dataloader (iterable, optional): Other batches to report the accuracy on; the
                        accuracy on the images that chose is too good.
                        Default: None
            num_filters (int, optional): Keep this many filters.
            ratio (float, optional): Stop when K over the number of filters left reaches this.
            min_accuracy (float, optional): Stop before the accuracy on ``dataloader`` falls below
                        this.
            state_path (str or path, optional): A JSON file written after every removal; if it
                        exists, the run continues from it.
            perturbations_per_eval (int, optional): Filters per replay. By default as many as a
                        memory budget allows.
            show_progress (bool): Show a progress bar over the removals.
                        Default: True

        Returns:
            *PruningOrder*.

        Raises:
            ValueError: No bound is given; a bound would remove every filter or lies above the
                        start; the loaders hold different classes; the state belongs to another
                        model or layer.
        """
        if num_filters is None and ratio is None and min_accuracy is None:
            raise ValueError("Give at least one of num_filters, ratio and min_accuracy.")
        with model_left_as_found(self.model, evaluation=True):
            images = self._recorded(dataloader, "dataloader")
            report = (
                [] if report_dataloader is None else self._recorded(report_dataloader, "report")
            )
            _check_classes(images, report)
            total = images[0][0].num_filters
            keep = _number_to_keep(total, num_filters, ratio)
            result = self._started(images, report, total, min_accuracy, state_path)
            with tqdm(
                total=total - keep,
                initial=len(result.order),
                desc=f"pruning {self.layer_name}",
                disable=not show_progress,
            ) as bar:
                while total - len(result.order) > keep:
                    if not self._step(result, images, report, min_accuracy, perturbations_per_eval):
                        break
                    _save(result, state_path)
                    bar.update()
        return result

    def _recorded(self, dataloader: Iterable[Any], name: str) -> list[tuple[SuffixReplay, Tensor]]:
        recorded = []
        for number, (inputs, labels) in enumerate(dataloader):
            images = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
            if not len(images[0]):
                continue
            replay = SuffixReplay(
                self.forward_func, self.layer, images, channel_dim=self.channel_dim
            )
            if replay.output.dim() != 2:
                raise ValueError(
                    f"The model puts out {tuple(replay.output.shape)}; accuracy needs (N, C)."
                )
            classes = replay.output.shape[1]
            truth = class_labels(labels, replay.num_images, classes, number)
            recorded.append((replay, truth.to(replay.output.device)))
        if not recorded:
            raise ValueError(f"The {name} loader is empty.")
        return recorded

    def _started(
        self,
        images: Sequence[tuple[SuffixReplay, Tensor]],
        report: Sequence[tuple[SuffixReplay, Tensor]],
        total: int,
        min_accuracy: float | None,
        state_path: str | os.PathLike[str] | None,
    ) -> PruningOrder:
        nothing = torch.zeros(1, total, dtype=torch.bool)
        print_of_model = fingerprint(self.model)
        start = _measure(images, nothing, 1)[0][0]
        if min_accuracy is not None and min_accuracy > start:
            raise ValueError(
                f"min_accuracy={min_accuracy} lies above the accuracy at the start, {start:.4f}."
            )
        if state_path is not None and Path(state_path).exists():
            state = PruningOrder(**json.loads(Path(state_path).read_text()))
            same = (state.layer, state.num_filters, state.model_sha256, state.accuracy[0])
            if same != (self.layer_name, total, print_of_model, start):
                raise ValueError(
                    f"{state_path} holds the state of another run: layer {state.layer!r} with "
                    f"{state.num_filters} filters; remove it, or continue with the same model, "
                    "layer and images."
                )
            return state
        return PruningOrder(
            layer=self.layer_name,
            num_filters=total,
            accuracy=[start],
            report_accuracy=[_measure(report, nothing, 1)[0][0]] if report else [],
            model_sha256=print_of_model,
        )

    @staticmethod
    def _step(
        result: PruningOrder,
        images: Sequence[tuple[SuffixReplay, Tensor]],
        report: Sequence[tuple[SuffixReplay, Tensor]],
        min_accuracy: float | None,
        at_once: int | None,
    ) -> bool:
        """Remove the next filter; False if that would break the accuracy bound."""
        kept = result.kept()
        candidates = kept.nonzero()[:, 0]
        removed = ~kept | (candidates[:, None] == torch.arange(result.num_filters))
        accuracy, loss = _measure(images, removed, at_once)
        # Highest accuracy, then lowest cross-entropy, then lowest index.
        best = min(range(len(candidates)), key=lambda one: (-accuracy[one], loss[one], one))
        if min_accuracy is not None and accuracy[best] < min_accuracy:
            return False
        result.order.append(int(candidates[best]))
        result.accuracy.append(accuracy[best])
        if report:
            result.report_accuracy.append(_measure(report, removed[best : best + 1], 1)[0][0])
        return True


def _measure(
    images: Sequence[tuple[SuffixReplay, Tensor]], removed: Tensor, at_once: int | None
) -> tuple[list[float], list[float]]:
    """Accuracy and mean cross-entropy without each set of filters (P, K)."""
    right = torch.zeros(len(removed), dtype=torch.int64)
    loss = torch.zeros(len(removed), dtype=torch.float64)
    number = 0
    for replay, labels in images:
        number += len(labels)
        size = replay.rows_per_replay(at_once)
        for start in range(0, len(removed), size):
            outputs = replay.outputs(removed[start : start + size], size)
            rows = slice(start, start + len(outputs))
            right[rows] += (outputs.argmax(2) == labels).sum(1).cpu()
            index = labels.expand(outputs.shape[:2])[..., None]
            loss[rows] -= outputs.double().log_softmax(2).gather(2, index).sum((1, 2)).cpu()
    return (right.double() / number).tolist(), (loss / number).tolist()


def _check_classes(
    images: Sequence[tuple[SuffixReplay, Tensor]], report: Sequence[tuple[SuffixReplay, Tensor]]
) -> None:
    if not report:
        return
    one, other = (
        set(torch.cat([labels for _, labels in part]).tolist()) for part in (images, report)
    )
    if one != other:
        raise ValueError(
            "The loaders hold different classes: "
            f"{sorted(one - other)} only among the images that choose, {sorted(other - one)} only "
            "among those that report."
        )


def _number_to_keep(total: int, num_filters: int | None, ratio: float | None) -> int:
    if num_filters is not None and not 1 <= num_filters <= total:
        raise ValueError(
            f"num_filters={num_filters}: expected 1 to {total}; a layer cannot lose every filter."
        )
    if ratio is not None and not 1 <= ratio <= total:
        raise ValueError(f"ratio={ratio}: expected 1 to {total}, the number of filters.")
    by_ratio = 1 if ratio is None else int(total / ratio)
    return max(1 if num_filters is None else num_filters, by_ratio, 1)


def _save(result: PruningOrder, path: str | os.PathLike[str] | None) -> None:
    """Write the state so that a kill at any moment leaves the old file or the new one."""
    if path is None:
        return
    target = Path(path)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=target.name)
    with os.fdopen(handle, "w") as file:
        json.dump(asdict(result), file)
    os.replace(temporary, target)
