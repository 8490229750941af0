"""Lines: one statistic along an axis, with marks for values that the axis does not hold."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
from jaxtyping import Bool, Float64, Int64, Real
from plotly.graph_objects import Figure, Scatter

from gradmend.look import logarithmic
from gradmend.pictures.labels import safe, spread_out
from gradmend.pictures.thinning import extremes

Values: TypeAlias = Sequence[float | None]
"""None where there is no such number."""

Floats: TypeAlias = Real[np.ndarray, " points"]

MOST: Final = 2000
"""Of more points than these a line keeps the extremes of each bin."""
KEPT: Final = 1000
PREDICTED: Final = "predicted"
_DOTTED: Final = 150
"""Points up to which each has a dot."""
_NARROW: Final = 1.5
"""Powers of ten; on so few 2 and 5 are shown, too."""
_RUNS: Final = 12
"""So many stretches of values that no axis holds are named; marks show all."""


@dataclass(frozen=True, eq=False)
class Line:
    """Values along an axis.

    Args:
        words: of the legend; what is predicted is drawn as a band behind the others.
        names: of the points.
        at: their places.
        values: NaN also where there is none.
        known: whether there is one.
        colour: of the line.
    """

    words: str
    names: Sequence[str]
    at: Int64[np.ndarray, " points"]
    values: Float64[np.ndarray, " points"]
    known: Bool[np.ndarray, " points"]
    colour: str

    @property
    def predicted(self) -> bool:
        """Whether theory says so."""
        return self.words == PREDICTED

    def drawable(self, logarithmic: bool) -> Float64[np.ndarray, " points"]:
        """NaN where the axis has no such value."""
        fit = np.isfinite(self.values) & ((self.values > 0) | (not logarithmic))
        return np.where(fit, self.values, np.nan)


def line(
    words: str, names: Sequence[str], at: Int64[np.ndarray, " points"], values: Values, colour: str
) -> Line:
    """The line of these values.

    >>> line("measured", ["a", "b"], np.arange(2), [None, 2.0], "black").known.tolist()
    [False, True]
    """
    numbers = np.array([math.nan if value is None else value for value in values], dtype=np.float64)
    known = np.array([value is not None for value in values], dtype=bool)
    return Line(words, names, at, numbers, known, colour)


def decades(lines: Sequence[Line]) -> dict[str, Any]:
    """An axis of powers of ten that holds what is positive and finite, with room for marks at its edges."""
    values = np.concatenate([each.drawable(logarithmic=True) for each in lines])
    logs = np.log10(values[~np.isnan(values)]) if not np.isnan(values).all() else np.zeros(1)
    middle, room = float(logs.max() + logs.min()) / 2, max(1.0, float(np.ptp(logs)))
    ends = max(-323.0, middle - 0.65 * room), min(308.0, middle + 0.65 * room)
    narrow = logarithmic(10.0 ** ends[0], 10.0 ** ends[1]) if room < _NARROW else {}
    wide = {"type": "log", "dtick": max(1, math.ceil(room / 4)), "exponentformat": "power"}
    return {**(narrow or wide), "range": list(ends), "tickfont": {"size": 10}}


def draw(figure: Figure, lines: Sequence[Line], axis: dict[str, Any], row: int | None = None) -> None:
    """Add lines to a figure, what is predicted behind the others; on an axis of powers of ten with marks.

    Args:
        figure: changed in place.
        lines: of one panel.
        axis: its vertical axis, with its range.
        row: of the panel in a figure of several.
    """
    where = {} if row is None else {"row": row, "col": 1}
    logarithmic = axis.get("type") == "log"
    for each in sorted(lines, key=lambda each: not each.predicted):
        trace = _drawn(each, logarithmic)
        trace.showlegend = all(each.words != other.name for other in figure.data)
        figure.add_trace(trace, **where)
        for mark in _beyond(each, *axis["range"]) if logarithmic and not each.predicted else ():
            figure.add_trace(mark, **where)
    figure.update_yaxes(axis, **where)


def _drawn(given: Line, logarithmic: bool) -> Scatter:
    values = given.drawable(logarithmic)
    kept = _few(np.log(values) if logarithmic else values)
    dots = len(values) == 1 or (len(values) <= _DOTTED and not given.predicted)
    return Scatter(
        x=given.at[kept],
        y=values[kept],
        text=[safe(given.names[place]) for place in kept],
        name=given.words,
        legendgroup=given.words,
        mode="lines+markers" if dots else "lines",
        line={"color": given.colour, "width": 8 if given.predicted else 2},
        opacity=0.45 if given.predicted else 1,
        marker={"color": given.colour, "size": 13 if given.predicted else 5},
        hovertemplate="%{text}<br>%{y:.3g} %{fullData.name}<extra></extra>",
    )


def _few(values: Float64[np.ndarray, " points"]) -> Int64[np.ndarray, " kept"]:
    """Which points a line keeps: of a long one extremes, and where it breaks off."""
    if len(values) <= MOST:
        return np.arange(len(values))
    breaks = [start for start, _ in runs(np.isnan(values))]
    some = breaks[:: max(1, len(breaks) // KEPT)]
    return np.union1d(extremes(values, KEPT), np.array(some, dtype=np.int64))


def _beyond(given: Line, low: float, high: float) -> Iterator[Scatter]:
    """Marks at the edges for what an axis of powers of ten does not hold, with a word for each stretch."""
    kinds = {
        "0": (given.values == 0, low, "triangle-down-open", "top center"),
        "NaN": (given.known & np.isnan(given.values), high, "x-thin-open", "bottom center"),
        "inf": (np.isinf(given.values), high, "triangle-up-open", "bottom center"),
    }
    for words, (where, edge, symbol, side) in kinds.items():
        named = {(start + end - 1) // 2 for start, end in runs(where)[:_RUNS]}
        found = np.flatnonzero(where)
        few = sorted({*found[spread_out(len(found), KEPT // 2)].tolist(), *named})
        if few:
            yield Scatter(
                x=given.at[few],
                y=np.full(len(few), 10.0**edge),
                text=[words if place in named else "" for place in few],
                hovertext=[f"{safe(given.names[place])}<br>{words} {given.words}" for place in few],
                hoverinfo="text",
                textposition=side,
                name=given.words,
                legendgroup=given.words,
                showlegend=False,
                mode="markers+text",
                marker={"color": given.colour, "size": 7, "symbol": symbol, "line": {"color": given.colour}},
                cliponaxis=False,
            )


def band(x: Floats, low: Floats, high: Floats, colour: str, opacity: float, **more: Any) -> Scatter:
    """All values between two curves; none where they are NaN.

    >>> drawn = band(np.array([1.0, 2.0]), np.zeros(2), np.ones(2), "black", 0.3)
    >>> drawn.x.tolist(), drawn.y.tolist()
    ([1.0, 2.0, 2.0, 1.0], [1.0, 1.0, 0.0, 0.0])
    """
    known = ~np.isnan(low)
    return Scatter(
        x=np.concatenate([x[known], x[known][::-1]]),
        y=np.concatenate([high[known], low[known][::-1]]),
        mode="lines",
        fill="toself",
        fillcolor=colour,
        line={"width": 0, "color": colour},
        opacity=opacity,
        hoverinfo="skip",
        showlegend=False,
        **more,
    )


def runs(flags: Bool[np.ndarray, " flags"]) -> list[tuple[int, int]]:
    """Stretches of true values, as half-open intervals.

    >>> runs(np.array([True, True, False, True]))
    [(0, 2), (3, 4)]
    """
    steps = np.diff(np.concatenate([[0], flags.astype(int), [0]]))
    return list(zip(np.flatnonzero(steps == 1).tolist(), np.flatnonzero(steps == -1).tolist(), strict=True))
