"""What an atlas tells of a model: measured here by the library's own functions, and nowhere else."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from captum.attr import LayerAttribution
from torch import Tensor, nn
from torch.utils.data import RandomSampler

from captum_classfilters._core.batches import check_read_again, read_batches
from captum_classfilters._core.layers import find_layer, named_layers
from captum_classfilters._core.score_reader import ScoreReader
from captum_classfilters._core.types import ClassNames, Dataloader, Keywords
from captum_classfilters.attr import LayerFilterContribution, LayerFilterFrequency
from captum_classfilters.class_filters import ClassFilters
from captum_classfilters.heads import accuracy_curve
from captum_classfilters.heads.accuracy_curve import AccuracyCurve
from captum_classfilters.identify import (
    LabelPermutation,
    collect_evidence,
    confusion_filters,
    exemplars,
    identify_class_filters,
)
from captum_classfilters.identify.contrastive import ConfusionFilters
from captum_classfilters.identify.evidence import Evidence, Stability
from captum_classfilters.identify.exemplars import Exemplars
from captum_classfilters.metrics import class_curves, evaluate_classifier
from captum_classfilters.metrics.class_curves import ClassCurves
from captum_classfilters.metrics.evaluate_classifier import ClassifierScores
from captum_classfilters.metrics.removals import weight_magnitudes

Measured = TypeVar("Measured")
CONTRIBUTION, FREQUENCY = "contribution", "frequency"
_REPETITIONS = 3  # of random filters; each may cost a pass over the data


@dataclass(frozen=True)
class Answers:
    r"""
    What a model says of each image of a loader.

    Args:

        labels (Tensor): Shape (N,).
        predicted (Tensor): Shape (N,).
        probability (Tensor): Shape (N,), of the predicted class.
        channels_last (bool): Whether all batches of images lay in memory that way.
    """

    labels: Tensor
    predicted: Tensor
    probability: Tensor
    channels_last: bool = False

    def of_class(self, index: int, right: bool, most: int) -> list[int]:
        """The images of a class that are right, or wrong, the surest first."""
        chosen = (self.labels == index) & ((self.predicted == index) == right)
        return self._surest(chosen, most)

    def of_cell(self, true: int, predicted: int, most: int) -> list[int]:
        """The images of one class that are taken for another, the surest first."""
        return self._surest((self.labels == true) & (self.predicted == predicted), most)

    def _surest(self, chosen: Tensor, most: int) -> list[int]:
        places = chosen.nonzero()[:, 0]
        order = self.probability[places].sort(descending=True, stable=True).indices
        return [int(place) for place in places[order][:most]]


@dataclass(frozen=True)
class LayerFindings:
    r"""
    What was found at one layer.

    Args:

        table (ClassFilters): Contributions, with a selection, standard errors and q-values.
        curve (AccuracyCurve or None): None where the layer does not feed a linear head.
        class_curves (ClassCurves or None): None where the filters cannot be removed.
        stability (Stability or None): None where a class has a single image.
        errors (ConfusionFilters): The filters behind the errors.
        exemplars (Exemplars): The images that drive each filter furthest.
        weight_norms (Tensor or None): Shape (K,).
        notes (tuple of str): Why something is missing.
    """

    table: ClassFilters
    curve: AccuracyCurve | None
    class_curves: ClassCurves | None
    stability: Stability | None
    errors: ConfusionFilters
    exemplars: Exemplars
    weight_norms: Tensor | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Compared:
    """Another model beside the one of the atlas; the tables of layers that it has, too."""

    scores: ClassifierScores
    num_parameters: int
    tables: dict[str, ClassFilters]


@dataclass(frozen=True)
class Survey:
    r"""
    How an atlas reads its model and its data.

    Args:

        model (nn.Module): The model.
        dataloader (iterable): Where the filters are found.
        test_dataloader (iterable): Where they are measured, and what is drawn.
        options (mapping): ``unpack`` and ``show_progress`` of every pass.
        seed (int): Of everything random.
    """

    model: nn.Module
    dataloader: Dataloader
    test_dataloader: Dataloader
    options: Keywords
    seed: int

    def __post_init__(self) -> None:
        check_read_again(self.dataloader)
        check_read_again(self.test_dataloader)
        if isinstance(getattr(self.test_dataloader, "sampler", None), RandomSampler):
            raise ValueError(
                "The loader whose images the atlas shows shuffles, so that they cannot be found again; "
                "pass one made with shuffle=False as test_dataloader."
            )

    def layers(
        self,
        names: Sequence[str],
        *,
        num_filters: int,
        num_exemplars: int,
        class_names: ClassNames | None,
        significance: bool | LabelPermutation,
    ) -> dict[str, LayerFindings]:
        """All that is told of each layer."""
        found = self._tables(self.model, names, num_filters, class_names, significance)
        methods = {name: LayerFilterContribution(self.model, name) for name in names}
        evidence = collect_evidence(
            methods,
            self.dataloader,
            class_names=class_names,
            **self.options,
        )
        strongest = exemplars(
            self.model,
            list(names),
            self.test_dataloader,
            num_exemplars=num_exemplars,
            **self.options,
        )
        return {
            name: self._layer(name, found[name], evidence[name], strongest[name]) for name in names
        }

    def _tables(
        self,
        model: nn.Module,
        names: Sequence[str],
        num_filters: int,
        class_names: ClassNames | None,
        significance: bool | LabelPermutation,
    ) -> dict[str, dict[str, ClassFilters]]:
        """Of each layer the tables of both rules, in one pass."""
        methods: dict[str, LayerAttribution] = {}
        for name in names:
            methods[f"{name} {CONTRIBUTION}"] = LayerFilterContribution(model, name)
            methods[f"{name} {FREQUENCY}"] = LayerFilterFrequency(model, name, top_k=num_filters)
        tables = identify_class_filters(
            methods,
            self.dataloader,
            num_filters=num_filters,
            class_names=class_names,
            significance=LabelPermutation(seed=self.seed) if significance is True else significance,
            **self.options,
        )
        rules = (CONTRIBUTION, FREQUENCY)
        return {name: {rule: tables[f"{name} {rule}"] for rule in rules} for name in names}

    def _layer(
        self, name: str, tables: dict[str, ClassFilters], evidence: Evidence, strongest: Exemplars
    ) -> LayerFindings:
        table, notes = tables[CONTRIBUTION], list[str]()

        norms = weight_magnitudes(self.model, find_layer(self.model, name), table.num_filters)

        def unless_refused(what: str, measure: Callable[[], Measured]) -> Measured | None:
            try:
                return measure()
            except ValueError as error:
                notes.append(f"{what} is missing: {error}")
                return None

        sizes = sorted({k for k in (1, 2, 5, 10, 20, 50) if k < table.num_filters})
        loader, num_filters = self.test_dataloader, int(table.selected.sum(1).max())
        curve = unless_refused(
            "Accuracy against the number of filters",
            lambda: accuracy_curve(
                self.model,
                tables,
                loader,
                num_filters=[*sizes, table.num_filters],
                repetitions=_REPETITIONS,
                seed=self.seed,
                **self.options,
            ),
        )
        few = sorted({1, num_filters, min(4 * num_filters, table.num_filters)})
        curves = unless_refused(
            "Necessity and sufficiency",
            lambda: class_curves(
                self.model,
                name,
                {CONTRIBUTION: table},
                loader,
                num_filters=few,
                repetitions=_REPETITIONS,
                # A control that the pages do not show, of layers that have it.
                weight_magnitude=torch.zeros(table.num_filters) if norms is None else norms,
                seed=self.seed,
                **self.options,
            ),
        )
        stability = unless_refused(
            "Stability", lambda: evidence.stability(num_filters, seed=self.seed)
        )
        errors = confusion_filters(
            LayerFilterContribution(self.model, name),
            loader,
            class_names=table.class_names,
            **self.options,
        )
        return LayerFindings(
            table, curve, curves, stability, errors, strongest, norms, tuple(notes)
        )

    def answers(self) -> Answers:
        """What the model says of each image that may be shown."""
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        channels_last = True
        with read_batches(self.model, self.test_dataloader, "answers", **self.options) as batches:
            reader = ScoreReader(self.model, batches)
            for batch in batches:
                scores = reader.log_probabilities(batch, self.model(*batch.inputs))
                reader.check_finite(batch, scores)
                best, predicted = scores.max(1)
                labels = batch.class_labels(scores.shape[1])
                parts.append((labels.cpu(), predicted.cpu(), best.exp().cpu()))
                channels_last &= _in_channels_last(batch.inputs[0])
        labels, predicted, probability = (torch.cat(part) for part in zip(*parts, strict=True))
        return Answers(labels, predicted, probability, channels_last)

    def compared(
        self, model: nn.Module, tables: Mapping[str, ClassFilters], num_filters: int
    ) -> Compared:
        """Another model on the same images, and its filters at the layers that it has, too."""
        own = named_layers(model)
        names = [name for name in tables if name in own]
        class_names = next(iter(tables.values())).class_names
        found = self._tables(model, names, num_filters, class_names, False) if names else {}
        return Compared(
            evaluate_classifier(model, self.test_dataloader, **self.options),
            num_parameters(model),
            {name: found[name][CONTRIBUTION] for name in names},
        )


def _in_channels_last(images: Tensor) -> bool:
    return images.dim() == 4 and images.is_contiguous(memory_format=torch.channels_last)


def num_parameters(model: nn.Module) -> int:
    """How many numbers a model has learned."""
    return sum(parameter.numel() for parameter in model.parameters())
