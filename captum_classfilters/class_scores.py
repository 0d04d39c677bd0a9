"""A model whose output is turned into class scores, and whose layers keep their names."""

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any, TypeVar, cast

from captum.attr import Attribution
from torch import Tensor, nn

from captum_classfilters._core.layers import ModelWrapper
from captum_classfilters._core.outputs import as_rows, class_scores, one_output, scores_per_class
from captum_classfilters._core.rules import FilterRule
from captum_classfilters._core.tables import model_name
from captum_classfilters._core.types import ForwardFunc

Function = TypeVar("Function", bound=ForwardFunc)
Method = TypeVar("Method")


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


def per_class(forward_func: Function, output: object) -> Function:
    r"""
    A model as methods of Captum need it: a Tensor with a score for each class.

    Such a method selects the column that its target names. Of a binary classifier's one logit z there
    is no column 1, and column 0 is the score of class 1.

    Args:

        forward_func (Callable): The model, or a function of it.
        output (object): What it returned for some images.

    Returns:
        *Callable*: What was given; where the output is one logit, a view with the scores -z and z, and
        where it is an object, a view with that object's scores.
    """
    if isinstance(output, Tensor) and not one_output(as_rows(output)):
        return forward_func
    if isinstance(forward_func, nn.Module):
        return cast(Function, ClassScores(forward_func, scores_per_class))

    def scored(*inputs: object, **options: object) -> Tensor:
        return scores_per_class(forward_func(*inputs, **options))

    return cast(Function, scored)


def explaining_classes(method: Method, output: object) -> Method:
    r"""
    A method whose targets are classes, as those of this package's methods are.

    Args:

        method (object): A method, or its ``attribute``. Of Captum's a copy is made, with all that it
                    is made of (``NoiseTunnel``'s method), where its model is not :func:`per_class`.
        output (object): What its model returned for some images.

    Returns:
        *object*: The method, or the copy.
    """
    if isinstance(method, MethodType):
        return cast(Method, getattr(explaining_classes(method.__self__, output), method.__name__))
    function = getattr(method, "forward_func", None)
    if not isinstance(method, Attribution) or isinstance(method, FilterRule) or function is None:
        return method
    scored = per_class(function, output)
    if scored is function:
        return method
    adapted = copy.copy(method)
    for name, value in vars(method).items():
        if value is function:  # `model`, too, of those that hook the whole model
            setattr(adapted, name, scored)
        elif isinstance(value, Attribution):
            setattr(adapted, name, explaining_classes(value, output))
    return adapted
