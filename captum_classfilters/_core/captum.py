"""The only import of Captum's private names, here without the underscore.

Captum's own third-party extensions import the same functions, so they are stable in practice,
but an underscore is an underscore: if Captum moves one, this file is the one to mend.
"""

import captum.attr
from captum._utils.common import _format_additional_forward_args as format_additional_forward_args
from captum._utils.common import _format_output as format_output
from captum._utils.common import _format_tensor_into_tuples as format_tensor_into_tuples
from captum._utils.common import _is_tuple as is_tuple
from captum._utils.common import _select_targets as select_targets
from captum._utils.typing import BaselineType, TargetType
from captum.attr._utils.approximation_methods import approximation_parameters
from captum.attr._utils.common import _format_input_baseline as format_input_baseline
from captum.log import log_usage
from captum.metrics._core.sensitivity import default_perturb_func

#: Captum's own methods at a layer: of a layer that runs several times they see the last run.
CAPTUMS_LAYER_METHODS = tuple(
    kind
    for kind in vars(captum.attr).values()
    if isinstance(kind, type)
    and issubclass(kind, captum.attr.LayerAttribution)
    and kind is not captum.attr.LayerAttribution
)

__all__ = [
    "CAPTUMS_LAYER_METHODS",
    "BaselineType",
    "TargetType",
    "approximation_parameters",
    "default_perturb_func",
    "format_additional_forward_args",
    "format_input_baseline",
    "format_output",
    "format_tensor_into_tuples",
    "is_tuple",
    "log_usage",
    "select_targets",
]
