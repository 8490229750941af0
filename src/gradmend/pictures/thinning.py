"""Thinning: long series in fewer points that keep every extreme."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, TypeAlias

import numpy as np
from jaxtyping import Bool, Float64, Int64, Real

Values: TypeAlias = Sequence[float] | Real[np.ndarray, " values"]
"""A series, in order."""

MOST: Final = 600
"""Bins of a curve: about as many as a picture has pixels across."""


@dataclass(frozen=True, eq=False)
class Thinned:
    """A series, cut into bins of nearly equal length.

    Args:
        at: the index of each bin's middle value.
        low: the least of its finite values; NaN if it has none.
        middle: the median of its finite values; NaN if it has none.
        high: the greatest of its finite values; NaN if it has none.
        lost: whether some value of it is NaN or infinite.
        each: how many values a bin has, at most; 1 if nothing was thinned.
    """

    at: Int64[np.ndarray, " bins"]
    low: Float64[np.ndarray, " bins"]
    middle: Float64[np.ndarray, " bins"]
    high: Float64[np.ndarray, " bins"]
    lost: Bool[np.ndarray, " bins"]
    each: int


def thinned(values: Values, most: int = MOST) -> Thinned:
    """Extremes and median of each bin; the values themselves where there are no more than `most`.

    Args:
        values: NaN and infinite ones are kept apart.
        most: bins, at least one.

    Examples:
        >>> found = thinned([1.0, 5.0, 2.0, float("nan"), 4.0, 4.0], most=2)
        >>> found.low.tolist(), found.middle.tolist(), found.high.tolist(), found.lost.tolist(), found.each
        ([1.0, 4.0], [2.0, 4.0], [5.0, 4.0], [False, True], 3)
    """
    series = np.asarray(values, dtype=np.float64)
    cuts = edges(len(series), most)
    bins = [series[start:end] for start, end in pairwise(cuts)]
    finite = [each[np.isfinite(each)] for each in bins]
    low, middle, high = (_each(read, finite) for read in (np.min, np.median, np.max))
    lost = np.array([len(kept) < len(each) for kept, each in zip(finite, bins, strict=True)], dtype=bool)
    at = (cuts[:-1] + cuts[1:] - 1) // 2
    return Thinned(at, low, middle, high, lost, int(np.diff(cuts).max(initial=1)))


def extremes(values: Values, most: int) -> Int64[np.ndarray, " kept"]:
    """Which points draw the same line: of each bin the least and the greatest, and both ends of the series.

    Args:
        values: those that are not finite are no extremes.
        most: points, at least four; a series of no more is kept whole.

    Returns:
        Indices, rising.

    Examples:
        >>> extremes([0.0, 1.0, 9.0, 1.0, -9.0, 1.0, 1.0, 0.0], most=4).tolist()
        [0, 2, 4, 7]

    Source: after Jugel et al., M4: a visualization-oriented time series data aggregation, 2014,
    https://doi.org/10.14778/2732951.2732953
    """
    series = np.asarray(values, dtype=np.float64)
    if len(series) <= most:
        return np.arange(len(series))
    finite = np.isfinite(series)
    sides = np.where(finite, series, np.inf), np.where(finite, -series, np.inf)
    bins = list(pairwise(edges(len(series), max(1, (most - 2) // 2))))
    found = [start + int(np.argmin(side[start:end])) for side in sides for start, end in bins]
    return np.unique([0, *found, len(series) - 1])


def edges(count: int, most: int) -> Int64[np.ndarray, " edges"]:
    """Where bins of nearly equal length begin, and the end of the last.

    >>> edges(5, 2).tolist()
    [0, 2, 5]
    """
    return np.arange(min(count, most) + 1) * count // max(1, min(count, most))


def _each(
    read: Callable[..., float], bins: Sequence[Float64[np.ndarray, " _"]]
) -> Float64[np.ndarray, " bins"]:
    return np.array([read(each) if len(each) else np.nan for each in bins], dtype=np.float64)
