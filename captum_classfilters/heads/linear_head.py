"""A model's last linear layer: found, seen to be linear, run, replaced."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, islice

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from captum_classfilters._core.batches import Batch, first_batch, read_batches
from captum_classfilters._core.copies import copied
from captum_classfilters._core.guard import check_sizes, held, model_left_as_found
from captum_classfilters._core.heads import HeadRecord, alike, in_another_row, is_linear
from captum_classfilters._core.layers import check_runs, find_layer, layer_name, name_of, unwrapped
from captum_classfilters._core.linear_maps import check_not_quantized, is_quantized
from captum_classfilters._core.names import kind_of
from captum_classfilters._core.outputs import as_rows, class_scores
from captum_classfilters._core.tables import short_repr
from captum_classfilters._core.taps import hooked, tapped
from captum_classfilters._core.types import Dataloader, ExampleInputs, ModelInputs, Unpack
from captum_classfilters.class_filters import ClassFilters
from captum_classfilters.heads.decomposed_linear import DecomposedLinear, linear_map

_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, DecomposedLinear)


def find_head(
    model: nn.Module, example_inputs: ExampleInputs | None = None
) -> tuple[str, nn.Module]:
    r"""
    The last linear layer of a model: an ``nn.Linear`` or an ungrouped 1x1 convolution.

    Args:

        model (nn.Module): The model.
        example_inputs (Tensor or tuple, optional): A batch to run; the layer whose output is the
                    model's scores is the head, else the one that runs last. Without it, the one that
                    was registered last.
                    Default: None

    Returns:
        *tuple* of the layer's name and the layer.

    Raises:
        ValueError: The model has no such layer; the message says what its last layers are.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"The model is {kind_of(model)}; a head is found in, and replaced in, an "
            "nn.Module: pass the module that the function calls."
        )
    heads = [m for m in model.modules() if _may_be_head(m)]
    if not heads:
        last = [type(m).__name__ for m in model.modules() if not list(m.children())][-3:]
        raise ValueError(
            f"{type(model).__name__} has no linear head: it ends in {', '.join(last)}. A head that "
            "can be decomposed is an nn.Linear or an ungrouped 1x1 convolution."
        )
    head = heads[-1]
    if example_inputs is not None:
        with example_batch([model], example_inputs) as batch:
            head = _head_that_ran(model, heads, batch.inputs) or head
    name = layer_name(model, head)
    check_head_not_quantized(head, name)
    return name, head


def _may_be_head(module: nn.Module) -> bool:
    """Whether a module is by its class a head, one that is quantized among them: it is refused, and
    no linear layer before it is taken in its place."""
    if is_quantized(module):  # embeddings and recurrent layers are none
        kernel = getattr(module, "kernel_size", None)
        return hasattr(module, "in_features") if kernel is None else all(k == 1 for k in kernel)
    return is_linear(module) or isinstance(module, DecomposedLinear)


def check_head_not_quantized(module: nn.Module, name: str) -> None:
    """Raise if a head's weight is packed integers."""
    check_not_quantized(
        module, f"The head {name!r} ({type(module).__name__})", "Use the floating-point model"
    )


def _head_that_ran(
    model: nn.Module, heads: list[nn.Module], inputs: ModelInputs
) -> nn.Module | None:
    """Which linear layer put out the model's scores, or else ran last."""
    ran: list[tuple[nn.Module, Tensor]] = []
    with hooked(heads, lambda module, _inputs, output: ran.append((module, output))):
        output = model(*inputs)
    with suppress(ValueError):  # scores that the model hides do not tell
        scores = class_scores(output)
        for module, own in reversed(ran):
            if own.data_ptr() == scores.data_ptr() and own.numel() == scores.numel():
                return module
    return ran[-1][0] if ran else None


def check_inside(model: nn.Module) -> None:
    """Raise if a model is itself a linear layer, which cannot be replaced in it."""
    own = unwrapped(model)
    if is_linear(own) or isinstance(own, DecomposedLinear):
        raise ValueError(
            f"The model is itself a {type(own).__name__}, in which no head can be replaced; wrap it: "
            "torch.nn.Sequential(model)."
        )


def head_name(
    model: nn.Module, class_filters: ClassFilters, example_inputs: ExampleInputs | None = None
) -> str:
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


@torch.inference_mode(False)
def replace_head(model: nn.Module, name: str, head: nn.Module) -> nn.Module:
    """A copy of a model with one layer replaced; the model itself keeps its own.

    Args:

        model (nn.Module): The model. Of a compiled one the module inside is copied.
        name (str): Dotted name of the layer to replace.
        head (nn.Module): The new layer.

    Returns:
        *nn.Module*: The copy.
    """
    old = find_layer(model, name)
    while isinstance(model._modules.get("_orig_mod"), nn.Module):  # what torch.compile wraps
        model = model._modules["_orig_mod"]  # type: ignore[assignment]
    return copied(model, {old: head})


def seen_through(
    features: Tensor, weight: Tensor, bias: Tensor | None, convolution_dims: int
) -> Tensor:
    """:func:`linear_map` of features seen in a model, where they are and in the weight's type: a
    model that opens autocast itself has them in another, and outside it nothing casts them."""
    weight = weight.to(features.device)
    bias = None if bias is None else bias.to(features.device)
    return linear_map(features.to(weight.dtype), weight, bias, convolution_dims)


@short_repr
@dataclass(frozen=True)
class LinearHead:
    r"""
    A head that puts out its weight times its input plus its bias.

    Args:

        name (str): Its dotted name.
        module (nn.Module): The layer.
        weight (Tensor): Shape (C, F), detached.
        bias (Tensor or None): Shape (C,), detached.
        convolution_dims (int): 0 for a linear layer, else the dimensions of the 1x1 convolution.
    """

    name: str
    module: nn.Module
    weight: Tensor
    bias: Tensor | None
    convolution_dims: int

    def outputs(self, features: Tensor, weight: Tensor | None = None) -> Tensor:
        """What the head makes of features, with its own weight (C, F) or with another."""
        own = self.weight if weight is None else weight
        return seen_through(features, own, self.bias, self.convolution_dims)

    def outputs_of_few(self, features: Tensor, weight: Tensor) -> Tensor:
        """The same where most rows of a weight (C, F) are zero: these classes put out their bias."""
        rows = weight.to(features.device).any(1).nonzero()[:, 0]
        if 2 * len(rows) > len(weight):
            return self.outputs(features, weight)
        axis = 1 if self.convolution_dims else features.dim() - 1
        bias = weight.new_zeros(len(weight)) if self.bias is None else self.bias
        bias = bias.to(features.device)
        own = seen_through(
            features, weight.to(features.device)[rows], bias[rows], self.convolution_dims
        )
        shape = [*own.shape[:axis], len(weight), *own.shape[axis + 1 :]]
        along = [-1 if place == axis else 1 for place in range(own.dim())]
        everywhere = bias.to(own).reshape(along).expand(shape)
        return everywhere.index_copy(axis, rows, own)

    def is_this(self, features: object, output: object) -> Tensor:
        """Whether an output of the module is :meth:`outputs` of its input, as a bool of no axes."""
        if not isinstance(features, Tensor) or not isinstance(output, Tensor):
            return torch.zeros((), dtype=torch.bool)
        return alike(self.outputs(features), output.detach(), features.dtype, self.weight.dtype)


def linear_head(module: nn.Module, name: str = "head") -> LinearHead:
    r"""
    A head's weight and bias, if these are what it computes.

    A module of the very classes of PyTorch computes its weight, however that came about (weight
    normalization, for example). One with a forward of its own, or with hooks, is tried on random
    numbers.

    Args:

        module (nn.Module): The layer.
        name (str): Its name, for messages.

    Returns:
        *LinearHead*.

    Raises:
        ValueError: It is no linear layer, or computes something else than its weight says.
    """
    check_sizes(module)
    check_head_not_quantized(module, name)
    if not is_linear(module) and not isinstance(module, DecomposedLinear):
        raise ValueError(
            f"The head {name!r} is {kind_of(module)}, which cannot be decomposed; expected "
            "an nn.Linear or an ungrouped 1x1 convolution."
        )
    forwards = [getattr(kind, "forward", None) for kind in _PLAIN]
    plain = type(module).forward in forwards and "forward" not in vars(module)
    if plain and not module._forward_hooks and not module._forward_pre_hooks:
        return _parts(module, name)
    # On a copy, since a forward of its own may count or observe what it is given.
    twin = copied(module).eval()
    head = LinearHead(name, twin, torch.empty(0), None, 0)
    try:
        with model_left_as_found(None), torch.no_grad():
            weight = _parts(twin, name).weight
            shape = (4, weight.shape[1], *[1] * _parts(twin, name).convolution_dims)
            features = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(weight)
            output = twin(features)
            head = _parts(twin, name)  # hooks may have made the weight anew
            computes = bool(head.is_this(features, output))
    except Exception:  # whatever a foreign forward raises, plain it is not
        computes = False
    if not computes:
        raise ValueError(
            f"The head {name!r} ({type(module).__name__}) is not a plain linear layer: its forward or "
            "its hooks compute something else than its weight times its input plus its bias. Put an "
            "nn.Linear in its place that computes the same (a low-rank update added to the weight, a "
            "scale multiplied in, a normalization of the features made a layer before it): "
            f"replace_head(model, {name!r}, plain)."
        )
    return LinearHead(name, module, head.weight, head.bias, head.convolution_dims)


def linear_head_of(model: nn.Module, name: str) -> LinearHead:
    """:func:`linear_head` of a model's layer, when no other thread has its hooks on it."""
    with held(model):
        return linear_head(find_layer(model, name), name)


@short_repr
@dataclass(frozen=True)
class HeadRun:
    r"""
    One forward pass, seen at the head.

    Args:

        output (object): What the model returned.
        features (Tensor): The head's input in its last run, a copy.
        logits (Tensor): The head's output in that run.
        runs (int): How often the head ran.
        ends (bool): Whether the model's scores are the head's own tensor, from its only use.
        linear (Tensor): Whether that is features times weight plus bias: a bool of no axes.
    """

    output: object
    features: Tensor
    logits: Tensor
    runs: int
    ends: bool
    linear: Tensor


def run_head(
    model: nn.Module,
    head: LinearHead,
    inputs: ModelInputs,
    react: Callable[[Tensor], None] | None = None,
) -> HeadRun:
    r"""
    Run a model and see what its head does.

    Args:

        model (nn.Module): The model.
        head (LinearHead): Its head.
        inputs (tuple): A batch.
        react (Callable, optional): Called with the head's input while the model runs, so that what
                    it computes is computed as the head does, under autocast for example.
                    Default: None

    Raises:
        ValueError: The head is not reached, or not with one tensor.
    """
    record = HeadRecord()
    runs: list[tuple[Tensor, Tensor, Tensor]] = []

    def hook(module: nn.Module, arguments: ModelInputs, output: Tensor) -> None:
        features = _single_input(head, arguments)
        record.see(module, features, output)
        # Copies, because what follows may write into them.
        runs.append((features.clone(), output.clone(), head.is_this(features, output)))
        if react is not None:
            react(features)

    with hooked([head.module], hook):
        output = model(*inputs)
    check_runs(head.name, min(1, len(runs)))
    features, logits, linear = runs[-1]
    ends = record.is_output(class_scores(output))
    return HeadRun(output, features, logits, len(runs), ends, linear)


def scoring_head(
    model: nn.Module,
    dataloader: Dataloader,
    given: nn.Module | str | None = None,
    *,
    unpack: Unpack | None = None,
    single: bool = False,
    alone: bool = True,
) -> tuple[LinearHead, Dataloader]:
    r"""
    A model's head, seen on a first batch to put out the scores, each output that of its own class.

    Args:

        model (nn.Module): The model.
        dataloader (iterable): Batches of (inputs, labels).
        given (nn.Module or str, optional): The head, or its dotted name. By default the linear layer
                    whose output is the model's scores, else the one that runs last.
                    Default: None
        unpack (Callable, optional): From a batch of another kind to the pair (inputs, labels).
                    Default: None
        single (bool): The model takes the first input alone, of pairs of images for example.
                    Default: False
        alone (bool): Nothing else may add to the scores.
                    Default: True

    Returns:
        *tuple* of the head and the loader; of one that can be read only once, one that has all its
        batches still.

    Raises:
        ValueError: There is no linear head, or its outputs are not the classes' scores; the message
                    names ``head=``.
    """
    inputs, dataloader = first_inputs(model, dataloader, unpack)
    inputs = inputs[:1] if single else inputs
    check_inside(model)
    name = find_head(model, inputs)[0] if given is None else name_of(model, given)
    head = linear_head_of(model, name)
    with example_batch([model], inputs) as batch:
        check_scores_follow(model, head, batch.inputs, alone)
    return head, dataloader


def first_inputs(
    model: nn.Module, dataloader: Dataloader, unpack: Unpack | None = None
) -> tuple[ModelInputs, Dataloader]:
    """The inputs of a loader's first batch, and the loader; of one that can be read only once, one
    that has all its batches still."""
    if not isinstance(dataloader, Iterator):
        return first_batch(model, dataloader, unpack).inputs, dataloader
    first = [*islice(dataloader, 1)]
    return first_batch(model, first, unpack).inputs, chain(first, dataloader)


def check_scores_follow(
    model: nn.Module, head: LinearHead, inputs: ModelInputs, alone: bool = True
) -> None:
    """Raise unless a model's scores follow from its head's output, class by class, and from it alone.

    The model runs on other images while its head puts out what it did for these: scores that change
    have come another way. Then each output is raised for some image: the score that rises with it
    must be that of the same class. Nothing is asked where the scores are the head's own tensor.
    """
    run = run_head(model, head, inputs)
    if run.ends:
        return
    if alone:
        _check_alone(model, head, inputs)
    _check_order(model, head, inputs, as_rows(class_scores(run.output)))


def _check_alone(model: nn.Module, head: LinearHead, inputs: ModelInputs) -> None:
    """Raise if the model's scores change with what its head does not see."""
    outputs: list[Tensor] = []
    with (
        model_left_as_found(None),  # random layers draw the same again
        tapped(head.module, lambda output: outputs.append(output.clone())),
    ):
        before = class_scores(model(*inputs))
    check_runs(head.name, min(1, len(outputs)))
    if len({output.device for output in outputs}) > 1:  # replicas, in an order of their own
        return
    again = iter(outputs)
    with tapped(head.module, lambda _output: next(again, None)):
        after = class_scores(model(*map(_other_images, inputs)))
    if before.shape != after.shape or not bool(alike(after, before)):
        raise ValueError(
            f"The model's scores do not follow from its head {head.name!r} alone: another part of it, "
            "a second head for example, adds to them, so classes would still see all filters. Name "
            "the layer that puts them out with head=, join the parts into one nn.Linear, or pass a "
            "model that returns the scores of this head only."
        )


def _check_order(model: nn.Module, head: LinearHead, inputs: ModelInputs, before: Tensor) -> None:
    """Raise unless each of a head's outputs raises the score of its own class most."""
    number = len(head.weight)
    if number == 1 and before.shape[1] <= 2:
        return
    if before.shape[1] != number:
        raise ValueError(
            f"The model has scores of {before.shape[1]} classes, and its head {head.name!r} "
            f"{number} outputs. {_of_its_own(head)}"
        )
    other = in_another_row(model, head.module, 1 if head.convolution_dims else -1, inputs, before)
    if other is not None:
        does = "lowers that score" if other[1] is None else f"raises that of class {other[1]}"
        raise ValueError(
            f"Output {other[0]} of the head {head.name!r} is not the score of class {other[0]}: it "
            f"{does}. {_of_its_own(head)}"
        )


def check_found_in_order(head: LinearHead, feed: Mapping[str, object]) -> None:
    """Raise if the images of a table have shown that a head's outputs are in another order than the
    classes."""
    if feed.get("name") == head.name and feed.get("in_order") is False:
        raise ValueError(
            f"The outputs of the head {head.name!r} were not the scores of the classes, in their "
            f"order, when the table was made; example_inputs=, a batch, says which. {_of_its_own(head)}"
        )


def _of_its_own(head: LinearHead) -> str:
    return (
        "Name the layer that puts out the scores with head=, or pass a model whose head has one "
        "output for each class, in their order. Where a step after the head picks its outputs, puts "
        "them in another order or negates them, leave that step out (of the forward, or the wrapper) "
        f"and give the head its rows: replace_head(inner, {head.name!r}, layer), where inner is the "
        "model without the step and layer an nn.Linear with those rows."
    )


@contextmanager
def example_batch(models: list[nn.Module], example_inputs: ExampleInputs) -> Iterator[Batch]:
    """Example inputs where the first model is, and the models in evaluation mode."""
    with read_batches(
        models,
        [example_inputs],
        "example",
        unpack=lambda inputs: (inputs, None),
        labeled=False,
        show_progress=False,
    ) as batches:
        yield from batches


def _single_input(head: LinearHead, arguments: ModelInputs) -> Tensor:
    """The tensor that a head was called with."""
    if len(arguments) != 1 or not isinstance(arguments[0], Tensor):
        raise ValueError(
            f"The head {head.name!r} is called with {len(arguments)} positional arguments; expected "
            "one tensor of features."
        )
    return arguments[0]


def _parts(module: nn.Module, name: str) -> LinearHead:
    """A linear module's weight and bias as they stand."""
    bias = None if module.bias is None else module.bias.detach()  # type: ignore[operator]
    if isinstance(module, DecomposedLinear):
        weight, dims = module.dense_weight().detach(), module.convolution_dims
        return LinearHead(name, module, weight, bias, dims)
    # In training mode a parametrization may change by being read, spectral normalization's does.
    read = copied(module).eval() if module.training and is_parametrized(module) else module
    full: Tensor = read.weight.detach()  # type: ignore[operator]
    return LinearHead(name, module, full.flatten(1), bias, full.dim() - 2)


def _other_images(part: object) -> object:
    """Each image in the place of the next; a single one, moved along its last axis."""
    if not isinstance(part, Tensor) or not part.dim():
        return part
    return part.roll(1, 0) if len(part) > 1 else part.roll(1, -1)
