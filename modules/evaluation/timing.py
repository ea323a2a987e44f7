"""Time steps that take turns, so that what else the machine does hits them alike."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping

WARM_UP = 2  # rounds
_LEAST_ROUNDS = 5


def take_turns(
    steps: Mapping[str, Callable[[], object]], rounds: int, seconds: float = float("inf")
) -> dict[str, list[float]]:
    """Milliseconds of each step by name, for `rounds` rounds or about `seconds`, whichever ends first.

    Every step follows every other equally often: whoever follows a step that reads much finds the CPU's cache empty. The
    first two rounds compile and warm up, and are not counted; five are always measured.
    """
    orders = itertools.cycle(balanced_orders(list(steps)))
    times: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    for number in range(-WARM_UP, max(rounds, _LEAST_ROUNDS)):
        if number >= _LEAST_ROUNDS and time.perf_counter() > end:
            break
        for name in next(orders):
            start = time.perf_counter()
            steps[name]()
            if number >= 0:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def balanced_orders(names: list[str]) -> list[list[str]]:
    """Orders in which each name comes before each other one equally often (E. J. Williams, Aust. J. Sci. Res. A 2, 1949)."""
    count = len(names)
    zigzag = [-(step + 1) // 2 if step % 2 else step // 2 for step in range(count)]
    orders = [[names[(first + step) % count] for step in zigzag] for first in range(count)]
    return orders + [order[::-1] for order in orders] if count % 2 else orders


def percentiles(samples: list[float]) -> dict[str, float]:
    """The 20th, 50th and 80th percentile of milliseconds."""
    cuts = statistics.quantiles(samples, n=10)
    return {"p20_ms": cuts[1], "p50_ms": statistics.median(samples), "p80_ms": cuts[7]}
