"""The outcomes of a study as a table: a row per arm, a column per seed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float64

from gradmend.errors import GradmendError
from gradmend.study.outcome import DIVERGED, DONE, Outcome

Labels = tuple[str, ...]

TASK = "data"
"""The factor that is no choice: arms are compared with those of the same level of it."""

EXACT = frozenset({"parameters", "memory"})
"""Measures in which there is no chance."""

SHARES = frozenset({"test_accuracy", "train_accuracy"})
"""Measures between 0 and 1."""

RATIOS = frozenset({"seconds", "step_seconds", "parameters", "memory", "steps_to_target", "gradient_ratio"})
"""Measures that are compared as "so many times as much"; of all others the difference is taken."""

_REGARDLESS = frozenset({"step_seconds", "parameters", "memory", "gradient_ratio"})
_TIMES = frozenset({"seconds", "step_seconds"})


@dataclass(frozen=True, eq=False)
class Grid:
    """Who was tried, and what came of it. Built by `tabulate`.

    Args:
        levels: factor -> its labels, the base first.
        arms: the labels of each row, in the order of the factors; rows in the order of levels.
        seeds: of the columns, ascending.
        cells: the outcome of each arm and seed; None where there is none.
    """

    levels: Mapping[str, Labels]
    arms: tuple[Labels, ...]
    seeds: tuple[int, ...]
    cells: tuple[tuple[Outcome | None, ...], ...]

    @cached_property
    def row(self) -> Mapping[Labels, int]:
        """The row of each arm."""
        return {arm: row for row, arm in enumerate(self.arms)}

    @cached_property
    def base(self) -> int | None:
        """The row of the arm with all factors at their first level, if it is part of the study."""
        return self.row.get(tuple(labels[0] for labels in self.levels.values()))

    @cached_property
    def varied(self) -> tuple[str, ...]:
        """The factors with more than one level."""
        return tuple(factor for factor, labels in self.levels.items() if len(labels) > 1)

    @cached_property
    def tasks(self) -> Mapping[str, Grid]:
        """Task -> the arms tried on it, as trials on other data are no rivals; a single task is called ""."""
        labels = self.levels.get(TASK, ())
        if len(labels) < 2:
            return {"": self}
        place = list(self.levels).index(TASK)
        return {label: self._part(place, label) for label in labels}

    def _part(self, place: int, label: str) -> Grid:
        rows = [row for row, arm in enumerate(self.arms) if arm[place] == label]
        arms = tuple(self.arms[row] for row in rows)
        return Grid({**self.levels, TASK: (label,)}, arms, self.seeds, tuple(self.cells[row] for row in rows))

    def values(self, measure: str) -> Float64[np.ndarray, "arms seeds"]:
        """A measure of every trial, NaN where it cannot be compared.

        A diverged training is no gap in the data but a bad result: leaving it out would flatter the arms that
        diverge. It gives no usable model, so that its accuracy counts as 0, the worst there is. Losses and
        steps have no worst value, so an arm that diverged or missed its target with any seed has none at all:
        the mean of its other seeds would be that of the lucky ones. What is known before training counts
        always. Equal times of all seeds of an arm are one reading, copied.
        """
        size = len(self.arms), len(self.seeds)
        found = np.array([_value(cell, measure) for row in self.cells for cell in row]).reshape(size)
        if measure not in SHARES | _REGARDLESS:
            found[[self._unlucky(row, measure) for row in range(len(self.arms))]] = np.nan
        if measure in _TIMES:
            _once(found)
        return found

    def count(self, row: int, status: str) -> int:
        """How many trials of an arm ended so."""
        return sum(cell is not None and cell.status == status for cell in self.cells[row])

    def departures(self, row: int) -> int:
        """How many factors are not at their first level: how much was added to the base."""
        return sum(label != self.levels[factor][0] for factor, label in self.named(row).items())

    def named(self, row: int) -> dict[str, str]:
        """Factor -> label of an arm."""
        return dict(zip(self.levels, self.arms[row], strict=True))

    def label(self, row: int) -> str:
        """An arm in words: where it departs from the base; of a single factor the level itself."""
        varied = {f: label for f, label in self.named(row).items() if f in self.varied}
        if len(varied) == 1:
            return self.level(*next(iter(varied.items())))
        changed = (self.level(f, label) for f, label in varied.items() if label != self.levels[f][0])
        return " + ".join(changed) or "base"

    def level(self, factor: str, label: str) -> str:
        """A level in words; that of a remedy, which is there or not, by the remedy's name."""
        words = {"yes": factor, "no": f"no {factor}"}
        return words.get(label, label if len(self.varied) == 1 else f"{factor}={label}")

    def _unlucky(self, row: int, measure: str) -> bool:
        missed = measure == "steps_to_target" and any(
            cell is not None and cell.status == DONE and math.isnan(_value(cell, measure))
            for cell in self.cells[row]
        )
        return missed or self.count(row, DIVERGED) > 0


def tabulate(outcomes: Iterable[Outcome], levels: Mapping[str, Labels] | None = None) -> Grid:
    """Outcomes in rows and columns.

    Args:
        outcomes: of one study, in any order.
        levels: factor -> its labels, the base first; by default in the order in which they appear.

    Raises:
        GradmendError: if outcomes differ in their factors, have a level that is not in `levels`, or if a
            trial is there twice.

    Examples:
        >>> trials = [Outcome({"norm": n}, 0, "done", "", {}, (), ()) for n in ("none", "batch")]
        >>> grid = tabulate(trials)
        >>> [grid.label(row) for row in range(2)], grid.base
        (['none', 'batch'], 0)
    """
    given = list(outcomes)
    known = dict(levels) if levels else _levels(given)
    order = {factor: {label: i for i, label in enumerate(labels)} for factor, labels in known.items()}
    cells: dict[tuple[Labels, int], Outcome] = {}
    for outcome in given:
        _check(outcome, order)
        where = tuple(outcome.arm.values()), outcome.seed
        if where in cells:
            raise GradmendError(f"The trial {dict(outcome.arm)} with seed {outcome.seed} is there twice.")
        cells[where] = outcome
    ranks = list(order.values())
    arms = sorted(
        {arm for arm, _ in cells}, key=lambda arm: [r[label] for r, label in zip(ranks, arm, strict=True)]
    )
    seeds = sorted({seed for _, seed in cells})
    table = tuple(tuple(cells.get((arm, seed)) for seed in seeds) for arm in arms)
    return Grid(known, tuple(arms), tuple(seeds), table)


def _levels(outcomes: list[Outcome]) -> dict[str, Labels]:
    found: dict[str, dict[str, None]] = {}
    for outcome in outcomes:
        for factor, label in outcome.arm.items():
            found.setdefault(factor, {})[label] = None
    return {factor: tuple(labels) for factor, labels in found.items()}


def _check(outcome: Outcome, order: Mapping[str, Mapping[str, int]]) -> None:
    if list(outcome.arm) != list(order):
        raise GradmendError(f"A trial has the factors {list(outcome.arm)}, the study {list(order)}.")
    for factor, label in outcome.arm.items():
        if label not in order[factor]:
            raise GradmendError(f"{factor} has no level {label!r}. Possible: {', '.join(order[factor])}.")


def _value(cell: Outcome | None, measure: str) -> float:
    if cell is None or cell.status not in (DONE, DIVERGED):
        return math.nan
    if cell.status == DIVERGED and measure not in _REGARDLESS:
        return 0.0 if measure in SHARES else math.nan
    value = float(cell.measures.get(measure, math.nan))
    return value if math.isfinite(value) else math.nan


def _once(values: Float64[np.ndarray, "arms seeds"]) -> None:
    """Equal readings of an arm's seeds are left once, in place."""
    for row in values:
        known = np.flatnonzero(~np.isnan(row))
        if len(known) > 1 and np.ptp(row[known]) == 0:
            row[known[1:]] = np.nan
