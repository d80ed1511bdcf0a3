"""The statistics of a comparison: medians of paired ratios, and their bootstrapped intervals."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

NR_RESAMPLES = 1000
CONFIDENCE = 0.95
MIN_FOR_INTERVAL = 3


@dataclass(frozen=True)
class Interval:
    """A median, and where it lies with 95 % confidence."""

    median: float
    low: float
    high: float
    nr: int  # what it rests on

    def is_narrow(self, width: float) -> bool:
        """Whether the interval is no wider than ``width`` of the median."""
        return self.nr >= MIN_FOR_INTERVAL and self.high - self.low <= width * self.median


def interval(values: Sequence[float]) -> Interval:
    """Return the median of ``values`` (at least one) and its bootstrapped interval.

    Deterministic. With few values, the interval is all that was seen.
    """
    if len(values) < MIN_FOR_INTERVAL:
        return Interval(statistics.median(values), min(values), max(values), len(values))
    dice = random.Random(0)
    medians = sorted(
        statistics.median(dice.choices(values, k=len(values))) for _ in range(NR_RESAMPLES)
    )
    tail = int(NR_RESAMPLES * (1 - CONFIDENCE) / 2)
    low, high = medians[tail], medians[-tail - 1]
    return Interval(statistics.median(values), low, high, len(values))


def geometric_mean(values: Iterable[float]) -> float:
    """Return the geometric mean of positive numbers."""
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms))
