"""A batch that has run once, and the ways to run it again without filters of a layer."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from captum_classfilters._core.heads import HeadRecord, record_head
from captum_classfilters._core.layers import (
    check_batch,
    check_numbers,
    check_runs,
    layer_axis,
    layer_name,
    module_of,
    only_tensor,
)
from captum_classfilters._core.outputs import class_scores
from captum_classfilters._core.replay.changed_filters import ChangedFilters, UnchangedSteps
from captum_classfilters._core.replay.module_state import ModuleState
from captum_classfilters._core.replay.recorded_calls import RecordedCalls
from captum_classfilters._core.replay.repeated_batch import (
    CannotReplayError,
    RepeatedBatch,
    all_rows,
)
from captum_classfilters._core.taps import tapped
from captum_classfilters._core.types import ForwardFunc, ModelInputs

# The batch that ran its model last. Modules may keep something of it that others do not expect.
_latest: "weakref.ref[RecordedBatch] | None" = None


class RecordedBatch:
    r"""
    A batch, what a model and one of its layers made of it, and the model run again.

    Sets of filters are masks that broadcast over the layer's tensor, see :meth:`mask`. All runs are
    exact if the model allows them; :class:`ReplayChecks` sees whether it does.

    Args:

        forward_func (Callable): The forward function of the model.
        layer (nn.Module): The layer whose filters are replaced.
        arguments (tuple): The batch and further arguments of the forward function.
        num_images (int): N.
        at_input (bool): Replace filters of the layer's input.
        channel_dim (int, optional): Axis of the filters, where it cannot be told from the layer.
        replacement (Callable, optional): From the layer's tensor to what stands in for a removed
                    filter's part of it, broadcastable to that tensor. By default zero.
        cut (bool): Record what a replay needs.
    """

    def __init__(
        self,
        forward_func: ForwardFunc,
        layer: nn.Module,
        arguments: ModelInputs,
        num_images: int,
        at_input: bool,
        channel_dim: int | None,
        replacement: Callable[[Tensor], Tensor] | None,
        cut: bool,
    ) -> None:
        self.forward_func, self.layer, self.arguments = forward_func, layer, arguments
        self.at_input = at_input
        self.model = module_of(forward_func, (layer,))
        self.name = layer_name(self.model, layer)
        self.num_images = num_images
        self.not_recorded: str | None = None  # why there is no record of the first run
        with plain_mode():
            self.head = self._first_run(cut)
            self.axis = layer_axis(self.model, layer, self.activation, channel_dim, at_input)
            check_batch(self.name, len(self.activation), num_images)
            check_numbers(self.name, self.activation)
            zero = self.activation.new_zeros(())
            stands_in = replacement(self.activation) if replacement else zero
            self.stands_in = self._fitted(stands_in.to(self.activation))

    @property
    def num_filters(self) -> int:
        """K."""
        return self.activation.shape[self.axis]

    def _fitted(self, stands_in: Tensor) -> Tensor:
        """What stands in, for every image; one number for each filter only on the filters' axis."""
        axis, sizes = self.axis, self.activation.shape
        try:
            if stands_in.dim() == 1 and len(stands_in) > 1 and axis != len(sizes) - 1:
                raise RuntimeError("fits the positions by chance")
            return stands_in.expand_as(self.activation)
        except RuntimeError:
            wanted = [size if dim == axis else 1 for dim, size in enumerate(sizes)]
            raise ValueError(
                f"layer_baselines have shape {tuple(stands_in.shape)}; {self.name!r} has {tuple(sizes)}, "
                f"so one number for each filter has the shape {tuple(wanted)}."
            ) from None

    def mask(self, removed: Tensor) -> Tensor:
        """(P, K) or (P, N, K) shaped to broadcast over (P, *activation), where the layer is."""
        shape = [1] * (self.activation.dim() + 1)
        shape[0], shape[self.axis + 1] = removed.shape[0], removed.shape[-1]
        shape[1] = removed.shape[1] if removed.dim() == 3 else 1
        return removed.to(self.activation.device).reshape(shape)

    # -- the first run ---------------------------------------------------------------------------

    def _first_run(self, cut: bool) -> HeadRecord | None:
        """Run the batch; returns the head if what the model returned is its own tensor.

        If the run fails while it is recorded, the model runs once more by itself.
        """
        self._calls = RecordedCalls(self.model if cut else None, self.layer)
        try:
            return self._recorded_run(self.model)
        except Exception as error:
            self.not_recorded = reason_of(error)
        self._calls = RecordedCalls(None, self.layer)
        self._recorded_run(None)  # raises what is the model's own error
        return None

    def _recorded_run(self, model: nn.Module | None) -> HeadRecord | None:
        runs: list[int] = []
        before: list[Tensor | None] = []

        def take(value: object) -> None:
            runs.append(1)
            before.append(head.features)
            # In-place successors overwrite a layer's output, so what is kept is a copy.
            self.activation = only_tensor(value, self.name).detach().clone()

        with (
            record_head(model) as head,
            tapped(self.layer, take, at_input=self.at_input),
            self._calls.recording(lambda: runs),
        ):
            output = class_scores(self._run_model())
        check_runs(self.name, len(runs), self.layer)
        self.output = output.detach().clone()
        # A linear layer inside the layer, or before it, runs no more, and its input is not changed.
        self._head_follows = head.features is not before[-1]
        self.seen = [self.output, *self._features(head, 1)[0]]
        self._state = ModuleState(self.model)
        head.settle(output)
        return head if head.is_output(output) else None

    def _run_model(self) -> Any:
        """What the model itself returns for the batch, of which it may overwrite its own copy."""
        global _latest
        _latest = weakref.ref(self)
        arguments = tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), self.arguments)
        return self.forward_func(*arguments)

    # -- further runs ----------------------------------------------------------------------------

    def whole(self, mask: Tensor) -> Tensor:
        """Outputs (N, ...) of a run of the whole model with filters replaced."""

        def replace(value: object) -> Tensor:
            return torch.where(mask, self.stands_in, only_tensor(value, self.name))

        with tapped(self.layer, replace, at_input=self.at_input):
            return class_scores(self._run_model()).detach().clone()

    def replay(self, tensor: Tensor, copies: int) -> Tensor:
        """Outputs (P, N, ...) of a run that begins with the layer's tensor, (P * N, ...)."""
        arguments = [self._repeated(argument, copies) for argument in self.arguments]
        with (
            tapped(self.layer, lambda _value: tensor, at_input=self.at_input),
            self._calls.replaying(copies),
        ):
            output = class_scores(all_rows(self.forward_func(*arguments)))
        if output.shape != (copies * self.output.shape[0], *self.output.shape[1:]):
            raise CannotReplayError("the output does not grow with the batch")
        return output.reshape(copies, *self.output.shape)

    def _repeated(self, argument: object, copies: int) -> object:
        if isinstance(argument, Tensor) and argument.dim() and len(argument) == self.num_images:
            return RepeatedBatch(argument.detach(), copies)
        return tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), argument)

    def alone(self, mask: Tensor) -> Tensor:
        """Outputs (N, ...) of a replay of one copy, the batch of the model's own size."""
        return self.replay(torch.where(mask, self.stands_in, self.activation), 1)[0]

    def together(self, masks: Tensor) -> Tensor:
        """Outputs (P, N, ...) of one replay for several sets."""
        rows = torch.where(masks, self.stands_in, self.activation)
        return self.replay(rows.flatten(0, 1), len(masks))

    def followed(
        self, filters: Tensor, removes: Tensor, common: Tensor, steps: UnchangedSteps
    ) -> Tensor:
        r"""
        Outputs (P, N, ...) where each set is at most one filter more than all sets have.

        Args:

            filters (Tensor): Shape (P,). That filter.
            removes (Tensor): Shape (P,), bool. Whether it is removed.
            common (Tensor): Mask of the filters that all sets have.
            steps (UnchangedSteps): What is known from earlier replays without these.
        """
        steps.restart()
        base = steps.next("layer", lambda: torch.where(common, self.stands_in, self.activation))
        stands_in, as_it_is = (t[:, filters].movedim(1, 0) for t in (self.stands_in, base))
        removes = removes.reshape(-1, *[1] * (base.dim() - 1))
        changed = torch.where(removes, stands_in, as_it_is)
        return self.replay(ChangedFilters(base, filters, changed, steps), len(filters))

    def seeing(self, run: Callable[[], Tensor], copies: int) -> list[list[Tensor]]:
        """What can be compared of each copy of a run: its output and its head's input.

        The output by itself may hide what went wrong, as saturated probabilities do.
        """
        with record_head(self.model) as head:
            outputs = run().reshape(copies, *self.output.shape)
        features = self._features(head, copies)
        return [[outputs[copy], *features[copy]] for copy in range(copies)]

    def _features(self, head: HeadRecord, copies: int) -> list[list[Tensor]]:
        """What the last linear layer behind the layer was given in a run, for each copy."""
        if not self._head_follows or head.features is None or len(head.features) % copies:
            return [[] for _ in range(copies)]
        rows = all_rows(head.features).detach().clone()
        return [[part] for part in rows.unflatten(0, (copies, -1))]

    # -- what else is known ----------------------------------------------------------------------

    @cached_property
    def bytes_of_weights(self) -> int:
        """Bytes of the parameters that a replay reads."""
        if self.model is None:
            return 0
        ended = {p for module in self._calls.ended_modules() for p in module.parameters()}
        rest = [parameter for parameter in self.model.parameters() if parameter not in ended]
        return sum(parameter.numel() * parameter.element_size() for parameter in rest)

    def resume(self) -> bool:
        """Put back what modules kept of this batch; returns whether another batch ran since."""
        global _latest
        moved = self._state.restore()
        others = _latest is None or _latest() is not self
        _latest = weakref.ref(self)
        return moved or others


@contextmanager
def plain_mode() -> Iterator[None]:
    """No gradients, and tensors that count how often they are written into."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def reason_of(error: Exception) -> str:
    """An error in a line, without the tensors that its traceback holds."""
    return str(error).split("\n")[0] or type(error).__name__
