"""Filters removed for good: a smaller network that computes what masking them computes."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.copies import copied
from captum_classfilters._core.costs import inputs_of
from captum_classfilters._core.filter_cuts import replace_tensors
from captum_classfilters._core.filter_graph import FilterGraph, check_model
from captum_classfilters._core.filter_removal import (
    Constants,
    Removal,
    planned,
    remove_filters,
)
from captum_classfilters._core.guard import held, model_left_as_found
from captum_classfilters._core.layers import name_of
from captum_classfilters._core.types import ExampleInputs
from captum_classfilters.class_filters import ClassFilters, check_of_output
from captum_classfilters.pruning.pruning_order import PruningOrder

Filters = Tensor | Sequence[int] | Sequence[bool]
Keep = Filters | ClassFilters | PruningOrder
Layer = nn.Module | str | Mapping[str, Keep] | ClassFilters | PruningOrder


@arguments_checked
@torch.inference_mode(False)
def prune_filters(
    model: nn.Module,
    layer: Layer,
    example_inputs: ExampleInputs,
    *,
    keep: Keep | None = None,
    remove: Filters | None = None,
    constants: Constants = "fold",
    in_place: bool = False,
    channel_dim: int | None = None,
) -> nn.Module:
    r"""
    Remove filters physically: a smaller network with the outputs of the masked one.

    With a filter go its weights, its normalization, its depthwise convolution and the inputs of the
    layers that read it; all are found by following the filters through one forward pass. The result
    equals the network in which the filters are set to zero in the layer's output. This is checked,
    on the example inputs and on random ones of the same range, in the outputs and where the filters
    are read; where filters cannot be followed, or the check fails, the error says what stands in
    their way. A convolution or linear layer is masked behind the last of the normalization and
    activation modules that follow it (zeroing the weights alone would leave the bias and the shift
    of the batch normalization alive), also where what has no module, the function ``relu`` or the
    addition of a number, stands between; any other layer, for example a block, in its own output.

    What later layers make of a filter that is zero may be a constant: a batch normalization after a
    concatenation (DenseNet) or behind a depthwise convolution (MobileNet) shifts it. Such constants
    are folded into the bias of the layers that read them, which is exact in evaluation mode.

    Args:

        model (nn.Module): The model.
        layer (nn.Module, str, mapping, ClassFilters or PruningOrder): The layer or its dotted
                    name; the weighted layer itself or any module whose filters are those of one or,
                    concatenated, of several. A mapping from names to what to keep prunes several
                    layers. A table or an order brings its own layers; load the weights of an order
                    with fine-tuning into the model first.
        example_inputs (Tensor or tuple): A batch to trace and check the model with.
        keep (Tensor, sequence, ClassFilters or PruningOrder, optional): What stays: a bool mask
                    (K,), indices, the filters that a table selects for any class, or those that an
                    order leaves.
        remove (Tensor or sequence, optional): What goes, as a bool mask (K,) or indices, instead of
                    ``keep``.
        constants (str): ``"fold"`` as above; ``"drop"`` leaves constants out, so that the result
                    equals zeroing the filters in the inputs of the layers that read them, too.
                    Default: "fold"
        in_place (bool): Change the model itself. Optimizers then hold parameters it no longer has.
                    Default: False (a copy is changed)
        channel_dim (int, optional): Axis of the filters, where it cannot be told from the layer.
                    Default: None

    Returns:
        *nn.Module*: The smaller network; training flags and ``requires_grad`` are the model's.

    Raises:
        ValueError: Every filter of a layer would go; the layer is tied to a shortcut (the message
                    names the layers whose filters are added to its own), belongs to a grouped
                    convolution, or does not exist; the mask does not fit; the filters cannot be
                    followed, constants cannot be folded, or the smaller network is not the masked
                    one. The model has then not changed.

    Examples::

        >>> import torch
        >>> from captum_classfilters import prune_filters
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        ...     torch.nn.Flatten(), torch.nn.Linear(8, 2))
        >>> smaller = prune_filters(net, "0", torch.rand(2, 3, 6, 6), remove=[1, 4, 5])
        >>> smaller[0], smaller[4]
        (Conv2d(3, 5, kernel_size=(3, 3), stride=(1, 1)),
         Linear(in_features=5, out_features=2, bias=True))
    """
    if constants not in ("fold", "drop"):
        raise ValueError(f"constants={constants!r}; choose 'fold' or 'drop'.")
    check_model(model)
    requests = _requests(model, layer, keep, remove)
    inputs = inputs_of(model, example_inputs)
    pruned = copied(model)
    with model_left_as_found(pruned, evaluation=True):
        graph = FilterGraph(pruned, inputs)
        removal = Removal()
        for name, kept, removed in requests:
            if isinstance(kept, ClassFilters):
                check_of_output(kept, name, "filters are removed at")
            number = graph.width(graph.layer(name), channel_dim)[1]
            places = _removed(name, number, kept, removed)
            if places:
                removal.join(planned(graph, name, places, channel_dim))
        removal.check(pruned)
        if removal.masks:
            remove_filters(graph, removal, inputs, constants)
    if in_place:
        with held(model):
            replace_tensors(model, pruned)
        return model
    return pruned


def _requests(
    model: nn.Module, layer: Layer, keep: Keep | None, remove: Filters | None
) -> list[tuple[str, Keep | None, Filters | None]]:
    """Layer names with what to keep or to remove, exactly one of them."""
    if isinstance(layer, (Mapping, ClassFilters, PruningOrder)):
        if keep is not None or remove is not None:
            raise ValueError(f"A {type(layer).__name__} says itself what stays: no keep or remove.")
        if isinstance(layer, Mapping):
            if not layer:
                raise ValueError("The mapping of layers to prune is empty.")
            return [(name_of(model, name), kept, None) for name, kept in layer.items()]
        if isinstance(layer, PruningOrder):
            return [(name_of(model, name), mask, None) for name, mask in layer.masks().items()]
        return [(name_of(model, layer.layer), layer, None)]
    if (keep is None) == (remove is None):
        raise ValueError("Give exactly one of keep and remove.")
    return [(name_of(model, layer), keep, remove)]


def _removed(name: str, number: int, keep: Keep | None, remove: Filters | None) -> list[int]:
    """The filters to remove, sorted."""
    if isinstance(keep, ClassFilters):
        keep = keep.selected.any(0)
    elif isinstance(keep, PruningOrder):
        keep = keep.kept()
    mask = _as_mask(name, number, remove if keep is None else keep)
    gone = mask if keep is None else ~mask
    if bool(gone.all()):
        raise ValueError(
            f"Every one of the {number} filters of {name!r} would go; keep at least one."
        )
    return gone.nonzero()[:, 0].tolist()


def _as_mask(name: str, number: int, filters: object) -> Tensor:
    values = torch.as_tensor(filters).cpu()
    if values.dtype == torch.bool:
        if values.shape != (number,):
            raise ValueError(
                f"The mask for {name!r} has shape {tuple(values.shape)}; expected ({number},), one "
                "entry for each filter."
            )
        return values
    if values.numel() == 0:
        return torch.zeros(number, dtype=torch.bool)
    if values.is_floating_point() or values.dim() != 1:
        raise ValueError(
            f"The filters of {name!r} are given as {values.dtype} of shape {tuple(values.shape)}; "
            f"expected a bool mask ({number},) or indices."
        )
    if int(values.min()) < 0 or int(values.max()) >= number:
        raise ValueError(
            f"Filter {int(values.max() if values.min() >= 0 else values.min())} of {name!r} is out "
            f"of range: it has {number}."
        )
    counts = torch.bincount(values.long(), minlength=number)
    if int(counts.max()) > 1:
        raise ValueError(
            f"Filter {int(counts.argmax())} of {name!r} is given {int(counts.max())} times; expected "
            f"indices, each once, or a mask ({number},) of bools: mask.bool()."
        )
    return counts.bool()
