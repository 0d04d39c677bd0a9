"""Liang et al.: evidence read from a trained class-specific gate."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.captum import TargetType
from captum_classfilters._core.forward import FilterMaps
from captum_classfilters._core.layers import module_of
from captum_classfilters._core.provenance import provenance
from captum_classfilters._core.targets import as_indices, class_indices
from captum_classfilters._core.types import ClassNames, JsonDict
from captum_classfilters.attr.base import WeightedFilterAttribution
from captum_classfilters.class_filters import ClassFilters


class LayerClassGate(WeightedFilterAttribution):
    r"""
    The gates of the target's class, as a layer attribution.

    A network trained with a class-specific gate (Liang et al., https://arxiv.org/abs/2007.08194) says
    itself which filters belong to a class: those whose gate :math:`G_{ck}` is **high**. The
    attribution of an image is its activation times the gate of the target's class,
    :math:`G_{ck} \, a_{khw}`, so that maps show where the class's filters respond;
    :meth:`class_filters` gives the table of the gates themselves.

    Args:

        forward_func (Callable): The forward function of the model.
        layer (nn.Module or str): The gated layer, or its dotted name.
        gate (Tensor): Shape (C, K), the gates; ``ClassSpecificGate.weight``, say.
        device_ids (list of int, optional): Devices of a hidden ``DataParallel`` model.
                    Default: None
        descending (bool): High gates mark a class's filters. False takes the lowest instead, which
                    is how some published comparisons have read them, to their disadvantage.
                    Default: True
        channel_dim (int, optional): Axis of the filters, where it cannot be told from the layer.
                    Default: None

    Raises:
        ValueError: The gate is not a matrix, or holds NaN.

    Examples::

        >>> import torch
        >>> from captum_classfilters import LayerClassGate
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 2, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
        ...     torch.nn.Linear(2, 2))
        >>> method = LayerClassGate(net, net[0], torch.eye(2))
        >>> method.attribute(torch.rand(4, 3, 6, 6), target=1)[:, 0].abs().max()
        tensor(0.)
        >>> method.class_filters(num_filters=1).filters_of(1)
        tensor([1])
    """

    @arguments_checked
    def __init__(
        self,
        forward_func: Callable[..., Tensor],
        layer: nn.Module | str | None,
        gate: Tensor,
        device_ids: list[int] | None = None,
        descending: bool = True,
        channel_dim: int | None = None,
    ) -> None:
        WeightedFilterAttribution.__init__(self, forward_func, layer, device_ids, channel_dim)
        if gate.dim() != 2:
            raise ValueError(
                f"The gate has shape {tuple(gate.shape)}; expected (C, K), as a ClassSpecificGate's "
                "weight has."
            )
        if not bool(torch.isfinite(gate).all()):
            raise ValueError("The gate holds NaN or Inf.")
        self.gate = gate.detach().clone() if descending else -gate.detach()
        self.descending = descending

    @property
    def options(self) -> JsonDict:
        """The method's own options, for the record."""
        return {"descending": self.descending}

    def weights_from(self, maps: FilterMaps, target: TargetType) -> Tensor:
        """The rule: the gates of the target's class."""
        if maps.num_filters != self.gate.shape[1]:
            raise ValueError(
                f"The layer has {maps.num_filters} filters, the gate {self.gate.shape[1]}."
            )
        gate = self.gate.to(maps.means)
        classes = as_indices(target)
        if classes is None or classes.device != gate.device:
            indices = class_indices(len(gate), target, len(maps.means))
            classes = indices.to(gate.device)
        return gate[classes][:, :, None]

    @arguments_checked
    def class_filters(
        self,
        num_filters: int | None = None,
        counts: Tensor | None = None,
        class_names: ClassNames | None = None,
    ) -> ClassFilters:
        r"""
        The gates as a table; no image is needed.

        Args:

            num_filters (int, optional): Select this many filters for each class.
                        Default: None
            counts (Tensor, optional): Shape (C,), images that the gate was trained on. A class
                        with none is marked, and no filters are selected for it. By default one
                        image for each class.
            class_names (sequence of str, optional): C names.
                        Default: None

        Returns:
            *ClassFilters*: Scores are the gates.

        Raises:
            ValueError: There are not C counts.
        """
        model = module_of(self.forward_func)
        scores = self.gate.double().cpu()
        counts = torch.ones(len(scores)) if counts is None else counts
        if counts.shape != (len(scores),):
            raise ValueError(f"counts have shape {tuple(counts.shape)}; expected ({len(scores)},).")
        scores = torch.where(counts[:, None] > 0, scores, torch.full_like(scores, float("nan")))
        table = ClassFilters(
            scores=scores,
            counts=counts,
            class_names=class_names,
            layer=self._layer_names()[0],
            method=type(self).__name__,
            provenance=provenance(model, options=self.options),
        )
        return table if num_filters is None else table.select(num_filters=num_filters)
