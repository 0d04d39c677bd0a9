"""Runs of a network on the same batches, layer after layer, that begin where the last one changed it."""

from collections.abc import Sequence
from contextlib import nullcontext

from torch import Tensor, nn

from captum_classfilters._core.replay.recorded_batch import plain_mode
from captum_classfilters._core.replay.recorded_calls import RecordedCalls
from captum_classfilters._core.replay.repeated_batch import CannotReplayError
from captum_classfilters._core.taps import entered

_MOST_BYTES = 2**31  # of all records of a network


class ResumedRuns:
    r"""
    A network whose layers change one after another, in the order in which they run.

    What ended before a layer ran is kept, so that the next run, before which this layer and later ones
    may have changed, begins there. Where records would need more than two gigabytes, or the network
    cannot be resumed, all of it runs each time.

    Args:

        model (nn.Module): The network, in evaluation mode.
        order (sequence of str): Its layers in the order in which they run.
        num_batches (int): On how many batches it is run.
    """

    def __init__(self, model: nn.Module, order: Sequence[str], num_batches: int) -> None:
        self.model, self.order, self.num_batches = model, order, num_batches
        self._known: dict[int, tuple[int, RecordedCalls]] = {}
        self._resumes = True

    def run(self, number: int, inputs: Sequence[Tensor], layer: str) -> object:
        """The network's output for batch ``number``, of which what precedes a layer is kept."""
        place = self.order.index(layer)
        before = self._known.get(number)
        if before is not None and before[0] > place:
            before = None
        try:
            return self._run(number, inputs, place, None if before is None else before[1])
        except CannotReplayError:
            self._resumes = False
            self._known.clear()
            return self._run(number, inputs, place, None)

    def _run(
        self, number: int, inputs: Sequence[Tensor], place: int, before: RecordedCalls | None
    ) -> object:
        module = self.model.get_submodule(self.order[place])
        record = RecordedCalls(self.model if self._resumes else None, module)
        started: list[bool] = []
        try:
            with (
                plain_mode(),
                entered([module], lambda *_: started.append(True)),
                nullcontext() if before is None else before.replaying(None),
                record.recording(lambda: started),
            ):
                return self.model(*inputs)
        finally:
            self._keep(number, place, record)

    def _keep(self, number: int, place: int, record: RecordedCalls) -> None:
        self._resumes &= record.num_bytes() * self.num_batches <= _MOST_BYTES
        if self._resumes:
            self._known[number] = place, record
        else:
            self._known.clear()

    def replaced(self, module: nn.Module, other: nn.Module) -> None:
        """Have another module stand where this one stood."""
        for _, record in self._known.values():
            record.replaced(module, other)
