"""The only import of Captum's private names.

Captum's own third-party extensions import the same functions, so they are stable in practice,
but an underscore is an underscore: if Captum moves one, this file is the one to mend.
"""

from captum._utils.common import (
    _format_additional_forward_args,
    _format_output,
    _format_tensor_into_tuples,
    _is_tuple,
    _run_forward,
    _select_targets,
    _sort_key_list,
)
from captum._utils.gradient import (
    _extract_device_ids,
    _forward_layer_distributed_eval,
    _forward_layer_eval,
    apply_gradient_requirements,
    compute_layer_gradients_and_eval,
    undo_gradient_requirements,
)
from captum._utils.typing import BaselineType, TargetType
from captum.attr._utils.approximation_methods import approximation_parameters
from captum.attr._utils.common import _format_input_baseline
from captum.log import log_usage

__all__ = [
    "BaselineType",
    "TargetType",
    "_extract_device_ids",
    "_format_additional_forward_args",
    "_format_input_baseline",
    "_format_output",
    "_format_tensor_into_tuples",
    "_forward_layer_distributed_eval",
    "_forward_layer_eval",
    "_is_tuple",
    "_run_forward",
    "_select_targets",
    "_sort_key_list",
    "apply_gradient_requirements",
    "approximation_parameters",
    "compute_layer_gradients_and_eval",
    "log_usage",
    "undo_gradient_requirements",
]
