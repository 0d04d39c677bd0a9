"""The decomposed head: each class sees only its own filters."""

import copy
import logging
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_classfilters._core.guard import model_left_as_found
from captum_classfilters._core.heads import how_layer_feeds, is_linear, record_head
from captum_classfilters._core.layers import filter_axis, find_layer, layer_name
from captum_classfilters.class_filters import ClassFilters

logger = logging.getLogger("captum_classfilters")

Missing = Literal["error", "dense", "bias"]


class DecomposedLinear(nn.Module):
    r"""
    A linear layer in which every class uses its own filters only.

    With :math:`S_c` the filters of class *c*,

    .. math:: y_{nc} = \sum_{k \in S_c} V_{ck} z_{nk} + b_c ,

    the decomposed softmax of Badola et al. (https://arxiv.org/abs/2112.07719). Only the weights in
    the sets are parameters. They are stored sparsely, one value, class and feature index each, and
    sets may differ in size. The forward pass lays them out as a dense matrix and multiplies, which
    is faster than a gather on every device we measured, and exports to TorchScript,
    ``torch.export`` and ONNX.

    Args:

        weight (Tensor): Shape (C, F). The dense weights to take from.
        bias (Tensor, optional): Shape (C,).
        mask (Tensor): Shape (C, F), bool. Which features each class keeps.
        convolution_dims (int): 0 for inputs (N, F) or (..., F); 1, 2 or 3 for a 1x1 convolution's
                    (N, F, ...).
                    Default: 0

    Raises:
        ValueError: Shapes do not fit.

    Examples::

        >>> import torch
        >>> from captum_classfilters import DecomposedLinear
        >>> head = DecomposedLinear(
        ...     torch.tensor([[1., 2.], [3., 4.]]), torch.zeros(2),
        ...     mask=torch.tensor([[True, False], [False, True]]))
        >>> head(torch.tensor([[1., 1.]]))
        tensor([[1., 4.]], grad_fn=<AddmmBackward0>)
        >>> sum(parameter.numel() for parameter in head.parameters())
        4
    """

    class_index: Tensor
    feature_index: Tensor

    def __init__(
        self, weight: Tensor, bias: Tensor | None, mask: Tensor, convolution_dims: int = 0
    ) -> None:
        super().__init__()
        if weight.dim() != 2 or mask.shape != weight.shape or mask.dtype != torch.bool:
            raise ValueError(
                f"weight {tuple(weight.shape)} and mask {tuple(mask.shape)} ({mask.dtype}) do not "
                "fit; expected two matrices (C, F), the mask of bool."
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"bias has shape {tuple(bias.shape)}; expected ({weight.shape[0]},).")
        self.out_features, self.in_features = weight.shape
        self.convolution_dims = convolution_dims
        index = mask.to(weight.device).nonzero()
        self.register_buffer("class_index", index[:, 0].contiguous())
        self.register_buffer("feature_index", index[:, 1].contiguous())
        self.weight = nn.Parameter(weight.detach()[index[:, 0], index[:, 1]].clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def dense_weight(self) -> Tensor:
        """The weights as a matrix (C, F), zero outside the sets; differentiable."""
        dense = torch.zeros(
            self.out_features,
            self.in_features,
            dtype=self.weight.dtype,
            device=self.weight.device,
        )
        return dense.index_put((self.class_index, self.feature_index), self.weight)

    def forward(self, features: Tensor) -> Tensor:
        """Logits from features.

        Args:

            features (Tensor): Shape (N, F), or (N, F, ...) for a 1x1 convolution.

        Returns:
            *Tensor* of shape (N, C), or (N, C, ...).
        """
        weight = self.dense_weight()
        if self.convolution_dims == 0:
            return F.linear(features, weight, self.bias)
        logits = F.linear(features.movedim(1, -1), weight, self.bias)
        return logits.movedim(-1, 1)

    @property
    def mask(self) -> Tensor:
        """Which features each class keeps (C, F), bool."""
        mask = torch.zeros(
            self.out_features, self.in_features, dtype=torch.bool, device=self.weight.device
        )
        mask[self.class_index, self.feature_index] = True
        return mask

    def to_dense(self) -> nn.Module:
        """The same function as an ordinary layer.

        Returns:
            *nn.Linear*, or an ``nn.Conv1d/2d/3d`` with kernel size 1.
        """
        shape = (self.in_features, self.out_features)
        if self.convolution_dims:
            kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[self.convolution_dims - 1]
            layer: Any = kind(*shape, kernel_size=1, bias=self.bias is not None)
        else:
            layer = nn.Linear(*shape, bias=self.bias is not None)
        layer = layer.to(self.weight)
        with torch.no_grad():
            layer.weight.copy_(self.dense_weight().reshape(layer.weight.shape))
            if self.bias is not None:
                layer.bias.copy_(self.bias)
        trained: nn.Module = layer.train(self.training)
        return trained

    def refit(self, features: Tensor, labels: Tensor, **options: Any) -> list[float]:
        """Fit the weights to cached features, in place.

        Args:

            features (Tensor): Shape (N, F), the head's inputs.
            labels (Tensor): Shape (N,).
            options: As for :func:`captum_classfilters.heads.fit_linear`.

        Returns:
            *list of float*: The objective before, and after each evaluation.
        """
        from captum_classfilters.heads.refit import fit_linear

        return fit_linear(self, features, labels, **options)

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"weights={self.weight.numel()}, bias={self.bias is not None}"
        )


def find_head(model: nn.Module, example_inputs: Any = None) -> tuple[str, nn.Module]:
    r"""
    The last linear layer of a model: an ``nn.Linear`` or an ungrouped 1x1 convolution.

    Args:

        model (nn.Module): The model.
        example_inputs (Tensor or tuple, optional): A batch to run; the layer that runs last is the
                    head. Without it, the one that was registered last.
                    Default: None

    Returns:
        *tuple* of the layer's name and the layer.

    Raises:
        ValueError: The model has no such layer; the message says what its last layers are.
    """
    if example_inputs is not None:
        inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
        with (
            model_left_as_found(model, evaluation=True),
            torch.no_grad(),
            record_head(model) as record,
        ):
            model(*inputs)
        if record.module is not None:
            return layer_name(model, record.module), record.module
    candidates = [
        (name, module)
        for name, module in model.named_modules()
        if is_linear(module) or isinstance(module, DecomposedLinear)
    ]
    if not candidates:
        last = [type(m).__name__ for m in model.modules() if not list(m.children())][-3:]
        raise ValueError(
            f"{type(model).__name__} has no linear head: it ends in {', '.join(last)}. A head that "
            "can be decomposed is an nn.Linear or an ungrouped 1x1 convolution."
        )
    return candidates[-1]


def decompose(
    model: nn.Module,
    class_filters: ClassFilters,
    *,
    head: str | None = None,
    missing: Missing = "error",
    dropped_means: Tensor | None = None,
    example_inputs: Any = None,
) -> nn.Module:
    r"""
    A copy of the model with the decomposed head in place of its last linear layer.

    The selected filters of each class keep their trained weights, the bias is copied, everything
    else is dropped (Badola et al.). The model itself is not changed. Works for linear and 1x1
    convolution heads; of a head of several linear layers the last is decomposed, with filters found
    at its input (``attribute_to_layer_input=True`` at the head).

    Args:

        model (nn.Module): The model.
        class_filters (ClassFilters): A table with a selection, found at the layer that feeds the
                    head, directly, by averaging positions, or by flattening them.
        head (str, optional): The head's dotted name. By default the one that ``class_filters`` was
                    found to feed, else the last linear layer.
        missing (str): What to do for classes without selected filters: ``"error"``; ``"dense"``
                    keeps all their weights; ``"bias"`` leaves them their bias alone.
                    Default: "error"
        dropped_means (Tensor, optional): Shape (F,), mean of each feature over training images of
                    all classes. The dropped weights times these are added to the bias, which gains
                    accuracy where few filters are kept.
                    Default: None
        example_inputs (Tensor or tuple, optional): A batch on which to check that the layer feeds
                    the head, for tables that do not know.
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
        >>> table = LayerFilterContribution(net, net[1]).identify(
        ...     data, num_filters=3, show_progress=False)
        >>> decompose(net, table)[4]
        DecomposedLinear(in_features=8, out_features=2, weights=6, bias=True)
    """
    name, decomposed = decomposed_head(
        model,
        class_filters,
        head=head,
        missing=missing,
        dropped_means=dropped_means,
        example_inputs=example_inputs,
    )
    return replace_head(model, name, decomposed)


def decomposed_head(
    model: nn.Module,
    class_filters: ClassFilters,
    *,
    head: str | None = None,
    missing: Missing = "error",
    dropped_means: Tensor | None = None,
    example_inputs: Any = None,
) -> tuple[str, DecomposedLinear]:
    r"""
    The decomposed head alone, without a copy of the model; arguments as for :func:`decompose`.

    Args:

        model (nn.Module): The model.
        class_filters (ClassFilters): A table with a selection.
        head (str, optional): The head's dotted name.
        missing (str): What to do for classes without selected filters.
        dropped_means (Tensor, optional): Mean of each feature (F,), to fold into the bias.
        example_inputs (Tensor or tuple, optional): A batch on which to check the table's layer.

    Returns:
        *tuple* of the head's name and the :class:`DecomposedLinear`.

    Raises:
        ValueError: As for :func:`decompose`.
    """
    feed = class_filters.provenance.get("feeds_head") or {}
    name = head or head_name(model, class_filters, example_inputs)
    module = find_layer(model, name)
    weight, bias, convolution_dims = _head_parts(name, module)
    if example_inputs is not None:
        feed = {"name": name, "by": _checked_feed(model, class_filters, name, example_inputs)}
    mask = _feature_mask(class_filters, weight, name, feed, trusted=head is not None)
    mask = _without_missing(mask, class_filters, missing)
    if dropped_means is not None:
        if dropped_means.shape != weight.shape[1:]:
            raise ValueError(
                f"dropped_means has shape {tuple(dropped_means.shape)}; expected "
                f"({weight.shape[1]},), one mean for each feature of the head {name!r}."
            )
        offset = (weight * ~mask.to(weight.device)) @ dropped_means.to(weight)
        bias = offset if bias is None else bias + offset
    decomposed = DecomposedLinear(weight, bias, mask, convolution_dims)
    decomposed.train(module.training)
    return name, decomposed


def head_name(model: nn.Module, class_filters: ClassFilters, example_inputs: Any = None) -> str:
    """The head that a table was found to feed, or else the model's last linear layer.

    Args:

        model (nn.Module): The model.
        class_filters (ClassFilters): The table.
        example_inputs (Tensor or tuple, optional): A batch to run.

    Returns:
        *str*: Its dotted name.
    """
    feed = class_filters.provenance.get("feeds_head") or {}
    return str(feed["name"]) if "name" in feed else find_head(model, example_inputs)[0]


def replace_head(model: nn.Module, name: str, head: nn.Module) -> nn.Module:
    """A copy of a model with one layer replaced; the model itself keeps its own.

    Args:

        model (nn.Module): The model.
        name (str): Dotted name of the layer to replace.
        head (nn.Module): The new layer.

    Returns:
        *nn.Module*: The copy.
    """
    old = find_layer(model, name)
    # The replaced layer is not copied: the memo gives the copy its successor instead.
    return copy.deepcopy(model, {id(old): head})


def _head_parts(name: str, module: nn.Module) -> tuple[Tensor, Tensor | None, int]:
    if isinstance(module, DecomposedLinear):
        return module.dense_weight().detach(), module.bias, module.convolution_dims
    if not is_linear(module):
        raise ValueError(
            f"The head {name!r} is a {type(module).__name__}, which cannot be decomposed; expected "
            "an nn.Linear or an ungrouped 1x1 convolution."
        )
    weight: Tensor = module.weight.detach()  # type: ignore[operator]
    bias: Tensor | None = module.bias  # type: ignore[assignment]
    return weight.flatten(1), bias, weight.dim() - 2


def _feature_mask(
    class_filters: ClassFilters, weight: Tensor, name: str, feed: Any, trusted: bool
) -> Tensor:
    """Which features of the head each class keeps (C, F)."""
    num_classes, num_features = weight.shape
    if class_filters.num_classes != num_classes:
        raise ValueError(
            f"The head {name!r} has {num_classes} outputs, but class_filters has "
            f"{class_filters.num_classes} classes."
        )
    num_filters = class_filters.num_filters
    advice = (
        f"Find the filters at the layer that feeds the head, or at the head's own input: "
        f"LayerFilterFrequency(model, {name!r}).identify(data, attribute_to_layer_input=True)."
    )
    flattened = feed.get("by") == "flatten" and num_features % num_filters == 0
    if num_features != num_filters and not flattened:
        raise ValueError(
            f"The head {name!r} takes {num_features} features, but class_filters holds "
            f"{num_filters} filters of {class_filters.layer!r}. {advice}"
        )
    watched = "feeds_head" in class_filters.provenance
    if not feed and not trusted and watched:
        raise ValueError(
            f"The layer {class_filters.layer!r} does not feed the head {name!r}: its outputs, or "
            f"their means over positions, were not the head's inputs. {advice} To pair filter k "
            f"with feature k all the same, pass head={name!r}."
        )
    if not feed and not watched:
        logger.warning(
            "class_filters does not say whether %r feeds the head %r; pass example_inputs.",
            class_filters.layer,
            name,
        )
    return class_filters.selected.repeat_interleave(num_features // num_filters, dim=1)


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
    model: nn.Module, class_filters: ClassFilters, name: str, example_inputs: Any
) -> str:
    """How the table's layer feeds the head on an example; raises if it does not."""
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    head = find_layer(model, name)
    layer = find_layer(model, class_filters.layer)
    at_input = bool(class_filters.provenance.get("options", {}).get("attribute_to_layer_input"))
    seen: dict[str, Any] = {}
    handles = [
        head.register_forward_pre_hook(lambda _m, args: seen.update(features=args[0].clone())),
    ]
    if at_input:
        handles.append(
            layer.register_forward_pre_hook(lambda _m, args: seen.update(tensor=args[0].clone()))
        )
    else:
        handles.append(
            layer.register_forward_hook(lambda _m, _a, output: seen.update(tensor=output.clone()))
        )
    try:
        with model_left_as_found(model, evaluation=True), torch.no_grad():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    features, tensor = seen["features"], seen["tensor"]
    if features.shape == tensor.shape and torch.allclose(features, tensor, atol=1e-6):
        return "identical"
    axis = filter_axis(None if at_input else layer, tensor)
    feed = how_layer_feeds(features.flatten(1) if features.dim() > 2 else features, tensor, axis)
    if feed is None:
        raise ValueError(
            f"The layer {class_filters.layer!r} does not feed the head {name!r}: the head's input "
            f"{tuple(features.shape)} is neither the layer's tensor {tuple(tensor.shape)}, nor its "
            "mean over positions, nor its flattened form."
        )
    return feed
