"""Abbasi-Asl and Yu: what a target's score loses when a filter is removed."""

from typing import Literal, overload

import torch
from torch import Tensor
from tqdm.auto import tqdm

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.captum import TargetType, log_usage
from captum_classfilters._core.files import AnyPath
from captum_classfilters._core.replay.suffix_replay import SuffixReplay
from captum_classfilters._core.types import (
    AttributeKwargs,
    Attributions,
    ClassNames,
    Dataloader,
    Unpack,
)
from captum_classfilters.attr.filter_removal import FilterRemovalAttribution, score_reader
from captum_classfilters.class_filters import ClassFilters
from captum_classfilters.identify.accuracy_reduction import (
    AccuracyReduction,
    Metric,
    MetricReduction,
    accuracy_reduction,
    metric_reduction,
)
from captum_classfilters.identify.significance import LabelPermutation


def _check_unused(what: str, **options: object) -> None:
    """Raise if an option is given that has no meaning for what is asked for."""
    given = [f"{name}={value!r}" for name, value in options.items() if value is not None]
    if given:
        raise ValueError(f"{', '.join(given)}: not an option of {what}.")


class LayerFilterAblation(FilterRemovalAttribution):
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

    @arguments_checked
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
                        exactly once; ``layer_baselines`` do not fit its tensor;
                        ``perturbations_per_eval`` is below 1; ``"resample"`` is asked of a single
                        image.
            AssertionError: The target does not pick one output of each image.
        """
        return self._scored(
            inputs,
            layer_baselines,
            additional_forward_args,
            attribute_to_layer_input,
            perturbations_per_eval,
            lambda replay: self.drops(replay, target, perturbations_per_eval, show_progress),
        )

    @overload
    def identify(
        self,
        dataloader: Dataloader,
        *,
        metric: None = None,
        num_classes: int | None = None,
        class_names: ClassNames | None = None,
        target: int | None = None,
        num_filters: int | None = None,
        mass: float | None = None,
        attribute_kwargs: AttributeKwargs | None = None,
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
        class_names: ClassNames | None = None,
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

    @arguments_checked
    def identify(
        self,
        dataloader: Dataloader,
        *,
        metric: Literal["accuracy"] | Metric | None = None,
        num_classes: int | None = None,
        class_names: ClassNames | None = None,
        target: int | None = None,
        num_filters: int | None = None,
        mass: float | None = None,
        attribute_kwargs: AttributeKwargs | None = None,
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

    @arguments_checked
    def drops(
        self,
        replay: SuffixReplay,
        target: TargetType,
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
    ) -> Tensor:
        """Drop of the target's score for each image and filter (N, K)."""
        exact = self._from_weights(replay, target)
        if exact is not None:
            return exact
        read = score_reader(replay, target, self.score)
        full = read(replay.output)
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
