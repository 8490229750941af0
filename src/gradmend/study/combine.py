"""Combine: which remedies come together in the arms of a study."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations, product
from typing import Any, Final, TypeAlias

from gradmend.errors import SetupError, suggest

Row: TypeAlias = tuple[int, ...]
"""A 1 for each remedy that takes part, else 0."""


def _row(n: int, chosen: Iterable[int]) -> Row:
    parts = set(chosen)
    return tuple(int(place in parts) for place in range(n))


def _alone(n: int) -> Iterator[Row]:
    return (_row(n, [one]) for one in range(n))


def _pairs(n: int) -> Iterator[Row]:
    yield from _alone(n)
    yield from (_row(n, pair) for pair in combinations(range(n), 2))


def _all(n: int) -> Iterator[Row]:
    yield (1,) * n


def _without(n: int) -> Iterator[Row]:
    yield from _all(n)
    yield from (_row(n, set(range(n)) - {one}) for one in range(n))


def _full(n: int) -> Iterator[Row]:
    return product((0, 1), repeat=n)


COMBINE: Final[Mapping[str, Callable[[int], Iterator[Row]]]] = {
    "alone": _alone,
    "pairs": _pairs,
    "all": _all,
    "without": _without,
    "full": _full,
}
"""Each alone; that and each pair; all together; that and all but each; any of them together."""


def combinations_of(names: Sequence[str], combine: str | Iterable[Any]) -> tuple[Row, ...]:
    """Which of these take part in each arm, every arm once; the first is the one without any.

    Args:
        names: of the remedies.
        combine: one of `COMBINE`, the names of remedies that come together, or several of both.

    Raises:
        SetupError: for anything else.

    Examples:
        >>> combinations_of(["relu", "skip"], "without")
        ((0, 0), (1, 1), (0, 1), (1, 0))
        >>> combinations_of(["relu", "skip", "norm"], ["alone", ["relu", "norm"]])[-1]
        (1, 0, 1)
    """
    several = [combine] if isinstance(combine, str) else combine
    rows = [row for one in several for row in _rows(names, one)]
    return tuple(dict.fromkeys([(0,) * len(names), *rows]))


def _rows(names: Sequence[str], one: object) -> Iterator[Row]:
    if isinstance(one, str):
        if one not in COMBINE:
            raise SetupError(f"`combine` cannot be {one!r}. {suggest(one, COMBINE)} {_listed(names)}")
        return COMBINE[one](len(names))
    if not isinstance(one, Iterable):
        raise SetupError(f"`combine` cannot be {one!r}. {suggest('', COMBINE)} {_listed(names)}")
    return iter([_row(len(names), [_place(names, str(name)) for name in one])])


def _place(names: Sequence[str], name: str) -> int:
    if name not in names:
        raise SetupError(
            f"`combine` names {name!r}, which is no remedy of this study. {suggest(name, names)}"
        )
    return names.index(name)


def _listed(names: Sequence[str]) -> str:
    return f"Or a list of lists, such as [{list(names[:2])}]."
