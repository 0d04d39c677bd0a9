"""The pages about one layer: what they say, in the words and numbers that the templates place."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from captum_classfilters._core.files import write_figure
from captum_classfilters._core.names import short_name
from captum_classfilters._core.types import JsonDict
from captum_classfilters.atlas.findings import (
    CONTRIBUTION,
    Answers,
    Compared,
    LayerFindings,
    num_parameters,
)
from captum_classfilters.atlas.pictures import (
    GAP,
    PATCH,
    ShownImages,
    num_patches,
    write_explained,
    write_image,
    write_map,
    write_strip,
)
from captum_classfilters.atlas.site import Site, slug
from captum_classfilters.identify.contrastive import FilterContrast
from captum_classfilters.metrics.removals import RANDOM
from captum_classfilters.visualize import plot_accuracy_curve, plot_filter_contrast
from captum_classfilters.visualize.arrays import by_class, chosen

#: What a template is given of one thing.
Entry: TypeAlias = JsonDict

_CONTRIBUTIONS = 8  # filters of an explained image
_NEIGHBORS = 6
_ERRORS_OF_A_CLASS = 5
_CLASSES_OF_A_FILTER = 12  # besides those that select it
_AT_ONCE = 16  # images that are explained in one batch
_MOST_CELLS, _FEWEST_COLUMNS = 300_000, 64  # of the overview's map, whose file stays small
_MOST_EXACT_ORDER = 300  # classes whose order is worth a cubic search
_DISCOVERY = 0.05


@dataclass(frozen=True)
class Optimized:
    """An image optimized for a filter, what the filter reaches on it, and whether it could be."""

    image: Tensor
    value: float
    has_gradient: bool


@dataclass(frozen=True)
class Shown:
    """What the pages of all layers share."""

    title: str
    model: nn.Module
    images: ShownImages
    answers: Answers
    labels: Mapping[int, str]
    same_images: bool
    num_images: int
    num_errors: int
    compared: Mapping[str, Compared] = field(default_factory=dict)


class LayerPages:
    r"""
    Writes what an atlas tells of a layer.

    Args:

        site (Site): Where to.
        folder (str): The layer's folder in it, empty or with a slash at its end.
        shown (Shown): What all layers share.
        findings (LayerFindings): What was found at the layer.
        optimized (mapping): Optimized images by filter.
    """

    def __init__(
        self,
        site: Site,
        folder: str,
        shown: Shown,
        findings: LayerFindings,
        optimized: Mapping[int, Optimized],
    ) -> None:
        self.site, self.folder, self.shown = site, folder, shown
        self.findings, self.table, self.optimized = findings, findings.table, optimized
        self.scores, self.selected = self.table.scores, self.table.selected
        self.counts, self.names = self.table.counts.tolist(), self.table.class_names
        self.errors, self.q_values = self.table.standard_errors, self.table.q_values
        self.overlap = self.table.overlap()
        self.classes = [index for index, count in enumerate(self.counts) if count]
        self.strips: dict[int, str] = {}
        self.explained: dict[int, Entry] = {}

    def write(self, show_progress: bool) -> None:
        """Write all pages of the layer."""
        num_filters = self.table.num_filters
        todo: list[tuple[str, Iterable[int], Callable[[int], None]]] = [
            ("patches", range(num_filters), self._strip),
            ("explained images", range(0, len(self._to_explain), _AT_ONCE), self._explain),
            ("pages of filters", range(num_filters), self._filter_page),
            ("pages of errors", range(len(self._cells)), self._error_page),
            ("pages of classes", range(len(self.classes)), self._class_page),
            ("pages of images", range(len(self._to_explain)), self._image_page),
        ]
        for what, items, do in todo:
            for item in tqdm(items, desc=what, disable=not show_progress):
                do(item)
        self._overview()

    # -- what is linked -------------------------------------------------------------------------

    def _page(self, name: str, template: str, **values: object) -> None:
        root = "../" * name.count("/")
        shared = {
            "title": self.shown.title,
            "layer": self.table.layer,
            "root": root,
            "several": bool(self.folder),
            "has_errors": bool(self._cells),
            "has_models": bool(self.shown.compared),
        }
        self.site.write(f"{self.folder}{name}", template, **shared, **values)

    def _picture(self, name: str) -> Path:
        return self.site.place(f"{self.folder}pictures", name)

    def _class(self, index: int) -> Entry:
        """A class's name, and its page where it has one."""
        name = self.names[index]
        href = f"classes/{slug(index, name)}.html" if self.counts[index] else ""
        return {"index": index, "name": name, "short": short_name(name), "href": href}

    def _filter(self, index: int) -> Entry:
        """A filter's number, page, label and patches."""
        return {
            "index": index,
            "href": f"filters/{index:04d}.html",
            "label": self.shown.labels.get(index, ""),
            "strip": self.strips.get(index, ""),
            "patches": num_patches(self.findings.exemplars, index),
            "width": num_patches(self.findings.exemplars, index) * (PATCH + GAP) - GAP,
            "height": PATCH,
        }

    def _cell(self, row: int, column: int) -> Entry:
        """What is known of a class and a filter."""
        score = float(self.scores[row, column])
        stability = self.findings.stability
        low, high = self._intervals[row, column].tolist()
        return {
            "score": score,
            "share": _share(score, self.scores[row]),
            "low": low,
            "high": high,
            "q": None if self.q_values is None else float(self.q_values[row, column]),
            "stability": None
            if stability is None
            else float(stability.selection_share[row, column]),
            "selected": bool(self.selected[row, column]),
        }

    @cached_property
    def _intervals(self) -> Tensor:
        return self.table.interval()

    # -- patches and filters --------------------------------------------------------------------

    def _strip(self, index: int) -> None:
        self.strips[index] = write_strip(
            self._picture, self.findings.exemplars, self.shown.images, index
        )

    def _filter_page(self, index: int) -> None:
        scores = self.scores[self.classes, index]
        order = scores.sort(descending=True, stable=True).indices.tolist()
        users = set(self._users(index))
        own = [self.classes[place] for place in order if self.classes[place] in users]
        others = [self.classes[place] for place in order if self.classes[place] not in users]
        rows = [
            {**self._class(row), **self._cell(row, index)}
            for row in own + others[:_CLASSES_OF_A_FILTER]
        ]
        norms = self.findings.weight_norms
        self._page(
            f"filters/{index:04d}.html",
            "filter.html",
            filter=self._filter(index),
            captions=self._captions(index),
            classes=rows,
            users=len(own),
            left_out=max(0, len(others) - _CLASSES_OF_A_FILTER),
            norm=None if norms is None else float(norms[index]),
            norm_rank=None if norms is None else int((norms > norms[index]).sum()) + 1,
            num_filters=self.table.num_filters,
            verdict=self._verdict(index, own),
            optimized=self._optimized_image(index),
            before=f"{index - 1:04d}.html" if index else "",
            after=f"{index + 1:04d}.html" if index + 1 < self.table.num_filters else "",
        )

    def _users(self, index: int) -> list[int]:
        """The classes that select a filter."""
        return [int(row) for row in self.selected[:, index].nonzero()[:, 0]]

    def _captions(self, index: int) -> list[Entry]:
        side = self.findings.exemplars.highest
        return [
            {
                "class": self._class(int(self.shown.answers.labels[side.image[index, place]])),
                "score": float(side.score[index, place]),
                "image": int(side.image[index, place]),
            }
            for place in range(num_patches(self.findings.exemplars, index))
        ]

    def _verdict(self, index: int, classes: Sequence[int]) -> str:
        """Whether the filter is more than chance for the classes that select it, in a sentence."""
        if not classes:
            return "No class selects this filter."
        parts = []
        if self.q_values is not None:
            found = int((self.q_values[classes, index] <= _DISCOVERY).sum())
            parts.append(
                f"it scores more than permuted labels explain (q at most {_DISCOVERY}) for {found} of the "
                f"{len(classes)} classes that select it"
            )
        if self.findings.stability is not None:
            share = self.findings.stability.selection_share[classes, index]
            parts.append(
                f"both halves of the images select it for {int((share == 1).sum())} of {len(classes)}"
            )
        text = "; ".join(parts)
        return f"{text[:1].upper()}{text[1:]}." if text else ""

    def _optimized_image(self, index: int) -> Entry | None:
        found = self.optimized.get(index)
        if found is None:
            return None
        name = write_image(self._picture(f"optimized-{index:04d}.png"), found.image)
        return {"src": f"pictures/{name}", "value": found.value, "done": found.has_gradient}

    # -- explained images -----------------------------------------------------------------------

    @cached_property
    def _cells(self) -> list[tuple[int, int]]:
        return self.findings.errors.largest(self.shown.num_errors)

    @cached_property
    def _to_explain(self) -> list[int]:
        """Right and wrong answers of each class, and those of the largest cells."""
        answers, most = self.shown.answers, self.shown.num_images
        images = [
            image
            for index in self.classes
            for right in (True, False)
            for image in answers.of_class(index, right, most)
        ]
        for true, predicted in self._cells:
            images += answers.of_cell(true, predicted, most)
        return [image for image in dict.fromkeys(images) if self._targets(image)]

    def _targets(self, image: int) -> list[int]:
        """The classes that an image can be explained for, those with filters: the model's answer, then the
        image's own."""
        answers = self.shown.answers
        classes = (int(answers.predicted[image]), int(answers.labels[image]))
        return [index for index in classes if bool(self.selected[index].any())]

    def _explain(self, start: int) -> None:
        indices = self._to_explain[start : start + _AT_ONCE]
        targets = [self._targets(image)[0] for image in indices]
        scores = write_explained(
            self._picture,
            self.shown.model,
            self.table,
            self.shown.images,
            indices,
            targets,
            channels_last=self.shown.answers.channels_last,
        )
        for place, image in enumerate(indices):
            self.explained[image] = self._explained_image(image, scores[place])

    def _explained_image(self, image: int, scores: Tensor) -> Entry:
        answers = self.shown.answers
        true, predicted = int(answers.labels[image]), int(answers.predicted[image])
        target = self._targets(image)[0]
        order = scores.sort(descending=True, stable=True).indices[:_CONTRIBUTIONS].tolist()
        return {
            "image": image,
            "href": f"images/{image:06d}.html",
            "src": f"pictures/{image}.png",
            "true": self._class(true),
            "predicted": self._class(predicted),
            "target": self._class(target),
            "right": true == predicted,
            "probability": float(answers.probability[image]),
            "filters": [
                {
                    **self._filter(index),
                    "contribution": float(scores[index]),
                    "share": _share(float(scores[index]), scores),
                    "own": bool(self.selected[target, index]),
                }
                for index in order
            ],
        }

    def _image_page(self, place: int) -> None:
        pages = self._to_explain
        self._page(
            f"images/{pages[place]:06d}.html",
            "image.html",
            explained=self.explained[pages[place]],
            before=f"{pages[place - 1]:06d}.html" if place else "",
            after=f"{pages[place + 1]:06d}.html" if place + 1 < len(pages) else "",
        )

    def _some(self, images: Sequence[int]) -> list[Entry]:
        return [self.explained[image] for image in images if image in self.explained]

    # -- errors ---------------------------------------------------------------------------------

    def _error(self, cell: tuple[int, int]) -> Entry:
        true, predicted = cell
        return {
            "true": self._class(true),
            "predicted": self._class(predicted),
            "count": int(self.findings.errors.confusion[true, predicted]),
            "href": f"errors/{true:04d}-{predicted:04d}.html" if cell in self._cells else "",
        }

    def _error_page(self, place: int) -> None:
        true, predicted = cell = self._cells[place]
        contrast = self.findings.errors.cells[cell]
        name = f"pictures/error-{true:04d}-{predicted:04d}.svg"
        figure, _ = plot_filter_contrast(contrast, title="")
        write_figure(self.site.place(f"{self.folder}{name}"), figure)
        pages = [f"{row:04d}-{column:04d}.html" for row, column in self._cells]
        few = min(5, self.table.num_filters)
        self._page(
            f"errors/{true:04d}-{predicted:04d}.html",
            "error.html",
            error=self._error(cell),
            margin=contrast.margin,
            picture=name,
            driving=self._contrasted(contrast, contrast.strongest(few)),
            opposing=self._contrasted(contrast, contrast.opposing(few)),
            images=self._some(
                self.shown.answers.of_cell(true, predicted, max(1, self.shown.num_images))
            ),
            before=pages[place - 1] if place else "",
            after=pages[place + 1] if place + 1 < len(pages) else "",
        )

    def _contrasted(self, contrast: FilterContrast, filters: Tensor) -> list[Entry]:
        interval = contrast.interval()
        return [
            {
                **self._filter(index),
                "score": float(contrast.scores[index]),
                "share": _share(float(contrast.scores[index]), contrast.scores),
                "low": float(interval[index, 0]),
                "high": float(interval[index, 1]),
            }
            for index in filters.tolist()
        ]

    # -- classes --------------------------------------------------------------------------------

    def _class_page(self, place: int) -> None:
        index = self.classes[place]
        filters = [
            {**self._filter(column), **self._cell(index, column)}
            for column in self.table.filters_of(index).tolist()
        ]
        answers, most = self.shown.answers, self.shown.num_images
        own = self._class(index)
        self._page(
            own["href"],
            "class.html",
            own=own,
            count=self.counts[index],
            recall=self._recall(index),
            tested=int(self.findings.errors.confusion[index].sum()),
            filters=filters,
            neighbors=self._neighbors(index),
            curve=list(self._curve(index)),
            right=self._some(answers.of_class(index, True, most)),
            wrong=self._some(answers.of_class(index, False, most)),
            errors=self._errors_of(index),
            before=self._class_file(place - 1),
            after=self._class_file(place + 1),
        )

    def _class_file(self, place: int) -> str:
        if not 0 <= place < len(self.classes):
            return ""
        return str(self._class(self.classes[place])["href"]).partition("/")[2]

    @property
    def _accuracy(self) -> float:
        confusion = self.findings.errors.confusion
        return float(confusion.diagonal().sum() / confusion.sum())

    def _recall(self, index: int) -> float | None:
        row = self.findings.errors.confusion[index]
        return float(row[index] / row.sum()) if int(row.sum()) else None

    def _neighbors(self, index: int) -> list[Entry]:
        shared = self.overlap.count[index].clone()
        shared[index] = 0
        order = shared.sort(descending=True, stable=True).indices[:_NEIGHBORS].tolist()
        return [
            {
                **self._class(other),
                "shared": int(shared[other]),
                "filters": [
                    self._filter(column)
                    for column in (self.selected[index] & self.selected[other])
                    .nonzero()[:, 0]
                    .tolist()
                ],
            }
            for other in order
            if shared[other]
        ]

    def _curve(self, index: int) -> Iterator[Entry]:
        """How the class fares without its first filters and with them alone, beside random ones."""
        curves = self.findings.class_curves
        if curves is None or not int(curves.counts[index]):
            return
        most = max(4 * int(self.selected[index].sum()), 1)
        for place, number in enumerate(curves.num_filters):
            if not 0 < number <= most:  # the curves have the other end, too
                continue
            yield {
                "number": number,
                "without": float(curves.necessity[CONTRIBUTION][place, index]),
                "without_random": float(curves.necessity[RANDOM][place, index]),
                "alone": float(curves.sufficiency[CONTRIBUTION][place, index]),
                "alone_random": float(curves.sufficiency[RANDOM][place, index]),
            }

    def _errors_of(self, index: int) -> list[Entry]:
        row = self.findings.errors.confusion[index].clone()
        row[index] = 0
        order = row.sort(descending=True, stable=True).indices[:_ERRORS_OF_A_CLASS]
        return [self._error((index, int(other))) for other in order if row[other]]

    # -- overviews ------------------------------------------------------------------------------

    def _overview(self) -> None:
        confusion = self.findings.errors.confusion
        self._page(
            "index.html",
            "overview.html",
            accuracy=self._accuracy,
            num_tested=int(confusion.sum()),
            num_found=sum(self.counts),
            num_filters=self.table.num_filters,
            num_outputs=self.table.num_classes,
            exact=self.table.provenance.get("exact"),
            same_images=self.shown.same_images,
            notes=self.findings.notes,
            map=self._map(),
            curve=self._accuracy_picture(),
            classes=[self._class_row(index) for index in self.classes],
            errors=[self._error(cell) for cell in self._cells],
        )
        self._page(
            "filters.html",
            "filters.html",
            filters=[self._filter_row(index) for index in range(self.table.num_filters)],
            has_labels=bool(self.shown.labels),
        )
        if self._cells:
            errors = [self._error(cell) for cell in self._cells]
            self._page("errors.html", "errors.html", errors=errors)
        if self.shown.compared:
            self._models_page()

    def _map(self) -> Entry:
        """Classes by filters, both in an order that brings alike ones together."""
        rows = clustered(self.scores[self.classes])
        classes = [self.classes[row] for row in rows]
        scores = self.scores[classes]
        most = max(_FEWEST_COLUMNS, _MOST_CELLS // len(classes))
        columns = chosen(most, scores.abs().amax(0), "filters")
        columns = columns[by_class(scores[:, columns])]
        cells = self.scores[classes][:, columns]
        name = write_map(
            self._picture("scores.png"),
            cells,
            self.selected[classes][:, columns],
        )
        entries = [self._class(index) for index in classes]
        return {
            "src": f"pictures/{name}",
            "rows": len(classes),
            "columns": len(columns),
            "data": {
                "classes": [[entry["short"], entry["href"]] for entry in entries],
                "filters": columns.tolist(),
                "labels": {str(k): text for k, text in self.shown.labels.items()},
            },
        }

    def _accuracy_picture(self) -> Entry | None:
        curve = self.findings.curve
        if curve is None:
            return None
        name = "pictures/accuracy.svg"
        figure, _ = plot_accuracy_curve(curve)
        write_figure(self.site.place(f"{self.folder}{name}"), figure)
        accuracy = curve.accuracy[CONTRIBUTION]
        return {
            "src": name,
            "full": curve.full_accuracy,
            "rows": [
                {"number": number, "own": accuracy[place], "random": curve.random_mean[place]}
                for place, number in enumerate(curve.num_filters)
            ],
        }

    def _class_row(self, index: int) -> Entry:
        filters = self.table.filters_of(index).tolist()
        wrong = self._errors_of(index)
        return {
            **self._class(index),
            "count": self.counts[index],
            "recall": self._recall(index),
            "filters": [self._filter(column) for column in filters[:5]],
            "more": max(0, len(filters) - 5),
            "taken_for": wrong[0]["predicted"] if wrong else None,
        }

    def _filter_row(self, index: int) -> Entry:
        scores = self.scores[:, index].nan_to_num(nan=-torch.inf)
        best = int(scores.argmax())
        norms, q_values = self.findings.weight_norms, self.q_values
        return {
            **self._filter(index),
            "users": len(self._users(index)),
            "best": self._class(best),
            "score": float(scores[best]),
            "q": None if q_values is None else float(q_values[best, index]),
            "norm": None if norms is None else float(norms[index]),
        }

    def _models_page(self) -> None:
        tables = {}
        models = [
            {
                "name": "this model",
                "accuracy": self._accuracy,
                "size": num_parameters(self.shown.model),
                "shared": None,
            }
        ]
        for name, other in self.shown.compared.items():
            table = other.tables.get(self.table.layer)
            same = table is not None and table.scores.shape == self.scores.shape
            tables[name] = (
                self.table.agreement(table).overlap if table is not None and same else None
            )
            shared = tables[name]
            models.append(
                {
                    "name": name,
                    "accuracy": other.scores.accuracy,
                    "size": other.num_parameters,
                    "shared": None if shared is None else float(shared.nanmean()),
                }
            )
        rows = [
            {
                **self._class(index),
                "recall": self._recall(index),
                "others": [
                    {
                        "recall": float(other.scores.recall[index]),
                        "shared": None
                        if (shared := tables[name]) is None
                        else float(shared[index]),
                    }
                    for name, other in self.shown.compared.items()
                ],
            }
            for index in self.classes
        ]
        self._page("models.html", "models.html", models=models, classes=rows)


def _share(score: float, scores: Tensor) -> float:
    """How large a score is in per cent of the largest among some: the length of its bar."""
    return round(100 * abs(score) / (float(scores.abs().max()) or 1.0), 1)


def clustered(scores: Tensor) -> list[int]:
    r"""
    An order of classes that brings together those with alike scores, by average linkage.

    Args:

        scores (Tensor): Shape (C, K), finite.

    Returns:
        *list* of the C rows.
    """
    from scipy.cluster.hierarchy import leaves_list, linkage

    if len(scores) < 3:
        return list(range(len(scores)))
    lengths = scores.norm(dim=1, keepdim=True)
    directions = (scores / lengths.where(lengths > 0, torch.ones_like(lengths))).numpy()
    tree = linkage(
        directions.astype(np.float64),
        "average",
        optimal_ordering=len(scores) <= _MOST_EXACT_ORDER,
    )
    return [int(row) for row in leaves_list(tree)]
