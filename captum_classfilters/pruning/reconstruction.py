"""Filters removed while the layers that read them learn, in closed form, to do without them."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from captum_classfilters._core.batches import read_batches
from captum_classfilters._core.copies import copied
from captum_classfilters._core.filter_graph import FilterGraph
from captum_classfilters._core.layers import find_layer
from captum_classfilters._core.outputs import scores_per_class
from captum_classfilters._core.types import Dataloader, ModelInputs
from captum_classfilters.pruning.least_squares import (
    Fit,
    Reader,
    Seen,
    can_be_fitted,
    matrix_of,
    positions_for,
    put_matrix,
    remove_least,
    root_of,
    see_again,
    see_full,
    weighted,
)
from captum_classfilters.pruning.low_rank import LowRank, choose_ranks, replace_module
from captum_classfilters.pruning.network_size import NetworkSize, Ranks
from captum_classfilters.pruning.resumed_runs import ResumedRuns, can_resume


def scores_of(
    model: nn.Module,
    data: Dataloader,
    run: Callable[[int, ModelInputs], Any] | None = None,
) -> Tensor:
    """Scores (N, C) of a model for all images; ``run`` runs it on the inputs of a batch otherwise."""
    found = []
    with read_batches(model, data, "scores", show_progress=False) as batches:
        for number, batch in enumerate(batches):
            output = model(*batch.inputs) if run is None else run(number, batch.inputs)
            found.append(scores_per_class(output).double())
    return torch.cat(found)


class Reconstruction:
    r"""
    A network's layers that can lose filters, what reads them, and what that made of some images.

    Args:

        model (nn.Module): The network, with one output for each class that counts.
        head (str): Its head, which is fitted at last.
        layers (sequence of str): Its layers that can lose filters.
        data (sequence): Batches of (inputs, labels), read several times.
        example_inputs (tuple): Inputs to trace the network with.
        seed (int): Draws positions and signs.
    """

    def __init__(
        self,
        model: nn.Module,
        head: str,
        layers: Sequence[str],
        data: Sequence[tuple[Tensor, Tensor]],
        example_inputs: ModelInputs,
        seed: int,
    ) -> None:
        self.model, self.data, self.seed = model, data, seed
        self.positions = positions_for(sum(len(labels) for _, labels in data))
        self.graph = FilterGraph(model, example_inputs)
        self.order = order = [self.graph.names[module] for module in self.graph.trace.sources]
        self.readers = {name: self._readers(name) for name in sorted(layers, key=order.index)}
        read = {reader.name for readers in self.readers.values() for reader in readers}
        split = [name for name in order if name != head and self._can_be_split(name)]
        once = [name for name in order if self.graph.runs[find_layer(model, name)] == 1]
        modules = {name: weighted(model, name) for name in once if name in {head, *read, *split}}
        self.seen = see_full(model, modules, data, self.positions, seed)
        linear = {name for name, seen in self.seen.items() if seen.linear and seen.made}
        self.head = head if head in linear else ""
        self.splittable = [name for name in split if name in linear]
        self.readers = {
            name: readers
            for name, readers in self.readers.items()
            if readers and linear.issuperset(reader.name for reader in readers)
        }
        self._leave_out_tied()
        self.roots = {name: root_of(self.seen[name].fisher) for name in linear}
        # Mirrored, they are other images of the same shape.
        pair = tuple(part[:2] for part in example_inputs)
        self.resumes = can_resume(model, order, pair, [part.flip(-1) for part in pair])

    def _leave_out_tied(self) -> None:
        """Of layers whose filters go together, the first loses them for all: each by itself would
        take more from all, and have the readers use again what another has lost."""
        tied: set[str] = set()
        for name in list(self.readers):
            if name in tied:
                del self.readers[name]
            else:
                tied |= self.graph.reach(self.graph.layer(name)).removed.keys()

    def left(self, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """For each convolution or linear layer that loses filters once these alone are kept, itself
        or with another, which of its own stay, (K,)."""
        stays: dict[str, Tensor] = {}
        for name, mask in kept.items():
            gone = (~mask).nonzero()[:, 0].tolist()
            for other, places in self.graph.reach(self.graph.layer(name), gone).removed.items():
                if other in self.order:
                    ones = torch.ones(self.num_filters(other), dtype=torch.bool)
                    stays.setdefault(other, ones)[places] = False
        return {name: stays[name] for name in self.order if name in stays}

    def _can_be_split(self, name: str) -> bool:
        """Whether two layers in a row can stand for a layer."""
        module = find_layer(self.model, name)
        fits, runs = can_be_fitted(module), self.graph.runs[module]
        return fits and runs == 1 and not self.graph.not_plain([name])

    def _readers(self, name: str) -> list[Reader]:
        """The layers that read a layer's filters; none if some cannot be fitted."""
        reach = self.graph.reach(self.graph.layer(name))
        readers = []
        for reader, inputs in reach.consumers.items():
            module = self.graph.layer(reader)
            if not can_be_fitted(module):
                return []
            places = torch.full((module.weight.shape[1],), -1)
            places[torch.tensor(inputs)] = torch.tensor(reach.read_filters[reader])
            counts = torch.bincount(places[places >= 0], minlength=self.num_filters(name))
            if int(counts.min()) != int(counts.max()):
                return []
            readers.append(Reader(reader, places))
        return readers

    def num_filters(self, name: str) -> int:
        """K of a layer."""
        return self.graph.num_filters(self.graph.layer(name))

    def _runs(self, model: nn.Module, data: Sequence[object]) -> ResumedRuns:
        return ResumedRuns(model, self.order, len(data), self.resumes)

    def _fits(self, name: str, model: nn.Module, seen: Mapping[str, Seen]) -> list[Fit]:
        number = self.num_filters(name)
        return [
            Fit(
                seen[reader.name],
                matrix_of(weighted(model, reader.name)),
                self.roots[reader.name],
                reader.columns(weighted(model, reader.name), number),
            )
            for reader in self.readers[name]
        ]

    def damage(self, name: str, few: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """How far the outputs move, squared, once so many filters of a layer alone are gone, (K,).

        Measured on a few images at some sizes, the other weights making up; in between as the
        error of the least squares goes.
        """
        number = self.num_filters(name)
        sizes = sorted({max(1, number // 2), max(1, number // 4), max(1, number // 8), 1})
        model = copied(self.model)
        fits = self._fits(name, model, self.seen)
        runs = self._runs(model, few)
        first = min((reader.name for reader in self.readers[name]), key=self.order.index)
        run = partial(runs.run, layer=first)
        full = scores_of(model, few, run)
        measured = {number: 0.0}

        def measure(size: int) -> None:
            for reader, fit in zip(self.readers[name], fits, strict=True):
                put_matrix(weighted(model, reader.name), fit.matrix)
            change = scores_of(model, few, run) - full
            change -= change.mean(1, keepdim=True)
            measured[size] = float(change.square().sum(1).mean())

        stops = {size: partial(measure, size) for size in sizes if size < number}
        _, errors = remove_least(fits, 1, stops)
        at = torch.tensor(sorted(number - size for size in measured))
        heights = torch.tensor([measured[number - int(gone)] for gone in at]).cummax(0).values
        return torch.as_tensor(np.interp(errors.numpy(), errors[at].numpy(), heights.numpy()))

    def without(
        self,
        model: nn.Module,
        sizes: Mapping[str, int],
        chosen: Callable[[str], Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Have the readers of a copy do without all but so many filters of each layer, one layer
        after another in the order of their runs, each fitted to what it made in the full network
        from what it reads by then: what stays, (K,). ``chosen`` gives other filters that stay."""
        kept: dict[str, Tensor] = {}
        runs = self._runs(model, self.data)
        for name, readers in self.readers.items():
            number = self.num_filters(name)
            if sizes[name] == number:
                continue
            seen = self._seen_again(runs, [reader.name for reader in readers])
            fits = self._fits(name, model, seen)
            if chosen is None:
                left, _ = remove_least(fits, sizes[name])
                kept[name] = torch.zeros(number, dtype=torch.bool).index_fill(0, left, True)
            else:
                kept[name] = chosen(name)
                for fit in fits:
                    fit.remove((~kept[name]).nonzero()[:, 0])
            for reader, fit in zip(readers, fits, strict=True):
                put_matrix(weighted(model, reader.name), fit.matrix)
        self._fit_head(runs)
        return kept

    def low_rank(
        self, model: nn.Module, left: Mapping[str, Tensor], most: float, size: NetworkSize
    ) -> dict[str, Ranks]:
        """Ranks of layers of a network without some filters with which it is of such a size;
        ``left`` says what all layers have left."""
        layers = self._low_rank(self._runs(model, self.data), left, self.splittable)
        own = sum(size.of_layer(name, layer.module) for name, layer in layers.items())
        return choose_ranks(layers, most - (size.of(model) - own), size)

    def split(
        self, model: nn.Module, left: Mapping[str, Tensor], ranks: Mapping[str, Ranks]
    ) -> None:
        """Split layers of a network without some filters, in the order of their runs, each fitted to
        what it made in the full network from what it reads by then."""
        runs = self._runs(model, self.data)
        for name, own in ranks.items():
            layer = self._low_rank(runs, left, [name])[name]
            parts = layer.split(own)
            replace_module(model, layer.module, parts)
            runs.replaced(layer.module, parts)
        self._fit_head(runs)

    def _low_rank(
        self, runs: ResumedRuns, left: Mapping[str, Tensor], names: Sequence[str]
    ) -> dict[str, LowRank]:
        seen, layers = self._seen_again(runs, names, left), {}
        for name in names:
            root = self.roots[name]
            if name in left:
                root = root_of(self.seen[name].fisher[left[name]][:, left[name]])
            layers[name] = LowRank(weighted(runs.model, name), seen[name], root)
        return layers

    def _fit_head(self, runs: ResumedRuns) -> None:
        if self.head:
            module, own = weighted(runs.model, self.head), self._seen_again(runs, [self.head])
            put_matrix(module, Fit(own[self.head], matrix_of(module)).matrix)

    def _seen_again(
        self, runs: ResumedRuns, names: Sequence[str], left: Mapping[str, Tensor] | None = None
    ) -> dict[str, Seen]:
        """What layers read by now, beside what they, or those of their filters that are left, made."""
        modules = {name: weighted(runs.model, name) for name in names}
        made = {name: self.seen[name].made for name in names}
        for name, mask in (left or {}).items():
            if name in made:
                made[name] = [rows[:, mask.to(rows.device)] for rows in made[name]]
        return see_again(runs, modules, self.data, made, self.positions, self.seed)
