"""Is a table more than the architecture? The same method on networks with random weights."""

import copy
from dataclasses import dataclass

import torch
from captum.attr import LayerAttribution
from torch import Tensor, nn

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.batches import check_read_again
from captum_classfilters._core.filter_graph import check_own_weights
from captum_classfilters._core.guard import held, model_left_as_found
from captum_classfilters._core.layers import module_of
from captum_classfilters._core.names import kind_of
from captum_classfilters._core.tables import Table, Tabular, short_repr
from captum_classfilters._core.types import AttributeKwargs, ClassNames, Dataloader, Unpack
from captum_classfilters.class_filters import ClassFilters
from captum_classfilters.identify.evidence_sources import Reduction
from captum_classfilters.identify.identify_class_filters import identify_class_filters
from captum_classfilters.identify.significance import LabelPermutation, false_discovery_adjusted


@short_repr
@dataclass(frozen=True)
class RandomWeightsNull(Tabular):
    r"""
    A table beside those of the same network with random weights.

    Args:

        class_filters (ClassFilters): The table of the network as it is, with p- and q-values
                    against random weights.
        random (list of ClassFilters): The tables of the networks with random weights.
        rank_correlation (Tensor): Shape (R,). Mean rank correlation of each with the table: near
                    zero if the table depends on what was learned.
        overlap (Tensor): Shape (R,). Mean overlap of the selected filters.
        chance (float): The overlap expected of random selections.
    """

    class_filters: ClassFilters
    random: list[ClassFilters]
    rank_correlation: Tensor
    overlap: Tensor
    chance: float

    def _tables(self) -> list[Table]:
        rows = [
            {"random weights": draw, "rank correlation": correlation, "overlap": overlap}
            for draw, (correlation, overlap) in enumerate(
                zip(self.rank_correlation.tolist(), self.overlap.tolist(), strict=True)
            )
        ]
        table = self.class_filters
        title = f"{table.method} at {table.layer}; overlap by chance {self.chance:.3f}"
        return [Table(rows, title=title)]


@arguments_checked
@torch.inference_mode(False)
def random_weights_null(
    method: LayerAttribution,
    dataloader: Dataloader,
    *,
    repetitions: int = 5,
    seed: int = 0,
    num_classes: int | None = None,
    class_names: ClassNames | None = None,
    target: int | None = None,
    num_filters: int | None = None,
    mass: float | None = None,
    reduction: Reduction = "sum",
    attribute_kwargs: AttributeKwargs | None = None,
    attribute_to_layer_input: bool = False,
    significance: bool | LabelPermutation = False,
    unpack: Unpack | None = None,
    device: torch.device | str | None = None,
    show_progress: bool = True,
) -> RandomWeightsNull:
    r"""
    Compare a method's table with those of re-initialized copies of the model.

    **The null.** What was learned does not matter: the row of a class is drawn from the same
    distribution as rows under random weights, in which filters are exchangeable. Logits of random
    networks have another scale, so each row is divided by the sum of its absolute values first. The
    p-value of a cell is the share of all R K cells of its class under random weights that are as
    large, :math:`(1 + \#\{T^* \ge T\}) / (1 + R K)`. It asks whether a filter holds more of a class's
    evidence than filters of random networks do; whether it belongs to the class is the question
    that :class:`LabelPermutation` answers.

    Args:

        method (LayerAttribution): A method bound to a model (a module, or one of its methods), on one
                    layer.
        dataloader (iterable): Batches of (inputs, labels), read ``repetitions + 1`` times.
        repetitions (int): R, number of networks with random weights.
                    Default: 5
        seed (int): Seed of the weights; the global random state is not touched.
                    Default: 0
        num_classes, class_names, target, num_filters, mass, reduction, attribute_kwargs: As for
                    :func:`identify_class_filters`.
        attribute_to_layer_input, significance, unpack, device, show_progress: Likewise.

    Returns:
        *RandomWeightsNull*.

    Raises:
        ValueError: ``repetitions`` is below 1, there are several methods or layers, the method's model
                    is not a module, or a module with parameters cannot be re-initialized: it has no
                    ``reset_parameters``.

    Examples::

        >>> import torch
        >>> from captum_classfilters import LayerFilterContribution
        >>> from captum_classfilters.identify import random_weights_null
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        ...     torch.nn.Flatten(), torch.nn.Linear(8, 2))
        >>> data = [(torch.rand(20, 3, 6, 6), torch.arange(20) % 2)]
        >>> null = random_weights_null(
        ...     LayerFilterContribution(net, "1"), data, repetitions=2, show_progress=False)
        >>> null.class_filters.p_values.shape
        torch.Size([2, 8])
    """
    if repetitions < 1:
        raise ValueError(f"repetitions={repetitions} must be at least 1.")
    if not isinstance(getattr(method, "layer", None), nn.Module):
        raise ValueError("method must be one method at one layer; test several one by one.")
    check_read_again(dataloader)
    model = module_of(method.forward_func)
    if model is None:
        raise ValueError("The method's forward function hides its model; pass the model itself.")

    def identified(method: LayerAttribution) -> ClassFilters:
        return identify_class_filters(
            method,
            dataloader,
            num_classes=num_classes,
            class_names=class_names,
            target=target,
            num_filters=num_filters,
            mass=mass,
            reduction=reduction,
            attribute_kwargs=attribute_kwargs,
            attribute_to_layer_input=attribute_to_layer_input,
            significance=significance,
            unpack=unpack,
            device=device,
            show_progress=show_progress,
        )

    table = identified(method)
    random = []
    # Drawn, because a small seed may be the one that the model itself was initialized with.
    generator = torch.Generator().manual_seed(seed)
    seeds = torch.randint(2**62, (repetitions,), generator=generator).tolist()
    with model_left_as_found(None):
        for own_seed in seeds:
            torch.manual_seed(own_seed)
            with held(model):  # what a running pass has frozen or hooked would be copied as it is
                twin = copy.deepcopy(method)
            random_model = module_of(twin.forward_func)
            assert random_model is not None
            reinitialize(random_model)
            random.append(identified(twin))
    agreements = [table.agreement(random_table) for random_table in random]
    p_values = _p_values(table, random)
    return RandomWeightsNull(
        class_filters=table._replace(
            p_values=p_values,
            q_values=false_discovery_adjusted(p_values),
            provenance={
                **table.provenance,
                "significance": {"null": "random weights", "networks": repetitions, "seed": seed},
            },
        ),
        random=random,
        rank_correlation=torch.tensor([part.mean_rank_correlation for part in agreements]),
        overlap=torch.tensor([part.mean_overlap for part in agreements]),
        chance=agreements[0].mean_chance,
    )


def reinitialize(model: nn.Module) -> nn.Module:
    """Give every module new random weights, by its own ``reset_parameters``; in place.

    Args:

        model (nn.Module): The model.

    Returns:
        *nn.Module*: The model itself.

    Raises:
        ValueError: A module with parameters of its own has no ``reset_parameters``, or its weight is
                    computed, by a mask or a norm, from others that would stay.
    """
    for name, module in model.named_modules():
        check_own_weights(model, module, name)
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
        elif next(module.parameters(recurse=False), None) is not None:
            raise ValueError(
                f"The module {name or '(the model itself)'!r}, {kind_of(module)}, has "
                "parameters and no reset_parameters(), so it cannot be re-initialized."
            )
    return model


def _p_values(table: ClassFilters, random: list[ClassFilters]) -> Tensor:
    own = _shares(table.scores)
    null = (
        torch.cat([_shares(random_table.scores) for random_table in random], dim=1).sort(1).values
    )
    p_values = torch.full_like(own, float("nan"))
    for row in (table.counts > 0).nonzero()[:, 0].tolist():
        below = torch.searchsorted(null[row].contiguous(), own[row].contiguous())
        p_values[row] = (1 + null.shape[1] - below).double() / (1 + null.shape[1])
    return p_values


def _shares(scores: Tensor) -> Tensor:
    """Rows divided by the sum of their absolute values; rows of zeros stay."""
    total = scores.abs().sum(1, keepdim=True)
    return scores / torch.where(total > 0, total, torch.ones_like(total))
