"""Remove filters and retrain what follows: was the information really in them?"""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from captum_classfilters._core.batches import check_read_again, split_batch
from captum_classfilters._core.guard import model_left_as_found
from captum_classfilters._core.layers import along_filters, filter_axis, find_layer, only_tensor
from captum_classfilters.class_filters import ClassFilters
from captum_classfilters.metrics.evaluate_classifier import evaluate_classifier
from captum_classfilters.metrics.removals import (
    MAGNITUDE,
    RANDOM,
    magnitude_control,
    order_of,
    random_orders,
    reversed_name,
)
from captum_classfilters.metrics.reset import reset_weights, weighted_modules


@dataclass(frozen=True)
class RemoveAndRetrain:
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

    def __str__(self) -> str:
        head = "".join(f"{number:>8d}" for number in (0, *self.num_filters))
        lines = [f"{'filters removed':32s}{head}"]
        full = float(self.full_accuracy.mean())
        for name, values in self.accuracy.items():
            row = "".join(f"{value:8.3f}" for value in (full, *values.mean(1).tolist()))
            lines.append(f"{name:32s}{row}")
        return "\n".join(lines)


def remove_and_retrain(
    model: nn.Module,
    layer: str,
    rankings: ClassFilters | Tensor | Mapping[str, ClassFilters | Tensor],
    train_loader: Iterable[Any],
    test_loader: Iterable[Any],
    *,
    num_filters: Sequence[int],
    epochs: int = 3,
    learning_rate: float = 3e-3,
    repeats: int = 3,
    weight_magnitude: Tensor | None = None,
    channel_dim: int | None = None,
    seed: int = 0,
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
        layer (str): Dotted name of the layer.
        rankings (ClassFilters, Tensor or mapping): A table or a Tensor (K,), or several by name.
        train_loader (iterable): Batches of (images, labels), read once in every epoch.
        test_loader (iterable): Batches of other images.
        num_filters (sequence of int): Numbers of filters to remove, between 1 and K - 1.
        epochs (int): Epochs of each training.
                    Default: 3
        learning_rate (float): Of Adam.
                    Default: 3e-3
        repeats (int): Repetitions with other new weights.
                    Default: 3
        weight_magnitude (Tensor, optional): Shape (K,), the norm of each filter's weights, where it
                    cannot be found in the layer.
        channel_dim (int, optional): Axis of the filters, where it cannot be told from the layer.
                    Default: None
        seed (int): Seed of weights and random orders; the global random state is left as found.
                    Default: 0
        show_progress (bool): Show a progress bar over trainings.
                    Default: True

    Returns:
        *RemoveAndRetrain*.

    Raises:
        ValueError: Rankings or numbers do not fit, a loader is empty or can be read only once, or
                    nothing with weights follows the layer.
    """
    if epochs < 1 or repeats < 1:
        raise ValueError("epochs and repeats must be at least 1.")
    check_read_again(train_loader)
    check_read_again(test_loader)
    orders = _orders(model, layer, rankings, repeats, weight_magnitude)
    most = len(next(iter(orders.values()))[0])
    numbers = sorted({int(number) for number in num_filters})
    if not numbers or numbers[0] < 1 or numbers[-1] >= most:
        raise ValueError(f"num_filters={list(num_filters)} must be numbers from 1 to {most - 1}.")
    first = next(iter(train_loader), None)
    if first is None:
        raise ValueError("The train_loader is empty.")
    images, _ = split_batch(first, 0, None)
    trial = _Trial(model, layer, most, images, channel_dim, epochs, learning_rate)
    number_of_trainings = repeats * (1 + len(orders) * len(numbers))
    with (
        model_left_as_found(model),
        tqdm(total=number_of_trainings, desc="retraining", disable=not show_progress) as bar,
    ):

        def accuracy(removed: Tensor, repeat: int) -> float:
            value = trial.accuracy(removed, train_loader, test_loader, seed + repeat)
            bar.update()
            return value

        nothing = torch.zeros(0, dtype=torch.int64)
        full = torch.tensor([accuracy(nothing, repeat) for repeat in range(repeats)])
        found = {
            name: torch.tensor(
                [
                    [accuracy(one[:number], repeat) for repeat, one in enumerate(of_repeats)]
                    for number in numbers
                ]
            )
            for name, of_repeats in orders.items()
        }
    return RemoveAndRetrain(numbers, found, full)


def _orders(
    model: nn.Module,
    layer: str,
    rankings: ClassFilters | Tensor | Mapping[str, ClassFilters | Tensor],
    repeats: int,
    weight_magnitude: Tensor | None,
) -> dict[str, list[Tensor]]:
    """For each name an order of filters for each repetition, the controls included."""
    given = (
        {rankings.method or "class filters": rankings}
        if isinstance(rankings, ClassFilters)
        else dict(rankings)
        if isinstance(rankings, Mapping)
        else {"ranking": rankings}
    )
    if not all(isinstance(one, (ClassFilters, Tensor)) for one in given.values()):
        raise ValueError("rankings must be ClassFilters or Tensors (K,) by name.")
    scores = {
        name: one.scores[one.counts > 0].mean(0) if isinstance(one, ClassFilters) else one
        for name, one in given.items()
    }
    lengths = {name: tuple(one.shape) for name, one in scores.items()}
    if not scores or len(set(lengths.values())) > 1 or len(next(iter(lengths.values()))) != 1:
        raise ValueError(f"rankings must be one or more of one length (K,); found {lengths}.")
    unsorted = [name for name, one in scores.items() if not bool(torch.isfinite(one).all())]
    if unsorted:
        raise ValueError(f"The ranking {unsorted[0]!r} holds NaN or Inf.")
    number = next(iter(lengths.values()))[0]
    orders: dict[str, list[Tensor]] = {}
    for name, one in scores.items():
        order = order_of(one.detach().cpu().double())
        orders[name], orders[reversed_name(name)] = [order] * repeats, [order.flip(0)] * repeats
    magnitude = magnitude_control(model, find_layer(model, layer), number, weight_magnitude)
    orders[MAGNITUDE] = [order_of(magnitude)] * repeats
    orders[RANDOM] = random_orders((number,), repeats)
    return orders


class _Trial:
    """Trainings of what follows a layer, each on a copy of the trained model."""

    def __init__(
        self,
        model: nn.Module,
        layer: str,
        num_filters: int,
        images: tuple[Tensor, ...],
        channel_dim: int | None,
        epochs: int,
        learning_rate: float,
    ) -> None:
        self.model, self.layer, self.channel_dim = model, layer, channel_dim
        self.num_filters = num_filters
        self.epochs, self.learning_rate = epochs, learning_rate
        parameter = next(model.parameters())
        self.device = parameter.device
        on_device = tuple(one.to(self.device) for one in images)
        with model_left_as_found(model, evaluation=True):
            after = weighted_modules(model, on_device, find_layer(model, layer))
        self.after = [name for name, _ in after]
        if not self.after:
            raise ValueError(f"Nothing with weights follows the layer {layer!r}.")

    def accuracy(
        self, removed: Tensor, train: Iterable[Any], test: Iterable[Any], seed: int
    ) -> float:
        """Test accuracy without some filters, after training."""
        twin = copy.deepcopy(self.model)
        torch.manual_seed(seed)
        twin.eval().requires_grad_(False)
        parts = [twin.get_submodule(name) for name in self.after]
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
            return evaluate_classifier(twin, test, show_progress=False).accuracy

    def _epoch(
        self, twin: nn.Module, train: Iterable[Any], optimizer: torch.optim.Optimizer
    ) -> None:
        for number, batch in enumerate(train):
            images, labels = split_batch(batch, number, self.device)
            optimizer.zero_grad(set_to_none=True)
            with torch.enable_grad():
                loss = F.cross_entropy(twin(*images), torch.as_tensor(labels).to(self.device))
            if not bool(torch.isfinite(loss)):
                raise ValueError("The training loss is NaN or Inf; lower the learning rate.")
            loss.backward()
            optimizer.step()

    @contextmanager
    def _without(self, twin: nn.Module, removed: Tensor) -> Iterator[None]:
        layer = find_layer(twin, self.layer)

        def hook(_module: nn.Module, _inputs: Any, output: Any) -> Tensor:
            tensor = only_tensor(output, self.layer)
            axis = filter_axis(layer, tensor, self.channel_dim)
            if tensor.shape[axis] != self.num_filters:
                raise ValueError(
                    f"The rankings have {self.num_filters} filters, the layer {self.layer!r} "
                    f"{tensor.shape[axis]}."
                )
            kept = tensor.new_ones(1, tensor.shape[axis])
            kept[0, removed] = 0
            return tensor * along_filters(kept, tensor, axis)

        handle = layer.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()
