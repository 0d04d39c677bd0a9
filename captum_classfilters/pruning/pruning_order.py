"""The record of a pruning run."""

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from captum_classfilters._core.files import write_atomically
from captum_classfilters._core.tables import Table, Tabular, short_repr
from captum_classfilters._core.types import JsonDict

_KEY = "pruning_order"
BOUNDS = ("num_filters", "ratio", "min_accuracy")


@short_repr
@dataclass
class PruningOrder(Tabular):
    r"""
    The order in which filters were removed, and the accuracy on the way; prints as a table.

    Args:

        filters (dict of str to int): K of each layer, by the layer's dotted name.
        removed (list of (str, int)): Layer and filter of each removal, in order.
        accuracy (list of float): Accuracy before the first removal and after each, on the images
                    that chose the filters; after fine-tuning where there is any.
        report_accuracy (list of float): The same on the images kept for reporting; empty without
                    these.
        evaluations (list of int): For each removal, how many images were run without a candidate.
        possible_evaluations (list of int): How many there would have been without early stopping.
        model_sha256 (str or None): Fingerprint of the model.
        options (dict): The options of the run, by name.
        ways (dict of str to str): How outputs without filters of each layer were found: ``"closed
                    form"``, ``"replay"``, ``"whole model"``, or several of these for other batches.
        num_images (int): Images that chose the filters.
        start_loss (float or None): Mean cross-entropy of these before the first removal.
        weights (dict of str to Tensor or None): State of the fine-tuned network; None without
                    fine-tuning.
    """

    filters: dict[str, int]
    removed: list[tuple[str, int]] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    report_accuracy: list[float] = field(default_factory=list)
    evaluations: list[int] = field(default_factory=list)
    possible_evaluations: list[int] = field(default_factory=list)
    model_sha256: str | None = None
    options: JsonDict = field(default_factory=dict)
    ways: dict[str, str] = field(default_factory=dict)
    num_images: int = 0
    start_loss: float | None = None
    weights: dict[str, Tensor] | None = field(default=None, compare=False, repr=False)

    def _tables(self) -> list[Table]:
        rows = [
            {
                "layer": name,
                "filters": total,
                "left": total - len(self.order_of(name)),
                "without filters by": self.ways.get(name, ""),
            }
            for name, total in self.filters.items()
        ]
        curves = {"accuracy": self.accuracy, "accuracy reported": self.report_accuracy}
        told = [
            f"{name} {curve[0]:.4f} -> {curve[-1]:.4f}" for name, curve in curves.items() if curve
        ]
        return [Table(rows, title="; ".join(told))]

    @property
    def layer(self) -> str:
        """Dotted name of the layer, where there is one."""
        if len(self.filters) != 1:
            raise ValueError(
                f"Filters of {len(self.filters)} layers were removed: {', '.join(self.filters)}; "
                "name one."
            )
        return next(iter(self.filters))

    @property
    def num_filters(self) -> int:
        """K of the layer, where there is one."""
        return self.filters[self.layer]

    @property
    def order(self) -> list[int]:
        """The removed filters of the layer, where there is one."""
        return self.order_of(self.layer)

    @property
    def saving(self) -> float:
        """Share of the evaluations that early stopping spared."""
        possible = sum(self.possible_evaluations)
        return 1 - sum(self.evaluations) / possible if possible else 0.0

    def order_of(self, layer: str) -> list[int]:
        """The removed filters of one layer, in order."""
        self._check(layer)
        return [index for name, index in self.removed if name == layer]

    def kept(self, num_filters: int | None = None, layer: str | None = None) -> Tensor:
        """Which filters of a layer are left.

        Args:

            num_filters (int, optional): When so many of them were left; by default after all
                        removals.
            layer (str, optional): The layer; may be left out where there is one.

        Returns:
            *Tensor* of shape (K,), bool.

        Raises:
            ValueError: The order does not reach that far, or has no such layer.
        """
        name = self.layer if layer is None else layer
        order, total = self.order_of(name), self.filters[name]
        removed = len(order) if num_filters is None else total - num_filters
        if not 0 <= removed <= len(order):
            raise ValueError(
                f"num_filters={num_filters}: the order leaves {total - len(order)} to {total} "
                "filters."
            )
        kept = torch.ones(total, dtype=torch.bool)
        kept[order[:removed]] = False
        return kept

    def masks(self) -> dict[str, Tensor]:
        """Which filters of each layer are left, as :func:`masked_filters` takes it."""
        return {name: self.kept(layer=name) for name in self.filters}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file; one that exists is replaced only by a complete one."""
        record = {
            name: value for name, value in vars(self).items() if name not in ("weights", "removed")
        } | {
            "removed": [list(removal) for removal in self.removed],
            "has_weights": self.weights is not None,
        }
        tensors = {name: value.contiguous() for name, value in (self.weights or {}).items()}
        write_atomically(Path(path), save(tensors, metadata={_KEY: json.dumps(record)}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "PruningOrder":
        """
        Read a file of :meth:`save`.

        Raises:
            ValueError: It is another kind of file.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            record = json.loads(metadata[_KEY])
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{path} is not a file of a pruning run.") from error
        weights = tensors if record.pop("has_weights") else None
        removed = [(name, index) for name, index in record.pop("removed")]
        return cls(**record, removed=removed, weights=weights)

    def differences(self, other: "PruningOrder", bounds: bool = True) -> list[str]:
        """How the start of this run differs from another's, in words; the numbers and accuracies
        at which to stop count on demand."""
        pairs = {
            "layers": (self.filters, other.filters),
            "model": (self.model_sha256, other.model_sha256),
            "num_images": (self.num_images, other.num_images),
            "accuracy at the start": (self.accuracy[:1], other.accuracy[:1]),
            "accuracy of the images to report on": (
                self.report_accuracy[:1],
                other.report_accuracy[:1],
            ),
        }
        for name in dict.fromkeys([*self.options, *other.options]):
            if bounds or name not in BOUNDS:
                pairs[name] = (self.options.get(name), other.options.get(name))
        told = [
            f"{name} ({before} there, {now} here)"
            for name, (before, now) in pairs.items()
            if json.dumps(before) != json.dumps(now)
        ]
        theirs, own = self.start_loss, other.start_loss
        if theirs is None or own is None or told:
            return told
        if not math.isclose(theirs, own, rel_tol=1e-4):
            told.append(f"images (a loss of {theirs:.6g} there, {own:.6g} here)")
        return told

    def _check(self, layer: str) -> None:
        if layer not in self.filters:
            raise ValueError(
                f"No filter of {layer!r} was up for removal, only of {', '.join(self.filters)}."
            )
