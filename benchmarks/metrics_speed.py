"""Time of metrics over filters: this package against Captum's own, called in a loop.

    python -m benchmarks.metrics_speed [--images 16] [--threads 1]

ResNet-20 of CIFAR-10 with random weights and images; both sides remove the same sets of filters or
draw the same noise, and the largest difference of their results is printed with the times. Loops over
filters are timed on `--filters` of them and scaled to all K; their cost per filter is constant.
"""

from collections.abc import Sequence
from typing import Any

import torch
from captum.metrics import infidelity, sensitivity_max
from torch import Tensor

from benchmarks.cifar10 import CifarResNet
from benchmarks.shared import Table, parsed, parser, timed
from captum_classfilters import FilterGate, LayerFilterContribution
from captum_classfilters.metrics import filter_curves, filter_infidelity, filter_max_sensitivity

SAMPLES = 20


class Case:
    """One layer's filters on some images."""

    def __init__(self, layer: str, images: int, filters: int) -> None:
        torch.manual_seed(0)
        self.model, self.layer = CifarResNet(20).eval(), layer
        self.x = torch.randn(images, 3, 32, 32)
        self.target = self.model(self.x).argmax(1)
        self.gate = FilterGate(self.model, layer)
        self.gates = self.gate.ones(images)
        self.number = self.gates.shape[1]
        self.method = LayerFilterContribution(self.model, layer)
        self.scores = self.contributions(self.x, self.target)
        self.some = list(range(0, self.number, max(1, self.number // filters)))

    def contributions(self, x: Tensor, target: Tensor) -> Tensor:
        """Filter scores."""
        return self.method.filter_scores(self.method.attribute(x, target=target)).contiguous()

    def captum_infidelity(self, removed: Tensor, scores: Tensor) -> Tensor:
        """Captum's metric in gate space with given sets (P, N, K)."""
        parts = iter(removed)

        def perturb(gates: Tensor) -> tuple[Tensor, Tensor]:
            own = next(parts).float()
            return own, gates - own

        return infidelity(
            self.gate,
            perturb,
            self.gates,
            scores,
            target=self.target,
            additional_forward_args=self.x,
            n_perturb_samples=len(removed),
            max_examples_per_batch=len(self.x),
        )


def each_filter(case: Case) -> tuple[float, float, float]:
    """Infidelity of every filter alone."""

    def captum() -> Tensor:
        values = []
        for filter_ in case.some:
            removed = torch.zeros(1, *case.gates.shape, dtype=torch.bool)
            removed[:, :, filter_] = True
            values.append(case.captum_infidelity(removed, case.scores))
        return torch.stack(values, 1)

    theirs, expected = timed(captum)
    ours, found = timed(
        lambda: filter_infidelity(
            case.model,
            case.layer,
            case.x,
            case.scores,
            target=case.target,
            n_perturb_samples=1,
            each_filter=True,
        )
    )
    difference = (found.by_filter["scores"][:, case.some] - expected).abs().max()
    return theirs * case.number / len(case.some), ours, float(difference)


def random_sets(case: Case) -> tuple[float, float, float]:
    """Infidelity over random sets, of one table and three controls."""
    generator = torch.Generator().manual_seed(1)
    others = [case.scores[:, torch.randperm(case.number, generator=generator)] for _ in range(3)]
    tables = {str(index): one for index, one in enumerate([case.scores, *others])}
    drawn = torch.Generator().manual_seed(0)
    removed = torch.rand(SAMPLES, *case.gates.shape, generator=drawn) < 0.5
    theirs, expected = timed(
        lambda: [case.captum_infidelity(removed, one.contiguous()) for one in tables.values()]
    )
    ours, found = timed(
        lambda: filter_infidelity(
            case.model, case.layer, case.x, tables, target=case.target, n_perturb_samples=SAMPLES
        )
    )
    pairs = zip(tables, expected, strict=True)
    return theirs, ours, max(float((found.infidelity[k] - e).abs().max()) for k, e in pairs)


def sensitivity(case: Case) -> tuple[float, float, float]:
    """Max-sensitivity of every filter's score."""
    options: dict[str, Any] = {"target": case.target, "n_perturb_samples": 4}

    def captum() -> Tensor:
        values = []
        for filter_ in case.some:

            def one(x: Any, target: Tensor, filter_: int = filter_) -> tuple[Tensor, ...]:
                x = x[0] if isinstance(x, tuple) else x
                return (case.contributions(x, target)[:, [filter_]].contiguous(),)

            torch.manual_seed(0)
            values.append(sensitivity_max(one, case.x, **options))
        return torch.stack(values, 1)

    theirs, expected = timed(captum)
    ours, found = timed(lambda: filter_max_sensitivity(case.method, case.x, **options))
    difference = (found.by_filter[:, case.some] - expected).abs().max()
    return theirs * case.number / len(case.some), ours, float(difference)


def curves(case: Case) -> tuple[float, float, float]:
    """Deletion and insertion at every number of filters, a method and its controls."""
    order = case.scores.sort(dim=1, descending=True, stable=True).indices
    points = list(range(0, case.number + 1, case.number // 16))

    def loop() -> Tensor:
        rows = []
        with torch.no_grad():
            for point in points:
                gates = case.gates.scatter(1, order[:, :point], 0.0)
                outputs = case.gate(gates, case.x).softmax(1)
                rows.append(outputs.gather(1, case.target[:, None])[:, 0])
        return torch.stack(rows, 1)

    theirs, expected = timed(loop)
    ours, found = timed(
        lambda: filter_curves(
            case.model,
            case.layer,
            case.x,
            case.scores,
            target=case.target,
            num_filters=points,
            repetitions=1,
        )
    )
    # Deletion and insertion of the order, of weight magnitude and of their reverses, and random.
    return theirs * 9, ours, float((found.deletion["scores"] - expected).abs().max())


def main(given: Sequence[str] | None = None) -> None:
    """Print the table."""
    known = parser(__doc__)
    known.add_argument("--images", type=int, default=16)
    known.add_argument("--filters", type=int, default=8)
    known.add_argument("--layers", nargs="+", default=["layer3", "layer2", "layer1"])
    known.add_argument("--threads", type=int, default=1)
    options = parsed(known, given, images=2, filters=1, layers=["layer3"])
    torch.set_num_threads(options.threads)
    table = Table("layer", "K", "metric", "loop s", "own s", "speed-up", "largest difference")
    for layer in options.layers:
        case = Case(layer, options.images, options.filters)
        for measure in (each_filter, random_sets, sensitivity, curves):
            if not options.small:
                measure(case)  # warm-up
            theirs, own, difference = measure(case)
            name = measure.__name__.replace("_", " ")
            figures = (f"{theirs:.3f}", f"{own:.4f}", f"{theirs / own:.1f}x", f"{difference:.1e}")
            table.row(layer, case.number, name, *figures)


if __name__ == "__main__":
    main()
