"""Abbasi-Asl and Yu: what a target's score loses when a filter is removed."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Literal, overload

import torch
from captum.attr import PerturbationAttribution
from torch import Tensor, nn
from tqdm.auto import tqdm

from captum_classfilters._core.captum import (
    TargetType,
    format_additional_forward_args,
    format_tensor_into_tuples,
    log_usage,
)
from captum_classfilters._core.files import AnyPath
from captum_classfilters._core.guard import model_left_as_found
from captum_classfilters._core.layers import (
    along_filters,
    layer_axis,
    module_of,
)
from captum_classfilters._core.outputs import are_probabilities, as_rows, log_probabilities
from captum_classfilters._core.replay.suffix_replay import SuffixReplay
from captum_classfilters._core.targets import class_indices, own_scores
from captum_classfilters._core.types import (
    Attributions,
    Dataloader,
    JsonDict,
    ModelInputs,
    Replay,
    Unpack,
)
from captum_classfilters.attr.base import LayerFilterAttribution, Layers
from captum_classfilters.class_filters import ClassFilters
from captum_classfilters.identify.accuracy_reduction import (
    AccuracyReduction,
    Metric,
    MetricReduction,
    accuracy_reduction,
    metric_reduction,
)
from captum_classfilters.identify.significance import LabelPermutation

Replacement = Literal["zero", "mean", "resample"]
Score = Literal["logit", "probability", "log_probability"]
SCORES: tuple[str, ...] = ("logit", "probability", "log_probability")


def score_reader(
    outputs: Tensor, target: TargetType, num_images: int, score: Score
) -> Callable[[Tensor], Tensor]:
    r"""
    How to read each image's own score off what the model returns.

    Args:

        outputs (Tensor): What the full model returned; tells probabilities from logits.
        target (int, tuple, Tensor or list): The output to read, in any of Captum's forms.
        num_images (int): N.
        score (str): ``"logit"``, ``"probability"`` or ``"log_probability"``.

    Returns:
        *Callable* from outputs of one run to scores (N,).
    """
    if score == "logit":
        return lambda outputs: own_scores(outputs, target, num_images)
    probabilities = are_probabilities(outputs)
    if target is None and outputs.numel() == num_images:
        target = 1  # of a binary classifier's one logit

    def read(outputs: Tensor) -> Tensor:
        logs = log_probabilities(as_rows(outputs), probabilities)
        return own_scores(logs if score == "log_probability" else logs.exp(), target, num_images)

    return read


def lost_scores(replay: Replay, removed: Tensor, read: Callable[[Tensor], Tensor]) -> Tensor:
    """What each image's own score loses without each of its sets of filters, (P, N), on the CPU."""
    full = read(replay.output)
    parts = [full - read(output) for _, outputs in replay.in_parts(removed) for output in outputs]
    return torch.stack(parts).cpu().double()


def _check_unused(what: str, **options: object) -> None:
    """Raise if an option is given that has no meaning for what is asked for."""
    given = [f"{name}={value!r}" for name, value in options.items() if value is not None]
    if given:
        raise ValueError(f"{', '.join(given)}: not an option of {what}.")


class LayerFilterAblation(LayerFilterAttribution, PerturbationAttribution):
    r"""
    The drop of the target's score when a filter is removed, for every filter of a layer.

    With :math:`f_c` the score of the target and :math:`x_{-k}` the forward pass in which filter *k*
    of the layer is replaced everywhere, filter *k* of an image gets

    .. math:: s_k = f_c(x) - f_c(x_{-k})

    The filter is replaced in the layer's output, after whatever the layer does, so a bias or a
    batch normalization inside the layer does not survive. This is the per-image form of the
    structural removal of Abbasi-Asl and Yu: *Structural Compression of Convolutional Neural
    Networks with Applications in Interpretability*, Frontiers in Big Data 4 (2021),
    https://arxiv.org/abs/1705.07356, whose index over a data set, classification accuracy reduction
    (CAR), is ``identify(dataloader, metric="accuracy")``.

    The result is that of ``captum.attr.LayerFeatureAblation`` with one feature per filter, at a
    fraction of the time: what comes before the layer runs once, what follows runs for many filters
    at once, and a linear head fed by the layer needs no further run at all.

    Args:

        forward_func (Callable): The forward function of the model.
        layer (nn.Module, str or list of these): The layer, its dotted name, or several layers.
        device_ids (list of int, optional): Devices of a hidden ``DataParallel`` model.
                    Default: None
        score (str): ``"logit"``, the model's output as it is; ``"probability"`` or
                    ``"log_probability"``, its (log-)softmax over axis 1, or what the model
                    returns if its rows are probabilities already.
                    Default: "logit"
        replacement (str): What stands in for a removed filter: ``"zero"``; ``"mean"``, the
                    filter's mean over all images and positions of the batch; ``"resample"``, the
                    filter's map of another image of the batch, drawn at random.
                    Default: "zero"
        seed (int): Seed of the images drawn for ``"resample"``; the global random state is not
                    touched.
                    Default: 0
        channel_dim (int, optional): Axis of the filters, where it cannot be told from the layer.
                    Default: None

    Raises:
        ValueError: ``score`` or ``replacement`` is none of the above.

    Examples::

        >>> import torch
        >>> from captum_classfilters import LayerFilterAblation
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        ...     torch.nn.Flatten(), torch.nn.Linear(8, 2))
        >>> ablation = LayerFilterAblation(net, net[1])
        >>> drops = ablation.attribute(torch.rand(4, 3, 6, 6), target=1)
        >>> drops.shape
        torch.Size([4, 8, 4, 4])
        >>> ablation.filter_scores(drops).shape
        torch.Size([4, 8])
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

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        layer_baselines: Tensor | float | None = None,
        target: TargetType = None,
        additional_forward_args: object = None,
        attribute_to_layer_input: bool = False,
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
    ) -> Attributions:
        r"""
        Args:

            inputs (Tensor or tuple[Tensor, ...]): Input of the model, N examples first.
            layer_baselines (Tensor or float, optional): What stands in for a removed filter,
                        broadcastable to the layer's tensor, means over a data set (1, K, 1, 1)
                        say. It overrules ``replacement``.
                        Default: None
            target (int, tuple, Tensor or list, optional): Index of the output, in any of Captum's
                        forms.
                        Default: None
            additional_forward_args (Any, optional): Further arguments of the forward function;
                        tensors with N rows belong to the examples.
                        Default: None
            attribute_to_layer_input (bool): Remove filters of the layer's input.
                        Default: False
            perturbations_per_eval (int, optional): Filters removed per replay. By default as many
                        as a memory budget allows.
            show_progress (bool): Show a progress bar over the filters.
                        Default: False

        Returns:
            *Tensor* or *list* of **attributions**:
            - **attributions** (*Tensor* or *list*):
                        Drops shaped like the layer. A filter's drop is spread evenly over its
                        positions, so their sum is the drop. A list for several layers.

        Raises:
            ValueError: The layer handles several tensors, has no channel dimension or does not run
                        exactly once; ``perturbations_per_eval`` is below 1; ``"resample"`` is asked
                        of a single image.
            AssertionError: The target does not pick one output of each image.
        """
        if perturbations_per_eval is not None and perturbations_per_eval < 1:
            raise ValueError(f"perturbations_per_eval={perturbations_per_eval} must be at least 1.")
        images: tuple[Tensor, ...] = format_tensor_into_tuples(inputs)
        extra = format_additional_forward_args(additional_forward_args)
        drops: list[tuple[Tensor, ...]] = []
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
                    at_input=attribute_to_layer_input,
                )
                values = self.drops(replay, target, perturbations_per_eval, show_progress)
                tensor = replay.activation
                positions = tensor[0].numel() // tensor.shape[replay.axis]
                spread = along_filters(values / positions, tensor, replay.axis)
                drops.append((spread.expand_as(tensor),))
        return self._formatted(drops)

    @overload
    def identify(
        self,
        dataloader: Dataloader,
        *,
        metric: None = None,
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
        target: int | None = None,
        num_filters: int | None = None,
        mass: float | None = None,
        attribute_kwargs: Mapping[str, object] | None = None,
        attribute_to_layer_input: bool = False,
        significance: bool | LabelPermutation = False,
        state_path: AnyPath | None = None,
        save_every: float | None = None,
        unpack: Unpack | None = None,
        device: torch.device | str | None = None,
        show_progress: bool = True,
    ) -> ClassFilters: ...

    @overload
    def identify(
        self,
        dataloader: Dataloader,
        *,
        metric: Literal["accuracy"],
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
        attribute_to_layer_input: bool = False,
        perturbations_per_eval: int | None = None,
        state_path: AnyPath | None = None,
        save_every: float | None = None,
        unpack: Unpack | None = None,
        device: torch.device | str | None = None,
        show_progress: bool = True,
    ) -> AccuracyReduction: ...

    @overload
    def identify(
        self,
        dataloader: Dataloader,
        *,
        metric: Metric,
        attribute_to_layer_input: bool = False,
        perturbations_per_eval: int | None = None,
        unpack: Unpack | None = None,
        device: torch.device | str | None = None,
        show_progress: bool = True,
    ) -> MetricReduction: ...

    def identify(
        self,
        dataloader: Dataloader,
        *,
        metric: Literal["accuracy"] | Metric | None = None,
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
        target: int | None = None,
        num_filters: int | None = None,
        mass: float | None = None,
        attribute_kwargs: Mapping[str, object] | None = None,
        attribute_to_layer_input: bool = False,
        significance: bool | LabelPermutation = False,
        perturbations_per_eval: int | None = None,
        state_path: AnyPath | None = None,
        save_every: float | None = None,
        unpack: Unpack | None = None,
        device: torch.device | str | None = None,
        show_progress: bool = True,
    ) -> ClassFilters | AccuracyReduction | MetricReduction:
        r"""
        Score each class's filters on a data set.

        Args:

            dataloader (iterable): Batches of (inputs, labels).
            metric (str or Callable, optional): By default the mean drop of the images of each
                        class, as a *ClassFilters* table. ``"accuracy"`` gives classification
                        accuracy reduction, see
                        :func:`captum_classfilters.identify.accuracy_reduction`; a function of all
                        outputs and labels gives the reduction of whatever it measures, see
                        :func:`captum_classfilters.identify.metric_reduction`.
            num_classes, class_names, attribute_to_layer_input, unpack, device, show_progress: As for
                        :func:`captum_classfilters.identify_class_filters`; a function's reduction
                        has no classes.
            target, num_filters, mass, attribute_kwargs, significance: Likewise, for a table.
            state_path, save_every: Likewise, for a table and for ``"accuracy"``.
            perturbations_per_eval (int, optional): Filters removed per replay, for reductions; by
                        default as many as a memory budget allows. For a table it is one of the
                        ``attribute_kwargs``.

        Returns:
            *ClassFilters*, *AccuracyReduction* or *MetricReduction*.

        Raises:
            ValueError: The metric is unknown, or an option does not go with it.
        """
        if metric is None:
            _check_unused("a table", perturbations_per_eval=perturbations_per_eval)
            return super().identify(
                dataloader,
                num_classes=num_classes,
                class_names=class_names,
                target=target,
                num_filters=num_filters,
                mass=mass,
                attribute_kwargs=attribute_kwargs,
                attribute_to_layer_input=attribute_to_layer_input,
                significance=significance,
                state_path=state_path,
                save_every=save_every,
                unpack=unpack,
                device=device,
                show_progress=show_progress,
            )
        if metric != "accuracy" and not callable(metric):
            raise ValueError(f'metric={metric!r}; expected None, "accuracy" or a function.')
        _check_unused(
            "a reduction",
            target=target,
            num_filters=num_filters,
            mass=mass,
            attribute_kwargs=attribute_kwargs,
            significance=significance or None,
        )
        if metric == "accuracy":
            return accuracy_reduction(
                self,
                dataloader,
                num_classes=num_classes,
                class_names=class_names,
                attribute_to_layer_input=attribute_to_layer_input,
                perturbations_per_eval=perturbations_per_eval,
                state_path=state_path,
                save_every=save_every,
                unpack=unpack,
                device=device,
                show_progress=show_progress,
            )
        _check_unused(
            "a function's reduction",
            num_classes=num_classes,
            class_names=class_names,
            state_path=state_path,
            save_every=save_every,
        )
        return metric_reduction(
            self,
            dataloader,
            metric,
            attribute_to_layer_input=attribute_to_layer_input,
            perturbations_per_eval=perturbations_per_eval,
            unpack=unpack,
            device=device,
            show_progress=show_progress,
        )

    # -- shared with the data-set form -----------------------------------------------------------

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
                raise ValueError("replacement='resample' needs at least two images in a batch.")
            generator = torch.Generator().manual_seed(self.seed)
            order = torch.randperm(number, generator=generator)
            other = torch.empty_like(order)
            other[order] = order.roll(1)  # nobody stands in for itself
            return tensor[other.to(tensor.device)]

        return resample

    def drops(
        self,
        replay: SuffixReplay,
        target: TargetType,
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
    ) -> Tensor:
        """Drop of the target's score for each image and filter (N, K)."""
        read = score_reader(replay.output, target, replay.num_images, self.score)
        full = read(replay.output)
        one_logit = replay.output.numel() == replay.num_images
        if self.score == "logit" and replay.way == "closed form" and not one_logit:
            classes = class_indices(replay.output.shape[1], target, replay.num_images)
            drops = replay.drops_of_single_filters(classes)
            assert drops is not None
            return drops
        parts: list[Tensor] = []
        with tqdm(
            total=replay.num_filters,
            desc=f"{self.get_name()} attribution",
            disable=not show_progress,
        ) as bar:
            for _, outputs in replay.in_parts(replay.each_filter(), perturbations_per_eval):
                parts.extend(full - read(output) for output in outputs)
                bar.update(len(outputs))
        return torch.stack(parts, 1)
