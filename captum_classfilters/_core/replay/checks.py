"""How the ways of finding outputs are seen to hold; DESIGN.md says what each check catches."""

import random
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import numpy
import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from captum_classfilters._core.heads import alike
from captum_classfilters._core.layers import positions_last
from captum_classfilters._core.replay.changed_filters import UnchangedSteps
from captum_classfilters._core.replay.closed_form import ClosedForm
from captum_classfilters._core.replay.recorded_batch import RecordedBatch
from captum_classfilters._core.replay.repeated_batch import CannotReplayError
from captum_classfilters._core.types import Arguments, ForwardFunc, JsonDict, Keywords

_aten = torch.ops.aten
_READS = {_aten._local_scalar_dense, _aten.equal, _aten.allclose}


@dataclass
class Confirmed:
    """What was compared with runs of the whole model, for one model and layer.

    Args:

        closed (bool): The weights of the head gave what the whole model gives.
        cut (bool): A run from the layer on gave what the whole model gives.
        copies (bool): Several sets of filters replaced together gave what each gives alone.
        sizes (set of tuple): Numbers of images and copies, and whether filters were followed one by
                    one, for which rows in the middle and at the end of a replay were right.
    """

    closed: bool = False
    cut: bool = False
    copies: bool = False
    sizes: set[tuple[int, int, bool]] = field(default_factory=set)

    def noted(self) -> JsonDict:
        """All of this as JSON can hold it, for a run that goes on elsewhere."""
        return {**vars(self), "sizes": sorted(self.sizes)}

    def recall(self, noted: JsonDict) -> None:
        """Know what an earlier run has seen."""
        self.closed, self.cut, self.copies = noted["closed"], noted["cut"], noted["copies"]
        self.sizes = {(images, copies, each) for images, copies, each in noted["sizes"]}

    def forget(self) -> None:
        """A check failed: the next batch is checked as the first one."""
        self.cut = self.copies = False
        self.sizes.clear()


_confirmed: WeakKeyDictionary[nn.Module, WeakKeyDictionary[ForwardFunc, dict[bool, Confirmed]]]
_confirmed = WeakKeyDictionary()


def confirmed(forward_func: ForwardFunc, layer: nn.Module, at_input: bool) -> Confirmed:
    """What is known of a model and a layer from earlier batches; kept for as long as both live."""
    functions = _confirmed.setdefault(layer, WeakKeyDictionary())
    try:
        return functions.setdefault(forward_func, {}).setdefault(at_input, Confirmed())
    except TypeError:  # a function that cannot be remembered
        return Confirmed()


class ReplayChecks:
    r"""
    The checks of one batch. Each raises :class:`CannotReplayError` if a way does not hold.

    Args:

        batch (RecordedBatch): The batch.
        known (Confirmed): What need not be compared with the whole model again.
    """

    def __init__(self, batch: RecordedBatch, known: Confirmed) -> None:
        self.batch: RecordedBatch = weakref.proxy(batch)  # which keeps this object
        self.known = known
        self._expected: list[list[Tensor]] = []

    @cached_property
    def sets(self) -> Tensor:
        """Sets of filters (4, K): all, two halves, and the filter that changes most.

        Whatever one filter decides for all copies, one of the halves lacks it.
        """
        batch = self.batch
        change = positions_last(batch.stands_in - batch.activation, batch.axis)
        largest = change.abs().sum((0, 2)).argmax()
        most = torch.arange(batch.num_filters, device=change.device) == largest
        order = torch.randperm(batch.num_filters, generator=torch.Generator().manual_seed(0))
        half = order.to(change.device) < (batch.num_filters + 1) // 2
        return torch.stack([torch.ones_like(most), half, ~half, most])

    @cached_property
    def masks(self) -> Tensor:
        """Masks of those that are replayed: all four for the first batch, then the last one."""
        return self.batch.mask(self.sets[-1:] if self.known.copies else self.sets)

    @property
    def nothing(self) -> Tensor:
        """The mask of no filter."""
        return torch.zeros_like(self.masks[0])

    def check_cut(self) -> None:
        """Replays of one copy; two of the first batch are compared with runs of the whole model."""
        batch, masks = self.batch, self.masks
        with determined_by_arguments(batch.model):
            replays = [self._alone(mask) for mask in masks]
        if not self.known.cut:
            pairs = [(replays[row], self._whole(masks[row])) for row in (1, -1)]
            pairs.append((self._alone(self.nothing), batch.seen))
            reason = "a run from the layer on differs from the whole model's"
            self._require(pairs, reason, same_sizes=True)
            self.known.cut = self._tell(replays)
        self._expected = replays

    def check_closed_form(self, closed: ClosedForm) -> None:
        """The weights of the head give the outputs without each of four sets: those of a replay, in
        the first batch also the whole model's."""
        if not bool(closed.holds):
            raise CannotReplayError("the layer does not feed a plain linear head")
        masks, outputs = self.batch.mask(self.sets), closed.outputs(self.sets)
        compared: Sequence[int] = () if self.known.closed else (1, -1)
        pairs: list[tuple[list[Tensor], list[Tensor]]] = []
        try:
            with determined_by_arguments(self.batch.model):
                replays = self.batch.together(masks)
            pairs.extend(([left], [right]) for left, right in zip(outputs, replays, strict=True))
        except Exception:
            compared = range(len(masks))
        pairs.extend(([outputs[row]], [self.batch.whole(masks[row])]) for row in compared)
        self._require(pairs, "the head is fed in another way")
        if not self.known.closed:
            self.known.closed = self._tell([seen for _, seen in pairs])

    def check_copies(self, several: bool) -> None:
        """Sets replaced together give what each gives alone, next to copies of quite other values."""
        batch, masks, expected = self.batch, self.masks, self._expected
        reason = "copies of a batch depend on each other"
        if not several:
            self._require([(self._alone(self.nothing), batch.seen)], reason)
            return
        rows = [torch.where(mask, batch.stands_in, batch.activation) for mask in masks]
        high, low = self._other_values()
        # A model may look for its reference at either end. Nothing is replaced in the third copy.
        tensor = torch.cat([high, rows[0], batch.activation, *rows[1:], low])
        copies = len(rows) + 3
        seen = batch.seeing(lambda: batch.replay(tensor, copies), copies)[1:-1]
        wanted = [expected[0], batch.seen, *expected[1:]]
        self._require(list(zip(seen, wanted, strict=True)), reason)
        if not self.known.copies:
            self.known.copies = self._tell(expected)

    def check_followed(self, steps: UnchangedSteps | None) -> None:
        """One filter's change, followed by itself, gives what replacing it in full gives."""
        if steps is None:
            raise CannotReplayError("one filter is much larger than all others")
        batch = self.batch
        filters = self.sets[-1].int().argmax().repeat(2)
        removes = torch.arange(2, device=filters.device) == 0
        seen = batch.seeing(lambda: batch.followed(filters, removes, self.nothing, steps), 2)
        wanted = [self._expected[-1], batch.seen]
        self._require(list(zip(seen, wanted, strict=True)), "followed by itself, a filter differs")

    def check_size(self, outputs: Tensor, masks: Tensor, followed: bool) -> None:
        """Outputs of the first replay of its size are right in its middle and at its end."""
        size = (self.batch.num_images, len(masks), followed)
        if size in self.known.sizes or (len(masks) == 1 and not followed):
            return
        run = self.batch.alone if self.known.sizes else self.batch.whole
        rows = sorted({len(masks) // 2, len(masks) - 1})
        pairs = [([outputs[row]], [run(masks[row])]) for row in rows]
        self._require(pairs, "filters replaced together give other outputs than one by one")
        self.known.sizes.add(size)

    def check_state(self) -> None:
        """With nothing replaced the output is still this batch's, although others ran since."""
        pairs = [(self._alone(self.nothing), self.batch.seen)]
        self._require(pairs, "modules keep another batch's state")

    def none_dwarfs_the_others(self, common: Tensor) -> Tensor:
        """Whether no filter of an image, these (K,) left out, is so much larger than the others that
        nothing exact is left of theirs once its share has been subtracted; a bool on the device."""
        change = positions_last(self.batch.stands_in - self.batch.activation, self.batch.axis)
        if self.batch.num_filters < 2 or not change.is_floating_point():
            return torch.zeros((), dtype=torch.bool, device=change.device)
        sizes = change.abs().amax(2).float() * ~common.to(change.device)
        largest, second = sizes.topk(2, 1).values.unbind(1)
        second = second.maximum(second.median())
        most = max(4.0, 1e-4 / torch.finfo(change.dtype).eps)
        return (largest <= most * second).all() & sizes.isfinite().all()

    def _alone(self, mask: Tensor) -> list[Tensor]:
        return self.batch.seeing(lambda: self.batch.alone(mask), 1)[0]

    def _whole(self, mask: Tensor) -> list[Tensor]:
        return self.batch.seeing(lambda: self.batch.whole(mask), 1)[0]

    def _other_values(self) -> tuple[Tensor, Tensor]:
        """Two batches unlike this one, of high and of low values: within its range, so that the
        model takes them, and different in each filter."""
        activation = self.batch.activation
        finite = activation.nan_to_num(0, 0, 0)
        least, size = finite.amin(), finite.amax() - finite.amin()
        shares = torch.rand(self.batch.num_filters, generator=torch.Generator().manual_seed(0)) / 2
        shape = [1] * activation.dim()
        shape[self.batch.axis] = -1
        shares = shares.reshape(shape).to(activation)
        high, low = least + (1 - shares) * size, least + shares * size
        return high.expand_as(activation), low.expand_as(activation)

    def _tell(self, seen: Sequence[Sequence[Tensor]]) -> bool:
        """Whether removing filters changed anything, so that a wrong way could have shown."""
        outputs = torch.stack([tensors[0] for tensors in seen])
        changes = (outputs - self.batch.output).nan_to_num(0, 0, 0)
        return bool((changes != 0).any())

    def _require(
        self,
        pairs: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]],
        reason: str,
        *also: Tensor,
        same_sizes: bool = False,
    ) -> None:
        """Raise unless what was seen is what is expected; the device is asked once for all."""
        # The same operations on the same sizes: half precision rounds as it did before.
        types = [] if same_sizes else [self.batch.activation.dtype]
        same = list(also)
        for seen, expected in pairs:
            if len(seen) != len(expected):
                raise CannotReplayError("the last linear layer does not run as it did before")
            for left, right in zip(seen, expected, strict=True):
                if same_sizes:
                    left, right = left.float(), right.float()
                same.append(same_outputs(left, right, *types))
        if not bool(torch.stack(same).all()):
            raise CannotReplayError(reason)


def same_outputs(outputs: Tensor, expected: Tensor, *computed_in: torch.dtype) -> Tensor:
    """Whether outputs (N, ...) are the expected ones up to rounding, as a bool of no axes on their
    device. Images are compared one by one, so that a large output does not hide a wrong small one;
    NaN and infinities must be at the same places."""
    if outputs.shape != expected.shape or outputs.dtype != expected.dtype:
        return torch.zeros((), dtype=torch.bool, device=expected.device)
    if not expected.is_floating_point() or not expected.numel():
        return (outputs == expected).all()
    finite = expected.isfinite()
    same = finite | (outputs == expected) | (outputs.isnan() & expected.isnan())
    outputs, expected = outputs.where(finite, 0.0), expected.where(finite, 0.0)
    sizes = expected.abs().reshape(len(expected), -1).amax(1)
    # An output that happens to be near zero is as exact as those of other images.
    sizes = sizes.maximum(sizes.float().median().to(sizes)).clamp(min=torch.finfo(sizes.dtype).tiny)
    scale = sizes.reshape(-1, *[1] * (expected.dim() - 1))
    return alike(outputs / scale, expected / scale, *computed_in) & same.all()


@contextmanager
def determined_by_arguments(model: nn.Module | None) -> Iterator[None]:
    """Raise if what runs in the block draws random numbers, or lets values of the batch decide in
    Python what to compute: copies of a batch could not go different ways."""
    before = _random_states()
    with _NoReads(model):
        yield
    if _random_states() != before:
        raise CannotReplayError("the model draws random numbers")


class _NoReads(TorchDispatchMode):
    """Raises where a tensor that is not the model's own is read by the host."""

    def __init__(self, model: nn.Module | None) -> None:
        super().__init__()
        own = [] if model is None else [*model.parameters(), *model.buffers()]
        self._own = {id(tensor) for tensor in own}

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: Arguments = (),
        kwargs: Keywords | None = None,
    ) -> Any:
        if func.overloadpacket in _READS and id(args[0]) not in self._own:
            raise CannotReplayError("the model decides by values of the batch")
        return func(*args, **(kwargs or {}))


def _random_states() -> list[object]:
    """The states of all generators that a model may draw from without being told."""
    tensors = [torch.get_rng_state()]
    if torch.cuda.is_initialized():
        tensors.extend(torch.cuda.get_rng_state_all())
    of_numpy = [numpy.asarray(part).tobytes() for part in numpy.random.get_state()]
    return [random.getstate(), of_numpy, *(state.numpy().tobytes() for state in tensors)]
