"""A layer's mean activations for every image of a data set, and the labels."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from captum_classfilters._core.guard import model_left_as_found
from captum_classfilters._core.layers import (
    check_batch,
    check_runs,
    filter_axis,
    find_layer,
    layer_name,
    positions_last,
)


def collect_features(
    model: nn.Module,
    layer: nn.Module | str,
    dataloader: Iterable[Any],
    *,
    channel_dim: int | None = None,
    attribute_to_layer_input: bool = False,
    flatten: bool = False,
    show_progress: bool = True,
) -> tuple[Tensor, Tensor]:
    r"""
    Collect a layer's mean activations, image by image.

    Maps are averaged inside the hook, so memory is O(N K). The model runs in evaluation mode and is
    left as found.

    Args:

        model (nn.Module): The model.
        layer (nn.Module or str): The layer, or its dotted name.
        dataloader (iterable): Batches of (inputs, labels).
        channel_dim (int, optional): Axis of the filters, where it cannot be told from the layer.
                    Default: None
        attribute_to_layer_input (bool): Collect the layer's input, a head's features say.
                    Default: False
        flatten (bool): Keep positions as further features (N, K P) instead of averaging.
                    Default: False
        show_progress (bool): Show a progress bar.
                    Default: True

    Returns:
        *tuple* of the features (N, K), and the labels (N,), both on the CPU.

    Raises:
        ValueError: The loader is empty, or the layer does not run exactly once.

    Examples::

        >>> import torch
        >>> from captum_classfilters.identify import collect_features
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten())
        >>> data = [(torch.rand(4, 3, 6, 6), torch.tensor([0, 1, 1, 0]))] * 2
        >>> features, labels = collect_features(net, "0", data, show_progress=False)
        >>> features.shape, labels.shape
        (torch.Size([8, 8]), torch.Size([8]))
    """
    module = find_layer(model, layer) if isinstance(layer, str) else layer
    name = layer_name(model, module)
    batch: list[Tensor] = []

    def take(value: Any) -> None:
        tensor = value[0] if isinstance(value, (tuple, list)) else value
        axis = filter_axis(None if attribute_to_layer_input else module, tensor, channel_dim)
        maps = positions_last(tensor.detach(), axis)
        batch.append(maps.flatten(1).clone() if flatten else maps.mean(2))

    if attribute_to_layer_input:
        handle = module.register_forward_pre_hook(lambda _module, inputs: take(inputs))
    else:
        handle = module.register_forward_hook(lambda _module, _inputs, output: take(output))
    features, labels = [], []
    parameter = next(model.parameters(), None)
    device = parameter.device if parameter is not None else torch.device("cpu")
    bar = tqdm(dataloader, desc="features", unit="batch", disable=not show_progress)
    try:
        with model_left_as_found(model, evaluation=True), torch.no_grad():
            for inputs, targets in bar:
                parts = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
                batch.clear()
                model(*(part.to(device) for part in parts))
                check_runs(name, len(batch))
                check_batch(name, len(batch[0]), len(parts[0]))
                features.append(batch[0].cpu())
                labels.append(torch.as_tensor(targets).cpu())
    finally:
        handle.remove()
    if not features:
        raise ValueError("The data loader is empty.")
    return torch.cat(features), torch.cat(labels)
