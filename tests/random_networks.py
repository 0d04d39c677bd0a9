"""Networks put together at random from pieces that make short cuts go wrong, and the plain truth."""

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_classfilters._core.replay.suffix_replay import SuffixReplay


class Step(nn.Module):
    """A function of the maps (N, C, H, W) and of some modules."""

    def __init__(self, function: Callable[..., Tensor], *modules: nn.Module) -> None:
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(modules)

    def forward(self, h: Tensor) -> Tensor:
        return self.function(h, *self.parts)


class Training(nn.Module):
    """Stays in training mode, as statistics of the batch need it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def train(self, mode: bool = True) -> "Training":
        super().train(mode)
        self.module.train()
        return self

    def forward(self, h: Tensor) -> Tensor:
        return self.module(h)


class Pair(nn.Module):
    """A layer that returns a tuple."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 1)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        return self.conv(h), h.mean((2, 3), keepdim=True)


class Holder(nn.Module):
    """A layer that returns a tensor inside an object of its own."""

    @dataclass
    class Held:
        maps: Tensor

    def forward(self, h: Tensor) -> "Holder.Held":
        return self.Held(h.sin())


class ListFiller(nn.Module):
    """Leaves its result in a list, as encoders of U-Nets do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = conv(width, width, 1)

    def forward(self, h: Tensor, filled: list[Tensor]) -> Tensor:
        filled.append(self.conv(h))
        return h


class Keeper(nn.Module):
    """Keeps its result for a later module of the same forward pass."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = conv(width, width, 1)
        self.kept = torch.zeros(1)

    def forward(self, h: Tensor) -> Tensor:
        self.kept = self.conv(h)
        return h


class WithView(nn.Module):
    """Returns maps and a view of them, so that writing into one changes the other."""

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        h = h * 1.1
        return h, h.flatten(2)


class Counter(nn.Module):
    """Counts its calls, keeps its last maps and a history; the numbers do not depend on it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.last: Tensor | None = None
        self.history: list[Tensor] = []

    def forward(self, h: Tensor) -> Tensor:
        self.calls += 1
        self.last = h
        self.history.append(h)
        return h


class NextCall(nn.Module):
    """Refuses a batch of another size than the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Tensor | None = None

    def forward(self, h: Tensor) -> Tensor:
        out = h if self.last is None else torch.where(torch.ones_like(self.last) > 0, h, self.last)
        self.last = h
        return out


def conv(width: int, out: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(width, out, kernel, padding=kernel // 2, **options)


def norm(width: int) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(width)
    for tensor in (layer.weight.data, layer.bias.data, layer.running_mean, layer.running_var):
        assert tensor is not None
        tensor.copy_(torch.rand(width) + 0.3)
    return layer


def in_half(h: Tensor, module: nn.Module) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return module(h).float()


def shuffled_and_back(h: Tensor) -> Tensor:
    order = torch.randperm(len(h))
    return h[order].tanh()[order.argsort()]


def set_where_negative(h: Tensor) -> Tensor:
    h = h + 0.1
    h[h < 0] = 0.0
    return h


def slice_in_place(h: Tensor) -> Tensor:
    h = h * 1.5
    h[:, ::2] += 1
    h[:, 1].mul_(0.5)
    return h


def view_in_place(h: Tensor) -> Tensor:
    h = h.sin()
    h.flatten(2).mul_(2)
    return h


def transposed_in_place(h: Tensor) -> Tensor:
    h.permute(0, 2, 3, 1).add_(0.5)
    return h


def attention(h: Tensor) -> Tensor:
    tokens = h.flatten(2).transpose(1, 2)
    weights = (tokens @ tokens.transpose(1, 2) / 4).softmax(2)
    return (weights @ tokens).transpose(1, 2).reshape(h.shape)


def branch_on_values(h: Tensor) -> Tensor:
    return h * 2 if h.mean() > 0.1 else h - 1


def branch_per_size(h: Tensor) -> Tensor:
    return h.tanh() if len(h) > 7 else h


def add_in_place(h: Tensor, module: nn.Module) -> Tensor:
    out = module(h)
    out += h
    return out


# What treats every image by itself: a function of the width to a module that keeps the width.
PLAIN: dict[str, Callable[[int], nn.Module]] = {
    "conv": lambda w: conv(w, w),
    "1x1": lambda w: conv(w, w, 1, bias=False),
    "strided": lambda w: conv(w, w, 3, stride=2),
    "depthwise": lambda w: conv(w, w, 3, groups=w),
    "transposed conv": lambda w: nn.ConvTranspose2d(w, w, 3, padding=1),
    "batch norm": norm,
    "group norm": lambda w: nn.GroupNorm(1, w),
    "relu": lambda _: nn.ReLU(),
    "relu in place": lambda _: nn.ReLU(inplace=True),
    "functional relu in place": lambda _: Step(lambda h: F.relu(h, inplace=True)),
    "gelu": lambda _: nn.GELU(),
    "hardswish": lambda _: nn.Hardswish(inplace=True),
    "prelu": lambda w: nn.PReLU(w),
    "max pool": lambda _: nn.MaxPool2d(2, 1, 1),
    "average pool": lambda _: nn.AvgPool2d(3, 1, 1),
    "upsampled": lambda _: Step(lambda h: F.interpolate(h, scale_factor=2)),
    "padded": lambda _: Step(lambda h: F.pad(h, (1, 1, 1, 1), value=0.3)),
    "add_": lambda _: Step(lambda h: h.add_(0.7)),
    "mul_": lambda _: Step(lambda h: h.mul_(0.7)),
    "gated": lambda _: Step(lambda h: h * h.mean((2, 3), keepdim=True).sigmoid()),
    "times itself in place": lambda _: Step(lambda h: h.mul_(h.sigmoid())),
    "residual": lambda w: Step(lambda h, m: h + m(h), conv(w, w)),
    "residual in place": lambda w: Step(add_in_place, conv(w, w)),
    "called twice": lambda w: Step(lambda h, m: m(m(h).tanh()), conv(w, w)),
    "concatenated": lambda w: Step(lambda h, m, n: n(torch.cat([h, m(h), h.relu()], 1)), conv(w, 2),
                                   conv(2 * w + 2, w, 1)),
    "chunks": lambda _: Step(lambda h: torch.cat(h.chunk(2, 1)[::-1], 1)),
    "permuted": lambda w: Step(lambda h, m: m(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
                               nn.Linear(w, w)),
    "layer norm": lambda w: Step(lambda h, m: m(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
                                 nn.LayerNorm(w)),
    "viewed": lambda _: Step(lambda h: h.reshape(len(h), -1).tanh().view(h.shape)),
    "rolled": lambda _: Step(lambda h: h.roll(1, 1) + h.roll(1, 3)),
    "soft": lambda _: Step(lambda h: h.softmax(1) * 4),
    "unit length": lambda _: Step(lambda h: F.normalize(h, dim=1) * 2),
    "share": lambda _: Step(lambda h: h / (h.abs().sum(1, keepdim=True) + 0.1) * 4),
    "attention": lambda _: Step(attention),
    "largest": lambda _: Step(lambda h: h + h.topk(2, 1).values.sum(1, keepdim=True)),
    "where": lambda _: Step(lambda h: torch.where(h > 0, h, h.exp() - 1)),
    "set where negative": lambda _: Step(set_where_negative),
    "slice in place": lambda _: Step(slice_in_place),
    "view in place": lambda _: Step(view_in_place),
    "transposed in place": lambda _: Step(transposed_in_place),
    "clamped in place": lambda _: Step(lambda h: h.clamp_(-2, 2)),
    "spectrum": lambda _: Step(lambda h: torch.fft.rfft2(h, norm="ortho").abs()),
    "dropout": lambda _: nn.Dropout(0.5),
    "dropout of filters": lambda _: Step(lambda h: F.dropout2d(h, 0.5, training=False)),
    "in half precision": lambda w: Step(in_half, conv(w, w)),
    "tuple": lambda w: Step(lambda h, m: torch.add(*m(h)), Pair(w)),
    "object": lambda _: Step(lambda h, m: h + m(h).maps, Holder()),
    "nothing": lambda _: nn.Identity(),
    "sequence": lambda w: nn.Sequential(conv(w, w), norm(w), nn.ReLU(inplace=True)),
}  # fmt: skip
# What looks at other images, at values, at chance or at earlier calls.
AWKWARD: dict[str, Callable[[int], nn.Module]] = {
    "minus the first": lambda _: Step(lambda h: h - 0.5 * h[:1]),
    "minus the last": lambda _: Step(lambda h: h - 0.5 * h[-1:]),
    "minus the mean": lambda _: Step(lambda h: h - h.mean(0, keepdim=True)),
    "norm of the batch": lambda _: Step(lambda h: 8 * h / (h.norm() + 0.1)),
    "largest of the batch": lambda _: Step(lambda h: h / h.abs().max().clamp(min=0.1)),
    "quantile of the batch": lambda _: Step(lambda h: h.clamp(max=h.flatten().quantile(0.8))),
    "batch statistics": lambda w: Training(nn.BatchNorm2d(w)),
    "batch statistics, none kept": lambda w: nn.BatchNorm2d(w, track_running_stats=False),
    "flipped": lambda _: Step(lambda h: h + 0.3 * h.flip(0)),
    "neighbors": lambda _: Step(lambda h: h + 0.3 * h.roll(1, 0)),
    "running sum": lambda _: Step(lambda h: h + 0.1 * h.cumsum(0)),
    "sorted": lambda _: Step(lambda h: h + 0.3 * h.sort(0).values),
    "size of the batch": lambda _: Step(lambda h: h / len(h)),
    "place in the batch": lambda _: Step(
        lambda h: h * (1 + torch.arange(len(h))).rsqrt().reshape(-1, 1, 1, 1)
    ),
    "other size, other path": lambda _: Step(branch_per_size),
    "branch on values": lambda _: Step(branch_on_values),
    "number of the batch": lambda _: Step(lambda h: h * (1 + 0.1 * float(h.max()))),
    "shuffled and back": lambda _: Step(shuffled_and_back),
    "counter": lambda _: Counter(),
    "next call": lambda _: NextCall(),
}


class Cosine(nn.Linear):
    """A linear layer by its class alone."""

    def forward(self, x: Tensor) -> Tensor:
        return 4 * F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1))


def divided_in_place(z: Tensor) -> Tensor:
    z /= 5
    return z


# What a network does to its head's output; the limit is one that no output of its images reaches.
ENDS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "nothing": lambda z, _: z,
    "divided in place": lambda z, _: divided_in_place(z),
    "clipped": lambda z, limit: z.clamp(max=limit),
    "clipped in place": lambda z, limit: z.clamp_(max=limit),
    "clipped through a view": lambda z, limit: (z[:, 1:].clamp_(max=limit), z)[1],
    "probabilities": lambda z, _: z.softmax(1),
    "copied": lambda z, _: z.clone(),
    "viewed": lambda z, _: z.view(z.shape),
    "two outputs": lambda z, _: z[:, :2],
    "one number": lambda z, _: z[:, 0],
    "turned over the classes": lambda z, _: z.flip(1),
    "minus the first image": lambda z, _: z - 0.5 * z[:1],
}


class RandomNetwork(nn.Module):
    """Pieces, a layer, pieces, a way to features, a head, and what is done to its output."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self.limit = torch.inf
        width, out = draw.choice([2, 3, 5]), draw.choice([3, 4, 5, 7])
        self.stem = conv(2, width)
        self.before = self._sequence(draw, width, draw.randint(0, 2))
        self.filler, self.keeper, self.with_view = ListFiller(width), Keeper(width), WithView()
        self.layer = self._layer(draw, width, out)
        short = draw.random() < 0.3  # nothing between the layer and the features
        self.after = self._sequence(draw, out, 0 if short else draw.choice([0, 1, 1, 2, 3]))
        self.project = conv(width, out, 1)
        self.grid = nn.AdaptiveAvgPool2d(2)
        joins = ["none"] if short else [*JOINS, *["none"] * (len(JOINS) // 2)]
        self.join = self._drawn(draw, "join", joins)
        self.features = self._drawn(draw, "features", ["mean", "mean", "max", "flat", "positions"])
        self.head = self._head(draw, out * (4 if self.features == "flat" else 1))
        self.end = self._drawn(draw, "end", [*ENDS, *["nothing"] * len(ENDS)])
        self.in_half_precision = self._drawn(draw, "autocast", ["no"] * 9 + ["yes"]) == "yes"

    def _drawn(self, draw: random.Random, what: str, choices: list[str]) -> str:
        choice = draw.choice(choices)
        self.pieces.append(f"{what}: {choice}")
        return choice

    def _sequence(self, draw: random.Random, width: int, length: int) -> nn.Sequential:
        table = [AWKWARD if draw.random() < 0.15 else PLAIN for _ in range(length)]
        names = [draw.choice(list(pieces)) for pieces in table]
        self.pieces += names
        return nn.Sequential(*({**PLAIN, **AWKWARD}[name](width) for name in names))

    def _layer(self, draw: random.Random, width: int, out: int) -> nn.Module:
        kind = self._drawn(draw, "layer", ["conv", "relu", "relu in place", "norm", "block"])
        if kind == "conv":
            return conv(width, out)
        after = {"relu": nn.ReLU(), "relu in place": nn.ReLU(inplace=True), "norm": norm(out)}
        return nn.Sequential(
            conv(width, out), after.get(kind) or nn.Sequential(norm(out), nn.ReLU())
        )

    def _head(self, draw: random.Random, width: int) -> nn.Module:
        kinds = ["linear", "linear", "linear", "no bias", "cosine", "hooked", "in half", "two"]
        kind = self._drawn(draw, "head", kinds)
        if kind == "two":
            return nn.Sequential(nn.Linear(width, 5), nn.Sigmoid(), nn.Linear(5, 3))
        head = Cosine(width, 3) if kind == "cosine" else nn.Linear(width, 3, bias=kind != "no bias")
        if kind == "hooked":
            head.register_forward_hook(lambda _module, _inputs, output: output.tanh())
        return Step(in_half, head) if kind == "in half" else head

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.in_half_precision):
            return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        filled: list[Tensor] = []
        h = self.keeper(self.filler(self.before(self.stem(x)), filled))
        maps, view = self.with_view(h)
        y = JOINS[self.join](self, self.layer(h), maps, view, filled)
        y = self.after(y)
        if self.features == "positions":  # a head on every position
            z = self.head(y.permute(0, 2, 3, 1)).mean((1, 2))
        elif self.features == "flat":
            z = self.head(self.grid(y).flatten(1))
        else:
            z = self.head(y.amax((2, 3)) if self.features == "max" else y.mean((2, 3)))
        return ENDS[self.end](z, self.limit)


def _view_written(network: RandomNetwork, y: Tensor, maps: Tensor, view: Tensor) -> Tensor:
    maps.mul_(0.5 + y.mean((1, 2, 3), keepdim=True).sigmoid())
    return y + network.project(view.unflatten(2, maps.shape[2:]))


def _added_in_place(network: RandomNetwork, y: Tensor, maps: Tensor) -> Tensor:
    skipped = network.project(maps)
    skipped += y
    return skipped.relu_()


# How what goes around the layer joins what comes out of it.
JOINS: dict[str, Callable[[RandomNetwork, Tensor, Tensor, Tensor, list[Tensor]], Tensor]] = {
    "none": lambda net, y, maps, view, filled: y,
    "added": lambda net, y, maps, view, filled: y + net.project(maps),
    "added in place": lambda net, y, maps, view, filled: _added_in_place(net, y, maps),
    "multiplied": lambda net, y, maps, view, filled: y * net.project(maps).sigmoid(),
    "from a list": lambda net, y, maps, view, filled: y + net.project(filled[0]),
    "sum of a list": lambda net, y, maps, view, filled: y + torch.stack(filled).mean(),
    "kept by a module": lambda net, y, maps, view, filled: y + net.project(net.keeper.kept),
    "mean kept by a module": lambda net, y, maps, view, filled: y + net.keeper.kept.mean(),
    "view written": lambda net, y, maps, view, filled: _view_written(net, y, maps, view),
    "itself through a view": lambda net, y, maps, view, filled: (y.flatten(2).mul_(2), y)[1],
}


@dataclass
class Trial:
    """A network, a layer of it, and batches."""

    network: RandomNetwork
    layer: str
    batches: list[Tensor]
    perturbations_per_eval: int | None
    pieces: list[str] = field(default_factory=list)

    @property
    def tolerance(self) -> float:
        """Relative to the largest output of an image; half precision has three digits."""
        half = any("half" in piece or piece == "autocast: yes" for piece in self.pieces)
        return 5e-2 if half else 1e-3


def trial(seed: int) -> Trial:
    """The trial of a seed."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        network = RandomNetwork(draw).eval()
        first = torch.randn(draw.choice([1, 2, 4, 5]), 2, 6, 7)
        batches = [first]
        if "next call" not in network.pieces and draw.random() < 0.5:
            batches.append(torch.randn(draw.choice([1, 3, 5]), 2, 6, 7))
        kind = draw.choice(["usual"] * 8 + ["large", "infinite"])
        if kind == "large":
            first[0] *= 1e6
        elif kind == "infinite":
            first[0, 0, 0, 0] = torch.inf
        outputs = copy.deepcopy(network)(first)
        network.limit = float(outputs.nan_to_num(0, 0, 0).max()) + 1e-3
    names = [name for name, _ in network.named_modules() if name.split(".")[0] == "layer"]
    # Of a block, the block itself or its last module: what follows inside must not be skipped.
    layer = draw.choice([name for name in names if name in ("layer", "layer.1")])
    rows = draw.choice([None, None, 1, 2, 3])
    return Trial(network, layer, batches, rows, [*network.pieces, f"batch: {kind}"])


def outputs_by_hook(network: nn.Module, layer: str, x: Tensor, removed: Tensor) -> Tensor:
    """One whole forward pass for each set of filters, those filters set to zero by a hook."""
    outputs = []
    for row in removed:

        def zeroed(_module: nn.Module, _inputs: Any, output: Tensor, row: Tensor = row) -> Tensor:
            output = output.clone()
            if row.dim() == 1:
                output[:, row] = 0
            else:
                output[row] = 0
            return output

        handle = network.get_submodule(layer).register_forward_hook(zeroed)
        with torch.no_grad():
            outputs.append(network(x.clone()).clone())
        handle.remove()
    return torch.stack(outputs)


def differences(outputs: Tensor, expected: Tensor) -> Tensor:
    """How far outputs (P, N, ...) are off, as parts of their image's largest one.

    Infinite where only one of the two is NaN or infinite.
    """
    outputs, expected = (t.float().flatten(2) if t.dim() > 2 else t.float()[..., None]
                         for t in (outputs, expected))  # fmt: skip
    finite = expected.isfinite()
    same = (outputs == expected) | (outputs.isnan() & expected.isnan())
    sizes = expected.where(finite, 0).abs().amax(2, keepdim=True)
    sizes = sizes.maximum(sizes.median()).clamp(min=1e-30)
    off = ((outputs - expected).abs() / sizes).nan_to_num(torch.inf)
    return off.where(finite, torch.inf).where(~same, 0)


@dataclass
class Outcome:
    """What trials showed; the largest difference is a part of what is allowed."""

    ways: list[str] = field(default_factory=list)
    sets: int = 0
    outputs: int = 0
    wrong: int = 0
    largest: float = 0.0

    def see(self, off: Tensor) -> None:
        """Count the wrong ones among differences that are parts of what is allowed."""
        self.wrong += int((off > 1).sum())
        self.largest = max(self.largest, float(off.max()))

    def add(self, other: "Outcome") -> None:
        """Take in another trial's."""
        self.ways += other.ways
        self.sets += other.sets
        self.outputs += other.outputs
        self.wrong += other.wrong
        self.largest = max(self.largest, other.largest)


def examine(seed: int) -> Outcome:
    """Compare replays of a trial's batches with one whole forward pass for each set of filters.

    All batches are recorded before the first one is replayed, so that modules keep something of
    another batch. Sets are single filters, random sets, and random sets for each image.
    """
    each = trial(seed)
    plain = copy.deepcopy(each.network)
    layer = each.network.get_submodule(each.layer)
    replays = [SuffixReplay(each.network, layer, (x,)) for x in each.batches]
    generator = torch.Generator().manual_seed(seed)
    outcome = Outcome()
    for x, replay in zip(each.batches, replays, strict=True):
        shape = (len(x), replay.num_filters)
        singles = replay.each_filter()
        without = outputs_by_hook(plain, each.layer, x, singles)
        for removed in (
            singles,
            torch.rand(3, replay.num_filters, generator=generator) < 0.5,
            torch.rand(3, *shape, generator=generator) < 0.5,
        ):
            outputs = replay.outputs(removed, each.perturbations_per_eval)
            plainly = removed is not singles
            expected = outputs_by_hook(plain, each.layer, x, removed) if plainly else without
            outcome.see(differences(outputs, expected) / each.tolerance)
            outcome.sets += len(removed)
            outcome.outputs += outputs.numel()
        if replay.way == "closed form":
            outcome.see(_differences_of_drops(replay, without) / each.tolerance)
        outcome.ways.append(replay.way)
    return outcome


def _differences_of_drops(replay: SuffixReplay, without: Tensor) -> Tensor:
    """How far the drops (K, N) of the last output are off, as parts of the image's largest output."""
    classes = torch.full((replay.num_images,), replay.output.shape[1] - 1)
    drops = replay.drops_of_single_filters(classes)
    assert drops is not None
    off = (drops.T.float() - (replay.output - without)[:, :, -1].float()).abs()
    return off / replay.output.float().abs().amax(1).clamp(min=1e-30)
