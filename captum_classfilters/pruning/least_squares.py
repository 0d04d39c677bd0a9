"""A layer fitted, by least squares, to what it made in the full network, from fewer filters."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_classfilters._core.batches import read_batches
from captum_classfilters._core.devices import without_autocast
from captum_classfilters._core.heads import alike
from captum_classfilters._core.layers import check_runs, find_layer, not_recorded
from captum_classfilters._core.outputs import at_least_float32, scores_per_class
from captum_classfilters._core.taps import hooked
from captum_classfilters._core.types import Dataloader
from captum_classfilters.pruning.resumed_runs import ResumedRuns

_POSITIONS = 16  # of each image at which a convolution is looked at, and more ...
_ROWS = 12_288  # ... where images are too few for so many rows
_RIDGE = 1e-4  # of the mean second moment, so that inputs that are always zero do no harm
_MOST_READ = 6_144  # numbers that a fitted layer reads: squares of them are held, and inverted
_AT_ONCE = 32  # one in so many of the filters that are left goes in a step
_LET_IT = (
    "gradients tell which of its errors count, so let that part run with them: its weights stay as "
    "they are"
)

Weighted = nn.Linear | nn.Conv2d


def can_be_fitted(module: nn.Module) -> TypeGuard[Weighted]:
    """Whether a layer's outputs are one matrix, not too large, times what it reads at each position."""
    return (
        isinstance(module, nn.Linear | nn.Conv2d)
        and getattr(module, "groups", 1) == 1
        and module.weight[0].numel() <= _MOST_READ
    )


def weighted(model: nn.Module, name: str) -> Weighted:
    """A linear layer or convolution of a model."""
    module = find_layer(model, name)
    assert isinstance(module, nn.Linear | nn.Conv2d)
    return module


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

    def columns(self, module: Weighted, number: int) -> Tensor:
        """Which columns of the layer's matrix belong to each of K filters, (K, columns of each)."""
        which = self.places.repeat_interleave(module.weight[0, 0].numel())
        return torch.stack([(which == index).nonzero()[:, 0] for index in range(number)])


def matrix_of(module: Weighted) -> Tensor:
    """Weight and bias of a layer as one matrix (C, D + 1)."""
    weight = module.weight.detach().flatten(1)
    bias = weight.new_zeros(len(weight)) if module.bias is None else module.bias.detach()
    return torch.cat([weight, bias[:, None]], 1).double().cpu()


def put_matrix(module: Weighted, matrix: Tensor) -> None:
    """Give a layer another weight and bias; a layer without a bias gets one."""
    weight = matrix[:, :-1].reshape(module.weight.shape).to(module.weight)
    bias = matrix[:, -1].to(module.weight)
    module.weight = nn.Parameter(weight, requires_grad=module.weight.requires_grad)
    module.bias = nn.Parameter(bias, requires_grad=module.weight.requires_grad)


def positions_for(images: int) -> int:
    """At how many positions of each of so many images a convolution is looked at."""
    return max(_POSITIONS, -(-_ROWS // images))


def _positions(module: nn.Module, outputs: Tensor, most: int, seed: int) -> Tensor:
    """Positions of a convolution's output (N, P) to look at, drawn anew for each image."""
    number = outputs[0, 0].numel() if isinstance(module, nn.Conv2d) else 1
    if number <= most:
        return torch.arange(number, device=outputs.device).expand(len(outputs), -1)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(len(outputs), number, generator=generator)
    return scores.topk(most, 1).indices.to(outputs.device)


def _rows_read(module: Weighted, inputs: Tensor, where: Tensor) -> Tensor:
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


def _has_its_size(module: Weighted, inputs: Tensor, output: Tensor) -> bool:
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


def _rows_made(module: nn.Module, outputs: Tensor, where: Tensor | None = None) -> Tensor:
    """Rows of a layer's output, or of one like it, at the same positions or at all, (rows, C)."""
    if isinstance(module, nn.Linear):
        return outputs.flatten(0, -2)
    if where is None:
        return outputs.flatten(2).transpose(1, 2).flatten(0, 1)
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
        # Rounded in half precision, products of rows are no covariance.
        inputs, targets = at_least_float32(inputs), at_least_float32(targets)
        with without_autocast(inputs.device):  # the model may have opened it around the layer
            self.moments = self.moments + (inputs.T @ inputs).double().cpu()
            self.cross = self.cross + (targets.T @ inputs).double().cpu()
        self.rows += len(inputs)


def _check_once(name: str, runs: int, images: int) -> None:
    """Raise unless a layer made what it makes of a batch in one run."""
    check_runs(name, min(1, runs))
    if runs > 1:
        raise ValueError(
            f"The layer {name!r} was reached {runs} times in one forward pass of {images} images, so "
            "it has no single output to be fitted to. A model that splits large batches must take "
            f"{images} images at once: raise the size at which it splits them."
        )


class _SeenError(Exception):
    """The layers that are looked at have run."""


def see_full(
    model: nn.Module,
    modules: Mapping[str, Weighted],
    data: Dataloader,
    positions: int,
    seed: int,
) -> dict[str, Seen]:
    """See what layers of the full network read and make, and how its outputs depend on that.

    Of the outputs, each centered over the classes, sums with random signs are differentiated: the mean
    of the gradients' products is that over all outputs.
    """
    seen = {name: Seen() for name in modules}
    names: dict[nn.Module, str] = {module: name for name, module in modules.items()}
    outputs: dict[str, Tensor] = {}
    runs: Counter[str] = Counter()
    again = False  # checkpointed layers run once more, in the backward pass

    def hook(ran: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if again:
            return output.clone()
        name = names[ran]
        if not torch.is_grad_enabled():
            raise not_recorded(name, _LET_IT)
        runs[name] += 1
        if not output.requires_grad:  # what it read was made without gradients
            output = output.detach().requires_grad_()
        own, module = seen[name], modules[name]
        if not _has_its_size(module, inputs[0], output):
            own.linear = False
            return output.clone()
        where = _positions(module, output.detach(), positions, seed + len(own.made))
        read = _rows_read(module, inputs[0].detach(), where)
        made = _rows_made(module, output.detach(), where)
        own.see(read, made)
        own.made.append(made)
        plain = read @ matrix_of(module).T.to(read)
        own.linear &= len(plain) == len(made) and bool(alike(plain, made))
        outputs[name] = output
        return output.clone()  # what follows may write into it

    generator = torch.Generator().manual_seed(seed)
    with (
        read_batches(model, data, "filters", gradients=True, show_progress=False) as batches,
        hooked(modules.values(), hook),
    ):
        for batch in batches:
            outputs.clear()
            runs.clear()
            again = False
            inputs = [part.clone().requires_grad_() for part in batch.inputs]
            scores = scores_per_class(model(*inputs))
            for name in modules:
                _check_once(name, runs[name], batch.size)
            centered = scores - scores.mean(1, keepdim=True)
            signs = torch.randint(0, 2, scores.shape, generator=generator).to(centered) * 2 - 1
            again = True
            gradients = torch.autograd.grad(
                (centered * signs).sum(), list(outputs.values()), materialize_grads=True
            )
            for name, gradient in zip(outputs, gradients, strict=True):
                rows = at_least_float32(_rows_made(modules[name], gradient))
                seen[name].fisher = seen[name].fisher + (rows.T @ rows).double().cpu()
    return seen


def see_again(
    runs: ResumedRuns,
    modules: Mapping[str, Weighted],
    data: Dataloader,
    targets: Mapping[str, Sequence[Tensor]],
    positions: int,
    seed: int,
) -> dict[str, Seen]:
    """See what some layers read by now, beside what they made in the full network."""
    seen = {name: Seen() for name in modules}
    names: dict[nn.Module, str] = {module: name for name, module in modules.items()}
    first = min(modules, key=runs.order.index)
    number = 0
    waiting: set[str] = set()

    def hook(ran: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        name = names[ran]
        where = _positions(modules[name], output, positions, seed + number)
        seen[name].see(_rows_read(modules[name], inputs[0], where), targets[name][number])
        waiting.discard(name)
        if not waiting:
            raise _SeenError

    with (
        read_batches(runs.model, data, "filters", show_progress=False) as batches,
        hooked(modules.values(), hook),
    ):
        for batch in batches:
            waiting.update(modules)
            with suppress(_SeenError):
                runs.run(number, batch.inputs, first)
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
        moments, size = seen.moments / seen.rows, len(seen.moments)
        ridge = _RIDGE * float(moments.diagonal()[:-1].mean().clamp(min=1e-12))
        self._factor, ridge = cholesky(moments, ridge)
        weights = torch.cholesky_solve((seen.cross / seen.rows + ridge * matrix).T, self._factor)
        nothing = torch.zeros(0, 0, dtype=torch.int64)
        self.columns = nothing if columns is None else columns
        # The layer's matrix, transposed (D + 1, C), and what an error of it costs.
        self._weights = torch.stack([weights, weights if root is None else weights @ root.T])
        # The columns that are left lie first, in this order, and where each of them lies.
        self._left, self._places = torch.arange(size), torch.arange(size)

    @cached_property
    def _inverse(self) -> Tensor:
        """The inverse of the moments of what is left, in its first rows and columns."""
        return torch.cholesky_inverse(self._factor)

    @property
    def matrix(self) -> Tensor:
        """The layer's matrix (C, D + 1), zero where columns are gone."""
        whole = torch.zeros_like(self._weights[0])
        whole[self._left] = self._weights[0, : len(self._left)]
        return whole.T

    def costs(self, left: Tensor) -> Tensor:
        """What removing each of some filters adds to the error, the others making up for it."""
        columns = self._places[self.columns[left]]
        blocks = self._inverse[columns[:, :, None], columns[:, None, :]]
        weights = self._weights[1, columns]  # (left, size, C)
        solved = torch.linalg.solve(blocks, weights @ weights.transpose(1, 2))
        return solved.diagonal(dim1=1, dim2=2).sum(1)

    def remove(self, filters: Tensor) -> None:
        """Take filters out; the other weights make up for them.

        The last of the columns that stay take the places of those that go, so that less and less is
        left to compute.
        """
        number = len(self._left)
        gone = self._places[self.columns[filters].flatten()]
        inverse, weights = self._inverse[:number, :number], self._weights[:, :number]
        rows, old = inverse[gone], weights[:, gone]
        change = torch.linalg.solve(rows[:, gone], rows)
        fewer = number - len(gone)
        stays = torch.ones(number, dtype=torch.bool)
        stays[gone] = False
        holes, tail = (~stays[:fewer]).nonzero()[:, 0], fewer + stays[fewer:].nonzero()[:, 0]
        inverse[holes], weights[:, holes] = inverse[tail], weights[:, tail]
        for part in (inverse, rows, change, self._left):
            part[..., holes] = part[..., tail]
        self._left, change = self._left[:fewer], change[:, :fewer]
        self._places[self._left[holes]] = holes
        inverse[:fewer, :fewer].addmm_(rows[:, :fewer].T, change, alpha=-1)
        weights[:, :fewer] -= change.T @ old


def cholesky(moments: Tensor, ridge: float) -> tuple[Tensor, float]:
    """A Cholesky factor, with as much of a ridge as rounding makes necessary."""
    for power in range(8):
        whole = moments.clone()
        whole.diagonal().add_(ridge * 10**power)
        factor, failed = torch.linalg.cholesky_ex(whole)
        if not failed and bool(factor.isfinite().all()):  # of infinite moments, some succeed
            return factor, ridge * 10**power
    raise ValueError(
        "What the model's layers make of the images, or how its scores depend on it, is too large, or "
        "not a number: sums of squares are beyond single precision. Normalize the images, or scale "
        "the head's weight and bias down."
    )


def root_of(fisher: Tensor) -> Tensor:
    """A root of what an error of outputs costs, in which no output counts nothing."""
    least = 1e-3 * float(fisher.diagonal().mean().clamp(min=1e-12))
    return cholesky(fisher, least)[0].T


def remove_least(
    fits: Sequence[Fit], keep: int, stop_at: Mapping[int, Callable[[], object]] | None = None
) -> tuple[Tensor, Tensor]:
    """Remove all but so many filters, the least costly first: those that are left, and the error
    once so many are gone. Functions are called when as many as they are named by are left."""
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
    return left, torch.tensor(errors, dtype=torch.float64)
