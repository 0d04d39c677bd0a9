"""Remove filters and retrain what follows: was the information really in them?"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.batches import check_read_again, first_batch, read_batches
from captum_classfilters._core.copies import copied
from captum_classfilters._core.devices import device_of
from captum_classfilters._core.distributed import is_main_process
from captum_classfilters._core.guard import model_left_as_found
from captum_classfilters._core.layers import (
    along_filters,
    find_layer,
    layer_name,
    module_named,
)
from captum_classfilters._core.outputs import as_rows, class_scores, log_probabilities
from captum_classfilters._core.ranking import descending, random_orders
from captum_classfilters._core.score_reader import gives_probabilities
from captum_classfilters._core.tables import Table, Tabular, short_repr
from captum_classfilters._core.taps import LayerTap, tapping
from captum_classfilters._core.training import compute_gradients, not_finite_in_training
from captum_classfilters._core.types import Dataloader, Unpack
from captum_classfilters.class_filters import ClassFilters
from captum_classfilters.metrics.evaluate_classifier import evaluate_classifier
from captum_classfilters.metrics.removals import (
    MAGNITUDE,
    RANDOM,
    check_names,
    magnitude_control,
    one_or_several,
    resolved_layer,
    reversed_name,
)
from captum_classfilters.metrics.reset import reset_weights, weighted_modules


@short_repr
@dataclass(frozen=True)
class RemoveAndRetrain(Tabular):
    r"""
    Accuracy after filters were removed and what follows them was trained anew.

    Args:

        num_filters (list of int): P numbers of filters removed.
        accuracy (dict): For each ranking, its reverse, ``"random"`` and ``"weight magnitude"`` a
                    Tensor (P, R): test accuracy for each number and each repetition.
        full_accuracy (Tensor): Shape (R,), with every filter and the same training.
    """

    num_filters: list[int]
    accuracy: dict[str, Tensor]
    full_accuracy: Tensor

    def _tables(self) -> list[Table]:
        full = self.full_accuracy.mean()
        rows = [
            {"filters removed": name, "0": full}
            | {str(size): value for size, value in zip(self.num_filters, values, strict=True)}
            for name, values in ((name, own.mean(1)) for name, own in self.accuracy.items())
        ]
        return [Table(rows)]


@arguments_checked
def remove_and_retrain(
    model: nn.Module,
    layer: nn.Module | str,
    rankings: ClassFilters | Tensor | Mapping[str, ClassFilters | Tensor],
    train_loader: Dataloader,
    test_loader: Dataloader,
    *,
    num_filters: Sequence[int],
    epochs: int = 3,
    learning_rate: float = 3e-3,
    repetitions: int = 3,
    weight_magnitude: Tensor | None = None,
    channel_dim: int | None = None,
    seed: int = 0,
    unpack: Unpack | None = None,
    show_progress: bool = True,
) -> RemoveAndRetrain:
    r"""
    Remove-and-retrain (ROAR) with filters as features, for small networks.

    Hooker et al. (*A Benchmark for Interpretability Methods in Deep Neural Networks*, NeurIPS 2019,
    https://arxiv.org/abs/1806.10758) remove features and train anew, because a trained network's
    loss may only show that the changed input is strange to it. Pixels keep their meaning in a new
    network, filters do not; so the features here are the filters *of the trained network*: it is kept
    up to the layer, the highest ranked filters are set to zero in training and test images alike, and
    every weight after the layer is drawn and trained anew, with Adam. Filters matter if no training
    makes up for them.

    One order serves all images, because a choice by the image's class would tell the class. A table
    ranks filters by their mean score over the classes that have images.

    Args:

        model (nn.Module): The trained model; it is copied, not changed.
        layer (nn.Module or str): The layer, or its dotted name.
        rankings (ClassFilters, Tensor or mapping): A table or a Tensor (K,), or several by name.
        train_loader (iterable): Batches of (inputs, labels), read once in every epoch.
        test_loader (iterable): Batches of others.
        num_filters (sequence of int): Numbers of filters to remove, between 1 and K - 1.
        epochs (int): Epochs of each training.
                    Default: 3
        learning_rate (float): Of Adam.
                    Default: 3e-3
        repetitions (int): Trainings of each set, from other new weights.
                    Default: 3
        weight_magnitude (Tensor, optional): Shape (K,), the norm of each filter's weights, where it
                    cannot be found in the layer.
        channel_dim (int, optional): Axis of the filters, where it cannot be told from the layer.
                    Default: None
        seed (int): Seed of weights and random orders; the global random state is left as found.
                    Default: 0
        unpack (Callable, optional): From a batch of another kind to the pair (inputs, labels).
                    Default: None
        show_progress (bool): Show a progress bar over trainings.
                    Default: True

    Returns:
        *RemoveAndRetrain*.

    Raises:
        ValueError: Rankings or numbers do not fit, a loader is empty or can be read only once, or
                    nothing with weights follows the layer.
    """
    if epochs < 1 or repetitions < 1:
        raise ValueError("epochs and repetitions must be at least 1.")
    check_read_again(train_loader)
    check_read_again(test_loader)
    layer = resolved_layer(model, layer)
    orders = _orders(model, layer, rankings, repetitions, weight_magnitude, seed)
    most = orders[RANDOM].shape[1]
    num_filters = one_or_several(num_filters)
    sizes = sorted({int(size) for size in num_filters})
    if not sizes or sizes[0] < 1 or sizes[-1] >= most:
        raise ValueError(f"num_filters={list(num_filters)} must be numbers from 1 to {most - 1}.")
    trial = _Trial(
        model, layer_name(model, layer), most, channel_dim, epochs, learning_rate, unpack
    )
    quiet = not (show_progress and is_main_process())
    with (
        model_left_as_found(model),
        torch.inference_mode(False),
        tqdm(
            total=repetitions * (1 + len(orders) * len(sizes)), desc="retraining", disable=quiet
        ) as bar,
    ):
        trial.look_at(train_loader)

        def accuracies(removed: Sequence[Tensor]) -> Tensor:
            values = []
            for repetition, filters in enumerate(removed):
                value = trial.accuracy(filters, train_loader, test_loader, seed + repetition)
                values.append(value)
                bar.update()
            return torch.tensor(values)

        nothing = torch.zeros(0, dtype=torch.int64)
        full = accuracies([nothing] * repetitions)
        accuracy = {
            name: torch.stack([accuracies(list(order[:, :size])) for size in sizes])
            for name, order in orders.items()
        }
    return RemoveAndRetrain(sizes, accuracy, full)


def _orders(
    model: nn.Module,
    layer: nn.Module,
    rankings: ClassFilters | Tensor | Mapping[str, ClassFilters | Tensor],
    repetitions: int,
    weight_magnitude: Tensor | None,
    seed: int,
) -> dict[str, Tensor]:
    """For each name an order of filters for each repetition (R, K), the controls included."""
    scores = _scores(rankings)
    num_filters = len(next(iter(scores.values())))
    once = {}
    for name, own in scores.items():
        once[name] = descending(own)
        once[reversed_name(name)] = once[name].flip(0)
    once[MAGNITUDE] = descending(magnitude_control(model, layer, num_filters, weight_magnitude))
    orders = {name: order.expand(repetitions, -1) for name, order in once.items()}
    generator = torch.Generator().manual_seed(seed)
    orders[RANDOM] = random_orders((num_filters,), repetitions, generator)
    return orders


def _scores(
    rankings: ClassFilters | Tensor | Mapping[str, ClassFilters | Tensor],
) -> dict[str, Tensor]:
    """Scores (K,) by name, checked."""
    if isinstance(rankings, ClassFilters):
        rankings = {rankings.method or "class filters": rankings}
    elif not isinstance(rankings, Mapping):
        rankings = {"ranking": rankings}
    if not all(isinstance(ranking, (ClassFilters, Tensor)) for ranking in rankings.values()):
        raise ValueError("rankings must be ClassFilters or Tensors (K,) by name.")
    check_names(list(rankings))
    scores = {
        name: own.scores[own.counts > 0].mean(0)
        if isinstance(own, ClassFilters)
        else own.detach().cpu().double()
        for name, own in rankings.items()
    }
    lengths = {name: tuple(own.shape) for name, own in scores.items()}
    if not scores or len(set(lengths.values())) > 1 or len(next(iter(lengths.values()))) != 1:
        raise ValueError(f"rankings must be one or more of one length (K,); found {lengths}.")
    for name, own in scores.items():
        if not bool(torch.isfinite(own).all()):
            raise ValueError(f"The ranking {name!r} holds NaN or Inf.")
    return scores


@dataclass
class _Trial:
    """Trainings of what follows a layer, each on a copy of the trained model."""

    model: nn.Module
    layer: str
    num_filters: int
    channel_dim: int | None
    epochs: int
    learning_rate: float
    unpack: Unpack | None
    after: list[str] = field(default_factory=list)
    probabilities: bool = False

    def look_at(self, train: Dataloader) -> None:
        """See on one batch what follows the layer, and what the model returns."""
        batch = first_batch(self.model, train, self.unpack)
        with model_left_as_found(self.model, evaluation=True), torch.no_grad():
            after = weighted_modules(self.model, batch.inputs, find_layer(self.model, self.layer))
            output = self.model(*batch.inputs)
        self.after = [name for name, _ in after]
        if not self.after:
            raise ValueError(f"Nothing with weights follows the layer {self.layer!r}.")
        self.probabilities = gives_probabilities(
            output, self.model, lambda: self.model(*batch.inputs)
        )

    def accuracy(self, removed: Tensor, train: Dataloader, test: Dataloader, seed: int) -> float:
        """Test accuracy without some filters, after training."""
        twin = copied(self.model)
        torch.manual_seed(seed)
        twin.eval().requires_grad_(False)
        parts = [module_named(twin, name) for name in self.after]
        for part in parts:
            reset_weights(part)
            for parameter in part.parameters(recurse=False):
                parameter.requires_grad_(True)
        trained = [parameter for parameter in twin.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=self.learning_rate)
        with self._without(twin, removed):
            for part in parts:
                part.train()
            for _ in range(self.epochs):
                self._epoch(twin, train, optimizer)
            return evaluate_classifier(twin, test, unpack=self.unpack, show_progress=False).accuracy

    def _epoch(self, twin: nn.Module, train: Dataloader, optimizer: torch.optim.Optimizer) -> None:
        with read_batches(
            twin, train, "training", unpack=self.unpack, training=True, show_progress=False
        ) as batches:
            for batch in batches:
                optimizer.zero_grad(set_to_none=True)
                scores = as_rows(class_scores(twin(*batch.inputs)))
                logs = log_probabilities(scores, self.probabilities)
                loss = F.nll_loss(logs, batches.class_labels(batch, logs.shape[1]))
                batches.check(
                    loss.detach().isfinite(), partial(not_finite_in_training, twin.parameters())
                )
                compute_gradients(loss, optimizer, twin)
                optimizer.step()

    def _without(self, twin: nn.Module, removed: Tensor) -> AbstractContextManager[None]:
        """A block in which some filters of a copy put out zero."""
        layer, name = find_layer(twin, self.layer), self.layer
        mask = torch.zeros(1, self.num_filters, dtype=torch.bool)
        mask[0, removed] = True
        mask = mask.to(device_of(twin))

        def remove(tensor: Tensor, axis: int) -> Tensor:
            if tensor.shape[axis] != mask.shape[1]:
                raise ValueError(
                    f"The rankings have {mask.shape[1]} filters, the layer {name!r} "
                    f"{tensor.shape[axis]}."
                )
            # Not a product: zero times infinity is no zero.
            return tensor.masked_fill(along_filters(mask, tensor, axis), 0)

        return tapping([LayerTap(twin, layer, self.channel_dim, react=remove)])
