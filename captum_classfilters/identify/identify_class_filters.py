"""Data set in, one table of class filters per method out: one streaming pass."""

import copy
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from captum.attr import LayerAttribution, LayerDeepLift
from torch import Tensor, nn
from tqdm.auto import tqdm

from captum_classfilters._core.batches import dataset_names, split_batch
from captum_classfilters._core.distributed import gather, is_main_process, rank
from captum_classfilters._core.guard import model_left_as_found
from captum_classfilters._core.layers import filter_axis, layer_name, module_of, positions_last
from captum_classfilters._core.provenance import provenance
from captum_classfilters.attr import LayerFilterContribution, LayerFilterFrequency
from captum_classfilters.class_filters import ClassFilters
from captum_classfilters.identify.shared_forward import SharedForward
from captum_classfilters.identify.significance import (
    EvidenceRecord,
    LabelPermutation,
    false_discovery_adjusted,
    foreign_labels,
    permutation_p_values,
    vote_p_values,
)
from captum_classfilters.identify.statistics import ClassFilterSums, class_labels

logger = logging.getLogger("captum_classfilters")

Reduction = Literal["sum", "mean", "max", "abs_sum"]
_DEFAULT_FILTERS = 5
_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda maps: maps.sum(2),
    "mean": lambda maps: maps.mean(2),
    "max": lambda maps: maps.amax(2),
    "abs_sum": lambda maps: maps.abs().sum(2),
}


def identify_class_filters(
    methods: LayerAttribution | Sequence[LayerAttribution] | Mapping[str, LayerAttribution],
    dataloader: Iterable[Any],
    *,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    num_filters: int | None = None,
    mass: float | None = None,
    reduction: Reduction = "sum",
    attribute_kwargs: Mapping[str, Any] | None = None,
    attribute_to_layer_input: bool = False,
    significance: bool | LabelPermutation = False,
    device: torch.device | str | None = None,
    show_progress: bool = True,
) -> Any:
    r"""
    Find each class's filters on a data set, with any number of methods and layers at once.

    The data are read once. All methods of this package on the same model share one forward pass for
    each batch; any other Captum ``LayerAttribution`` is asked for its attributions with the labels
    as targets, and these are reduced to one score per filter. Only per-class sums are kept, O(C K)
    for each method and layer. The model runs in evaluation mode and is left exactly as found.

    Under ``torchrun`` every rank reads its own share, of any size, and all ranks get the table of
    the whole: bitwise the one-process table for counts, to rounding for sums.

    Args:

        methods (LayerAttribution, or a sequence or mapping of them): What to measure, and where.
        dataloader (iterable): Batches of (inputs, labels); ``inputs`` a Tensor with N images
                    first or a tuple of them, ``labels`` N class indices.
        num_classes (int, optional): C. By default the number of the model's outputs.
        class_names (sequence of str, optional): C names. By default those of
                    ``dataloader.dataset.classes`` where there are C of them.
        num_filters (int, optional): Select this many filters for each class. By default ``top_k``
                    for :class:`LayerFilterFrequency` and 5 elsewhere, but never more than K.
        mass (float, optional): Select by share of the scores instead; see
                    :meth:`ClassFilters.select`.
        reduction (str): How maps of another package's method become one score per filter:
                    ``"sum"``, ``"mean"``, ``"max"`` or ``"abs_sum"`` over positions.
                    Default: "sum"
        attribute_kwargs (mapping, optional): Further arguments of ``attribute``, ``n_steps`` say.
                    With several methods, a mapping from a method's name or position to its own.
                    Default: None
        attribute_to_layer_input (bool): Use the layers' inputs, the features of a head say.
                    Default: False
        significance (bool or LabelPermutation): Fill the tables' ``p_values`` and ``q_values``, so
                    that ``select(fdr=0.05)`` works, against labels permuted among the images; True
                    for the defaults of :class:`LabelPermutation`. Votes need no more memory for
                    it; other methods keep the evidence of single images, O(N K), and are asked for
                    that of other targets too.
                    Default: False
        device (torch.device or str, optional): Where the batches go; by default where the model is.
        show_progress (bool): Show a progress bar.
                    Default: True

    Returns:
        *ClassFilters* for one method, a *list* for a sequence, a *dict* for a mapping. A method
        over a list of layers gives a list of tables.

    Raises:
        ValueError: A layer is unknown, not reached exactly once or has no channel dimension; labels
                    are not class indices; the loader is empty; activations are NaN or infinite (the
                    class and the batch are named); ``num_filters`` exceeds K.

    Examples::

        >>> import torch
        >>> from captum_classfilters import (
        ...     LayerFilterContribution, LayerFilterFrequency, identify_class_filters)
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        ...     torch.nn.Flatten(), torch.nn.Linear(8, 2))
        >>> data = [(torch.rand(4, 3, 6, 6), torch.tensor([0, 1, 1, 0]))]
        >>> methods = {
        ...     "votes": LayerFilterFrequency(net, "1"),
        ...     "logits": LayerFilterContribution(net, "1")}
        >>> tables = identify_class_filters(methods, data, num_filters=3, show_progress=False)
        >>> tables["votes"].scores.sum(1)
        tensor([5., 5.], dtype=torch.float64)
    """
    if num_filters is not None and mass is not None:
        raise ValueError("Give num_filters or mass, not both.")
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction={reduction!r}; choose one of {', '.join(_REDUCTIONS)}.")
    jobs = jobs_of(methods, attribute_kwargs, attribute_to_layer_input, reduction)
    test = _permutation_test(significance)
    collector = Collector(jobs, num_classes, num_filters, test)
    collect(collector, dataloader, device, show_progress)
    names = class_names if class_names is not None else dataset_names(dataloader)
    tables = collector.tables(names, class_names is not None, mass)
    return like_methods(methods, jobs, tables)


def collect(
    collector: "Collector",
    dataloader: Iterable[Any],
    device: torch.device | str | None,
    show_progress: bool,
) -> None:
    """Read all batches into a collector, the models in evaluation mode and left as found."""
    jobs = collector.jobs
    with ExitStack() as stack:
        for model in {id(job.model): job.model for job in jobs}.values():
            stack.enter_context(model_left_as_found(model, evaluation=True, freeze=True))
        bar = tqdm(
            dataloader,
            desc="class filters",
            unit="batch",
            disable=not (show_progress and is_main_process()),
        )
        for number, batch in enumerate(bar):
            collector.add(number, *split_batch(batch, number, device or device_of(jobs)))


def _permutation_test(significance: bool | LabelPermutation) -> LabelPermutation | None:
    if isinstance(significance, LabelPermutation):
        return significance
    if not isinstance(significance, bool):
        raise ValueError(
            f"significance={significance!r}; expected True, False or a LabelPermutation."
        )
    return LabelPermutation() if significance else None


class Job:
    """One method at one layer: its evidence, batch by batch, and what is kept of it."""

    def __init__(
        self, key: Any, method: LayerAttribution, kwargs: dict[str, Any], reduction: Reduction
    ) -> None:
        if not isinstance(method.layer, nn.Module):
            raise ValueError(
                f"{type(method).__name__} has the layer {method.layer!r}; expected a module."
            )
        self.key = key
        self.method = method
        self.kwargs = kwargs
        self.reduction = reduction
        self.model = module_of(method.forward_func)
        self.layer_name = layer_name(self.model, method.layer)
        features = getattr(method, "features_name", None)
        self.table_layer = f"{self.layer_name}.{features}" if features else self.layer_name
        self.sums: ClassFilterSums | None = None
        self.record: EvidenceRecord | None = None
        self.feed: dict[str, str] | None = None

    @property
    def name(self) -> str:
        """The method's name, as Captum spells it without spaces."""
        return type(self.method).__name__

    @property
    def counts_votes(self) -> bool:
        """Whether scores are whole numbers."""
        return isinstance(self.method, LayerFilterFrequency)

    @property
    def shares_forward(self) -> bool:
        """Whether the scores come out of a forward pass shared with other methods."""
        devices = self.method.device_ids or getattr(self.model, "device_ids", None) or []
        own = isinstance(self.method, (LayerFilterFrequency, LayerFilterContribution))
        return own and len(devices) < 2 and not set(self.kwargs) - {"attribute_to_layer_input"}

    @property
    def depends_on_target(self) -> bool:
        """Whether an image's evidence is another one for another target."""
        if self.counts_votes:
            return False
        return "target" in inspect.signature(self.method.attribute).parameters

    def attribute(self, inputs: tuple[Tensor, ...], labels: Tensor) -> Tensor:
        """Scores (N, K) through the method's own ``attribute``."""
        kwargs = dict(self.kwargs)
        parameters = inspect.signature(self.method.attribute).parameters
        if "target" in parameters:
            kwargs.setdefault("target", labels.to(inputs[0].device))
        if isinstance(self.method, LayerDeepLift):
            # It hooks gradients before the layer, where frozen parameters leave none.
            inputs = tuple(
                one.detach().requires_grad_() if one.is_floating_point() else one for one in inputs
            )
        attributions = self.method.attribute(inputs if len(inputs) > 1 else inputs[0], **kwargs)
        if not isinstance(attributions, Tensor):
            raise ValueError(
                f"{self.name} at {self.layer_name!r} returned a {type(attributions).__name__}; "
                "class filters need one tensor, (N, K) or (N, K, ...)."
            )
        channel_dim = getattr(self.method, "channel_dim", None)
        at_input = kwargs.get("attribute_to_layer_input", False)
        # One channel, as Grad-CAM's maps have, is no layout that the layer could tell.
        layer = None if at_input or attributions.shape[1] == 1 else self.method.layer
        axis = filter_axis(layer, attributions, channel_dim)
        return _REDUCTIONS[self.reduction](positions_last(attributions.detach(), axis))


class Collector:
    """Adds batches to the sums of all jobs."""

    def __init__(
        self,
        jobs: list[Job],
        num_classes: int | None,
        num_filters: int | None,
        test: LabelPermutation | None = None,
        record_all: bool = False,
    ) -> None:
        self.jobs = jobs
        self.test = test
        self.foreign = test.foreign_targets if test is not None else 0
        self.generator = torch.Generator().manual_seed((test.seed if test else 0) + 7919 * rank())
        for job in jobs:
            if record_all or (test is not None and not job.counts_votes):
                job.record = EvidenceRecord()
        self.num_classes = num_classes
        self.num_filters = num_filters
        groups: dict[tuple[int, bool], list[Job]] = {}
        for job in jobs:
            if job.shares_forward:
                at_input = bool(job.kwargs.get("attribute_to_layer_input", False))
                key = (id(job.model or job.method.forward_func), at_input)
                groups.setdefault(key, []).append(job)
        self.groups = [
            (SharedForward(group[0].method.forward_func, [j.method for j in group], key[1]), group)
            for key, group in groups.items()
        ]

    def add(self, number: int, inputs: tuple[Tensor, ...], raw_labels: Any) -> None:
        """Add one batch."""
        if len(inputs[0]) == 0:
            return
        if self.num_classes is None:
            self.num_classes = self._outputs(inputs)
        labels = class_labels(raw_labels, len(inputs[0]), self.num_classes, number)
        others = [
            foreign_labels(labels, self.num_classes, self.generator) for _ in range(self.foreign)
        ]
        for shared, group in self.groups:
            asked = others if any(job.depends_on_target for job in group) else []
            scores, *foreign = shared.scores_for(inputs, [labels, *asked])
            for position, job in enumerate(group):
                self._check(shared.means(job.method), job, labels, number, "activations")
                job.feed = shared.feed(job.method)
                self._update(job, scores[position], labels, number)
                for targets, values in zip(asked, foreign, strict=True):
                    self._update_foreign(job, values[position], targets, number)
        for job in self.jobs:
            if not job.shares_forward:
                self._update(job, job.attribute(inputs, labels), labels, number)
                for targets in others if job.depends_on_target else []:
                    self._update_foreign(job, job.attribute(inputs, targets), targets, number)

    def _outputs(self, inputs: tuple[Tensor, ...]) -> int:
        """C, from the model's output on a batch."""
        with torch.no_grad():
            output = self.jobs[0].method.forward_func(*(one[:1] for one in inputs))
        if not isinstance(output, Tensor) or output.dim() != 2:
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"The model puts out {shape}, not logits (N, C); pass num_classes.")
        return int(output.shape[1])

    def _update(self, job: Job, values: Tensor, labels: Tensor, number: int) -> None:
        if job.sums is None:
            assert self.num_classes is not None
            if self.num_filters is not None and self.num_filters > values.shape[1]:
                raise ValueError(
                    f"num_filters={self.num_filters} is larger than the {values.shape[1]} filters "
                    f"of the layer {job.layer_name!r}."
                )
            job.sums = ClassFilterSums(
                self.num_classes, values.shape[1], integer=job.counts_votes
            ).to(values.device if values.device.type == "cuda" else "cpu")
        if not job.counts_votes:
            self._check(values, job, labels, number, "scores")
        job.sums.update(values, labels)
        if job.record is not None:
            job.record.add(values, labels)

    def _update_foreign(self, job: Job, values: Tensor, targets: Tensor, number: int) -> None:
        if job.record is not None and job.depends_on_target:
            self._check(values, job, targets, number, "scores")
            job.record.add_foreign(values, targets)

    @staticmethod
    def _check(values: Tensor, job: Job, labels: Tensor, number: int, what: str) -> None:
        finite = torch.isfinite(values).all(1)
        if bool(finite.all()):
            return
        image = int((~finite).nonzero()[0, 0])
        raise ValueError(
            f"NaN or Inf among the {what} of the layer {job.layer_name!r}: class "
            f"{int(labels[image])}, batch {number}, image {image} of the batch."
        )

    def tables(
        self, class_names: Sequence[str] | None, names_given: bool, mass: float | None
    ) -> list[ClassFilters]:
        """The table of each job, over all ranks."""
        sizes = gather(
            [None if job.sums is None else tuple(job.sums.total.shape) for job in self.jobs]
        )
        feeds = gather([job.feed for job in self.jobs])
        tables = []
        for position, job in enumerate(self.jobs):
            shape = next((size[position] for size in sizes if size[position] is not None), None)
            if shape is None:
                raise ValueError("The data loader is empty: there is no image to learn from.")
            if job.sums is None:  # this rank's share was empty
                job.sums = ClassFilterSums(shape[0], shape[1], integer=job.counts_votes)
            job.feed = next((feed[position] for feed in feeds if feed[position]), None)
            if job.record is not None:
                job.record.merge(gather(job.record))
            names = class_names
            if not names_given and class_names is not None and len(class_names) != shape[0]:
                names = None
            tables.append(self._table(job, names, mass))
        return tables

    def _table(self, job: Job, names: Sequence[str] | None, mass: float | None) -> ClassFilters:
        assert job.sums is not None
        sums = job.sums.compute()
        options = {k: v for k, v in job.kwargs.items() if isinstance(v, (int, float, str, bool))}
        p_values = self._p_values(job, sums)
        test = {} if self.test is None else {"significance": self.test.record()}
        table = ClassFilters(
            scores=sums["mean"],
            counts=sums["count"],
            standard_errors=sums["standard_error"],
            class_names=names,
            layer=job.table_layer,
            method=job.name,
            provenance=provenance(
                job.model,
                options={**getattr(job.method, "options", {}), **options},
                feeds_head=job.feed,
                num_images=int(sums["count"].sum()),
                **test,
            ),
            p_values=p_values,
            q_values=None
            if p_values is None or self.test is None
            else false_discovery_adjusted(p_values, self.test.correction),
        )
        if mass is not None:
            return table.select(mass=mass)
        number = self.num_filters
        if number is None:
            number = min(getattr(job.method, "top_k", _DEFAULT_FILTERS), table.num_filters)
            logger.info("%s at %s: %d filters selected per class", job.name, job.layer_name, number)
        return table.select(num_filters=number)

    def _p_values(self, job: Job, sums: dict[str, Tensor]) -> Tensor | None:
        if self.test is None:
            return None
        if job.counts_votes:
            return vote_p_values(sums["total"], sums["count"])
        assert job.record is not None
        evidence, labels, foreign, targets = job.record.tensors()
        cells = int((sums["count"] > 0).sum()) * evidence.shape[1]
        logger.info(
            "%s at %s: the smallest p-value of %d permutations is %.1e; at a false discovery rate "
            "of 0.05 at least %d of %d cells must have it before one of them is a discovery",
            job.name,
            job.layer_name,
            self.test.permutations,
            1 / (1 + self.test.permutations),
            -(-20 * cells // (1 + self.test.permutations)),
            cells,
        )
        return permutation_p_values(
            evidence,
            labels,
            num_classes=len(sums["count"]),
            foreign=foreign,
            foreign_targets=targets,
            permutations=self.test.permutations,
            seed=self.test.seed,
        )


def jobs_of(
    methods: Any,
    attribute_kwargs: Mapping[str, Any] | None,
    at_input: bool,
    reduction: Reduction,
) -> list[Job]:
    several = isinstance(methods, (Mapping, Sequence))
    items = (
        methods.items()
        if isinstance(methods, Mapping)
        else enumerate(methods if several else [methods])
    )
    kwargs_of: dict[Any, Any] = (
        dict(attribute_kwargs or {}) if several else {0: dict(attribute_kwargs or {})}
    )
    jobs = []
    for key, method in items:
        if not isinstance(method, LayerAttribution):
            raise ValueError(
                f"A {type(method).__name__} is not a Captum LayerAttribution object; pass a method "
                "bound to a model and a layer, LayerFilterFrequency(model, layer) say."
            )
        kwargs = dict(kwargs_of.pop(key, {}))
        if at_input:
            kwargs["attribute_to_layer_input"] = True
        layers = method.layer if isinstance(method.layer, (list, tuple)) else [method.layer]
        for layer in layers:
            single = copy.copy(method)
            single.layer = layer
            jobs.append(Job(key, single, kwargs, reduction))
    if kwargs_of:
        raise ValueError(f"attribute_kwargs names no method: {', '.join(map(str, kwargs_of))}.")
    if not jobs:
        raise ValueError("methods is empty; pass at least one LayerAttribution.")
    return jobs


def like_methods(methods: Any, jobs: list[Job], tables: Sequence[Any]) -> Any:
    """Tables in the form in which the methods were given."""
    results: dict[Any, Any] = {}
    items = (
        methods.items()
        if isinstance(methods, Mapping)
        else enumerate(methods if isinstance(methods, Sequence) else [methods])
    )
    for key, method in items:
        own = [table for job, table in zip(jobs, tables, strict=True) if job.key == key]
        results[key] = own if isinstance(method.layer, (list, tuple)) else own[0]
    if isinstance(methods, Mapping):
        return results
    return list(results.values()) if isinstance(methods, Sequence) else results[0]


def device_of(jobs: list[Job]) -> torch.device | None:
    """Where the first model's parameters are; None without any."""
    if jobs[0].model is None:
        return None
    parameter = next(jobs[0].model.parameters(), None)
    return None if parameter is None else parameter.device
