"""Timing things against each other on a machine that does other things too."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from time import perf_counter, process_time

import torch

BLOCK = 0.03
"""Seconds of steps timed together at least: an interruption is then a small part of a block."""

ROUNDS = (3, 40)
"""Each thing is timed at least and at most so often."""

Call = Callable[[], object]
Clock = Callable[[Call], float]


@dataclass(frozen=True)
class Ratio:
    """Seconds of one thing over seconds of another: the median of the pairs, and its quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"

    def __float__(self) -> float:
        return self.median


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        name: what was measured.
        measured: a ratio, a number, or a sentence where there is none.
        reach: what the number must not exceed, or the range that it must lie in; None for what is only shown.
    """

    name: str
    measured: Ratio | float | str
    reach: float | tuple[float, float] | None = None

    @property
    def reached(self) -> bool:
        """Whether the number is where it should be; a sentence never is."""
        if isinstance(self.measured, str) or self.reach is None:
            return self.reach is None
        low, high = self.reach if isinstance(self.reach, tuple) else (-math.inf, self.reach)
        return low <= float(self.measured) <= high


def host_seconds(call: Call) -> float:
    """CPU seconds of this process, all its threads: what other jobs take does not count."""
    start = process_time()
    call()
    return process_time() - start


def wall_seconds(call: Call) -> float:
    """By the clock: for what several processes do together."""
    start = perf_counter()
    call()
    return perf_counter() - start


def device_seconds(call: Call) -> float:
    """By events on the CUDA device, waiting for it once."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


CLOCKS: Mapping[str, Clock] = {"cpu": host_seconds, "cuda": device_seconds}


def compare(
    bare: Call, subjects: Mapping[str, Call], *, clock: Clock = host_seconds, budget: float = 8.0
) -> dict[str, Ratio | str]:
    """Time each subject over the bare thing, in turns: bare, subject, bare, next subject, bare, ...

    Args:
        bare: one step without the subject.
        subjects: one step with it, by name.
        clock: the seconds of one call.
        budget: seconds after which no new round begins.

    Returns:
        By name the ratio, or the first line of the error of a subject that cannot run.
    """
    errors = {name: error for name, call in subjects.items() if (error := _error(call))}
    running = [name for name in subjects if name not in errors]
    pairs: dict[str, list[float]] = {name: [] for name in running}
    bare()
    steps = max(1, round(BLOCK / clock(bare)))
    least, most = ROUNDS if running else (0, 0)
    end = perf_counter() + budget
    for turn in range(most):
        if turn >= least and perf_counter() > end:
            break
        order = Random(turn).sample(running, len(running))  # so that none always follows the same one
        ratios = _round(bare, [subjects[name] for name in order], clock, steps)
        for name, ratio in zip(order, ratios, strict=True):
            pairs[name].append(ratio)
    return {name: errors.get(name) or _ratio(pairs[name]) for name in subjects}


def _round(bare: Call, subjects: Sequence[Call], clock: Clock, steps: int) -> Iterator[float]:
    """A block of each subject's steps over the mean of the two bare blocks around it."""
    before = _block(clock, bare, steps)
    for subject in subjects:
        seconds, after = _block(clock, subject, steps), _block(clock, bare, steps)
        yield 2 * seconds / (before + after)
        before = after


def _error(call: Call) -> str | None:
    """Call once to warm up; the first line of what it raises."""
    try:
        call()
    except Exception as error:  # the peers' errors are theirs to choose
        return first_line(error)
    return None


def first_line(error: Exception) -> str:
    """The kind of an error and the first line of what it says."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _block(clock: Clock, call: Call, steps: int) -> float:
    return sum(clock(call) for _ in range(steps))


def _ratio(pairs: list[float]) -> Ratio:
    low, median, high = statistics.quantiles(pairs, n=4)
    return Ratio(median, low, high)
