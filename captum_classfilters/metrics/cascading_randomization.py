"""A sanity check: does an explanation notice that the network's weights are gone?"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.captum import TargetType
from captum_classfilters._core.captum_layers import captum_reads_layer
from captum_classfilters._core.copies import copied
from captum_classfilters._core.guard import model_left_as_found, weights_change
from captum_classfilters._core.ranking import rank_correlation
from captum_classfilters._core.tables import Table, Tabular, short_repr
from captum_classfilters._core.types import LayerMethod, ModelInputs
from captum_classfilters.metrics.explained import check_is_function, explains
from captum_classfilters.metrics.filter_sensitivity import filter_scores_of, scores_filters
from captum_classfilters.metrics.inputs import at_model, taken_at, with_classes_as_targets
from captum_classfilters.metrics.reset import reset_weights, weighted_modules


@short_repr
@dataclass(frozen=True)
class CascadingRandomization(Tabular):
    r"""
    Likeness of explanations to the trained network's, as its weights are lost from the output down.

    Args:

        modules (list of str): S modules, each randomized on top of those before it.
        rank_correlation (Tensor): Shape (S, N). Spearman's correlation of each image's explanation
                    with that of the trained network; NaN where one is constant.
        absolute_rank_correlation (Tensor): Shape (S, N). The same of the absolute values.
    """

    modules: list[str]
    rank_correlation: Tensor
    absolute_rank_correlation: Tensor

    def _tables(self) -> list[Table]:
        both = zip(self.rank_correlation, self.absolute_rank_correlation, strict=True)
        rows = [
            {
                "randomized down to": name,
                "rank correlation": signed.nanmean(),
                "of absolute values": absolute.nanmean(),
            }
            for name, (signed, absolute) in zip(self.modules, both, strict=True)
        ]
        return [Table(rows)]


@arguments_checked
def cascading_randomization(
    model: nn.Module,
    make_method: Callable[[nn.Module], LayerMethod],
    inputs: Tensor | tuple[Tensor, ...],
    *,
    target: TargetType = None,
    additional_forward_args: object = None,
    seed: int = 0,
    **options: Any,
) -> CascadingRandomization:
    r"""
    Randomize a network from its output down, and compare each stage's explanations with the first.

    Adebayo et al.: *Sanity Checks for Saliency Maps*, NeurIPS 2018, https://arxiv.org/abs/1810.03292.
    An explanation that stays alike does not depend on what the network has learned. A copy is
    randomized; the model itself is not touched. Layer methods are compared by their filter scores,
    or by their maps where they have one map for all filters; input methods by their attributions.

    Args:

        model (nn.Module): The trained model.
        make_method (Callable): Makes the method for a model, such as
                    ``lambda model: LayerFilterContribution(model, "layer3")``.
        inputs (Tensor or tuple[Tensor, ...]): Input of the model, N examples first.
        target (int, tuple, Tensor or list, optional): In any of Captum's forms.
                    Default: None
        additional_forward_args (Any, optional): Further arguments of the model.
                    Default: None
        seed (int): Seed of the new weights; the global random state is left as found.
                    Default: 0
        options: Further arguments of the method's ``attribute``.

    Returns:
        *CascadingRandomization*.

    Raises:
        ValueError: No module with weights runs, or ``make_method`` ignores its model.

    Examples::

        >>> import torch
        >>> from captum_classfilters import LayerFilterContribution
        >>> from captum_classfilters.metrics import cascading_randomization
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        ...     torch.nn.Flatten(), torch.nn.Linear(8, 2))
        >>> check = cascading_randomization(
        ...     net, lambda net: LayerFilterContribution(net, "1"), torch.rand(4, 3, 6, 6), target=1)
        >>> check.modules
        ['4', '0']
    """
    check_is_function(make_method)
    images, further, target = at_model(model, inputs, additional_forward_args, target)
    options = taken_at(model, options)
    with model_left_as_found(model), weights_change():
        twin = copied(model).eval()
        method = make_method(twin)
        if explains(method, model):
            raise ValueError(
                "make_method made a method for the model itself, which keeps its weights; it has to "
                "use the model that it is called with."
            )

        def explained() -> Tensor:
            return _explanation(method, images, target, further, options)

        method = with_classes_as_targets(method, (*images, *further), target)
        original = explained()
        stages = weighted_modules(twin, (*images, *further))[::-1]
        if not stages:
            raise ValueError(f"No module of {type(model).__name__} with weights runs.")
        torch.manual_seed(seed)
        signed, absolute = [], []
        for _, module in stages:
            reset_weights(module)
            changed = explained()
            signed.append(rank_correlation(original, changed))
            absolute.append(rank_correlation(original.abs(), changed.abs()))
    names = [name or type(module).__name__ for name, module in stages]
    return CascadingRandomization(names, torch.stack(signed), torch.stack(absolute))


def _explanation(
    method: LayerMethod,
    images: tuple[Tensor, ...],
    target: TargetType,
    further: ModelInputs,
    options: dict[str, object],
) -> Tensor:
    """(N, features) on the CPU."""
    if further:
        options = {**options, "additional_forward_args": further}
    with captum_reads_layer(method, (*images, *further)):
        attributions = method.attribute(
            images if len(images) > 1 else images[0], target=target, **options
        )
    if scores_filters(method, attributions, (*images, *further)):
        return filter_scores_of(method, attributions).cpu().double()
    tensors = attributions if isinstance(attributions, (tuple, list)) else (attributions,)
    return torch.cat([part.detach().flatten(1) for part in tensors], 1).cpu().double()
