"""Data set in, one table of class filters per method out: one streaming pass."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, overload

import torch
from captum.attr import LayerAttribution
from torch import Tensor

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.batches import dataset_names, read_batches
from captum_classfilters._core.distributed import Ranks, ranks_together
from captum_classfilters._core.files import AnyPath
from captum_classfilters._core.labels import check_num_classes
from captum_classfilters._core.names import listed_names
from captum_classfilters._core.progress import Progress
from captum_classfilters._core.provenance import Provenance
from captum_classfilters._core.types import (
    AttributeKwargs,
    ClassNames,
    Dataloader,
    JsonDict,
    LayerMethod,
    Unpack,
)
from captum_classfilters.class_filters import ClassFilters, check_class_names, check_selection
from captum_classfilters.identify.collector import Collector, Tally
from captum_classfilters.identify.evidence_sources import (
    Reduction,
    Source,
    like_methods,
    sources_of,
)
from captum_classfilters.identify.significance import (
    LabelPermutation,
    false_discovery_adjusted,
    permutation_p_values,
    vote_p_values,
)

logger = logging.getLogger("captum_classfilters")


@overload
def identify_class_filters(
    methods: LayerMethod,
    dataloader: Dataloader,
    *,
    num_classes: int | None = None,
    class_names: ClassNames | None = None,
    target: int | None = None,
    num_filters: int | None = None,
    mass: float | None = None,
    reduction: Reduction = "sum",
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
def identify_class_filters(
    methods: Sequence[LayerAttribution],
    dataloader: Dataloader,
    *,
    num_classes: int | None = None,
    class_names: ClassNames | None = None,
    target: int | None = None,
    num_filters: int | None = None,
    mass: float | None = None,
    reduction: Reduction = "sum",
    attribute_kwargs: AttributeKwargs | None = None,
    attribute_to_layer_input: bool = False,
    significance: bool | LabelPermutation = False,
    state_path: AnyPath | None = None,
    save_every: float | None = None,
    unpack: Unpack | None = None,
    device: torch.device | str | None = None,
    show_progress: bool = True,
) -> list[ClassFilters]: ...


@overload
def identify_class_filters(
    methods: Mapping[str, LayerAttribution],
    dataloader: Dataloader,
    *,
    num_classes: int | None = None,
    class_names: ClassNames | None = None,
    target: int | None = None,
    num_filters: int | None = None,
    mass: float | None = None,
    reduction: Reduction = "sum",
    attribute_kwargs: AttributeKwargs | None = None,
    attribute_to_layer_input: bool = False,
    significance: bool | LabelPermutation = False,
    state_path: AnyPath | None = None,
    save_every: float | None = None,
    unpack: Unpack | None = None,
    device: torch.device | str | None = None,
    show_progress: bool = True,
) -> dict[str, ClassFilters]: ...


@arguments_checked
def identify_class_filters(
    methods: LayerMethod | Sequence[LayerAttribution] | Mapping[str, LayerAttribution],
    dataloader: Dataloader,
    *,
    num_classes: int | None = None,
    class_names: ClassNames | None = None,
    target: int | None = None,
    num_filters: int | None = None,
    mass: float | None = None,
    reduction: Reduction = "sum",
    attribute_kwargs: AttributeKwargs | None = None,
    attribute_to_layer_input: bool = False,
    significance: bool | LabelPermutation = False,
    state_path: AnyPath | None = None,
    save_every: float | None = None,
    unpack: Unpack | None = None,
    device: torch.device | str | None = None,
    show_progress: bool = True,
) -> ClassFilters | list[ClassFilters] | dict[str, ClassFilters]:
    r"""
    Find each class's filters on a data set, with any number of methods and layers at once.

    The data are read once. All methods of this package on the same model share one forward pass for
    each batch; any other Captum ``LayerAttribution`` is asked for its attributions with the labels
    as targets, and these are reduced to one score per filter. Only per-class sums are kept, O(C K)
    for each method and layer. The model runs in evaluation mode and is left exactly as found.

    Under ``torchrun`` every rank reads its own share, of any size, and all ranks get the table of
    the whole: bitwise the one-process table for counts, to rounding for sums. Images that a
    ``DistributedSampler`` repeats to give all ranks as many are not counted twice. If a rank fails, or
    measures something else than the others, all of them raise the same error.

    An exception on the way, Ctrl-C included, carries the result for the images so far as its attribute
    ``partial``.

    Args:

        methods (LayerAttribution, or a sequence or mapping of them): What to measure, and where.
        dataloader (iterable): Batches of (inputs, labels), or mappings with ``labels`` and one
                    tensor of images; ``inputs`` a Tensor with N images first or a tuple of them,
                    ``labels`` N class indices, or multi-hot rows (N, C): then an image counts for
                    each of its classes.
        num_classes (int, optional): C. By default the number of the model's outputs.
        class_names (sequence of str, optional): C names. By default those of
                    ``dataloader.dataset.classes`` where there are C of them.
        target (int, optional): Explain this output for all images. The labels are then groups to be
                    compared, of any kind (site, artifact, background), and ``class_names`` or
                    ``num_classes`` says how many there are. By default each image's own class.
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
        state_path (path, optional): Keep the state of the pass in this file, so that a run that was
                    killed goes on when it is started again with the same arguments: the batches
                    counted so far are read, compared and not run, and the table is that of a run
                    that was not killed, bit for bit. The loader must not shuffle. The file is
                    removed when the table is there. Each rank has a file of its own.
                    Default: None
        save_every (float, optional): Seconds from save to save. By default a minute, and more where
                    saving would take more than a hundredth of the time.
        unpack (Callable, optional): From a batch of any other kind to the pair (inputs, labels).
                    Default: None
        device (torch.device or str, optional): Where the batches go; by default where the model is.
        show_progress (bool): Show a progress bar.
                    Default: True

    Returns:
        *ClassFilters* for one method, a *list* for a sequence, a *dict* for a mapping. A method
        over a list of layers gives a list of tables.

    Raises:
        ValueError: A layer is unknown, not reached exactly once (Captum's methods would read the last
                    run alone), has no channel dimension, other rows than images, or no gradient
                    where a method needs one; labels are not class indices; the loader is empty;
                    activations are NaN or infinite (the class and the batch are named);
                    ``num_filters`` exceeds K; ``state_path`` cannot be written, or holds the state
                    of another model, method, option or data set.

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
    class_names = listed_names(class_names)
    with ranks_together() as ranks:
        num_filters = check_selection(num_filters, mass)
        check_class_names(class_names, num_classes)
        options: JsonDict = {
            "num_classes": num_classes,
            "class_names": class_names if class_names is not None else dataset_names(dataloader),
            "target": target,
            "num_filters": num_filters,
            "mass": mass,
        }
        num_classes = number_of_groups(target, class_names, num_classes)
        test = _permutation_test(significance)
        options["significance"] = None if test is None else test.record()
        sources = sources_of(methods, attribute_kwargs, attribute_to_layer_input, reduction)
        collector = Collector(sources, num_classes, num_filters, test, target=target)
        record = Provenance([source.model for source in sources])

        def result(whole: bool = True) -> Any:
            names = class_names if class_names is not None else _fitting(dataloader, collector)
            tables = [
                _selected(
                    _table(tally, names, test, record, target, whole), tally, num_filters, mass
                )
                for tally in collector.tallies
            ]
            return like_methods(methods, sources, tables)

        progress = Progress(
            collector,
            lambda: {"the call": "identify_class_filters", **facts_of(sources, record), **options},
            lambda: result(whole=False) if collector.has_images else None,
            state_path,
            save_every,
        )
        collect(collector, dataloader, class_names, unpack, device, show_progress, progress, ranks)
    tables = result()
    progress.finished()
    return tables


def _selected(
    table: ClassFilters, tally: Tally, num_filters: int | None, mass: float | None
) -> ClassFilters:
    """A table with its filters selected."""
    if mass is not None:
        return table.select(mass=mass)
    number = num_filters or min(tally.source.default_num_filters, table.num_filters)
    if num_filters is None:
        logger.info("%s at %s: %d filters selected per class", table.method, table.layer, number)
    return table.select(num_filters=number)


def facts_of(sources: Sequence[Source], record: Provenance) -> JsonDict:
    """What sums depend on: the models, the layers, and the methods with all their options."""
    facts: JsonDict = {}
    for place, source in enumerate(sources):
        origin = record.of(source.model)
        own = {
            "the method": source.name,
            "the layer": source.table_layer,
            "the model": f"{origin['model']} {origin['model_sha256']}",
            "the method's options": source.facts,
        }
        facts |= {_of(name, place, sources): value for name, value in own.items()}
    return facts


def _of(name: str, place: int, sources: Sequence[Source]) -> str:
    """What a fact is called, if there are several methods."""
    return name if len(sources) == 1 else f"{name} (of method {place})"


def number_of_groups(
    target: int | None, class_names: Sequence[str] | None, num_classes: int | None
) -> int | None:
    """How many rows a table has, as far as it is said; with a target, labels are groups."""
    check_num_classes(num_classes, target)
    if target is None or num_classes is not None:
        return num_classes
    if class_names is None:
        raise ValueError(
            f"With target={target} the labels are groups, not the model's outputs: pass class_names "
            "or num_classes, so that it is known how many there are."
        )
    return len(class_names)


def collect(
    collector: Collector,
    dataloader: Dataloader,
    class_names: ClassNames | None,
    unpack: Unpack | None,
    device: torch.device | str | None,
    show_progress: bool,
    progress: Progress,
    ranks: Ranks,
) -> None:
    """Read all batches into a collector, and take in what other ranks read."""
    with read_batches(
        [tally.source.model for tally in collector.tallies],
        dataloader,
        "class filters",
        device=device,
        unpack=unpack,
        summed=True,
        show_progress=show_progress,
        progress=progress,
        ranks=ranks,
    ) as batches:
        batches.kept_back = collector.look_at_blocks
        for batch in batches:
            collector.add(batches, batch)
            if batch.first_image == 0:
                check_class_names(class_names, collector.num_classes)
        collector.finish(batches)
        ranks.agree(progress.facts, collector.shapes())
    collector.merge()


def _permutation_test(significance: bool | LabelPermutation) -> LabelPermutation | None:
    if isinstance(significance, LabelPermutation):
        return significance
    if not isinstance(significance, bool):
        raise ValueError(
            f"significance={significance!r}; expected True, False or a LabelPermutation."
        )
    return LabelPermutation() if significance else None


def _fitting(dataloader: Dataloader, collector: Collector) -> Sequence[str] | None:
    """The data set's class names, if there is one for each class."""
    names = dataset_names(dataloader)
    sums = collector.tallies[0].sums
    assert sums is not None
    return names if names is not None and len(names) == sums.num_classes else None


def _table(
    tally: Tally,
    names: Sequence[str] | None,
    test: LabelPermutation | None,
    record: Provenance,
    target: int | None,
    whole: bool,
) -> ClassFilters:
    """The table of one source; if not of the whole, then of what this process has counted."""
    assert tally.sums is not None
    source, test = tally.source, test if whole else None
    sums = tally.sums.tables() if whole else tally.sums.of_this_process()
    p_values = None if test is None else _p_values(tally, sums, test)
    details: JsonDict = {"signed": source.depends_on_target}
    if not whole:
        details["partial"] = True
    if target is not None:
        details["target"] = target
    if tally.exact is not None:
        details["exact"] = tally.exact
    if tally.missing is not None:
        details["missing"] = tally.missing
    if test is not None:
        details["significance"] = test.record()
    return ClassFilters(
        scores=sums["mean"],
        counts=sums["count"],
        standard_errors=sums["standard_error"],
        class_names=names,
        layer=source.table_layer,
        method=source.name,
        provenance=record.of(
            source.model,
            options=source.options,
            feeds_head=tally.feed,
            num_images=int(sums["count"].sum()),
            **details,
        ),
        p_values=p_values,
        q_values=None
        if p_values is None or test is None
        else false_discovery_adjusted(p_values, test.correction),
    )


def _p_values(tally: Tally, sums: dict[str, Tensor], test: LabelPermutation) -> Tensor:
    if tally.source.counts_votes:
        return vote_p_values(sums["total"].cpu(), sums["count"].cpu())
    assert tally.record is not None
    evidence, labels, foreign, targets = tally.record.sorted_tensors()
    cells = int((sums["count"] > 0).sum()) * evidence.shape[1]
    logger.info(
        "%s at %s: the smallest p-value of %d permutations is %.1e; at a false discovery rate "
        "of 0.05 at least %d of %d cells must have it before one of them is a discovery",
        tally.source.name,
        tally.source.layer_name,
        test.permutations,
        1 / (1 + test.permutations),
        -(-20 * cells // (1 + test.permutations)),
        cells,
    )
    return permutation_p_values(
        evidence,
        labels,
        num_classes=len(sums["count"]),
        foreign=foreign,
        foreign_targets=targets,
        permutations=test.permutations,
        seed=test.seed,
    )
