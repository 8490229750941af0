"""Timing two things against each other on a machine that does other things too."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter


@dataclass(frozen=True)
class Ratio:
    """Seconds of one thing over seconds of another: the median of the pairs, and its quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class Row:
    """One line of the table: what was measured, and the ratio that it must not exceed."""

    name: str
    measured: Ratio
    reach: float


def compare(ours: Callable[[], object], theirs: Callable[[], object], pairs: int = 30) -> Ratio:
    """Time both in turns, each pair in the other order; once before unmeasured, to warm up."""
    ours(), theirs()
    ratios = []
    for pair in range(pairs):
        if pair % 2:
            first = _seconds(ours)
            ratios.append(first / _seconds(theirs))
        else:
            first = _seconds(theirs)
            ratios.append(_seconds(ours) / first)
    low, median, high = statistics.quantiles(ratios, n=4)
    return Ratio(median, low, high)


def _seconds(call: Callable[[], object]) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start
