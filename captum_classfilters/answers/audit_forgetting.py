"""Whether a class is forgotten: by the head, by its features, by what stands beside it."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.batches import dataset_names
from captum_classfilters._core.guard import weights_change
from captum_classfilters._core.layers import find_layer
from captum_classfilters._core.names import kind_of, listed_names
from captum_classfilters._core.tables import Row, Table, Tabular, short_repr
from captum_classfilters._core.types import ClassNames, Dataloader, Unpack
from captum_classfilters.class_filters import given_or_known_names, index_of_class
from captum_classfilters.heads.head_features import HeadFeatures, head_features
from captum_classfilters.heads.linear_head import LinearHead, scoring_head

_NEIGHBORS = 20
_RIDGE = 1e-4


@short_repr
@dataclass(frozen=True)
class ForgettingAudit(Tabular):
    r"""
    What models know of a class, one value for each model. Prints as a table.

    Args:

        models (tuple of str): Their names.
        forget_accuracy (Tensor): Shape (M,). Share of the class's images that are told as it.
        retain_accuracy (Tensor): Shape (M,). Share of the other images that are told right.
        linear_probe (Tensor): Shape (M,). Balanced accuracy of a linear probe that tells the class
                    by features; 0.5 is chance.
        neighbor_probe (Tensor): Shape (M,). The same of the nearest neighbors of features.
        other_classes_probe (Tensor): Shape (M,). The same of a linear probe that sees the scores of
                    the other classes only.
    """

    models: tuple[str, ...]
    forget_accuracy: Tensor
    retain_accuracy: Tensor
    linear_probe: Tensor
    neighbor_probe: Tensor
    other_classes_probe: Tensor

    def _tables(self) -> list[Table]:
        rows: list[Row] = [
            {
                "model": model,
                "forget accuracy": self.forget_accuracy[place],
                "retain accuracy": self.retain_accuracy[place],
                "linear probe": self.linear_probe[place],
                "neighbors": self.neighbor_probe[place],
                "by other classes": self.other_classes_probe[place],
            }
            for place, model in enumerate(self.models)
        ]
        return [Table(rows, bars=())]


@arguments_checked
@torch.inference_mode(False)
def audit_forgetting(
    models: Mapping[str, nn.Module],
    class_index: int | str,
    train_loader: Dataloader,
    dataloader: Dataloader,
    *,
    head: str | None = None,
    class_names: ClassNames | None = None,
    seed: int = 0,
    unpack: Unpack | None = None,
    show_progress: bool = True,
) -> ForgettingAudit:
    r"""
    Ask models, and what can be learned from them, for a class that should be forgotten.

    An accuracy of zero says that the head does not name the class. Whether the features still have
    it, attackers tell who have images of it: a linear probe (logistic regression, classes weighted
    alike), the 20 nearest neighbors by cosine among as many images of the class as of others, and a
    linear probe on the scores of the other classes alone, whose pattern may give the class away.
    Zero is not the aim: a network that never saw the class, put beside the others, says what such
    attackers find anyway.

    Args:

        models (mapping of str to nn.Module): The models by names, the original, the one that forgot
                    and one trained without the class, for example; all end in a linear head with
                    the same classes.
        class_index (int or str): The class, or its name.
        train_loader (iterable): Batches of (inputs, labels) that probes learn from, images of all
                    classes.
        dataloader (iterable): Batches of (inputs, labels) that all is measured on.
        head (str, optional): The heads' dotted name, the same in all models. By default the linear
                    layer that puts out a model's scores.
                    Default: None
        class_names (sequence of str, optional): C names. By default those of the data set.
                    Default: None
        seed (int): Which images of other classes are among the neighbors.
                    Default: 0
        unpack (Callable, optional): From a batch of another kind to the pair (inputs, labels).
                    Default: None
        show_progress (bool): Show progress bars.
                    Default: True

    Returns:
        *ForgettingAudit*: ``forget_accuracy``, ``retain_accuracy``, ``linear_probe``,
        ``neighbor_probe`` and ``other_classes_probe`` (M,), one value for each model.

    Raises:
        ValueError: There is no model, a head is not linear or has no such class, or one of the
                    loaders has no image of it, or none of others.

    Examples::

        >>> from captum_classfilters.answers import audit_forgetting, forget_class
        >>> from captum_classfilters.testing import planted_network
        >>> planted = planted_network()
        >>> data = planted.loader(100)
        >>> models = {"original": planted.model,
        ...           "forgotten": forget_class(planted.model, data, 1, show_progress=False)}
        >>> audit = audit_forgetting(models, 1, data, data, show_progress=False)
        >>> float(audit.forget_accuracy[1])
        0.0
    """
    if not isinstance(models, Mapping) or not models:
        found = "empty" if isinstance(models, Mapping) else kind_of(models)
        raise ValueError(f"models is {found}; expected models by name, {{'original': model}}.")
    class_names, known = listed_names(class_names), dataset_names(train_loader)
    measured = []
    for name, model in models.items():
        own_head, train_loader = scoring_head(
            model, train_loader, _in_copy(model, head), unpack=unpack
        )
        number = len(own_head.weight)
        if number < 2:
            raise ValueError(
                f"The head of {name!r} has one output; an audit asks what the scores of the other "
                "classes tell, so it needs one output for each class."
            )
        names = given_or_known_names(class_names, known, number)
        index = index_of_class(class_index, names)
        learned, asked = (
            head_features(model, own_head, loader, unpack=unpack, show_progress=show_progress)
            for loader in (train_loader, dataloader)
        )
        for part, kind in ((learned, "train_loader"), (asked, "dataloader")):
            own = part.labels == index
            if not bool(own.any()) or bool(own.all()):
                raise ValueError(f"{kind} needs images of class {index} and of others.")
        measured.append(_measured(own_head, learned, asked, index, seed))
    columns = torch.tensor(measured, dtype=torch.float64).T
    return ForgettingAudit(tuple(models), *columns)


def _in_copy(model: nn.Module, head: str | None) -> str | None:
    """A head's name in a model, or in a copy in which :func:`forget_class` put it behind another layer."""
    if head is None:
        return None
    if not isinstance(head, str):
        raise ValueError(
            f"head is {kind_of(head)}; expected its dotted name, which is the same in all models."
        )
    inside = [name for name, _ in find_layer(model, head).named_children()]
    return f"{head}.head" if inside == ["forget", "head"] else head


def _measured(
    head: LinearHead, learned: HeadFeatures, asked: HeadFeatures, class_index: int, seed: int
) -> list[float]:
    """The numbers of one model."""
    scores = head.outputs(asked.features)
    right, own = asked.predicted == asked.labels, asked.labels == class_index
    is_class = learned.labels == class_index
    others = torch.arange(scores.shape[1]) != class_index
    before, after = head.outputs(learned.features)[:, others], scores[:, others]
    return [
        float(right[own].double().mean()),
        float(right[~own].double().mean()),
        _balanced(_linear_probe(learned.features, is_class, asked.features), own),
        _balanced(_neighbors(learned.features, is_class, asked.features, seed), own),
        _balanced(_linear_probe(before, is_class, after), own),
    ]


def _balanced(told: Tensor, own: Tensor) -> float:
    """The mean of the shares told right of the class and of all else."""
    return float((told[own].double().mean() + (~told[~own]).double().mean()) / 2)


def _linear_probe(features: Tensor, is_class: Tensor, asked: Tensor) -> Tensor:
    """Whether a logistic regression, classes weighted alike, tells images as the class."""
    mean, spread = features.mean(0), features.std(0, correction=0)
    spread = spread.clamp(min=float(spread.max().clamp(min=1e-12)) * 1e-4)
    x, y = ((features - mean) / spread).double(), is_class.double()
    weights = torch.where(is_class, 0.5 / y.sum(), 0.5 / (1 - y).sum())
    parameters = torch.zeros(x.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [parameters], max_iter=200, tolerance_grad=1e-7, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = x @ parameters[:-1] + parameters[-1]
        losses = F.binary_cross_entropy_with_logits(logits, y, reduction="none")
        loss = (weights * losses).sum() + _RIDGE / 2 * parameters[:-1].pow(2).sum()
        loss.backward()
        return loss.detach()

    with weights_change():
        optimizer.step(closure)
    found = parameters.detach()
    return ((asked - mean) / spread).double() @ found[:-1] + found[-1] > 0


def _neighbors(features: Tensor, is_class: Tensor, asked: Tensor, seed: int) -> Tensor:
    """Whether most of the nearest neighbors, among as many of the class as of others, are of it."""
    generator = torch.Generator().manual_seed(seed)
    own, others = is_class.nonzero()[:, 0], (~is_class).nonzero()[:, 0]
    number = min(len(own), len(others))
    chosen = torch.cat(
        [part[torch.randperm(len(part), generator=generator)[:number]] for part in (own, others)]
    )
    stored = F.normalize(features[chosen], dim=1)
    count = min(_NEIGHBORS, 2 * number)
    shares = [
        is_class[chosen][(F.normalize(part, dim=1) @ stored.T).topk(count, 1).indices]
        for part in asked.split(1000)
    ]
    return torch.cat(shares).double().mean(1) > 0.5
