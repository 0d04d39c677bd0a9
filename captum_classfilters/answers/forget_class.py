"""A class forgotten in the representation, in closed form."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from captum_classfilters._core.batches import (
    Batch,
    Batches,
    chosen_images,
    dataset_names,
    num_images,
    of_few,
    read_batches,
)
from captum_classfilters._core.copies import copied
from captum_classfilters._core.guard import held
from captum_classfilters._core.layers import find_layer, find_layers, only_tensor, with_tensors
from captum_classfilters._core.linear_maps import LINEAR_MAPS
from captum_classfilters._core.outputs import class_scores, scores_per_class
from captum_classfilters._core.score_reader import ScoreReader
from captum_classfilters._core.stand_ins import StandIn
from captum_classfilters._core.taps import watched
from captum_classfilters._core.types import (
    Arguments,
    ClassNames,
    Dataloader,
    Keywords,
    ModelInputs,
    Unpack,
)
from captum_classfilters._core.units import Rows, UnitTap, aggregated, read_units
from captum_classfilters._core.warnings import warn
from captum_classfilters.class_filters import given_or_known_names, index_of_class
from captum_classfilters.heads.decomposed_linear import linear_layer
from captum_classfilters.heads.linear_head import replace_head, scoring_head
from captum_classfilters.metrics.selectivity import class_means

#: What is taken out of the representation.
Erase = Literal["prototype", "probe"]

_SMALLEST = 1e-4  # of a prototype that must be left once the others are taken out
_RIDGE = 1e-3  # of the mean variance, added to each
_EXAMPLES = 256  # images of the class, at least, that tell whether it is still named
_STILL_NAMED = 0.1  # share of its images on which a forgotten class may be named without a warning


@torch.inference_mode(False)
def forget_class(
    model: nn.Module,
    dataloader: Dataloader,
    class_index: int | str,
    *,
    erase: Erase = "prototype",
    layers: str | nn.Module | Sequence[str | nn.Module] = (),
    head: nn.Module | str | None = None,
    class_names: ClassNames | None = None,
    unpack: Unpack | None = None,
    show_progress: bool = True,
) -> nn.Module:
    r"""
    A copy of the model whose features no longer tell one class, without training.

    :func:`~captum_classfilters.heads.remove_class` takes the class's row out of the head; features
    still tell it. Here a linear layer before the head takes one direction out of them, so that
    nothing behind it has the class:

    - ``"prototype"``: the part *u* of the class's mean features that no mixture of the other classes'
      means has, :math:`z \mapsto z - u u^\top z` with *u* of length 1. The other classes' means stay
      where they are (the projection against retained prototypes that DAMP is built on, at one
      layer);
    - ``"probe"``: what a linear probe reads. With *d* from the mean *g* of the other classes' images
      to the class's mean and *S* their covariance, :math:`z \mapsto z - d \, n^\top (z - g)`,
      :math:`n \propto S^{-1} d`, :math:`n^\top d = 1`. The class's mean goes to *g*. This
      forgets more than a network does that never saw the class: the class may stand out by being
      less distinct than it should.

    What lies before the layer still knows the class; ``layers`` names layers further down where the
    same is done, first to last, each on the network as changed so far. Singular directions are
    channels of a factored layer, which may be named, too.

    Args:

        model (nn.Module): The model, which is not changed. It ends in a linear head.
        dataloader (iterable): Batches of (inputs, labels), images of all classes; read once for each
                    layer.
        class_index (int or str): The class, or its name.
        erase (str): One of the above.
                    Default: "prototype"
        layers (str, nn.Module or sequence of these): Layers further down, in the order in which they
                    run.
                    Default: ()
        head (nn.Module or str, optional): The head, or its dotted name. By default the last
                    linear layer.
                    Default: None
        class_names (sequence of str, optional): C names. By default those of the data set.
                    Default: None
        unpack (Callable, optional): From a batch of another kind to the pair (inputs, labels).
                    Default: None
        show_progress (bool): Show a progress bar.
                    Default: True

    Returns:
        *nn.Module*: The copy. In the place of the head stands an ``nn.Sequential`` of ``forget``, an
        ``nn.Linear`` (F, F), and ``head``, as it was; in the place of each layer one of ``layer`` and
        ``forget``, a 1x1 convolution where it has maps. A model that reads of these what it read of the
        layer, its weight say, finds it there.

    Raises:
        ValueError: There is no such class, a class has no images, the head is not linear, or the
                    other classes' means leave nothing of the class's.

    Examples::

        >>> from captum_classfilters.answers import forget_class
        >>> from captum_classfilters.testing import planted_network
        >>> planted = planted_network()
        >>> data = planted.loader(100)
        >>> forgotten = forget_class(planted.model, data, 1, show_progress=False)
        >>> images, labels = next(iter(data))
        >>> bool((forgotten(images).argmax(1) == 1).any())
        False
    """
    if erase not in get_args(Erase):
        raise ValueError(f"erase={erase!r}; choose 'prototype' or 'probe'.")
    linear, dataloader = scoring_head(model, dataloader, head, unpack=unpack)
    name = linear.name
    number = max(2, len(linear.weight))  # one output tells two classes apart
    names = given_or_known_names(class_names, dataset_names(dataloader), number)
    index = index_of_class(class_index, names)
    inner = list(find_layers(model, layers)) if layers or isinstance(layers, nn.Module) else []
    _check_inner_first(inner)
    changed = model
    for place in [*inner, name]:
        at_head = place == name
        seen = _seen(changed, place, at_head, dataloader, index, unpack, show_progress)
        with held(model):
            own = copied(find_layer(changed, place))
            trains = all(p.requires_grad for p in linear.module.parameters())
        eraser = _eraser(seen, index, erase, linear.weight).requires_grad_(trains)
        if at_head:
            around = StandIn({"forget": eraser, "head": own}, own)
        else:
            # A plain row can be traced and scripted.
            kind = StandIn if isinstance(own, LINEAR_MAPS) or seen.is_plain else _Erased
            around = kind({"layer": own, "forget": eraser}, own)
        changed = replace_head(changed, place, around)
    if len(linear.weight) > 1:  # one output has no class of its own to leave
        _warn_unless_forgotten(changed, seen.examples, index, erase)
    return changed


class _Erased(StandIn):
    """A layer, which may take and put out more than one tensor, and what takes a class out of it."""

    layer: nn.Module
    forget: nn.Module

    def forward(self, *inputs: object, **options: object) -> object:
        output = self.layer(*inputs, **options)
        if isinstance(output, Tensor):
            return self.forget(output)
        erased = self.forget(only_tensor(output, type(self.layer).__name__))
        return with_tensors(output, [erased])


def _check_inner_first(layers: list[str]) -> None:
    """Refuse a layer after one that it is part of: it has another name by then."""
    for place, name in enumerate(layers):
        outer = next((other for other in layers[:place] if name.startswith(f"{other}.")), None)
        if outer is not None:
            raise ValueError(
                f"{name!r} is part of {outer!r}; name it first: layers=[..., {name!r}, ..., {outer!r}]."
            )


@dataclass(frozen=True)
class _Seen:
    """A layer's means (N, K) for images and their labels (N,), the form of its tensor, whether it is
    called with one input and puts out a tensor by itself, and the inputs for some images of the
    class."""

    name: str
    means: Tensor
    labels: Tensor
    num_classes: int
    convolution_dims: int
    is_plain: bool
    examples: list[tuple[ModelInputs, int]]  # images of the class, and how many their batch had


class _Reader(UnitTap):
    """Notes the form of the layer's tensor."""

    form = (0, 0)

    def projected(self, tensor: Tensor) -> Tensor:
        """The maps, as ever."""
        self.form = self.axis_of(tensor), tensor.dim()
        return super().projected(tensor)


def _seen(
    model: nn.Module,
    name: str,
    at_input: bool,
    dataloader: Dataloader,
    class_index: int,
    unpack: Unpack | None,
    show_progress: bool,
) -> _Seen:
    """Read a layer on all images."""
    layer = find_layer(model, name)
    tap = _Reader(model, layer, at_input=at_input)
    tap.reduce = lambda maps: (aggregated(maps, "mean"),)
    means, labels, classes, plain = Rows(), Rows(), [0], [True]
    examples: list[tuple[ModelInputs, int]] = []

    def take(batches: Batches, batch: Batch, output: object) -> None:
        classes[0] = scores_per_class(output).shape[1]
        means.add(tap.seen[0])
        own = batches.class_labels(batch, classes[0])
        labels.add(own)
        if sum(num_images(inputs) for inputs, _ in examples) < _EXAMPLES:
            places = (own == class_index).nonzero()[:, 0]
            examples.append((chosen_images(batch.inputs, places), batch.size))

    def note(_layer: nn.Module, inputs: Arguments, named: Keywords, output: object) -> None:
        plain[0] &= len(inputs) == 1 and not named and isinstance(output, Tensor)

    with watched([layer], note):
        read_units(
            model, [tap], dataloader, "forget", take, unpack=unpack, show_progress=show_progress
        )
    axis, dims = tap.form
    if axis not in (1, dims - 1):
        raise ValueError(
            f"The layer {name!r} has its filters on axis {axis} of {dims}; expected the axis after "
            "the images, or the last."
        )
    convolution_dims = 0 if axis == dims - 1 else dims - 2
    return _Seen(
        name,
        torch.cat(means.pieces()).double(),
        torch.cat(labels.pieces()),
        classes[0],
        convolution_dims,
        plain[0],
        [(inputs, size) for inputs, size in examples if num_images(inputs)],
    )


def _eraser(seen: _Seen, class_index: int, erase: Erase, like: Tensor) -> nn.Module:
    """The layer z -> z - d n^T (z - g) that takes the class out, of a tensor's type and device."""
    counts = torch.bincount(seen.labels, minlength=seen.num_classes)
    if not bool((counts > 0).all()):
        missing = int((counts == 0).nonzero()[0, 0])
        raise ValueError(f"No image of class {missing}; images of all classes are needed.")
    z = seen.means
    prototypes = class_means(z, seen.labels, seen.num_classes)
    if erase == "prototype":
        toward = read = _residual(seen, prototypes, class_index)
        center = torch.zeros_like(toward)
    else:
        others = z[seen.labels != class_index]
        center = others.mean(0)
        toward = prototypes[class_index] - center
        read = _fisher(others - center, toward)
    weight = torch.eye(len(toward), dtype=z.dtype) - torch.outer(toward, read)
    bias = toward * (read @ center)
    return linear_layer(weight.to(like), bias.to(like), seen.convolution_dims)


def _warn_unless_forgotten(
    model: nn.Module, examples: list[tuple[ModelInputs, int]], class_index: int, erase: Erase
) -> None:
    """Warn if the changed model still names the class on images of it."""
    named: list[Tensor] = []
    loader = [(inputs, None) for inputs, _ in examples]
    with read_batches(model, loader, "forgotten", labeled=False, show_progress=False) as batches:
        reader = ScoreReader(model, batches)
        for batch, (_, size) in zip(batches, examples, strict=True):
            returned = of_few(lambda inputs: class_scores(model(*inputs)), batch.inputs, size)
            scores = reader.scores(batch, returned)
            named.append((scores.argmax(1) == class_index).cpu())
    share = float(torch.cat(named).double().mean())
    if share > _STILL_NAMED:
        other = (
            "Choose erase='probe'."
            if erase == "prototype"
            else "Name layers further down, too: layers=."
        )
        warn(
            f"Class {class_index} is still named on {share:.0%} of its images: what its mean has and the "
            f"other classes' means have not is small there. {other}"
        )


def _residual(seen: _Seen, prototypes: Tensor, class_index: int) -> Tensor:
    """The direction of a prototype that the others do not span."""
    own = prototypes[class_index]
    others = prototypes[torch.arange(len(prototypes)) != class_index]
    rest = (
        own - others.T @ torch.linalg.lstsq(others.T, own[:, None], driver="gelsd").solution[:, 0]
    )
    if float(rest.norm()) <= _SMALLEST * float(own.norm()):
        raise ValueError(
            f"The other classes' mean features span class {class_index}'s at {seen.name!r}, which has "
            f"{len(own)} filters for {len(prototypes)} classes, as after another class was forgotten "
            "by its prototype: no direction is its own. Choose erase='probe', or a wider layer."
        )
    return rest / rest.norm()


def _fisher(centered: Tensor, toward: Tensor) -> Tensor:
    """What a linear probe would read, with a product of 1 with the class's mean."""
    covariance = centered.T @ centered / len(centered)
    ridge = _RIDGE * covariance.diagonal().mean().clamp(min=1e-12)
    covariance.diagonal().add_(ridge)
    read = torch.linalg.solve(covariance, toward)
    return read / (read @ toward).clamp(min=1e-30)
