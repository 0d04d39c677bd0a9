"""The base of the layer attributions that run the model on without some of a layer's filters."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Literal

import torch
from captum.attr import PerturbationAttribution
from torch import Tensor, nn

from captum_classfilters._core.captum import (
    TargetType,
    format_additional_forward_args,
    format_tensor_into_tuples,
)
from captum_classfilters._core.guard import model_left_as_found
from captum_classfilters._core.layers import (
    along_filters,
    layer_axis,
    module_of,
)
from captum_classfilters._core.outputs import as_rows, log_probabilities
from captum_classfilters._core.replay.suffix_replay import SuffixReplay
from captum_classfilters._core.targets import class_indices, own_scores
from captum_classfilters._core.types import (
    Attributions,
    JsonDict,
    ModelInputs,
    Replay,
)
from captum_classfilters.attr.base import LayerFilterAttribution, Layers

Replacement = Literal["zero", "mean", "resample"]
Score = Literal["logit", "probability", "log_probability"]
SCORES: tuple[str, ...] = ("logit", "probability", "log_probability")


def score_reader(replay: Replay, target: TargetType, score: Score) -> Callable[[Tensor], Tensor]:
    r"""
    How to read each image's own score off what the model returns.

    Args:

        replay (Replay): The batch; what the full model returned tells probabilities from logits.
        target (int, tuple, Tensor or list): The output to read, in any of Captum's forms.
        score (str): ``"logit"``, ``"probability"`` or ``"log_probability"``.

    Returns:
        *Callable* from outputs of one run to scores (N,).
    """
    num_images = replay.num_images
    if score == "logit":
        return lambda outputs: own_scores(outputs, target, num_images)
    probabilities = replay.gives_probabilities
    if target is None and replay.output.numel() == num_images:
        target = 1  # of a binary classifier's one output

    def read(outputs: Tensor) -> Tensor:
        logs = log_probabilities(as_rows(outputs), probabilities)
        return own_scores(logs if score == "log_probability" else logs.exp(), target, num_images)

    return read


def lost_scores(replay: Replay, removed: Tensor, read: Callable[[Tensor], Tensor]) -> Tensor:
    """What each image's own score loses without each of its sets of filters, (P, N), on the CPU."""
    full = read(replay.output)
    parts = [full - read(output) for _, outputs in replay.in_parts(removed) for output in outputs]
    return torch.stack(parts).cpu().double()


class FilterRemovalAttribution(LayerFilterAttribution, PerturbationAttribution):
    r"""
    A score for every filter of a layer from what the model returns without some of them.

    Args:

        forward_func (Callable): The forward function of the model.
        layer (nn.Module, str or list of these): The layer, its dotted name, or several layers.
        device_ids (list of int, optional): Devices of a hidden ``DataParallel`` model.
                    Default: None
        score (str): ``"logit"``, ``"probability"`` or ``"log_probability"``.
                    Default: "logit"
        replacement (str): What stands in for a removed filter: ``"zero"``, ``"mean"`` or
                    ``"resample"``.
                    Default: "zero"
        seed (int): Seed of what is drawn; the global random state is not touched.
                    Default: 0
        channel_dim (int, optional): Axis of the filters, where it cannot be told from the layer.
                    Default: None
    """

    def __init__(
        self,
        forward_func: Callable[..., Tensor],
        layer: Layers | str | list[str] | None,
        device_ids: list[int] | None = None,
        score: Score = "logit",
        replacement: Replacement = "zero",
        seed: int = 0,
        channel_dim: int | None = None,
    ) -> None:
        LayerFilterAttribution.__init__(self, forward_func, layer, device_ids, channel_dim)
        PerturbationAttribution.__init__(self, forward_func)
        if score not in SCORES:
            raise ValueError(f"score={score!r}; choose one of {', '.join(SCORES)}.")
        if replacement not in ("zero", "mean", "resample"):
            raise ValueError(f"replacement={replacement!r}; choose one of zero, mean, resample.")
        self.score = score
        self.replacement = replacement
        self.seed = seed

    @property
    def options(self) -> JsonDict:
        """The method's own options, for the record."""
        options = {"score": self.score, "replacement": self.replacement}
        return {**options, "seed": self.seed} if self.replacement == "resample" else options

    def _scored(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        layer_baselines: Tensor | float | None,
        additional_forward_args: object,
        at_input: bool,
        perturbations_per_eval: int | None,
        scores_of: Callable[[SuffixReplay], Tensor],
    ) -> Attributions:
        """What a rule makes of each layer's replay, (N, K), spread evenly over the positions."""
        if perturbations_per_eval is not None and perturbations_per_eval < 1:
            raise ValueError(f"perturbations_per_eval={perturbations_per_eval} must be at least 1.")
        images: tuple[Tensor, ...] = format_tensor_into_tuples(inputs)
        extra = format_additional_forward_args(additional_forward_args)
        scored: list[tuple[Tensor, ...]] = []
        with ExitStack() as stack:
            model = module_of(self.forward_func, self._layers())
            stack.enter_context(model_left_as_found(model, evaluation=True, freeze=True))
            stack.enter_context(torch.inference_mode(False))
            for layer in self._layers():
                replay = self.replay(
                    layer,
                    images,
                    layer_baselines=layer_baselines,
                    additional_forward_args=extra,
                    at_input=at_input,
                )
                tensor = replay.activation
                positions = tensor[0].numel() // tensor.shape[replay.axis]
                values = scores_of(replay) / positions
                spread = along_filters(values, tensor, replay.axis)
                scored.append((spread.expand_as(tensor),))
        return self._formatted(scored)

    def replay(
        self,
        layer: nn.Module,
        inputs: ModelInputs,
        *,
        layer_baselines: Tensor | float | None = None,
        additional_forward_args: ModelInputs | None = None,
        at_input: bool = False,
    ) -> SuffixReplay:
        """A batch that has run once, ready to run without filters of a layer."""
        stands_in = self._stands_in(layer, at_input)
        if layer_baselines is not None:
            baselines = torch.as_tensor(layer_baselines)
            stands_in = lambda tensor: baselines.to(tensor)  # noqa: E731
        return SuffixReplay(
            self.forward_func,
            layer,
            inputs,
            additional_forward_args,
            at_input=at_input,
            channel_dim=self.channel_dim,
            replacement=stands_in,
            # An unusual stand-in may meet a clipping that the batch's own values do not show.
            closed_form=layer_baselines is None,
            cut=len(self.device_ids or []) < 2,
        )

    def _stands_in(self, layer: nn.Module, at_input: bool) -> Callable[[Tensor], Tensor] | None:
        if self.replacement == "zero":
            return None
        if self.replacement == "mean":
            model = module_of(self.forward_func, [layer])

            def mean(tensor: Tensor) -> Tensor:
                axis = layer_axis(model, layer, tensor, self.channel_dim, at_input)
                return tensor.mean([dim for dim in range(tensor.dim()) if dim != axis], True)

            return mean

        def resample(tensor: Tensor) -> Tensor:
            number = len(tensor)
            if number < 2:
                raise ValueError(
                    "replacement='resample' takes another image of the same batch, and a batch has one "
                    "image alone. If it is a loader's last batch, give the loader drop_last=True or "
                    "another batch_size."
                )
            generator = torch.Generator().manual_seed(self.seed)
            order = torch.randperm(number, generator=generator)
            other = torch.empty_like(order)
            other[order] = order.roll(1)  # nobody stands in for itself
            return tensor[other.to(tensor.device)]

        return resample

    def _from_weights(self, replay: SuffixReplay, target: TargetType) -> Tensor | None:
        """What each filter by itself adds to the target's logit, (N, K), where the model's output is
        a linear head's; None elsewhere."""
        one_logit = replay.output.numel() == replay.num_images
        if self.score != "logit" or replay.way != "closed form" or one_logit:
            return None
        classes = class_indices(replay.output.shape[1], target, replay.num_images)
        return replay.drops_of_single_filters(classes)
