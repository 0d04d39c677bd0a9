"""A model whose output is turned into class scores, and whose layers keep their names."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from captum_classfilters._core.layers import ModelWrapper
from captum_classfilters._core.outputs import class_scores
from captum_classfilters._core.tables import model_name


class ClassScores(ModelWrapper):
    r"""
    Pick the class scores out of whatever a model returns.

    Every method, head and metric of this package takes a ``ClassScores`` in place of the model. The
    layers keep the names that they have in the model, so a table found through the wrapper fits the
    model, and the other way round. It is needed where the output is not already a tensor (N, C), an
    object with ``logits``, or a mapping with ``logits`` or ``out``: for a tuple, one of two heads,
    segmentation (mean over the pixels of a class), detection (a box's class score).

    Args:

        model (nn.Module): The model.
        scores (Callable, optional): From what the model returns to scores (N, C), or to one logit
                    (N,) or (N, 1) of a binary classifier. By default to what this package reads by
                    itself: a Tensor, an object's ``logits``, a mapping's ``logits`` or ``out``; for
                    methods of other packages, which need a Tensor.

    Examples::

        >>> import torch
        >>> from captum_classfilters import ClassScores, LayerFilterContribution
        >>> class Segmenter(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.conv, self.head = torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 2, 1)
        ...     def forward(self, images):
        ...         return self.head(self.conv(images).relu())
        >>> model = ClassScores(Segmenter(), lambda maps: maps.mean((2, 3)))
        >>> data = [(torch.rand(4, 3, 6, 6), torch.tensor([0, 1, 1, 0]))]
        >>> LayerFilterContribution(model, "conv").identify(data, show_progress=False).layer
        'conv'
    """

    def __init__(self, model: nn.Module, scores: Callable[[Any], Tensor] = class_scores) -> None:
        super().__init__()
        self.wrapped_model = model
        self.scores = scores

    def __repr__(self) -> str:
        return f"ClassScores({model_name(self.wrapped_model)}, {model_name(self.scores)})"

    def forward(self, *inputs: object, **options: object) -> Tensor:
        """Scores (N, C) of the model's output."""
        return self.scores(self.wrapped_model(*inputs, **options))
