"""The linear layer at the end of a model, and how another layer feeds it: seen, not assumed."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_classfilters._core.devices import without_autocast
from captum_classfilters._core.guard import model_left_as_found
from captum_classfilters._core.layers import positions_last
from captum_classfilters._core.linear_maps import holds_weight
from captum_classfilters._core.outputs import class_scores
from captum_classfilters._core.taps import hooked, tapped
from captum_classfilters._core.types import ForwardFunc, ModelInputs

Feed = Literal["identical", "mean", "flatten"]

_MOST_EARLIER = 4  # linear layers that may run after the head


def is_linear(module: nn.Module) -> bool:
    """Whether a module is by its class linear over channels: ``nn.Linear``, an ungrouped 1x1
    convolution. What it really does is seen when it runs, or by :func:`computes_its_weight`."""
    if isinstance(module, nn.Linear):
        return True
    return (
        isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        and module.groups == 1
        and all(size == 1 for size in module.kernel_size)
        and all(size == 1 for size in module.stride)
        and not any(size for size in module.padding if not isinstance(size, str))
    )


@dataclass
class HeadRecord:
    """The last linear layer that ran in a forward pass, its input and its output; once the pass has
    ended and :meth:`settle` was called, the one whose output is the model's, if it is among the last."""

    module: nn.Module | None = None
    features: Tensor | None = None
    logits: Tensor | None = None
    runs: dict[int, int] = field(default_factory=dict)
    _versions: tuple[int, int] = (0, 0)
    _earlier: "deque[HeadRecord]" = field(default_factory=lambda: deque(maxlen=_MOST_EARLIER))

    def see(self, module: nn.Module, features: Tensor, logits: Tensor) -> None:
        """Take note of a linear layer that has just run; a 1x1 convolution of one position is one."""
        if features.dim() > 2 and features.shape[2:].numel() == logits.shape[2:].numel() == 1:
            features, logits = features.flatten(1), logits.flatten(1)
        if self.logits is not None and self.logits.dim() == 2:
            self._earlier.append(replace(self, _earlier=deque()))
        self.module, self.features, self.logits = module, features, logits
        self.runs[id(module)] = self.runs.get(id(module), 0) + 1
        self._versions = _version(features), _version(logits)

    def settle(self, output: object) -> None:
        """Take the layer that put out what the model returned: others may run after it, whose outputs
        the model only returns beside its scores, or not at all."""
        scores: Tensor | None = None
        with suppress(ValueError):
            scores = class_scores(output)
        if not self.is_output(scores):
            own = next((each for each in reversed(self._earlier) if each.is_output(scores)), self)
            self.module, self.features, self.logits = own.module, own.features, own.logits
            self._versions = own._versions
        self._earlier.clear()

    def is_output(self, output: object) -> bool:
        """Whether the model's output is this layer's own tensor (N, C), not written into since, from
        a single use of the layer. Nothing is read from a device for it."""
        return (
            isinstance(output, Tensor)
            and self.logits is not None
            and self.features is not None
            and self.runs.get(id(self.module)) == 1
            and self.logits.dim() == 2
            and (output.shape == self.logits.shape or output.shape == (self.logits.numel(),))
            and output.data_ptr() == self.logits.data_ptr()
            and (_version(self.features), _version(output)) == self._versions
        )

    def computes_its_weight(self) -> Tensor:
        """Whether the recorded output is the recorded input times the layer's weight, plus its
        bias: a bool of no axes on the model's device. A class may be linear and its forward not."""
        assert self.features is not None
        assert self.logits is not None
        with without_autocast(self.logits.device):
            features = self.features.detach()
            if not features.is_floating_point() or features.shape[1] != self.weight.shape[1]:
                return torch.zeros((), dtype=torch.bool, device=features.device)
            plain = linear_output(self.weight, self.bias, features)
        return alike(plain, self.logits.detach(), features.dtype)

    @property
    def weight(self) -> Tensor:
        """Weight as a matrix (C, K)."""
        weight: Tensor = self.module.weight  # type: ignore[union-attr,assignment]
        return weight.detach().flatten(1)

    @property
    def bias(self) -> Tensor:
        """Bias (C,), zeros where the layer has none."""
        bias = getattr(self.module, "bias", None)
        return self.weight.new_zeros(len(self.weight)) if bias is None else bias.detach()


def in_another_row(
    forward_func: ForwardFunc,
    head: nn.Module,
    axis: int,
    inputs: ModelInputs,
    before: Tensor,
) -> tuple[int, int | None] | None:
    r"""
    An output of a head that is not the score of its own class, and the class whose score it raises.

    The model runs again, and for each image one of the outputs is raised above all of the head's: the
    score of the same class must rise most, or be the highest then. It need not rise most where scores
    are normalized: those far below zero come nearer to it. Nor need it be the highest where a prior is
    added. What a random layer seems to do is judged by two runs with the same random numbers.

    Args:

        forward_func (Callable): The model.
        head (nn.Module): Its head.
        axis (int): Axis of the head's outputs, as many as there are classes.
        inputs (tuple): A batch.
        before (Tensor): Shape (N, C) or (N, C, ...), the scores of the batch.

    Returns:
        *tuple* of the output and the class, None in its place if no score rises; or None.
    """
    number = before.shape[1]
    images = torch.arange(len(before), device=before.device)
    classes = images % number if len(images) >= number else images * number // len(images)

    def raised(output: Tensor) -> Tensor | None:
        if len(output) != len(classes):  # crops of images, in whatever order
            return None
        rise = output.amax() - output.amin() + 1
        rows = output.movedim(axis, 1).clone()
        rows[images.to(output.device), classes.to(output.device)] += rise
        return rows.movedim(1, axis)

    with model_left_as_found(None), tapped(head, raised):
        after = class_scores(forward_func(*inputs))
    found = _not_raised(before, after, classes)
    if found is None:
        return None
    with model_left_as_found(None):
        return _not_raised(class_scores(forward_func(*inputs)), after, classes)


def _not_raised(before: Tensor, after: Tensor, classes: Tensor) -> tuple[int, int | None] | None:
    """The first class of an image's own whose score is not what rose, and which rose instead."""
    before, after = (
        (scores.flatten(2).mean(2) if scores.dim() > 2 else scores).double()
        for scores in (before, after)
    )
    known = before.isfinite() & after.isfinite()  # classes may be switched off
    moved = (after - before).masked_fill(~known, 0)
    least = 1e-4 * before.masked_fill(~before.isfinite(), 0).abs().max()
    others = after.scatter(1, classes[:, None], -torch.inf)
    highest = after.gather(1, classes[:, None])[:, 0] > others.amax(1)
    wrong = (moved.abs().amax(1) > least) & (moved.argmax(1) != classes) & ~highest
    if not bool(wrong.any()):
        return None
    image = int(wrong.nonzero()[0, 0])
    rise, other = moved[image].max(0)
    return int(classes[image]), int(other) if bool(rise > least) else None


def linear_output(weight: Tensor, bias: Tensor, features: Tensor) -> Tensor:
    """Features (N, K) or (N, K, ...) through a weight (C, K) and a bias (C,), in the weight's type."""
    moved = features.to(weight.dtype).movedim(1, -1)
    return F.linear(moved, weight, bias.to(weight.dtype)).movedim(-1, 1)


@contextmanager
def record_head(model: nn.Module | None, known: nn.Module | None = None) -> Iterator[HeadRecord]:
    """Record the last linear layer of each forward pass made inside the block; or the one that is
    known to be the head, so that the others need no hook."""
    record = HeadRecord()

    def hook(module: nn.Module, inputs: ModelInputs, output: object) -> None:
        if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
            record.see(module, inputs[0], output)

    if known is not None:
        linear = [known]
    else:
        linear = [] if model is None else [m for m in model.modules() if is_linear(m)]
    with hooked(linear, hook):
        yield record


def computes_its_weight(module: nn.Module) -> bool:
    """Whether a head puts out its weight times its input plus its bias, tried on random numbers.

    For questions that are asked without images. Hooks on the head count as part of it.
    """
    if not is_linear(module) or not holds_weight(module):
        return False
    generator = torch.Generator().manual_seed(0)
    training = module.training
    try:
        module.eval()
        weight: Tensor = module.weight  # type: ignore[assignment]
        shape = (4, weight.shape[1], *[1] * (weight.dim() - 2))
        features = torch.randn(shape, generator=generator).to(weight)
        with torch.no_grad(), record_head(module) as record:
            module(features)
        return record.logits is not None and bool(record.computes_its_weight())
    except Exception:  # whatever a foreign forward raises, plain it is not
        return False
    finally:
        module.train(training)


def candidate_feed(features: Tensor, activation: Tensor, axis: int) -> tuple[Feed, Tensor] | None:
    r"""
    How a layer's tensor may become the head's input, and whether the numbers bear it out.

    Args:

        features (Tensor): The head's input, (N, F), or (N, F, ...) for a 1x1 convolution.
        activation (Tensor): The layer's tensor with its filters on ``axis``.
        axis (int): The axis of the filters.

    Returns:
        *tuple* of the only way that the shapes allow and a bool of no axes on the model's device,
        or None where they allow none.
    """
    if len(features) != len(activation):
        return None
    if features.dim() != 2:  # a convolutional head sees the layer's own maps
        whole = features.shape == activation.shape
        return ("identical", alike(activation, features)) if whole else None
    maps = positions_last(activation, axis)
    num_filters, num_positions = maps.shape[1:]
    if features.shape[1] == num_filters:
        if num_positions == 1:
            return "identical", alike(maps[:, :, 0], features)
        return "mean", alike(maps.mean(2), features)
    if features.shape[1] == num_filters * num_positions:
        return "flatten", alike(maps.flatten(1), features)
    return None


def how_layer_feeds(features: Tensor, activation: Tensor, axis: int) -> Feed | None:
    """How a layer's tensor becomes the head's input, or None; see :func:`candidate_feed`."""
    candidate = candidate_feed(features, activation, axis)
    return candidate[0] if candidate is not None and bool(candidate[1]) else None


def alike(left: Tensor, right: Tensor, *computed_in: torch.dtype) -> Tensor:
    """Whether two tensors hold the same finite numbers up to rounding, as a bool of no axes on
    their device. The coarsest of their types, and of those named, says what rounding is."""
    types = [t for t in (left.dtype, right.dtype, *computed_in) if t.is_floating_point]
    eps = max((rounding(t, right.device) for t in types), default=0.0)
    wide = torch.promote_types(left.dtype, right.dtype)
    left, right = left.detach().to(wide), right.detach().to(wide)
    if not right.numel():
        return torch.ones((), dtype=torch.bool, device=right.device)
    size = right.abs()
    allowed = (
        max(1e-5, 4 * eps) * size.amax().clamp(min=torch.finfo(torch.float32).tiny)
        + max(1e-4, 4 * eps) * size
    )
    return ((left - right).abs() <= allowed).all() & right.isfinite().all()


def rounding(dtype: torch.dtype, device: torch.device) -> float:
    """The relative error of a single operation: that of the type, or of TensorFloat-32 where a GPU
    may compute in it, whose results depend on the size of the batch."""
    tensor_float = torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32
    if dtype == torch.float32 and device.type == "cuda" and tensor_float:
        return 2.0**-10
    return torch.finfo(dtype).eps


def _version(tensor: Tensor) -> int:
    """How often a tensor was written into; inference tensors do not count it."""
    return 0 if tensor.is_inference() else tensor._version
