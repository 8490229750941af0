"""Stream: what a watch has read so far, in bounded memory, for the rules on a running training."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

import numpy as np
import numpy.typing as npt

from gradmend.anatomy import Anatomy
from gradmend.causes import Cause
from gradmend.diagnosis import Finding

Array = npt.NDArray[np.float32]

_KEPT = 2048
"""Of longer trainings neighbouring losses are averaged."""

RECENT, _REVIEW = 64, 16


@dataclass(frozen=True)
class Table:
    """One reading of many things at once.

    Args:
        step: at which it was taken.
        rows: names.
        statistics: what was read of each.
        values: [rows, statistics], NaN where unknown.
    """

    step: int
    rows: tuple[str, ...]
    statistics: tuple[str, ...]
    values: Array

    def column(self, statistic: str) -> Array:
        """One number per row."""
        found: Array = self.values[:, self.statistics.index(statistic)]
        return found

    def norm(self, statistic: str, sizes: Array) -> float:
        """The norm of all rows that have one together, from the rms and the root of the number of values."""
        squares = (self.column(statistic).astype(np.float64) * sizes) ** 2
        return math.nan if np.isnan(squares).all() else float(np.sqrt(np.nansum(squares)))


@dataclass
class Losses:
    """The losses of a training: the last ones as they are, all of them thinned out.

    Args:
        count: how many there were.
        start: the loss before anything was learnt: the first, or the median of five if that is lower.
        recent: the last ones with their steps, finite or not.
        bound: what they have stayed below so far, with half their range to spare.
    """

    count: int = 0
    start: float = math.nan
    bound: float = math.inf
    recent: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=RECENT))
    _all: list[float] = field(default_factory=list)
    _part: list[float] = field(default_factory=list)
    _stride: int = 1

    def add(self, step: int, loss: float) -> None:
        """Take the loss of a step."""
        self.recent.append((step, loss))
        self.count += 1
        if self.count <= 5:
            first = [value for _, value in self.recent]
            self.start = min(first[0], median(first))
        if self.count % _REVIEW == 0:
            values = [value for _, value in self.recent if math.isfinite(value)] or [math.inf]
            self.bound = max(values) + 0.5 * (max(values) - min(values))
        self._part.append(loss)
        if len(self._part) == self._stride:
            self._all.append(self._part[0] if self._stride == 1 else fmean(self._part))
            self._part.clear()
        if len(self._all) == _KEPT:
            self._all = [fmean(self._all[i : i + 2]) for i in range(0, _KEPT, 2)]
            self._stride *= 2

    def forget(self, step: int) -> None:
        """What came after this step never was."""
        if step < self.count:
            self.count = step
            self.recent = deque((pair for pair in self.recent if pair[0] <= step), maxlen=RECENT)
            self._all, self._part = self._all[: step // self._stride], []
            self.bound = math.inf

    @property
    def falling(self) -> bool:
        """Whether the last ones are a twentieth below the first, in the middle."""
        last = [value for _, value in self.recent][-_REVIEW:]
        return len(last) == _REVIEW and median(last) < self.start - 0.05 * abs(self.start)

    @property
    def all(self) -> Sequence[float]:
        """All losses, each the mean of `count / len(all)` neighbours."""
        return tuple(self._all)

    @property
    def last(self) -> float | None:
        """The last one."""
        return self.recent[-1][1] if self.recent else None


@dataclass
class Rates:
    """The largest learning rate of the groups.

    Args:
        now: at the last step.
        raised: the step at which it rose threefold above all before; None if it never did.
        before: the highest rate before that.
    """

    now: float | None = None
    raised: int | None = None
    before: float = 0.0
    _highest: float = 0.0

    def add(self, step: int, rate: float | None) -> None:
        """Take the rate of a step."""
        if rate == self.now or rate is None:
            return
        if rate > 3 * self._highest > 0:
            self.raised, self.before = step, self._highest
        self._highest = max(self._highest, rate)
        self.now = rate


class Stream:
    """All that was read.

    Attributes:
        sites: the name and the line of the first site that uses a parameter, by the parameter's name.
        game: whether other models are stepped in turn with this one, so that its loss depends on them.
        skipped: how many steps in a row a `GradScaler` has left out.
        gone: the size of weights before something else than the optimizer made them next to nothing.
        origin: where the first number came from that is not finite, if that was seen.
        lasting: what was found in the losses and has not passed.

    Examples:
        >>> stream = Stream()
        >>> stream.losses.add(1, 2.0)
        >>> stream.losses.last
        2.0
    """

    def __init__(self) -> None:
        self.losses = Losses()
        self.rates = Rates()
        self._tables: dict[str, tuple[Table | None, Table]] = {}
        self.sites: dict[str, tuple[str, str | None]] = {}
        self.game, self.skipped = False, 0
        self.gone: dict[str, float] = {}
        self.origin: Finding | None = None
        self.lasting: dict[Cause, Finding] = {}

    def add(self, name: str, table: Table) -> None:
        """Take a reading; the one before it is kept as well."""
        self._tables[name] = self.latest(name), table

    def forget(self, step: int) -> None:
        """The training is again as it was after this step, or goes on with other weights."""
        self._tables.clear()
        self.gone.clear()
        self.losses.forget(step)

    def locate(self, anatomy: Anatomy) -> None:
        """Learn where parameters are used."""
        for site in reversed(anatomy.sites):
            self.sites.update(dict.fromkeys(site.parameters, (site.name, site.line)))

    def latest(self, name: str) -> Table | None:
        """The last reading of a table."""
        return self._tables[name][1] if name in self._tables else None

    def previous(self, name: str) -> Table | None:
        """The one before, if it was of the same rows."""
        before, now = self._tables.get(name, (None, None))
        return before if before is not None and now is not None and before.rows == now.rows else None


def as_array(values: Any) -> Array:
    """A tensor on the host as an array of its own."""
    found: Array = values.detach().float().numpy()
    return found
