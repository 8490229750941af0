"""Effects of levels and of their combinations, with intervals over seeds.

**The interval.** Arms of a study share their seeds, so a comparison is one difference per seed, and the seeds
are what a bootstrap resamples. All comparisons here are means over seeds, and of a mean the bootstrap's
standard error is known without resampling: with all of its infinitely many resamples, and corrected for few
seeds by sqrt(n / (n - 1)), it is s / sqrt(n). The interval is the mean plus and minus so many of these as
Student's t says (Hesterberg, What Teachers Should Know About the Bootstrap, 2015,
https://doi.org/10.1080/00031305.2015.1089789: "t with bootstrap standard error").

Percentiles of the resamples would be too narrow: they cannot leave the range of the seeds. Of intervals that
promise 95 %, so many held the truth in 4,000 simulated studies each:

| seeds | values | percentile | BCa | bootstrap-t | this one |
|---|---|---|---|---|---|
| 3 | normal | 74 % | 68 % | 81 % | 95 % |
| 5 | normal | 84 % | 84 % | 95 % | 95 % |
| 5 | exponential | 79 % | 80 % | 94 % | 89 % |
| 10 | normal | 90 % | 90 % | 95 % | 95 % |
| 10 | one in five collapses | 88 % | 88 % | 90 % | 89 % |

The bootstrap-t pays for its better number in row three with intervals of absurd width in the last row: twelve
times as wide as this one's. An interval is about the chance of training with these data; that other data
might give another answer is not in it. Each holds for itself: of twenty true zeros one will seem an effect.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product

import numpy as np
from jaxtyping import Float64, Int64
from scipy.special import stdtrit

from gradmend.study.grid import EXACT, RATIOS, SHARES, Grid, Labels
from gradmend.study.outcome import DIVERGED, DONE, MEASURES

LEAST_SEEDS = 3
"""With fewer seeds there is no interval, and so no claim."""

_ROUNDING = 1e-12

Values = Float64[np.ndarray, "arms seeds"]


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval over seeds.

    Args:
        value: the mean over seeds; of ratios the geometric mean.
        low: end of the interval; NaN where there is none.
        high: the other end.
        seeds: on how many it rests.
        ratio: whether "no difference" is 1, not 0.

    Examples:
        >>> Estimate(0.1, 0.05, 0.15, seeds=5).shown
        1
    """

    value: float
    low: float
    high: float
    seeds: int
    ratio: bool = False

    @property
    def bounded(self) -> bool:
        """Whether there is an interval."""
        return not math.isnan(self.low)

    @property
    def exact(self) -> bool:
        """Whether the interval has no width: the same with all seeds."""
        return self.low == self.high

    @property
    def shown(self) -> int:
        """1 or -1 if the interval lies above or below "no difference", else 0."""
        null = 1.0 if self.ratio else 0.0
        return int(self.low > null) - int(self.high < null)


def intervals(
    values: Float64[np.ndarray, "rows seeds"],
) -> tuple[Float64[np.ndarray, " rows"], Float64[np.ndarray, " rows"], Int64[np.ndarray, " rows"]]:
    """Means over seeds, half the widths of their 95 % intervals, and the numbers of seeds.

    Args:
        values: one per seed; NaN where there is none.

    Returns:
        NaN for a mean of nothing, and for the width with fewer than three seeds.

    Examples:
        >>> mean, half, seeds = intervals(np.array([[1.0, 2.0, 3.0, np.nan]]))
        >>> mean.tolist(), half.round(2).tolist(), seeds.tolist()  # 4.303 / sqrt(3)
        ([2.0], [2.48], [3])
    """
    known = ~np.isnan(values)
    seeds = known.sum(-1)
    n = np.where(seeds, seeds, np.nan)
    mean = np.where(known, values, 0.0).sum(-1) / n
    squares = np.where(known, values - mean[:, None], 0.0) ** 2
    freedom = np.where(seeds >= LEAST_SEEDS, n - 1, np.nan)
    return mean, stdtrit(freedom, 0.975) * np.sqrt(squares.sum(-1) / freedom / n), seeds


def estimate(values: Float64[np.ndarray, " seeds"], measure: str) -> Estimate:
    """The mean of one value or difference per seed, with its interval.

    Args:
        values: as `comparable` gives them, or differences of these; NaN where there is none.
        measure: of which they are.

    Examples:
        >>> round(estimate(np.log([2.0, 4.0, 8.0]), "seconds").value, 6)
        4.0
    """
    (mean,), (half,), (seeds,) = intervals(values[None])
    if measure in EXACT and seeds and np.nanmin(values) == np.nanmax(values):
        half = 0.0
    ratio = measure in RATIOS
    ends = (float(mean), float(mean - half), float(mean + half))
    value, low, high = map(_power, ends) if ratio else ends
    return Estimate(value, low, high, int(seeds), ratio)


def mean(values: Float64[np.ndarray, " seeds"], measure: str) -> Estimate:
    """The mean of an arm, with its interval; that of a share ends at 0 and 1.

    >>> mean(np.array([0.0, 0.9, 1.0]), "test_accuracy").high
    1.0
    """
    return _within(estimate(values, measure), measure, 0.0)


def _within(of: Estimate, measure: str, least: float) -> Estimate:
    """An interval of shares, or of their differences, without what cannot be."""
    if measure not in SHARES:
        return of
    low, high = np.clip([of.low, of.high], least, 1.0).tolist()
    return replace(of, low=low, high=high)


def _power(x: float) -> float:
    return float(np.exp(min(x, 700.0))) if not math.isnan(x) else x


def comparable(grid: Grid, measure: str) -> Values:
    """A measure on the scale on which differences are taken: of ratios the logarithm."""
    values = grid.values(measure)
    if measure not in RATIOS:
        return values
    return np.log(np.where(values > 0, values, np.nan))


def contrast(
    values: Values, rows: Int64[np.ndarray, "contexts cells"], signs: Sequence[int]
) -> tuple[Float64[np.ndarray, " seeds"], int]:
    """A comparison of arms, averaged over contexts: one number per seed.

    Args:
        values: of all trials.
        rows: in each context, the arms that are compared.
        signs: with which they enter.

    Returns:
        The numbers, NaN for a seed that lacks any of the contexts in use; and how many contexts are in use,
        which is all but those without any seed.
    """
    change = _unrounded(np.einsum("k,cks->cs", np.array(signs, dtype=float), values[rows]), values)
    used = change[~np.isnan(change).all(-1)]
    return (used.mean(0) if len(used) else np.full(values.shape[1], np.nan)), len(used)


def differences(values: Values, row: int) -> Values:
    """All arms less one of them, seed by seed."""
    return _unrounded(values - values[row], values)


def _unrounded(
    change: Float64[np.ndarray, "rows seeds"], values: Values
) -> Float64[np.ndarray, "rows seeds"]:
    """Without differences that are nothing but rounding: their interval would have no width."""
    size = np.max(np.abs(values), initial=0.0, where=~np.isnan(values))
    return np.where(np.abs(change) <= _ROUNDING * size, 0.0, change)


@dataclass(frozen=True)
class Effect:
    """What a level does to a measure, against its factor's first level.

    Args:
        factor: that is varied.
        level: its level.
        words: for the level.
        measure: that changes.
        average: the change over all pairs of arms that differ in this level alone.
        alone: the change where all other factors are at their first level; None without such arms.
        contexts: over how many pairs of arms the average goes; 0 if the design has none, and the effect is
            that of a sum of effects fitted to all arms.
        diverged: trials with this level that diverged.
        trials: with this level that ended or diverged.
    """

    factor: str
    level: str
    words: str
    measure: str
    average: Estimate
    alone: Estimate | None
    contexts: int
    diverged: int
    trials: int

    @property
    def verdict(self) -> int:
        """1 if it is shown to be better, -1 if worse, 0 if neither is shown."""
        return judge(self.average, self.measure)


def judge(change: Estimate, measure: str) -> int:
    """1 if a change of a measure is shown to be for the better, -1 for the worse, 0 if neither.

    >>> judge(Estimate(-0.1, -0.2, -0.05, seeds=5), "test_loss")
    1
    """
    return change.shown * {"more": 1, "less": -1, None: 0}[MEASURES[measure].better]


def effects(grid: Grid, measure: str) -> tuple[Effect, ...]:
    """The effect of each level that the study can tell, in the order of factors and levels.

    Source: the two-level comparisons of factorial designs, Box, Hunter, Hunter, Statistics for
    Experimenters, 2005. Where no two arms differ in one level alone, as in fractions of a design, the effect
    is the coefficient of least squares of a sum of effects, which takes for granted that they do not
    interact.

    Args:
        grid: the outcomes.
        measure: that is compared.
    """
    values = comparable(grid, measure)
    found = [_effect(grid, values, measure, f, label) for f, label in _levels(grid)]
    return tuple(effect for effect in found if effect is not None)


def _levels(grid: Grid) -> list[tuple[int, str]]:
    return [(f, label) for f, labels in enumerate(grid.levels.values()) for label in labels[1:]]


def _effect(grid: Grid, values: Values, measure: str, f: int, label: str) -> Effect | None:
    pairs = _pairs(grid, f, label)
    change, contexts = contrast(values, pairs, (1, -1))
    if not contexts:
        change = _fitted(grid, values, f, label)
    average = _within(estimate(change, measure), measure, -1.0)
    if not average.seeds:
        return None
    rows = [row for arm, row in grid.row.items() if arm[f] == label]
    alone = _alone(grid, values, pairs, measure)
    diverged = sum(grid.count(row, DIVERGED) for row in rows)
    trials = diverged + sum(grid.count(row, DONE) for row in rows)
    factor = list(grid.levels)[f]
    return Effect(
        factor, label, grid.level(factor, label), measure, average, alone, contexts, diverged, trials
    )


def _pairs(grid: Grid, f: int, label: str) -> Int64[np.ndarray, "contexts 2"]:
    """Rows of arms with a level, each with that of the arm that differs from it in this alone."""
    first = list(grid.levels.values())[f][0]
    found = [
        (row, grid.row[other])
        for arm, row in grid.row.items()
        if arm[f] == label and (other := _with(arm, {f: first})) in grid.row
    ]
    return np.array(found, dtype=np.int64).reshape(-1, 2)


def _with(arm: Labels, changed: dict[int, str]) -> Labels:
    return tuple(changed.get(f, label) for f, label in enumerate(arm))


def _alone(
    grid: Grid, values: Values, pairs: Int64[np.ndarray, "contexts 2"], measure: str
) -> Estimate | None:
    change, contexts = contrast(values, pairs[pairs[:, 1] == _or_none(grid.base)], (1, -1))
    return _within(estimate(change, measure), measure, -1.0) if contexts else None


def _or_none(row: int | None) -> int:
    return -1 if row is None else row


def _fitted(grid: Grid, values: Values, f: int, label: str) -> Float64[np.ndarray, " seeds"]:
    """The level's coefficient in a sum of effects, per seed; NaN if the arms cannot tell it."""
    levels = _levels(grid)
    rows = np.flatnonzero(~np.isnan(values).all(-1))
    held = [[1.0, *(grid.arms[row][g] == other for g, other in levels)] for row in rows]
    design = np.array(held).reshape(-1, 1 + len(levels))
    column = 1 + levels.index((f, label))
    solve = np.linalg.pinv(design)[column]
    if not np.allclose(solve @ design, np.eye(len(levels) + 1)[column], atol=1e-9):
        return np.full(values.shape[1], np.nan)
    return np.asarray(solve @ values[rows])


@dataclass(frozen=True)
class Interaction:
    """By how much two levels together differ from the sum of their effects.

    Args:
        factors: two of them.
        levels: one of each.
        words: for both levels.
        measure: that changes.
        change: the difference of differences; of ratios the factor between both together and their product.
        contexts: over how many settings of the other factors it is averaged.
    """

    factors: tuple[str, str]
    levels: tuple[str, str]
    words: str
    measure: str
    change: Estimate
    contexts: int


def interactions(grid: Grid, measure: str) -> tuple[Interaction, ...]:
    """The interaction of each two levels of two factors for which the study has all four arms.

    Args:
        grid: the outcomes.
        measure: that is compared.
    """
    values = comparable(grid, measure)
    found = []
    for first, second in combinations(range(len(grid.levels)), 2):
        labels = list(grid.levels.values())
        for pair in product(labels[first][1:], labels[second][1:]):
            found.append(_interaction(grid, values, measure, (first, second), pair))
    return tuple(interaction for interaction in found if interaction is not None)


def _interaction(
    grid: Grid, values: Values, measure: str, places: tuple[int, int], labels: tuple[str, str]
) -> Interaction | None:
    (f, g), (both_f, both_g) = places, labels
    bases = [labels[0] for labels in grid.levels.values()]
    rows = []
    for arm in grid.arms:
        if arm[f] != both_f or arm[g] != both_g:
            continue
        four = [
            arm,
            _with(arm, {g: bases[g]}),
            _with(arm, {f: bases[f]}),
            _with(arm, {f: bases[f], g: bases[g]}),
        ]
        if all(each in grid.row for each in four):
            rows.append([grid.row[each] for each in four])
    change, contexts = contrast(values, np.array(rows, dtype=np.int64).reshape(-1, 4), (1, -1, -1, 1))
    if not contexts or np.isnan(change).all():
        return None
    names = list(grid.levels)[f], list(grid.levels)[g]
    words = " with ".join(map(grid.level, names, labels))
    return Interaction(names, labels, words, measure, estimate(change, measure), contexts)
