"""Depth against steps: a statistic of each layer over a training, as a heatmap from input down to output."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Int64, Shaped
from plotly.graph_objects import Figure, Heatmap
from plotly.subplots import make_subplots

from gradmend.console import lines
from gradmend.look import Look
from gradmend.pictures.course import PLAIN, Span, short
from gradmend.pictures.labels import safe, ticks
from gradmend.pictures.thinning import edges

MOST_ROWS, MOST_COLUMNS = 120, 300
"""Larger tables are drawn in so many rows and columns: two pixels each, where a page is wide."""

CELLS = MOST_ROWS * MOST_COLUMNS
"""Of a heatmap, unless it is told to do with fewer; each takes five bytes of a page."""

_MOST_RUNS, _MOST_FRAMES = 6, 6
_NAME, _TO = 48, " … "
_FEW = 10
_DECADES = 0.5
"""A scale spans a factor of three to each side at least, so that noise has no strong colours."""


@dataclass(frozen=True)
class Scale:
    """How numbers become colours.

    Args:
        words: what the numbers are.
        powers: whether powers of ten are told apart, not shares from 0 to 1.
        middle: what has no colour; None for the median. A share of 0 has none.
    """

    words: str
    powers: bool = True
    middle: float | None = None


@dataclass(frozen=True, eq=False)
class Heat:
    """A statistic of layers at steps.

    Args:
        names: of the layers or parameters, from input to output.
        steps: of the optimizer, rising.
        values: one row per step; NaN where it was not read.
        within: of other places in the model the layer that stands for each.
    """

    names: tuple[str, ...]
    steps: Int64[np.ndarray, " steps"]
    values: Float[np.ndarray, "steps names"]
    within: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Cells:
    """A table in no more cells than a picture has room for.

    Args:
        names: of each row; of several layers the first and the last.
        steps: the middle one of each column.
        values: the most unusual finite number of each cell; NaN where there is none.
        zero: whether a number of the cell is zero.
        infinite: whether one is infinite.
        first: the place of the first layer of each row among all.
        each: how many layers and steps a cell stands for, at most.
    """

    names: tuple[str, ...]
    steps: Int64[np.ndarray, " columns"]
    values: Float[np.ndarray, "rows columns"]
    zero: Bool[np.ndarray, "rows columns"]
    infinite: Bool[np.ndarray, "rows columns"]
    first: Int64[np.ndarray, " rows"]
    each: tuple[int, int]


Table: TypeAlias = Shaped[np.ndarray, "_ _"]
Starts: TypeAlias = Int64[np.ndarray, " _"]


def reduced(heat: Heat, scale: Scale, cells: int = CELLS) -> Cells:
    """Of each cell the number that is farthest from the median of all, so that every extreme is seen.

    Args:
        heat: at least one row and one column.
        scale: of powers of ten the exponents are compared, and are what `values` hold.
        cells: that there may be.

    Examples:
        >>> heat = Heat(("a", "b"), np.arange(2), np.array([[1.0, 10.0], [1e-9, 1.0]]))
        >>> reduced(heat, Scale("gradient"), cells=2).values.tolist()
        [[-9.0], [1.0]]
    """
    table = np.asarray(heat.values, np.float32).T
    zero, infinite = (table == 0) & scale.powers, np.isinf(table)
    with np.errstate(all="ignore"):
        told = np.log10(table) if scale.powers else table.copy()
    told[~np.isfinite(told)] = np.nan
    rows = edges(len(heat.names), min(MOST_ROWS, max(2, cells // 8)))
    down = rows[:-1]
    columns = edges(len(heat.steps), min(MOST_COLUMNS, max(1, cells // len(down))))
    across = columns[:-1]
    return Cells(
        tuple(_named(heat.names[start:end]) for start, end in pairwise(rows)),
        heat.steps[(columns[:-1] + columns[1:]) // 2],
        _farthest(told, down, across),
        _bins(zero, down, across, np.logical_or),
        _bins(infinite, down, across, np.logical_or),
        down,
        (-(-len(heat.names) // len(down)), -(-len(heat.steps) // len(across))),
    )


def heatmap(
    name: str, heat: Heat, scale: Scale, spans: Sequence[Span], look: Look, room: int = CELLS
) -> Figure:
    """A statistic of every layer over the steps of a training; frames mark where something was found.

    Args:
        name: of what trained.
        heat: at least one row and one column.
        scale: of the colours.
        spans: of the findings, marked at the layers they name.
        look: of the picture.
        room: cells that there may be.

    Examples:
        >>> heat = Heat(("a", "b"), np.array([1, 2]), np.array([[1.0, 10.0], [0.1, 1.0]]))
        >>> heatmap("net", heat, Scale("gradient"), [], Look()).data[0].z.tolist()
        [[0.0, -1.0], [1.0, 0.0]]
    """
    figure, cells = Figure(), reduced(heat, scale, room)
    _add(figure, cells, look)
    figure.update_layout(coloraxis=_colours([cells], scale, look))
    _frame(figure, heat, cells, spans, look)
    title, words = f"{scale.words} of {short(name)}", _told([cells], scale)
    look.finish(figure, title[:1].upper() + title[1:], words=words)
    figure.update_xaxes(title="optimizer step", **_steps([heat]))
    figure.update_layout(height=230 + min(320, max(60, 14 * len(cells.names))))
    return figure


def heatmaps(runs: Mapping[str, Heat], scale: Scale, look: Look) -> Figure:
    """The same statistic of several runs under one another, in the same colours.

    Args:
        runs: by their names, at least one; the last `_MOST_RUNS` are drawn.
        scale: of the colours.
        look: of the picture.
    """
    drawn = dict(list(runs.items())[-_MOST_RUNS:])
    cells = [reduced(heat, scale, CELLS // len(drawn)) for heat in drawn.values()]
    titles = [short(name, 60) for name in drawn]
    figure = make_subplots(
        len(drawn), 1, shared_xaxes=True, subplot_titles=titles, vertical_spacing=0.2 / len(drawn)
    )
    for row, part in enumerate(cells, start=1):
        _add(figure, part, look, row=row, col=1)
    figure.update_layout(coloraxis=_colours(cells, scale, look))
    look.finish(figure, f"{scale.words[:1].upper()}{scale.words[1:]} of the runs", words=_told(cells, scale))
    figure.update_xaxes(**_steps(drawn.values()))
    figure.update_xaxes(title="optimizer step", row=len(drawn))
    figure.update_annotations(x=0, xanchor="left", font={"size": 13})
    figure.update_layout(height=150 + 150 * len(drawn))
    return figure


def _named(names: Sequence[str]) -> str:
    """Of one layer its name, of several the first and the last."""
    return names[0] if len(names) == 1 else f"{names[0]}{_TO}{names[-1]}"


def _bins(table: Table, down: Starts, across: Starts, read: np.ufunc) -> Table:
    return np.asarray(read.reduceat(read.reduceat(table, down, axis=0), across, axis=1))


def _farthest(table: Table, down: Starts, across: Starts) -> Table:
    """Of each cell the number that is farthest from the median of all; NaN where there is none."""
    known = table[~np.isnan(table)]
    middle = float(np.median(known)) if len(known) else 0.0
    low, high = (_bins(table, down, across, read) for read in (np.fmin, np.fmax))
    return np.where(high - middle >= middle - low, high, low).astype(np.float32)


def _add(figure: Figure, cells: Cells, look: Look, **at: int) -> None:
    """The cells, and over them those that have no place on a scale."""
    here = {"x": cells.steps, "y": _told_apart([safe(name, 2 * _NAME) for name in cells.names])}
    read = "step %{x}<br>%{y}<br>%{z:.3g}<extra></extra>"
    figure.add_trace(Heatmap(z=cells.values, coloraxis="coloraxis", hovertemplate=read, **here), **at)
    for words, where, colour in (
        ("zero", cells.zero, look.ink),
        ("infinite", cells.infinite, look.colours[3]),
    ):
        if where.any():
            one = {"colorscale": [[0, colour], [1, colour]], "showscale": False, "hoverongaps": False}
            z = np.where(where, 1.0, np.nan).astype(np.float32)
            figure.add_trace(Heatmap(z=z, **here, **one, hovertemplate=read.replace("%{z:.3g}", words)), **at)
    figure.update_traces(hoverongaps=False)
    axis = {
        **ticks([name.split(_TO)[0] for name in cells.names]),
        "tickangle": 0,
        "range": [len(cells.names) - 0.5, -0.5],
    }
    figure.update_yaxes(type="category", **axis, **at)


def _told_apart(names: Sequence[str]) -> list[str]:
    """Names with letters behind them that are not seen, so that no two are the same and none is a number."""
    seen: Counter[str] = Counter()
    found = []
    for name in names:
        seen[name] += 1
        found.append(name + "\u200b" * seen[name])
    return found


def _colours(parts: Sequence[Cells], scale: Scale, look: Look) -> dict[str, Any]:
    """One scale of colours for all parts, with its bar above them."""
    values = np.concatenate([part.values.ravel() for part in parts])
    known = values[~np.isnan(values)]
    bar: dict[str, Any] = {"orientation": "h", "thickness": 8, "len": 0.5, "outlinewidth": 0, "ypad": 3}
    bar |= {"x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom"}
    bar |= {"ticklabelposition": "outside top"}
    if not scale.powers:
        return {
            "colorscale": [[0, look.scale[1][1]], [1, look.colours[1]]],
            "cmin": 0,
            "cmax": 1,
            "colorbar": bar,
        }
    middle = scale.middle if scale.middle is not None else float(np.median(known)) if len(known) else 0.0
    reach = max(float(np.abs(known - middle).max(initial=0.0)), _DECADES)
    bar |= _powers(middle - reach, middle + reach)
    return {"colorscale": look.scale, "cmin": middle - reach, "cmax": middle + reach, "colorbar": bar}


def _powers(low: float, high: float) -> dict[str, Any]:
    """Ticks of a bar that tells powers of ten apart, no more than six."""
    stride = max(1, math.ceil((high - low) / 6))
    at = [k for k in range(math.ceil(low), math.floor(high) + 1) if k % stride == 0]
    return {"tickmode": "array", "tickvals": at, "ticktext": [f"10<sup>{k}</sup>" for k in at]}


def _frame(figure: Figure, heat: Heat, cells: Cells, spans: Sequence[Span], look: Look) -> None:
    """Frames around layers and steps of findings; those of the same place share one, with all names."""
    found: dict[tuple[int, int, int, int], list[str]] = {}
    first, end = int(heat.steps[0]), int(heat.steps[-1])
    for span in sorted((span for span in spans if span.severity), key=lambda span: -span.severity):
        for upper, lower in _stretches(_concerned(heat, span.places)):
            top, bottom = np.searchsorted(cells.first, [upper, lower], side="right") - 1
            place = (span.began, end if span.ended is None else span.ended, int(top), int(bottom))
            found.setdefault(place, []).append(span.words)
    line = {"color": look.ink, "width": 1.5}
    for (began, ended, top, bottom), words in list(found.items())[:_MOST_FRAMES]:
        figure.add_shape(type="rect", x0=began, x1=ended, y0=top - 0.5, y1=bottom + 0.5, line=line)
        figure.add_annotation(
            text=lines(list(dict.fromkeys(words)), 2), x=min(max(began, first), end), y=top - 0.5,
            xanchor="right" if began > end / 2 else "left", yanchor="top", showarrow=False,
            bgcolor=look.ground, opacity=0.85, font={"size": 12},
        )  # fmt: skip


def _concerned(heat: Heat, places: Sequence[str]) -> list[int]:
    """The rows of which a place is the layer or a parameter."""
    known = {heat.within.get(place, place) for place in places}
    above = {path for place in known for path in _paths(place)}
    return [row for row, name in enumerate(heat.names) if name in above or known.intersection(_paths(name))]


def _paths(name: str) -> list[str]:
    """A name, and what it is part of.

    >>> _paths("a.b.weight")
    ['a', 'a.b', 'a.b.weight']
    """
    parts = name.split(".")
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


def _stretches(rows: Sequence[int]) -> list[tuple[int, int]]:
    """First and last of each stretch of neighbours, which may leave out every other one.

    >>> _stretches([1, 2, 4, 9])
    [(1, 4), (9, 9)]
    """
    found: list[tuple[int, int]] = []
    for row in rows:
        near = found and row <= found[-1][1] + 2
        found[-1:] = [(found[-1][0], row)] if near else [*found[-1:], (row, row)]
    return found


def _steps(parts: Iterable[Heat]) -> dict[str, Any]:
    """An axis of all steps; of few of them each is named."""
    steps = np.concatenate([part.steps for part in parts])
    first, last = int(steps.min()), int(steps.max())
    ticks = {"dtick": 1} if last - first < _FEW else {}
    return {"range": [first - 0.5, last + 0.5], **ticks, **PLAIN}


def _told(parts: Sequence[Cells], scale: Scale) -> str:
    """How to read the picture."""
    said = ["Layers from the input (top) to the output."]
    if scale.powers:
        said.append("Blue is larger and orange smaller than usual.")
    if any(part.zero.any() for part in parts):
        said.append("In the colour of the letters: exactly zero.")
    if any(part.infinite.any() for part in parts):
        said.append("Pink: infinite.")
    layers, steps = (max(part.each[axis] for part in parts) for axis in (0, 1))
    if layers > 1 or steps > 1:
        said.append(f"Each cell shows the most unusual of up to {layers} layers and {steps} readings.")
    return " ".join(said)
