"""Liang et al.: a gate between classes and filters, trained with the network."""

import copy
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from captum_classfilters._core.arguments import arguments_checked, real_number
from captum_classfilters._core.labels import class_labels
from captum_classfilters._core.layers import (
    along_filters,
    check_runs,
    filter_axis,
    find_layer,
)
from captum_classfilters._core.taps import LayerTap, tapping
from captum_classfilters._core.training import half_precision_advice

Projection = Literal["rescale", "euclidean"]
Regularizer = Literal["hinge", "l1", "column_limit", "l12", "column_maximum"]
Distance = Literal["l1", "l2", "smooth_l1"]

# Which gate is attached to a layer.
_gate_of: weakref.WeakKeyDictionary[nn.Module, "weakref.ref[ClassSpecificGate]"] = (
    weakref.WeakKeyDictionary()
)


class ClassSpecificGate(nn.Module):
    r"""
    A matrix of gates that says which filters a class may use, trained with the network.

    With G in [0, 1] of shape (C, K), a training image of class *y* passes the layer a second time
    with filter *k* multiplied by :math:`G_{yk}`. Every filter stays fully open for some class,

    .. math:: V_G = \{ G \in [0, 1]^{C \times K} : \max_c G_{ck} = 1 \text{ for every } k \} ,

    and a regularizer pulls the gates towards few open classes for each filter. Because the gated
    path must classify through its class's filters alone, filters become specific to classes:

    .. math:: \min_{\theta, G \in V_G} \mathrm{CE}(y, \hat y) + \lambda_1
              \mathrm{CE}(y, \hat y_G) + \lambda_2 R(G) .

    The gate is attached to any layer of any model, which does not change the model. It acts inside
    :meth:`gating` only: **prediction always uses the ungated path**.

    A copy of what holds both model and gate has its gate attached to the copied layer: of a pickle
    always, of :func:`copy.deepcopy` if it comes upon the model first, as in a module that is given its
    network before its gate. Otherwise, and where a gate is copied alone, call :meth:`attach` again.

    Source: Liang, Ouyang, Zeng, Su, He, Xia, Zhu, Zhang: *Training Interpretable Convolutional Neural
    Networks by Differentiating Class-specific Filters*, ECCV 2020,
    https://arxiv.org/abs/2007.08194.

    Args:

        num_classes (int): C.
        num_filters (int): K.
        initial (float, str, Tensor or array): A constant in [0, 1]; ``"uniform"`` for random gates
                    in [0, 1]; or a matrix (C, K).
                    Default: 0.5
        projection (str): ``"rescale"`` divides each filter's gates by their largest and clips them,
                    as the authors do, with their corner cases mended; ``"euclidean"`` goes to the
                    nearest point of V_G. Rescaling undoes what shrinks all gates of a filter alike,
                    as the regularizer does, so that the gate of a trained network, whose gated loss
                    is small from the start, hardly closes.
                    Default: "rescale"

    Raises:
        ValueError: The initial gates have another shape, hold NaN, or leave [0, 1].

    Examples::

        >>> import torch
        >>> from captum_classfilters.gates import ClassSpecificGate
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        ...     torch.nn.Flatten(), torch.nn.Linear(8, 2))
        >>> images, labels = torch.rand(4, 3, 6, 6), torch.tensor([0, 1, 1, 0])
        >>> gate = ClassSpecificGate(num_classes=2, num_filters=8).attach(net, "1")
        >>> with gate.gating(labels):
        ...     logits = net(images)
        >>> loss = torch.nn.functional.cross_entropy(logits, labels) + 1e-3 * gate.regularizer()
        >>> loss.backward()
        >>> gate.project()
        >>> gate.detach()
    """

    @arguments_checked
    def __init__(
        self,
        num_classes: int,
        num_filters: int,
        initial: float | str | Tensor | ArrayLike = 0.5,
        projection: Projection = "rescale",
    ) -> None:
        super().__init__()
        if num_classes < 1 or num_filters < 1:
            raise ValueError(f"A gate of {num_classes} classes and {num_filters} filters is empty.")
        if projection not in ("rescale", "euclidean"):
            raise ValueError(f"projection={projection!r}; choose 'rescale' or 'euclidean'.")
        self.num_classes = num_classes
        self.num_filters = num_filters
        self.projection = projection
        self.weight = nn.Parameter(_initial(num_classes, num_filters, initial))
        self._gating = False
        # Whoever holds the gate holds the layer, not the other way round.
        self._tap: LayerTap | None = None

    # -- attaching -------------------------------------------------------------------------------

    @property
    def attached(self) -> bool:
        """Whether the gate is attached to a layer."""
        return self._tap is not None

    @arguments_checked
    def attach(
        self, model: nn.Module, layer: nn.Module | str, channel_dim: int | None = None
    ) -> "ClassSpecificGate":
        """Attach the gate to a layer.

        Args:

            model (nn.Module): The model.
            layer (nn.Module or str): The layer, or its dotted name.
            channel_dim (int, optional): Axis of the filters, where it cannot be told.

        Returns:
            *ClassSpecificGate*: The gate itself.

        Raises:
            ValueError: The gate, or another one on this layer, is attached already, or the model has
                        no such layer.
        """
        if self._tap is not None:
            raise ValueError("The gate is attached already; detach() it first.")
        module = find_layer(model, layer) if isinstance(layer, str) else layer
        if not any(part is module for part in model.modules()):
            raise ValueError(f"The layer {type(module).__name__} is not part of the model.")
        tap = LayerTap(model, module, channel_dim)
        self._take_place(tap)
        if self._tap is None:
            raise ValueError(
                f"Another gate is attached to the layer {tap.name!r}; detach() it first."
            )
        return self

    def _take_place(self, tap: LayerTap | None) -> None:
        """Be attached to a layer, unless another gate is."""
        if tap is not None and _gate_at(tap.module) in (None, self):
            _gate_of[tap.module] = weakref.ref(self)
            self._tap = tap
        else:
            self._tap = None

    def detach(self) -> None:
        """Attach the gate to no layer; without one, nothing happens."""
        if self._tap is not None:
            _gate_of.pop(self._tap.module, None)
        self._tap = None

    @contextmanager
    def gating(self, labels: Tensor, *, check: bool = True) -> Iterator["ClassSpecificGate"]:
        """Inside this block the model's forward passes take the gated path.

        Args:

            labels (Tensor): Shape (N,), the class of each image of the batch.
            check (bool): Refuse labels out of range and gates that are not finite. A loop that has
                        seen to both spares an accelerator the wait.
                        Default: True

        Raises:
            ValueError: The gate is not attached or holds NaN, labels are missing, of a wrong type or
                        out of range, blocks are nested, or the layer did not run.
        """
        if self._tap is None:
            raise ValueError("The gate is not attached to a layer; call attach(model, layer).")
        if self._gating:
            raise ValueError("The gate is on already; gating() blocks cannot be nested.")
        if check:
            self._check_finite()
            labels = self._checked_labels(labels)
        tap = copy.copy(self._tap)
        tap.react = lambda output, axis: self._gated(output, labels, axis)
        self._gating = True
        try:
            with tapping([tap]):
                yield self
        finally:
            self._gating = False
        if not tap.rows:
            check_runs(tap.name, 0)

    def _checked_labels(self, labels: Tensor) -> Tensor:
        try:
            num_images = len(labels)
        except TypeError:
            raise ValueError(
                "The gated path needs the labels of the batch, a Tensor (N,) of class indices; got "
                f"{type(labels).__name__}."
            ) from None
        return class_labels(labels, num_images, self.num_classes, batch=0)

    def forward(
        self,
        activation: Tensor,
        labels: Tensor,
        channel_dim: int | None = None,
        layer: nn.Module | None = None,
    ) -> Tensor:
        """Gate a layer's activations.

        Args:

            activation (Tensor): Shape (N, K, ...), or with the filters on ``channel_dim``.
            labels (Tensor): Shape (N,).
            channel_dim (int, optional): Axis of the filters.
            layer (nn.Module, optional): The layer, to tell that axis from.

        Returns:
            *Tensor* of the same shape.

        Raises:
            ValueError: The activations have another number of filters or images, or the labels are
                        no class indices of the gate.
        """
        labels = self._checked_labels(labels)
        return self._gated(activation, labels, filter_axis(layer, activation, channel_dim))

    def _gated(self, activation: Tensor, labels: Tensor, axis: int) -> Tensor:
        if activation.shape[axis] != self.num_filters or len(activation) != len(labels):
            raise ValueError(
                f"The layer puts out {tuple(activation.shape)} for {len(labels)} labels, but the "
                f"gate has {self.num_filters} filters; expected ({len(labels)}, "
                f"{self.num_filters}, ...)."
            )
        gates = self.weight[labels.to(self.weight.device)]
        return activation * along_filters(gates.to(activation), activation, axis)

    def _check_finite(self) -> None:
        if not bool(torch.isfinite(self.weight).all()):
            raise gates_not_finite()

    # -- constraint and regularizer --------------------------------------------------------------

    @torch.no_grad()
    def project(self, *, check: bool = True) -> None:
        r"""
        Bring the gates back into V_G, in place; call it after every step of the gate's optimizer.

        ``"rescale"``: each column is divided by its largest entry (signed, not absolute) and clipped
        to [0, 1]. The released formula gives NaN for a column of zeros and opens a column of
        negative entries fully; here, as in ``"euclidean"``, the largest entry of such a column is
        set to one and the others are clipped. ``"euclidean"`` does that for every column: of all
        points of V_G, the nearest sets the largest entry to one and clips the rest. Equal entries
        count as largest in the order of the classes.

        Args:

            check (bool): Refuse gates that are not finite.
                        Default: True

        Raises:
            ValueError: The gates hold NaN or Inf.
        """
        if check:
            self._check_finite()
        gates = self.weight
        largest, row = gates.max(0)
        opened = gates.clamp(0, 1)
        opened[row, torch.arange(self.num_filters, device=gates.device)] = 1.0
        if self.projection == "rescale":
            usable = largest > torch.finfo(gates.dtype).eps
            scaled = (gates / torch.where(usable, largest, torch.ones_like(largest))).clamp(0, 1)
            opened = torch.where(usable, scaled, opened)
        gates.copy_(opened)

    @arguments_checked
    def regularizer(
        self,
        kind: Regularizer = "hinge",
        limit: float | None = None,
        distance: Distance = "l1",
    ) -> Tensor:
        r"""
        The sparsity term R(G).

        - ``"hinge"``: :math:`d(\max(0, \lVert G \rVert_1 - g))` with *g* = ``limit``, K by default
          (one class for each filter; the released code for VOC has 0.2 C K); *d* the identity, the
          square, or its smooth mixture.
        - ``"l1"``: :math:`\lVert G \rVert_1`.
        - ``"column_limit"``: :math:`\sum_k \max(0, \lVert G_{\cdot k} \rVert_1 - g)`, *g* =
          ``limit``, 0.3 C by default.
        - ``"l12"``: :math:`(\sum_k \lVert G_{\cdot k} \rVert_1^2)^{1/2}`.
        - ``"column_maximum"``: :math:`\sum_k \max_c G_{ck}`.

        Args:

            kind (str): One of the above.
                        Default: "hinge"
            limit (float, optional): *g*.
                        Default: None
            distance (str): ``"l1"``, ``"l2"`` or ``"smooth_l1"``, for ``"hinge"``.
                        Default: "l1"

        Returns:
            *Tensor*, a differentiable scalar.
        """
        columns = self.weight.abs().sum(0)
        if kind == "hinge":
            excess = torch.relu(columns.sum() - (self.num_filters if limit is None else limit))
            return _distance(excess, distance)
        if kind == "l1":
            return columns.sum()
        if kind == "column_limit":
            return torch.relu(columns - (0.3 * self.num_classes if limit is None else limit)).sum()
        if kind == "l12":
            return torch.linalg.vector_norm(columns)  # whose derivative at zero is zero
        if kind == "column_maximum":
            return self.weight.max(0).values.sum()
        raise ValueError(
            f"kind={kind!r}; choose 'hinge', 'l1', 'column_limit', 'l12' or 'column_maximum'."
        )

    @property
    def density(self) -> float:
        r"""L1-density :math:`\lVert G \rVert_1 / (C K)`; at least 1/C inside V_G."""
        return float(self.weight.detach().abs().mean())

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        place = f", attached to {self._tap.name!r}" if self._tap else ""
        return (
            f"num_classes={self.num_classes}, num_filters={self.num_filters}, "
            f"projection={self.projection!r}{place}"
        )

    # A copy is attached to the copy of its layer, where whatever holds both is copied. Whether a layer
    # that has not been copied yet will be, or the gate is copied alone, cannot be told here.
    def __deepcopy__(self, memo: dict[int, object]) -> "ClassSpecificGate":
        copied = ClassSpecificGate(
            self.num_classes, self.num_filters, projection=self.projection
        ).to(self.weight)
        copied.load_state_dict(self.state_dict())
        copied.train(self.training).weight.requires_grad_(self.weight.requires_grad)
        memo[id(self)] = copied
        if self._tap is not None and id(self._tap.module) in memo:  # the layer is copied, too
            copied._take_place(copy.deepcopy(self._tap, memo))
        return copied

    def __setstate__(self, state: dict[str, object]) -> None:  # of a pickle, or copy.copy
        super().__setstate__(state)
        self._take_place(self._tap)


def _gate_at(layer: nn.Module) -> ClassSpecificGate | None:
    """The gate that is attached to a layer."""
    return _gate_of[layer]() if layer in _gate_of else None


def gates_not_finite(parameters: Iterable[Tensor] = ()) -> ValueError:
    """The error for gates that hold NaN or Inf, beside the parameters of a model that is trained."""
    return ValueError(
        "The gates hold NaN or Inf: an input or the loss was not finite, or the gate's learning rate "
        f"is too high.{half_precision_advice(parameters)}"
    )


def _initial(
    num_classes: int, num_filters: int, initial: float | str | Tensor | ArrayLike
) -> Tensor:
    shape = (num_classes, num_filters)
    several = isinstance(initial, (list, tuple)) or getattr(initial, "shape", ()) != ()
    if several:
        try:
            initial = torch.as_tensor(initial)
        except (TypeError, ValueError) as error:
            raise ValueError(f"The initial gates are no matrix of numbers: {error}") from error
        if initial.shape != shape:
            raise ValueError(f"The initial gates have shape {tuple(initial.shape)}; not {shape}.")
        if not bool(torch.isfinite(initial).all()):
            raise ValueError("The initial gates hold NaN or Inf.")
        if not 0 <= float(initial.min()) <= float(initial.max()) <= 1:
            raise ValueError(
                f"The initial gates reach from {float(initial.min()):.3g} to "
                f"{float(initial.max()):.3g}; expected [0, 1]."
            )
        return initial.detach().clone().to(torch.get_default_dtype())
    if initial == "uniform":
        return torch.rand(shape)
    number = real_number(initial)
    if number is not None and 0 <= number <= 1:
        return torch.full(shape, number)
    raise ValueError(
        f"initial={initial!r}; give a number in [0, 1], 'uniform', or a matrix (C, K)."
    )


def _distance(excess: Tensor, distance: Distance) -> Tensor:
    if distance == "l1":
        return excess
    if distance == "l2":
        return excess.square()
    if distance == "smooth_l1":
        return torch.where(excess < 1, 0.5 * excess.square(), excess - 0.5)
    raise ValueError(f"distance={distance!r}; choose 'l1', 'l2' or 'smooth_l1'.")
