"""Class filters as an importance for Torch-Pruning's own pruners."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from captum_classfilters._core.costs import inputs_of
from captum_classfilters._core.extras import extra
from captum_classfilters._core.filter_graph import FilterGraph
from captum_classfilters._core.names import check_list
from captum_classfilters._core.tables import described
from captum_classfilters._core.types import ExampleInputs
from captum_classfilters.class_filters import ClassFilters, check_of_output

_REDUCTIONS = {
    "max": lambda scores: scores.max(0).values,
    "mean": lambda scores: scores.mean(0),
    "sum": lambda scores: scores.sum(0),
}


class ClassFilterImportance:
    r"""
    The importance of filters for some classes, for Torch-Pruning's pruners.

    A pruner calls it with a group of filters that go together and removes those of the least
    importance: here a table's scores, reduced over the classes that the network must keep. Groups
    without a table get no importance, so their filters stay.

    Args:

        model (nn.Module): The model that the pruner will prune.
        class_filters (ClassFilters or sequence of them): Tables, of different layers.
        example_inputs (Tensor or tuple): A batch to trace the model with.
        classes (sequence of int or str, optional): The classes that count.
                    Default: None (all with images)
        reduction (str): How scores of several classes become one: ``"max"``, a filter that any
                    class needs stays; ``"mean"``; ``"sum"``.
                    Default: "max"
        normalize (bool): Divide each layer's importance by its mean size, so that a pruner can
                    compare layers.
                    Default: True

    Raises:
        ValueError: There is no table, a class does not exist or has no images, two tables are of
                    the same layer, or a table does not fit its layer.
        ImportError: Torch-Pruning, of the extra ``prune``, is not installed.

    Examples::

        >>> import torch
        >>> import torch_pruning
        >>> from captum_classfilters import LayerFilterContribution
        >>> from captum_classfilters.pruning import ClassFilterImportance
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        ...     torch.nn.Flatten(), torch.nn.Linear(8, 2))
        >>> images = torch.rand(4, 3, 6, 6)
        >>> table = LayerFilterContribution(net, net[1]).identify(
        ...     [(images, torch.tensor([0, 1, 1, 0]))], num_filters=3, show_progress=False)
        >>> pruner = torch_pruning.pruner.BasePruner(
        ...     net, images, importance=ClassFilterImportance(net, table, images),
        ...     pruning_ratio=0.5, ignored_layers=[net[4]])
        >>> pruner.step()
        >>> net[0].out_channels
        4
    """

    def __init__(
        self,
        model: nn.Module,
        class_filters: ClassFilters | Sequence[ClassFilters],
        example_inputs: ExampleInputs,
        *,
        classes: Sequence[int | str] | None = None,
        reduction: Literal["max", "mean", "sum"] = "max",
        normalize: bool = True,
    ) -> None:
        extra("torch_pruning", "ClassFilterImportance").importance.Importance.register(type(self))
        if reduction not in _REDUCTIONS:
            raise ValueError(f"reduction={reduction!r}; choose 'max', 'mean' or 'sum'.")
        tables = [class_filters] if isinstance(class_filters, ClassFilters) else [*class_filters]
        if not tables:
            raise ValueError("class_filters is empty; pass at least one table.")
        graph = FilterGraph(model, inputs_of(model, example_inputs))
        self._scores: dict[nn.Module, Tensor] = {}
        self._names: dict[nn.Module, str] = {}
        for table in tables:
            scores = _REDUCTIONS[reduction](_rows(table, classes))
            if normalize:
                scores = scores / scores.abs().mean().clamp(min=1e-12)
            self._add(graph, table, scores)

    def __repr__(self) -> str:
        return f"ClassFilterImportance(layer={described(list(self._names.values()))})"

    def _add(self, graph: FilterGraph, table: ClassFilters, scores: Tensor) -> None:
        check_of_output(table, table.layer, "filters are removed at")
        layer = graph.layer(table.layer)
        number = graph.width(layer)[1]
        if number != table.num_filters:
            raise ValueError(
                f"The table has {table.num_filters} filters, the layer {table.layer!r} {number}."
            )
        for source in graph.sources(layer):
            if source.module in self._scores:
                raise ValueError(f"Two tables are of the filters of {source.name!r}.")
            own = torch.zeros(len(source.filters), dtype=scores.dtype)
            own[source.filters] = scores[source.places]
            self._scores[source.module], self._names[source.module] = own, source.name

    def __call__(self, group: Any) -> Tensor | None:
        """The importance of a group's filters.

        Args:

            group (torch_pruning.Group): Filters that go together.

        Returns:
            *Tensor* of shape (number of filters,), the mean over the tables of the group's layers;
            None for a group without any.

        Raises:
            ValueError: The model lost filters that the table counts, otherwise than by this
                        pruner's own steps.
        """
        importances = []
        graph = group._DG
        for dependency, places in group:
            module = dependency.target.module
            removes = graph.is_out_channel_pruning_fn(dependency.handler)
            if module in self._scores and removes:
                scores = self._alive(module, graph)
                item = next(item for item in group.items if item.dep is dependency)
                importance = torch.zeros(len(group[0].idxs), dtype=scores.dtype)
                first = {root: place for place, root in enumerate(group[0].idxs)}
                at = [first[root] for root in item.root_idxs]
                importances.append(importance.index_put((torch.tensor(at),), scores[list(places)]))
        return torch.stack(importances).mean(0).float() if importances else None

    def _alive(self, module: nn.Module, graph: Any) -> Tensor:
        """The scores of the filters that earlier steps of the pruner have left."""
        scores = self._scores[module]
        for name, out_channels, places in graph.pruning_history():
            if name == self._names[module] and out_channels:
                left = torch.ones(len(scores), dtype=torch.bool)
                left[list(places)] = False
                scores = scores[left]
        number = int(graph.get_out_channels(module))
        if len(scores) != number:
            raise ValueError(
                f"{self._names[module]!r} has {number} filters, but the table's scores are of "
                f"{len(scores)}: it was pruned otherwise, or through a layer it is tied to. Find "
                "class filters again on the pruned model."
            )
        return scores


def _rows(table: ClassFilters, classes: Sequence[int | str] | None) -> Tensor:
    """The scores of the classes that count."""
    if classes is not None:
        check_list("classes", classes)
    rows = (
        (table.counts > 0).nonzero()[:, 0].tolist()
        if classes is None
        else [table.class_index(label) for label in classes]
    )
    scores = table.scores[rows]
    if not rows or bool(scores.isnan().any()):
        raise ValueError("There are no scores: a class has no images, or no class was given.")
    return scores
