"""Images optimized to drive filters, directions and sums of them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm.auto import trange

from captum_classfilters._core.arguments import arguments_checked, check_numbers
from captum_classfilters._core.devices import device_of
from captum_classfilters._core.guard import model_left_as_found, weights_change
from captum_classfilters._core.layers import (
    CHECKPOINTED,
    find_layer,
    layer_name,
    only_tensor,
    positions_last,
)
from captum_classfilters._core.tables import short_repr
from captum_classfilters._core.taps import LayerTap, failing_layer, tapping
from captum_classfilters._core.warnings import warn

Position = tuple[int, ...] | Literal["center"] | None
Transform = Callable[[Tensor, torch.Generator], Tensor]


_MOST_TERMS = 8  # of a sum, when it is printed


@short_repr
@dataclass(frozen=True)
class _Term:
    """One weighted sum of a layer's filters, averaged over positions or at one of them."""

    layer: str | nn.Module
    filter: int | None
    direction: Tensor | None
    position: Position
    weight: float
    channel_dim: int | None

    def __str__(self) -> str:
        what = "a direction" if self.filter is None else f"filter {self.filter}"
        layer = self.layer if isinstance(self.layer, str) else type(self.layer).__name__
        factor = "" if self.weight == 1 else f"{self.weight:g} * "
        return f"{factor}{what} of {layer!r}" + (
            "" if self.position is None else f" at {self.position}"
        )


@dataclass(frozen=True)
class FeatureObjective:
    r"""
    What an image shall drive; made by :meth:`of_filter` and :meth:`of_direction`.

    Objectives add, and take numbers as factors, so that ``a - 0.5 * b`` drives *a* up and *b* down.

    Args:

        terms (tuple): Its summands.

    Examples::

        >>> from captum_classfilters.visualize import FeatureObjective
        >>> a, b = (FeatureObjective.of_filter("conv", k, position="center") for k in (0, 3))
        >>> a - 0.5 * b
        FeatureObjective(filter 0 of 'conv' at center + -0.5 * filter 3 of 'conv' at center)
    """

    terms: tuple[_Term, ...]

    def __str__(self) -> str:
        return " + ".join(map(str, self.terms))

    def __repr__(self) -> str:
        more = len(self.terms) - _MOST_TERMS
        told = " + ".join(map(str, self.terms[:_MOST_TERMS]))
        return (
            f"FeatureObjective({told} + … {more} more)" if more > 0 else f"FeatureObjective({self})"
        )

    @classmethod
    @arguments_checked
    def of_filter(
        cls,
        layer: str | nn.Module,
        filter: int,
        *,
        position: Position = None,
        channel_dim: int | None = None,
    ) -> "FeatureObjective":
        r"""
        A filter's mean over positions, or its value at one.

        Args:

            layer (str or nn.Module): The layer, or its dotted name.
            filter (int): The filter.
            position (tuple, str, optional): Indices into the layer's map, (row, column) for a
                        convolution, or ``"center"``; all positions by default.
                        Default: None
            channel_dim (int, optional): Axis of the filters, where the layer does not tell it.
                        Default: None

        Returns:
            *FeatureObjective*.
        """
        return cls((_Term(layer, filter, None, position, 1.0, channel_dim),))

    @classmethod
    @arguments_checked
    def of_direction(
        cls,
        layer: str | nn.Module,
        direction: Tensor,
        *,
        position: Position = None,
        channel_dim: int | None = None,
    ) -> "FeatureObjective":
        r"""
        A weighted sum of a layer's filters, a left singular vector for example.

        Args:

            layer (str or nn.Module): The layer, or its dotted name.
            direction (Tensor): Shape (K,), weights of the filters.
            position (tuple, str, optional): As in :meth:`of_filter`.
                        Default: None
            channel_dim (int, optional): Axis of the filters, where the layer does not tell it.
                        Default: None

        Returns:
            *FeatureObjective*.

        Raises:
            ValueError: The direction is not a vector.
        """
        if direction.dim() != 1:
            raise ValueError(
                f"direction has shape {tuple(direction.shape)}; expected a vector (K,), one column "
                "of the left singular vectors for example."
            )
        return cls((_Term(layer, None, direction.detach(), position, 1.0, channel_dim),))

    def __add__(self, other: "FeatureObjective") -> "FeatureObjective":
        return FeatureObjective(self.terms + other.terms)

    def __mul__(self, factor: float) -> "FeatureObjective":
        return FeatureObjective(
            tuple(replace(term, weight=term.weight * float(factor)) for term in self.terms)
        )

    __rmul__ = __mul__

    def __neg__(self) -> "FeatureObjective":
        return self * -1.0

    def __sub__(self, other: "FeatureObjective") -> "FeatureObjective":
        return self + -other


@short_repr
@dataclass(frozen=True)
class RandomTransform:
    r"""
    Shift, scale and turn every image at random, so that no single pixel pattern is driven.

    Args:

        jitter (float): Largest shift, as a share of the image's side.
                    Default: 1/16
        scale (tuple of float): Smallest and largest factor.
                    Default: (0.9, 1.1)
        rotate (float): Largest angle, in degrees, either way.
                    Default: 10.0
    """

    jitter: float = 1 / 16
    scale: tuple[float, float] = (0.9, 1.1)
    rotate: float = 10.0

    def __post_init__(self) -> None:
        check_numbers(self)

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Transform a batch.

        Args:

            images (Tensor): Shape (N, C, H, W).
            generator (torch.Generator): Where all randomness comes from, on the CPU.

        Returns:
            *Tensor* of the same shape; pixels from outside are the mirrored image's.
        """
        batch, _, height, width = images.shape
        draw = torch.rand(4, batch, generator=generator)
        angle = (2 * draw[0] - 1) * math.radians(self.rotate)
        factor = self.scale[0] + draw[1] * (self.scale[1] - self.scale[0])
        shift = 2 * self.jitter * (2 * draw[2:] - 1)  # the grid spans [-1, 1]
        cosine, sine = angle.cos() / factor, angle.sin() / factor
        # Coordinates are shares of the sides, so a turn of a rectangle needs their ratio.
        matrix = torch.stack(
            [
                torch.stack([cosine, -sine * height / width, shift[0]], -1),
                torch.stack([sine * width / height, cosine, shift[1]], -1),
            ],
            1,
        ).to(images)
        grid = nn.functional.affine_grid(matrix, list(images.shape), align_corners=False)
        return nn.functional.grid_sample(
            images, grid, padding_mode="reflection", align_corners=False
        )


@short_repr
@dataclass(frozen=True)
class FeatureVisualization:
    r"""
    Optimized images and what they reach.

    Args:

        images (Tensor): Shape (B, C, H, W), in [0, 1]: one image for each objective.
        values (Tensor): Shape (B,): the objectives at these images, untransformed.
        initial (Tensor): Shape (B,): the objectives at the images of the start.
        history (Tensor): Shape (steps, B): the objectives during optimization, transformed.
        optimized (Tensor): Shape (B,), bool: whether the objective had a gradient at any step. Where
                    it had none, the image is the noise that it started from.
    """

    images: Tensor
    values: Tensor
    initial: Tensor
    history: Tensor
    optimized: Tensor


@arguments_checked
def visualize_features(
    model: nn.Module,
    objectives: FeatureObjective | Sequence[FeatureObjective],
    image_shape: tuple[int, int, int] = (3, 224, 224),
    *,
    steps: int = 256,
    learning_rate: float = 0.05,
    parametrization: Literal["fourier", "pixel"] = "fourier",
    color_root: Tensor | None = None,
    transform: Transform | Literal["default"] | None = "default",
    normalize: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
    show_progress: bool = True,
) -> FeatureVisualization:
    r"""
    Optimize one image for each objective by gradient ascent.

    The image is a sigmoid of free parameters: pixels, or Fourier coefficients divided by their
    frequency, which makes low frequencies as easy to move as high ones. All images are optimized
    in one batch by Adam. Random numbers come from a generator of their own; the global random state
    is not touched, and on the CPU the same seed gives the same images.

    Source: Olah, Mordvintsev and Schubert: *Feature Visualization*, Distill (2017),
    https://doi.org/10.23915/distill.00007.

    Args:

        model (nn.Module): The model, with one image input. It runs in evaluation mode and is left
                    as found.
        objectives (FeatureObjective or sequence): What each image shall drive. The same objective
                    twice gives two images, from different starts.
        image_shape (tuple of int): (C, H, W) of the model's input.
                    Default: (3, 224, 224)
        steps (int): Steps of Adam.
                    Default: 256
        learning_rate (float): Of Adam.
                    Default: 0.05
        parametrization (str): ``"fourier"`` or ``"pixel"``.
                    Default: "fourier"
        color_root (Tensor, optional): Shape (C, C): :func:`color_root` of images like the
                    model's, so that colors vary together as they do there. Without it channels
                    are independent.
                    Default: None
        transform (Callable, optional): Called with the images and a generator at each step; by
                    default :class:`RandomTransform`, and ``None`` transforms nothing.
        normalize (Callable, optional): From images in [0, 1] to what the model expects,
                    ``torchvision.transforms.Normalize(mean, std)`` say.
                    Default: None
        seed (int): Of the start and the transforms.
                    Default: 0
        show_progress (bool): Show a progress bar.
                    Default: True

    Returns:
        *FeatureVisualization*.

    Raises:
        ValueError: An option, a filter, a direction or a position does not fit the model, the model
            takes no images of this shape, or an objective becomes NaN.

    Examples::

        >>> import torch
        >>> from captum_classfilters.visualize import FeatureObjective, visualize_features
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU())
        >>> objective = FeatureObjective.of_filter("0", 2, position="center")
        >>> seen = visualize_features(
        ...     net, [objective, -objective], (3, 16, 16), steps=8, show_progress=False)
        >>> seen.images.shape
        torch.Size([2, 3, 16, 16])
        >>> bool((seen.values > seen.initial).all())
        True
    """
    wanted = _checked_objectives(objectives)
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise ValueError(f"image_shape={image_shape}; expected (C, H, W).")
    if steps < 1:
        raise ValueError(f"steps={steps}; expected a positive number.")
    if isinstance(transform, str):
        if transform != "default":
            raise ValueError(f"transform={transform!r}; expected a callable, or None.")
        transform = RandomTransform()
    generator = torch.Generator().manual_seed(seed)
    with weights_change():
        picture = _Picture(
            parametrization,
            (len(wanted), *image_shape),
            color_root,
            generator,
            device_of(model) or torch.device("cpu"),
        )
        with model_left_as_found(model, evaluation=True, freeze=True):
            probe = _Probe(model, wanted, normalize)
            result = _ascend(
                picture, probe, steps, learning_rate, transform, generator, show_progress
            )
    _warn_of_still_images(result, wanted)
    return result


def _checked_objectives(
    objectives: FeatureObjective | Sequence[FeatureObjective],
) -> list[FeatureObjective]:
    wanted = [objectives] if isinstance(objectives, FeatureObjective) else list(objectives)
    strange = [type(entry).__name__ for entry in wanted if not isinstance(entry, FeatureObjective)]
    if strange or not wanted:
        raise ValueError(
            f"The objectives hold {', '.join(strange) or 'nothing'}; expected objects that "
            "FeatureObjective.of_filter or .of_direction makes."
        )
    return wanted


def _ascend(
    picture: "_Picture",
    probe: "_Probe",
    steps: int,
    learning_rate: float,
    transform: Transform | None,
    generator: torch.Generator,
    show_progress: bool,
) -> FeatureVisualization:
    """Adam on the free parameters of the images."""
    with torch.no_grad():
        initial = probe(picture.images()).cpu()
    optimizer = torch.optim.Adam([picture.parameter], lr=learning_rate)
    history = []
    moved = torch.zeros(len(initial), dtype=torch.bool, device=picture.parameter.device)
    bar = trange(steps, desc="optimizing", unit="step", disable=not show_progress)
    for _ in bar:
        images = picture.images()
        values = probe(images if transform is None else transform(images, generator))
        if not values.requires_grad:
            raise ValueError(
                "The objectives have no gradient towards the image: the model's forward pass detaches "
                "its tensors, or runs under torch.no_grad, before the layers of the objectives; "
                f"{CHECKPOINTED}."
            )
        history.append(values.detach().cpu())
        _check_finite(history[-1], learning_rate)
        optimizer.zero_grad()
        (-values.sum()).backward()
        gradient = picture.parameter.grad
        assert gradient is not None
        moved |= (gradient != 0).flatten(1).any(1)
        optimizer.step()
        bar.set_postfix(objective=f"{float(history[-1].mean()):.3g}", refresh=False)
    with torch.no_grad():
        final = picture.images()
        reached = probe(final).cpu()
    return FeatureVisualization(final.cpu(), reached, initial, torch.stack(history), moved.cpu())


def _check_finite(values: Tensor, learning_rate: float) -> None:
    wrong = (~values.isfinite()).nonzero()
    if len(wrong):
        raise ValueError(
            f"Objective {int(wrong[0])} became NaN or infinite; lower the learning rate "
            f"({learning_rate}), and look at the model's weights."
        )


def _warn_of_still_images(
    result: FeatureVisualization, objectives: Sequence[FeatureObjective]
) -> None:
    """Name the objectives without a gradient, of dead filters for example."""
    still = (~result.optimized).nonzero()[:, 0].tolist()
    if not still:
        return
    named = ", ".join(f"{index} ({objectives[index]})" for index in still[:5])
    named += f" and {len(still) - 5} more" if len(still) > 5 else ""
    warn(
        f"Nothing was optimized for {len(still)} of {len(objectives)} objectives, {named}: the gradient "
        "was zero at every step, so the image is the noise that it started from. A filter behind a "
        "ReLU that no image drives has none; take the layer before the ReLU, or another seed.",
    )


@arguments_checked
def color_root(images: Tensor) -> Tensor:
    r"""
    A matrix that gives independent channels the colors' covariance, scaled to unit norm.

    Args:

        images (Tensor): Shape (N, C, H, W), in [0, 1].

    Returns:
        *Tensor* of shape (C, C): the symmetric root of the pixels' covariance, divided by its
        largest column norm.

    Raises:
        ValueError: The images do not have this shape.

    Examples::

        >>> import torch
        >>> from captum_classfilters.visualize import color_root
        >>> gray = torch.rand(4, 1, 8, 8).expand(4, 3, 8, 8)
        >>> color_root(gray).allclose(torch.full((3, 3), 3 ** -0.5), atol=1e-4)
        True
    """
    if images.dim() != 4:
        raise ValueError(f"images have shape {tuple(images.shape)}; expected (N, C, H, W).")
    pixels = images.detach().double().movedim(1, 0).flatten(1)
    pixels = pixels - pixels.mean(1, keepdim=True)
    values, vectors = torch.linalg.eigh(pixels @ pixels.T / pixels.shape[1])
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    return (root / root.norm(dim=0).max().clamp(min=1e-12)).float()


class _Picture:
    """Images as a function of free parameters."""

    def __init__(
        self,
        parametrization: str,
        shape: tuple[int, ...],
        colors: Tensor | None,
        generator: torch.Generator,
        device: torch.device,
    ) -> None:
        channels, height, width = shape[1:]
        if colors is not None and tuple(colors.shape) != (channels, channels):
            raise ValueError(
                f"color_root has shape {tuple(colors.shape)}; images of {channels} channels need "
                f"({channels}, {channels})."
            )
        self.colors = None if colors is None else colors.to(device)
        self.size = (height, width)
        self.scale: Tensor | None = None
        if parametrization == "fourier":
            rows = torch.fft.fftfreq(height)[:, None] * height
            columns = torch.fft.rfftfreq(width)[None] * width
            cycles = (rows.square() + columns.square()).sqrt().clamp(min=1)
            # The root undoes the norm of the transform: at any size, a coefficient of one moves
            # pixels by 1 / (2 cycles), and steps of one size move the image alike.
            factor = math.sqrt(height * width) / cycles
            self.scale = (factor / 4)[..., None].to(device)
            shape = (*shape[:2], height, width // 2 + 1, 2)
        elif parametrization != "pixel":
            raise ValueError(f"parametrization={parametrization!r}; choose 'fourier' or 'pixel'.")
        start = 0.01 * torch.randn(shape, generator=generator)
        self.parameter = start.to(device).requires_grad_()

    def images(self) -> Tensor:
        """Shape (B, C, H, W), in [0, 1]."""
        values = self.parameter
        if self.scale is not None:
            spectrum = torch.view_as_complex(values * self.scale)
            values = torch.fft.irfft2(spectrum, s=self.size, norm="ortho")
        if self.colors is not None:
            values = torch.einsum("nchw,dc->ndhw", values, self.colors)
        return values.sigmoid()


class _Probe:
    """The objectives' values at a batch, the b-th image's under the b-th objective."""

    def __init__(
        self,
        model: nn.Module,
        objectives: Sequence[FeatureObjective],
        normalize: Callable[[Tensor], Tensor] | None,
    ) -> None:
        self.model, self.num_objectives, self.normalize = model, len(objectives), normalize
        floating = (p.dtype for p in model.parameters() if p.is_floating_point())
        self.dtype = next(floating, torch.float32)
        self.by_layer: dict[nn.Module, list[tuple[int, _Term]]] = {}
        for index, objective in enumerate(objectives):
            for term in objective.terms:
                layer = term.layer
                module = find_layer(model, layer) if isinstance(layer, str) else layer
                self.by_layer.setdefault(module, []).append((index, term))

    def __call__(self, images: Tensor) -> Tensor:
        """Values (B,), in float32 at least."""
        taps = [self._tap(module) for module in self.by_layer]
        images = images if self.normalize is None else self.normalize(images)
        images = images.to(self.dtype)
        try:
            with tapping(taps):
                self.model(images)
        except Exception as error:
            self._check_takes(images, error)
            raise
        parts: list[list[Tensor]] = [[] for _ in range(self.num_objectives)]
        # Not in the forward pass: a checkpointed layer runs again later, without what is done there.
        for tap, terms in zip(taps, self.by_layer.values(), strict=True):
            tap.check(self.num_objectives)
            for index, term in terms:
                tap.channel_dim = term.channel_dim
                tensor = tap.tensor
                parts[index].append(_value(term, tap.name, tensor, tap.axis_of(tensor), index))
        return torch.stack([torch.stack(part).sum() for part in parts])

    def _check_takes(self, images: Tensor, error: Exception) -> None:
        """Raise in words if one of PyTorch's layers fails, not an objective, nor a module with words
        of its own."""
        if isinstance(error, torch.OutOfMemoryError):
            return
        with torch.no_grad():
            failed = failing_layer(self.model, (images,))
        if type(failed).__module__.startswith("torch.nn."):
            name = f"{layer_name(self.model, failed)!r} ({type(failed).__name__})"
            raise ValueError(
                f"visualize_features makes images (N, C, H, W), here of shape {tuple(images.shape)}, and "
                f"the model fails on them in its layer {name}. Give the image_shape that the model takes; "
                "one of sequences, volumes or tokens takes no images."
            ) from error

    def _tap(self, module: nn.Module) -> "_Kept":
        return _Kept(self.model, module, self.by_layer[module][0][1].channel_dim)


class _Kept(LayerTap):
    """Keeps a layer's tensor."""

    tensor: Tensor

    def take(self, value: object) -> Tensor:
        """Keep the tensor; a copy goes on, as what follows may write into it."""
        self.tensor = only_tensor(value, self.name)
        self.count(self.tensor)
        return self.tensor.clone()


def _value(term: _Term, name: str, tensor: Tensor, axis: int, row: int) -> Tensor:
    """One term's value at one image of the layer's output."""
    positions = (*tensor.shape[1:axis], *tensor.shape[axis + 1 :])
    maps = positions_last(tensor[row : row + 1], axis)[0]
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    if term.filter is not None:
        if not 0 <= term.filter < len(maps):
            raise ValueError(
                f"filter={term.filter}; the layer {name!r} has filters 0 to {len(maps) - 1}."
            )
        units = maps[term.filter]
    else:
        assert term.direction is not None
        if len(term.direction) != len(maps):
            raise ValueError(
                f"direction has {len(term.direction)} entries; the layer {name!r} has {len(maps)} "
                "filters."
            )
        units = term.direction.to(maps) @ maps
    if term.position is None:
        return term.weight * units.mean()
    place = term.position
    if place == "center":
        place = tuple(size // 2 for size in positions)
    inside = (
        isinstance(place, tuple)
        and len(place) == len(positions)
        and all(0 <= at < size for at, size in zip(place, positions, strict=True))
    )
    if not inside:
        raise ValueError(
            f"position={place!r}; the layer {name!r} has positions of shape {positions}: give an index "
            "into it, or 'center'."
        )
    return term.weight * units.reshape(positions)[place]
