"""Badola et al.: how often a filter is among an image's strongest."""

from collections.abc import Callable

import torch
from torch import Tensor

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.captum import TargetType
from captum_classfilters._core.forward import FilterMaps
from captum_classfilters._core.types import JsonDict
from captum_classfilters.attr.base import LayerFilterAttribution, Layers


class LayerFilterFrequency(LayerFilterAttribution):
    r"""
    Votes of an image for its strongest filters, the evidence of *Decomposing the Deep*.

    Filter *k* of image *n* gets one vote if its mean activation

    .. math:: z_{nk} = \frac{1}{HW} \sum_{h, w} a_{nkhw}

    is among the ``top_k`` largest of the image, and none otherwise. Over the images of a class the
    votes add up to the paper's activation-frequency histogram, whose rows sum to ``top_k`` times
    the number of images; the filters with the most votes are the class's filters. For activations
    after a ReLU the mean activation is the L1 norm of the map over HW, hence the title of the
    paper's first version.

    Source: Badola, Roy, Padmanabhan, Lal: *Decomposing the Deep: Finding Class Specific Filters in
    Deep CNNs*, Neural Computing & Applications 35 (2023), https://arxiv.org/abs/2112.07719. Unlike
    the authors' code, equal activations are decided in favor of the lower filter index, maps need
    not be square, and a filter whose mean activation is exactly zero gets no vote: an image with
    fewer active filters than ``top_k`` has fewer votes.

    The target is not used: the votes depend on the image alone, the class enters with the labels
    in ``identify``.

    Args:

        forward_func (Callable): The forward function of the model.
        layer (nn.Module, str or list of these): The layer, its dotted name, or several layers.
        device_ids (list of int, optional): Devices of a hidden ``DataParallel`` model.
                    Default: None
        top_k (int): Number of votes of each image.
                    Default: 5
        channel_dim (int, optional): Axis of the filters, where it cannot be told from the layer.
                    Default: None

    Examples::

        >>> import torch
        >>> from captum_classfilters import LayerFilterFrequency
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        ...     torch.nn.Flatten(), torch.nn.Linear(8, 2))
        >>> frequency = LayerFilterFrequency(net, net[1], top_k=3)
        >>> votes = frequency.attribute(torch.rand(4, 3, 6, 6))
        >>> votes.shape
        torch.Size([4, 8, 4, 4])
        >>> frequency.filter_scores(votes).sum(1)
        tensor([3., 3., 3., 3.])
    """

    counts_votes = True
    depends_on_target = False

    @arguments_checked
    def __init__(
        self,
        forward_func: Callable[..., Tensor],
        layer: Layers | str | list[str] | None,
        device_ids: list[int] | None = None,
        top_k: int = 5,
        channel_dim: int | None = None,
    ) -> None:
        LayerFilterAttribution.__init__(self, forward_func, layer, device_ids, channel_dim)
        if top_k < 1:
            raise ValueError(f"top_k={top_k} must be at least 1.")
        self.top_k = top_k

    @property
    def default_num_filters(self) -> int:
        """As many as each image votes for."""
        return self.top_k

    @property
    def options(self) -> JsonDict:
        """The method's own options, for the record."""
        return {"top_k": self.top_k}

    def scores_from(self, maps: FilterMaps, target: TargetType = None) -> Tensor:
        """The rule: a vote for each of the image's strongest filters."""
        return strongest(maps.means, self.top_k).to(maps.means.dtype)


def strongest(values: Tensor, top_k: int) -> Tensor:
    r"""
    Mark the ``top_k`` largest values of each row; ties go to the lower index.

    A value of exactly zero is no evidence: it is not marked, so a row may have fewer marks.

    Args:

        values (Tensor): Shape (N, K).
        top_k (int): How many to mark at most.

    Returns:
        *Tensor* of bool, shape (N, K).

    Raises:
        ValueError: ``top_k`` exceeds K.
    """
    if top_k > values.shape[1]:
        raise ValueError(
            f"top_k={top_k} is larger than the {values.shape[1]} filters of the layer."
        )
    order = values.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    marked = torch.zeros_like(values, dtype=torch.bool).scatter_(1, order, True)
    return marked & (values != 0)
