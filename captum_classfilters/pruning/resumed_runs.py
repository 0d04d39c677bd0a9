"""Runs of a network on the same batches, layer after layer, that begin where the last one changed it."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from captum_classfilters._core.heads import alike
from captum_classfilters._core.layers import find_layer
from captum_classfilters._core.outputs import scores_per_class
from captum_classfilters._core.replay.module_state import ModuleState
from captum_classfilters._core.replay.recorded_batch import plain_mode
from captum_classfilters._core.replay.recorded_calls import RecordedCalls
from captum_classfilters._core.replay.repeated_batch import CannotReplayError
from captum_classfilters._core.taps import entered

_MOST_BYTES = 2**31  # of all records of a network


class ResumedRuns:
    r"""
    A network whose layers change one after another, in the order in which they run.

    What ended before a layer ran is kept, so that the next run, before which this layer and later ones
    may have changed, begins there, with what modules had stored for each other by then. Where records
    would need more than two gigabytes, or the network cannot be resumed, all of it runs each time.

    Args:

        model (nn.Module): The network, in evaluation mode.
        order (sequence of str): Its layers in the order in which they run.
        num_batches (int): On how many batches it is run.
        resumes (bool): Resume at all; see :func:`can_resume`.
    """

    def __init__(
        self, model: nn.Module, order: Sequence[str], num_batches: int, resumes: bool = True
    ) -> None:
        self.model, self.order, self.num_batches = model, order, num_batches
        self.resumes = resumes
        self._known: dict[int, _Known] = {}

    def run(self, number: int, inputs: Sequence[Tensor], layer: str) -> object:
        """The network's output for batch ``number``, of which what precedes a layer is kept."""
        place = self.order.index(layer)
        before = self._known.get(number)
        if before is not None and before.place > place:
            before = None
        try:
            return self._run(number, inputs, place, before)
        except CannotReplayError:
            self.resumes = False
            self._known.clear()
            return self._run(number, inputs, place, None)

    def _run(
        self, number: int, inputs: Sequence[Tensor], place: int, before: "_Known | None"
    ) -> object:
        module = find_layer(self.model, self.order[place])
        record = RecordedCalls(self.model if self.resumes else None, module)
        started: list[ModuleState] = []

        def begins(*_: object) -> None:
            if not started:  # at its first run, if there are several
                started.append(ModuleState(self.model))

        if before is not None:
            before.state.restore()
        try:
            with (
                plain_mode(),
                entered([module], begins),
                nullcontext() if before is None else before.record.replaying(None),
                record.recording(lambda: started),
            ):
                return self.model(*inputs)
        finally:
            self._keep(number, place, record, started)

    def _keep(
        self, number: int, place: int, record: RecordedCalls, started: Sequence[ModuleState]
    ) -> None:
        self.resumes &= bool(started) and record.num_bytes() * self.num_batches <= _MOST_BYTES
        if self.resumes:
            self._known[number] = _Known(place, record, started[0])
        else:
            self._known.clear()

    def replaced(self, module: nn.Module, other: nn.Module) -> None:
        """Have another module stand where this one stood."""
        for known in self._known.values():
            known.record.replaced(module, other)


@dataclass(frozen=True)
class _Known:
    """What ended before the layer at a place ran, and what modules had stored when it began."""

    place: int
    record: RecordedCalls
    state: ModuleState


@torch.no_grad()
def can_resume(
    model: nn.Module, order: Sequence[str], inputs: Sequence[Tensor], others: Sequence[Tensor]
) -> bool:
    """Whether runs of a network that begin at any of its layers give what whole runs give.

    Other images run in between, so that what the network remembers of its last batch is found out.

    Args:

        model (nn.Module): The network, in evaluation mode.
        order (sequence of str): Its layers in the order in which they run.
        inputs, others (sequence of Tensors): Different images.

    Returns:
        *bool*.
    """
    runs = ResumedRuns(model, order, 1)
    expected = scores_per_class(model(*inputs))
    for name in order:
        model(*others)
        found = scores_per_class(runs.run(0, inputs, name))
        if not (runs.resumes and alike(found, expected)):
            return False
    return True
