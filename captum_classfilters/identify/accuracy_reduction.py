"""Abbasi-Asl and Yu: the accuracy that a network loses when a filter is removed."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn

from captum_classfilters._core.arguments import arguments_checked, check_confidence
from captum_classfilters._core.batches import Batch, Batches, dataset_names, read_batches
from captum_classfilters._core.devices import sums_device
from captum_classfilters._core.distributed import Ranks, gather, ranks_together
from captum_classfilters._core.files import AnyPath
from captum_classfilters._core.labels import check_num_classes, labels_of_scores
from captum_classfilters._core.layers import layer_name, module_of
from captum_classfilters._core.names import counted, listed_names
from captum_classfilters._core.outputs import (
    two_classes,
)
from captum_classfilters._core.progress import Count, Progress, described_options
from captum_classfilters._core.provenance import provenance
from captum_classfilters._core.replay.checks import Confirmed, confirmed
from captum_classfilters._core.replay.suffix_replay import SuffixReplay
from captum_classfilters._core.rules import Ablation
from captum_classfilters._core.score_reader import ScoreReader
from captum_classfilters._core.tables import Table, Tabular, short_repr
from captum_classfilters._core.types import ClassNames, Dataloader, JsonDict, Unpack
from captum_classfilters.class_filters import (
    ClassFilters,
    check_class_names,
    names_of_classes,
)
from captum_classfilters.identify.new_sums import changes_without, new_accuracy_sums

if TYPE_CHECKING:
    from captum_classfilters.identify.accuracy_sums import AccuracySums, Changes

#: From all outputs and all labels to a number, larger where it is better.
Metric: TypeAlias = Callable[[Tensor, Tensor], Tensor | float]


@short_repr
@dataclass(frozen=True)
class AccuracyReduction(Tabular):
    r"""
    Classification accuracy reduction (CAR) of each filter, over all images and class by class.

    Args:

        counts (Tensor): Shape (C,). Number of images M_c of each class.
        correct (Tensor): Shape (C,). How many of them the full network classifies correctly.
        lost (Tensor): Shape (C, K). How many become wrong when a filter is removed.
        gained (Tensor): Shape (C, K). How many become right.
        log_probability_drop (Tensor): Shape (C, K). Mean drop of the true class's log-probability,
                    which is the increase of the cross-entropy; the soft form of CAR.
        probability_drop (Tensor): Shape (C, K). Mean drop of the true class's probability.
        class_names (tuple of str): C names.
        layer (str): Dotted name of the layer.
        provenance (dict): Where the numbers come from.
    """

    counts: Tensor
    correct: Tensor
    lost: Tensor
    gained: Tensor
    log_probability_drop: Tensor
    probability_drop: Tensor
    class_names: tuple[str, ...]
    layer: str
    provenance: JsonDict = field(default_factory=dict)

    def _tables(self) -> list[Table]:
        interval, losses = self.interval(), self.loss_increase
        rows = [
            {
                "filter": index,
                "accuracy reduction": value,
                "low": interval[index, 0],
                "high": interval[index, 1],
                "increase of the loss": losses[index],
            }
            for index, value in enumerate(self.reduction.tolist())
        ]
        title = (
            f"without a filter of {self.layer}: accuracy {self.accuracy:.4f} on "
            f"{counted(int(self.counts.sum()), 'image')} of {counted(len(self.class_names), 'class')}"
        )
        bars = ("accuracy reduction", "increase of the loss")
        formats = dict.fromkeys(("accuracy reduction", "low", "high", bars[1]), "+.4f")
        return [Table(rows, formats, title, bars=bars)]

    @property
    def accuracy(self) -> float:
        """Accuracy of the full network."""
        return float(self.correct.sum() / self.counts.sum())

    @property
    def reduction(self) -> Tensor:
        """CAR (K,): accuracy minus the accuracy without the filter; negative if removal helps."""
        return (self.lost - self.gained).sum(0).double() / self.counts.sum()

    @property
    def class_reduction(self) -> Tensor:
        """CAR of each class (C, K), in the accuracy of its images; NaN without images.

        Weighted by the classes' shares of the images, the rows sum to :attr:`reduction`.
        """
        return (self.lost - self.gained).double() / self.counts[:, None]

    @property
    def loss_increase(self) -> Tensor:
        """Increase of the mean cross-entropy (K,), which breaks ties of CAR."""
        weights = self.counts.double()[:, None] / self.counts.sum()
        return (self.log_probability_drop.nan_to_num() * weights).sum(0)

    @arguments_checked
    def interval(self, confidence: float = 0.95) -> Tensor:
        """Interval of CAR (K, 2); see :meth:`class_interval`."""
        lost, gained = self.lost.sum(0), self.gained.sum(0)
        return paired_interval(lost, gained, self.counts.sum(), confidence)

    @arguments_checked
    def class_interval(self, confidence: float = 0.95) -> Tensor:
        r"""
        Interval of each class's CAR, a difference of paired shares; see :func:`paired_interval`.

        Its coverage is near the stated one where some images are lost or gained, and higher where
        hardly any are; a small class may fall short of it by a point.

        Args:

            confidence (float): Coverage, between 0 and 1.
                        Default: 0.95

        Returns:
            *Tensor* of shape (C, K, 2), lower and upper end; NaN for classes without images.

        Raises:
            ValueError: ``confidence`` is not between 0 and 1.
        """
        counts = self.counts[:, None].expand_as(self.lost)
        return paired_interval(self.lost, self.gained, counts, confidence)

    @arguments_checked
    def to_class_filters(self, num_filters: int, soft: bool = False) -> ClassFilters:
        r"""
        The table of each class's CAR, with its filters of largest CAR selected.

        Args:

            num_filters (int): Filters to select for each class.
            soft (bool): Use the drop of the log-probability, which has no ties, instead.
                        Default: False

        Returns:
            *ClassFilters*.
        """
        return ClassFilters(
            scores=self.log_probability_drop if soft else self.class_reduction,
            counts=self.counts,
            class_names=self.class_names,
            layer=self.layer,
            method="SoftAccuracyReduction" if soft else "AccuracyReduction",
            provenance=self.provenance,
        ).select(num_filters=num_filters)


@short_repr
@dataclass(frozen=True)
class MetricReduction(Tabular):
    r"""
    How far a metric falls when a filter is removed.

    Args:

        metric (float): The metric of the full network.
        without (Tensor): Shape (K,). The metric without each filter.
        layer (str): Dotted name of the layer.
    """

    metric: float
    without: Tensor
    layer: str

    def _tables(self) -> list[Table]:
        rows = [
            {"filter": index, "without it": without, "reduction": self.metric - without}
            for index, without in enumerate(self.without.tolist())
        ]
        formats = {"without it": ".4g", "reduction": "+.4g"}
        title = f"without a filter of {self.layer}: metric {self.metric:.4g}"
        return [Table(rows, formats, title, bars=("reduction",))]

    @property
    def reduction(self) -> Tensor:
        """The metric minus the metric without the filter (K,)."""
        return self.metric - self.without


@arguments_checked
def accuracy_reduction(
    method: Ablation,
    dataloader: Dataloader,
    *,
    num_classes: int | None = None,
    class_names: ClassNames | None = None,
    attribute_to_layer_input: bool = False,
    perturbations_per_eval: int | None = None,
    state_path: AnyPath | None = None,
    save_every: float | None = None,
    unpack: Unpack | None = None,
    device: torch.device | str | None = None,
    show_progress: bool = True,
) -> AccuracyReduction:
    r"""
    Classification accuracy reduction (CAR) of every filter of a layer, and of every class.

    .. math:: \mathrm{CAR}(i, L) = \mathrm{Acc}(N) - \mathrm{Acc}(N(-i, L)), \qquad
        \mathrm{CAR}^c(i, L) = \mathrm{Acc}_c(N) - \mathrm{Acc}_c(N(-i, L))

    where :math:`N(-i, L)` is the network without filter *i* of layer *L* and :math:`\mathrm{Acc}_c`
    the top-1 accuracy on the images of class *c*. A filter is removed from the layer's output; with
    normalizations across channels after the layer this differs from deleting it.

    Under ``torchrun`` each process measures its share of the images, and every process gets the sum.

    Source: Abbasi-Asl and Yu: *Structural Compression of Convolutional Neural Networks with
    Applications in Interpretability*, Frontiers in Big Data 4 (2021),
    https://arxiv.org/abs/1705.07356. The formula per class is the restriction of the first.

    Args:

        method (LayerFilterAblation): The model, the layer and the replacement of removed filters.
        dataloader (iterable): Batches of (inputs, labels).
        num_classes (int, optional): C. By default the number of the model's outputs.
        class_names (sequence of str, optional): C names. By default those of the data set.
        attribute_to_layer_input (bool): Remove filters of the layer's input.
                    Default: False
        perturbations_per_eval (int, optional): Filters removed per replay. By default as many as
                    a memory budget allows.
        state_path, save_every: As for :func:`identify_class_filters`.
        unpack (Callable, optional): From a batch of another kind to the pair (inputs, labels).
                    Default: None
        device (torch.device or str, optional): Where the batches go; by default where the model is.
        show_progress (bool): Show a progress bar over the batches.
                    Default: True

    Returns:
        *AccuracyReduction*.

    Raises:
        ValueError: The loader is empty, labels are not class indices, outputs are not (N, C), or
                    the method has several layers.

    Examples::

        >>> import torch
        >>> from captum_classfilters import LayerFilterAblation
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        ...     torch.nn.Flatten(), torch.nn.Linear(8, 2))
        >>> data = [(torch.rand(4, 3, 6, 6), torch.tensor([0, 1, 1, 0]))]
        >>> ablation = LayerFilterAblation(net, net[1])
        >>> car = ablation.identify(data, metric="accuracy", show_progress=False)
        >>> car.class_reduction.shape, car.counts.tolist()
        (torch.Size([2, 8]), [2, 2])
        >>> shares = car.counts / car.counts.sum()
        >>> torch.allclose((shares[:, None] * car.class_reduction).sum(0), car.reduction)
        True
    """
    class_names = listed_names(class_names)
    names = dataset_names(dataloader) if class_names is None else class_names
    with ranks_together() as ranks:
        check_num_classes(num_classes)
        check_class_names(class_names, num_classes)
        layer, layer_name_ = _only_layer(method)
        model = module_of(method.forward_func, [layer])
        counted = _Counted(confirmed(method.forward_func, layer, attribute_to_layer_input))

        def facts() -> JsonDict:
            return {
                "the call": "accuracy_reduction",
                "the method": type(method).__name__,
                "the layer": layer_name_,
                "the model": [provenance(model)[n] for n in ("model", "model_sha256")],
                "the method's options": described_options(
                    {name: value for name, value in vars(method).items() if name != "layer"}
                ),
                "num_classes": num_classes,
                "class_names": names,
                "attribute_to_layer_input": attribute_to_layer_input,
                "perturbations_per_eval": perturbations_per_eval,
            }

        def result(sums: dict[str, Tensor]) -> AccuracyReduction:
            return _result(sums, method, names, attribute_to_layer_input)

        def partial() -> AccuracyReduction | None:
            sums = counted.sums
            return None if sums is None else result(sums.of_this_process())

        progress = Progress(counted, facts, partial, state_path, save_every)
        with _reading(
            method, dataloader, unpack, device, show_progress, progress=progress, ranks=ranks
        ) as batches:
            reader = ScoreReader(method.forward_func, batches, [layer])
            for batch in batches:
                replay = _replay(method, batches, batch, attribute_to_layer_input)
                scores = two_classes(replay.output)
                labels = labels_of_scores(scores, batch.labels, batch.number, num_classes)
                if counted.sums is None:
                    check_class_names(class_names, num_classes or scores.shape[1])
                probabilities = reader.probabilities(batch, replay.output)
                changes = changes_without(replay, labels, probabilities, perturbations_per_eval)
                counted.add(
                    batch, changes, labels, num_classes or scores.shape[1], replay.num_filters
                )
            ranks.agree(progress.facts, counted.shape())
    whole = result(counted.merged().compute())
    progress.finished()
    return whole


class _Counted:
    """The counts of a pass, which may go on from those of an earlier run."""

    def __init__(self, short_cuts: Confirmed) -> None:
        self.sums: AccuracySums | None = None
        self._count, self._short_cuts = Count(), short_cuts

    def add(
        self,
        batch: Batch,
        changes: "Changes",
        labels: Tensor,
        num_classes: int,
        num_filters: int,
    ) -> None:
        """Add a batch."""
        if self.sums is None:
            self.sums = new_accuracy_sums(num_classes, num_filters)
        device = sums_device(labels.device)
        if self.sums.counts.device != device:
            self.sums.to(device)
        with self._count.adding(batch.first_image, batch.size):
            self.sums.update(changes, labels)

    def shape(self) -> dict[str, int]:
        """The numbers of classes and of filters, if this process has seen an image."""
        if self.sums is None:
            return {}
        names = ("the number of classes", "the number of filters")
        return dict(zip(names, self.sums.lost.shape, strict=True))

    def merged(self) -> "AccuracySums":
        """The sums; a process may have no image, and still takes part in the sum."""
        sums = self.sums
        sizes = [size for size in gather(None if sums is None else tuple(sums.lost.shape)) if size]
        if not sizes:
            raise ValueError("The data loader is empty: there is no image to measure accuracy on.")
        return new_accuracy_sums(*sizes[0]) if sums is None else sums

    def counts(self) -> list[Count]:
        """How far the sums are."""
        return [self._count]

    def state(self) -> tuple[dict[str, Tensor], JsonDict]:
        """All counts so far."""
        notes = {"images": self._count.images, "replays": self._short_cuts.noted()}
        return {} if self.sums is None else self.sums.state(), notes

    def restore(self, tensors: Mapping[str, Tensor], notes: JsonDict) -> None:
        """Go on from such a state."""
        self.sums = new_accuracy_sums(*tensors["lost"].shape)
        self.sums.restore(tensors)
        self._short_cuts.recall(notes["replays"])
        self._count.restore(notes["images"])


@arguments_checked
def metric_reduction(
    method: Ablation,
    dataloader: Dataloader,
    metric: Metric,
    *,
    attribute_to_layer_input: bool = False,
    perturbations_per_eval: int | None = None,
    unpack: Unpack | None = None,
    device: torch.device | str | None = None,
    show_progress: bool = True,
) -> MetricReduction:
    r"""
    The form of CAR for regression (RAR) and any other metric: how far it falls without a filter.

    The metric is a function of all outputs and labels, a correlation say; larger must be better.
    The outputs without each filter are held in memory, K times those of the data set.

    Args:

        method (LayerFilterAblation): The model, the layer and the replacement of removed filters.
        dataloader (iterable): Batches of (inputs, labels), labels Tensors with N rows.
        metric (Callable): From all outputs (M, ...) and labels (M, ...) to a number.
        attribute_to_layer_input (bool): Remove filters of the layer's input.
                    Default: False
        perturbations_per_eval (int, optional): Filters removed per replay. By default as many as
                    a memory budget allows.
        unpack (Callable, optional): From a batch of another kind to the pair (inputs, labels).
                    Default: None
        device (torch.device or str, optional): Where the batches go; by default where the model is.
        show_progress (bool): Show a progress bar over the batches.
                    Default: True

    Returns:
        *MetricReduction*.

    Raises:
        ValueError: The loader is empty or the method has several layers.
    """
    full, without, labels = [], [], []
    with _reading(method, dataloader, unpack, device, show_progress) as batches:
        for batch in batches:
            replay = _replay(method, batches, batch, attribute_to_layer_input)
            full.append(replay.output.cpu())
            without.append(replay.outputs(replay.each_filter(), perturbations_per_eval).cpu())
            labels.append(torch.as_tensor(batch.labels).cpu())
    truth = torch.cat(labels)
    values = [float(metric(outputs, truth)) for outputs in torch.cat(without, 1)]
    return MetricReduction(
        metric=float(metric(torch.cat(full), truth)),
        without=torch.tensor(values, dtype=torch.float64),
        layer=_only_layer(method)[1],
    )


def _result(
    sums: dict[str, Tensor],
    method: Ablation,
    class_names: Sequence[str] | None,
    at_input: bool,
) -> AccuracyReduction:
    """The counts of all batches, with what they come from."""
    counts = sums["counts"]
    number = counts.double()[:, None]
    return AccuracyReduction(
        counts=counts,
        correct=sums["correct"],
        lost=sums["lost"],
        gained=sums["gained"],
        log_probability_drop=sums["log_drop"] / number,
        probability_drop=sums["drop"] / number,
        class_names=names_of_classes(class_names, len(counts)),
        layer=_only_layer(method)[1],
        provenance=provenance(
            module_of(method.forward_func, [method.layer]),
            options={
                **method.options,
                **({"attribute_to_layer_input": True} if at_input else {}),
            },
            num_images=int(counts.sum()),
        ),
    )


def _reading(
    method: Ablation,
    dataloader: Dataloader,
    unpack: Unpack | None,
    device: torch.device | str | None,
    show_progress: bool,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
) -> AbstractContextManager[Batches]:
    """The batches, to be run without filters."""
    layer, name = _only_layer(method)
    return read_batches(
        module_of(method.forward_func, [layer]),
        dataloader,
        f"without {name}",
        device=device,
        unpack=unpack,
        summed=ranks is not None,
        show_progress=show_progress,
        progress=progress,
        ranks=ranks,
    )


def _replay(method: Ablation, batches: Batches, batch: Batch, at_input: bool) -> SuffixReplay:
    """A batch, run once and ready to run without filters."""
    replay = method.replay(_only_layer(method)[0], batch.inputs, at_input=at_input)
    batches.check_repeats(method.forward_func, batch, replay.output)
    return replay


def _only_layer(method: Ablation) -> tuple[nn.Module, str]:
    """The method's one layer and its name."""
    layers = method.layer if isinstance(method.layer, (list, tuple)) else [method.layer]
    names = [layer_name(module_of(method.forward_func, [layer]), layer) for layer in layers]
    if len(layers) != 1:
        raise ValueError(
            f"The method has several layers ({', '.join(names)}); measure them one by one."
        )
    return layers[0], names[0]


def paired_interval(
    lost: Tensor, gained: Tensor, counts: Tensor, confidence: float = 0.95
) -> Tensor:
    r"""
    Tango's score interval of a difference of paired shares, ``(lost - gained) / counts``.

    The ends are those differences :math:`\Delta` that the score test does not reject, at which

    .. math:: \frac{b - c - n \Delta}{\sqrt{n (2 q + \Delta (1 - \Delta))}} = \pm z ,

    with *b* images lost, *c* gained, *n* in all and *q* the most likely share gained if the
    difference is :math:`\Delta`. With nothing lost or gained they are :math:`\pm z^2 / (n + z^2)`.

    Source: Tango: *Equivalence test and confidence interval for the difference in proportions for the
    paired-sample design*, Statistics in Medicine 17 (1998).

    Args:

        lost, gained (Tensor): Numbers of images, any shape.
        counts (Tensor): Numbers of images in all, broadcastable to them.
        confidence (float): Coverage, between 0 and 1.
                    Default: 0.95

    Returns:
        *Tensor* of float64, the shape of ``lost`` and a last axis of lower and upper end; NaN where
        there are no images.

    Raises:
        ValueError: ``confidence`` is not between 0 and 1.
    """
    check_confidence(confidence)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    upper = _upper_end(lost.double(), gained.double(), counts.expand_as(lost).double(), z)
    lower = -_upper_end(gained.double(), lost.double(), counts.expand_as(lost).double(), z)
    return torch.stack([lower, upper], -1)


def _upper_end(lost: Tensor, gained: Tensor, number: Tensor, z: float) -> Tensor:
    """The largest difference that the score test does not reject, by bisection."""
    inside, outside = (lost - gained) / number, torch.ones_like(lost)
    for _ in range(60):
        middle = (inside + outside) / 2
        linear = (2 * number - lost + gained) * middle - lost - gained
        constant = -gained * middle * (1 - middle)
        root = (linear.square() - 8 * number * constant).clamp(min=0).sqrt()
        share = (root - linear) / (4 * number)
        variance = number * (2 * share + middle * (1 - middle))
        kept = (number * middle - lost + gained).square() <= z * z * variance
        inside, outside = torch.where(kept, middle, inside), torch.where(kept, outside, middle)
    return inside


@arguments_checked
def binomial_interval(successes: Tensor, counts: Tensor, confidence: float = 0.95) -> Tensor:
    r"""
    Clopper and Pearson's exact interval of a share.

    Args:

        successes (Tensor): Numbers of successes, any shape.
        counts (Tensor): Numbers of trials, broadcastable to ``successes``.
        confidence (float): Coverage, between 0 and 1.
                    Default: 0.95

    Returns:
        *Tensor* of float64, the shape of ``successes`` and a last axis of lower and upper end; NaN
        where there are no trials.

    Raises:
        ValueError: There are more successes than trials, or less than none, or ``confidence`` is not
                    between 0 and 1.
    """
    from scipy.stats import beta

    check_confidence(confidence)
    tail = (1 - confidence) / 2
    hits = successes.cpu().double()
    number = counts.cpu().expand_as(hits).double()
    if bool(((hits < 0) | (hits > number)).any()):
        raise ValueError("successes must be from 0 to counts, the trials; some are not.")
    low = torch.as_tensor(beta.ppf(tail, hits.numpy(), (number - hits + 1).numpy()))
    high = torch.as_tensor(beta.ppf(1 - tail, (hits + 1).numpy(), (number - hits).numpy()))
    low = torch.where(hits == 0, torch.zeros_like(hits), low)
    high = torch.where(hits == number, torch.ones_like(hits), high)
    interval = torch.stack([low, high], -1)
    return torch.where((number > 0)[..., None], interval, torch.full_like(interval, torch.nan))
