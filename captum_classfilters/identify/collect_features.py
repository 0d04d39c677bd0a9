"""A layer's mean activations for every image of a data set, and the labels."""

import torch
from torch import Tensor, nn

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.layers import find_layers
from captum_classfilters._core.outputs import at_least_float32
from captum_classfilters._core.types import Dataloader, Unpack
from captum_classfilters._core.units import Rows, UnitTap, aggregated
from captum_classfilters.identify.unit_scores import collect_units


@arguments_checked
def collect_features(
    model: nn.Module,
    layer: nn.Module | str,
    dataloader: Dataloader,
    *,
    channel_dim: int | None = None,
    attribute_to_layer_input: bool = False,
    flatten: bool = False,
    num_classes: int | None = None,
    unpack: Unpack | None = None,
    show_progress: bool = True,
) -> tuple[Tensor, Tensor]:
    r"""
    Collect a layer's mean activations, image by image.

    These are the :func:`unit_scores` of one layer's filters, or of its input's.

    Args:

        model (nn.Module): The model. It runs in evaluation mode and is left as found.
        layer (nn.Module or str): The layer, or its dotted name.
        dataloader (iterable): Batches of (inputs, labels).
        channel_dim (int, optional): Axis of the filters, where it cannot be told from the layer.
                    Default: None
        attribute_to_layer_input (bool): Collect the layer's input, the features of a head for
                    example.
                    Default: False
        flatten (bool): Keep positions as further features (N, K P) instead of averaging.
                    Default: False
        num_classes (int, optional): C; labels are 0 to C - 1. By default the number of the model's
                    outputs, if those are scores (N, C), else any.
                    Default: None
        unpack (Callable, optional): From a batch of another kind to the pair (inputs, labels).
                    Default: None
        show_progress (bool): Show a progress bar.
                    Default: True

    Returns:
        *tuple* of the features (N, K), float32 or the model's higher precision, and the labels (N,),
        int64; on the CPU.

    Raises:
        ValueError: The loader is empty, labels are not class indices, the layer puts out NaN or Inf
            or does not run exactly once, or with ``flatten`` images differ in size.

    Examples::

        >>> import torch
        >>> from captum_classfilters.identify import collect_features
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten())
        >>> data = [(torch.rand(4, 3, 6, 6), torch.tensor([0, 1, 1, 0]))] * 2
        >>> features, labels = collect_features(net, "0", data, show_progress=False)
        >>> features.shape, labels.shape
        (torch.Size([8, 8]), torch.Size([8]))
    """
    (module,) = find_layers(model, layer).values()
    tap = UnitTap(model, module, channel_dim, attribute_to_layer_input)
    # What follows the layer may overwrite its maps, so they are copied.
    tap.reduce = lambda maps: (
        at_least_float32(maps.flatten(1).clone()) if flatten else aggregated(maps, "mean"),
    )
    rows = {tap.name: Rows()}
    labels = collect_units(
        model, [tap], dataloader, rows, num_classes, unpack, show_progress, flatten
    )
    return torch.cat(rows[tap.name].pieces()), labels
