"""Depth: what becomes of signal and gradient from layer to layer, measured and predicted, in panels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any, Final

import numpy as np
from jaxtyping import Bool, Int64
from plotly.graph_objects import Figure, Scatter
from plotly.subplots import make_subplots

from gradmend.console import number
from gradmend.look import Look
from gradmend.pictures.labels import below, safe, ticks
from gradmend.pictures.lines import KEPT, MOST, PREDICTED, Line, Values, decades, draw, line, runs

Places = Int64[np.ndarray, " _"]

_FIRST, _PANEL, _LANE, _GAP, _HEAD, _FOOT = 170, 100, 34, 34, 76, 52
"""Heights in pixels: of the first panel, of others, of one cause, between two, above and below them all."""
_CAUSES: Final = 6
_PIXELS: Final = 600


@dataclass(frozen=True)
class Statistic:
    """One panel.

    Args:
        title: above it.
        logarithmic: whether its axis has powers of ten; zeros, infinities and NaN are then marked at an edge.
            On other axes they are left out.
        percent: whether it is a share.
        needed: whether the panel stands even if all is zero.
    """

    title: str
    logarithmic: bool = False
    percent: bool = False
    needed: bool = True


STATISTICS: Final = {
    "gradient": Statistic("norm of the gradient", logarithmic=True),
    "rms": Statistic("size of the output (root mean square)", logarithmic=True),
    "saturated": Statistic(
        "saturated: share of inputs where the activation is flat", percent=True, needed=False
    ),
    "dead": Statistic("dead: share of units that are zero for every sample", percent=True, needed=False),
    "cosine": Statistic("cosine between the outputs of two samples"),
}


@dataclass(frozen=True, eq=False)
class Track:
    """What one step measures at each layer, and what theory expects there.

    Args:
        layers: names, in the order of execution.
        measured: by the names of `STATISTICS`; None where a layer has no such number.
        expected: the same, predicted.
    """

    layers: tuple[str, ...]
    measured: Mapping[str, Values]
    expected: Mapping[str, Values] = field(default_factory=dict)


@dataclass(frozen=True)
class Mark:
    """Where something was found.

    Args:
        words: what.
        tone: `error`, `warning` or `note`.
        layers: names of those concerned.
    """

    words: str
    tone: str
    layers: frozenset[str]


def depth(tracks: Mapping[str, Track], marks: Sequence[Mark] = (), dark: bool = False) -> Figure:
    """Panels under one another with a common axis of layers.

    Of more than 2,000 layers each line keeps the least and the greatest of each of 500 bins.

    Args:
        tracks: by name; the last is drawn strong, those before it pale. Layers of the same name, and those
            that stand for each other, share a place.
        marks: what was found, drawn above the panels.
        dark: for a dark background.

    Examples:
        >>> track = Track(("first", "last"), {"gradient": [1e-9, 1e-3]})
        >>> [trace.y.tolist() for trace in depth({"": track}).data]
        [[1e-09, 0.001]]
    """
    names, places = aligned([track.layers for track in tracks.values()])
    panels = [each for each in STATISTICS if _told(each, tracks.values())]
    flags = [_concerned(mark, tracks.values(), places, len(names)) for mark in marks]
    found = [(mark, where) for mark, where in zip(marks, flags, strict=True) if where.any()][:_CAUSES]
    lanes = [_LANE * len(found)] if found else []
    heights = [*lanes, _FIRST, *[_PANEL] * (len(panels) - 1)]
    figure = _panels(heights)
    if found:
        _lanes(figure, found, Look(dark))
    for row, each in enumerate(panels, start=1 + bool(found)):
        _panel(figure, row, STATISTICS[each], list(_lines(each, tracks, places, Look(dark))))
    return _finished(figure, heights, names, tracks, Look(dark))


def aligned(tracks: Sequence[tuple[str, ...]]) -> tuple[list[str], list[Places]]:
    """One axis for the layers of several networks, and where on it those of each lie.

    What is in one only has a place of its own; what took the place of something else shares it.

    Args:
        tracks: names of layers in the order of execution, at least one tuple.

    Examples:
        >>> names, places = aligned([("a", "b", "d"), ("a", "b", "c", "d")])
        >>> names, places[0].tolist()
        (['a', 'b', 'c', 'd'], [0, 1, 3])
    """
    names, places = list(tracks[0]), [np.arange(len(tracks[0]))]
    for track in tracks[1:]:
        names, known, new = _merged(names, list(track))
        places = [*(known[each] for each in places), new]
    return names, places


def _merged(known: list[str], new: list[str]) -> tuple[list[str], Places, Places]:
    if known == new:
        return known, np.arange(len(known)), np.arange(len(new))
    names: list[str] = []
    at: tuple[list[int], list[int]] = ([], [])
    for _, a, b, c, d in SequenceMatcher(None, known, new, autojunk=False).get_opcodes():
        for places, count in zip(at, (b - a, d - c), strict=True):
            places.extend(range(len(names), len(names) + count))
        names += [*known[a:b], *new[c + b - a : d]]
    return names, np.array(at[0], dtype=np.int64), np.array(at[1], dtype=np.int64)


def _told(statistic: str, tracks: Iterable[Track]) -> bool:
    """Whether a panel has anything to show."""
    spec = STATISTICS[statistic]
    given = [value for track in tracks for value in track.measured.get(statistic, ()) if value is not None]
    return any(spec.logarithmic or (math.isfinite(v) and (spec.needed or v > 0)) for v in given)


def _panels(heights: Sequence[int]) -> Figure:
    rows = max(1, len(heights))
    room = sum(heights) + _GAP * (rows - 1)
    return make_subplots(
        rows, shared_xaxes=True, row_heights=list(heights) or None, vertical_spacing=_GAP / max(room, _GAP)
    )


def _concerned(
    mark: Mark, tracks: Iterable[Track], places: Sequence[Places], count: int
) -> Bool[np.ndarray, " places"]:
    """Where on the axis the layers of a mark lie."""
    flags = np.zeros(count, dtype=bool)
    for track, at in zip(tracks, places, strict=True):
        flags[at[[name in mark.layers for name in track.layers]]] = True
    return flags


def _lanes(figure: Figure, marks: Sequence[tuple[Mark, Bool[np.ndarray, " places"]]], look: Look) -> None:
    """A line of its own for each mark: its words, and below them a stroke at each layer concerned."""
    tones = {"error": look.colours[1], "warning": look.colours[6]}
    for row, (mark, where) in enumerate(marks):
        strokes = _strokes(where)
        colour, words = tones.get(mark.tone, look.pale), f"{safe(mark.words, 80)} · {mark.tone}"
        stroke = {"color": colour, "width": 6}
        told = {"name": words, "hoverinfo": "name", "showlegend": False}
        xs = np.array(strokes).reshape(-1)
        figure.add_trace(
            Scatter(x=xs, y=np.full(len(xs), -row), mode="lines", line=stroke, **told), row=1, col=1
        )
        _note(figure, words, yref="y", y=0.06 - row)
    figure.update_yaxes(visible=False, range=[0.6 - len(marks), 0.7], row=1, col=1)
    figure.update_xaxes(showgrid=False, row=1, col=1)


def _lines(
    statistic: str, tracks: Mapping[str, Track], places: Sequence[Places], look: Look
) -> Iterator[Line]:
    """What was measured; beside a single track also what theory says, as two of each are too many."""
    for order, ((name, track), at) in enumerate(zip(tracks.items(), places, strict=True), start=1):
        if statistic in track.measured:
            colour = look.colours[0] if order == len(tracks) else look.pale
            yield line(name or "measured", track.layers, at, track.measured[statistic], colour)
        if statistic in track.expected and len(tracks) == 1:
            yield line(PREDICTED, track.layers, at, track.expected[statistic], look.colours[4])


def _strokes(where: Bool[np.ndarray, " places"]) -> list[tuple[float, float, float]]:
    """From where to where, each followed by a gap; what lies closer than a pixel becomes one."""
    step = max(1, math.ceil(len(where) / _PIXELS))
    bins = np.logical_or.reduceat(where, np.arange(0, len(where), step))
    return [(start * step - 0.4, min(end * step, len(where)) - 0.6, math.nan) for start, end in runs(bins)]


def _panel(figure: Figure, row: int, spec: Statistic, lines: Sequence[Line]) -> None:
    axis = decades(lines) if spec.logarithmic else _axis(spec, lines)
    draw(figure, lines, axis, row)
    _note(figure, spec.title, yref=f"y{row if row > 1 else ''} domain", y=1.04)


def _axis(spec: Statistic, lines: Sequence[Line]) -> dict[str, Any]:
    if spec.percent:
        return {"range": [-0.03, 1.05], "tickformat": ".0%", "tickvals": [0, 0.5, 1]}
    low = min(float(np.nanmin(line.values, initial=0.0)) for line in lines)
    return {"range": [low - 0.05, 1.08], "nticks": 4}


def _note(figure: Figure, words: str, **where: Any) -> None:
    font, at = {"size": 12}, {"xref": "paper", "x": 0, "xanchor": "left", "yanchor": "bottom"}
    figure.add_annotation(text=words, showarrow=False, font=font, **at, **where)


def _finished(
    figure: Figure, heights: Sequence[int], names: Sequence[str], tracks: Mapping[str, Track], look: Look
) -> Figure:
    look.finish(figure, "Signal and gradient, layer by layer", words=_words(tracks))
    room = sum(heights) + _GAP * (len(heights) - 1)
    axis = ticks(names)
    foot = _FOOT + below(axis["ticktext"])
    figure.update_layout(
        height=room + _HEAD + foot,
        margin={"t": _HEAD, "b": foot},
        legend={"y": 1 + (_GAP - 8) / room, "traceorder": "reversed" if len(tracks) == 1 else "normal"},
    )
    figure.update_xaxes(range=[-0.5, len(names) - 0.5], zeroline=False)
    title = {"text": "from the input to the output", "font": {"size": 12}, "standoff": 8}
    figure.update_xaxes(**axis, title=title, row=len(heights), col=1)
    return figure


def _words(tracks: Mapping[str, Track]) -> str:
    """What is to be seen, in numbers."""
    told = [_gradient(name, track) + _guess(track) * (len(tracks) == 1) for name, track in tracks.items()]
    most = max(len(track.layers) for track in tracks.values())
    if most > MOST:
        told.append(
            f"Of {most} layers the lines keep the least and the greatest of every {2 * most // KEPT}."
        )
    return " ".join(filter(None, told))


def _gradient(name: str, track: Track) -> str:
    known = [each for each in track.measured.get("gradient", ()) if each is not None]
    if len(known) < 2:
        return ""
    when = f"{name.capitalize()}: " if name else ""
    if lost := sum(not math.isfinite(each) for each in known):
        return f"{when}The gradient is no number at {lost} of {len(known)} layers."
    ends = f"from {number(known[-1])} at the last layer to {number(known[0])} at the first"
    return f"{when}The norm of the gradient goes {ends}."


def _guess(track: Track) -> str:
    known = [each for each in track.expected.get("gradient", ()) if each is not None]
    return f" Theory predicts {number(known[0])} there." if len(known) == len(track.layers) > 1 else ""
