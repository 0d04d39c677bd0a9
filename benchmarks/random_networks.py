"""Filters of random networks removed: how outputs are found, and that none is wrong.

    python -m benchmarks.random_networks [--networks 2000] [--first 0]

Each network is put together from pieces that make short cuts go wrong (tests/random_networks.py): what
looks at other images of the batch, at values, at chance or at earlier calls, what writes in place, what
keeps or hands on tensors, heads that are not plain. Outputs without single filters, without random
sets and without random sets for each image are compared with one whole forward pass for each set,
filters set to zero by a hook. A number is wrong if it is off by more than a thousandth of its image's
largest output, five hundredths where the network computes in half precision; the largest difference
that was found is printed as a part of what is allowed.
"""

import logging
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence

import torch

from benchmarks.shared import Table, parsed, parser
from tests.random_networks import Outcome, examine, trial

WAYS = ("closed form", "replay", "whole model")


def main(given: Sequence[str] | None = None) -> None:
    """Print how many batches went which way, and how many numbers were wrong."""
    known = parser(__doc__)
    known.add_argument("--networks", type=int, default=2000)
    known.add_argument("--first", type=int, default=0, help="the first network's seed")
    options = parsed(known, given, networks=10)
    torch.set_num_threads(1)
    logging.getLogger("captum_classfilters").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compare(range(options.first, options.first + options.networks))


def compare(seeds: Sequence[int]) -> None:
    """Print progress, every network with a wrong number, and a summary."""
    ways: Counter[str] = Counter()
    total = Outcome()
    largest, slowest = (0.0, -1), (0.0, -1)
    started = shown = time.perf_counter()
    for done, seed in enumerate(seeds, 1):
        begun = time.perf_counter()
        outcome = examine(seed)
        now = time.perf_counter()
        ways.update(outcome.ways)
        total.add(outcome)
        largest = max(largest, (outcome.largest, seed))
        slowest = max(slowest, (now - begun, seed))
        if outcome.wrong:
            print(f"network {seed}: {outcome.wrong} wrong ({', '.join(trial(seed).pieces)})")
        if now - shown > 10:
            shown = now
            print(
                f"{done} of {len(seeds)} networks, {total.wrong} wrong, "
                f"{(now - started) / done:.2f} s a network",
                file=sys.stderr,
                flush=True,
            )
    seconds = time.perf_counter() - started
    table = Table(
        "networks",
        "sets",
        "numbers",
        "wrong",
        "largest difference, of the allowed (network)",
        *(f"batches by {way}" for way in WAYS),
        "s a network",
        "slowest s (network)",
    )
    table.row(
        len(seeds),
        total.sets,
        total.outputs,
        total.wrong,
        f"{largest[0]:.2g} ({largest[1]})",
        *(ways[way] for way in WAYS),
        f"{seconds / len(seeds):.3f}",
        f"{slowest[0]:.1f} ({slowest[1]})",
    )


if __name__ == "__main__":
    main()
