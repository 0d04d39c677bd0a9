"""The result table of every identification method: classes by filters."""

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from captum_classfilters._core.arguments import arguments_checked, check_confidence, whole_number
from captum_classfilters._core.equality import same
from captum_classfilters._core.names import counted, hint, kind_of, listed_names, shortened
from captum_classfilters._core.ranking import descending, highest, rank_correlation, ranks
from captum_classfilters._core.tables import (
    Row,
    Table,
    Tabular,
    import_pandas,
    short_repr,
)
from captum_classfilters._core.tensor_files import Schema, read_tensors, write_tensors
from captum_classfilters._core.types import ClassNames, JsonDict, Keywords, ModelInputs
from captum_classfilters._core.warnings import warn

if TYPE_CHECKING:
    import pandas

_SHOWN = 5  # filters of a class, beside each other
_FEW, _MANY = 10, 40  # rows that are printed of a class
# Version 2: p_values and q_values; files without them are still written as 1.
_FILE = Schema(
    "class_filters", "captum_classfilters.ClassFilters", 2, "ClassFilters", "table", checked_from=3
)


@short_repr
@dataclass(frozen=True)
class Agreement(Tabular):
    r"""How far two tables agree.

    Args:

        overlap (Tensor): Shape (C,). Share of the smaller selection that both tables select;
                    NaN where one of them selects nothing for the class.
        chance (Tensor): Shape (C,). The overlap expected of random sets of the same sizes.
        rank_correlation (Tensor): Shape (C,). Spearman's correlation of the scores; NaN for a
                    class without images or with constant scores.
    """

    overlap: Tensor
    chance: Tensor
    rank_correlation: Tensor

    def _tables(self) -> list[Table]:
        each = zip(self.overlap, self.chance, self.rank_correlation, strict=True)
        rows = [
            {"class": index, "overlap": overlap, "chance": chance, "rank correlation": correlation}
            for index, (overlap, chance, correlation) in enumerate(each)
        ]
        title = (
            f"mean overlap {self.mean_overlap:.3f}, by chance {self.mean_chance:.3f}, rank "
            f"correlation {self.mean_rank_correlation:.3f}"
        )
        return [Table(rows, title=title)]

    @property
    def mean_overlap(self) -> float:
        """Mean overlap over the classes that both tables select filters for."""
        return float(self.overlap.nanmean())

    @property
    def mean_chance(self) -> float:
        """Mean chance level over the same classes."""
        return float(self.chance.nanmean())

    @property
    def mean_rank_correlation(self) -> float:
        """Mean rank correlation over the classes that have one."""
        return float(self.rank_correlation.nanmean())


@short_repr
@dataclass(frozen=True)
class ClassOverlap(Tabular):
    r"""How far classes share filters within one table.

    Args:

        count (Tensor): Shape (C, C). Number of filters that two classes share.
        jaccard (Tensor): Shape (C, C). Shared filters over all filters of the two; NaN where
                    neither has any.
        classes_per_filter (Tensor): Shape (K,). Number of classes that select each filter.
    """

    count: Tensor
    jaccard: Tensor
    classes_per_filter: Tensor

    def _tables(self) -> list[Table]:
        others = self.jaccard.nan_to_num(nan=-1.0).fill_diagonal_(-1.0)
        most, nearest = others.max(1)
        rows = [
            {
                "class": index,
                "filters": self.count[index, index],
                "nearest class": int(nearest[index]) if most[index] >= 0 else None,
                "shared with it": self.count[index, nearest[index]] if most[index] >= 0 else None,
                "Jaccard": float(most[index]) if most[index] >= 0 else float("nan"),
            }
            for index in range(len(self.count))
        ]
        used = int((self.classes_per_filter > 0).sum())
        title = f"{used:,} of {len(self.classes_per_filter):,} filters are selected for a class"
        return [Table(rows, title=title)]


@short_repr
@dataclass(frozen=True)
class ClassRow(Tabular):
    r"""One class of a table, its filters from the highest score to the lowest. Prints as a table.

    Args:

        name (str): The class.
        layer (str): Dotted name of the layer.
        method (str): Name of the identification method.
        count (int): Number of its images.
        filters (Tensor): Shape (K,), int64. All filters, the highest score first; equal scores keep
                    the filters' order.
        scores (Tensor): Shape (K,). Their scores, in that order, as all that follows.
        selected (Tensor): Shape (K,), bool. Which of them are selected for the class.
        standard_errors (Tensor or None): Shape (K,).
        p_values (Tensor or None): Shape (K,).
        q_values (Tensor or None): Shape (K,).
    """

    name: str
    layer: str
    method: str
    count: int
    filters: Tensor
    scores: Tensor
    selected: Tensor
    standard_errors: Tensor | None = None
    p_values: Tensor | None = None
    q_values: Tensor | None = None

    def _tables(self) -> list[Table]:
        columns: dict[str, Tensor | None] = {
            "filter": self.filters,
            "score": self.scores,
            "standard_error": self.standard_errors,
            "p_value": self.p_values,
            "q_value": self.q_values,
            "selected": self.selected,
        }
        known = {title: values.tolist() for title, values in columns.items() if values is not None}
        rows = [dict(zip(known, cells, strict=True)) for cells in zip(*known.values(), strict=True)]
        chosen = int(self.selected.sum())
        title = (
            f"{self.name}: {counted(self.count, 'image')}, {chosen:,} of {len(rows):,} filters selected, "
            f"{self.method} at {self.layer}"
        )
        formats = {"p_value": ".2g", "q_value": ".2g", "score": ".4g", "standard_error": ".2g"}
        most = min(max(chosen, _FEW), _MANY)
        return [Table(rows, formats, title, bars=("score",), most=most)]


class ClassFilters(Tabular):
    r"""
    Classes by filters: scores, the filters selected for each class, and where they come from.

    Every identification method returns one of these tables, and every head, plot and metric takes
    one. It is immutable: tensors are handed out as copies, and :meth:`select` returns a new table.

    Args:

        scores (Tensor): Shape (C, K). Score of each filter for each class, higher is more
                    important. Rows of classes without images are NaN.
        counts (Tensor): Shape (C,). Number of images behind each row.
        selected (Tensor, optional): Shape (C, K), bool. Filters selected for each class.
                    Default: None (no filter is selected)
        standard_errors (Tensor, optional): Shape (C, K). Standard error of each score.
                    Default: None
        class_names (sequence of str or mapping, optional): C names in the classes' order, or by
                    index, as a Hugging Face model's ``config.id2label``.
                    Default: ``"0"`` to ``"C-1"``
        layer (str): Dotted name of the layer.
        method (str): Name of the identification method.
        provenance (mapping, optional): Anything JSON can hold: versions, options, model hash.
                    Default: None
        p_values (Tensor, optional): Shape (C, K). Probability, under the null that ``provenance``
                    names, of a score as large; NaN for classes without images.
                    Default: None
        q_values (Tensor, optional): Shape (C, K). The p-values adjusted for the number of cells:
                    the smallest false discovery rate at which a cell is a discovery.
                    Default: None

    Raises:
        ValueError: Something is no Tensor, shapes do not fit, counts are not whole or negative, a
                    class without images has selected filters, a score of a class with images is NaN
                    or infinite, its p- or q-value is no probability, or a standard error is
                    negative.

    Examples::

        >>> import torch
        >>> from captum_classfilters import ClassFilters
        >>> table = ClassFilters(
        ...     torch.tensor([[3., 1., 2.], [0., 5., 5.]]), counts=torch.tensor([10, 10]),
        ...     class_names=["cat", "dog"], layer="conv", method="Example")
        >>> table = table.select(num_filters=2)
        >>> table.filters_of("cat").tolist()
        [0, 2]
        >>> table.classes_of(2)
        ['cat', 'dog']
        >>> print(table["cat"])
        cat: 10 images, 2 of 3 filters selected, Example at conv
        filter  score  selected
             0      3  True
             2      2  True
             1      1  False
    """

    __slots__ = (
        "_counts",
        "_p_values",
        "_q_values",
        "_scores",
        "_selected",
        "_standard_errors",
        "class_names",
        "layer",
        "method",
        "provenance",
    )

    _scores: Tensor
    _counts: Tensor
    _selected: Tensor
    _standard_errors: Tensor | None
    _p_values: Tensor | None
    _q_values: Tensor | None
    class_names: tuple[str, ...]
    layer: str
    method: str
    provenance: Keywords

    @arguments_checked
    def __init__(
        self,
        scores: Tensor,
        counts: Tensor,
        selected: Tensor | None = None,
        standard_errors: Tensor | None = None,
        class_names: ClassNames | None = None,
        layer: str = "",
        method: str = "",
        provenance: Mapping[str, object] | None = None,
        p_values: Tensor | None = None,
        q_values: Tensor | None = None,
    ) -> None:
        tables = {
            "selected": selected,
            "standard_errors": standard_errors,
            "p_values": p_values,
            "q_values": q_values,
        }
        if scores.dim() != 2 or 0 in scores.shape:
            raise ValueError(f"scores have shape {tuple(scores.shape)}; expected (C, K).")
        num_classes = scores.shape[0]
        if selected is None:
            tables["selected"] = selected = torch.zeros(scores.shape, dtype=torch.bool)
        listed = listed_names(class_names)
        if listed is None:
            listed = [str(index) for index in range(num_classes)]
        # As files have them: two halves of a character, side by side, are one.
        names: list[str] = json.loads(json.dumps(listed))
        layer, method = json.loads(json.dumps([str(layer), str(method)]))
        _check_table(scores, counts, tables, names)
        values = {
            "_scores": _own(scores, torch.float64),
            "_counts": _own(counts, torch.int64),
            "_selected": _own(selected, torch.bool),
            **{
                f"_{name}": None if table is None else _own(table, torch.float64)
                for name, table in tables.items()
                if name != "selected"
            },
            "class_names": tuple(names),
            "layer": layer,
            "method": method,
            "provenance": MappingProxyType(json.loads(json.dumps(dict(provenance or {})))),
        }
        for attribute, value in values.items():
            object.__setattr__(self, attribute, value)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(
            f"ClassFilters is immutable; make a new table instead of setting {name}."
        )

    def __delattr__(self, name: str) -> None:
        raise AttributeError("ClassFilters is immutable.")

    # -- reading ---------------------------------------------------------------------------------

    @property
    def scores(self) -> Tensor:
        """Scores (C, K), float64; NaN for classes without images."""
        return self._scores.clone()

    @property
    def selected(self) -> Tensor:
        """Selected filters (C, K), bool."""
        return self._selected.clone()

    @property
    def counts(self) -> Tensor:
        """Number of images of each class (C,), int64."""
        return self._counts.clone()

    @property
    def standard_errors(self) -> Tensor | None:
        """Standard errors of the scores (C, K), or None."""
        return None if self._standard_errors is None else self._standard_errors.clone()

    @property
    def p_values(self) -> Tensor | None:
        """P-values of the scores (C, K), or None where significance was not asked for."""
        return None if self._p_values is None else self._p_values.clone()

    @property
    def q_values(self) -> Tensor | None:
        """P-values adjusted over the whole table (C, K), or None."""
        return None if self._q_values is None else self._q_values.clone()

    @property
    def num_classes(self) -> int:
        """C."""
        return self._scores.shape[0]

    @property
    def num_filters(self) -> int:
        """K."""
        return self._scores.shape[1]

    @property
    def classes_without_images(self) -> list[str]:
        """Names of the classes that no image was seen of."""
        return [
            name for name, count in zip(self.class_names, self._counts, strict=True) if count == 0
        ]

    def class_index(self, class_: int | str) -> int:
        """Index of a class given by its index or its name.

        Args:

            class_ (int or str): The class.

        Returns:
            *int*: Its row in the table.

        Raises:
            ValueError: There is no such class.
        """
        return index_of_class(class_, self.class_names)

    def filters_of(self, class_: int | str) -> Tensor:
        """Filters selected for a class, highest score first.

        Args:

            class_ (int or str): Index or name of the class.

        Returns:
            *Tensor* of int64, shape (number selected,). Equal scores keep the filters' order.
        """
        row = self.class_index(class_)
        order = descending(self._scores[row])
        return order[self._selected[row][order]]

    @arguments_checked
    def interval(self, confidence: float = 0.95) -> Tensor:
        r"""
        Intervals of the mean scores, by Student's distribution, each by itself.

        Args:

            confidence (float): Coverage, between 0 and 1.
                        Default: 0.95

        Returns:
            *Tensor* of shape (C, K, 2); NaN for classes with fewer than two images, and where there
            are no standard errors.

        Raises:
            ValueError: ``confidence`` is out of range.
        """
        from scipy.stats import t

        check_confidence(confidence)
        freedom = (self._counts.double() - 1)[:, None]
        errors = torch.full_like(self._scores, torch.nan)
        if self._standard_errors is not None:
            errors = self._standard_errors.where(freedom > 0, errors)
        reach = torch.as_tensor(t.isf((1 - confidence) / 2, freedom.clamp(min=1).numpy())) * errors
        return torch.stack([self._scores - reach, self._scores + reach], dim=2)

    @arguments_checked
    def classes_of(self, filter_: int) -> list[str]:
        """Names of the classes that a filter is selected for.

        Args:

            filter_ (int): Index of the filter.

        Returns:
            *list of str*.
        """
        if not 0 <= filter_ < self.num_filters:
            raise ValueError(f"Filter {filter_} is out of range; the layer has {self.num_filters}.")
        return [
            self.class_names[row] for row in self._selected[:, filter_].nonzero()[:, 0].tolist()
        ]

    def __getitem__(self, class_: int | str) -> ClassRow:
        """A class's row: all its filters with their scores, the highest first.

        Args:

            class_ (int or str): Index or name of the class.

        Returns:
            *ClassRow*, which prints as a table.

        Raises:
            ValueError: There is no such class; the nearest names are named.
        """
        row = self.class_index(class_)
        order = descending(self._scores[row])
        return ClassRow(
            self.class_names[row],
            self.layer,
            self.method,
            int(self._counts[row]),
            order,
            self._scores[row][order],
            self._selected[row][order],
            **{name: table[row][order] for name, table in self._optional_tables().items()},
        )

    def __iter__(self) -> Iterator[ClassRow]:
        return (self[row] for row in range(self.num_classes))

    def __len__(self) -> int:
        return self.num_classes

    def __contains__(self, class_: object) -> bool:
        return class_ in self.class_names

    # -- choosing --------------------------------------------------------------------------------

    @arguments_checked
    def select(
        self,
        num_filters: int | None = None,
        mass: float | None = None,
        fdr: float | None = None,
        positive_only: bool = False,
    ) -> "ClassFilters":
        r"""
        Choose filters for each class, in the order of their scores.

        Ties go to the filter with the lower index. Classes without images select nothing. A score of
        exactly zero is no evidence: such a filter is not selected, unless all K are asked for, so a
        class may get fewer filters than asked, and none where every score is zero. A warning names
        the classes in each case, and those that get filters with a negative score, which lower the
        class's logit, though not where all K are asked for.

        Args:

            num_filters (int, optional): Select this many filters for each class.
                        Default: None
            mass (float, optional): Select the smallest set whose share of the class's positive
                        scores reaches this number in (0, 1]; at least one filter.
                        Default: None
            fdr (float, optional): Select the cells whose q-value is at most this false discovery
                        rate and whose score is positive: all of them, or with ``num_filters`` at
                        most that many for each class. A class may end up with none.
                        Default: None
            positive_only (bool): Leave out filters whose score is not positive.
                        Default: False

        Returns:
            *ClassFilters*: A new table with the same scores.

        Raises:
            ValueError: Not exactly one of ``num_filters`` and ``mass`` is given (at most
                        ``num_filters`` beside ``fdr``), a value is out of range, or ``fdr`` is
                        asked of a table without q-values.
        """
        if fdr is not None:
            return self._discoveries(fdr, num_filters, mass)
        if (num_filters is None) == (mass is None):
            raise ValueError("Give exactly one of num_filters and mass, or fdr.")
        check_selection(num_filters, mass)
        if num_filters is not None:
            sizes = self._checked_number(num_filters)
        else:
            sizes = self._sizes_for_mass(float(mass))  # type: ignore[arg-type]
        return self._with_sizes(sizes, positive_only)

    def _discoveries(
        self, fdr: float, num_filters: int | None, mass: float | None
    ) -> "ClassFilters":
        if mass is not None:
            raise ValueError("fdr goes with num_filters, not with mass.")
        if not 0 < fdr < 1:
            raise ValueError(f"fdr={fdr} is out of range; choose a rate between 0 and 1.")
        if self._q_values is None:
            raise ValueError(
                "The table has no q-values; identify with significance=True, or use num_filters or "
                "mass."
            )
        # NaN, of classes without images, compares false.
        found = (self._q_values <= fdr) & (self._scores > 0)
        if num_filters is not None:
            allowed = self._checked_number(num_filters)[:, None]
            ranked = self._scores.masked_fill(~found, -float("inf"))
            found &= ranks(descending(ranked)) < allowed
        return self._selecting(found)

    @arguments_checked
    def with_selection(self, selected: Tensor) -> "ClassFilters":
        """The same table with another selection, for rules of the user's own.

        Args:

            selected (Tensor): Shape (C, K), bool.

        Returns:
            *ClassFilters*: A new table.
        """
        return self._selecting(selected)

    def _checked_number(self, num_filters: int) -> Tensor:
        check_selection(num_filters, None)
        if not 1 <= num_filters <= self.num_filters:
            raise ValueError(
                f"num_filters={num_filters} is out of range: the layer {self.layer!r} has "
                f"{self.num_filters} filters, so choose 1 to {self.num_filters}."
            )
        return torch.full((self.num_classes,), int(num_filters))

    def _sizes_for_mass(self, mass: float) -> Tensor:
        positive = self._scores.clamp(min=0).nan_to_num(0.0).sort(1, descending=True).values
        cumulative = positive.cumsum(1)
        # A relative tolerance keeps rounding in the sum from asking for one filter too many.
        reached = cumulative >= mass * cumulative[:, -1:] * (1 - 1e-12)
        return reached.to(torch.int64).argmax(1) + 1

    def _with_sizes(self, sizes: Tensor, positive_only: bool) -> "ClassFilters":
        seen = self._counts > 0
        wanted = highest(self._scores, sizes) & seen[:, None]
        selected = wanted & ((self._scores != 0) | (sizes == self.num_filters)[:, None])
        if positive_only:
            selected &= self._scores > 0
        self._warn_of(~seen, "No filters are selected for {} without images: {}.")
        nothing = seen & (self._scores == 0).all(1) & (sizes < self.num_filters)
        self._warn_of(
            nothing,
            f"Every score at the layer {self.layer!r} is zero for {{}}, so no filters are selected: {{}}.",
        )
        fewer = seen & ~nothing & (selected.sum(1) < wanted.sum(1))
        self._warn_of(
            fewer,
            "Fewer filters than asked are selected for {}, whose other filters have a score of "
            f"{'zero or below' if positive_only else 'exactly zero, which is no evidence'}: {{}}.",
        )
        if self.provenance.get("signed", True):
            self._warn_of(
                (selected & (self._scores < 0)).any(1) & (sizes < self.num_filters),
                "Filters that lower the class's logit (negative scores) are selected for {}: {}. "
                "select(..., positive_only=True) leaves them out.",
            )
        return self._selecting(selected)

    def _warn_of(self, classes: Tensor, message: str) -> None:
        """Warn of some classes (C,), bool, if there are any: how many, and the first names."""
        names = [self.class_names[row] for row in classes.nonzero()[:, 0].tolist()]
        if names:
            shown = ", ".join(names[:10]) + (" ..." if len(names) > 10 else "")
            warn(message.format(counted(len(names), "class"), shown))

    # -- joining ---------------------------------------------------------------------------------

    def merge(*tables: "ClassFilters") -> "ClassFilters":
        r"""
        Join tables of disjoint shares of the data: ``ClassFilters.merge(first, second, ...)``.

        The result is the table of one pass over all images: counts add up, means and standard
        errors are joined by the formula for parallel variances (Chan, Golub and LeVeque, 1983), to
        rounding; scores that are votes without rounding. A class may be absent from some of the
        shares. That they are disjoint cannot be seen from the tables.

        Where every table selects the k best filters of each class, so does the result; otherwise
        select again. P-values cannot be joined and are left out, with a warning. What the tables'
        provenance says differently, times for example, is kept under ``merged``.

        Args:

            tables (ClassFilters): One for each share, of the same model, layer, method, options and
                        classes.

        Returns:
            *ClassFilters*.

        Raises:
            ValueError: The tables differ in what they measure, which is named; a table is there
                        twice; or only some of them have standard errors.

        Examples::

            >>> import torch
            >>> from captum_classfilters import ClassFilters
            >>> first = ClassFilters(torch.tensor([[1., 3.]]), torch.tensor([1]))
            >>> second = ClassFilters(torch.tensor([[4., 0.]]), torch.tensor([2]))
            >>> table = ClassFilters.merge(first, second)
            >>> table.counts.tolist(), table.scores.tolist()
            ([3], [[3.0, 1.0]])
        """
        _check_shares(tables)
        if len(tables) == 1:
            return tables[0]
        first = tables[0]
        count, mean, spread = _joined_shares(tables)
        errors = None
        if first._standard_errors is not None:
            number = count.double()[:, None]
            errors = (spread / ((number - 1) * number)).sqrt()
            errors = errors.masked_fill(number < 2, float("nan"))
        if any(table._p_values is not None for table in tables):
            warn(
                "The merged table has no p-values: they would need the evidence of all images. "
                "Identify on all of them, under torchrun for example, with significance=True."
            )
        merged = ClassFilters(
            scores=mean.masked_fill(count[:, None] == 0, float("nan")),
            counts=count,
            standard_errors=errors,
            class_names=first.class_names,
            layer=first.layer,
            method=first.method,
            provenance=_joined_provenance([dict(table.provenance) for table in tables]),
        )
        sizes = {table._best for table in tables if bool((table._counts > 0).any())}
        size = sizes.pop() if len(sizes) == 1 else None
        return merged if size is None else merged._selecting(merged._best_filters(size))

    @property
    def _best(self) -> int | None:
        """The k for which the k best filters of each class are selected; None if it is not so."""
        size = int(self._selected.sum(1).max())
        same = size > 0 and torch.equal(self._selected, self._best_filters(size))
        return size if same else None

    def _best_filters(self, size: int) -> Tensor:
        """Masks (C, K) of the best filters of each class, as many as there is evidence for."""
        sizes = torch.full((self.num_classes,), size)
        evidence = (self._scores != 0) | (size == self.num_filters)
        return highest(self._scores, sizes) & evidence & (self._counts > 0)[:, None]

    # -- comparing -------------------------------------------------------------------------------

    @arguments_checked
    def agreement(self, other: "ClassFilters", num_filters: int | None = None) -> Agreement:
        r"""
        Compare with another table over the same classes and filters.

        Args:

            other (ClassFilters): The other table.
            num_filters (int, optional): Compare the best so many filters of each; by default the
                        selections as they are.
                        Default: None

        Returns:
            *Agreement*: Overlap, its chance level and Spearman's rank correlation for each class.
            For sets of k1 and k2 of K filters chance is max(k1, k2) / K.

        Raises:
            ValueError: The tables have different shapes, or names of classes that differ; names that
                        are only indices fit any.
        """
        if self._scores.shape != other._scores.shape:
            raise ValueError(
                f"The tables have shapes {tuple(self._scores.shape)} and "
                f"{tuple(other._scores.shape)}; only equal shapes can be compared."
            )
        _check_same_classes(self, other)
        mine, theirs = self, other
        if num_filters is not None:
            mine, theirs = self.select(num_filters), other.select(num_filters)
        sizes = torch.stack([mine._selected.sum(1), theirs._selected.sum(1)]).to(torch.float64)
        shared = (mine._selected & theirs._selected).sum(1).to(torch.float64)
        empty = sizes.min(0).values == 0
        nothing = torch.full_like(shared, float("nan"))
        return Agreement(
            overlap=torch.where(empty, nothing, shared / sizes.min(0).values),
            chance=torch.where(empty, nothing, sizes.max(0).values / self.num_filters),
            rank_correlation=rank_correlation(self._scores, other._scores),
        )

    def overlap(self) -> ClassOverlap:
        """How far the classes of this table share filters.

        Returns:
            *ClassOverlap*: Shared counts and Jaccard similarity (C, C), classes per filter (K,).
        """
        member = self._selected.to(torch.float64)
        count = member @ member.T
        size = member.sum(1)
        return ClassOverlap(
            count=count.to(torch.int64),
            jaccard=count / (size[:, None] + size[None, :] - count),
            classes_per_filter=self._selected.sum(0),
        )

    # -- keeping ---------------------------------------------------------------------------------

    def to_pandas(self) -> "pandas.DataFrame":
        """The table in long form, one row per class and filter.

        Returns:
            *pandas.DataFrame* with the columns class, filter, score, selected, images and, where
            known, standard_error, p_value and q_value. Needs the extra ``pandas``.
        """
        num_classes, num_filters = self._scores.shape
        columns = {
            "class": [name for name in self.class_names for _ in range(num_filters)],
            "filter": list(range(num_filters)) * num_classes,
            "score": self._scores.flatten().numpy(),
            "selected": self._selected.flatten().numpy(),
            "images": self._counts.repeat_interleave(num_filters).numpy(),
        }
        for name, table in self._optional_tables().items():
            columns[name.removesuffix("s")] = table.flatten().numpy()
        frame: pandas.DataFrame = import_pandas().DataFrame(columns)
        return frame

    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        r"""
        Save as one safetensors file, its metadata as JSON in the file's header.

        The file is written beside its place and moved there when it is complete: a full disk or a
        kill leaves an older file as it was. Its mode and, where that is allowed, its owner stay; a
        symbolic link stays, and the file that it points to is replaced. A checksum covers all of it.

        Args:

            path (path): Where to save.
            overwrite (bool): Replace a file that is there.
                        Default: False

        Raises:
            FileExistsError: The file is there and ``overwrite`` is False.
            ValueError: The path is a folder, a pipe, a socket or a device.
            OSError: It cannot be written; nothing has changed.
        """
        tensors = {"scores": self._scores, "counts": self._counts, "selected": self._selected}
        details = {
            "class_names": self.class_names,
            "layer": self.layer,
            "method": self.method,
            "provenance": dict(self.provenance),
        }
        version = 1 if self._p_values is None and self._q_values is None else 2
        tensors |= self._optional_tables()
        write_tensors(path, _FILE, tensors, details, version, overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ClassFilters":
        """Load a saved table; no code in the file can run.

        Tables of versions that wrote no checksum are loaded without one.

        Args:

            path (path): A file that :meth:`save` wrote.

        Returns:
            *ClassFilters*.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is damaged, foreign, of a newer schema, or its values cannot be meant.
        """
        stored = read_tensors(path, _FILE)
        scores = stored.tensor("scores", torch.float64, (None, None))
        parts: JsonDict = {
            name: stored.optional_tensor(name, torch.float64, scores.shape)
            for name in ("standard_errors", "p_values", "q_values")
        }
        parts |= {
            "counts": stored.tensor("counts", torch.int64, scores.shape[:1]),
            "selected": stored.tensor("selected", torch.bool, scores.shape),
            "class_names": stored.values("class_names", str),
            "layer": stored.value("layer", str),
            "method": stored.value("method", str),
            "provenance": stored.value("provenance", dict),
        }
        with stored.building():
            return cls(scores, **parts)

    def _optional_tables(self) -> dict[str, Tensor]:
        """The tables (C, K) beside the scores that this one has."""
        names = ("standard_errors", "p_values", "q_values")
        tables = {name: getattr(self, f"_{name}") for name in names}
        return {name: table for name, table in tables.items() if table is not None}

    def _parts(self) -> JsonDict:
        """The arguments that make this table, in the constructor's order."""
        return {
            "scores": self._scores,
            "counts": self._counts,
            "selected": self._selected,
            "standard_errors": self._standard_errors,
            "class_names": self.class_names,
            "layer": self.layer,
            "method": self.method,
            "provenance": dict(self.provenance),
            "p_values": self._p_values,
            "q_values": self._q_values,
        }

    def _replace(self, **changes: Any) -> "ClassFilters":
        return ClassFilters(**{**self._parts(), **changes})

    def _selecting(self, selected: Tensor) -> "ClassFilters":
        """The same table with another selection; nothing writes to tables, so all else is shared."""
        _check_selected(selected, self._scores.shape, self._counts > 0)
        table = object.__new__(ClassFilters)
        for name in self.__slots__:
            object.__setattr__(table, name, getattr(self, name))
        object.__setattr__(table, "_selected", _own(selected, torch.bool))
        return table

    def __reduce__(self) -> ModelInputs:
        return ClassFilters, tuple(self._parts().values())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ClassFilters):
            return NotImplemented
        return (
            self.class_names == other.class_names
            and (self.layer, self.method) == (other.layer, other.method)
            and dict(self.provenance) == dict(other.provenance)
            and all(
                same(getattr(self, name), getattr(other, name))
                for name in self.__slots__
                if name.startswith("_")
            )
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        sizes = self._selected.sum(1)
        low, high = int(sizes.min()), int(sizes.max())
        chosen = f"{low}" if low == high else f"{low} to {high}"
        return (
            f"ClassFilters({self.method} at {self.layer!r}: {self.num_classes} classes x "
            f"{self.num_filters} filters, {int(self._counts.sum())} images, "
            f"{chosen} filters selected per class)"
        )

    def _tables(self) -> list[Table]:
        some, chosen = bool(self._selected.any()), self._selected.sum(1).tolist()
        order = descending(self._scores)
        title = "filters, best first" if some else "best filters, none of them selected"
        rows: list[Row] = []
        for row in self._counts.eq(0).sort(stable=True).indices.tolist():  # those with images first
            kept = order[row][self._selected[row][order[row]]] if some else order[row]
            shown = ", ".join(map(str, kept[:_SHOWN].tolist())) if self._counts[row] else ""
            rows.append(
                {
                    "class": self.class_names[row],
                    "images": int(self._counts[row]),
                    "selected": chosen[row],
                    title: shown + (", …" if shown and len(kept) > _SHOWN else ""),
                    "highest score": float(self._scores[row, order[row, 0]]),
                }
            )
        return [Table(rows, {"highest score": ".4g"}, repr(self)[len("ClassFilters(") : -1])]


def check_selection(num_filters: int | None, mass: float | None) -> int | None:
    """Raise if a selection cannot be meant, whatever the table; ``num_filters`` as an int."""
    if num_filters is not None and mass is not None:
        raise ValueError("Give num_filters or mass, not both.")
    if num_filters is not None:
        number = whole_number(num_filters)
        if number is None:
            raise ValueError(f"num_filters={num_filters!r} is not a whole number.")
        num_filters = number
        if num_filters < 1:
            raise ValueError(f"num_filters={num_filters} is out of range; choose at least 1.")
    if mass is not None and not 0 < mass <= 1:
        raise ValueError(f"mass={mass} is out of range; choose a share in (0, 1].")
    return num_filters


def is_of_input(table: ClassFilters, layer: str) -> bool:
    """Whether a table has the filters of the input of the layer of this name, not of its output."""
    options = table.provenance.get("options") or {}
    return table.layer == layer and bool(options.get("attribute_to_layer_input"))


def check_of_output(table: ClassFilters, layer: str, what: str) -> None:
    """Raise if what acts on the output of a layer is given the filters of its input."""
    if is_of_input(table, layer):
        raise ValueError(
            f"The table has filters of the input of {layer!r} (attribute_to_layer_input=True), and "
            f"{what} its output. Find the filters at the layer before, whose output that input is; or "
            "give that layer's name beside the table, where a layer is taken."
        )


def check_class_names(class_names: ClassNames | None, num_classes: int | None) -> None:
    """Raise if names are given twice, or are not as many as there are classes."""
    names = listed_names(class_names, num_classes)
    twice = [] if names is None else [name for name, number in Counter(names).items() if number > 1]
    if twice:
        raise ValueError(
            f"class_names must be different names; {', '.join(map(repr, twice[:5]))} is there twice."
        )


def given_or_known_names(
    class_names: ClassNames | None, known: Sequence[str] | None, num_classes: int
) -> tuple[str, ...]:
    """C names: those that the user gave, which must fit; else those of :func:`names_of_classes`."""
    names = listed_names(class_names)
    if names is None:
        return names_of_classes(known, num_classes)
    check_class_names(names, num_classes)
    return tuple(names)


def names_of_classes(names: Sequence[str] | None, num_classes: int) -> tuple[str, ...]:
    """C names: those that a data set knows if they are as many, else the classes' indices."""
    if names is None or len(names) != num_classes:
        return tuple(str(index) for index in range(num_classes))
    return tuple(map(str, names))


def index_of_class(class_: int | str, names: Sequence[str]) -> int:
    """The index of a class given by its index or its name.

    Raises:
        ValueError: There is no such class; the nearest names are named.
    """
    if isinstance(class_, str):
        if class_ in names:
            return list(names).index(class_)
        raise ValueError(f"No class named {class_!r}. {hint(class_, names)}")
    index = whole_number(class_)
    if index is None:
        raise ValueError(f"A class is given by its index or its name, not by {kind_of(class_)}.")
    if not 0 <= index < len(names):
        raise ValueError(f"Class {index} is out of range; there are {len(names)} classes.")
    return index


#: What tables must have in common to be merged.
_SAME = ("model_sha256", "model", "options", "signed", "target")
#: What may differ; the first that is known is kept.
_FIRST = ("feeds_head", "missing", "captum_classfilters", "captum", "torch")


def _check_shares(tables: Sequence[ClassFilters]) -> None:
    """Raise unless some tables measure the same thing on other images."""
    if not tables:
        raise ValueError("There are no tables to merge.")
    for place, table in enumerate(tables):
        if not isinstance(table, ClassFilters):
            raise ValueError(
                f"Table {place} is {kind_of(table)}; merge takes ClassFilters tables, one by "
                "one: ClassFilters.merge(*tables)."
            )
        if any(table is other for other in tables[:place]):
            raise ValueError(
                f"Table {place} is there twice; its images would be counted twice. Merge tables of "
                "disjoint shares."
            )
    for place, table in enumerate(tables[1:], 1):
        own, other = _measured(tables[0]), _measured(table)
        different = [name for name in own if own[name] != other[name]]
        if different:
            what = "; ".join(
                f"{name} is {shortened(own[name])} in table 0 and {shortened(other[name])} in table {place}"
                for name in different
            )
            raise ValueError(f"The tables do not measure the same thing: {what}.")
        if bool((table._counts > 0).any()) and _same_numbers(table, tables[:place]):
            warn(
                f"Table {place} has the same numbers as one before it; if it is of the same images, "
                "they are counted twice."
            )


def _check_same_classes(left: ClassFilters, right: ClassFilters) -> None:
    """Raise if rows of two tables are of other classes, as far as their names say."""
    unnamed = names_of_classes(None, left.num_classes)
    pairs = zip(left.class_names, right.class_names, strict=True)
    different = [row for row, (own, other) in enumerate(pairs) if own != other]
    if different and unnamed not in (left.class_names, right.class_names):
        row = different[0]
        raise ValueError(
            f"The tables are not over the same classes: class {row} is {left.class_names[row]!r} in one "
            f"and {right.class_names[row]!r} in the other, and classes are compared by their place. "
            "Identify both with the same class_names in the same order."
        )


def _measured(table: ClassFilters) -> dict[str, object]:
    """What tables of disjoint shares have in common."""
    return {
        "the layer": table.layer,
        "the method": table.method,
        "the number of classes": table.num_classes,
        "the number of filters": table.num_filters,
        "class_names": table.class_names,
        **{name: table.provenance.get(name) for name in _SAME},
        "having standard errors": table._standard_errors is not None,
    }


def _same_numbers(table: ClassFilters, others: Sequence[ClassFilters]) -> bool:
    """Whether these numbers are there already; votes of a few images often are."""
    totals = (table._scores * table._counts[:, None]).nan_to_num()
    return not torch.equal(_snapped(totals), totals.round()) and any(
        torch.equal(table._counts, other._counts) and same(table._scores, other._scores)
        for other in others
    )


def _joined_shares(tables: Sequence[ClassFilters]) -> tuple[Tensor, Tensor, Tensor]:
    """Count (C,), mean and sum of squared deviations (C, K) of disjoint shares."""
    count = torch.zeros(tables[0].num_classes, dtype=torch.int64)
    total = mean = spread = torch.zeros(tables[0]._scores.shape, dtype=torch.float64)
    whole = True
    for table in tables:
        own, number = table._scores.nan_to_num(), table._counts.double()[:, None]
        own_total = _snapped(own * number)
        whole = whole and torch.equal(own_total, own_total.round())
        total = total + own_total
        together = count + table._counts
        difference = own - mean
        share = number / together.clamp(min=1).double()[:, None]
        spread = spread + difference.square() * (count.double()[:, None] * share)
        if table._standard_errors is not None:
            # A single image has no spread, and no standard error either.
            spread = spread + (table._standard_errors.square() * number * (number - 1)).masked_fill(
                number < 2, 0.0
            )
        mean = mean + difference * share
        count = together
    if whole:  # votes, whose totals are known without rounding
        number = count.clamp(min=1).double()[:, None]
        return count, total / number, _snapped(spread * number) / number
    return count, mean, spread


def _snapped(values: Tensor) -> Tensor:
    """Values that are whole numbers but for rounding as these numbers."""
    whole = values.round()
    near = (values - whole).abs() <= 1e-12 * whole.abs().clamp(min=1)
    return torch.where(near, whole, values)


def _joined_provenance(records: Sequence[JsonDict]) -> JsonDict:
    """What all records say, the sum of their images, and apart what they say differently."""
    shares = [share for record in records for share in record.pop("merged", [record])]
    names = list(dict.fromkeys(name for record in records for name in record))
    values = {name: [record.get(name) for record in records] for name in names}
    different = [name for name in names if any(v != values[name][0] for v in values[name])]
    joined = {name: values[name][0] for name in names if name not in different}
    for name in different:
        known = [value for value in values[name] if value is not None]
        if name == "exact":
            joined[name] = all(known)
        elif name == "created":
            joined[name] = max(map(str, known))
        elif name in _FIRST:
            joined[name] = known[0]
    numbers = [number for number in values.get("num_images", []) if isinstance(number, int)]
    if len(numbers) == len(records):
        joined["num_images"] = sum(numbers)
    joined.pop("significance", None)
    apart = {"num_images", *different}
    joined["merged"] = [{n: v for n, v in share.items() if n in apart} for share in shares]
    return joined


def _check_table(
    scores: Tensor,
    counts: Tensor,
    tables: Mapping[str, Tensor | None],
    class_names: Sequence[str],
) -> None:
    num_classes = scores.shape[0]
    whole = counts.shape == (num_classes,) and not counts.is_complex()
    if not whole or not bool(((counts >= 0) & (counts.to(torch.int64) == counts)).all()):
        raise ValueError(
            f"counts must be {num_classes} numbers of images, one for each class; whole, none negative."
        )
    for name, table in {"scores": scores, **tables}.items():
        if table is not None and table.is_complex():
            raise ValueError(f"{name} is {table.dtype}; expected real numbers.")
        if table is not None and table.shape != scores.shape:
            raise ValueError(
                f"{name} has shape {tuple(table.shape)}; expected that of scores, "
                f"{tuple(scores.shape)}."
            )
    check_class_names(class_names, num_classes)
    seen = counts > 0
    if not bool((torch.isfinite(scores).all(1) | ~seen).all()):
        raise ValueError("scores of classes with images hold NaN or Inf.")
    for name in ("p_values", "q_values"):
        table = tables[name]
        rows = None if table is None else table[seen.to(table.device)]
        if rows is not None and not bool(((rows >= 0) & (rows <= 1)).all()):
            raise ValueError(f"{name} of classes with images must lie in [0, 1].")
    errors, selected = tables["standard_errors"], tables["selected"]
    if errors is not None and bool((errors < 0).any()):
        raise ValueError("standard_errors hold negative numbers.")
    assert selected is not None
    _check_selected(selected, scores.shape, seen)


def _check_selected(selected: Tensor, shape: torch.Size, seen: Tensor) -> None:
    if selected.shape != shape:
        raise ValueError(
            f"selected has shape {tuple(selected.shape)}; expected that of scores, {tuple(shape)}."
        )
    if selected.dtype != torch.bool:
        raise ValueError(f"selected is {selected.dtype}; expected a bool mask of shape (C, K).")
    if bool(selected[~seen.to(selected.device)].any()):
        raise ValueError("Filters are selected for a class without images.")


def _own(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A private copy on the CPU."""
    return tensor.detach().to(device="cpu", dtype=dtype, copy=True).contiguous()
