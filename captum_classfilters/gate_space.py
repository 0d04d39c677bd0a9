"""Gate space: a model whose inputs are the gates of one layer's filters."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel.scatter_gather import scatter

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.devices import device_of
from captum_classfilters._core.guard import held
from captum_classfilters._core.layers import (
    along_filters,
    check_batch,
    check_runs,
    declared_filters,
    filters_before,
    find_layer,
    layer_name,
    layer_tensors,
    module_of,
    not_recorded,
)
from captum_classfilters._core.tables import bound_repr
from captum_classfilters._core.taps import BackwardTap, LayerTap, tapping_for
from captum_classfilters._core.types import ForwardFunc

_WITHOUT_GRADIENTS = (
    "gate a layer behind that part, or take a method that only runs the model (Captum's "
    "FeatureAblation)"
)


class FilterGate(nn.Module):
    r"""
    A model seen as a function of its filters' gates.

    ``FilterGate(model, layer)(gates, images)`` runs ``model(images)`` with filter *k* of ``layer``
    multiplied by ``gates[:, k]``. Gates of one leave the model as it is; a gate of zero removes a
    filter. Because the gates are the first argument and the images an additional forward argument,
    every Captum method and metric that explains *inputs* explains *filters* instead: pass ones as
    ``inputs``, zeros as ``baselines`` and the images as ``additional_forward_args``. The model runs in
    the mode that it is in: ``model.eval()`` comes first. Where activation checkpointing runs the layer
    again in the backward pass, it is gated again; the gate itself may be checkpointed, too. Threads may
    share the model: they wait for each other's forward passes.

    Args:

        forward_func (Callable): A module, a bound method of one, or any function that runs it.
                    A ``torch.nn.DataParallel`` model is supported; each replica uses the gates of
                    its own share of the batch.
        layer (nn.Module or str): The layer whose filters are gated, or its dotted name. Its
                    output is one tensor of shape (N, K), (N, K, L), (N, K, H, W) or
                    (N, K, D, H, W).
        num_filters (int, optional): K, where the layer does not declare it. It is also learned
                    from the first forward pass.
        channel_dim (int, optional): Axis of the filters, where it is not axis 1 and cannot be
                    told from the layer (``-1`` for channels-last blocks).
                    Default: None
        device_ids (list of int, optional): Devices of a ``DataParallel`` model that
                    ``forward_func`` hides.
                    Default: None

    Examples::

        >>> import torch
        >>> from captum.attr import FeatureAblation
        >>> from captum_classfilters import FilterGate
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
        ...     torch.nn.Linear(4, 2))
        >>> images = torch.rand(8, 3, 5, 5)
        >>> gate = FilterGate(net, net[0])
        >>> torch.equal(gate(gate.ones(8), images), net(images))
        True
        >>> # One score for each of the four filters of each image:
        >>> FeatureAblation(gate).attribute(
        ...     gate.ones(8), target=1, additional_forward_args=images).shape
        torch.Size([8, 4])
    """

    @arguments_checked
    def __init__(
        self,
        forward_func: Callable[..., Tensor],
        layer: nn.Module | str,
        num_filters: int | None = None,
        channel_dim: int | None = None,
        device_ids: list[int] | None = None,
    ) -> None:
        super().__init__()
        layers = [layer] if isinstance(layer, nn.Module) else []
        # Registered, so that moving the gate moves the model.
        self.model = module_of(forward_func, layers)
        self._function = None if isinstance(forward_func, nn.Module) else forward_func
        self._layer = (find_layer(self.model, layer) if isinstance(layer, str) else layer,)
        self.layer_name = layer_name(self.model, self.layer)
        self.channel_dim = channel_dim
        self.device_ids = device_ids or getattr(forward_func, "device_ids", None)
        # Only a first guess for `ones`: a forward pass corrects it, or says what is wrong.
        self._num_filters = (
            num_filters or declared_filters(self.layer) or filters_before(self.model, self.layer)
        )

    def __repr__(self) -> str:
        return bound_repr(self, self._called, self.layer)

    @property
    def _called(self) -> ForwardFunc | None:
        return self.model if self._function is None else self._function

    @property
    def layer(self) -> nn.Module:
        """The gated layer."""
        return self._layer[0]

    @property
    def num_filters(self) -> int:
        """K, the number of filters of the layer.

        Raises:
            RuntimeError: The layer declares no number of filters and has not run yet.
        """
        if self._num_filters is None:
            raise RuntimeError(
                f"The layer {self.layer_name!r} does not declare its number of filters; pass "
                "num_filters, or run the gated model once."
            )
        return self._num_filters

    @arguments_checked
    def ones(self, n: int) -> Tensor:
        """Open gates for ``n`` images.

        Args:

            n (int): Number of images.

        Returns:
            *Tensor* of shape (n, K), all ones, where the model is and in its type.
        """
        device = device_of(self.layer) or device_of(self.model)
        return torch.ones(n, self.num_filters, device=device, dtype=self._dtype())

    def _dtype(self) -> torch.dtype | None:
        """The type of the layer's own parameters or buffers, or else of the model's."""
        modules = [self.layer] if self.model is None else [self.layer, self.model]
        for module in modules:
            for tensor in (*module.parameters(), *module.buffers()):
                if tensor.is_floating_point():
                    return tensor.dtype
        return None

    def forward(self, gates: Tensor, *inputs: object) -> Tensor:
        """Run the model with its filters gated.

        Args:

            gates (Tensor): Shape (N, K), one gate per image and filter; (1, K) gates all images
                    alike.
            inputs: The model's own inputs, N images first.

        Returns:
            *Tensor*: The model's output.

        Raises:
            ValueError: The gates do not have the layer's number of filters, the layer puts out
                    something other than one tensor, it does not run exactly once, or it runs
                    without a record (``torch.no_grad()``, a reentrant checkpoint) though the gates
                    need a gradient.
        """
        shares = self._shares(gates)

        recorded = torch.is_grad_enabled()

        def gate(output: Tensor, axis: int) -> Tensor:
            if recorded and gates.requires_grad and not torch.is_grad_enabled():
                raise not_recorded(self.layer_name, _WITHOUT_GRADIENTS)
            return self._gated(shares.get(output.device, gates), output, axis)

        module = self._own_layer()
        tap = LayerTap(self.model, module, self.channel_dim, react=gate)
        owner = (self.model, self._function, self.layer)
        again = BackwardTap(module, tap.take, owner) if recorded else None
        with self._alone(), tapping_for(owner, tap):
            result: Tensor = self._called(*inputs)  # type: ignore[misc]
        tap.frozen = True
        if again is not None:  # checkpointed layers run again, gated as now
            again.follow(layer_tensors(result))
        check_runs(self.layer_name, max(map(len, tap.rows.values()), default=0), module)
        return result

    def _alone(self) -> AbstractContextManager[None]:
        """A block in which no other thread works on the model. A backward pass that runs the gate
        again does not wait: it may be in a thread of its own, and who waits for it hold the model."""
        if torch._C._current_autograd_node() is not None:
            return nullcontext()
        return held(self.layer if self.model is None else self.model)

    def _own_layer(self) -> nn.Module:
        """The gated layer; in a data-parallel replica of the gate, the replica's layer."""
        if self.model is None or self._function is not None:
            return self.layer
        if any(module is self.layer for module in self.model.modules()):
            return self.layer
        return find_layer(self.model, self.layer_name)

    def _shares(self, gates: Tensor) -> dict[torch.device, Tensor]:
        """The gates of each replica of a data-parallel model, by device."""
        if not self.device_ids or len(self.device_ids) < 2 or len(gates) == 1:
            return {}
        return {share.device: share for share in scatter(gates, self.device_ids)}

    def _gated(self, gates: Tensor, output: Tensor, axis: int) -> Tensor:
        self._num_filters = output.shape[axis]
        if gates.dim() != 2 or gates.shape[1] != output.shape[axis]:
            raise ValueError(
                f"The gates have shape {tuple(gates.shape)}, but the layer {self.layer_name!r} has "
                f"{output.shape[axis]} filters: expected ({output.shape[0]}, {output.shape[axis]})."
            )
        if len(gates) > 1:
            check_batch(self.layer_name, len(output), len(gates))
        return output * along_filters(gates.to(output), output, axis)
