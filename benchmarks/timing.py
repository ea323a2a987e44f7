"""Time steps that take turns, so that what else the machine does hits them alike."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping

_WARM_UP = 2
_LEAST_ROUNDS = 5


def take_turns(
    steps: Mapping[str, Callable[[], object]], rounds: int, seconds: float = float("inf")
) -> dict[str, list[float]]:
    """Milliseconds of each step by name, for `rounds` rounds or about `seconds`, whichever ends first.

    The order changes from round to round: whoever follows a step that reads much finds the CPU's cache empty. The first
    two rounds compile and warm up, and are not counted; five are always measured.
    """
    shuffled, order = random.Random(0), list(steps)
    times: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    for number in range(-_WARM_UP, max(rounds, _LEAST_ROUNDS)):
        if number >= _LEAST_ROUNDS and time.perf_counter() > end:
            break
        shuffled.shuffle(order)
        for name in order:
            start = time.perf_counter()
            steps[name]()
            if number >= 0:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def percentiles(samples: list[float]) -> dict[str, float]:
    """The 20th, 50th and 80th percentile of milliseconds."""
    cuts = statistics.quantiles(samples, n=10)
    return {"p20_ms": cuts[1], "p50_ms": statistics.median(samples), "p80_ms": cuts[7]}
