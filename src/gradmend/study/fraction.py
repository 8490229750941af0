"""Fractions: a part of all combinations of levels that still tells the factors' effects apart."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import ceil, log, prod
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gradmend.errors import SetupError

Row: TypeAlias = tuple[int, ...]
Matrix: TypeAlias = NDArray[np.float64]

_CANDIDATES: Final = 4096
_STARTS, _ROUNDS = 8, 20
_ROMAN: Final = ("", "I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X")


@dataclass(frozen=True)
class Fraction:
    """Some of all combinations of levels.

    Args:
        rows: the number of the level of each factor, from 0 on; the first row is all zeros.
        resolution: R of a regular fraction: effects of so many factors together that they sum to less than
            R are told apart; any R - 1 factors see all their combinations equally often. None if it is
            not regular.
        efficiency: D-efficiency for the main effects: 1 if all levels and pairs of levels are balanced.
    """

    rows: tuple[Row, ...]
    resolution: int | None
    efficiency: float

    @property
    def sentence(self) -> str:
        """What can be told apart."""
        if self.resolution is None:
            return f"D-optimal, efficiency {self.efficiency:.0%}: main effects only"
        name = _ROMAN[self.resolution] if self.resolution < len(_ROMAN) else str(self.resolution)
        clear = {
            3: "main effects are mixed with interactions of two factors",
            4: "main effects are clear of interactions of two factors, which are mixed with each other",
        }
        told = clear.get(self.resolution, "main effects and interactions of two factors are told apart")
        return f"resolution {name}: {told}"


def fraction(levels: Sequence[int], arms: int) -> Fraction:
    """A balanced part of all combinations.

    If all factors have the same prime number q of levels and `arms` is a power of q, it is a regular
    fraction: orthogonal, of the highest resolution that a greedy search for its generators finds. Otherwise
    it is chosen by exchange for the largest determinant of the information on the main effects.

    Args:
        levels: how many each factor has, 2 or more.
        arms: how many combinations are wanted, fewer than there are.

    Raises:
        SetupError: if they are too few to estimate all main effects.

    Source: Box, Hunter, The 2^(k-p) fractional factorial designs, 1961,
    https://doi.org/10.1080/00401706.1961.10489951; Fedorov, Theory of optimal experiments, 1972

    Examples:
        >>> half = fraction([2, 2, 2], 4)
        >>> half.rows, half.resolution
        (((0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0)), 3)
        >>> fraction([2, 3], 5).sentence
        'D-optimal, efficiency 91%: main effects only'
    """
    needed = 1 + sum(levels) - len(levels)
    if not needed <= arms < prod(levels):
        raise SetupError(
            f"A fraction of {prod(levels)} arms that tells {len(levels)} factors apart has {needed} arms or "
            f"more, and fewer than all, not {arms}."
        )
    return _regular(levels, arms) or _optimal(levels, arms)


def _regular(levels: Sequence[int], arms: int) -> Fraction | None:
    """Each factor beyond the first m is a sum, modulo q, of multiples of those."""
    q, m = levels[0], round(log(arms, levels[0]))
    if set(levels) != {q} or not _prime(q) or q**m != arms:
        return None
    resolutions = range(m + 1, 2, -1)
    found = ((r, columns) for r in resolutions if (columns := _columns(len(levels), m, q, r)))
    resolution, columns = next(found, (0, []))
    if not columns:
        return None
    rows = (tuple(_sum(place, column, q) for column in columns) for place in product(range(q), repeat=m))
    return Fraction(tuple(rows), resolution, 1.0)


def _columns(k: int, m: int, q: int, resolution: int) -> list[Row]:
    """Greedily k vectors modulo q, no `resolution` - 1 of which depend on each other; [] if too few."""
    units = [tuple(int(i == j) for j in range(m)) for i in range(m)]
    others = (v for v in product(range(q), repeat=m) if next(filter(None, v), 0) == 1)
    columns: list[Row] = []
    reached: list[set[Row]] = [{(0,) * m}] + [set() for _ in range(resolution - 2)]
    for vector in (*units, *sorted(others, key=lambda v: m - v.count(0))):
        if len(columns) < k and not any(vector in sums for sums in reached):
            columns.append(vector)
            _reach(reached, vector, q)
    return columns if len(columns) == k else []


def _reach(reached: list[set[Row]], vector: Row, q: int) -> None:
    """Add to the sums of i multiples of vectors those in which the new one takes part."""
    for few, more in reversed(list(pairwise(reached))):
        more.update(
            tuple((a + factor * b) % q for a, b in zip(sums, vector, strict=True))
            for sums in few
            for factor in range(1, q)
        )


def _sum(place: Row, column: Row, q: int) -> int:
    return sum(a * b for a, b in zip(place, column, strict=True)) % q


def _prime(number: int) -> bool:
    return all(number % divisor for divisor in range(2, number))


def _optimal(levels: Sequence[int], arms: int) -> Fraction:
    """The best of several exchanges, each from other rows; always with the row of zeros."""
    candidates = np.array(list(_candidates(levels, arms)))
    effects = _effects(candidates, levels)
    draw = random.Random(0)
    starts = ([0, *draw.sample(range(1, len(candidates)), arms - 1)] for _ in range(_STARTS))
    value, chosen = max((_exchange(effects, start) for start in starts), key=lambda found: found[0])
    rows = sorted(tuple(map(int, candidates[i])) for i in chosen)
    return Fraction(tuple(rows), None, value)


def _candidates(levels: Sequence[int], arms: int) -> Iterator[Row]:
    """All combinations in order, or the first and many drawn at random."""
    total, most = prod(levels), max(_CANDIDATES, 2 * arms)
    drawn: Iterable[int] = range(1, total)
    if total > most:
        drawn = random.Random(0).sample(range(1, total), most)
    for number in (0, *drawn):
        yield _row(number, levels)


def _row(number: int, levels: Sequence[int]) -> Row:
    """The combination of this number, the last factor changing fastest."""
    row = []
    for count in reversed(levels):
        number, level = divmod(number, count)
        row.append(level)
    return tuple(reversed(row))


def _effects(rows: NDArray[np.int64], levels: Sequence[int]) -> Matrix:
    """A column of ones, and for each factor orthogonal contrasts of mean square 1."""
    parts = [np.ones((len(rows), 1))]
    for place, count in enumerate(levels):
        basis = np.linalg.qr(np.column_stack([np.ones(count), np.eye(count)[:, 1:]]))[0][:, 1:]
        parts.append(np.sqrt(count) * basis[rows[:, place]])
    return np.hstack(parts)


def _exchange(effects: Matrix, chosen: list[int]) -> tuple[float, list[int]]:
    """Put another row in the place of each as long as the determinant grows; the first row stays."""
    ridge = 1e-6 * np.eye(effects.shape[1])
    for _ in range(_ROUNDS):
        before = list(chosen)
        for place in range(1, len(chosen)):
            others = chosen[:place] + chosen[place + 1 :]
            inverse = np.linalg.inv(effects[others].T @ effects[others] + ridge)
            gain = (effects @ inverse * effects).sum(axis=1)
            gain[others] = -1
            if gain.max() > gain[chosen[place]] * (1 + 1e-9):
                chosen[place] = int(gain.argmax())
        if chosen == before:
            break
    return _efficiency(effects[chosen]), chosen


def _efficiency(effects: Matrix) -> float:
    sign, logarithm = np.linalg.slogdet(effects.T @ effects / len(effects))
    return float(np.exp(logarithm / effects.shape[1])) if sign > 0 else 0.0


def arms_of(share: float | int, total: int) -> int:
    """How many arms a share of all, or a number of arms, means.

    >>> arms_of(0.25, 32), arms_of(12, 32)
    (8, 12)
    """
    return ceil(share * total - 1e-9) if share < 1 else int(share)
