"""A smaller network for some classes, found from images of them alone."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.batches import dataset_names
from captum_classfilters._core.devices import device_of
from captum_classfilters._core.image_keys import image_keys
from captum_classfilters._core.names import check_list
from captum_classfilters._core.tables import Row, Table, Tabular, short_repr
from captum_classfilters._core.types import ClassNames, Dataloader, Unpack
from captum_classfilters._core.warnings import warn
from captum_classfilters.answers.class_images import (
    BATCH_SIZE,
    Images,
    check_one_input,
    images_of_classes,
)
from captum_classfilters.answers.specialist_builder import SpecialistBuilder, hits_of
from captum_classfilters.class_filters import given_or_known_names, index_of_class
from captum_classfilters.heads.linear_head import first_inputs, scoring_head
from captum_classfilters.identify.accuracy_reduction import binomial_interval, paired_interval
from captum_classfilters.pruning.compare_networks import NetworkComparison, compare_networks
from captum_classfilters.pruning.fold_batch_norms import fold_batch_norms
from captum_classfilters.pruning.network_size import UNITS, Ranks, Unit
from captum_classfilters.pruning.specialize import check_rows, check_several_outputs, with_rows


@short_repr
@dataclass(frozen=True)
class ClassSpecialist(Tabular):
    r"""
    A smaller network for some classes, and what it costs; prints as a table.

    Args:

        model (nn.Module): The network; output *s* is class ``classes[s]`` of the full one.
        classes (tuple of int): The S classes, as indices of the full network's outputs.
        class_names (tuple of str): Their names.
        kept (dict): For each convolution or linear layer that lost filters, also with those of
                    another layer (a gate, a factor of a product), which of its (K,) stayed, bool.
        ranks (dict): Of the layers that are narrower ones in a row by now, the numbers that the kernel
                    among them reads and makes, ``(inputs, outputs)``.
        right (Tensor): Shape (2 + R, S), int64. Images of each class that are right: by the full
                    network, choosing among these classes only, by the specialist, and by
                    networks of the same size with random filters, made in the same way.
        lost, gained (int): Images that only the full network, and only the specialist, has right.
        counts (Tensor): Shape (S,), int64. Images of each class that were judged.
        costs (dict): By batch size, a comparison of the networks' parameters, multiply-adds and
                    measured times.
    """

    model: nn.Module = field(repr=False)
    classes: tuple[int, ...]
    class_names: tuple[str, ...]
    kept: dict[str, Tensor]
    ranks: dict[str, Ranks]
    right: Tensor
    lost: int
    gained: int
    counts: Tensor
    costs: dict[int, NetworkComparison]

    @property
    def accuracy(self) -> Tensor:
        """Shares of all images that are right, (2 + R,): full, specialist, random filters."""
        return self.right.sum(1).double() / self.counts.sum()

    @property
    def parameters_kept(self) -> float:
        """Parameters of the specialist over those of the full network."""
        return self._share("parameters")

    @property
    def multiply_adds_kept(self) -> float:
        """Multiply-adds of the specialist, for an image, over those of the full network."""
        return self._share("multiply_adds")

    def _share(self, cost: str) -> float:
        compared = next(iter(self.costs.values()))
        return float(getattr(compared.after, cost) / getattr(compared.before, cost))

    @arguments_checked
    def interval(self, confidence: float = 0.95) -> Tensor:
        """Tango's interval of what the specialist changes in the accuracy, paired by images.

        Args:

            confidence (float): Coverage, between 0 and 1.
                        Default: 0.95

        Returns:
            *Tensor* of shape (2,).

        Raises:
            ValueError: ``confidence`` is out of range.
        """
        gained, lost = torch.tensor(self.gained), torch.tensor(self.lost)
        return paired_interval(gained, lost, self.counts.sum(), confidence)

    def _tables(self) -> list[Table]:
        low, high = self.interval().tolist()
        full, own, *random = self.accuracy.tolist()
        rows: list[Row] = [
            {"": name, "images": count, "full": before / count, "specialist": after / count}
            for name, count, before, after in zip(
                self.class_names, self.counts, self.right[0], self.right[1], strict=True
            )
        ]
        rows.append({"": "together", "images": self.counts.sum(), "full": full, "specialist": own})
        notes = [f"change {own - full:+.4f}, from {low:+.4f} to {high:+.4f}"]
        if random:
            notes.append(f"random filters, as many in each layer: {sum(random) / len(random):.4f}")
        cost = next(iter(self.costs.values()))
        for size, each in self.costs.items():
            notes.append(
                f"batches of {size}: {1000 * each.before.seconds:.2f} ms before, "
                f"{1000 * each.after.seconds:.2f} ms after, {each.speed_up:.2f} times as fast"
            )
        title = (
            f"{self.parameters_kept:.1%} of {cost.before.parameters:,} parameters, "
            f"{self.multiply_adds_kept:.1%} of the multiply-adds"
        )
        return [Table(rows, dict.fromkeys(("full", "specialist"), ".4f"), title, notes=notes)]


@arguments_checked
@torch.inference_mode(False)
def build_specialist(
    model: nn.Module,
    classes: Sequence[int | str],
    dataloader: Dataloader,
    report_dataloader: Dataloader | None = None,
    *,
    budget: float = 0.25,
    unit: Unit = "parameters",
    low_rank: bool = True,
    epochs: int = 0,
    learning_rate: float = 1e-3,
    fold_norms: bool = True,
    head: nn.Module | str | None = None,
    class_names: ClassNames | None = None,
    repetitions: int = 1,
    seed: int = 0,
    unpack: Unpack | None = None,
    device: torch.device | str | None = None,
    show_progress: bool = True,
) -> ClassSpecialist:
    r"""
    Build a smaller network that tells some classes apart, from images of these classes.

    The head keeps the rows of the classes. Each layer that :func:`prunable_layers` lists is tried by
    itself: its filters go one after another, those first without which the layers that read it can do
    best, by least squares, where an error of a reader's outputs counts as much as it moves the
    scores of the classes. How far the scores move at four sizes is measured, and each layer gets as
    many filters as leave the least sum of that for the ``budget``. Then the layers lose their filters
    in the order in which they run, every reader's weights fitted anew, in closed form, to what it
    made in the full network. A second network loses fewer filters, until the fourth root of the budget
    is left, and its convolutions and linear layers are split into narrower ones in a row: a kernel
    that reads few combinations of the inputs and makes few of the outputs, by reduced-rank regression
    with the same costs, until the budget is met; ranks go where they save most error for each
    parameter. At last the head is fitted, and batch normalizations have their statistics
    measured anew if that lowers the cross-entropy on images held back. By the same cross-entropy one of
    the two networks is chosen. Nothing is trained unless ``epochs`` says so; then
    :func:`~captum_classfilters.heads.fine_tune` has the full network as its teacher. Batch normalizations
    that follow a layer become part of it.

    Source: the removal is the optimal brain surgeon's, for filters (Hassibi and Stork, NIPS 1992); the
    refitting one layer after another as in He et al.: *Channel pruning for accelerating very deep
    neural networks*, ICCV 2017, https://arxiv.org/abs/1707.06168; the splitting is that of Zhang et al.:
    *Accelerating very deep convolutional networks for classification and detection*, TPAMI 2016,
    https://arxiv.org/abs/1505.06798, on both sides of the kernel, as in Kim et al.: *Compression of deep
    convolutional neural networks for fast and low power mobile applications*, ICLR 2016,
    https://arxiv.org/abs/1511.06530.

    Images of the classes are held in memory. Layers that a shortcut ties to others keep their filters.
    Layers whose filters are multiplied lose them together.

    Args:

        model (nn.Module): The model, whose output is its head's, maybe averaged over positions.
        classes (sequence of int or str): The classes, in the order of the new outputs; by name where
                    names are known.
        dataloader (iterable): Batches of (inputs, labels) with the labels of the full network; images
                    of other classes are passed over. A fifth is held back for choices.
        report_dataloader (iterable, optional): Other images to judge on. By default a fifth of the
                    images is set aside for it.
        budget (float): Share of the model that may stay, above 0 and at most 1.
                    Default: 0.25
        unit (str): What the budget is a share of: ``"parameters"``, or ``"multiply_adds"`` for an
                    image where time counts more than size.
                    Default: "parameters"
        low_rank (bool): Try layers split into narrower ones, too. Without it only filters go.
                    Default: True
        epochs (int): Epochs of training afterwards.
                    Default: 0
        learning_rate (float): Of this training.
                    Default: 1e-3
        fold_norms (bool): Fold batch normalizations, in the end, into the layers whose outputs they
                    read: less to compute for the same outputs. To train on, leave them.
                    Default: True
        head (nn.Module or str, optional): The head, or its dotted name. By default the
                    linear layer that runs last.
        class_names (sequence of str, optional): C names. By default those of the data set.
        repetitions (int): Networks of the same size with random filters to build beside it.
                    Default: 1
        seed (int): Splits the images, draws positions and random filters, and orders the training.
                    Default: 0
        unpack (Callable, optional): From a batch of another kind to the pair (inputs, labels).
                    Default: None
        device (torch.device or str, optional): Where the batches go; by default where the model is.
        show_progress (bool): Show progress bars.
                    Default: True

    Returns:
        *ClassSpecialist*.

    Raises:
        ValueError: Fewer than two classes, one given twice, unknown or with fewer than 20 images;
                    the budget is no share or cannot be reached; no layer can lose filters; there is
                    no linear head that ends the model; a layer runs several times for parts of a
                    batch, or without gradients.

    Examples::

        >>> import torch
        >>> from captum_classfilters.answers import build_specialist
        >>> from captum_classfilters.testing import planted_network
        >>> planted = planted_network()
        >>> data = planted.loader(200)
        >>> specialist = build_specialist(
        ...     planted.model, [0, 2], data, budget=0.5, show_progress=False)
        >>> specialist.parameters_kept <= 0.5, bool(specialist.accuracy[1] > 0.9)
        (True, True)
    """
    if not 0 < budget <= 1:
        raise ValueError(
            f"budget={budget} is no share of the model; expected above 0 and at most 1, 0.25 "
            "for a quarter."
        )
    if unit not in UNITS:
        raise ValueError(f"unit={unit!r}; choose one of {', '.join(UNITS)}.")
    if epochs < 0 or repetitions < 0:
        raise ValueError(f"epochs={epochs}, repetitions={repetitions}: expected 0 or more.")
    reading = {"unpack": unpack, "device": device, "show_progress": show_progress}
    inputs, dataloader = first_inputs(model, dataloader, unpack)
    check_one_input(inputs)
    found, dataloader = scoring_head(model, dataloader, head, unpack=unpack)
    name, number = found.name, len(found.weight)
    check_several_outputs(number)
    names = given_or_known_names(class_names, dataset_names(dataloader), number)
    check_list("classes", classes)
    rows = [index_of_class(label, names) for label in classes]
    if len(rows) < 2 or len(set(rows)) != len(rows):
        raise ValueError(f"classes={list(classes)}: expected two or more different classes.")
    own = tuple(names[row] for row in rows)
    split = partial(
        images_of_classes, rows=rows, names=own, num_classes=number, seed=seed, reading=reading
    )
    if report_dataloader is None:
        fitted, held, judged = split(model, dataloader, (0.6, 0.2, 0.2))
    else:
        fitted, held = split(model, dataloader, (0.8, 0.2))
        (judged,) = split(model, report_dataloader, (1.0,))
        _warn_of_used(fitted + held, judged)
    example = (fitted[0][0][:4].to(device_of(model)),)
    full = with_rows(model, name, rows)
    training = full.training
    full.eval()
    check_rows(model, full, rows, example, name)
    builder = SpecialistBuilder(model, full, name, fitted, held, example, unit, seed, show_progress)
    best = builder.best(budget, low_rank)
    smaller = [best]
    for draw in range(repetitions):
        chosen = partial(builder.random, best.sizes, seed + 1 + draw)
        smaller.append(builder.build(best.sizes, chosen, ranks=best.ranks))
    for built in smaller:
        builder.tune(built.model, epochs, learning_rate)
        if fold_norms:
            fold_batch_norms(built.model, example)
    best.model.train(training)
    networks = [full, *(built.model for built in smaller)]
    hits = torch.stack([hits_of(network, judged) for network in networks])
    labels = torch.cat([y for _, y in judged])
    counts = torch.bincount(labels, minlength=len(rows))
    right = torch.stack([torch.bincount(labels[hit], minlength=len(rows)) for hit in hits])
    result = ClassSpecialist(
        best.model, tuple(rows), own, best.kept, best.ranks, right,
        int((hits[0] & ~hits[1]).sum()), int((hits[1] & ~hits[0]).sum()), counts,
        _costs(model, best.model, judged),
    )  # fmt: skip
    _warn_near_chance(result)
    return result


def _costs(model: nn.Module, smaller: nn.Module, data: Images) -> dict[int, NetworkComparison]:
    """What the networks cost, for single images and for batches."""
    images = torch.cat([x for x, _ in data])
    images = images[torch.arange(BATCH_SIZE) % len(images)]
    repetitions = {1: 30, BATCH_SIZE: 5}
    return {
        size: compare_networks(model, smaller, images[:size], repetitions=times)
        for size, times in repetitions.items()
    }


def _warn_of_used(built_with: Images, judged: Images) -> None:
    """Warn if a specialist is judged on images that it was built with."""
    used = {key for x, _ in built_with for key in image_keys((x,)).tolist()}
    keys = [key for x, _ in judged for key in image_keys((x,)).tolist()]
    again = sum(key in used for key in keys)
    if again:
        warn(
            f"{again} of the {len(keys)} images of report_dataloader are among those of dataloader, which "
            "the specialist is built with, so its accuracy is too good; give others, or leave "
            "report_dataloader out."
        )


def _warn_near_chance(result: ClassSpecialist) -> None:
    """Warn if a specialist may tell its classes hardly better apart than a guess does."""
    number, right = result.counts.sum(), result.right[1].sum()
    chance = float(result.counts.max() / number)
    low, high = binomial_interval(right, number).tolist()
    if low < chance + 0.1 * (1 - chance):
        full, own = result.accuracy[:2].tolist()
        warn(
            f"The specialist for {', '.join(result.class_names)} has an accuracy of {own:.3f} "
            f"(95 % interval {low:.3f} to {high:.3f}), near the {chance:.3f} of a guess; the full "
            f"network has {full:.3f}. Give a larger budget, epochs=1, or more images."
        )
