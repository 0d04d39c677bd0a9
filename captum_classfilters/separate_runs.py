"""A model in which every run of a shared layer is a layer of its own."""

from collections import Counter
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from captum_classfilters._core.copies import copied
from captum_classfilters._core.devices import device_of, on_device
from captum_classfilters._core.guard import model_left_as_found
from captum_classfilters._core.layers import ModelWrapper, unwrapped
from captum_classfilters._core.taps import hooked
from captum_classfilters._core.types import ExampleInputs, ModelInputs


class SeparateRuns(ModelWrapper):
    r"""
    Give each run of a layer that runs several times in a forward pass a name of its own.

    A layer that is used at several places, one ReLU for a whole network say, has no single output,
    and no method can say whose filters are meant. In this copy of the model its runs are the layers
    ``relu.0``, ``relu.1``, ... in the order in which they run; one, some or all of them can be given
    to every method, head and metric of this package and of Captum. Parameters and buffers are those
    of the model, not copies. Other layers keep their names.

    Args:

        model (nn.Module): The model; it is left as found.
        example_inputs (Tensor or tuple): Inputs of the model, on which the runs are counted.

    Raises:
        ValueError: No layer runs several times. In a forward pass: a layer runs more often than it
                    did on the example inputs.

    Examples::

        >>> import torch
        >>> from captum_classfilters import LayerFilterContribution, SeparateRuns
        >>> relu = torch.nn.ReLU()
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), relu, torch.nn.Conv2d(8, 6, 3), relu,
        ...     torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(6, 2))
        >>> images = torch.rand(4, 3, 8, 8)
        >>> model = SeparateRuns(net, images)
        >>> LayerFilterContribution(model, "1.0").attribute(images, target=0).shape
        torch.Size([4, 8, 6, 6])
        >>> LayerFilterContribution(model, "1.1").attribute(images, target=0).shape
        torch.Size([4, 6, 4, 4])
    """

    def __init__(self, model: nn.Module, example_inputs: ExampleInputs) -> None:
        super().__init__()
        inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
        inputs = on_device(inputs, device_of(model))
        self.wrapped_model = copied(model, share=True)
        self.training = self.wrapped_model.training
        shared = _shared(self, inputs)
        if not shared:
            raise ValueError(
                f"No layer of {type(model).__name__} runs more than once on these inputs: use the "
                "model itself."
            )
        while shared:  # what is inside them may be shared as well
            replaced = {
                module: _Runs(module, runs, _elsewhere(self, module))
                for module, runs in shared.items()
            }
            _replace(self, replaced)
            shared = _shared(self, inputs)

    def forward(self, *inputs: object, **options: object) -> Any:
        """What the model returns."""
        for module in self.modules():
            if isinstance(module, _Runs):
                module.next = 0
        return self.wrapped_model(*inputs, **options)


class _Runs(nn.Module):
    """The runs of one layer, which share its tensors, in its place."""

    def __init__(self, module: nn.Module, runs: int, kept: Collection[nn.Module]) -> None:
        super().__init__()
        self.next, self.training = 0, module.training
        same = {part: part for part in kept}
        for run in range(runs):
            # Not by add_module: a Sequential's own children have such names, too.
            self._modules[str(run)] = copied(module, same, share=True) if run else module

    def forward(self, *inputs: object, **options: object) -> Any:
        if self.next == len(self._modules):
            raise ValueError(
                f"A {type(self.get_submodule('0')).__name__} that ran {self.next} times on the "
                "example inputs of SeparateRuns runs again; give inputs like these as "
                "example_inputs."
            )
        run = self.get_submodule(str(self.next))
        self.next += 1
        return run(*inputs, **options)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # a model may look at its layer's weight, say
            return getattr(super().__getattr__("0"), name)

    def __getitem__(self, place: object) -> object:
        return self.get_submodule("0")[place]  # type: ignore[index]

    def __len__(self) -> int:
        return len(self.get_submodule("0"))  # type: ignore[arg-type]

    def __bool__(self) -> bool:
        return True


def _shared(model: ModelWrapper, inputs: ModelInputs) -> dict[nn.Module, int]:
    """The modules that run several times, but for those inside of one that does."""
    runs: Counter[nn.Module] = Counter()

    def count(module: nn.Module, _inputs: object, _output: object) -> None:
        runs[module] += 1

    inner = unwrapped(model)
    with (
        model_left_as_found(model, evaluation=True),
        torch.no_grad(),
        hooked(inner.modules(), count),
    ):
        model(*inputs)
    several = {
        module: number
        for module, number in runs.items()
        if number > 1 and not isinstance(module, _Runs)
    }
    inside = {part for module in several for part in module.modules() if part is not module}
    return {module: number for module, number in several.items() if module not in inside}


def _elsewhere(model: nn.Module, module: nn.Module) -> set[nn.Module]:
    """The parts of a module that are used outside of it, too."""
    outside: set[nn.Module] = set()
    waiting = [model]
    while waiting:
        owner = waiting.pop()
        outside.add(owner)
        waiting.extend(part for part in owner.children() if part not in outside | {module})
    return outside.intersection(module.modules())


def _replace(model: nn.Module, replaced: dict[nn.Module, "_Runs"]) -> None:
    """Put other modules at every place of some."""
    for owner in list(model.modules()):
        if owner in replaced.values():
            continue
        for name, module in owner._modules.items():
            if module in replaced:
                owner._modules[name] = replaced[module]
