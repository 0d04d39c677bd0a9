"""Times of forward passes, measured in turn so that a busy machine slows all models alike."""

import time
from collections.abc import Sequence

import torch
from torch import nn

from captum_classfilters._core.types import ModelInputs

_WARM_UP = 3


def interleaved_seconds(
    models: Sequence[nn.Module], inputs: Sequence[ModelInputs], repetitions: int
) -> list[list[float]]:
    """Seconds of each forward pass of each model, the models taking turns after a warm-up."""
    times: list[list[float]] = [[] for _ in models]
    with torch.inference_mode():
        for repetition in range(repetitions + _WARM_UP):
            for model, arguments, own in zip(models, inputs, times, strict=True):
                seconds = _timed(model, arguments)
                if repetition >= _WARM_UP:
                    own.append(seconds)
    return times


def median_and_interquartile(times: Sequence[float]) -> tuple[float, float]:
    """Median and interquartile range."""
    at = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    low, middle, high = torch.tensor(times, dtype=torch.float64).quantile(at).tolist()
    return middle, high - low


def _timed(model: nn.Module, inputs: ModelInputs) -> float:
    started = _now()
    model(*inputs)
    return _now() - started


def _now() -> float:
    """The time at which everything that was asked of an accelerator is done."""
    accelerator = getattr(torch, "accelerator", torch.cuda)  # of any kind since PyTorch 2.6
    if accelerator.is_available():
        accelerator.synchronize()
    return time.perf_counter()
