"""The decomposed head: each class sees only its own filters."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.guard import held, model_left_as_found
from captum_classfilters._core.heads import alike, how_layer_feeds, is_linear
from captum_classfilters._core.layers import (
    check_module,
    find_layer,
    layer_axis,
    layer_name,
    name_of,
)
from captum_classfilters._core.linear_maps import weight_at_inference
from captum_classfilters._core.outputs import class_scores
from captum_classfilters._core.stand_ins import take_settings
from captum_classfilters._core.taps import hooked, tapped
from captum_classfilters._core.types import ExampleInputs
from captum_classfilters.class_filters import ClassFilters, is_of_input
from captum_classfilters.heads.decomposed_linear import DecomposedLinear
from captum_classfilters.heads.linear_head import (
    LinearHead,
    check_found_in_order,
    check_inside,
    check_scores_follow,
    example_batch,
    head_name,
    linear_head_of,
    replace_head,
)
from captum_classfilters.heads.linear_head import (
    find_head as find_head,
)

logger = logging.getLogger("captum_classfilters")

Missing = Literal["error", "dense", "bias"]


@arguments_checked
@torch.inference_mode(False)
def decompose(
    model: nn.Module,
    class_filters: ClassFilters,
    *,
    head: nn.Module | str | None = None,
    missing: Missing = "error",
    dropped_means: Tensor | None = None,
    example_inputs: ExampleInputs | None = None,
) -> nn.Module:
    r"""
    A copy of the model with the decomposed head in place of its last linear layer.

    The selected filters of each class keep their trained weights, the bias is copied, everything
    else is dropped (Badola et al.). The model itself is not changed, and what it does to its head's
    output (a temperature, a clip, a softmax) the copy does, too. Works for linear and 1x1
    convolution heads; of a head of several linear layers the last is decomposed, with filters found
    at its input (``attribute_to_layer_input=True`` at the head). The one logit of a binary
    classifier keeps the filters that either of its two classes selects.

    Args:

        model (nn.Module): The model. Of a compiled one the module inside is copied.
        class_filters (ClassFilters): A table with a selection, found at the layer that feeds the
                    head, directly, by averaging positions, or by flattening them.
        head (nn.Module or str, optional): The head, or its dotted name. By default the one
                    that ``class_filters`` was found to feed, else the last linear layer.
        missing (str): What to do for classes without selected filters: ``"error"``; ``"dense"``
                    keeps all their weights; ``"bias"`` leaves them their bias alone.
                    Default: "error"
        dropped_means (Tensor, optional): Shape (F,), mean of each feature over training images of
                    all classes. The dropped weights times these are added to the bias, which gains
                    accuracy where few filters are kept.
                    Default: None
        example_inputs (Tensor or tuple, optional): A batch on which to check that the layer feeds
                    the head, that the scores follow from the head alone, each output for its own
                    class, and that the copy does what it should. Without it the table's notes of
                    its own images are relied on.
                    Default: None

    Returns:
        *nn.Module*: A copy of the model, its head a :class:`DecomposedLinear`.

    Raises:
        ValueError: There is no head that can be decomposed (the message says what was found), the
                    table does not fit it, or a class has no selected filters.

    Examples::

        >>> import torch
        >>> from captum_classfilters import LayerFilterContribution, decompose
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        ...     torch.nn.Flatten(), torch.nn.Linear(8, 2))
        >>> data = [(torch.rand(4, 3, 6, 6), torch.tensor([0, 1, 1, 0]))]
        >>> table = LayerFilterContribution(net, net[1]).identify(data, show_progress=False)
        >>> decompose(net, table.select(num_filters=1))[4]
        DecomposedLinear(in_features=8, out_features=2, weights=2, bias=True)
    """
    name, decomposed = decomposed_head(
        model,
        class_filters,
        head=head,
        missing=missing,
        dropped_means=dropped_means,
        example_inputs=example_inputs,
    )
    smaller = replace_head(model, name, decomposed)
    if example_inputs is not None:
        _check_copy(model, name, smaller, decomposed, example_inputs)
    return smaller


@arguments_checked
@torch.inference_mode(False)
def decomposed_head(
    model: nn.Module,
    class_filters: ClassFilters,
    *,
    head: nn.Module | str | None = None,
    missing: Missing = "error",
    dropped_means: Tensor | None = None,
    example_inputs: ExampleInputs | None = None,
) -> tuple[str, DecomposedLinear]:
    r"""
    The decomposed head alone, without a copy of the model; arguments as for :func:`decompose`.

    Args:

        model (nn.Module): The model.
        class_filters (ClassFilters): A table with a selection.
        head (nn.Module or str, optional): The head, or its dotted name.
        missing (str): What to do for classes without selected filters.
        dropped_means (Tensor, optional): Mean of each feature (F,), to fold into the bias.
        example_inputs (Tensor or tuple, optional): A batch on which to check the table's layer.

    Returns:
        *tuple* of the head's name and the :class:`DecomposedLinear`.

    Raises:
        ValueError: As for :func:`decompose`.
    """
    fit = fit_to_head(model, class_filters, head, example_inputs)
    if example_inputs is None:
        check_found_in_order(fit.head, class_filters.provenance.get("feeds_head") or {})
        if head is None and not class_filters.provenance.get("exact"):
            _check_only_one(model, fit.head)
    linear = fit.head
    mask = _without_missing(fit.rows(class_filters.selected), class_filters, missing)
    mask, bias = mask.to(linear.weight.device), linear.bias
    if dropped_means is not None:
        if dropped_means.shape != linear.weight.shape[1:]:
            raise ValueError(
                f"dropped_means has shape {tuple(dropped_means.shape)}; expected "
                f"({linear.weight.shape[1]},), one mean for each feature of the head "
                f"{linear.name!r}."
            )
        offset = (linear.weight * ~mask) @ dropped_means.to(linear.weight)
        bias = offset if bias is None else bias + offset
    decomposed = DecomposedLinear(linear.weight, bias, mask, linear.convolution_dims)
    take_settings(decomposed, linear.module)
    with held(model):
        decomposed.train(linear.module.training)
    return linear.name, decomposed


@dataclass(frozen=True)
class HeadFit:
    r"""
    A head, and which of its features belong to which filter of a table.

    Args:

        head (LinearHead): The head.
        features_per_filter (int): Positions of a filter's map, where the head takes flattened maps.
    """

    head: LinearHead
    features_per_filter: int

    def of_classes(self, selected: Tensor) -> Tensor:
        """Filters (C, K) of the classes as features (C, F)."""
        return selected.repeat_interleave(self.features_per_filter, dim=1)

    def rows(self, selected: Tensor) -> Tensor:
        """Which features each row of the weight keeps; a single logit, those of both classes."""
        features = self.of_classes(selected)
        single = len(self.head.weight) == 1
        return features.any(0, keepdim=True) if single else features


def fit_to_head(
    model: nn.Module,
    class_filters: ClassFilters,
    head: nn.Module | str | None = None,
    example_inputs: ExampleInputs | None = None,
) -> HeadFit:
    """The head that a table belongs to, seen to be linear; raises if they do not fit."""
    check_module(model)
    check_inside(model)
    name = head_name(model, class_filters, example_inputs) if head is None else name_of(model, head)
    linear = linear_head_of(model, name)
    feed = class_filters.provenance.get("feeds_head") or {}
    if feed:
        _check_layer(model, class_filters)
    if example_inputs is not None:
        feed = {"name": name, "by": _checked_feed(model, class_filters, linear, example_inputs)}
    _check_sizes(class_filters, linear, feed)
    _check_feeds(class_filters, linear, feed, trusted=head is not None)
    return HeadFit(linear, linear.weight.shape[1] // class_filters.num_filters)


def _check_layer(model: nn.Module, class_filters: ClassFilters) -> None:
    """Raise if the table is not of a layer's filters, but of directions in their space."""
    try:
        find_layer(model, class_filters.layer)
    except ValueError as error:
        raise ValueError(
            f"The table is of {class_filters.layer!r}, so its columns are not filters that a head "
            f"takes in. {error}"
        ) from error


def _advice(name: str) -> str:
    return (
        "Find the filters at the layer that feeds the head, or at the head's own input: "
        f"LayerFilterFrequency(model, {name!r}).identify(data, attribute_to_layer_input=True)."
    )


def _check_sizes(class_filters: ClassFilters, head: LinearHead, feed: Mapping[str, str]) -> None:
    num_outputs, num_features = head.weight.shape
    binary = num_outputs == 1 and class_filters.num_classes == 2
    if class_filters.num_classes != num_outputs and not binary:
        raise ValueError(
            f"The head {head.name!r} has {num_outputs} outputs, but class_filters has "
            f"{class_filters.num_classes} classes."
        )
    num_filters = class_filters.num_filters
    flattened = feed.get("by") == "flatten" and num_features % num_filters == 0
    if num_features != num_filters and not flattened:
        raise ValueError(
            f"The head {head.name!r} takes {num_features} features, but class_filters holds "
            f"{num_filters} filters of {class_filters.layer!r}. {_advice(head.name)}"
        )


def _check_feeds(
    class_filters: ClassFilters, head: LinearHead, feed: Mapping[str, str], trusted: bool
) -> None:
    watched = "feeds_head" in class_filters.provenance
    if not feed and not trusted and watched:
        raise ValueError(
            f"The layer {class_filters.layer!r} does not feed the head {head.name!r}: its outputs, "
            f"or their means over positions, were not the head's inputs. {_advice(head.name)} To "
            f"pair filter k with feature k all the same, pass head={head.name!r}."
        )
    if not feed and not watched:
        logger.warning(
            "class_filters does not say whether %r feeds the head %r; pass example_inputs.",
            class_filters.layer,
            head.name,
        )


def _check_only_one(model: nn.Module, head: LinearHead) -> None:
    """Raise if another layer might put out scores, too, and nobody has looked."""
    for other in model.modules():
        if other is head.module or not is_linear(other):
            continue
        weight = weight_at_inference(other)
        if weight is not None and weight.flatten(1).shape == head.weight.shape:
            raise ValueError(
                f"The head {head.name!r} and {layer_name(model, other)!r} have the same shape, "
                f"{tuple(head.weight.shape)}. If the model adds them up, classes would still see all "
                "filters through the second head. Pass example_inputs=, a batch, to have it looked "
                f"at, or head={head.name!r} to decompose that layer whatever the other does."
            )


def _without_missing(mask: Tensor, class_filters: ClassFilters, missing: Missing) -> Tensor:
    if missing not in ("error", "dense", "bias"):
        raise ValueError(f"missing={missing!r}; choose 'error', 'dense' or 'bias'.")
    empty = ~mask.any(1)
    if not bool(empty.any()) or missing == "bias":
        return mask
    names = [class_filters.class_names[row] for row in empty.nonzero()[:, 0].tolist()]
    if missing == "error":
        raise ValueError(
            f"{len(names)} class(es) have no selected filters ({', '.join(names[:5])}"
            f"{', ...' if len(names) > 5 else ''}); select some, or choose missing='dense' to keep "
            "all their weights or missing='bias' to leave them the bias alone."
        )
    return mask | empty[:, None]


def _checked_feed(
    model: nn.Module, class_filters: ClassFilters, head: LinearHead, example_inputs: ExampleInputs
) -> str:
    """How the table's layer feeds the head on an example; raises if it does not, or if the head is
    not all that the scores come from."""
    layer = find_layer(model, class_filters.layer)
    at_input = is_of_input(class_filters, class_filters.layer)
    features: list[Tensor] = []
    tensors: list[Tensor] = []
    with example_batch([model], example_inputs) as batch:
        with (
            tapped(head.module, lambda value: _keep(features, value), at_input=True),
            tapped(layer, lambda value: _keep(tensors, value), at_input=at_input),
        ):
            model(*batch.inputs)
        if features and tensors:
            feed = _feed(features[-1], tensors[-1], model, class_filters)
            if feed is not None:
                check_scores_follow(model, head, batch.inputs)
                return feed
    shapes = [
        tuple(values[-1].shape) if values else "(never reached)" for values in (features, tensors)
    ]
    raise ValueError(
        f"The layer {class_filters.layer!r} does not feed the head {head.name!r}: the head's input "
        f"{shapes[0]} is neither the layer's tensor {shapes[1]}, nor its mean over positions, nor its "
        "flattened form."
    )


def _keep(kept: list[Tensor], value: object) -> None:
    tensor = value[0] if isinstance(value, (tuple, list)) and value else value
    if isinstance(tensor, Tensor):
        kept.append(tensor.clone())


def _feed(
    features: Tensor, tensor: Tensor, model: nn.Module, class_filters: ClassFilters
) -> str | None:
    """How a layer's tensor becomes the head's input; None if it does not."""
    if features.shape == tensor.shape and bool(alike(features, tensor)):
        return "identical"
    fits = [
        axis for axis in range(1, tensor.dim()) if tensor.shape[axis] == class_filters.num_filters
    ]
    if tensor.dim() > 1 and len(fits) != 1:
        layer = find_layer(model, class_filters.layer)
        at_input = is_of_input(class_filters, class_filters.layer)
        fits = [layer_axis(model, layer, tensor, at_input=at_input)]
    flat = features.flatten(1) if features.dim() > 2 else features
    return next((feed for axis in fits if (feed := how_layer_feeds(flat, tensor, axis))), None)


def _check_copy(
    model: nn.Module,
    name: str,
    smaller: nn.Module,
    decomposed: DecomposedLinear,
    example_inputs: ExampleInputs,
) -> None:
    """Raise unless the copy returns what the model does with the new head's output in its place."""
    with example_batch([model, smaller], example_inputs) as batch:
        with (
            model_left_as_found(None),  # random layers draw the same again
            hooked([find_layer(model, name)], lambda _module, inputs, _output: decomposed(*inputs)),
        ):
            expected = class_scores(model(*batch.inputs))
        copied = class_scores(smaller(*batch.inputs))
        if copied.shape != expected.shape or not bool(alike(copied, expected)):
            raise ValueError(
                f"{type(model).__name__} does not call its head {name!r} as a module alone (it may "
                "use its weight, or keep a second reference to it), so it cannot be replaced."
            )
