"""What to do: the simplest of the best arms, with what it gains and costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64
from scipy.special import stdtrit

from gradmend.console import lines
from gradmend.study import wording
from gradmend.study.effects import (
    LEAST_SEEDS,
    Effect,
    Estimate,
    Interaction,
    Values,
    comparable,
    contrast,
    effects,
    estimate,
    interactions,
    intervals,
    judge,
)
from gradmend.study.grid import Grid
from gradmend.study.outcome import MEASURES
from gradmend.study.ranking import Place, ranking

COSTS = ("step_seconds", "parameters", "memory")
_MOST_SEEDS = 1000
_LACK = 0.05
"""Of what the best arm gains, that a simpler one may lack."""


@dataclass(frozen=True)
class Recommendation:
    """What to do on this task, and why.

    Args:
        arm: factor -> label; None where nothing can be recommended.
        sentence: what to do, with its number and interval.
        evidence: sentences, each with its intervals.
        gain: of the measure against the base; None without a base to compare with.
        costs: the ratio to the base of each of `COSTS`, where they are known.
    """

    arm: Mapping[str, str] | None
    sentence: str
    evidence: tuple[str, ...] = ()
    gain: Estimate | None = None
    costs: Mapping[str, Estimate] | None = None


def recommend(grid: Grid, measure: str) -> Recommendation:
    """The arm with the fewest departures from the base among those that nothing is shown to beat.

    It is shown to lack at most a twentieth of what the best of them gains on the base. An arm that diverged
    with any seed is passed over where another one did not; of equally simple arms the faster is taken. Unless
    it is the base itself, it is shown to be better than the base wherever one is.

    Args:
        grid: the outcomes on one task.
        measure: that is compared.
    """
    values, places = comparable(grid, measure), ranking(grid, measure)
    ranked = [place for place in places if place.rank is not None]
    if not ranked:
        return Recommendation(None, _too_little(places))
    chosen = _choice(grid, values, measure, ranked)
    gain = _versus(values, measure, _row(grid, chosen), grid.base)
    costs = {c: _versus(comparable(grid, c), c, _row(grid, chosen), grid.base) for c in COSTS}
    known = {cost: ratio for cost, ratio in costs.items() if ratio is not None and ratio.bounded}
    evidence = (
        _costs(grid, known),
        _rivals(grid, values, measure, chosen, ranked),
        *_verdicts(effects(grid, measure)),
        _together(interactions(grid, measure)),
        _diverged(places),
        _findings(grid, chosen),
    )
    sentence = _sentence(grid, measure, chosen, gain, places)
    return Recommendation(chosen.arm, sentence, tuple(filter(None, evidence)), gain, known)


def joined(found: Mapping[str, Recommendation]) -> Recommendation:
    """What to do on each of several tasks, as one recommendation.

    Args:
        found: by the names of the tasks.
    """
    sentence = " ".join(f"On {task}: {each.sentence}" for task, each in found.items())
    return Recommendation(
        None, sentence, tuple(f"{task}: {line}" for task, each in found.items() for line in each.evidence)
    )


def _versus(values: Values, measure: str, row: int, other: int | None) -> Estimate | None:
    """The change from another arm to an arm; None if it is the same or there is none."""
    if other is None or other == row:
        return None
    change, _ = contrast(values, np.array([[row, other]]), (1, -1))
    return estimate(change, measure)


def seeds_to_tell(of: Estimate) -> int | None:
    """How many seeds would show an effect, if its mean and spread over seeds stay; None if too many.

    >>> seeds_to_tell(Estimate(0.1, -0.1, 0.3, seeds=5))
    13
    """
    value, low, high = (_additive(each, of.ratio) for each in (of.value, of.low, of.high))
    spread = (high - low) / 2 * math.sqrt(of.seeds) / stdtrit(of.seeds - 1, 0.975)
    more = range(of.seeds + 1, _MOST_SEEDS + 1)
    return next((n for n in more if stdtrit(n - 1, 0.975) * spread / math.sqrt(n) < abs(value)), None)


def _additive(value: float, ratio: bool) -> float:
    return math.log(value) if ratio else value


def _too_little(places: Sequence[Place]) -> str:
    if len(places) < 2:
        return "No recommendation: there are no two arms to compare."
    most = max(place.mean.seeds for place in places)
    if most >= LEAST_SEEDS:
        return "No recommendation: no two arms share enough seeds with a value of the measure."
    return (
        f"No recommendation: {wording.seeds(most)} give no interval, and so nothing can be claimed. "
        f"It takes at least {LEAST_SEEDS}, better 5."
    )


def _choice(grid: Grid, values: Values, measure: str, ranked: Sequence[Place]) -> Place:
    best = [place for place in ranked if place.rank == 1]
    standing = [place for place in best if not place.diverged] or best
    if any(_row(grid, place) == grid.base for place in standing):
        shown = standing
    else:
        gains = [(place, _versus(values, measure, _row(grid, place), grid.base)) for place in ranked]
        shown = [place for place, gain in gains if gain is not None and judge(gain, measure) > 0]
    pool = [place for place in standing if place in shown] or shown or standing
    pool = _near(grid, values, measure, pool)
    times = intervals(grid.values("step_seconds"))[0]
    return min(pool, key=lambda place: _complexity(grid, times, place))


def _near(grid: Grid, values: Values, measure: str, pool: Sequence[Place]) -> list[Place]:
    """Those that are shown to lack little of what the first of them gains on the base.

    An arm whose seeds are far apart is not shown to be worse, but it would not do as well either.
    """
    rows = np.array([_row(grid, place) for place in pool])
    if grid.base is None or grid.base in rows:
        return list(pool)
    towards = 1 if MEASURES[measure].better == "more" else -1
    lack, half, _ = intervals(towards * (values[rows[0]] - values[rows]))
    (gain,), *_ = intervals(towards * (values[rows[0]] - values[[grid.base]]))
    most = max(_LACK * gain, 0.0)
    return [place for place, far in zip(pool, lack + half, strict=True) if not far > most]


def _complexity(grid: Grid, times: Float64[np.ndarray, " arms"], place: Place) -> tuple[int, int, float]:
    row = _row(grid, place)
    return place.rank or 0, grid.departures(row), float(np.nan_to_num(times[row], nan=np.inf))


def _row(grid: Grid, place: Place) -> int:
    return grid.row[tuple(place.arm.values())]


def _sentence(grid: Grid, measure: str, chosen: Place, gain: Estimate | None, places: Sequence[Place]) -> str:
    found = f"{wording.name(measure)} {wording.value(chosen.mean, measure)}"
    if _row(grid, chosen) == grid.base:
        return f"Keep {_base(grid)}: {found}; no other arm is shown to be better."
    return f"Use {chosen.label}: {found}; {_against(grid, measure, gain, places)}."


def _against(grid: Grid, measure: str, gain: Estimate | None, places: Sequence[Place]) -> str:
    base = next((place for place in places if _row(grid, place) == grid.base), None)
    if base is None:
        return "there is no base to compare it with"
    lost = f"{base.diverged} of {base.trials} trials of {_base(grid)} diverged" if base.diverged else ""
    if gain is None or not gain.bounded:
        return lost or f"nothing can be said against {_base(grid)}"
    shown = "" if judge(gain, measure) > 0 else ", which shows no gain"
    change = f"against {_base(grid)} {wording.change(gain, measure)}{shown}"
    return f"{change}; {lost}" if lost else change


def _base(grid: Grid) -> str:
    return "the base" if grid.base is None or len(grid.varied) != 1 else grid.label(grid.base)


def _costs(grid: Grid, costs: Mapping[str, Estimate]) -> str:
    parts = [f"{wording.name(cost)} {wording.change(ratio, cost)}" for cost, ratio in costs.items()]
    return f"Against {_base(grid)} it takes: {'; '.join(parts)}." if parts else ""


def _rivals(grid: Grid, values: Values, measure: str, chosen: Place, ranked: Sequence[Place]) -> str:
    """What could not be told from it, the best first, and how many seeds would tell that one."""
    ties = [place for place in ranked if place is not chosen and not place.diverged]
    changes = [_versus(values, measure, _row(grid, place), _row(grid, chosen)) for place in ties]
    tied = [
        (place, change)
        for place, change in zip(ties, changes, strict=True)
        if change is not None and change.bounded and not change.shown
    ]
    if not tied:
        return ""
    parts = [f"{place.label} ({wording.change(change, measure)})" for place, change in tied]
    needed = seeds_to_tell(tied[0][1])
    more = f" To tell the first would take about {needed} seeds." if needed else ""
    return f"Not told apart from it by {wording.seeds(len(grid.seeds))}: {lines(parts)}.{more}"


def _verdicts(told: Sequence[Effect]) -> list[str]:
    heads = {1: "Helps", -1: "Hurts", 0: "Not shown to help or hurt"}
    found = []
    for verdict, head in heads.items():
        held = [effect for effect in told if effect.average.bounded and effect.verdict == verdict]
        held.sort(key=lambda effect: -abs(_additive(effect.average.value, effect.average.ratio)))
        parts = [f"{effect.words} {wording.change(effect.average, effect.measure)}" for effect in held]
        found.append(f"{head}, on average: {lines(parts)}." if parts else "")
    return found


def _together(told: Sequence[Interaction]) -> str:
    shown = [each for each in told if each.change.shown]
    parts = [f"{each.words} {wording.change(each.change, each.measure)}" for each in shown]
    return f"Together, beyond the sum of both: {lines(parts)}." if parts else ""


def _diverged(places: Sequence[Place]) -> str:
    parts = [f"{place.label} ({place.diverged} of {place.trials})" for place in places if place.diverged]
    return f"Diverged: {lines(parts)}." if parts else ""


def _findings(grid: Grid, chosen: Place) -> str:
    """What was wrong at the start, with and without."""
    held = {chosen.label: _row(grid, chosen)} if _row(grid, chosen) != grid.base else {}
    base = {_base(grid): grid.base} if grid.base is not None else {}
    found = {words: _found(grid, row) for words, row in (base | held).items()}
    if not any(found.values()):
        return ""
    told = (f"{words}: {lines(causes) or 'nothing'}" for words, causes in found.items())
    return f"Found at the start: {'; '.join(told)}."


def _found(grid: Grid, row: int) -> list[str]:
    names = [name for cell in grid.cells[row] if cell is not None for name in cell.findings]
    return [name.lower().replace("_", " ") for name in dict.fromkeys(names)]
