"""Which arms are best, as far as the seeds can tell: ranks with ties, and the front of what pays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

from gradmend.study.effects import Estimate, Values, comparable, differences, intervals, mean
from gradmend.study.grid import Grid
from gradmend.study.outcome import DIVERGED, DONE, MEASURES

Pairs = Bool[np.ndarray, "arms arms"]


@dataclass(frozen=True)
class Place:
    """Where an arm stands.

    Args:
        arm: factor -> label.
        label: the arm in words.
        mean: of the measure over seeds.
        rank: one more than the number of arms that are shown to be better; arms of equal rank are ties. None
            without an interval against any other arm.
        last: the rank that it has at worst: the number of arms less those that are shown to be worse.
        diverged: how many of its trials diverged.
        trials: how many ended or diverged.
    """

    arm: Mapping[str, str]
    label: str
    mean: Estimate
    rank: int | None
    last: int | None
    diverged: int
    trials: int


def ranking(grid: Grid, measure: str) -> tuple[Place, ...]:
    """All arms that were tried, the best first, with the ranks that the seeds can tell apart.

    Each two arms are compared seed by seed. An arm's rank lies, at 95 % for each comparison, between `rank`
    and `last`: Mogstad, Romano, Shaikh, Wilhelm, Inference for Ranks, 2024,
    https://doi.org/10.1093/restud/rdad006. To compare only with the best by the mean would split arms that
    nothing tells apart.

    Args:
        grid: the outcomes.
        measure: that is compared; one of which more or less is better.
    """
    values = comparable(grid, measure)
    ranks = _ranks(*better(values, MEASURES[measure].better == "less"))
    places = [_place(grid, values, measure, row, ranks) for row in range(len(grid.arms))]
    sign = 1 if MEASURES[measure].better == "less" else -1
    order = sorted(range(len(places)), key=lambda row: _key(places[row], sign))
    return tuple(places[row] for row in order if places[row].trials)


def better(values: Values, less: bool) -> tuple[Pairs, Pairs]:
    """Which arm (column) is shown to be better than which (row), and which of them could be compared."""
    shown: Pairs = np.zeros((len(values), len(values)), dtype=bool)
    compared = shown.copy()
    for row in range(len(values)):
        middle, half, _ = intervals(differences(values, row))
        shown[row] = (middle + half < 0) if less else (middle - half > 0)
        compared[row] = ~np.isnan(half)
    np.fill_diagonal(compared, False)
    return shown, compared


def _ranks(shown: Pairs, compared: Pairs) -> dict[int, tuple[int, int]]:
    """The best and the worst rank of each arm that was compared with any other."""
    known = np.flatnonzero(compared.any(axis=1)).tolist()
    first, last = 1 + shown.sum(axis=1), len(known) - shown.sum(axis=0)
    return {row: (int(first[row]), int(last[row])) for row in known}


def _place(grid: Grid, values: Values, measure: str, row: int, ranks: Mapping[int, tuple[int, int]]) -> Place:
    first, last = ranks.get(row, (None, None))
    diverged = grid.count(row, DIVERGED)
    trials = diverged + grid.count(row, DONE)
    held = mean(values[row], measure)
    return Place(grid.named(row), grid.label(row), held, first, last, diverged, trials)


def _key(place: Place, sign: int) -> tuple[bool, float, int]:
    if not place.mean.seeds:
        return True, float(place.diverged), len(place.label)
    return False, sign * place.mean.value, len(place.label)


@dataclass(frozen=True)
class Point:
    """An arm by what it gives and what it costs.

    Args:
        arm: factor -> label.
        label: the arm in words.
        gives: the measure.
        costs: the other measure.
        front: whether no other arm is as good in both means and shown to be better in one.
    """

    arm: Mapping[str, str]
    label: str
    gives: Estimate
    costs: Estimate
    front: bool


def pareto(grid: Grid, measure: str, cost: str) -> tuple[Point, ...]:
    """The arms by a measure and a cost, the cheapest first, and which of them are not dominated.

    Means alone would throw out arms that chance put behind; an arm is dominated only if another one is no
    worse in the means of both and is shown to be better in one.

    Args:
        grid: the outcomes.
        measure: what an arm gives.
        cost: what it costs, less being better.
    """
    gives, costs = comparable(grid, measure), comparable(grid, cost)
    sign = 1 if MEASURES[measure].better == "less" else -1
    points = [(mean(gives[row], measure), mean(costs[row], cost)) for row in range(len(grid.arms))]
    shown = better(gives, sign == 1)[0] | better(costs, True)[0]
    means = np.array([[sign * give.value, pay.value] for give, pay in points]).reshape(-1, 2)
    dominated = (shown & (means[None] <= means[:, None]).all(axis=-1)).any(axis=1).tolist()
    found = [
        Point(grid.named(row), grid.label(row), give, pay, not dominated[row])
        for row, (give, pay) in enumerate(points)
        if give.seeds and pay.seeds
    ]
    return tuple(sorted(found, key=lambda point: (point.costs.value, sign * point.gives.value)))
