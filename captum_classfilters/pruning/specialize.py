"""A smaller network for some of the classes: their filters, their outputs."""

import copy
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from captum_classfilters._core.batches import read_batches
from captum_classfilters._core.costs import inputs_of
from captum_classfilters._core.filter_graph import computed_weight
from captum_classfilters._core.guard import held, model_left_as_found
from captum_classfilters._core.heads import alike, is_linear
from captum_classfilters._core.labels import not_finite
from captum_classfilters._core.layers import find_layer, name_of
from captum_classfilters._core.names import check_list, kind_of
from captum_classfilters._core.outputs import class_scores, scores_per_class
from captum_classfilters._core.tables import Table, Tabular, short_repr
from captum_classfilters._core.types import Dataloader, ExampleInputs, ModelInputs, Unpack
from captum_classfilters._core.warnings import warn
from captum_classfilters.class_filters import ClassFilters, check_of_output
from captum_classfilters.heads.decompose import find_head, replace_head
from captum_classfilters.heads.linear_head import check_head_not_quantized
from captum_classfilters.pruning.candidates import checked_labels
from captum_classfilters.pruning.prune_filters import prune_filters


@short_repr
@dataclass(frozen=True)
class SpecialistAccuracy(Tabular):
    r"""
    Accuracy of a network and of its specialist on the specialist's classes; prints as a table.

    Args:

        class_names (tuple of str): The S classes.
        counts (Tensor): Shape (S,). Images of each class.
        among_all (Tensor): Shape (S,). Accuracy of the full network, which chooses among all
                    classes.
        full (Tensor): Shape (S,). Accuracy of the full network if it chooses among these classes
                    only, the fair comparison.
        specialist (Tensor): Shape (S,). Accuracy of the specialist.
    """

    class_names: tuple[str, ...]
    counts: Tensor
    among_all: Tensor
    full: Tensor
    specialist: Tensor

    def overall(self, which: str = "specialist") -> float:
        """Accuracy over the images of all these classes.

        Args:

            which (str): ``"among_all"``, ``"full"`` or ``"specialist"``.

        Returns:
            *float*.
        """
        values: Tensor = getattr(self, which)
        return float((values.nan_to_num() * self.counts).sum() / self.counts.sum())

    def _tables(self) -> list[Table]:
        columns = {"full, all": "among_all", "full, these": "full", "specialist": "specialist"}
        rows = [
            {
                "class": name,
                "images": self.counts[row],
                **{title: getattr(self, which)[row] for title, which in columns.items()},
            }
            for row, name in enumerate(self.class_names)
        ]
        together = {title: self.overall(which) for title, which in columns.items()}
        rows.append({"class": "together", "images": self.counts.sum(), **together})
        return [Table(rows, dict.fromkeys(columns, ".4f"))]


@short_repr
@dataclass(frozen=True)
class Specialist:
    r"""
    A network for some of the classes.

    Args:

        model (nn.Module): The network; output *s* is class ``classes[s]`` of the full one.
        classes (tuple of int): The S classes, as indices of the full network's outputs.
        class_names (tuple of str): Their names.
        kept (dict): For each pruned layer which filters (K,) stayed, bool.
        accuracy (SpecialistAccuracy or None): Before and after; None without a loader.
    """

    model: nn.Module
    classes: tuple[int, ...]
    class_names: tuple[str, ...]
    kept: dict[str, Tensor]
    accuracy: SpecialistAccuracy | None


@torch.inference_mode(False)
def specialize(
    model: nn.Module,
    class_filters: ClassFilters | Sequence[ClassFilters],
    classes: Sequence[int | str],
    example_inputs: ExampleInputs,
    *,
    dataloader: Dataloader | None = None,
    head: nn.Module | str | None = None,
    unpack: Unpack | None = None,
    device: torch.device | str | None = None,
    show_progress: bool = True,
) -> Specialist:
    r"""
    A physically smaller network that tells some classes apart, with the filters they need.

    Of each table's layer the filters stay that the table selects for any of the classes; of the
    last linear layer the rows of the classes. Both go through :func:`prune_filters`' rules, so a
    layer tied to a shortcut is refused. Few filters of several layers at once may leave a network
    that cannot tell the classes apart any more; with a loader, a warning then says so.

    Args:

        model (nn.Module): The model, whose output is its head's, maybe averaged over positions.
        class_filters (ClassFilters or sequence of them): Tables with selections, of different
                    layers.
        classes (sequence of int or str): The classes, in the order of the new outputs.
        example_inputs (Tensor or tuple): A batch to trace and check the model with.
        dataloader (iterable, optional): Batches of (inputs, labels) with the labels of the full
                    network, other classes among them or not; for the accuracy table.
                    Default: None
        head (nn.Module or str, optional): The head, or its dotted name. By default the
                    linear layer that runs last.
        unpack (Callable, optional): From a batch of another kind to the pair (inputs, labels).
                    Default: None
        device (torch.device or str, optional): Where the batches go; by default where the model is.
        show_progress (bool): Show a progress bar over the batches.
                    Default: True

    Returns:
        *Specialist*.

    Raises:
        ValueError: Fewer than two classes, a class given twice or without filters, the model has a
                    single output, the head is not linear or does not end the model, the loader has
                    no image of the classes; and as for :func:`prune_filters`.

    Examples::

        >>> import torch
        >>> from captum_classfilters import LayerFilterContribution
        >>> from captum_classfilters.pruning import specialize
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        ...     torch.nn.Flatten(), torch.nn.Linear(8, 4))
        >>> images = torch.rand(4, 3, 6, 6)
        >>> table = LayerFilterContribution(net, net[1]).identify(
        ...     [(images, torch.arange(4))], num_filters=2, show_progress=False)
        >>> specialist = specialize(net, table, [3, 1], images)
        >>> specialist.model(images).shape
        torch.Size([4, 2])
    """
    tables = [class_filters] if isinstance(class_filters, ClassFilters) else [*class_filters]
    rows, names = _chosen(tables, classes)
    kept = {}
    for table in tables:
        check_of_output(table, table.layer, "filters are removed at")
        if table.layer in kept:
            raise ValueError(f"Two tables are of the layer {table.layer!r}.")
        kept[table.layer] = _needed(table, rows)
    inputs = inputs_of(model, example_inputs)
    name = find_head(model, inputs)[0] if head is None else name_of(model, head)
    pruned = prune_filters(model, kept, inputs)
    smaller = with_rows(pruned, name, rows)
    check_rows(pruned, smaller, rows, inputs, name)
    accuracy = None
    if dataloader is not None:
        options = {"unpack": unpack, "device": device, "show_progress": show_progress}
        accuracy = _accuracy(model, smaller, rows, names, dataloader, **options)
        _warn_near_chance(accuracy)
    return Specialist(smaller, tuple(rows), names, kept, accuracy)


def _warn_near_chance(accuracy: SpecialistAccuracy) -> None:
    """Warn if the specialist tells its classes hardly better apart than a guess does."""
    counted = accuracy.counts > 0
    number = len(accuracy.counts)
    chance = 1 / number
    mean = float(accuracy.specialist[counted].mean())
    # The standard error of a guess's accuracy, averaged over the classes that have images.
    variance = chance * (1 - chance) * float((1 / accuracy.counts[counted].double()).sum())
    error = variance**0.5 / int(counted.sum())
    if mean < chance + max(0.1 * (1 - chance), error):
        full = float(accuracy.full[counted].mean())
        warn(
            f"The specialist for {', '.join(accuracy.class_names)} has an accuracy of {mean:.3f}, the "
            f"mean over these classes, near the {chance:.3f} of a guess; the full network has "
            f"{full:.3f}. Its filters do not tell the classes apart: select more for each class, or "
            "give tables of fewer layers.",
        )


def _chosen(
    tables: Sequence[ClassFilters], classes: Sequence[int | str]
) -> tuple[list[int], tuple[str, ...]]:
    if not tables:
        raise ValueError("class_filters is empty; pass at least one table.")
    check_list("classes", classes)
    rows = [tables[0].class_index(label) for label in classes]
    if len(rows) < 2 or len(set(rows)) != len(rows):
        raise ValueError(f"classes={list(classes)}: expected two or more different classes.")
    return rows, tuple(tables[0].class_names[row] for row in rows)


def _needed(table: ClassFilters, rows: Sequence[int]) -> Tensor:
    """The filters that a table selects for any of the classes."""
    chosen = table.selected[list(rows)]
    empty = [
        table.class_names[row] for row, any_ in zip(rows, chosen.any(1), strict=True) if not any_
    ]
    if empty:
        raise ValueError(
            f"The table of {table.layer!r} selects no filters for {', '.join(empty)}; select some, "
            "with class_filters.select say."
        )
    return chosen.any(0)


def check_several_outputs(number: int) -> None:
    """Raise if a head has the one output of a binary classifier."""
    if number == 1:
        raise ValueError(
            "The model's one output tells its two classes apart already: there is no class to leave out. "
            "To cut filters alone, use prune_filters."
        )


def with_rows(model: nn.Module, name: str, rows: Sequence[int]) -> nn.Module:
    """The model with only some outputs of its head."""
    head: Any = find_layer(model, name)
    check_head_not_quantized(head, name)
    if not is_linear(head):
        raise ValueError(
            f"The head {name!r} is {kind_of(head)}; expected an nn.Linear or an ungrouped "
            "1x1 convolution, whose rows are classes."
        )
    with model_left_as_found(model, evaluation=True):  # where reading a weight does not change it
        number = len(head.weight)
    check_several_outputs(number)
    if max(rows) >= number:
        raise ValueError(
            f"The head {name!r} has {number} outputs, and there is no class {max(rows)} among "
            "them; give the head with head=, or tables of this model."
        )
    reason = computed_weight(model, head, name)
    if reason:
        raise ValueError(f"The head {name!r} cannot be cut to some classes: {reason}.")
    with held(model):
        shorter = copy.deepcopy(head)
        index = torch.tensor(list(rows)).to(head.weight.device)
        for part in ("weight", "bias"):
            full = getattr(head, part)
            if full is not None:
                cut = nn.Parameter(full.detach()[index].clone(), requires_grad=full.requires_grad)
                setattr(shorter, part, cut)
        width = "out_features" if isinstance(head, nn.Linear) else "out_channels"
        setattr(shorter, width, len(rows))
        return replace_head(model, name, shorter)


def check_rows(
    pruned: nn.Module,
    smaller: nn.Module,
    rows: Sequence[int],
    inputs: ModelInputs,
    name: str,
) -> None:
    """The specialist's outputs must be the pruned network's outputs for the classes."""
    with (
        model_left_as_found(pruned, evaluation=True),
        model_left_as_found(smaller, evaluation=True),
        torch.no_grad(),
    ):
        full = class_scores(pruned(*inputs))
        if not bool(full.isfinite().all()):
            raise ValueError("The model returns NaN or Inf for the first images.")
        cut = full[:, :0]
        with suppress(Exception):  # something else reads the head
            cut = class_scores(smaller(*inputs))
    whole = full.dim() == 2 and full.shape[1] > max(rows)
    expected = full[:, torch.tensor(list(rows)).to(full.device)] if whole else full
    if not whole or cut.shape != expected.shape or not bool(alike(cut, expected)):
        raise ValueError(
            f"The rows of {name!r} are not the model's outputs, class by class; take off what follows "
            "it, a Softmax for example, or say which linear layer puts out the logits with head=."
        )


def _accuracy(
    model: nn.Module,
    smaller: nn.Module,
    rows: Sequence[int],
    names: tuple[str, ...],
    dataloader: Dataloader,
    **options: Any,
) -> SpecialistAccuracy:
    """Accuracy on the images of the classes, all others left out."""
    sums: Tensor | None = None  # images of each class, and how often each of three is right
    with read_batches([model, smaller], dataloader, "accuracy", **options) as batches:
        for batch in batches:
            scores = scores_per_class(model(*batch.inputs))
            labels = checked_labels(batches, batch, scores)
            classes = torch.tensor(list(rows)).to(labels.device)
            belongs, place = (labels[:, None] == classes).long().max(1)
            own = scores_per_class(smaller(*batch.inputs))
            finite = own.isfinite().all(1)
            batches.check(finite.all(), partial(not_finite, finite, batch.number))
            answers = (
                scores.argmax(1) == labels,
                scores[:, classes].argmax(1) == place,
                own.argmax(1) == place,
            )
            if sums is None:
                sums = torch.zeros(4, len(rows), dtype=torch.int64, device=labels.device)
            sums.index_add_(1, place, torch.stack([belongs, *(belongs * hit for hit in answers)]))
    assert sums is not None  # the loader has an image
    counts, *right = sums.cpu()
    if not counts.sum():
        raise ValueError(f"The data loader holds no image of {', '.join(names)}.")
    among_all, full, specialist = torch.stack(right).double() / counts
    return SpecialistAccuracy(names, counts, among_all, full, specialist)
