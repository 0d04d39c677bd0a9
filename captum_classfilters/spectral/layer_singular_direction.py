"""Praggastis et al.: signals along the singular directions of a layer's weight."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import Tensor, nn

from captum_classfilters._core.captum import (
    TargetType,
    _forward_layer_eval,
    compute_layer_gradients_and_eval,
    format_tensor_into_tuples,
    log_usage,
)
from captum_classfilters._core.layers import check_batch, only_tensor, runs_once
from captum_classfilters.attr.base import LayerFilterAttribution, Layers
from captum_classfilters.spectral.layer_svd import LayerSVD, check_rank, matrix_svd
from captum_classfilters.spectral.signals import unbiased
from captum_classfilters.spectral.weight_matrix import weight_matrix

Evidence = Literal["signal", "contribution"]


class LayerSingularDirection(LayerFilterAttribution):
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
                    :func:`captum_classfilters.spectral.model_svd`, with a cache say. By default
                    they are computed when first needed, and again when the weight has changed.
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

    def __init__(
        self,
        forward_func: Callable[..., Tensor],
        layer: Layers | str | list[str],
        device_ids: list[int] | None = None,
        evidence: Evidence = "signal",
        rank: int | None = None,
        svds: Mapping[str, LayerSVD] | None = None,
    ) -> None:
        LayerFilterAttribution.__init__(self, forward_func, layer, device_ids)
        if evidence not in ("signal", "contribution"):
            raise ValueError(f"evidence={evidence!r}; choose 'signal' or 'contribution'.")
        self.evidence = evidence
        self.rank = rank
        self._given = svds
        self._found: dict[int, tuple[Tensor, LayerSVD]] = {}
        for module, name in zip(self._layers(), self._layer_names(), strict=True):
            if svds is not None and name not in svds:
                raise ValueError(f"svds holds no decomposition of {name!r}.")
            _, rows, columns = weight_matrix(module, name).matrices.shape
            if rank is not None:
                check_rank(rank, min(rows, columns), f"the layer {name!r}, {rows} x {columns}")

    @property
    def options(self) -> dict[str, Any]:
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
                return self._svd(module, name)
        raise ValueError(f"{layer!r} is not one of the layers {', '.join(names)}.")

    def _svd(self, module: nn.Module, name: str) -> LayerSVD:
        if self._given is not None:
            svd = self._given[name]
            return svd if self.rank is None else svd.truncate(self.rank)
        weight = module.weight
        assert isinstance(weight, Tensor)
        held = self._found.get(id(module))
        if held is None or held[0].shape != weight.shape or not _same(held[0], weight):
            svd = matrix_svd(weight_matrix(module, name), repr(name), self.rank, "auto", False)
            held = (weight.detach().clone(), svd)
            self._found[id(module)] = held
        return held[1]

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: TargetType = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
        grad_kwargs: dict[str, Any] | None = None,
    ) -> Any:
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
            ValueError: The layer does not run exactly once, or ``attribute_to_layer_input`` is True.
            AssertionError: The target does not fit the output, as everywhere in Captum.
        """
        if attribute_to_layer_input:
            raise ValueError(
                "Singular directions combine a layer's outputs; there are none of its input. Leave "
                "attribute_to_layer_input False."
            )
        signals, gradients = self._signals(inputs, target, additional_forward_args, grad_kwargs)
        parts: list[tuple[Tensor, ...]] = []
        for index, (name, svd) in enumerate(self._svds()):
            if gradients is None:
                positions = signals[index][0].numel() // len(svd)
                parts.append((signals[index] / positions,))
            else:
                slope = svd.signals(only_tensor(gradients[index], name).detach())
                parts.append((signals[index] * slope,))
        return self._formatted(parts)

    def signals(
        self, inputs: Tensor | tuple[Tensor, ...], additional_forward_args: Any = None
    ) -> Any:
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
        signals, _ = self._signals(inputs, None, additional_forward_args, None, gradients=False)
        return self._formatted([(one,) for one in signals])

    def _svds(self) -> list[tuple[str, LayerSVD]]:
        """Name and decomposition of each layer."""
        return [
            (name, self._svd(layer, name))
            for layer, name in zip(self._layers(), self._layer_names(), strict=True)
        ]

    def _signals(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: TargetType,
        additional_forward_args: Any,
        grad_kwargs: dict[str, Any] | None,
        gradients: bool | None = None,
    ) -> tuple[list[Tensor], list[Any] | None]:
        """Signals of each layer, and gradients at its output where contributions need them."""
        formatted: tuple[Tensor, ...] = format_tensor_into_tuples(inputs)
        wanted = self.evidence == "contribution" if gradients is None else gradients
        slopes, outputs = self._run(wanted, formatted, target, additional_forward_args, grad_kwargs)
        signals = []
        for layer, output, (name, svd) in zip(self._layers(), outputs, self._svds(), strict=True):
            tensor = only_tensor(output, name).detach()
            check_batch(name, len(tensor), len(formatted[0]))
            signals.append(svd.signals(unbiased(tensor, layer, svd.channel_axis)))
        return signals, slopes

    def _run(
        self,
        gradients: bool,
        inputs: tuple[Tensor, ...],
        target: TargetType,
        additional_forward_args: Any,
        grad_kwargs: dict[str, Any] | None,
    ) -> tuple[list[Any] | None, list[Any]]:
        """Gradients, if wanted, and outputs of the layers."""
        layers = self._layers()
        with runs_once(layers, self._layer_names):
            if gradients:
                slopes, activations = compute_layer_gradients_and_eval(
                    self.forward_func,
                    layers,
                    inputs,
                    target,
                    additional_forward_args,
                    device_ids=self.device_ids,
                    grad_kwargs=grad_kwargs,
                )
                return list(slopes), list(activations)
            outputs = _forward_layer_eval(
                self.forward_func,
                inputs,
                layers,
                additional_forward_args,
                device_ids=self.device_ids,
            )
        return None, list(outputs)


def _same(held: Tensor, weight: Tensor) -> bool:
    return held.device == weight.device and bool((held == weight).all())
