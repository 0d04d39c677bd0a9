"""How a specialist is made: filters chosen, layers split, weights fitted, some training if asked."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from captum_classfilters._core.batches import read_batches
from captum_classfilters._core.copies import copied
from captum_classfilters._core.outputs import scores_per_class
from captum_classfilters._core.ranking import random_sets
from captum_classfilters.answers.class_images import BATCH_SIZE, Images
from captum_classfilters.heads.fine_tune import Freeze, fine_tune
from captum_classfilters.pruning.filter_budget import RemainingSize, allocate
from captum_classfilters.pruning.least_squares import weighted
from captum_classfilters.pruning.network_size import NetworkSize, Ranks, Shape, Unit
from captum_classfilters.pruning.prunable_layers import prunable_layers
from captum_classfilters.pruning.prune_filters import prune_filters
from captum_classfilters.pruning.reconstruction import Reconstruction, scores_of

_MOST_FITTED = 768  # images are enough for least squares and statistics
_SHARE = 0.25  # exponent of the budget: what is left of a network before its layers are split
_FEW = 96  # images on which single layers are tried


def hits_of(model: nn.Module, data: Images) -> Tensor:
    """Which images are right, (N,)."""
    return scores_of(model, data).argmax(1).cpu() == torch.cat([y for _, y in data])


def loss_of(model: nn.Module, data: Images) -> float:
    """Mean cross-entropy."""
    return float(F.cross_entropy(scores_of(model, data).cpu(), torch.cat([y for _, y in data])))


@dataclass(frozen=True)
class Built:
    """A smaller network.

    Args:

        model (nn.Module): The network.
        sizes (dict): Filters of each layer that can lose some.
        kept (dict): For each layer that lost filters, also with those of another layer, which of its
                    (K,) stayed, bool.
        ranks (dict): Of the layers that were split, the numbers that their kernels read and make.
    """

    model: nn.Module
    sizes: dict[str, int]
    kept: dict[str, Tensor]
    ranks: dict[str, Ranks]


class SpecialistBuilder:
    """Specialists of one network for some classes.

    Args:

        model (nn.Module): The model, all classes in its head.
        full (nn.Module): The same with the classes' outputs only.
        head (str): Its head.
        fitted (list): Images to fit to ...
        held (list): ... and to choose by.
        example (tuple): Inputs to trace the network with.
        unit (str): What budgets are shares of.
        seed (int): Of what is drawn.
        show_progress (bool): Show progress bars.
    """

    def __init__(
        self, model: nn.Module, full: nn.Module, head: str, fitted: Images, held: Images,
        example: tuple[Tensor], unit: Unit, seed: int, show_progress: bool,
    ) -> None:  # fmt: skip
        self.full, self.fitted, self.held, self.example = full, fitted, held, example
        self.seed = seed
        self.size = NetworkSize(full, example, unit)
        self.total = self.size.of(model)
        found = prunable_layers(full, example, show_progress=show_progress)
        layers = [layer.name for layer in found.prunable]
        self.some = fitted[: max(1, _MOST_FITTED // BATCH_SIZE)]
        self.network = Reconstruction(full, head, layers, self.some, example, seed)
        if not self.network.readers:
            reasons = "; ".join(f"{layer.name}: {layer.reason}" for layer in found if layer.reason)
            raise ValueError(f"No layer of the model can lose filters. {reasons[:300]}")
        self.count = RemainingSize(full, self.network.graph, self.network.readers, self.size)

    def best(self, budget: float, low_rank: bool) -> Built:
        """The network of this size that does best on images held back: by its filters alone, or by
        fewer of them gone and layers split."""
        ones = dict.fromkeys(self.count.widths, 1)
        least = self._least(ones) if low_rank else self._left(ones)
        if least > budget * self.total:
            share = least / self.total
            raise ValueError(
                f"budget={budget}: with one filter in each layer that can lose some, "
                f"{share:.1%} of the {self.size.unit.replace('_', '-')} are left; give at least "
                f"{share + 0.0005:.3f}."
            )
        few = self.fitted[: max(1, _FEW // BATCH_SIZE)]
        damage = {name: self.network.damage(name, few) for name in self.network.readers}
        found = []
        if self._left(ones) <= budget * self.total:
            found.append(self.build(self._sizes(damage, budget)))
        if low_rank and self.network.splittable:
            share = budget**_SHARE
            sizes = self._sizes(damage, share)
            while self._least(sizes) > budget * self.total:
                share *= 0.9
                sizes = self._sizes(damage, share)
            found.append(self.build(sizes, most=budget * self.total))
        return min(found, key=lambda built: loss_of(built.model, self.held))

    def _sizes(self, damage: Mapping[str, Tensor], share: float) -> dict[str, int]:
        """Filters of each layer with which such a share of the network is left."""
        return allocate(self.count, damage, share * self.total - self._biases())

    def _biases(self) -> int:
        """What comes with the fits: biases of layers that had none."""
        if not self.size.counts_parameters:
            return 0
        names = {reader.name for readers in self.network.readers.values() for reader in readers}
        modules = [weighted(self.full, name) for name in names]
        return sum(len(module.weight) for module in modules if module.bias is None)

    def _left(self, sizes: Mapping[str, int]) -> float:
        """What is left, at most."""
        return self.count.total - self.count.saved(sizes) + self._biases()

    def _least(self, sizes: Mapping[str, int]) -> float:
        """What is left, at most, once all layers are split with the least ranks."""
        total = self._left(sizes)
        for name in self.network.splittable:
            weight = weighted(self.full, name).weight
            made, read = self.count.lost(name, sizes)
            outputs, inputs = round(len(weight) - made), round(weight.shape[1] - read)
            whole = self.size.of_parameter(name, weight) * outputs / len(weight)
            whole *= inputs / weight.shape[1]
            shape = Shape(outputs, inputs, weight[0, 0].numel())
            total -= max(0, whole - self.size.of_split(name, shape, shape.least))
        return total

    def random(self, sizes: dict[str, int], seed: int, name: str) -> Tensor:
        """As many random filters of a layer, (K,)."""
        kept = torch.arange(self.count.widths[name]) < sizes[name]
        return random_sets(kept, 1, seed + list(sizes).index(name))[0]

    def build(
        self,
        sizes: dict[str, int],
        mask: Callable[[str], Tensor] | None = None,
        most: float | None = None,
        ranks: Mapping[str, Ranks] | None = None,
    ) -> Built:
        """A network of this size, with the best filters or others; its layers split into layers of
        some ranks, or until it is as small as that."""
        network = copied(self.full)
        kept = self.network.without(network, sizes, mask)
        if kept:
            network = prune_filters(network, kept, self.example)
        left = self.network.left(kept)
        if most is not None:
            ranks = self.network.low_rank(network, left, most, self.size)
        if ranks:
            self.network.split(network, left, ranks)
        again = copied(network)
        recalibrate(again, self.some)
        network = min((network, again), key=lambda candidate: loss_of(candidate, self.held))
        return Built(network, sizes, left, dict(ranks or {}))

    def tune(self, network: nn.Module, epochs: int, learning_rate: float) -> None:
        """Train a network in place after the full one."""
        if epochs:
            tune(network, self.full, self.fitted, self.held, epochs, learning_rate, self.seed)


def tune(
    network: nn.Module, teacher: nn.Module, fitted: Images, held: Images,
    epochs: int, learning_rate: float, seed: int, freeze: Freeze = "batch_norm_statistics",
) -> None:  # fmt: skip
    """Train a network in place after its teacher, the best epoch on images held back kept.

    Statistics of batch normalizations stay: weights fitted by least squares make less variance than
    those before them, and statistics of batches would undo that, layer after layer.
    """
    images = TensorDataset(*(torch.cat(part) for part in zip(*fitted, strict=True)))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        loader = DataLoader(images, batch_size=BATCH_SIZE // 2, shuffle=True)
        optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, learning_rate, total_steps=epochs * len(loader) + 1
        )
        trains = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
        network.requires_grad_()
        fine_tune(
            network, loader, held, epochs=epochs, optimizer=optimizer, scheduler=schedule,
            freeze=freeze, teacher=teacher, show_progress=False,
        )  # fmt: skip
        for parameter, flag in trains:
            parameter.requires_grad_(flag)


def recalibrate(model: nn.Module, data: Images) -> None:
    """Give batch normalizations the statistics of some images."""
    norms = [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    ]
    if not norms:
        return
    before = [(norm, norm.training, norm.momentum) for norm in norms]
    with read_batches(model, data, "statistics", training=True, show_progress=False) as batches:
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.train()
            norm.momentum = None  # the mean over batches
        with torch.no_grad():
            for batch in batches:
                scores_per_class(model(*batch.inputs))
        for module, mode in modes:
            module.training = mode
    for norm, mode, momentum in before:
        norm.training, norm.momentum = mode, momentum
