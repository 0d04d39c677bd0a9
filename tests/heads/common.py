"""Models, tables and data for the tests of heads."""

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from captum_classfilters import ClassFilters, ClassScores, LayerFilterContribution
from tests.models import batches, images, pool_linear

QUIET: dict[str, Any] = {"show_progress": False}


def identified(model=None, layer="1", number=2, **options):
    model = model or pool_linear()
    table = LayerFilterContribution(model, layer).identify(
        batches(), num_filters=number, **QUIET, **options
    )
    return model, table


def separable(number=120):
    """Images whose class is the brighter channel, or neither."""
    torch.manual_seed(0)
    x = 0.1 * torch.randn(number, 2, 6, 6)
    y = torch.arange(number) % 3
    x[y == 0, 0] += 1
    x[y == 1, 1] += 1
    return x, y


class Net(nn.Module):
    """Convolution, ReLU, mean, a head whose classes differ clearly, and what may follow it."""

    def __init__(self, head=None, after=None, classes=3):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.relu, self.fc = nn.Conv2d(2, 6, 3), nn.ReLU(), head or nn.Linear(6, classes)
        nn.init.normal_(self.fc.weight, 0, 2)
        nn.init.normal_(self.fc.bias, 0, 0.2)
        self.after = after

    def features(self, x: Tensor) -> Tensor:
        return self.relu(self.conv(x)).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.fc(self.features(x))
        return scores if self.after is None else self.after(scores)


def temperature(scores: Tensor) -> Tensor:
    scores /= 5
    return scores


class Autocast(Net):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(x)


class WithLogits(Net):
    def forward(self, x):
        return SimpleNamespace(logits=super().forward(x))


class Several(Net):
    def forward(self, x):
        return super().forward(x), "more"


class AtTwoScales(Net):
    """One head, used twice."""

    def forward(self, x):
        return self.fc(self.features(x)) + self.fc(self.features(x[:, :, 1:])) / 2


class TwoHeads(Net):
    def __init__(self):
        super().__init__()
        self.second = nn.Linear(6, 3)

    def forward(self, x):
        features = self.features(x)
        return self.fc(features) + self.second(features)


class WeightAlone(Net):
    """Uses the weight of its head, and never calls it."""

    def forward(self, x):
        return F.linear(self.features(x), self.fc.weight, self.fc.bias)


class Cosine(nn.Linear):
    def forward(self, x):
        return 16 * F.linear(F.normalize(x), F.normalize(self.weight))


class LowRank(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.down, self.up = nn.Linear(sizes[0], 2, bias=False), nn.Linear(2, sizes[1], bias=False)

    def forward(self, x):
        return super().forward(x) + self.up(self.down(x))


class Standardized(nn.Linear):
    def forward(self, x):
        weight = self.weight
        centered = weight - weight.mean(1, keepdim=True)
        return F.linear(x, centered / weight.std(1, keepdim=True), self.bias)


class Quantized(nn.Linear):
    """As in quantization-aware training: it observes what it is given and rounds its weight."""

    largest: torch.Tensor

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("largest", torch.zeros(()))

    def forward(self, x):
        self.largest.copy_(torch.maximum(self.largest, x.abs().max()))
        return F.linear(x, (self.weight * 2).round() / 2, self.bias)


def with_hook(hook, before=False):
    model = Net()
    register = model.fc.register_forward_pre_hook if before else model.fc.register_forward_hook
    register(hook)
    return model


def of_head(change):
    model = Net()
    change(model.fc)
    return model


def compiled():
    model = torch.compile(Net(), backend="eager")
    model(images())
    return model


def convolutional():
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    nn.init.normal_(model.get_parameter("2.weight"))
    return model


# Models whose head computes its weight: what follows it may be anything.
HOLDING = {
    "plain": Net,
    "a temperature in place": lambda: Net(after=temperature),
    "a clip that is reached": lambda: Net(after=lambda scores: scores.clamp(max=0.3)),
    "a clip in place": lambda: Net(after=lambda scores: scores.clamp_(max=0.3)),
    "log-softmax": lambda: Net(after=lambda scores: scores.log_softmax(1)),
    "softmax": lambda: Net(after=lambda scores: scores.softmax(1)),
    "half precision": lambda: Net().half(),
    "bfloat16": lambda: Net().bfloat16(),
    "autocast in forward": Autocast,
    "one logit": lambda: Net(classes=1),
    "one logit, flat": lambda: Net(classes=1, after=lambda logit: logit[:, 0]),
    "one logit, cooled": lambda: Net(classes=1, after=temperature),
    "one probability": lambda: Net(classes=1, after=torch.sigmoid),
    "an object with logits": WithLogits,
    "scores picked from a tuple": lambda: ClassScores(Several(), lambda output: output[0]),
    "data parallel": lambda: nn.DataParallel(Net()),
    "compiled": compiled,
    "a hook that only looks": lambda: with_hook(lambda *_: None),
    "weight norm": lambda: of_head(torch.nn.utils.parametrizations.weight_norm),
    "weight norm by a hook": lambda: of_head(torch.nn.utils.weight_norm),
    "a pruned weight": lambda: of_head(lambda head: prune.random_unstructured(head, "weight", 0.3)),
    "a head used twice": AtTwoScales,
    "a convolution": convolutional,
}
# Heads that are linear by their class, and not by what they compute.
NOT_PLAIN = {
    "cosine": lambda: Net(Cosine(6, 3)),
    "low rank": lambda: Net(LowRank(6, 3)),
    "standardized": lambda: Net(Standardized(6, 3)),
    "quantized": lambda: Net(Quantized(6, 3)),
    "a hook that scales": lambda: with_hook(lambda _module, _inputs, output: 2 * output),
    "a hook before": lambda: with_hook(lambda _module, inputs: (inputs[0].sqrt(),), before=True),
}


def data_for(model, name="", number=24):
    """Batches that suit a model: of its type, of two classes for a single output."""
    dtype = next(model.parameters()).dtype
    classes = 2 if name.startswith("one") else 3
    return [(x.to(dtype), y) for x, y in batches(number, classes=classes)]


def table_for(name="", layer="relu", head="fc", number=2):
    """Hand-made class filters that fit `Net`: no two classes alike, none the best six."""
    generator = torch.Generator().manual_seed(5)
    scores = torch.rand(2 if name.startswith("one") else 3, 6, generator=generator) + 0.1
    layer, head = ("1", "2") if name == "a convolution" else (layer, head)
    feed = {"name": head, "by": "identical" if name == "a convolution" else "mean"}
    return ClassFilters(
        scores, torch.ones(len(scores)), layer=layer, provenance={"feeds_head": feed}
    ).select(number)
