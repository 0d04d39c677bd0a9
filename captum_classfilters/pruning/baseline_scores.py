"""Scores that pruning by accuracy is compared with; of all of them the smallest goes first."""

import torch
from torch import Tensor, nn

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.batches import check_read_again, first_batch
from captum_classfilters._core.costs import inputs_of
from captum_classfilters._core.filter_graph import FilterGraph
from captum_classfilters._core.filter_weights import filter_weights, reading_weights
from captum_classfilters._core.guard import model_left_as_found
from captum_classfilters._core.layers import module_named, name_of
from captum_classfilters._core.types import Dataloader, ExampleInputs, Unpack
from captum_classfilters.identify import activation_scores


def incoming_weight_scores(
    model: nn.Module,
    layer: nn.Module | str,
    example_inputs: ExampleInputs,
    *,
    channel_dim: int | None = None,
) -> Tensor:
    r"""
    Mean absolute weight of each filter, its L1 norm but for a constant.

    Source: Li et al., *Pruning Filters for Efficient ConvNets*, 2017,
    https://arxiv.org/abs/1608.08710.

    Args:

        model (nn.Module): The model.
        layer (nn.Module or str): The layer; the weighted layers that make its filters are found.
        example_inputs (Tensor or tuple): A batch to trace the model with.
        channel_dim (int, optional): Axis of the filters, where it cannot be told from the layer.
                    Default: None

    Returns:
        *Tensor* of shape (K,), float64.

    Raises:
        ValueError: The layer's filters are not those of weighted layers.
    """
    graph = FilterGraph(model, inputs_of(model, example_inputs))
    module = graph.layer(name_of(model, layer))
    scores = torch.zeros(graph.width(module, channel_dim)[1], dtype=torch.float64)
    with model_left_as_found(model, evaluation=True):
        for source in graph.sources(module, channel_dim):
            own = _sizes(filter_weights(source.module)).mean(1)
            scores[source.places] = own[source.filters]
    return scores


def outgoing_weight_scores(
    model: nn.Module,
    layer: nn.Module | str,
    example_inputs: ExampleInputs,
    *,
    channel_dim: int | None = None,
) -> Tensor:
    r"""
    Mean absolute weight with which later layers read each filter.

    Args:

        model (nn.Module): The model.
        layer (nn.Module or str): The layer.
        example_inputs (Tensor or tuple): A batch to trace the model with.
        channel_dim (int, optional): Axis of the filters, where it cannot be told from the layer.
                    Default: None

    Returns:
        *Tensor* of shape (K,), float64; zero for a filter that no weighted layer reads.

    Raises:
        ValueError: The layer's filters are not those of weighted layers.
    """
    graph = FilterGraph(model, inputs_of(model, example_inputs))
    module = graph.layer(name_of(model, layer))
    num_filters = graph.width(module, channel_dim)[1]
    total, weights = torch.zeros(2, num_filters, dtype=torch.float64)
    with model_left_as_found(model, evaluation=True):
        for source in graph.sources(module, channel_dim):
            place_of = dict(zip(source.filters, source.places, strict=True))
            reach = graph.reach(source.module)
            for name, inputs in reach.consumers.items():
                sizes = _sizes(reading_weights(module_named(model, name)))[inputs]
                at = torch.tensor([place_of[own] for own in reach.read_filters[name]])
                total.index_add_(0, at, sizes.sum(1))
                weights.index_add_(0, at, torch.full_like(sizes[:, 0], sizes.shape[1]))
    return total / weights.clamp(min=1)


def random_scores(num_filters: int, repetitions: int = 10, seed: int = 0) -> Tensor:
    """Scores that know nothing, one row for each repetition.

    Args:

        num_filters (int): K.
        repetitions (int): Number of rows R.
                    Default: 10
        seed (int): Seed of the first row; each further row has the next one.
                    Default: 0

    Returns:
        *Tensor* of shape (R, K), float64; each row a permutation of 0 to K - 1.

    Raises:
        ValueError: A number is not positive.
    """
    if num_filters < 1 or repetitions < 1:
        raise ValueError(
            f"num_filters={num_filters} and repetitions={repetitions} must be at least 1."
        )
    rows = [
        torch.randperm(num_filters, generator=torch.Generator().manual_seed(seed + row))
        for row in range(repetitions)
    ]
    return torch.stack(rows).double()


@arguments_checked
def filter_importance_baselines(
    model: nn.Module,
    layer: nn.Module | str,
    dataloader: Dataloader,
    *,
    repetitions: int = 10,
    seed: int = 0,
    channel_dim: int | None = None,
    unpack: Unpack | None = None,
    show_progress: bool = True,
) -> dict[str, Tensor]:
    r"""
    Every baseline score of a layer's filters; the larger, the more worth keeping.

    Args:

        model (nn.Module): The model, with logits (N, C).
        layer (nn.Module or str): The layer, or its dotted name.
        dataloader (iterable): Batches of (inputs, labels); the first also traces the model.
        repetitions (int): Number of random orders R.
                    Default: 10
        seed (int): Seed of the first random order; each further one has the next seed.
                    Default: 0
        channel_dim (int, optional): Axis of the filters, where it cannot be told from the layer.
                    Default: None
        unpack (Callable, optional): From a batch of another kind to the pair (inputs, labels).
                    Default: None
        show_progress (bool): Show a progress bar over the batches.
                    Default: True

    Returns:
        *dict* of float64 Tensors (K,): ``"incoming weights"``, ``"outgoing weights"``,
        ``"mean activation"``, ``"maximum activation"``, ``"APoZ"`` (one minus the share of zeros),
        ``"Taylor"``, and (R, K): ``"random"``.

    Raises:
        ValueError: As for the single scores.

    Examples::

        >>> import torch
        >>> from captum_classfilters.pruning import filter_importance_baselines
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        ...     torch.nn.Flatten(), torch.nn.Linear(8, 2))
        >>> data = [(torch.rand(4, 3, 6, 6), torch.tensor([0, 1, 1, 0]))]
        >>> baselines = filter_importance_baselines(net, "1", data, show_progress=False)
        >>> baselines["Taylor"].shape, baselines["random"].shape
        (torch.Size([8]), torch.Size([10, 8]))
    """
    check_read_again(dataloader)
    example = first_batch(model, dataloader, unpack).inputs
    activity = activation_scores(
        model,
        layer,
        dataloader,
        channel_dim=channel_dim,
        unpack=unpack,
        show_progress=show_progress,
    )
    return {
        "incoming weights": incoming_weight_scores(model, layer, example, channel_dim=channel_dim),
        "outgoing weights": outgoing_weight_scores(model, layer, example, channel_dim=channel_dim),
        "mean activation": activity.mean,
        "maximum activation": activity.maximum,
        "APoZ": 1 - activity.zero_share,
        "Taylor": activity.taylor,
        "random": random_scores(len(activity.mean), repetitions, seed),
    }


def _sizes(weights: Tensor | None) -> Tensor:
    """Absolute weights as rows (K, n), in float64 on the CPU."""
    assert weights is not None  # a source or reader of filters has weights
    return weights.cpu().double().abs().flatten(1)
