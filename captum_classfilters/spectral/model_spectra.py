"""Random-matrix statistics of the weights of a model."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor, nn

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.copies import copied
from captum_classfilters._core.guard import model_left_as_found
from captum_classfilters._core.names import hint
from captum_classfilters._core.tables import Row, Table, Tabular, short_repr
from captum_classfilters.spectral.eigenvalues import eigenvalues
from captum_classfilters.spectral.marchenko_pastur import (
    MarchenkoPasturFit,
    fit_marchenko_pastur,
    positive_numbers,
)
from captum_classfilters.spectral.model_svd import ModelSVD, model_svd
from captum_classfilters.spectral.power_law import PowerLaw, fit_power_law, random_exponents
from captum_classfilters.spectral.weight_matrix import UnfitWeightError, WeightMatrix, can_decompose

if TYPE_CHECKING:
    import pandas

Verdict = Literal["good", "fair", "untrained"]
_GOOD_UP_TO, _FAIR_UP_TO = 4.0, 7.0
_SIGNIFICANT = 0.05
_FORMATS = {"largest eigenvalue": ".4g"}
_OF_TWIN = ("alpha", "largest eigenvalue", "verdict")


def layer_verdict(alpha: float, p_value: float = 0.0) -> Verdict:
    r"""
    How well trained a layer looks, by :math:`\mu = 2 (\alpha - 1)`.

    Heavy tails tell trained weights from random ones: ``"good"`` for :math:`\mu` up to 4
    (:math:`\alpha` up to 3), ``"fair"`` up to 7, ``"untrained"`` above. A tail that random matrices
    of the layer's shape have as well is ``"untrained"`` whatever its exponent: six of twenty random
    (64, 27) have exponents below 3.

    Args:

        alpha (float): The exponent of :func:`fit_power_law`.
        p_value (float): How many random matrices of the same shape have as low an exponent; above
                    0.05, it says nothing.
                    Default: 0

    Returns:
        *str*.
    """
    if not alpha > 1:
        raise ValueError(f"alpha={alpha} is no exponent of a power law; it must be above 1.")
    mu = 2 * (alpha - 1)
    if mu > _FAIR_UP_TO or p_value > _SIGNIFICANT:
        return "untrained"
    return "good" if mu <= _GOOD_UP_TO else "fair"


@short_repr
@dataclass(frozen=True)
class LayerSpectrum:
    r"""
    The eigenvalues of one layer's weight, and what random-matrix theory says of them.

    Args:

        name (str): The layer.
        shape (tuple of int): Rows and columns of the matrix (of one group).
        values (Tensor): Eigenvalues, falling; see :func:`eigenvalues`.
        power_law (PowerLaw): Its tail.
        marchenko_pastur (MarchenkoPasturFit): Its bulk.
    """

    name: str
    shape: tuple[int, int]
    values: Tensor
    power_law: PowerLaw
    marchenko_pastur: MarchenkoPasturFit

    @property
    def largest(self) -> float:
        """The largest eigenvalue."""
        return float(self.values[0])

    @property
    def p_value(self) -> float:
        """The share of random matrices of this shape, this one counted with them, whose exponent is
        as low; see :func:`random_exponents`."""
        rows, columns = self.shape
        null = random_exponents(rows, columns, max(1, len(self.values) // min(self.shape)))
        as_low = sum(alpha <= self.power_law.alpha for alpha in null)
        return (1 + as_low) / (1 + len(null))

    @property
    def verdict(self) -> Verdict:
        """See :func:`layer_verdict`; random matrices are only drawn where they matter."""
        verdict = layer_verdict(self.power_law.alpha)
        if verdict == "untrained":
            return verdict
        return layer_verdict(self.power_law.alpha, self.p_value)

    @property
    def weighted_exponent(self) -> float:
        r""":math:`\alpha \ln \lambda_{max}`."""
        return self.power_law.alpha * math.log(self.largest)


@short_repr
@dataclass(frozen=True)
class ModelSpectra(Tabular):
    r"""
    The spectra of a model's layers, in the model's order. Prints as a table.

    Args:

        layers (tuple of LayerSpectrum): One for each layer.
        skipped (dict): Layers without a spectrum, and why.
    """

    layers: tuple[LayerSpectrum, ...]
    skipped: dict[str, str]

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[LayerSpectrum]:
        return iter(self.layers)

    def __getitem__(self, name: str) -> LayerSpectrum:
        for layer in self.layers:
            if layer.name == name:
                return layer
        if isinstance(name, str) and name in self.skipped:
            raise KeyError(f"{name!r} was skipped: {self.skipped[name]}.")
        raise KeyError(
            f"{name!r} is not among the layers. {hint(name, [layer.name for layer in self.layers])}"
        )

    def _tables(self) -> list[Table]:
        told = [f"{name} has no spectrum: {reason}." for name, reason in self.skipped.items()]
        rows = [_row(layer) for layer in self.layers]
        return [Table(rows, _FORMATS, notes=told, index="layer", most=None)]

    @property
    def universal_metric(self) -> float:
        r"""The mean over layers of :math:`\alpha \ln \lambda_{max}`."""
        return sum(layer.weighted_exponent for layer in self.layers) / len(self.layers)


def model_spectra(model: nn.Module | ModelSVD, layers: Sequence[str] | None = None) -> ModelSpectra:
    r"""
    Random-matrix statistics of every convolution and linear layer of a model.

    Only singular values are computed, one layer at a time. Layers with fewer than two different
    eigenvalues, a head of one output for example, have no tail to fit; they are listed as skipped, as
    are those whose weight is not finite, or is not what the layer computes.

    Args:

        model (nn.Module or ModelSVD): The model, only read; or its decompositions.
        layers (sequence of str, optional): Names of the layers; by default all.

    Returns:
        *ModelSpectra*.

    Raises:
        ValueError: As for :func:`model_svd`, or no layer has a spectrum.

    Examples::

        >>> import torch
        >>> from captum_classfilters.spectral import model_spectra
        >>> _ = torch.manual_seed(0)
        >>> spectra = model_spectra(torch.nn.Sequential(torch.nn.Linear(300, 200)))
        >>> spectra["0"].verdict, spectra["0"].marchenko_pastur.num_outliers
        ('untrained', 0)
    """
    svds = model if isinstance(model, ModelSVD) else model_svd(model)
    if layers is not None:
        svds = model_svd(svds.model, layers)
    return _spectra({name: _read(svds, name) for name in svds}, svds.skipped)


def universal_metric(model: nn.Module | ModelSVD, layers: Sequence[str] | None = None) -> float:
    r"""
    The universal metric of a model, the mean over its layers of :math:`\alpha \ln \lambda_{max}`.

    It rises as a network is trained, and is to be compared inside one family of networks. The
    logarithm is natural and the mean unweighted; :math:`\lambda = S^2 / d` with *d* the rows of the
    unfolded weight.

    Source: Martin, Mahoney: *Heavy-tailed universality predicts trends in test accuracies for very
    large pre-trained deep neural networks* (2020), https://arxiv.org/abs/1901.08278, in the form used
    by the authors of *The SVD of Convolutional Weights*.

    Args:

        model (nn.Module or ModelSVD): The model, only read; or its decompositions.
        layers (sequence of str, optional): Names of the layers; by default all convolutions and
                    linear layers.

    Returns:
        *float*.

    Examples::

        >>> import torch
        >>> from captum_classfilters.spectral import universal_metric
        >>> layer = torch.nn.Linear(2, 2)
        >>> layer.weight.data = torch.diag(torch.tensor([2.0, 1.0]))  # eigenvalues 2 and 1/2
        >>> round(universal_metric(layer), 4)  # (1 + 2 / ln 4) ln 2
        1.6931
    """
    return model_spectra(model, layers).universal_metric


@short_repr
@dataclass(frozen=True)
class SpectraComparison(Tabular):
    """The spectra of a model and of its random twin. Prints as a table.

    Args:

        model (ModelSpectra): The model's.
        twin (ModelSpectra): The twin's, with the same layers.
    """

    model: ModelSpectra
    twin: ModelSpectra

    def _tables(self) -> list[Table]:
        twins = {layer.name: _row(layer) for layer in self.twin}
        rows = []
        for layer in self.model:
            row = _row(layer)
            others = twins.get(layer.name, {})
            row |= {f"{name} of twin": others.get(name) for name in _OF_TWIN}
            rows.append(row)
        formats = {f"{name} of twin": form for name, form in _FORMATS.items()}
        return [Table(rows, _FORMATS | formats, index="layer", most=None)]

    def to_pandas(self) -> "pandas.DataFrame":
        """A row for each layer, the twin's columns beside the model's; needs the extra ``pandas``.

        Returns:
            *pandas.DataFrame*.
        """
        return self.model.to_pandas().join(
            self.twin.to_pandas().drop(columns=["rows", "columns"]), rsuffix=" of twin"
        )


@arguments_checked
def compare_with_random(
    model: nn.Module,
    twin: Literal["reset", "shuffled"] | nn.Module = "reset",
    layers: Sequence[str] | None = None,
    *,
    seed: int = 0,
) -> SpectraComparison:
    r"""
    Compare the spectra of a model with those of a randomly initialized twin.

    The twin is never built as a whole: one layer at a time is copied and initialized again.

    Args:

        model (nn.Module): The model, only read.
        twin (str or nn.Module): ``"reset"`` initializes a copy of each layer by its own
                    ``reset_parameters``; ``"shuffled"`` shuffles the entries of each weight, which
                    keeps their distribution and so the scale; a model of the same layers, freshly
                    made for example, is taken as it is.
                    Default: "reset"
        layers (sequence of str, optional): Names of the layers; by default all.
        seed (int): Of the twin; PyTorch's random state is left as found.
                    Default: 0

    Returns:
        *SpectraComparison*.

    Raises:
        ValueError: A layer cannot be initialized again, or the twin lacks one.
    """
    svds = model_svd(model, layers)
    spectra = model_spectra(svds)
    if isinstance(twin, nn.Module):
        others = model_svd(twin)
        missing = [layer.name for layer in spectra if layer.name not in others]
        if missing:
            raise ValueError(f"The twin has no layers {', '.join(missing)}, which the model has.")
        weights = {layer.name: others.matrix(layer.name) for layer in spectra}
        return SpectraComparison(spectra, _spectra(_readers(weights), {}))
    makers: dict[str, Callable[[ModelSVD, str], WeightMatrix]] = {
        "reset": _reset,
        "shuffled": _shuffled,
    }
    if twin not in makers:
        raise ValueError(f"twin={twin!r}; choose 'reset', 'shuffled' or pass a model.")
    with model_left_as_found(None):
        torch.manual_seed(seed)
        made = {layer.name: _made(makers[twin], svds, layer.name) for layer in spectra}
        random = _spectra(made, {})
    return SpectraComparison(spectra, random)


Reader = Callable[[], tuple[tuple[int, int], Tensor]]


def _read(svds: ModelSVD, name: str) -> Reader:
    def read() -> tuple[tuple[int, int], Tensor]:
        held = svds.held(name)
        if held is not None and held.complete:
            return held.shape, eigenvalues(held)
        return _of_weight(svds.matrix(name))

    return read


def _readers(weights: dict[str, WeightMatrix]) -> dict[str, Reader]:
    return {name: (lambda weight=weight: _of_weight(weight)) for name, weight in weights.items()}  # type: ignore[misc]


def _made(maker: Callable[[ModelSVD, str], WeightMatrix], svds: ModelSVD, name: str) -> Reader:
    return lambda: _of_weight(maker(svds, name))


def _of_weight(weight: WeightMatrix) -> tuple[tuple[int, int], Tensor]:
    _, rows, columns = weight.matrices.shape
    return (rows, columns), eigenvalues(weight)


def _spectra(readers: dict[str, Reader], skipped: Mapping[str, str]) -> ModelSpectra:
    layers, reasons = [], dict(skipped)
    for name, reader in readers.items():
        try:
            shape, values = reader()
        except UnfitWeightError as error:
            reasons[name] = str(error).rstrip(".")
            continue
        if not bool((values > 0).any()) or len(np.unique(positive_numbers(values))) < 2:
            reasons[name] = "fewer than two different positive eigenvalues"
            continue
        bulk = fit_marchenko_pastur(values, shape)
        layers.append(LayerSpectrum(name, shape, values, fit_power_law(values), bulk))
    if not layers:
        told = "; ".join(f"{name!r}: {reason}" for name, reason in list(reasons.items())[:3])
        raise ValueError(
            "No layer has two different positive eigenvalues, so there is no spectrum to describe "
            f"({told})."
        )
    return ModelSpectra(tuple(layers), reasons)


def _reset(svds: ModelSVD, name: str) -> WeightMatrix:
    module = svds.module(name)
    if can_decompose(module) and "weight" not in dict(module.named_parameters(recurse=False)):
        raise ValueError(
            f"`reset_parameters` does not renew the weight of {type(module).__name__} {name!r}, which is "
            "derived from others by pruning or a parametrization. Choose twin='shuffled' or pass a "
            "freshly made model."
        )
    fresh = copied(module)
    reset = getattr(fresh, "reset_parameters", None) or getattr(fresh, "_reset_parameters", None)
    if reset is None:
        raise ValueError(
            f"{type(module).__name__} {name!r} has no `reset_parameters`; choose twin='shuffled' or "
            "pass a freshly made model."
        )
    reset()
    return svds.matrix(name, fresh)


def _shuffled(svds: ModelSVD, name: str) -> WeightMatrix:
    weight = svds.matrix(name)
    flat = weight.matrices.flatten(1)
    order = torch.stack([torch.randperm(flat.shape[1]) for _ in flat]).to(flat.device)
    return weight._replace(matrices=flat.gather(1, order).reshape(weight.matrices.shape))


def _row(layer: LayerSpectrum) -> Row:
    return {
        "layer": layer.name,
        "rows": layer.shape[0],
        "columns": layer.shape[1],
        "alpha": layer.power_law.alpha,
        "largest eigenvalue": layer.largest,
        "verdict": layer.verdict,
        "outliers": layer.marchenko_pastur.num_outliers,
        "distance from Marchenko-Pastur": layer.marchenko_pastur.distance,
    }
