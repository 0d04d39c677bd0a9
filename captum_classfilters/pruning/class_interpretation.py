"""What a filter is for: the classes that lose most and least without it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.tables import Row, Table, Tabular, import_pandas, short_repr
from captum_classfilters.identify.accuracy_reduction import AccuracyReduction

if TYPE_CHECKING:
    import pandas


@short_repr
@dataclass(frozen=True)
class ClassEffect:
    """What one class loses without a filter.

    Args:

        name (str): The class.
        reduction (float): Its accuracy reduction; negative if removal helps it.
        low (float): Lower end of the reduction's interval.
        high (float): Upper end.
        probability_drop (float): Mean drop of the class's probability, which has no ties.
        images (int): Images of the class.
    """

    name: str
    reduction: float
    low: float
    high: float
    probability_drop: float
    images: int

    @property
    def certain(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


@short_repr
@dataclass(frozen=True)
class FilterInterpretation(Tabular):
    """A filter by the classes that it matters most and least for.

    Args:

        filter (int): Index of the filter.
        reduction (float): Its accuracy reduction over all images.
        top (tuple of ClassEffect): The classes that lose most, first the most.
        bottom (tuple of ClassEffect): The classes that lose least or gain, first the least.
    """

    filter: int
    reduction: float
    top: tuple[ClassEffect, ...]
    bottom: tuple[ClassEffect, ...]

    def _tables(self) -> list[Table]:
        rows: list[Row] = [
            {
                "loses": end,
                "class": effect.name,
                "accuracy reduction": effect.reduction,
                "low": effect.low,
                "high": effect.high,
                "images": effect.images,
            }
            for end, effects in (("most", self.top), ("least", self.bottom))
            for effect in effects
        ]
        bars = ("accuracy reduction",)
        formats = dict.fromkeys(("accuracy reduction", "low", "high"), "+.3f")
        title = f"without filter {self.filter} (all images {self.reduction:+.4f})"
        return [Table(rows, formats, title, bars=bars)]


@arguments_checked
def class_interpretation(
    reduction: AccuracyReduction, num_classes: int = 5, confidence: float = 0.95
) -> list[FilterInterpretation]:
    r"""
    For each filter the classes whose accuracy falls most and least without it, with intervals.

    Classes of equal reduction, which are many where a class has few images, are ordered by the drop
    of their mean probability. Classes without images are left out.

    Args:

        reduction (AccuracyReduction): From ``LayerFilterAblation(...).identify(loader,
                    metric="accuracy")``.
        num_classes (int): How many at each end; fewer if there are not so many classes.
                    Default: 5
        confidence (float): Coverage of the intervals.
                    Default: 0.95

    Returns:
        *list of FilterInterpretation*, one for each filter.

    Raises:
        ValueError: A number is out of range.

    Examples::

        >>> import torch
        >>> from captum_classfilters import LayerFilterAblation
        >>> from captum_classfilters.pruning import class_interpretation
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        ...     torch.nn.Flatten(), torch.nn.Linear(8, 2))
        >>> data = [(torch.rand(4, 3, 6, 6), torch.tensor([0, 1, 1, 0]))]
        >>> car = LayerFilterAblation(net, net[1]).identify(
        ...     data, metric="accuracy", show_progress=False)
        >>> first = class_interpretation(car, num_classes=1)[0]
        >>> sorted([first.top[0].name, first.bottom[0].name])
        ['0', '1']
    """
    if num_classes < 1:
        raise ValueError(f"num_classes={num_classes} must be at least 1.")
    intervals = reduction.class_interval(confidence)
    values, soft = reduction.class_reduction, reduction.probability_drop
    seen = (reduction.counts > 0).nonzero()[:, 0].tolist()

    def effect(row: int, column: int) -> ClassEffect:
        low, high = intervals[row, column].tolist()
        return ClassEffect(
            name=reduction.class_names[row],
            reduction=float(values[row, column]),
            low=low,
            high=high,
            probability_drop=float(soft[row, column]),
            images=int(reduction.counts[row]),
        )

    interpretations = []
    for column, overall in enumerate(reduction.reduction.tolist()):
        order = sorted(
            seen, key=lambda row: (-float(values[row, column]), -float(soft[row, column]), row)
        )
        interpretations.append(
            FilterInterpretation(
                filter=column,
                reduction=overall,
                top=tuple(effect(row, column) for row in order[:num_classes]),
                bottom=tuple(effect(row, column) for row in order[::-1][:num_classes]),
            )
        )
    return interpretations


def interpretation_table(interpretations: list[FilterInterpretation]) -> "pandas.DataFrame":
    """Interpretations as one row for each filter, end and class.

    Args:

        interpretations (list of FilterInterpretation): From :func:`class_interpretation`.

    Returns:
        *pandas.DataFrame*. Needs the extra ``pandas``.
    """
    rows = [
        {"filter": filter_.filter, "end": end, "place": place, **vars(effect)}
        for filter_ in interpretations
        for end, effects in (("most", filter_.top), ("least", filter_.bottom))
        for place, effect in enumerate(effects, 1)
    ]
    frame: pandas.DataFrame = import_pandas().DataFrame(rows)
    return frame
