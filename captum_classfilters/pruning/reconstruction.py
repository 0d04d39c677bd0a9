"""Filters removed while the layers that read them learn, in closed form, to do without them."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_classfilters._core.batches import read_batches
from captum_classfilters._core.copies import copied
from captum_classfilters._core.filter_graph import FilterGraph
from captum_classfilters._core.heads import alike
from captum_classfilters._core.outputs import scores_per_class
from captum_classfilters._core.taps import hooked
from captum_classfilters._core.types import Dataloader, ModelInputs

_POSITIONS = 16  # of each image at which a convolution is looked at
_RIDGE = 1e-4  # of the mean second moment, so that inputs that are always zero do no harm
_AT_ONCE = 32  # one in so many of the filters that are left goes in a step


# -- what a layer reads -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Reader:
    """A layer that reads filters.

    Args:

        name (str): Its dotted name.
        places (Tensor): For each input of the layer, the filter that it is; -1 where it is none.
    """

    name: str
    places: Tensor

    def columns(self, module: nn.Module, number: int) -> Tensor:
        """Which columns of the layer's matrix belong to each of K filters, (K, columns of each)."""
        weight: Any = module.weight
        which = self.places.repeat_interleave(int(weight[0, 0].numel()))
        return torch.stack([(which == index).nonzero()[:, 0] for index in range(number)])


def matrix_of(module: Any) -> Tensor:
    """Weight and bias of a layer as one matrix (C, D + 1)."""
    weight: Tensor = module.weight.detach().flatten(1)
    bias = weight.new_zeros(len(weight)) if module.bias is None else module.bias.detach()
    return torch.cat([weight, bias[:, None]], 1).double().cpu()


def put_matrix(module: Any, matrix: Tensor) -> None:
    """Give a layer another weight and bias; a layer without a bias gets one."""
    weight = matrix[:, :-1].reshape(module.weight.shape).to(module.weight)
    bias = matrix[:, -1].to(module.weight)
    module.weight = nn.Parameter(weight, requires_grad=module.weight.requires_grad)
    module.bias = nn.Parameter(bias, requires_grad=module.weight.requires_grad)


def _positions(module: nn.Module, outputs: Tensor, seed: int) -> Tensor:
    """Positions of a convolution's output (N, P) to look at, drawn anew for each image."""
    number = outputs[0, 0].numel() if isinstance(module, nn.Conv2d) else 1
    if number <= _POSITIONS:
        return torch.arange(number, device=outputs.device).expand(len(outputs), -1)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(len(outputs), number, generator=generator)
    return scores.topk(_POSITIONS, 1).indices.to(outputs.device)


def _rows_read(module: Any, inputs: Tensor, where: Tensor) -> Tensor:
    """What a layer multiplies its weight with, (rows, D + 1), the last column one."""
    if isinstance(module, nn.Linear):
        rows = inputs.flatten(0, -2)
    else:
        rows = _patches(module, inputs, where).flatten(0, 1).flatten(1)
    return torch.cat([rows, rows.new_ones(len(rows), 1)], 1)


def _patches(module: nn.Conv2d, inputs: Tensor, where: Tensor) -> Tensor:
    """What a convolution reads for some of its positions (N, P): (N, P, C, height, width)."""
    reach = [(k - 1) * d for k, d in zip(module.kernel_size, module.dilation, strict=True)]
    if module.padding == "same":
        (top, bottom), (left, right) = ((whole // 2, whole - whole // 2) for whole in reach)
    else:
        up, aside = (0, 0) if isinstance(module.padding, str) else module.padding
        top = bottom = int(up)
        left = right = int(aside)
    padded = F.pad(inputs, (left, right, top, bottom)).permute(0, 2, 3, 1)
    width = (padded.shape[2] - reach[1] - 1) // module.stride[1] + 1
    rows, columns = where // width * module.stride[0], where % width * module.stride[1]
    down, along = (
        torch.arange(k, device=where.device) * d
        for k, d in zip(module.kernel_size, module.dilation, strict=True)
    )
    image = torch.arange(len(inputs), device=where.device)[:, None, None, None]
    rows, columns = rows[:, :, None, None] + down[:, None], columns[:, :, None, None] + along
    return padded[image, rows, columns].movedim(-1, 2)


def _has_its_size(module: Any, inputs: Tensor, output: Tensor) -> bool:
    """Whether a layer's output has the size that its class and padding say; its own forward may pad."""
    if isinstance(module, nn.Linear):
        return output.shape[:-1] == inputs.shape[:-1]
    if inputs.dim() != 4 or isinstance(module.padding, str):
        return inputs.dim() == 4
    sizes = zip(
        inputs.shape[2:], module.kernel_size, module.padding, module.dilation, module.stride,
        strict=True,
    )  # fmt: skip
    return output.shape[2:] == tuple(
        (size + 2 * pad - (kernel - 1) * apart - 1) // step + 1
        for size, kernel, pad, apart, step in sizes
    )


def _rows_made(module: nn.Module, outputs: Tensor, where: Tensor) -> Tensor:
    """Rows of a layer's output, or of one like it, at the same positions, (rows, C)."""
    if isinstance(module, nn.Linear):
        return outputs.flatten(0, -2)
    index = where[:, None].expand(-1, outputs.shape[1], -1)
    return outputs.flatten(2).gather(2, index).transpose(1, 2).flatten(0, 1)


# -- one pass over the images ----------------------------------------------------------------------


@dataclass
class Seen:
    """What a pass saw of one reader.

    Args:

        moments (Tensor): Sums of products of its inputs (D + 1, D + 1) ...
        cross (Tensor): ... and of targets with its inputs (C, D + 1).
        rows (int): Of how many rows.
        made (list of Tensor): Its outputs, batch by batch, where they are asked for.
        fisher (Tensor): Sum of the products of its outputs' gradients (C, C).
        linear (bool): Its outputs are its matrix times its inputs.
    """

    moments: Tensor = field(default_factory=lambda: torch.zeros(()))
    cross: Tensor = field(default_factory=lambda: torch.zeros(()))
    rows: int = 0
    made: list[Tensor] = field(default_factory=list)
    fisher: Tensor = field(default_factory=lambda: torch.zeros(()))
    linear: bool = True

    def see(self, inputs: Tensor, targets: Tensor) -> None:
        """Add rows of inputs and of targets."""
        self.moments = self.moments + (inputs.T @ inputs).double().cpu()
        self.cross = self.cross + (targets.T @ inputs).double().cpu()
        self.rows += len(inputs)


class _SeenError(Exception):
    """The layers that are looked at have run."""


def see_full(
    model: nn.Module, modules: Mapping[str, nn.Module], data: Dataloader, seed: int
) -> dict[str, Seen]:
    """See what readers of the full network read and make, and how its outputs depend on that.

    Of the outputs, each centered over the classes, sums with random signs are differentiated: the mean
    of the gradients' products is that over all outputs.
    """
    seen = {name: Seen() for name in modules}
    names = {module: name for name, module in modules.items()}
    outputs: dict[str, Tensor] = {}

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        own = seen[names[module]]
        if not _has_its_size(module, inputs[0], output):
            own.linear = False
            return output.clone()
        where = _positions(module, output.detach(), seed + len(own.made))
        read = _rows_read(module, inputs[0].detach(), where)
        made = _rows_made(module, output.detach(), where)
        own.see(read, made)
        own.made.append(made)
        plain = read @ matrix_of(module).T.to(read)
        own.linear &= len(plain) == len(made) and bool(alike(plain, made))
        outputs[names[module]] = output
        return output.clone()  # what follows may write into it

    generator = torch.Generator().manual_seed(seed)
    with (
        read_batches(model, data, "filters", gradients=True, show_progress=False) as batches,
        hooked(modules.values(), hook),
    ):
        for batch in batches:
            inputs = [part.clone().requires_grad_() for part in batch.inputs]
            scores = scores_per_class(model(*inputs))
            centered = scores - scores.mean(1, keepdim=True)
            signs = torch.randint(0, 2, scores.shape, generator=generator).to(centered) * 2 - 1
            gradients = torch.autograd.grad((centered * signs).sum(), list(outputs.values()))
            for name, gradient in zip(outputs, gradients, strict=True):
                rows = gradient if gradient.dim() == 2 else gradient.flatten(2).transpose(1, 2)
                rows = rows.flatten(0, -2)
                seen[name].fisher = seen[name].fisher + (rows.T @ rows).double().cpu()
    return seen


def see_again(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    data: Dataloader,
    targets: Mapping[str, Sequence[Tensor]],
    seed: int,
) -> dict[str, Seen]:
    """See what some readers read by now, beside what they made in the full network."""
    seen = {name: Seen() for name in modules}
    names = {module: name for name, module in modules.items()}
    number = 0
    waiting: set[str] = set()

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        name = names[module]
        where = _positions(module, output, seed + number)
        seen[name].see(_rows_read(module, inputs[0], where), targets[name][number])
        waiting.discard(name)
        if not waiting:
            raise _SeenError

    with (
        read_batches(model, data, "filters", show_progress=False) as batches,
        hooked(modules.values(), hook),
    ):
        for batch in batches:
            waiting.update(modules)
            with suppress(_SeenError):
                model(*batch.inputs)
            number += 1
    return seen


# -- least squares ----------------------------------------------------------------------------------


class Fit:
    r"""
    A reader's least squares, as filters leave it.

    Source: Hassibi and Stork: *Second order derivatives for network pruning: Optimal brain surgeon*,
    NIPS 1992, for whole filters.

    Args:

        seen (Seen): What it reads, and what it should make.
        matrix (Tensor): Its matrix (C, D + 1), to which the ridge pulls.
        root (Tensor, optional): (C, C). An error *e* of its outputs costs :math:`\|root \, e\|^2`;
                    by default :math:`\|e\|^2`.
        columns (Tensor, optional): The columns of each filter that may go (K, columns of each).
    """

    def __init__(
        self,
        seen: Seen,
        matrix: Tensor,
        root: Tensor | None = None,
        columns: Tensor | None = None,
    ) -> None:
        moments = seen.moments / seen.rows
        ridge = _RIDGE * moments.diagonal()[:-1].mean().clamp(min=1e-12)
        self.inverse = torch.linalg.inv(moments + ridge * torch.eye(len(moments)).to(moments))
        self.matrix = (seen.cross / seen.rows + ridge * matrix) @ self.inverse
        nothing = torch.zeros(0, 0, dtype=torch.int64)
        self.root = torch.eye(len(matrix)).to(matrix) if root is None else root
        self.columns = nothing if columns is None else columns

    def costs(self, left: Tensor) -> Tensor:
        """What removing each of some filters adds to the error, the others making up for it."""
        columns = self.columns[left]
        blocks = self.inverse[columns[:, :, None], columns[:, None, :]]
        weights = (self.root @ self.matrix)[:, columns].transpose(0, 1)  # (left, C, size)
        return (torch.linalg.solve(blocks, weights, left=False) * weights).sum((1, 2))

    def remove(self, filters: Tensor) -> None:
        """Take filters out; the other weights make up for them."""
        columns = self.columns[filters].flatten()
        change = torch.linalg.solve(self.inverse[columns[:, None], columns], self.inverse[columns])
        self.matrix = self.matrix - self.matrix[:, columns] @ change
        self.inverse = self.inverse - self.inverse[:, columns] @ change
        self.matrix[:, columns] = 0
        self.inverse[columns] = 0
        self.inverse[:, columns] = 0
        self.inverse[columns, columns] = 1


def root_of(fisher: Tensor) -> Tensor:
    """A root of what an error of outputs costs, in which no output counts nothing."""
    least = 1e-3 * fisher.diagonal().mean().clamp(min=1e-12)
    return torch.linalg.cholesky(fisher + least * torch.eye(len(fisher)).to(fisher)).T


def remove_least(
    fits: Sequence[Fit], keep: int, stop_at: Mapping[int, Callable[[], object]] | None = None
) -> Tensor:
    """Remove all but so many filters, the least costly first: the error once so many are gone.
    Functions are called when as many filters as they are named by are left."""
    left, errors, stop_at = torch.arange(len(fits[0].columns)), [0.0], stop_at or {}
    while len(left) > keep:
        costs = torch.stack([fit.costs(left) for fit in fits]).sum(0).clamp(min=0)
        nearest = max(size for size in (keep, *stop_at) if size < len(left))
        number = min(max(1, len(left) // _AT_ONCE), len(left) - nearest)
        lowest = costs.argsort(stable=True)[:number]
        for fit in fits:
            fit.remove(left[lowest])
        errors += (errors[-1] + costs[lowest].cumsum(0)).tolist()
        stays = torch.ones(len(left), dtype=torch.bool)
        stays[lowest] = False
        left = left[stays]
        if len(left) in stop_at:
            stop_at[len(left)]()
    return torch.tensor(errors, dtype=torch.float64)


def scores_of(model: nn.Module, data: Dataloader) -> Tensor:
    """Scores (N, C) of a model for all images."""
    with read_batches(model, data, "scores", show_progress=False) as batches:
        return torch.cat([scores_per_class(model(*batch.inputs)).double() for batch in batches])


# -- a whole network --------------------------------------------------------------------------------


class Reconstruction:
    r"""
    A network's layers that can lose filters, what reads them, and what that made of some images.

    Args:

        model (nn.Module): The network, with one output for each class that counts.
        head (str): Its head, which is fitted at last.
        layers (sequence of str): Its layers that can lose filters.
        data (iterable): Batches of (inputs, labels), read several times.
        example_inputs (tuple): Inputs to trace the network with.
        seed (int): Draws positions and signs.
    """

    def __init__(
        self,
        model: nn.Module,
        head: str,
        layers: Sequence[str],
        data: Dataloader,
        example_inputs: ModelInputs,
        seed: int,
    ) -> None:
        self.model, self.data, self.seed = model, data, seed
        self.graph = FilterGraph(model, example_inputs)
        order = [self.graph.names[module] for module in self.graph.trace.sources]
        self.readers = {name: self._readers(name) for name in sorted(layers, key=order.index)}
        names = {reader.name for readers in self.readers.values() for reader in readers} | {head}
        modules = {name: self.graph.layer(name) for name in order if name in names}
        self.seen = see_full(model, modules, data, seed)
        self.head = head if self.seen[head].linear else ""
        self.readers = {
            name: readers
            for name, readers in self.readers.items()
            if readers and all(self.seen[reader.name].linear for reader in readers)
        }
        self.roots = {name: root_of(seen.fisher) for name, seen in self.seen.items()}

    def _readers(self, name: str) -> list[Reader]:
        """The layers that read a layer's filters; none if some cannot be fitted."""
        reach = self.graph.reach(self.graph.layer(name))
        readers = []
        for reader, inputs in reach.consumers.items():
            module: Any = self.graph.layer(reader)
            if not isinstance(module, (nn.Linear, nn.Conv2d)) or getattr(module, "groups", 1) != 1:
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

    def _fits(self, name: str, model: nn.Module, seen: Mapping[str, Seen]) -> list[Fit]:
        number = self.num_filters(name)
        return [
            Fit(
                seen[reader.name],
                matrix_of(model.get_submodule(reader.name)),
                self.roots[reader.name],
                reader.columns(model.get_submodule(reader.name), number),
            )
            for reader in self.readers[name]
        ]

    def damage(self, name: str, few: Dataloader) -> Tensor:
        """How far the outputs move, squared, once so many filters of a layer alone are gone, (K,).

        Measured on a few images at some sizes, the other weights making up; in between as the
        error of the least squares goes.
        """
        number = self.num_filters(name)
        sizes = sorted({max(1, number // 2), max(1, number // 4), max(1, number // 8), 1})
        model = copied(self.model)
        fits = self._fits(name, model, self.seen)
        full = scores_of(model, few)
        measured = {number: 0.0}

        def measure(size: int) -> None:
            for reader, fit in zip(self.readers[name], fits, strict=True):
                put_matrix(model.get_submodule(reader.name), fit.matrix)
            change = scores_of(model, few) - full
            change -= change.mean(1, keepdim=True)
            measured[size] = float(change.square().sum(1).mean())

        stops = {size: partial(measure, size) for size in sizes if size < number}
        errors = remove_least(fits, 1, stops)
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
        for name, readers in self.readers.items():
            number = self.num_filters(name)
            if sizes[name] == number:
                continue
            seen = self._seen_again(model, [reader.name for reader in readers])
            fits = self._fits(name, model, seen)
            if chosen is None:
                remove_least(fits, sizes[name])
                kept[name] = (fits[0].inverse.diagonal()[fits[0].columns] != 1).any(1)
            else:
                kept[name] = chosen(name)
                for fit in fits:
                    fit.remove((~kept[name]).nonzero()[:, 0])
            for reader, fit in zip(readers, fits, strict=True):
                put_matrix(model.get_submodule(reader.name), fit.matrix)
        if self.head:
            module, own = model.get_submodule(self.head), self._seen_again(model, [self.head])
            put_matrix(module, Fit(own[self.head], matrix_of(module)).matrix)
        return kept

    def _seen_again(self, model: nn.Module, names: Sequence[str]) -> dict[str, Seen]:
        modules = {name: model.get_submodule(name) for name in names}
        made = {name: self.seen[name].made for name in names}
        return see_again(model, modules, self.data, made, self.seed)
