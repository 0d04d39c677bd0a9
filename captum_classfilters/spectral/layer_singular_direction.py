"""Praggastis et al.: signals along the singular directions of a layer's weight."""

import copy
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.captum import TargetType, log_usage
from captum_classfilters._core.devices import sums_device
from captum_classfilters._core.forward import FilterMaps
from captum_classfilters._core.layers import layer_name, module_of
from captum_classfilters._core.linear_maps import TRANSPOSED, as_in_use
from captum_classfilters._core.types import Attributions, JsonDict, Keywords
from captum_classfilters._core.units import projected_bias
from captum_classfilters.attr.base import Layers, WeightedFilterAttribution
from captum_classfilters.spectral.layer_svd import LayerSVD, check_rank, matrix_svd
from captum_classfilters.spectral.weight_matrix import WeightMatrix, unfold, weight_matrix

Evidence = Literal["signal", "contribution"]


class LayerSingularDirection(WeightedFilterAttribution):
    r"""
    Evidence of an image along the singular directions of a layer's weight.

    The features are not the layer's filters but the left singular vectors :math:`u_a` of its
    unfolded weight: fixed combinations of filters, ordered by how strongly the layer can respond
    along them. With *y* the layer's output and *b* its bias, the signal of direction *a* is

    .. math:: p_{a h w} = u_a^\top (y_{h w} - b) ,

    and its contribution to the target's score :math:`F_c` is the signal times the gradient along
    the direction,

    .. math:: \phi_a = \sum_{h, w} p_{a h w} \; u_a^\top \frac{\partial F_c}{\partial y_{h w}} .

    Over all directions the contributions have the sum that the filters' contributions have,
    :math:`\sum (y - b) \, \partial F_c / \partial y`: directions and filters are two bases of one
    space. A contribution does not depend on the sign of :math:`u_a`; a signal does, and the sign is
    fixed by :func:`captum_classfilters.spectral.layer_svd`. For a table of classes contributions
    are therefore the better evidence.

    Source: Praggastis et al.: *The SVD of Convolutional Weights: A CNN Interpretability Framework*
    (2022), https://arxiv.org/abs/2208.06894. The output is read before an activation in place can
    overwrite it.

    The table of :meth:`identify` is over directions. Its layer is called ``"<layer>.directions"``,
    which is where they are in the model that
    :func:`captum_classfilters.spectral.factor_layer` makes: an equal model in which the directions
    *are* the filters of a layer, so that gates, ablations and metrics take the table.

    Args:

        forward_func (Callable): The forward function of the model.
        layer (nn.Module, str or list of these): The convolution or linear layer, its dotted name, or
                    several of them.
        device_ids (list of int, optional): Devices of a hidden ``DataParallel`` model.
                    Default: None
        evidence (str): ``"signal"`` or ``"contribution"``.
                    Default: "signal"
        rank (int, optional): Only the first so many directions (of each group).
                    Default: None
        svds (mapping, optional): Decompositions by the layers' names, as from
                    :func:`captum_classfilters.spectral.model_svd`, with a cache for example; they
                    must be those of the weights as they are. By default they are computed when first
                    needed, and again when the weight has changed.
                    Default: None

    Examples::

        >>> import torch
        >>> from captum_classfilters import LayerSingularDirection
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        ...     torch.nn.Flatten(), torch.nn.Linear(8, 2))
        >>> directions = LayerSingularDirection(net, "0", evidence="contribution")
        >>> attributions = directions.attribute(torch.rand(4, 3, 6, 6), target=1)
        >>> attributions.shape, directions.filter_scores(attributions).shape
        (torch.Size([4, 8, 4, 4]), torch.Size([4, 8]))
        >>> data = [(torch.rand(4, 3, 6, 6), torch.tensor([0, 1, 1, 0]))]
        >>> directions.identify(data, num_filters=2, show_progress=False).layer
        '0.directions'
    """

    features_name = "directions"

    @arguments_checked
    def __init__(
        self,
        forward_func: Callable[..., Tensor],
        layer: Layers | str | list[str],
        device_ids: list[int] | None = None,
        evidence: Evidence = "signal",
        rank: int | None = None,
        svds: Mapping[str, LayerSVD] | None = None,
    ) -> None:
        WeightedFilterAttribution.__init__(self, forward_func, layer, device_ids)
        if evidence not in ("signal", "contribution"):
            raise ValueError(f"evidence={evidence!r}; choose 'signal' or 'contribution'.")
        self.evidence = evidence
        self.depends_on_target = self.needs_derivative = evidence == "contribution"
        self.rank = rank
        self._given: dict[str, LayerSVD] | None = None if svds is None else {}
        # The weight of each layer when it was last decomposed, and what it gave; what was seen to be
        # current in this pass.
        self._made: dict[int, tuple[Tensor, LayerSVD]] = {}
        self._current: dict[int, LayerSVD] = {}
        for module, name in zip(self._layers(), self._layer_names(), strict=True):
            _, rows, columns = weight_matrix(module, name).matrices.shape
            if rank is not None:
                check_rank(rank, min(rows, columns), f"the layer {name!r}, {rows} x {columns}")
            if svds is not None and self._given is not None:
                if name not in svds:
                    raise ValueError(f"svds holds no decomposition of {name!r}.")
                self._given[name] = svds[name] if rank is None else svds[name].truncate(rank)

    def __copy__(self) -> "LayerSingularDirection":
        """A copy, as every pass over a data set works on, looks anew whether weights have changed."""
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__, _current={})
        return copied

    @property
    def options(self) -> JsonDict:
        """The method's own options, for the record."""
        return {"evidence": self.evidence, "rank": self.rank}

    def svd(self, layer: nn.Module | str | None = None) -> LayerSVD:
        r"""
        The decomposition of a layer's weight as it is now.

        Args:

            layer (nn.Module or str, optional): Which of the layers; may be left out if there is one.

        Returns:
            *LayerSVD*.

        Raises:
            ValueError: The layer is not one of this method's.
        """
        modules, names = self._layers(), self._layer_names()
        if layer is None and len(modules) == 1:
            layer = modules[0]
        for module, name in zip(modules, names, strict=True):
            if layer is module or layer == name:
                self._current = {}
                return self._svd(module)
        raise ValueError(f"{layer!r} is not one of the layers {', '.join(names)}.")

    def features_of(self, maps: FilterMaps, module: nn.Module) -> FilterMaps:
        """The maps of the directions: projections of the layer's output without its bias."""
        matrix = self._svd(module).left
        if maps.at_input or maps.num_filters != len(matrix):
            raise _outputs_only()
        return maps.projected(matrix, projected_bias(module, matrix))

    def weights_from(self, maps: FilterMaps, target: TargetType) -> Tensor:
        """The rule: the derivative along the direction, or alike for signals, whose sum over
        positions is then their mean."""
        if self.evidence == "contribution":
            return maps.derivative(target)
        return torch.full_like(maps.means, 1 / maps.num_positions)[:, :, None]

    def _svd(self, module: nn.Module) -> LayerSVD:
        """The decomposition of a layer; its weight is looked at once in a pass."""
        key = id(module)
        if key not in self._current:
            name = layer_name(module_of(self.forward_func, [module]), module)
            weight = _weight_in_use(module, name)
            if self._given is not None:
                svd = self._given[name].to(weight.matrices.device)
                _check_made_of(svd, weight, name)
            else:
                held = self._made.get(key)
                if held is None or not _same(held[0], weight.matrices):
                    svd = matrix_svd(weight, repr(name), self.rank, "auto", False)
                    held = (weight.matrices.clone(), svd)
                    self._made[key] = held
                svd = held[1]
            self._current[key] = svd
        return self._current[key]

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: TargetType = None,
        additional_forward_args: object = None,
        attribute_to_layer_input: bool = False,
        grad_kwargs: Keywords | None = None,
    ) -> Attributions:
        r"""
        Args:

            inputs (Tensor or tuple[Tensor, ...]): Input of the model, N examples first.
            target (int, tuple, Tensor or list, optional): The output to explain, in any of
                        Captum's forms. Signals do not depend on it.
                        Default: None
            additional_forward_args (Any, optional): Further arguments of the forward function.
                        Default: None
            attribute_to_layer_input (bool): Must be False: directions combine the layer's outputs.
                        Default: False
            grad_kwargs (dict, optional): Passed on to ``torch.autograd.grad``.
                        Default: None

        Returns:
            *Tensor* or *list* of **attributions**:
            - **attributions** (*Tensor*, or *list* for several layers):
                        Shaped like the layer with R directions in place of its filters: (N, R, ...)
                        for a convolution, (N, ..., R) for a linear layer. Contributions in units of
                        the output; or signals divided by the number of positions, in units of the
                        layer's output, so that the sum over positions is the mean signal.

        Raises:
            ValueError: The layer does not run exactly once, ``attribute_to_layer_input`` is True, or
                        a decomposition that was given is not that of the weight.
            AssertionError: The target does not fit the output, as everywhere in Captum.
        """
        if attribute_to_layer_input:
            raise _outputs_only()
        self._current = {}
        with self._forward(inputs, additional_forward_args, grad_kwargs=grad_kwargs) as reading:
            return self._formatted(
                self._like_layers(
                    reading,
                    lambda maps, module: self.maps_from(self.features_of(maps, module), target),
                )
            )

    def signals(
        self, inputs: Tensor | tuple[Tensor, ...], additional_forward_args: object = None
    ) -> Attributions:
        r"""
        The signals themselves, :math:`U^\top (y - b)`.

        For several layers of a large model at once, or for means alone, see
        :func:`captum_classfilters.spectral.direction_signals`.

        Args:

            inputs (Tensor or tuple[Tensor, ...]): Input of the model, N examples first.
            additional_forward_args (Any, optional): Further arguments of the forward function.
                        Default: None

        Returns:
            *Tensor*, or *list* for several layers: (N, R, ...) or (N, ..., R), in units of the
            layer's output.
        """
        method = copy.copy(self)
        method.needs_derivative = False
        with method._forward(inputs, additional_forward_args) as reading:
            return self._formatted(
                self._like_layers(
                    reading, lambda maps, module: method.features_of(maps, module).maps
                )
            )


def _outputs_only() -> ValueError:
    return ValueError(
        "Singular directions combine a layer's outputs; there are none of its input. Leave "
        "attribute_to_layer_input False."
    )


def _weight_in_use(module: nn.Module, name: str) -> WeightMatrix:
    """The unfolded weight as it is now. That the layer computes it was tried when the method was made;
    in a forward pass, with hooks on the layer, it cannot be tried."""
    kind = "linear" if isinstance(module, nn.Linear) else "convolution"
    kind = f"transposed {kind}" if isinstance(module, TRANSPOSED) else kind
    with as_in_use(module):
        weight: Any = module.weight
    groups: Any = getattr(module, "groups", 1)
    return unfold(weight.detach(), kind, groups, f"{type(module).__name__} {name!r}")


def _same(held: Tensor, weight: Tensor) -> bool:
    alike = held.shape == weight.shape and held.device == weight.device
    return alike and bool((held == weight).all())


def _check_made_of(svd: LayerSVD, weight: WeightMatrix, name: str) -> None:
    """Raise unless a decomposition is that of a weight: U^T W has rows of the singular values' size."""
    fits = svd.groups == len(weight.matrices) and svd.shape == tuple(weight.matrices.shape[1:])
    if fits:
        where = sums_device(svd.values.device)
        blocks, values = svd.blocks.to(where).double(), svd.values.to(where)
        rows = blocks.mT @ weight.matrices.to(where).double()
        off = (rows.norm(dim=2).flatten() - values).abs().max()
        fits = bool(off <= 1e-3 * values.max())
    if not fits:
        raise ValueError(
            f"The decomposition given for {name!r} is not that of its weight as it is now; make it "
            "anew, model_svd(model) for example, or leave svds out."
        )
