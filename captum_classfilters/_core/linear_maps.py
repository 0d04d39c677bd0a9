"""Whether a convolution or linear layer computes what its weight says: tried, not believed."""

import math
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from captum_classfilters._core.devices import device_of, without_autocast
from captum_classfilters._core.guard import model_left_as_found
from captum_classfilters._core.names import kind_of

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LINEAR_MAPS = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)

_CONVOLVE = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSE = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_QUANTIZED = (
    "torch.ao.nn.quantized",
    "torch.ao.nn.intrinsic.quantized",
    "torch.ao.nn.sparse.quantized",
)
_INPUTS = 4
_LARGE = 100  # entries of a kernel from which one input is enough
_MOST_COLUMNS = 64
# Methods that may be overridden without a change of what the forward pass computes.
_HARMLESS = {"reset_parameters", "extra_repr", "initialize_parameters"}


def weight_in_use(module: nn.Module) -> tuple[Tensor, str | None]:
    r"""
    The weight that a convolution or linear layer computes with at inference, and why that is not the
    whole story, if it is not.

    A layer that runs PyTorch's own forward is taken at its word. Any other is run on random inputs with
    zeros around: every column that it puts out must be the weight times one patch of its input, plus
    the bias. So padding of its own is allowed, but not a weight that is standardized, adapted or
    quantized on the way, nor anything that is done to the input or output. Masks of pruning and
    parametrizations are part of the weight. Hooks of the user's are no part of the layer: they are not
    called.
    """
    with as_in_use(module) as layer:
        if runs_pytorchs_forward(module) or not _has_numbers(module):
            return layer.weight.detach(), None  # type: ignore[operator]
        try:
            inputs = trial_inputs(layer)
            outputs = layer(inputs)  # here hooks renew a weight that they derive
            if not isinstance(outputs, Tensor):
                reason: str | None = f"its forward gives {kind_of(outputs)}"
            else:
                reason = _departure(layer, inputs, outputs)
        except Exception as error:  # whatever a foreign forward raises, plain it is not
            told = f"{type(error).__name__}: {error}"
            reason = f"its forward cannot be tried on random numbers ({told})"
        return layer.weight.detach(), reason  # type: ignore[operator]


def holds_weight(module: nn.Module) -> bool:
    """Whether a module has a tensor of this name, told without computing it: in training mode a
    parametrization may change by being read, spectral normalization's does."""
    if is_parametrized(module, "weight"):
        return True
    return isinstance(getattr(module, "weight", None), Tensor)


def weight_at_inference(module: nn.Module) -> Tensor | None:
    """The weight that a module computes with at inference, without gradients; None where it has no
    such tensor. One that hooks derive in each run may be that of an earlier state of the layer, before
    ``load_state_dict`` for example: a convolution or linear layer derives it anew here."""
    if not holds_weight(module):
        return None
    if isinstance(module, LINEAR_MAPS) and _derived(module):
        return weight_in_use(module)[0]
    with as_in_use(module) as layer:
        return layer.weight.detach()  # type: ignore[operator]


def is_quantized(module: nn.Module) -> bool:
    """Whether a layer's weight is packed integers. PyTorch's quantized layers unpack it by a method; a
    method of that name in a class from elsewhere says nothing, so the package is asked for, too."""
    kind = type(module)
    packs = callable(getattr(kind, "weight", None)) or hasattr(kind, "_weight_bias")
    return packs and any(base.__module__.startswith(_QUANTIZED) for base in kind.__mro__)


def check_not_quantized(module: nn.Module, called: str, instead: str) -> None:
    """Raise if a layer's weight is packed integers; ``instead`` is what to use, and how."""
    if is_quantized(module):
        raise ValueError(
            f"{called} is quantized: its weight is packed integers. {instead} that it was made from."
        )


def why_not_its_weight(module: nn.Module) -> str | None:
    """Why a layer is not the map of its weight and bias, or None; see :func:`weight_in_use`."""
    lazy = any(map(is_lazy, module.parameters()))
    return None if lazy else weight_in_use(module)[1]


def _has_numbers(module: nn.Module) -> bool:
    """Whether a layer can be run at all; what is wrong with its weight others say."""
    parameters = list(module.parameters())
    return bool(parameters) and not any(
        is_lazy(parameter) or parameter.is_meta or not parameter.numel() for parameter in parameters
    )


def runs_pytorchs_forward(module: nn.Module) -> bool:
    """Whether a layer neither overrides what PyTorch's class computes with, nor has hooks that derive
    its weight."""
    kind = next(kind for kind in LINEAR_MAPS if isinstance(module, kind))
    above = [cls for cls in kind.__mro__ if issubclass(cls, nn.Module) and cls is not nn.Module]
    computing = {
        name
        for cls in above
        for name, value in vars(cls).items()
        if callable(value) and not name.startswith("__")
    } - _HARMLESS
    below = type(module).__mro__[: type(module).__mro__.index(kind)]
    return not (_derived(module) or any(computing & set(vars(own)) for own in (module, *below)))


def _derived(module: nn.Module) -> bool:
    """Whether hooks set a layer's weight before it runs, as pruning does; it is no parameter then."""
    return "weight" in vars(module)


@contextmanager
def as_in_use(module: nn.Module) -> Iterator[nn.Module]:
    """A block with a layer as it is at inference, without the user's hooks: a stand-in that shares its
    parts. Buffers come back as they were."""
    owned = [
        (owner, name, buffer, buffer.clone())
        for owner in module.modules()
        for name, buffer in owner.named_buffers(recurse=False)
    ]
    device = device_of(module) or torch.device("cpu")
    with model_left_as_found(module), torch.no_grad(), without_autocast(device):
        for part in module.modules():
            part.training = False  # `eval()` would merge adapters of some libraries for good
        try:
            yield _without_hooks(module, type(module), keep_deriving=True)
        finally:
            for owner, name, buffer, saved in owned:
                if getattr(owner, name) is not buffer:
                    setattr(owner, name, buffer)
                if not buffer.is_meta and not torch.equal(buffer, saved):
                    buffer.data = saved  # an observer may have given it another shape


def _without_hooks(
    module: nn.Module, cls: type[nn.Module], keep_deriving: bool = False
) -> nn.Module:
    """Another object of a class with all that a module holds but its hooks."""
    bare: Any = cls.__new__(cls)
    vars(bare).update(vars(module))
    bare._forward_hooks = OrderedDict()
    if not (keep_deriving and _derived(module)):
        bare._forward_pre_hooks = OrderedDict()
    result: nn.Module = bare
    return result


def run_with_weight(module: nn.Module, weight: Tensor, inputs: Tensor) -> Tensor:
    """A layer's output with another weight, of any number of filters, without bias and hooks."""
    layer = _without_hooks(module, type_before_parametrizations(module))
    replaced = {"weight": weight}
    if getattr(module, "bias", None) is not None:
        replaced["bias"] = weight.new_zeros(_filters_of(module, weight))
    if "weight" not in dict(module.named_parameters(recurse=False)):
        layer.weight = replaced.pop("weight")
    result: Tensor = functional_call(layer, replaced, (inputs,))
    return result


def _filters_of(module: object, weight: Tensor) -> int:
    return weight.shape[1] * module.groups if isinstance(module, TRANSPOSED) else len(weight)


def trial_inputs(module: nn.Module) -> Tensor:
    """Random inputs that a layer takes, around a convolution's with zeros for any padding."""
    layer: Any = module
    # A derived weight may still be of the type and on the device of the last run.
    floating = (parameter for parameter in module.parameters() if parameter.is_floating_point())
    like = next(floating, torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    if isinstance(module, nn.Linear):
        return torch.randn(2 * _INPUTS, layer.weight.shape[1], generator=generator).to(like)
    kernel = layer.weight.shape[2:]
    reach = [d * (k - 1) + 1 for d, k in zip(layer.dilation, kernel, strict=True)]
    inner = [r + s for r, s in zip(reach, layer.stride, strict=True)]
    number = _INPUTS if math.prod(reach) <= _LARGE else 1
    values = torch.randn(number, layer.in_channels, *inner, generator=generator)
    around = [size for r in reversed(reach) for size in (max(r - 1, 1),) * 2]
    return F.pad(values, around).to(like)


def _departure(module: Any, inputs: Tensor, outputs: Tensor) -> str | None:
    """How outputs differ from what weight and bias give, if they do."""
    weight, bias = module.weight, module.bias
    expected = _columns(_without_padding(module, inputs))
    if outputs.dim() != inputs.dim() or outputs.shape[1] != expected.shape[1]:
        return f"its forward gives the shape {tuple(outputs.shape)} for {tuple(inputs.shape)}"
    got = _columns(outputs)
    shift = 0.0
    if bias is not None:
        got, shift = got - bias.double().cpu(), float(bias.abs().max())
    size = float(expected.abs().max())
    eps = torch.finfo(weight.dtype).eps
    exact = weight.device.type == "cpu"  # accelerators may multiply in TF32
    allowed = max(1e-4 if exact else 2e-3, 4 * eps) * size + 4 * eps * shift
    if not isinstance(module, nn.Linear):
        # A column outside the input is zero; which patch a column belongs to, padding decides.
        expected = torch.cat([expected, torch.zeros_like(expected[:1])])
        got = _some_columns(got)
        distances = torch.cdist(got, expected, p=math.inf)
        error = float(distances.amin(1).max())
    else:
        error = float((got - expected).abs().max())
    if error <= allowed:
        if size == 0 or float(got.abs().max()) > 2 * allowed:
            return None
        return "what its forward makes of its weight is too small to be seen beside its bias"
    off = f"off by {error / size:.2g} of the largest value" if size else "not zero as they are"
    return f"its forward gives other numbers than its weight and bias do, {off}"


def _without_padding(module: Any, inputs: Tensor) -> Tensor:
    """The weight at every patch of the input."""
    wide = torch.promote_types(module.weight.dtype, torch.float32)
    weight, inputs, dimensions = module.weight.to(wide), inputs.to(wide), module.weight.dim() - 2
    if isinstance(module, nn.Linear):
        return F.linear(inputs, weight)
    if isinstance(module, TRANSPOSED):
        return _TRANSPOSE[dimensions - 1](
            inputs, weight, None, module.stride, 0, 0, module.groups, module.dilation
        )
    return _CONVOLVE[dimensions - 1](inputs, weight, None, 1, 0, module.dilation, module.groups)


def _columns(maps: Tensor) -> Tensor:
    """(N, d, ...) as rows of d numbers, one for each position, in float64 on the CPU."""
    return maps.detach().movedim(1, -1).flatten(0, -2).cpu().double()


def _some_columns(columns: Tensor) -> Tensor:
    """The largest columns, and as many that are spread over all."""
    if len(columns) <= 2 * _MOST_COLUMNS:
        return columns
    largest = columns.abs().amax(1).topk(_MOST_COLUMNS).indices
    spread = torch.linspace(0, len(columns) - 1, _MOST_COLUMNS).long()
    return columns[torch.cat([largest, spread]).unique()]
