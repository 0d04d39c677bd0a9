"""What a model returns without some filters: what comes before the layer runs once per batch."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from captum_classfilters._core.heads import HeadRecord
from captum_classfilters._core.replay.changed_filters import UnchangedSteps
from captum_classfilters._core.replay.checks import ReplayChecks, confirmed
from captum_classfilters._core.replay.closed_form import ClosedForm
from captum_classfilters._core.replay.module_state import ModuleState
from captum_classfilters._core.replay.recorded_batch import RecordedBatch, plain_mode, reason_of
from captum_classfilters._core.score_reader import gives_probabilities
from captum_classfilters._core.types import ForwardFunc, ModelInputs

logger = logging.getLogger("captum_classfilters")

# Bytes that one replay may take, at four tensors of the layer's size for each row. On a CPU a row
# by itself pays for what a replay costs whatever its size, and rows beyond the caches cost more than
# they save, unless there are fewer of them than weights to read for them (of a forward pass for each
# filter: ResNet-18 `layer3`, 8 images: 0.16 at 1 row, 0.10 at 4, 0.13 at 16; ResNet-20
# `layer3.2.bn1`, 100 images: 0.039, 0.020, 0.021; `layer1`, 64 images: 0.83, 0.79, 0.96); an
# accelerator wants to be filled.
_MEMORY_BUDGET = {"cpu": 32 * 2**20, "other": 512 * 2**20}
_reported: set[str] = set()


@dataclass
class _Removals:
    """Sets of filters, ready to be replaced.

    Args:

        masks (Tensor): Where to replace; broadcasts over (P, *activation).
        common (Tensor): Shape (K,) or (N, K). What all sets have.
        filters (Tensor, optional): Shape (P,), if each set is at most one filter more than all sets
                    have: that filter.
        removes (Tensor, optional): Shape (P,), bool. Whether there is one.
    """

    masks: Tensor
    common: Tensor
    filters: Tensor | None = None
    removes: Tensor | None = None


class SuffixReplay(RecordedBatch):
    r"""
    A batch that has run once, ready to be run on without some of a layer's filters.

    The first run records what every module returned that ended before the layer did. A replay calls
    the model again: those modules return their record, the layer returns its tensor with filters
    replaced, and only what follows is computed, for many sets of filters at once. Tensors that no
    replacement has reached yet are kept as one copy (:class:`RepeatedBatch`); where sets are single
    filters, only the change of each is followed (:class:`ChangedFilters`). Where the model returns
    what a linear head makes of the layer, outputs follow from its weights (:class:`ClosedForm`).

    Each way is taken after it was seen to hold on the batch; DESIGN.md beside this file says how. A
    model that cannot be replayed (random or batch dependent, for example) runs as a whole for each
    set, and the log says so once.

    Args:

        forward_func (Callable): The forward function of the model.
        layer (nn.Module): The layer whose filters are replaced.
        inputs (tuple of Tensor): The batch, N images first.
        additional_forward_args (tuple, optional): Further arguments of the forward function.
                    Default: None
        at_input (bool): Replace filters of the layer's input.
                    Default: False
        channel_dim (int, optional): Axis of the filters, where it cannot be told from the layer.
                    Default: None
        replacement (Callable, optional): From the layer's tensor to what stands in for a removed
                    filter's part of it, broadcastable to that tensor. By default zero.
        closed_form (bool): Use the weights of a linear head where it is fed by the layer.
                    Default: True
        cut (bool): Replay; otherwise always run the whole model.
                    Default: True
    """

    def __init__(
        self,
        forward_func: ForwardFunc,
        layer: nn.Module,
        inputs: tuple[Tensor, ...],
        additional_forward_args: ModelInputs | None = None,
        at_input: bool = False,
        channel_dim: int | None = None,
        replacement: Callable[[Tensor], Tensor] | None = None,
        closed_form: bool = True,
        cut: bool = True,
    ) -> None:
        if len(inputs[0]) == 0:
            raise ValueError("There are no images: the inputs have no rows.")
        self._cut = cut and len(getattr(forward_func, "device_ids", None) or []) < 2
        super().__init__(
            forward_func,
            layer,
            (*inputs, *(additional_forward_args or ())),
            len(inputs[0]),
            at_input,
            channel_dim,
            replacement,
            self._cut,
        )
        self._known = confirmed(forward_func, layer, at_input)
        self._closed: ClosedForm | None = None
        self._one_by_one = False
        self._steps: tuple[Tensor, UnchangedSteps | None] | None = None
        with plain_mode():
            self._checks = ReplayChecks(self, self._known)
            self._choose_way(self.head if closed_form else None)
        self.head = None  # holds the run's tensors

    @property
    def way(self) -> str:
        """How outputs are found: ``"closed form"``, ``"replay"`` or ``"whole model"``.

        A replay that fails later turns into ``"whole model"``.
        """
        if self._closed is not None:
            return "closed form"
        return "replay" if self._cut else "whole model"

    @cached_property
    def gives_probabilities(self) -> bool:
        """Whether the model returns probabilities, not logits, as this batch tells."""
        return gives_probabilities(self.output, self.model, self._run_model)

    def each_filter(self) -> Tensor:
        """Every filter removed by itself: the identity (K, K), bool, on the CPU."""
        return torch.eye(self.num_filters, dtype=torch.bool)

    def rows_per_replay(self, perturbations_per_eval: int | None = None) -> int:
        """How many sets to run at once: as told, or as many as the memory budget holds."""
        if perturbations_per_eval is not None:
            return perturbations_per_eval
        size = max(1, self.activation.numel() * self.activation.element_size())
        budget = _MEMORY_BUDGET.get(self.activation.device.type, _MEMORY_BUDGET["other"])
        return max(1, max(budget, self.bytes_of_weights) // (4 * size))

    def outputs(self, removed: Tensor, perturbations_per_eval: int | None = None) -> Tensor:
        r"""
        The model's outputs without some filters.

        Args:

            removed (Tensor): Shape (P, K), bool, each row a set of filters to replace in all
                        images; or (P, N, K), a set for each image.
            perturbations_per_eval (int, optional): Rows per replay. By default sized to a memory
                        budget.

        Returns:
            *Tensor* of shape (P, N, ...): the output for each row.
        """
        parts = [outputs for _, outputs in self.in_parts(removed, perturbations_per_eval)]
        return torch.cat(parts) if parts else self.output.new_empty((0, *self.output.shape))

    def in_parts(
        self, removed: Tensor, perturbations_per_eval: int | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """The same, one replay at a time: which rows they are, and their outputs.

        To be preferred to calling :meth:`outputs` for some rows at a time: what all rows have in
        common is then computed once.
        """
        size = self.rows_per_replay(perturbations_per_eval)
        parts = [slice(start, start + size) for start in range(0, len(removed), size)]
        if self._closed is not None:
            for rows in parts:
                with plain_mode():
                    outputs = self._closed.outputs(removed[rows])
                yield rows, outputs
            return
        state = ModuleState(self.model)
        try:
            with plain_mode():
                self._resume(state)
                removals = self._removals(removed)
            for rows in parts:
                with plain_mode():
                    outputs = self._outputs(removals, rows, state)
                yield rows, outputs
        finally:
            state.restore()

    def drops_of_single_filters(self, classes: Tensor) -> Tensor | None:
        """Drop of each image's output for its class (N,) without each filter, (N, K), from the
        weights of the head; None where that is not how outputs are found."""
        return None if self._closed is None else self._closed.drops(classes)

    def check_no_nan(self, removed: Tensor, outputs: Tensor) -> None:
        r"""
        Raise if removing filters turned numbers into NaN, which counting would take for answers.

        Args:

            removed (Tensor): Shape (P, K) or (P, N, K). The sets of filters.
            outputs (Tensor): Shape (P, N, ...). What the model returned without them.

        Raises:
            ValueError: An output is NaN where the full model's output for the image has none. The
                        error names the image and the filters.
        """
        turned = outputs.isnan().reshape(*outputs.shape[:2], -1).any(2)
        before = self.output.isnan().reshape(self.num_images, -1).any(1)
        places = (turned & ~before).cpu().nonzero()
        if not len(places):
            return
        row, image = places[0].tolist()
        filters = removed[row] if removed.dim() == 2 else removed[row, image]
        indices = filters.cpu().nonzero()[:, 0].tolist()
        more = f" and {len(indices) - 5} more" if len(indices) > 5 else ""
        raise ValueError(
            f"Without filter {', '.join(map(str, indices[:5]))}{more} of the layer {self.name!r} the "
            f"model returns NaN for image {image} of the batch; with all filters it does not. "
            "Something behind the layer divides by what the filters add up to, for example."
        )

    # -- outputs, by the quickest way that holds -------------------------------------------------

    def _removals(self, removed: Tensor) -> _Removals:
        """What is decided by the sets is decided on the CPU; what is computed, where the layer is."""
        masks, sets = self.mask(removed), removed.cpu()
        common = self._common(sets)
        apart = sets & ~common
        if self.axis != 1 or sets.dim() != 2 or bool((apart.sum(1) > 1).any()):
            return _Removals(masks, common)
        device = self.activation.device
        filters, removes = apart.int().argmax(1).to(device), apart.any(1).to(device)
        return _Removals(masks, common, filters, removes)

    def _common(self, sets: Tensor) -> Tensor:
        """Filters that all sets have; those of the sets before if these, too, are one more."""
        before = None if self._steps is None else self._steps[0]
        if before is not None and bool(
            (sets & ~before).sum(-1).eq(1).all() & sets[..., before].all()
        ):
            return before
        return sets.all(0)

    def _steps_without(self, common: Tensor) -> UnchangedSteps | None:
        """Steps of the batch that lacks these filters; None where no change can be followed."""
        if self._steps is None or not torch.equal(self._steps[0], common):
            exact = bool(self._checks.none_dwarfs_the_others(common))
            self._steps = (common, UnchangedSteps() if exact else None)
        return self._steps[1]

    def _outputs(self, removals: _Removals, rows: slice, state: ModuleState) -> Tensor:
        masks = removals.masks[rows]
        while self._cut:
            try:
                return self._replayed(removals, rows)
            except Exception as error:
                state.restore()
                self._give_up(reason_of(error))
        return torch.stack([self.whole(mask) for mask in masks])

    def _replayed(self, removals: _Removals, rows: slice) -> Tensor:
        masks, steps = removals.masks[rows], None
        if self._one_by_one and removals.filters is not None:
            steps = self._steps_without(removals.common)
        if steps is None:
            outputs = self.together(masks)
        else:
            assert removals.filters is not None
            assert removals.removes is not None
            common = self.mask(removals.common[None])[0]
            outputs = self.followed(removals.filters[rows], removals.removes[rows], common, steps)
        self._checks.check_size(outputs, masks, steps is not None)
        return outputs

    def _resume(self, state: ModuleState) -> None:
        """Modules may keep something of another batch by now."""
        if not self._cut or not self.resume():
            return
        try:
            self._checks.check_state()
        except Exception as error:
            state.restore()
            self._fall_back(reason_of(error))

    # -- which way holds -------------------------------------------------------------------------

    def _choose_way(self, head: HeadRecord | None) -> None:
        """Take the quickest way that holds on this batch."""
        closed = None
        if head is not None:
            closed = ClosedForm.of(head, self.activation, self.stands_in, self.axis)
        if closed is not None and self._failure(self._checks.check_closed_form, closed) is None:
            self._closed = closed
            return
        failure = self.not_recorded
        if self._cut and failure is None:
            failure = self._failure(self._checks.check_cut)
        if self._cut and failure is None:
            several = self.rows_per_replay() > 1
            failure = self._failure(self._checks.check_copies, several)
        if failure is not None:
            self._fall_back(failure)
        elif self._cut and self.axis == 1:
            self._one_by_one = self._failure(self._check_followed) is None

    def _check_followed(self) -> None:
        none = torch.zeros(self.num_filters, dtype=torch.bool)
        self._checks.check_followed(self._steps_without(none))

    def _failure(self, check: Callable[..., None], *args: Any) -> str | None:
        """Why a check fails, if it does; modules are left in the state they had."""
        state = ModuleState(self.model)
        try:
            check(*args)
        except Exception as error:
            logger.debug("%s, %s: %s", self.name, check.__name__, error)
            return reason_of(error)
        finally:
            state.restore()
        return None

    def _give_up(self, reason: str) -> None:
        """After a failed replay: do not follow single filters any more, or do not replay at all."""
        self._steps = None
        if self._one_by_one:
            self._one_by_one = False
            logger.debug("%s: filters are replaced in full (%s).", self.name, reason)
        else:
            self._fall_back(reason)

    def _fall_back(self, reason: str) -> None:
        """From now on the whole model runs, said once."""
        self._cut = self._one_by_one = False
        self._known.forget()
        message = f"{type(self.forward_func if self.model is None else self.model).__name__} at {self.name!r}"
        if message not in _reported:
            _reported.add(message)
            logger.warning("%s: the whole model runs for each filter (%s).", message, reason)
