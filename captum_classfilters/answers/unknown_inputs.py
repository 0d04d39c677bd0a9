"""Unknown inputs: told by the class filters, with the filters that say so."""

from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.batches import Batch, read_batches
from captum_classfilters._core.layers import check_runs, find_layers
from captum_classfilters._core.names import kind_of
from captum_classfilters._core.score_reader import ScoreReader
from captum_classfilters._core.tables import Row, Table, Tabular, short_repr
from captum_classfilters._core.taps import tapping
from captum_classfilters._core.types import Dataloader, ExampleInputs, Keywords, Unpack
from captum_classfilters._core.units import Rows, UnitTap, aggregated
from captum_classfilters.class_filters import ClassFilters
from captum_classfilters.heads.decompose import fit_to_head
from captum_classfilters.heads.linear_head import check_scores_follow, run_head
from captum_classfilters.metrics.selectivity import class_means

#: What the score is made of.
Score = Literal["combined", "energy", "dice", "react", "line", "likeness"]
#: The class whose activations filters get.
Toward = Literal["predicted", "nearest"]

# The parts of "combined" and their weights: energy counts as much as the other two.
_PARTS = {"energy": 1.0, "clipped dice": 0.5, "likeness": 0.5}
_RARE = 0.95  # the quantile of known images from which an earlier layer counts
_MOST = 3.0  # standard deviations that it may count


@short_repr
@dataclass(frozen=True)
class UnknownReasons(Tabular):
    r"""
    Which filters make images unknown: those that, put back to what a class has of them, lower the
    score most. Prints as a table.

    Args:

        scores (Tensor): Shape (N,). Scores of the images, higher is more unknown.
        predicted (Tensor): Shape (N,), int64. The classes that the model predicts.
        toward (Tensor): Shape (N,), int64. The classes whose activations filters get.
        filters (Tensor): Shape (N, k), int64. The filters, the first named first.
        activations (Tensor): Shape (N, k). What the images have of them.
        expected (Tensor): Shape (N, k). What images of the class ``toward`` have in the mean.
        scores_after (Tensor): Shape (N, k). The score once the filter and those before it are put
                    back.
        threshold (float): The score above which an image is called unknown.
        class_names (tuple of str): The classes.
    """

    scores: Tensor
    predicted: Tensor
    toward: Tensor
    filters: Tensor
    activations: Tensor
    expected: Tensor
    scores_after: Tensor
    threshold: float
    class_names: tuple[str, ...]

    @property
    def unknown(self) -> Tensor:
        """Which images are called unknown, (N,)."""
        return self.scores > self.threshold

    @property
    def flipped(self) -> Tensor:
        """Which unknown images would be called known with the named filters put back, (N,)."""
        return self.unknown & (self.scores_after[:, -1] <= self.threshold)

    def _tables(self) -> list[Table]:
        rows: list[Row] = [
            {
                "image": image,
                "predicted": self.class_names[int(self.predicted[image])],
                "toward": self.class_names[int(self.toward[image])],
                "score": self.scores[image],
                "filter": self.filters[image, place],
                "activation": self.activations[image, place],
                "expected": self.expected[image, place],
                "score after": self.scores_after[image, place],
            }
            for image, place in np.ndindex(*self.filters.shape)
        ]
        unknown, flipped = int(self.unknown.sum()), int(self.flipped.sum())
        title = (
            f"{unknown:,} of {len(self.scores):,} images are unknown (score above "
            f"{self.threshold:.3f}), {flipped:,} of them known without the filters named"
        )
        return [Table(rows, title=title, bars=())]


@dataclass(frozen=True)
class _Known:
    """What known images are like: statistics of the images fitted to."""

    clip: float
    class_means: Tensor  # (C, F)
    class_roots: Tensor  # (C, F)
    location: dict[str, float]
    scale: dict[str, float]
    earlier_means: Tensor | None = None  # (C, K)
    earlier_scale: Tensor | None = None  # (K,)
    threshold: float = 0.0


@dataclass(frozen=True)
class _Seen:
    """What one pass saw of its images."""

    features: Tensor  # (N, F)
    predicted: Tensor  # (N,)
    labels: Tensor  # (N,)
    earlier: Tensor | None  # (N, K)


class ClassFilterOOD:
    r"""
    Tell inputs of no known class by one table of class filters, and say which filters tell.

    The score is higher for what is more unknown. With features *z* at the head, its weight *W* and
    bias *b*, and the filters :math:`S_c` that the table selects for class *c*, it is one of

    - ``"energy"``: :math:`-\log \sum_c \exp(W_c z + b_c)` (Liu et al., NeurIPS 2020,
      https://arxiv.org/abs/2010.03759);
    - ``"dice"``: the energy of the decomposed head, in which class *c* has the weights of
      :math:`S_c` alone. This is DICE (Sun and Li, ECCV 2022, https://arxiv.org/abs/2111.09805) with
      the table's selection; with the selection of the paper it is the same number;
    - ``"react"``: the energy of features clipped at a percentile of those of known images (ReAct; Sun
      et al., NeurIPS 2021, https://arxiv.org/abs/2111.12797);
    - ``"line"``: the energy of the decomposed head for clipped features of which only those of the
      class predicted are kept, after LINe (Ahn et al., CVPR 2023, https://arxiv.org/abs/2303.13995),
      whose important neurons are here the table's filters (Shapley values of a linear head are
      contributions);
    - ``"likeness"``: minus the cosine between the square roots of an image's features and their
      mean over images of the class predicted;
    - ``"combined"``: the energy, half the energy of the decomposed head for clipped features, and
      half the likeness, each in standard deviations from its mean over known images. ``earlier``
      adds a layer further down.

    It fits the protocol of pytorch-ood's detectors: ``fit(loader)``, then ``predict(images)``.

    Args:

        model (nn.Module): The model; it ends in a linear head, one output for each class.
        class_filters (ClassFilters): A table with a selection, one filter for each feature of the
                    head.
        score (str): One of the above.
                    Default: "combined"
        percentile (float): Features are clipped at this quantile of all features of known images.
                    Default: 0.95
        earlier (nn.Module or str, optional): A layer whose filters' means count, too, in
                    ``"combined"``: how far they are from the class predicted, in standard
                    deviations, squared, averaged over filters, as far as it is above what 95 % of
                    known images have, and at most three standard deviations of it.
                    Default: None
        known_rate (float): Share of the fitted images that :attr:`threshold` calls known.
                    Default: 0.95
        head (nn.Module or str, optional): The head, or its dotted name. By default the one
                    that the table feeds.
                    Default: None

    Raises:
        ValueError: There is no such score, a share is out of range, or the table does not fit the
                    head.

    Examples::

        >>> import torch
        >>> from captum_classfilters import LayerFilterContribution
        >>> from captum_classfilters.answers import ClassFilterOOD
        >>> from captum_classfilters.testing import planted_network
        >>> planted = planted_network()
        >>> data = planted.loader(100)
        >>> table = LayerFilterContribution(planted.model, "deep").identify(
        ...     data, num_filters=3, show_progress=False)
        >>> detector = ClassFilterOOD(planted.model, table).fit(data, show_progress=False)
        >>> images = next(iter(data))[0]
        >>> noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
        >>> bool(detector(noise).median() > detector(images).median())
        True
    """

    #: As pytorch-ood's detectors have it.
    requires_fit = True

    @arguments_checked
    def __init__(
        self,
        model: nn.Module,
        class_filters: ClassFilters,
        *,
        score: Score = "combined",
        percentile: float = 0.95,
        earlier: nn.Module | str | None = None,
        known_rate: float = 0.95,
        head: nn.Module | str | None = None,
    ) -> None:
        if score not in get_args(Score):
            raise ValueError(f"score={score!r}; choose one of {', '.join(get_args(Score))}.")
        for name, share in (("percentile", percentile), ("known_rate", known_rate)):
            if not 0 < share <= 1:
                raise ValueError(f"{name}={share} is no share; expected above 0 and at most 1.")
        if earlier is not None and score != "combined":
            raise ValueError(f"earlier has no part in the score {score!r}; choose 'combined'.")
        fit = fit_to_head(model, class_filters, head)
        linear = fit.head
        if len(linear.weight) != class_filters.num_classes or linear.convolution_dims:
            raise ValueError(
                f"The head {linear.name!r} is {kind_of(linear.module)} with "
                f"{len(linear.weight)} outputs for {class_filters.num_classes} classes; expected an "
                "nn.Linear with one output for each class."
            )
        if fit.features_per_filter != 1:
            raise ValueError(
                f"The head {linear.name!r} takes {fit.features_per_filter} features of each filter; "
                "find the filters at its own input: LayerFilterContribution(model, "
                f"{linear.name!r}).identify(data, attribute_to_layer_input=True)."
            )
        if not bool(class_filters.selected.any(1).all()):
            raise ValueError(
                "Some classes have no selected filters: select some, for example "
                f"class_filters.select(num_filters={min(10, class_filters.num_filters)}), of a table "
                "whose classes all have images."
            )
        self.model, self.class_filters, self.score = model, class_filters, score
        self.percentile, self.known_rate = percentile, known_rate
        self._head = linear
        bias = linear.weight.new_zeros(len(linear.weight)) if linear.bias is None else linear.bias
        self._weight, self._bias = linear.weight.cpu().float(), bias.cpu().float()
        self._mask = class_filters.selected
        self._earlier: UnitTap | None = None
        if earlier is not None:
            ((name, module),) = find_layers(model, earlier).items()
            self._earlier = UnitTap(model, module)
            self._earlier.reduce = _means
        self._known: _Known | None = None

    def __repr__(self) -> str:
        earlier = "" if self._earlier is None else f", earlier={self._earlier.name!r}"
        fitted = "fitted" if self._known else "not fitted"
        return (
            f"ClassFilterOOD({type(self.model).__name__}, layer={self.class_filters.layer!r}, "
            f"score={self.score!r}{earlier}, {fitted})"
        )

    # -- fitting ---------------------------------------------------------------------------------

    def fit(
        self,
        dataloader: Dataloader,
        *,
        device: torch.device | str | None = None,
        unpack: Unpack | None = None,
        show_progress: bool = True,
    ) -> "ClassFilterOOD":
        r"""
        See what known images are like, in one pass.

        Args:

            dataloader (iterable): Batches of (inputs, labels), images of the known classes: those
                        that the table was made of, for example.
            device (torch.device or str, optional): Where the inputs go; by default where the model
                        is.
                        Default: None
            unpack (Callable, optional): From a batch of another kind to the pair (inputs, labels).
                        Default: None
            show_progress (bool): Show a progress bar.
                        Default: True

        Returns:
            *ClassFilterOOD*: The detector itself.

        Raises:
            ValueError: A class has no image, labels are no class indices, or the head's inputs are
                        no features (N, F).
        """
        features, predicted, labels, earlier = Rows(), Rows(), Rows(), Rows()
        options: Keywords = {"device": device, "unpack": unpack, "show_progress": show_progress}
        with read_batches(self.model, dataloader, "known images", **options) as batches:
            reader = ScoreReader(self.model, batches)
            for batch in batches:
                if batch.first_image == 0:
                    check_scores_follow(self.model, self._head, batch.inputs)
                own = self._run(batch, reader)
                features.add(own.features)
                predicted.add(own.predicted)
                labels.add(batches.class_labels(batch, len(self._weight)))
                if own.earlier is not None:
                    earlier.add(own.earlier)
        seen = _Seen(
            torch.cat(features.pieces()),
            torch.cat(predicted.pieces()),
            torch.cat(labels.pieces()),
            torch.cat(earlier.pieces()) if self._earlier is not None else None,
        )
        self._known = self._statistics(seen)
        return self

    def _statistics(self, seen: _Seen) -> _Known:
        counts = torch.bincount(seen.labels, minlength=len(self._weight))
        if not bool((counts > 0).all()):
            missing = self.class_filters.class_names[int((counts == 0).nonzero()[0, 0])]
            raise ValueError(
                f"No image of the class {missing!r}; fit needs images of all classes of the table."
            )
        z = seen.features
        known = _Known(
            float(np.quantile(z.numpy(), self.percentile)),
            class_means(z, seen.labels, len(counts)).float(),
            class_means(_root(z), seen.labels, len(counts)).float(),
            {},
            {},
        )
        self._known = known
        predicted = seen.predicted
        for name in _PARTS if self.score == "combined" else ():
            part = self._part(name, z, predicted).double()
            known.location[name] = float(part.mean())
            known.scale[name] = max(float(part.std(correction=0)), 1e-12)
        if seen.earlier is not None:
            known = self._with_earlier(known, seen, counts)
            self._known = known
        scores = self._scores(z, predicted) + self._surprise(seen.earlier, predicted)
        threshold = float(np.quantile(scores.numpy(), self.known_rate, method="higher"))
        return replace(known, threshold=threshold)

    def _with_earlier(self, known: _Known, seen: _Seen, counts: Tensor) -> _Known:
        """The same with what an earlier layer has of known images."""
        assert seen.earlier is not None
        means = class_means(seen.earlier, seen.labels, len(counts)).float()
        spread = (seen.earlier - means[seen.labels]).pow(2).mean(0).sqrt()
        spread = spread.clamp(min=float(spread.mean().clamp(min=1e-12)) * 1e-2)
        far = _distance(seen.earlier, means[seen.predicted], spread).double()
        known.location["earlier"] = float(np.quantile(far.numpy(), _RARE))
        known.scale["earlier"] = max(float(far.std(correction=0)), 1e-12)
        return replace(known, earlier_means=means, earlier_scale=spread)

    # -- scores ----------------------------------------------------------------------------------

    def predict(self, inputs: ExampleInputs) -> Tensor:
        r"""
        How unknown inputs are.

        Args:

            inputs (Tensor or tuple): A batch of the model's inputs, N images first.

        Returns:
            *Tensor* of shape (N,), on the CPU: higher is more unknown.

        Raises:
            ValueError: The detector is not fitted (only ``"energy"`` and ``"dice"`` need no fit), or the
                        model returns NaN or Inf for an image.
        """
        seen = self._see(inputs)
        predicted = seen.predicted
        return self._scores(seen.features, predicted) + self._surprise(seen.earlier, predicted)

    def __call__(self, inputs: ExampleInputs) -> Tensor:
        """As :meth:`predict`.

        Args:

            inputs (Tensor or tuple): A batch.

        Returns:
            *Tensor* of shape (N,).
        """
        return self.predict(inputs)

    @property
    def threshold(self) -> float:
        """The score that ``known_rate`` of the fitted images do not exceed."""
        return self._fitted().threshold

    @arguments_checked
    def reasons(
        self,
        inputs: ExampleInputs,
        *,
        num_filters: int = 3,
        threshold: float | None = None,
        toward: Toward = "predicted",
    ) -> UnknownReasons:
        r"""
        Name the filters that make images unknown.

        One after the other, the filter is named that lowers the score most when the image gets a
        class's mean of it. What an ``earlier`` layer adds to the score stays.

        Args:

            inputs (Tensor or tuple): A batch of the model's inputs.
            num_filters (int): How many filters for each image.
                        Default: 3
            threshold (float, optional): The score above which an image is unknown, by default
                        :attr:`threshold`.
                        Default: None
            toward (str): Whose activations filters get: of the class ``"predicted"``; or of the
                        ``"nearest"``, for each image the class with which its score ends lowest,
                        at the price of trying all.
                        Default: "predicted"

        Returns:
            *UnknownReasons*: the ``filters`` (N, k), what images have of them, what is ``expected``,
            ``scores_after``, and which verdicts are ``flipped`` by them.

        Raises:
            ValueError: The detector is not fitted, or has fewer filters; ``toward`` is none of the above.

        Examples::

            >>> import torch
            >>> from captum_classfilters import LayerFilterContribution
            >>> from captum_classfilters.answers import ClassFilterOOD
            >>> from captum_classfilters.testing import planted_network
            >>> planted = planted_network()
            >>> data = planted.loader(100)
            >>> table = LayerFilterContribution(planted.model, "deep").identify(
            ...     data, num_filters=3, show_progress=False)
            >>> detector = ClassFilterOOD(planted.model, table).fit(data, show_progress=False)
            >>> detector.reasons(torch.zeros_like(next(iter(data))[0][:2])).filters.shape
            torch.Size([2, 3])
        """
        known, total = self._fitted(), self._weight.shape[1]
        if not 0 < num_filters <= total:
            raise ValueError(f"num_filters={num_filters}; expected 1 to {total}.")
        if toward not in get_args(Toward):
            raise ValueError(f"toward={toward!r}; choose one of {', '.join(get_args(Toward))}.")
        seen = self._see(inputs)
        predicted = seen.predicted
        rest = self._surprise(seen.earlier, predicted)
        classes = predicted[None]
        if toward == "nearest":
            classes = torch.arange(len(known.class_means))[:, None].expand(-1, len(predicted))
        found = [self._named(seen.features, each, num_filters) for each in classes]
        filters, after = (torch.stack(parts) for parts in zip(*found, strict=True))  # (T, N, k)
        best, image = after[:, :, -1].argmin(0), torch.arange(len(predicted))
        filters, after = filters[best, image], after[best, image]
        like = classes[best, image]
        return UnknownReasons(
            self._scores(seen.features, predicted) + rest,
            predicted,
            like,
            filters,
            seen.features.gather(1, filters),
            known.class_means[like].gather(1, filters),
            after + rest[:, None],
            known.threshold if threshold is None else threshold,
            self.class_filters.class_names,
        )

    def _named(self, features: Tensor, classes: Tensor, num_filters: int) -> tuple[Tensor, Tensor]:
        """The filters that lower the score most if they are as a class's (N,), one after the other, and
        the scores after each, (N, k)."""
        expected, current = self._fitted().class_means[classes], features.clone()
        named: list[Tensor] = []
        after: list[Tensor] = []
        for _ in range(num_filters):
            scores = self._scores_with_one_back(current, expected)
            for chosen in named:
                scores.scatter_(1, chosen[:, None], torch.inf)
            best = scores.min(1)
            named.append(best.indices)
            after.append(best.values)
            current.scatter_(1, best.indices[:, None], expected.gather(1, best.indices[:, None]))
        return torch.stack(named, 1), torch.stack(after, 1)

    def _scores_with_one_back(self, features: Tensor, expected: Tensor) -> Tensor:
        """Scores (N, F) with one filter each put back to what is expected of it, and of the class that
        is then predicted."""
        own = torch.arange(features.shape[1])
        rows = []
        for one, like in zip(features, expected, strict=True):
            changed = one.repeat(len(own), 1)
            changed[own, own] = like
            logits = (
                F.linear(one, self._weight, self._bias) + (like - one)[:, None] * self._weight.T
            )
            rows.append(self._scores(changed, logits.argmax(1)))
        return torch.stack(rows)

    def _fitted(self) -> _Known:
        if self._known is None:
            raise ValueError("The detector is not fitted; call fit(dataloader) first.")
        return self._known

    def _scores(self, features: Tensor, predicted: Tensor) -> Tensor:
        """Scores (N,) without the earlier layer's part."""
        if self.score != "combined":
            return self._part(self.score, features, predicted)
        known = self._fitted()
        parts = [
            weight
            * (self._part(name, features, predicted) - known.location[name])
            / known.scale[name]
            for name, weight in _PARTS.items()
        ]
        return torch.stack(parts).sum(0)

    def _part(self, name: str, features: Tensor, predicted: Tensor) -> Tensor:
        """One score of features (N, F) whose classes predicted are known."""
        if name == "energy":
            return _energy(features, self._weight, self._bias)
        if name == "dice":
            return _energy(features, self._weight * self._mask, self._bias)
        known = self._fitted()
        if name == "likeness":
            return -F.cosine_similarity(_root(features), known.class_roots[predicted])
        clipped = features.clamp(max=known.clip)
        if name == "react":
            return _energy(clipped, self._weight, self._bias)
        if name == "line":
            clipped = clipped * self._mask[predicted]
        return _energy(clipped, self._weight * self._mask, self._bias)

    def _surprise(self, earlier: Tensor | None, predicted: Tensor) -> Tensor:
        """What an earlier layer adds to the score, (N,)."""
        if earlier is None:
            return torch.zeros(len(predicted))
        known = self._fitted()
        assert known.earlier_means is not None
        assert known.earlier_scale is not None
        far = _distance(earlier, known.earlier_means[predicted], known.earlier_scale)
        return ((far - known.location["earlier"]) / known.scale["earlier"]).clamp(0, _MOST)

    def _see(self, inputs: ExampleInputs) -> _Seen:
        """What one pass sees of a batch, on the CPU."""
        if self.score not in ("energy", "dice"):
            self._fitted()
        with read_batches(
            self.model,
            [inputs],
            "unknown inputs",
            unpack=lambda batch: (batch, None),
            labeled=False,
            show_progress=False,
        ) as batches:
            reader = ScoreReader(self.model, batches)
            seen = [self._run(batch, reader) for batch in batches]
        return seen[0]

    def _run(self, batch: Batch, reader: ScoreReader) -> _Seen:
        """Run the model on a batch and see the head and the earlier layer."""
        taps = [] if self._earlier is None else [self._earlier]
        with tapping(taps):
            run = run_head(self.model, self._head, batch.inputs)
        check_runs(self._head.name, run.runs)
        if run.features.dim() != 2 or len(run.features) != batch.size:
            raise ValueError(
                f"The head {self._head.name!r} takes {tuple(run.features.shape)} for {batch.size} "
                "images; expected one row of features for each."
            )
        for tap in taps:
            tap.check(batch.size)
        earlier = [tap.seen[0].detach().cpu().float() for tap in taps]
        return _Seen(
            run.features.detach().cpu().float(),
            reader.scores(batch, run.output).argmax(1).cpu(),
            torch.empty(0),
            earlier[0] if earlier else None,
        )


def _means(maps: Tensor) -> tuple[Tensor]:
    return (aggregated(maps, "mean"),)


def _energy(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return -F.linear(features, weight, bias).logsumexp(1)


def _root(features: Tensor) -> Tensor:
    """Square roots that keep the sign."""
    return features.sign() * features.abs().sqrt()


def _distance(means: Tensor, expected: Tensor, spread: Tensor) -> Tensor:
    """How far filters' means (N, K) are from what is expected, in squares of their spread."""
    return ((means - expected) / spread).pow(2).mean(1)
