"""The few formulas that say how far a count or a mean can be trusted."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

Z = 1.959963984540054  # 95 % of a normal distribution lie within so many standard deviations


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share, Wilson's: 0 to 1 where nothing was tried.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).
    """
    if trials == 0:
        return 0.0, 1.0
    share, shrink = successes / trials, Z * Z / trials
    middle = (share + shrink / 2) / (1 + shrink)
    half = Z / (1 + shrink) * math.sqrt(share * (1 - share) / trials + shrink / (4 * trials))
    return max(0.0, middle - half), min(1.0, middle + half)


def mcnemar(only_first: int, only_second: int) -> float:
    """The two-sided p-value of McNemar's exact test: how likely so uneven a split is where neither is better.

    Args:
        only_first, only_second: pairs in which one alone was right; those where both agree say nothing.
    """
    pairs = only_first + only_second
    tail = sum(math.comb(pairs, count) for count in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**pairs)


def mean_and_interval(values: Sequence[float]) -> tuple[float, float]:
    """A mean and half the width of its 95 % interval, from the standard error of independent values; NaN for one."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, Z * statistics.stdev(values) / math.sqrt(len(values))
