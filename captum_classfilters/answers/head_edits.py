"""Small edits of a head's weight and bias."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_classfilters._core.guard import held
from captum_classfilters._core.heads import alike
from captum_classfilters._core.outputs import class_scores, two_classes
from captum_classfilters._core.stand_ins import take_settings
from captum_classfilters._core.taps import hooked
from captum_classfilters._core.types import ModelInputs
from captum_classfilters.answers.sides import SeenBatch
from captum_classfilters.heads.decomposed_linear import DecomposedLinear, linear_layer
from captum_classfilters.heads.linear_head import LinearHead, replace_head, seen_through


@dataclass(frozen=True)
class HeadEdit:
    r"""
    A head that does not see some of what its filters do beyond their means.

    Its features are :math:`\mu + P (z - \mu)`, with *P* either zero for some entries of the weight, or a
    projection that takes directions out, orthogonal or along what reads them; an ordinary weight and bias
    have the same effect.

    Args:

        means (Tensor): Shape (F,), the mean features.
        removed (Tensor, optional): Shape (C, F), bool. Entries of the weight that see the mean only.
        directions (Tensor, optional): Shape (F, r), orthonormal. What no output sees.
        readers (Tensor, optional): Shape (F, r). What tells how much of each direction an image has, with
                    ``readers.T @ directions`` the identity. By default the directions.
        shift (Tensor, optional): Shape (C,). Added to the bias.
    """

    means: Tensor
    removed: Tensor | None = None
    directions: Tensor | None = None
    readers: Tensor | None = None
    shift: Tensor | None = None

    def weight_and_bias(self, head: LinearHead) -> tuple[Tensor, Tensor]:
        """The edited weight (C, F) and bias (C,), where the head is and of its type."""
        own = head.weight.detach()
        weight = own.double().cpu()
        lost = torch.zeros_like(weight)
        if self.removed is not None:
            lost = weight.masked_fill(~self.removed, 0)
        if self.directions is not None:
            directions = self.directions.double()
            readers = directions if self.readers is None else self.readers.double()
            lost = (weight @ directions) @ readers.T
        bias = torch.zeros(len(weight)) if head.bias is None else head.bias.detach().cpu()
        moved = bias.double() + lost @ self.means.double()
        if self.shift is not None:
            moved = moved + self.shift
        return (weight - lost).to(own), moved.to(own)

    def edited(self, model: nn.Module, head: LinearHead) -> nn.Module:
        """A copy of the model, an ordinary layer that is the edited head in the head's place."""
        weight, bias = self.weight_and_bias(head)
        layer = linear_layer(weight, bias, head.convolution_dims)
        take_settings(layer, head.module)
        with held(model):
            trains = next((p.requires_grad for p in head.module.parameters()), True)
            layer.train(head.module.training).requires_grad_(trains)
            return replace_head(model, head.name, layer)


def check_editable(head: LinearHead) -> None:
    """Refuse a head whose entries mean something else."""
    if isinstance(head.module, DecomposedLinear):
        raise ValueError(
            f"The head {head.name!r} is decomposed: its weights are stored sparsely. Edit the dense "
            "one: replace_head(model, name, head.to_dense())."
        )


def _mean(logits: Tensor) -> Tensor:
    return logits.flatten(2).mean(2)


def _mean_of_positive(logits: Tensor) -> Tensor:
    return F.relu(logits).flatten(2).mean(2)


#: What may follow a head that puts out one score for each class, or maps of them; and what makes
#: probabilities of that.
_SCORES = (lambda logits: logits,)
_MAPS: tuple[Callable[[Tensor], Tensor], ...] = (_mean, _mean_of_positive)
_ENDS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda scores: scores,
    lambda scores: scores.log_softmax(1),
    lambda scores: scores.softmax(1),
    torch.sigmoid,
)


class EditedHeads:
    r"""
    A model's answers with other heads in the place of its own.

    Where the answers are seen to follow from the head's output, each head costs a product of matrices;
    the first head is tried against the model itself. Otherwise the model runs once for each.

    Args:

        model (nn.Module): The model.
        head (LinearHead): Its head.
        edits (sequence of HeadEdit): What takes its place.
    """

    def __init__(self, model: nn.Module, head: LinearHead, edits: list[HeadEdit]) -> None:
        self.model, self.head = model, head
        self.heads = [edit.weight_and_bias(head) for edit in edits]
        self._holds: dict[int, bool] = {}  # the short cut, for each kind of images

    def answers(self, seen: SeenBatch) -> Tensor:
        """Classes (1 + E, N) that the model and each edited one predict, on the CPU."""
        follow = self._follows(seen)
        if follow is not None and not self._held(follow, seen):
            follow = None
        rows = [seen.scores.argmax(1)]
        for place in range(len(self.heads)):
            if follow is None:
                rows.append(self._in_model(seen, place))
            else:
                rows.append(self._after(follow, seen, place).argmax(1))
        return torch.stack(rows).cpu()

    def _follows(self, seen: SeenBatch) -> Callable[[Tensor], Tensor] | None:
        """How answers follow from the head's output, if that is seen in a batch's scores."""
        logits = seen.run.logits
        for follow in _SCORES if logits.dim() == 2 else _MAPS:
            scores = two_classes(follow(logits))
            if scores.shape == seen.scores.shape and any(
                bool(alike(end(scores), seen.scores)) for end in _ENDS
            ):
                return follow
        return None

    def _held(self, follow: Callable[[Tensor], Tensor], seen: SeenBatch) -> bool:
        """Whether the first edited head answers as in the model on the first of these images."""
        if seen.kind not in self._holds:
            tried = self._after(follow, seen, 0).argmax(1)
            self._holds[seen.kind] = torch.equal(tried, self._in_model(seen, 0))
        return self._holds[seen.kind]

    def _output(self, features: Tensor, place: int) -> Tensor:
        return seen_through(features, *self.heads[place], self.head.convolution_dims)

    def _after(self, follow: Callable[[Tensor], Tensor], seen: SeenBatch, place: int) -> Tensor:
        return two_classes(follow(self._output(seen.run.features, place)))

    def _in_model(self, seen: SeenBatch, place: int) -> Tensor:
        """What the model itself predicts with an edited head."""

        def hook(_module: nn.Module, inputs: ModelInputs, _output: object) -> Tensor:
            return self._output(inputs[0], place)

        with hooked([self.head.module], hook):
            output = self.model(*seen.inputs)
        return seen.reader.scores(seen.batch, class_scores(output)).argmax(1)
