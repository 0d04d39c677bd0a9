"""Filters of random networks removed: how outputs are found, and that none is wrong.

    python -m benchmarks.random_networks [--networks 2000] [--first 0]

Each network is put together from pieces that make short cuts go wrong (tests/random_networks.py): what
looks at other images of the batch, at values, at chance or at earlier calls, what writes in place, what
keeps or hands on tensors, heads that are not plain. Outputs without single filters, without random
sets and without random sets for each image are compared with one whole forward pass for each set,
filters set to zero by a hook. A number is wrong if it is off by more than a thousandth of its image's
largest output, five hundredths where the network computes in half precision.
"""

import argparse
import logging
import time
import warnings
from collections import Counter

import torch

from tests.random_networks import examine, trial


def main() -> None:
    """Print how many batches went which way, and how many numbers were wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--networks", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="the first network's seed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("captum_classfilters").setLevel(logging.ERROR)
    ways: Counter[str] = Counter()
    outputs = wrong = 0
    start = time.perf_counter()
    for seed in range(options.first, options.first + options.networks):
        outcome = examine(seed)
        ways.update(outcome.ways)
        outputs += outcome.outputs
        wrong += outcome.wrong
        if outcome.wrong:
            print(
                f"network {seed}: {outcome.wrong} wrong ({', '.join(trial(seed).pieces)})",
                flush=True,
            )
    print(f"{options.networks} networks, {time.perf_counter() - start:.0f} s")
    for way in ("closed form", "replay", "whole model"):
        print(f"{way:12s} {ways[way]:6d} batches")
    print(f"{outputs} numbers, {wrong} wrong")


if __name__ == "__main__":
    main()
