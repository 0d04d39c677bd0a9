"""Evidence of batches, added up for any number of methods and layers."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from captum_classfilters._core.batches import (
    BATCHES_AHEAD,
    BYTES_AHEAD,
    Batch,
    Batches,
    num_bytes,
)
from captum_classfilters._core.devices import sums_device
from captum_classfilters._core.distributed import gather
from captum_classfilters._core.forward import (
    BatchReading,
    Glimpse,
    LayerRequest,
    MapsNeededError,
    SharedForward,
)
from captum_classfilters._core.image_keys import image_keys
from captum_classfilters._core.labels import Memberships
from captum_classfilters._core.outputs import scores_per_class
from captum_classfilters._core.progress import Count
from captum_classfilters._core.replay.checks import Confirmed, confirmed
from captum_classfilters._core.types import JsonDict
from captum_classfilters.identify.evidence_sources import Source
from captum_classfilters.identify.new_sums import new_sums
from captum_classfilters.identify.significance import (
    EvidenceRecord,
    LabelPermutation,
    foreign_labels,
)

if TYPE_CHECKING:
    from captum_classfilters.identify.statistics import ClassFilterSums


@dataclass
class Tally:
    """What is kept of one source."""

    source: Source
    sums: "ClassFilterSums | None" = None
    record: EvidenceRecord | None = None
    feed: dict[str, str | bool] | None = None
    exact: bool | None = None
    missing: float | None = None  # see Source.missing
    count: Count = field(default_factory=Count)  # of the images in `sums`

    @property
    def shape(self) -> tuple[int, int] | None:
        """Classes and filters; None before the first image."""
        return None if self.sums is None else (self.sums.num_classes, self.sums.num_filters)


@dataclass
class _Scores:
    """A source's scores for a batch: of the pairs (M, K), and of foreign targets (N, K)."""

    own: Tensor
    foreign: list[Tensor]
    finite: Tensor
    means: Tensor | None = None  # of the images' activations (N, K)


@dataclass
class _Targets:
    """Which image counts for which class, and what a permutation test wants to know besides."""

    pairs: Memberships
    foreign: list[Tensor] = field(default_factory=list)  # classes (N,) that are not the image's own
    keys: Tensor | None = None  # numbers (N,) that tell images apart


@dataclass
class _Group:
    """Tallies that share a forward pass; ``places`` is the layer of each among those read.

    Where means are enough, batches wait in ``block`` until several can be looked at together.
    """

    tallies: list[Tally]
    shared: SharedForward
    places: list[int]
    block: list[tuple[Batch, Glimpse]] = field(default_factory=list)

    @property
    def count(self) -> Count:
        """Of the images in all sums of the group."""
        return self.tallies[0].count

    @property
    def is_full(self) -> bool:
        """Whether the block is to be looked at."""
        kept = sum(num_bytes(batch.inputs) for batch, _ in self.block)
        return len(self.block) >= BATCHES_AHEAD or kept >= BYTES_AHEAD


class Collector:
    """Adds batches to the sums of all sources.

    Args:

        sources (sequence of Source): Methods, each at one layer.
        num_classes (int, optional): C; by default that of the model's outputs.
        num_filters (int, optional): How many filters will be selected, checked early.
        test (LabelPermutation, optional): What permutations need is recorded.
        record_all (bool): The evidence of every image is recorded.
        target (int, optional): The class that all evidence is for; labels are then groups.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        num_classes: int | None,
        num_filters: int | None = None,
        test: LabelPermutation | None = None,
        record_all: bool = False,
        target: int | None = None,
    ) -> None:
        self.num_classes, self.num_filters = num_classes, num_filters
        self.target, self.test = target, test
        # With one target for all, the evidence does not depend on the labels.
        self.foreign = test.foreign_targets if test is not None and target is None else 0
        self.tallies = [Tally(source) for source in sources]
        for tally in self.tallies:
            if record_all or (test is not None and not tally.source.counts_votes):
                tally.record = EvidenceRecord()
        self.groups = _groups([tally for tally in self.tallies if tally.source.shares_forward])
        for group in self.groups:
            for tally in group.tallies:
                tally.count = group.count

    def add(self, batches: Batches, batch: Batch) -> None:
        """Add one batch, to those sums that do not have it from an earlier run."""
        for group in self.groups:
            if batch.first_image < group.count.images:
                continue
            glimpse = None
            if group.shared.means_are_enough:
                glimpse = group.shared.glimpse(batch.inputs, batch.size)
            if glimpse is None:
                self._look_at_block(group, batches)
                self._look_closely(group, batches, batch)
                continue
            if group.block and not glimpse.fits(group.block[-1][1]):
                self._look_at_block(group, batches)
            group.block.append((batch, glimpse))
            if group.is_full:
                self._look_at_block(group, batches)
        for tally in self.tallies:
            if not tally.source.shares_forward and batch.first_image >= tally.count.images:
                self._add_attributed(tally, batches, batch)

    def look_at_blocks(self, batches: Batches) -> None:
        """Add the batches that wait for others."""
        for group in self.groups:
            self._look_at_block(group, batches)

    def finish(self, batches: Batches) -> None:
        """Look at what still waits, and at what contributions that are not exact miss."""
        batches.catch_up()
        inexact = [tally for tally in self.tallies if tally.source.sums_up and not tally.exact]
        if not inexact or batches.first is None or self.num_classes is None:
            return
        pairs = batches.first.memberships(self.num_classes)
        targets, places = pairs.rounds()[0]
        counted = torch.ones_like(targets, dtype=torch.bool) if places is None else places >= 0
        if self.target is not None:
            targets = torch.full_like(targets, self.target)
        for tally in inexact if bool(counted.any()) else ():
            tally.missing = tally.source.missing(batches.first.inputs, targets, counted)

    # -- rules, in one forward pass --------------------------------------------------------------

    def _look_closely(self, group: _Group, batches: Batches, batch: Batch) -> None:
        """Add one batch, run with all that the rules need."""
        try:
            with group.shared.run(batch.inputs, batch.size) as reading:
                wanted = self._targets(batches, [batch], reading.output)
                scores = self._ruled(group, reading, wanted)
        except MapsNeededError:
            group.shared.keep_maps()
            self._look_closely(group, batches, batch)
            return
        source = group.tallies[0].source
        _check_repeats(source, batches, batch, reading.output, reading.earlier)
        group.shared.see_order(batch.inputs, reading.output)
        self._settle_later(group, batches, [batch], scores, wanted, reading.holds)

    def _look_at_block(self, group: _Group, batches: Batches) -> None:
        """Add the batches that were glimpsed at."""
        block, group.block = group.block, []
        if not block:
            return
        own = [batch for batch, _ in block]
        reading = group.shared.together([glimpse for _, glimpse in block])
        wanted = self._targets(batches, own, None)
        try:
            scores = self._ruled(group, reading, wanted)
        except MapsNeededError:
            group.shared.keep_maps()
            for batch in own:
                self._look_closely(group, batches, batch)
            return
        self._settle_later(group, batches, own, scores, wanted, reading.holds)

    def _settle_later(
        self,
        group: _Group,
        batches: Batches,
        block: list[Batch],
        scores: list[_Scores],
        wanted: _Targets,
        holds: list[Tensor],
    ) -> None:
        """Update the sums once it is known that the scores are right and finite."""
        flags = [torch.stack(holds).all()] if holds else []
        flags += [part.finite for part in scores]

        def then(values: list[bool]) -> None:
            if holds and not values[0]:
                # What was seen to hold before does not hold here.
                group.shared.use_gradients()
                for batch in block:
                    self._look_closely(group, batches, batch)
                return
            finite = values[len(values) - len(scores) :]
            for place, tally in enumerate(group.tallies):
                if not finite[place]:
                    raise _not_finite(tally.source, scores[place], wanted.pairs, block)
                self._make_sums(tally, scores[place])
            with group.count.adding(block[0].first_image, sum(batch.size for batch in block)):
                for place, tally in enumerate(group.tallies):
                    self._update(tally, scores[place], wanted)
                    self._note(tally, group.shared, group.places[place])

        inputs = [part for batch in block for part in batch.inputs] if holds else []
        batches.later(flags, then, kept=inputs)

    def _ruled(self, group: _Group, reading: BatchReading, wanted: _Targets) -> list[_Scores]:
        """Scores by the rules of all tallies."""
        ruled = []
        for tally, place in zip(group.tallies, group.places, strict=True):
            source, (maps,) = tally.source, reading.layers[place]
            own = self._of_pairs(source, wanted.pairs, partial(source.scores, maps))
            others = [source.scores(maps, targets) for targets in _foreign(tally, wanted)]
            finite = _all_finite([maps.means, own, *others])
            ruled.append(_Scores(own, others, finite, maps.means))
        return ruled

    def _of_pairs(
        self, source: Source, pairs: Memberships, scores: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Scores (M, K) of pairs of image and class; several passes where an image has several."""
        if self.target is not None:
            targets = torch.full((pairs.num_images,), self.target, device=pairs.classes.device)
            return pairs.of_images(scores(targets))
        if pairs.images is None or not source.depends_on_target:
            return pairs.of_images(scores(pairs.rounds()[0][0]))
        result: Tensor | None = None
        for targets, rows in pairs.rounds():
            values = scores(targets)
            if result is None:
                result = values.new_zeros(len(pairs.classes), values.shape[1])
            assert rows is not None
            chosen = rows >= 0
            result[rows[chosen]] = values[chosen]
        assert result is not None
        return result

    @staticmethod
    def _note(tally: Tally, shared: SharedForward, place: int) -> None:
        """How the layer feeds the head, and whether derivatives were the head's weights."""
        feed = shared.feed(place)
        if feed is not None and shared.head_name is not None:
            tally.feed = {"name": shared.head_name, "by": feed}
            if not shared.in_order:
                tally.feed["in_order"] = False
        rule = tally.source.rule
        if rule is not None and rule.needs_derivative:
            tally.exact = shared.exact(place)

    # -- everybody else ----------------------------------------------------------------------------

    def _add_attributed(self, tally: Tally, batches: Batches, batch: Batch) -> None:
        source = tally.source
        output = None
        if tally.sums is None and batch.first_image == 0:
            output = self._first_output(tally, batch)
            _check_repeats(source, batches, batch, output)
            source.adapt_to(output)
        wanted = self._targets(batches, [batch], output)
        own = self._of_pairs(source, wanted.pairs, lambda t: source.attributed(batch.inputs, t))
        others = [source.attributed(batch.inputs, t) for t in _foreign(tally, wanted)]
        scores = _Scores(own, others, _all_finite([own, *others]))

        def then(values: list[bool]) -> None:
            if not values[0]:
                raise _not_finite(source, scores, wanted.pairs, [batch])
            self._make_sums(tally, scores)
            with tally.count.adding(batch.first_image, batch.size):
                self._update(tally, scores, wanted)

        batches.later([scores.finite], then)

    def _first_output(self, tally: Tally, batch: Batch) -> object:
        """What the model returns for the first batch, and in passing how the layer feeds the head."""
        source = tally.source
        layer, channel_dim = source.method.layer, getattr(source.method, "channel_dim", None)
        function = source.method.forward_func
        # A layer whose filters cannot be told, or that runs several times, is the method's to judge.
        with suppress(ValueError, AssertionError):
            if isinstance(layer, nn.Module):
                shared = SharedForward(
                    function, [LayerRequest(layer, channel_dim)], source.at_input
                )
                with shared.run(batch.inputs, batch.size) as reading:
                    pass
                shared.see_order(batch.inputs, reading.output)
                self._note(tally, shared, 0)
                return reading.output
        with torch.no_grad():
            return function(*batch.inputs)

    # -- both ----------------------------------------------------------------------------------------

    def _targets(self, batches: Batches, block: list[Batch], output: object) -> _Targets:
        """Which image counts for which class, and the foreign targets of a permutation test."""
        if self.num_classes is None:
            self.num_classes = scores_per_class(output).shape[1]
        pairs = batches.memberships(block, self.num_classes)
        if self.test is None or all(tally.record is None for tally in self.tallies):
            return _Targets(pairs)
        keys = torch.cat([image_keys(batch.inputs) for batch in block])
        if not self.foreign:
            return _Targets(pairs, [], pairs.of_images(keys))
        if pairs.images is not None:
            raise ValueError(
                f"The labels of batch {block[0].number} are multi-hot; significance permutes labels of "
                "one class for each image. Leave significance=False, or pass class indices."
            )
        drawn = foreign_labels(pairs.classes, self.num_classes, keys, self.test.seed, self.foreign)
        return _Targets(pairs, drawn, keys)

    def _make_sums(self, tally: Tally, scores: _Scores) -> None:
        """Sums to add scores to, where the scores are."""
        device = sums_device(scores.own.device)
        if tally.sums is None:
            assert self.num_classes is not None
            width = scores.own.shape[1]
            if self.num_filters is not None and self.num_filters > width:
                raise ValueError(
                    f"num_filters={self.num_filters} is larger than the {width} filters of the "
                    f"layer {tally.source.layer_name!r}."
                )
            tally.sums = new_sums(self.num_classes, width, integer=tally.source.counts_votes)
        if tally.sums.count.device != device:
            tally.sums.to(device)

    @staticmethod
    def _update(tally: Tally, scores: _Scores, wanted: _Targets) -> None:
        """Add scores to the sums."""
        assert tally.sums is not None
        pairs = wanted.pairs
        tally.sums.update(scores.own, pairs.classes)
        if tally.record is not None:
            tally.record.add(scores.own, pairs.classes, wanted.keys)
            for targets, values in zip(wanted.foreign, scores.foreign, strict=False):
                tally.record.add_foreign(values, targets, wanted.keys)

    @property
    def has_images(self) -> bool:
        """Whether there is a row of each source."""
        return all(tally.sums is not None for tally in self.tallies)

    def shapes(self) -> dict[str, int]:
        """The numbers of classes and of filters, as far as this process has seen them."""
        if not self.has_images:
            return {}
        shapes = [tally.shape or (0, 0) for tally in self.tallies]
        layers = [f" of {tally.source.layer_name!r}" for tally in self.tallies]
        return {
            "the number of classes": shapes[0][0],
            **{
                f"the number of filters{layer}": shape[1]
                for layer, shape in zip(layers, shapes, strict=True)
            },
        }

    # -- what an earlier run has counted --------------------------------------------------------------

    def counts(self) -> list[Count]:
        """How far the sums are, those of each forward pass."""
        return [tally.count for tally in self.tallies]

    def state(self) -> tuple[dict[str, Tensor], JsonDict]:
        """All sums, and what batches have shown of the model."""
        tensors: dict[str, Tensor] = {}
        notes = []
        for place, tally in enumerate(self.tallies):
            if tally.sums is not None:
                tensors |= {f"{place}/{n}": value for n, value in tally.sums.state().items()}
            if tally.record is not None:
                tensors |= {f"{place}/{n}": value for n, value in tally.record.state().items()}
            notes.append(
                {
                    "shape": tally.shape,
                    "images": tally.count.images,
                    "feed": tally.feed,
                    "exact": tally.exact,
                    "replays": _replays(tally.source).noted(),
                }
            )
        learned = [group.shared.learned() for group in self.groups]
        return tensors, {"num_classes": self.num_classes, "tallies": notes, "learned": learned}

    def restore(self, tensors: Mapping[str, Tensor], notes: JsonDict) -> None:
        """Go on from the sums of an earlier run."""
        self.num_classes = notes["num_classes"]
        for place, (tally, note) in enumerate(zip(self.tallies, notes["tallies"], strict=True)):
            start = f"{place}/"
            own = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
            if note["shape"] is not None:
                num_classes, num_filters = note["shape"]
                tally.sums = new_sums(num_classes, num_filters, tally.source.counts_votes)
                tally.sums.restore(own)
            if tally.record is not None:
                tally.record.restore(own)
            tally.feed, tally.exact = note["feed"], note["exact"]
            _replays(tally.source).recall(note["replays"])
            tally.count.restore(note["images"])
        for group, learned in zip(self.groups, notes["learned"], strict=True):
            group.shared.recall(learned)

    def merge(self) -> None:
        """Take in the tallies of all ranks."""
        shapes = gather([tally.shape for tally in self.tallies])
        notes = gather([(tally.feed, tally.exact, tally.missing) for tally in self.tallies])
        for place, tally in enumerate(self.tallies):
            shape = next((s[place] for s in shapes if s[place] is not None), None)
            if shape is None:
                raise ValueError("The data loader is empty: there is no image to learn from.")
            if tally.sums is None:  # this rank's share was empty
                tally.sums = new_sums(shape[0], shape[1], tally.source.counts_votes)
            feeds, exact, missing = zip(*(note[place] for note in notes), strict=True)
            # One rank that saw another order is enough.
            seen = sorted(
                (feed for feed in feeds if feed), key=lambda feed: feed.get("in_order", True)
            )
            tally.feed = next(iter(seen), None)
            tally.missing = next((share for share in missing if share is not None), None)
            known = [value for value in exact if value is not None]
            tally.exact = all(known) if known else None
            if tally.record is not None:
                tally.record.merge(gather(tally.record))


def _groups(tallies: Sequence[Tally]) -> list[_Group]:
    """Tallies by model and side of the layer, each layer read once."""
    by_model: dict[tuple[Any, bool], list[Tally]] = {}
    for tally in tallies:
        source = tally.source
        by_model.setdefault((source.method.forward_func, source.at_input), []).append(tally)
    groups = []
    for (_, at_input), members in by_model.items():
        needs: dict[tuple[int, int | None], LayerRequest] = {}
        keys = []
        for tally in members:
            rule = tally.source.rule
            assert rule is not None
            key = (id(rule.layer), rule.channel_dim)
            keys.append(key)
            derivative = rule.needs_derivative or (key in needs and needs[key].derivative)
            needs[key] = LayerRequest(rule.layer, rule.channel_dim, derivative)
        method = members[0].source.method
        shared = SharedForward(
            method.forward_func, list(needs.values()), at_input, device_ids=method.device_ids
        )
        order = list(needs)
        groups.append(_Group(members, shared, [order.index(key) for key in keys]))
    return groups


def _check_repeats(
    source: Source, batches: Batches, batch: Batch, output: object, earlier: object = None
) -> None:
    """See whether a source's model gives its scores for the first batch again."""
    function = source.method.forward_func
    batches.check_repeats(function, batch, output, earlier=earlier, owner=source.model)


def _replays(source: Source) -> Confirmed:
    """Which short cuts of replays were seen to hold, where the method takes any."""
    return confirmed(source.method.forward_func, source.method.layer, source.at_input)


def _foreign(tally: Tally, wanted: _Targets) -> list[Tensor]:
    """The foreign targets that a source is asked for."""
    return wanted.foreign if tally.source.depends_on_target and tally.record is not None else []


def _not_finite(
    source: Source, scores: _Scores, pairs: Memberships, block: Sequence[Batch]
) -> ValueError:
    """The error that names the first image whose activations or scores are not finite."""
    what, own = "scores", scores.own
    if scores.means is not None and not bool(scores.means.isfinite().all()):
        what, own = "activations", pairs.of_images(scores.means)
    wrong = (~own.isfinite().all(1)).nonzero()
    if not len(wrong):
        return ValueError(
            f"NaN or Inf among the scores of the layer {source.layer_name!r} for other classes in "
            f"batch {block[0].number}."
        )
    pair = int(wrong[0, 0])
    image = pair if pairs.images is None else int(pairs.images[pair])
    for batch in block:
        if image < batch.size:
            break
        image -= batch.size
    return ValueError(
        f"NaN or Inf among the {what} of the layer {source.layer_name!r}: class "
        f"{int(pairs.classes[pair])}, batch {batch.number}, image {image} of the batch."
    )


def _all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Whether some tensors hold no NaN and no infinity: their sums would, too."""
    sums = [
        tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors
    ]
    return torch.stack(sums).isfinite().all()
