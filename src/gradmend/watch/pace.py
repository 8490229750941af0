"""Pace: what to look at in which step, so that looking costs no more than a stated share of the time."""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from statistics import median
from time import perf_counter
from typing import Any, TypeAlias

from gradmend.errors import SetupError

Every: TypeAlias = int | str | Callable[[int], bool] | None
"""How often layers are looked at: every so many steps, "log", where a function says so, or by the budget."""

SHARES = {"exam": 0.1, "taps": 0.25, "gradients": 0.2, "weights": 0.1}
"""Of the budget, by what is looked at; the rest is for what every step costs."""

_TIMED = 0.7
"""Of the budget is planned with; the rest is for what cannot be timed, as what it displaces in caches."""

_FEWEST = 0.3
"""Looks give way to what every step costs, down to so large a share of what they had."""

_OPENING, _SLOWLY = 16, 4
"""Steps between two looks before their cost is known, and how many times as many the next may be apart."""

_PATIENCE = 50
"""Steps from one full look that a suspicion asked for to the next; they double each time."""

_COMPARED = 31
"""Last steps without a look that one with a look is compared with, and last looks whose costs count."""

_LEAST = 0.01
"""Steps that a look is taken to cost at least: smaller differences drown in how steps differ anyway."""


class Pace:
    """Chooses for each step what to look at, or nothing, and learns what that costs.

    What a look costs is by how much a step with it is longer than the median of those just before that had
    none, so that a machine that is slower at times does not mislead; of the last looks the median counts.

    Args:
        budget: share of the training's time.
        chosen: the steps in which layers are looked at (`taps`); None leaves that to the budget.
        clock: tells the seconds.

    Examples:
        >>> pace = Pace(0.02)
        >>> [pace.next(step, ("exam", "gradients")) for step in (1, 2, 3)]
        [('exam',), ('gradients',), ()]
    """

    def __init__(
        self,
        budget: float,
        chosen: Callable[[int], bool] | None = None,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        self._budget = _TIMED * budget
        self._chosen, self._clock = chosen, clock
        self._bare: deque[float] = deque(maxlen=_COMPARED)
        self._costs: dict[str, deque[float]] = {name: deque(maxlen=_COMPARED) for name in SHARES}
        self._new: list[tuple[str, float]] = []
        self._spent, self._always = 0.0, deque[float](maxlen=_COMPARED)
        self._intervals = dict.fromkeys(SHARES, _OPENING)
        self._last = dict.fromkeys(SHARES, -_OPENING)
        self._alarmed = False
        self._idle: tuple[int, Sequence[str]] = 0, ()
        self._patience = dict.fromkeys(SHARES, _PATIENCE)
        self._rest = dict.fromkeys(SHARES, 0)
        self._time = clock()

    def next(self, step: int, possible: Sequence[str]) -> tuple[str, ...]:
        """What to look at in this step, of what is possible: one thing, and layers where those are chosen."""
        idle, before = self._idle
        if step < idle and possible == before and not self._alarmed:
            return ()
        asked = self._chosen is not None and "taps" in possible and self._chosen(step)
        name = next((name for name in possible if self._due(name, step)), "")
        if name:
            self._last[name] = step
            self._alarmed = self._alarmed and name != "exam"
        if asked and name != "exam":
            return (name, "taps") if name else ("taps",)
        if not name and self._chosen is None:
            self._idle = min(self._last[n] + self._intervals[n] for n in possible), possible
        return (name,) if name else ()

    def ahead(
        self, steps: Iterable[int], possible: Sequence[str] = tuple(SHARES)
    ) -> dict[int, tuple[str, ...]]:
        """What to look at in steps to come, by what is known now; suspicions are left for `alarm`."""
        alarmed, self._alarmed = self._alarmed, False
        found = {step: looked for step in steps if (looked := self.next(step, possible))}
        self._alarmed = alarmed
        return found

    def alarm(self, step: int) -> bool:
        """Whether to look at this step in full because of a suspicion, whatever is planned."""
        alarmed, self._alarmed = self._alarmed, False
        if alarmed:
            self._last["exam"] = max(step, self._last["exam"])
        return alarmed

    def note(self, looked: Sequence[str]) -> None:
        """A step has ended, in which this was looked at."""
        now = self._clock()
        seconds, self._time = now - self._time, now
        spent, self._spent = self._spent, 0.0
        if name := next((name for name in looked if name != "taps" or self._chosen is None), ""):
            self._new.append((name, seconds))
            return
        self._bare.append(seconds)
        self._always.append(spent)
        if self._new:
            self._compare()

    def timed(self, function: Callable[..., None]) -> Callable[..., None]:
        """A function whose time is a part of what a watch takes of this step."""

        @functools.wraps(function)
        def timed(*args: Any) -> None:
            start = self._clock()
            function(*args)
            self._spent += self._clock() - start

        return timed

    def _compare(self) -> None:
        """Add what the newest looks cost, in steps without any."""
        bare = median(self._bare)
        for name, seconds in self._new:
            self._costs[name].append(seconds / bare - 1)
        self._new = []

    def begin(self) -> None:
        """The next step begins now."""
        self._time = self._clock()

    def interval(self, name: str) -> int:
        """Steps from one look to the next."""
        return self._intervals[name]

    def insist(self) -> None:
        """Look at the next step in full."""
        self._alarmed = True

    def suspect(self, step: int, name: str = "exam") -> bool:
        """Whether a suspicion is worth a look: not where it has just been; a full one is then the next."""
        if step < self._rest[name]:
            return False
        self._rest[name] = step + self._patience[name]
        self._patience[name] *= 2
        self._alarmed = self._alarmed or name == "exam"
        return True

    def _due(self, name: str, step: int) -> bool:
        if name == "taps" and self._chosen is not None:
            return False
        if name == "exam" and self._alarmed:
            return True
        if step < self._last[name] + self._intervals[name]:
            return False
        self._intervals[name] = self._affordable(name)
        return step >= self._last[name] + self._intervals[name]

    def _affordable(self, name: str) -> int:
        """Steps between two looks, by what the last ones cost."""
        if not self._costs[name]:
            return _OPENING
        cost = max(_LEAST, median(self._costs[name]))
        wanted = math.ceil(cost / (SHARES[name] * self._left()))
        return wanted if name == "exam" else min(wanted, _SLOWLY * self._intervals[name])

    def _left(self) -> float:
        """The budget, less what every step costs beyond its share of it."""
        always = median(self._always) / median(self._bare)
        left = (self._budget - always) / sum(SHARES.values())
        return min(self._budget, max(_FEWEST * self._budget, left))


def schedule(every: Any) -> Callable[[int], bool]:
    """Whether to look at a step, from 1: every so many, at powers of two ("log"), or as a function says.

    >>> [step for step in range(1, 10) if schedule("log")(step)]
    [1, 2, 4, 8]

    Raises:
        SetupError: for anything else.
    """
    if callable(every):
        found: Callable[[int], bool] = every
        return found
    if every == "log":
        return lambda step: step & (step - 1) == 0
    if isinstance(every, int) and every > 0:
        return lambda step: step % every == 0
    raise SetupError(
        f"`every` is a number of steps, 'log', a function of the step, or None for the budget, not {every!r}."
    )
