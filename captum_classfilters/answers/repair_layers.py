"""A few filters of inner layers refitted against a shortcut, judged on other images."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.batches import check_read_again, read_batches
from captum_classfilters._core.copies import copied
from captum_classfilters._core.filter_graph import computed_weight
from captum_classfilters._core.guard import flags_restored, model_left_as_found
from captum_classfilters._core.image_keys import image_keys
from captum_classfilters._core.layers import (
    check_runs,
    find_layer,
    name_of,
    named_layers,
    only_tensor,
)
from captum_classfilters._core.linear_maps import LINEAR_MAPS, TRANSPOSED
from captum_classfilters._core.names import kind_of
from captum_classfilters._core.outputs import at_least_float32, class_scores
from captum_classfilters._core.ranking import descending
from captum_classfilters._core.taps import tapped
from captum_classfilters._core.training import no_gradient_of_loss, not_finite_in_training
from captum_classfilters._core.types import Dataloader, Keywords, ModelInputs, Unpack
from captum_classfilters.answers.repair import (
    Repair,
    check_same_head,
    chosen_outputs,
    found_on,
    judged_counts,
    warn_of_loss,
)
from captum_classfilters.answers.shortcuts import Shortcuts
from captum_classfilters.answers.sides import SeenBatch, both_sides
from captum_classfilters.heads.linear_head import linear_head_of

_Layer: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
_Off: TypeAlias = Callable[[int], Tensor]  # of a side
_WITHOUT, _WITH = 0, 1
_RISE = 0.2  # of all steps, in which the learning rate rises

#: A function from images without it to images with it; None where each batch has both.
Marked = Callable[[Tensor], Tensor] | None


@torch.inference_mode(False)
@arguments_checked
def repair_layers(
    model: nn.Module,
    shortcuts: Shortcuts,
    dataloader: Dataloader,
    judged: Dataloader,
    marked: Marked = None,
    *,
    share: float = 0.05,
    layer: nn.Module | str | None = None,
    keep: float = 3.0,
    epochs: int = 6,
    learning_rate: float = 3e-3,
    outputs: int | str | list[int | str] | None = None,
    repetitions: int = 1,
    seed: int = 0,
    unpack: Unpack | None = None,
    show_progress: bool = True,
) -> Repair:
    r"""
    Refit a few filters of inner layers so that images with something give what they give without it.

    Where something changes maps all over the network, an edit of the head (:func:`repair`) comes too
    late. With :math:`a` what a layer puts out, for every position where it has some, a copy of the model
    is trained to

    .. math::
        \min \; \frac{\lVert a'(x^{\text{with}}) - a(x^{\text{without}}) \rVert^2
            + \text{keep} \, \lVert a'(x^{\text{without}}) - a(x^{\text{without}}) \rVert^2}
            {\lVert a(x^{\text{without}}) \rVert^2}

    with the weights and biases of few filters: those for which a relative change of their weights lowers
    the first term most, by the product :math:`\lVert \nabla_{w_k} \rVert \, \lVert w_k \rVert` of the norms
    of the gradient over all pairs and of the weights. Labels are not used. As a control, as many filters
    drawn at random are changed by as much, in random directions.

    Args:

        model (nn.Module): The model that the shortcuts were found in.
        shortcuts (Shortcuts): From :func:`find_shortcuts`, of pairs.
        dataloader (iterable): Batches of (inputs, labels) without it to fit on, if ``marked`` is given; or
                    of pairs ((without, with), labels).
        judged (iterable): The same of *other* images, to judge on.
        marked (Callable, optional): A function from images without it to images with it.
                    Default: None
        share (float): Filters that may change, of those of all convolutions and linear layers before
                    ``layer``.
                    Default: 0.05
        layer (nn.Module or str, optional): What is to stay as it is without it; by default the head, whose
                    maps are compared position by position where it is a convolution. Before a mean
                    over positions, the last layer that has some is the better choice.
                    Default: None
        keep (float): What images without it count beside those with it.
                    Default: 3.0
        epochs (int): How often the pairs are seen.
                    Default: 6
        learning_rate (float): The largest one of Adam, which rises and falls once.
                    Default: 3e-3
        outputs (int, str or list, optional): Outputs whose wins are counted, by index or name. By
                    default those found that win images.
                    Default: None
        repetitions (int): Random edits of the control, each of which is judged by passes of its own.
                    Default: 1
        seed (int): Of these.
                    Default: 0
        unpack (Callable, optional): From a batch of another kind to the pair (inputs, labels).
                    Default: None
        show_progress (bool): Show a progress bar.
                    Default: True

    Returns:
        *Repair*: the edited ``model``; ``filters``, those that were changed of each layer; and counts as of
        :func:`repair`.

    A warning says if images without it or with it are surely right less often after the edit.

    Raises:
        ValueError: The shortcuts are of groups or of another head, images to judge on were used to find or
            to fit, nothing before the layer can be trained, the layer puts out only zeros without it, or a
            number is out of range.

    Examples::

        >>> import torch
        >>> from captum_classfilters.answers import find_shortcuts, repair_layers
        >>> _ = torch.manual_seed(0)
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 1), torch.nn.ReLU(), torch.nn.Conv2d(8, 2, 1),
        ...     torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        >>> images, labels = torch.rand(80, 3, 8, 8), torch.arange(80) % 2
        >>> def stamp(images):  # a bright corner in the third channel
        ...     images = images.clone()
        ...     images[:, 2, :4, :4] = 3
        ...     return images
        >>> find, judge = ([(images[at], labels[at])] for at in (slice(40), slice(40, 80)))
        >>> quiet = {"show_progress": False}
        >>> found = find_shortcuts(net, find, stamp, **quiet)
        >>> repaired = repair_layers(net, found, find, judge, stamp, share=0.25, outputs=0, **quiet)
        >>> repaired.size, list(repaired.filters)
        (2, ['0'])
    """
    _check_options(share, keep, epochs, learning_rate, repetitions)
    if not shortcuts.paired:
        raise ValueError(
            "The shortcuts were found between groups; repair_layers compares each image with itself, so it "
            "needs pairs: find_shortcuts(..., paired=True)."
        )
    if marked is not None and not callable(marked):
        raise ValueError(
            f"marked is {kind_of(marked)}; expected a function from images without it to images with "
            "it, or one loader of pairs ((without, with), labels) and no marked."
        )
    check_read_again(dataloader)
    head = linear_head_of(model, shortcuts.head)
    check_same_head(head, shortcuts)
    chosen = chosen_outputs(shortcuts, outputs)
    place = shortcuts.head if layer is None else name_of(model, layer)
    options: Keywords = {"unpack": unpack, "show_progress": show_progress}
    fit = _Fit(model, shortcuts.head, place, dataloader, marked, keep, options)
    filters = fit.choose(share)
    fit.train(filters, epochs, learning_rate)
    generator = torch.Generator().manual_seed(seed)
    random = [_random_edit(model, fit, filters, generator) for _ in range(repetitions)]
    counts = judged_counts(
        model, head, partial(_answers, [fit.edited, *random]), judged, marked, chosen,
        fit.used | found_on(shortcuts), paired=True, unpack=unpack, show_progress=show_progress,
    )  # fmt: skip
    names = tuple(shortcuts.class_names[output] for output in chosen)
    result = Repair(fit.edited, "layers", None, None, names, *counts, filters=filters)
    warn_of_loss(result)
    return result


def _check_options(
    share: float, keep: float, epochs: int, learning_rate: float, repetitions: int
) -> None:
    if not 0 < share <= 1:
        raise ValueError(f"share={share} must lie above 0 and not above 1.")
    for name, value, least in (
        ("keep", keep, 0), ("epochs", epochs, 1), ("repetitions", repetitions, 0),
    ):  # fmt: skip
        if not least <= value < float("inf"):
            raise ValueError(f"{name}={value} must be at least {least}.")
    if not 0 < learning_rate < float("inf"):
        raise ValueError(f"learning_rate={learning_rate} must be positive.")


class _Fit:
    """A copy of a model whose layer is brought to put out with something what it puts out without it."""

    def __init__(
        self,
        model: nn.Module,
        head: str,
        place: str,
        dataloader: Dataloader,
        marked: Marked,
        keep: float,
        options: Keywords,
    ) -> None:
        self.model, self.edited = model, copied(model)
        self.place, self.keep = place, keep
        self.dataloader, self.marked, self.options = dataloader, marked, options
        self.used: set[int] = set()
        self.steps = 0  # in an epoch
        self.layers = _weighted(self.edited, find_layer(self.edited, head))

    def choose(self, share: float) -> dict[str, Tensor]:
        """The filters of each layer whose weights matter most for the images with it."""
        with self._training(self.layers) as trained:

            def add_gradients(off: _Off) -> Tensor:
                loss = off(_WITH)
                if loss.requires_grad:
                    loss.backward()
                self.steps += 1
                return loss

            self._each_batch("pairs, to choose filters", add_gradients, trained)
            sizes = {
                name: module.weight.grad.flatten(1).norm(dim=1) * _sizes(module)
                for name, module in self.layers.items()
                if module.weight.grad is not None
            }
        if not sizes:
            raise no_gradient_of_loss(self.model)
        self.layers = {name: self.layers[name] for name in sizes}  # those before the layer
        scores = torch.cat([own.detach().cpu().double() for own in sizes.values()])
        best = descending(scores)[: max(1, round(share * len(scores)))]
        kept = torch.zeros(len(scores), dtype=torch.bool)
        kept[best] = scores[best] > 0  # filters without weights have no size to change by
        parts = kept.split([len(own) for own in sizes.values()])
        return {
            name: part.nonzero()[:, 0]
            for name, part in zip(sizes, parts, strict=True)
            if bool(part.any())
        }

    def train(self, filters: Mapping[str, Tensor], epochs: int, learning_rate: float) -> None:
        """Refit the filters named."""
        layers = {name: self.layers[name] for name in filters}
        others = {name: _others(layers[name], filters[name]) for name in layers}
        total = epochs * self.steps
        with self._training(layers) as trained:
            optimizer = torch.optim.Adam(trained, lr=learning_rate)
            scheduler = LambdaLR(optimizer, partial(_rate, total=total))

            def step(off: _Off) -> Tensor:
                loss = off(_WITH) + self.keep * off(_WITHOUT)
                optimizer.zero_grad()
                loss.backward()
                for name, module in layers.items():
                    for parameter in _own(module):
                        if parameter.grad is not None:
                            parameter.grad[others[name]] = 0
                optimizer.step()
                scheduler.step()
                return loss

            for epoch in range(epochs):
                self._each_batch(f"pairs, epoch {epoch + 1}", step, trained)
            if not all(bool(parameter.isfinite().all()) for parameter in trained):
                raise not_finite_in_training(trained, "model after an epoch")

    @contextmanager
    def _training(self, layers: Mapping[str, _Layer]) -> Iterator[list[nn.Parameter]]:
        """The parameters of some layers, which alone are trained in the block."""
        with model_left_as_found(self.model, evaluation=True), flags_restored(self.edited):
            self.edited.eval().requires_grad_(False)
            trained = [parameter for module in layers.values() for parameter in _own(module)]
            for parameter in trained:
                parameter.requires_grad_(True)
                parameter.grad = None
            yield trained

    def _each_batch(
        self,
        description: str,
        step: Callable[[_Off], Tensor],
        trained: Sequence[nn.Parameter],
    ) -> None:
        """Call a function for each batch of pairs with what tells how far the copy is off on either
        side, in shares of what the model puts out without it. It returns the loss."""
        with read_batches(
            self.edited, self.dataloader, description, training=True, labeled=False, **self.options
        ) as batches:
            for batch in batches:
                sides = both_sides(batch, self.marked)
                for inputs in sides:
                    self.used.update(image_keys(inputs).tolist())
                with torch.no_grad():
                    target = self._output(self.model, sides[_WITHOUT])
                batches.check(target.any(), partial(_only_zeros, self.place, batch.number))
                loss = step(partial(self._off, sides, target)).detach()
                batches.check(loss.isfinite(), partial(not_finite_in_training, trained))

    def _off(self, sides: Sequence[ModelInputs], target: Tensor, side: int) -> Tensor:
        """How far the copy is off on one side."""
        apart = self._output(self.edited, sides[side]) - target
        return apart.square().mean() / target.square().mean()

    def _output(self, model: nn.Module, inputs: ModelInputs) -> Tensor:
        """What the layer puts out."""
        found: list[Tensor] = []

        def note(output: object) -> None:  # which what follows may change in place
            found.append(at_least_float32(only_tensor(output, self.place)).clone())

        with tapped(find_layer(model, self.place), note):
            model(*inputs)
        check_runs(self.place, len(found))
        return found[0]


def _only_zeros(place: str, number: int) -> ValueError:
    return ValueError(
        f"The layer {place!r} puts out only zeros for the images without it of batch {number}, so there is "
        "nothing to compare with; give larger batches, or another layer."
    )


def _weighted(model: nn.Module, head: nn.Module) -> dict[str, _Layer]:
    """Layers whose filters can be given other weights: each weight once, and not the head's."""
    found: dict[str, _Layer] = {}
    reasons, seen = [], {id(getattr(head, "weight", None))}
    for name, module in named_layers(model).items():
        if not isinstance(module, LINEAR_MAPS) or module is head:
            continue
        if isinstance(module, TRANSPOSED):
            reasons.append(f"{name!r} is a transposed convolution")
        elif reason := computed_weight(model, module, name):
            reasons.append(reason)
        elif id(module.weight) not in seen:
            seen.add(id(module.weight))
            found[name] = module
    if not found:
        told = reasons[0] if reasons else "there is no convolution or linear layer but the head"
        raise ValueError(f"No layer of the model can be refitted: {told}.")
    return found


def _own(module: _Layer) -> list[nn.Parameter]:
    """The weight and the bias, which have a row for each filter."""
    names = ("weight",) if module.bias is None else ("weight", "bias")
    return [module.get_parameter(name) for name in names]


def _sizes(module: _Layer) -> Tensor:
    """Lengths of the weights of each filter, (K,)."""
    return at_least_float32(module.weight.detach()).flatten(1).norm(dim=1)


def _others(module: _Layer, filters: Tensor) -> Tensor:
    """Which of a layer's filters are not named, (K,), where the layer is."""
    others = torch.ones(len(module.weight), dtype=torch.bool)
    others[filters] = False
    return others.to(module.weight.device)


def _rate(step: int, total: int) -> float:
    """The learning rate rises evenly, and falls as half a cosine."""
    rise = _RISE * total
    if step < rise:
        return min(1.0, (step + 1) / rise)
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / (total - rise)))


def _random_edit(
    model: nn.Module, fit: _Fit, filters: Mapping[str, Tensor], generator: torch.Generator
) -> nn.Module:
    """As many filters at random, changed by the same shares of their weights in random directions."""
    shares = torch.cat([_changes(model, fit, name)[own] for name, own in filters.items()])
    places = [(name, k) for name, module in fit.layers.items() for k in range(len(module.weight))]
    drawn = torch.randperm(len(places), generator=generator)[: len(shares)]
    edited = copied(model)
    with torch.no_grad():
        for place, share in zip(drawn.tolist(), shares.tolist(), strict=True):
            name, k = places[place]
            weight: Tensor = find_layer(edited, name).weight[k]  # type: ignore[index]
            direction = torch.randn(weight.shape, generator=generator)
            size = share * float(weight.double().norm()) / float(direction.norm())
            weight += (size * direction).to(weight)
    return edited


def _changes(model: nn.Module, fit: _Fit, name: str) -> Tensor:
    """By what share of its length each filter's weight was changed, (K,)."""
    before: _Layer = find_layer(model, name)  # type: ignore[assignment]
    apart = (fit.layers[name].weight - before.weight).detach().flatten(1).norm(dim=1)
    return (apart / _sizes(before).clamp(min=1e-12)).cpu()


def _answers(edits: Sequence[nn.Module], seen: SeenBatch) -> Tensor:
    """Classes (1 + E, N) that the model and each edited one predict, on the CPU."""
    rows = [seen.scores.argmax(1)]
    for edited in edits:
        with model_left_as_found(edited, evaluation=True), torch.no_grad():
            output = edited(*seen.inputs)
        rows.append(seen.reader.scores(seen.batch, class_scores(output)).argmax(1))
    return torch.stack(rows).cpu()
