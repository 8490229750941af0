"""Combinations and fractions: their counts, their balance, and what can be told apart."""

from collections import Counter
from itertools import combinations, product
from math import comb, prod
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradmend.errors import SetupError
from gradmend.study.combine import COMBINE, combinations_of
from gradmend.study.fraction import Fraction, arms_of, fraction

NAMES = ("a", "b", "c", "d", "e", "f")


def balanced(found: Fraction, levels: list[int], together: int) -> bool:
    """Whether any so many factors see every combination of their levels equally often."""
    for places in combinations(range(len(levels)), together):
        seen = Counter(tuple(row[place] for place in places) for row in found.rows)
        if len(seen) != prod(levels[place] for place in places) or len(set(seen.values())) != 1:
            return False
    return True


def efficiency(rows: list[tuple[int, ...]], levels: list[int]) -> float:
    """D-efficiency by its definition, with contrasts against the mean instead of orthogonal ones."""
    columns = [[1.0] * len(rows)]
    scale = 0.0
    for place, count in enumerate(levels):
        coded = np.eye(count)[:, :-1] - np.eye(count)[:, [-1]]
        columns += [list(column) for column in coded[[row[place] for row in rows]].T]
        scale += np.linalg.slogdet(coded.T @ coded / count)[1]
    effects = np.array(columns).T
    sign, value = np.linalg.slogdet(effects.T @ effects / len(rows))
    return float(np.exp((value - scale) / effects.shape[1])) if sign > 0 else 0.0


@pytest.mark.parametrize(
    ("levels", "arms", "resolution"),
    [
        ([2] * 3, 4, 3),
        ([2] * 4, 8, 4),
        ([2] * 5, 16, 5),
        ([2] * 5, 8, 3),
        ([2] * 6, 32, 6),
        ([2] * 6, 16, 4),
        ([2] * 7, 16, 4),
        ([2] * 7, 8, 3),
        ([2] * 8, 64, 5),
        ([2] * 8, 16, 4),
        ([2] * 9, 128, 6),
        ([2] * 11, 128, 5),
        ([2] * 15, 16, 3),
        ([3] * 4, 9, 3),
        ([3] * 4, 27, 4),
    ],
)
def test_the_resolution_is_that_of_the_published_tables(
    levels: list[int], arms: int, resolution: int
) -> None:
    """Box, Hunter, Hunter, Statistics for experimenters, 1978, table 12.15; of 3 levels: Montgomery."""
    assert fraction(levels, arms).resolution == resolution


@settings(deadline=None, max_examples=60)
@given(q=st.sampled_from([2, 2, 2, 3, 5]), factors=st.integers(2, 9), m=st.integers(2, 5))
def test_regular_fractions_are_balanced(q: int, factors: int, m: int) -> None:
    m = min(m, factors - 1, {2: 6, 3: 3, 5: 2}[q])
    if m < 2 or factors > (q**m - 1) // (q - 1):
        return
    levels = [q] * factors
    found = fraction(levels, q**m)
    assert found.resolution is not None
    assert len(set(found.rows)) == q**m
    assert found.rows[0] == (0,) * factors
    assert balanced(found, levels, found.resolution - 1)
    assert found.resolution > factors or not balanced(found, levels, found.resolution)
    assert efficiency(list(found.rows), levels) == pytest.approx(1)


@settings(deadline=None, max_examples=25)
@given(data=st.data(), levels=st.lists(st.integers(2, 4), min_size=2, max_size=5))
def test_other_fractions_are_nearly_balanced(data: st.DataObject, levels: list[int]) -> None:
    needed = 1 + sum(levels) - len(levels)
    arms = data.draw(st.integers(needed, prod(levels) - 1))
    found = fraction(levels, arms)
    assert len(set(found.rows)) == arms
    assert found.rows[0] == (0,) * len(levels)
    assert all(0 <= level < count for row in found.rows for level, count in zip(row, levels, strict=True))
    assert found.efficiency == pytest.approx(efficiency(list(found.rows), levels))
    everything = list(product(*map(range, levels)))
    generator = np.random.default_rng(0)
    drawn = [generator.choice(len(everything), arms, replace=False) for _ in range(20)]
    assert found.efficiency >= max(efficiency([everything[i] for i in rows], levels) for rows in drawn) - 1e-9


def test_the_exchange_finds_orthogonal_arrays() -> None:
    assert fraction([2] * 5, 12).efficiency == pytest.approx(1)
    assert balanced(fraction([2] * 5, 12), [2] * 5, 2)
    assert fraction([3, 2, 2, 2], 12).efficiency > 0.97


def test_what_a_fraction_can_tell_apart_is_said() -> None:
    assert fraction([2] * 4, 8).sentence.startswith("resolution IV: main effects are clear")
    assert fraction([2] * 3, 4).sentence.startswith("resolution III: main effects are mixed")
    assert fraction([2] * 5, 16).sentence.startswith("resolution V: main effects and interactions")
    assert fraction([2, 3], 5).sentence == "D-optimal, efficiency 91%: main effects only"


@pytest.mark.parametrize("arms", [3, 8, 9])
def test_too_few_or_too_many_arms_are_refused(arms: int) -> None:
    with pytest.raises(SetupError, match="has 4 arms or more, and fewer than all"):
        fraction([2, 2, 2], arms)


@pytest.mark.parametrize(("share", "arms"), [(0.5, 16), (0.25, 8), (1 / 3, 11), (12, 12), (1.0, 1)])
def test_shares_and_numbers_of_arms(share: float, arms: int) -> None:
    assert arms_of(share, 32) == arms


@given(n=st.integers(0, 6))
def test_combinations_are_as_many_as_they_should_be(n: int) -> None:
    counts = {
        "alone": 1 + n,
        "pairs": 1 + n + comb(n, 2),
        "all": 1 + (n > 0),
        "without": 1 if n == 0 else 2 if n == 1 else 2 + n,
        "full": 2**n,
    }
    for mode in COMBINE:
        rows = combinations_of(NAMES[:n], mode)
        assert len(rows) == len(set(rows)) == counts[mode]
        assert rows[0] == (0,) * n


@given(n=st.integers(1, 6), modes=st.lists(st.sampled_from(sorted(COMBINE)), min_size=1, max_size=4))
def test_a_list_of_ways_is_their_union(n: int, modes: list[str]) -> None:
    rows = combinations_of(NAMES[:n], modes)
    assert len(rows) == len(set(rows))
    assert set(rows) == {row for mode in modes for row in combinations_of(NAMES[:n], mode)}


def test_lists_of_names_are_combinations() -> None:
    assert combinations_of(NAMES[:3], [["a", "c"], ["b"], []]) == ((0, 0, 0), (1, 0, 1), (0, 1, 0))


@pytest.mark.parametrize(
    ("combine", "message"),
    [
        ("pair", "Did you mean 'pairs'"),
        (["alone", "al"], "Did you mean 'all'"),
        ([["a", "bb"]], "'bb', which is no remedy of this study. Did you mean .b.. Possible: a, b"),
        ([3], "`combine` cannot be 3"),
    ],
)
def test_impossible_ways_to_combine_are_refused(combine: Any, message: str) -> None:
    with pytest.raises(SetupError, match=message):
        combinations_of(("a", "b"), combine)
