"""The record of a pruning run."""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.tables import Table, Tabular, short_repr
from captum_classfilters._core.tensor_files import Schema, read_tensors, write_tensors
from captum_classfilters._core.types import JsonDict

_FILE = Schema(
    "pruning_order", "captum_classfilters.PruningOrder", 2, "PruningOrder", "record", nameless=True,
    checked_from=2,
)  # fmt: skip
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
        possible_evaluations (list of int): How many there would have been had every candidate seen
                    every image.
        model_sha256 (str or None): Fingerprint of the model.
        options (dict): The options of the run, by name.
        ways (dict of str to str): How outputs without filters of each layer were found: ``"closed
                    form"``, ``"replay"``, ``"whole model"``, or several of these for other batches.
        num_images (int): Images that chose the filters.
        start_loss (float or None): Mean cross-entropy of these before the first removal.
        images_sha256 (str or None): Fingerprint of these and their labels, whatever their order.
        report_images_sha256 (str or None): The same of the images kept for reporting.
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
    images_sha256: str | None = None
    report_images_sha256: str | None = None
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
        """Share of the evaluations that were spared, since the best candidate was known before."""
        possible = sum(self.possible_evaluations)
        return 1 - sum(self.evaluations) / possible if possible else 0.0

    def order_of(self, layer: str) -> list[int]:
        """The removed filters of one layer, in order."""
        self._check(layer)
        return [index for name, index in self.removed if name == layer]

    @arguments_checked
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
        """Write a safetensors file; one that exists is replaced only by a complete one.

        Args:

            path (path): Where to save.

        Raises:
            ValueError: The record's values cannot be meant, or the path is no regular file.
            OSError: The file cannot be written; nothing has changed.
        """
        _check(self)
        details = {name: value for name, value in vars(self).items() if name != "weights"}
        details["has_weights"] = self.weights is not None
        write_tensors(path, _FILE, self.weights or {}, details)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "PruningOrder":
        """
        Read a file of :meth:`save`.

        Args:

            path (path): The file.

        Returns:
            *PruningOrder*.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is damaged or another kind of file, or its values cannot be meant.
        """
        stored = read_tensors(path, _FILE)
        weights = stored.all_tensors() if stored.value("has_weights", bool) else None
        start_loss: object = stored.value("start_loss", object, None)
        order = cls(
            filters=stored.value("filters", dict),
            removed=[tuple(pair) for pair in stored.values("removed", list)],
            accuracy=stored.values("accuracy", float),
            report_accuracy=stored.values("report_accuracy", float),
            evaluations=stored.values("evaluations", int),
            possible_evaluations=stored.values("possible_evaluations", int),
            options=stored.value("options", dict),
            ways=stored.value("ways", dict, {}),
            num_images=stored.value("num_images", int, 0),
            start_loss=start_loss,  # type: ignore[arg-type]  # which `_check` sees to
            weights=weights,
            **{name: stored.value(name, object, None) for name in _FINGERPRINTS},  # type: ignore[arg-type]
        )
        with stored.building():
            _check(order)
        return order

    def differences(self, other: "PruningOrder", bounds: bool = True) -> list[str]:
        """How the start of this run differs from another's, in words; the numbers and accuracies
        at which to stop count on demand."""
        pairs: dict[str, tuple[object, object]] = {
            "layers": (self.filters, other.filters),
            "model": (self.model_sha256, other.model_sha256),
            "num_images": (self.num_images, other.num_images),
            **_images(self, other),
            "accuracy at the start": (self.accuracy[:1], other.accuracy[:1]),
            "accuracy of the images to report on": (
                self.report_accuracy[:1],
                other.report_accuracy[:1],
            ),
        }
        told = _told(pairs) + self.other_options(other.options, bounds)
        theirs, own = self.start_loss, other.start_loss
        if theirs is None or own is None or told:
            return told
        if not math.isclose(theirs, own, rel_tol=1e-4):
            told.append(f"images (a loss of {theirs:.6g} there, {own:.6g} here)")
        return told

    def other_options(self, options: Mapping[str, object], bounds: bool = True) -> list[str]:
        """Which options of this run differ from others, in words."""
        names = dict.fromkeys([*self.options, *options])
        pairs = {
            name: (self.options.get(name), options.get(name))
            for name in names
            if bounds or name not in BOUNDS
        }
        return _told(pairs)

    def _check(self, layer: str) -> None:
        if layer not in self.filters:
            raise ValueError(
                f"No filter of {layer!r} was up for removal, only of {', '.join(self.filters)}."
            )


_FINGERPRINTS = ("model_sha256", "images_sha256", "report_images_sha256")
_LARGEST = 2**53
_SHA256 = re.compile("[0-9a-f]{64}")


def _told(pairs: Mapping[str, tuple[object, object]]) -> list[str]:
    return [
        f"{name} ({before} there, {now} here)"
        for name, (before, now) in pairs.items()
        if json.dumps(before) != json.dumps(now)
    ]


def _images(theirs: PruningOrder, own: PruningOrder) -> dict[str, tuple[object, object]]:
    """Fingerprints of images that both runs know; earlier versions kept none."""
    pairs = {
        "images": (theirs.images_sha256, own.images_sha256),
        "images to report on": (theirs.report_images_sha256, own.report_images_sha256),
    }
    return {
        f"fingerprint of the {name}": (before[:12], now[:12])
        for name, (before, now) in pairs.items()
        if before is not None and now is not None
    }


def _check(order: PruningOrder) -> None:
    """Raise if a record cannot be one of a run."""
    if not all(isinstance(name, str) for name in order.filters) or not order.filters:
        raise ValueError(f"filters are {order.filters}; expected layers and numbers of filters.")
    _check_whole("filters", list(order.filters.values()), 1)
    _check_removals(order)
    steps = len(order.removed)
    for name in ("accuracy", "report_accuracy"):
        curve = getattr(order, name)
        _check_length(name, curve, steps + 1)
        if not all(_is_number(value) and 0 <= value <= 1 for value in curve):
            raise ValueError(f"{name} must lie in [0, 1].")
    for name in ("evaluations", "possible_evaluations"):
        _check_length(name, getattr(order, name), steps)
        _check_whole(name, getattr(order, name), 0)
    if any(
        done > possible
        for done, possible in zip(order.evaluations, order.possible_evaluations, strict=False)
    ):
        raise ValueError("There are more evaluations than possible.")
    _check_whole("num_images", [order.num_images], 0)
    if order.start_loss is not None and not (
        _is_number(order.start_loss) and order.start_loss >= 0
    ):
        raise ValueError(
            f"start_loss is {order.start_loss!r}; expected a number that is not negative."
        )
    for name in _FINGERPRINTS:
        value = getattr(order, name)
        if value is not None and not (isinstance(value, str) and _SHA256.fullmatch(value)):
            raise ValueError(f"{name} is {value!r}; expected 64 hexadecimal digits.")
    for layer, way in order.ways.items():
        if layer not in order.filters or not isinstance(way, str):
            raise ValueError(f"ways name {layer!r}: {way!r}, which is no layer and its way.")


def _check_removals(order: PruningOrder) -> None:
    seen = set()
    for pair in order.removed:
        layer, index = pair if len(pair) == 2 else (None, None)
        if not isinstance(layer, str) or layer not in order.filters:
            raise ValueError(f"{layer!r} was removed from, which is not among the layers.")
        if not _is_whole(index, 0) or index >= order.filters[layer]:
            raise ValueError(
                f"The filter {index!r} of {layer!r} was removed, which has {order.filters[layer]}."
            )
        if (layer, index) in seen:
            raise ValueError(f"The filter {index} of {layer!r} was removed twice.")
        seen.add((layer, index))


def _check_length(name: str, values: Sequence[object], expected: int) -> None:
    if len(values) not in (0, expected):
        raise ValueError(f"{name} has {len(values)} values; expected {expected}.")


def _check_whole(name: str, values: Sequence[object], least: int) -> None:
    if not all(_is_whole(value, least) for value in values):
        raise ValueError(f"{name} must hold whole numbers of at least {least}.")


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < _LARGEST


def _is_number(value: object) -> bool:
    return isinstance(value, float) or _is_whole(value, -_LARGEST)
