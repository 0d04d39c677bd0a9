"""Benchmarks: every number in the README comes from a script in this folder."""

import time


def count_processor_time() -> None:
    """From here on every clock of this process counts its own processor seconds.

    On a machine that does other work too, they are what one thread would take alone.
    """
    time.perf_counter = time.process_time
