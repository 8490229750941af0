"""The course of a training: loss, gradient and learning rate over steps, and what was found meanwhile."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Final, TypeAlias

import numpy as np
from jaxtyping import Bool, Float64, Int64
from plotly.graph_objects import Figure, Scatter
from plotly.subplots import make_subplots

from gradmend.console import lines, number
from gradmend.look import Look, logarithmic
from gradmend.pictures.labels import elided
from gradmend.pictures.lines import band
from gradmend.pictures.thinning import MOST, Thinned, thinned

MOST_RUNS, MOST_LANES, _MOST_SMALL = 8, 6, 12
"""Runs that colours tell apart; lanes of findings beside which curves are still seen; small pictures."""

_GREATEST = 308.0
"""Powers of ten that a number can hold."""

_FEW = 60
"""Points, so that each is drawn as one."""

_WIDE = 20.0
"""A series whose greatest value is so many times its least is drawn in powers of ten."""

PLAIN: Final = {"exponentformat": "none", "separatethousands": True}
"""Of an axis of steps: they are counted, not measured."""

_LOSS, _SMALL, _LANE, _GAP, _TOP, _BOTTOM = 230, 110, 34, 44, 84, 56
"""Pixels: heights of the loss, of the panels below, and of a lane; between panels; above and below all."""


Floats: TypeAlias = Float64[np.ndarray, " _"]
Counts: TypeAlias = Int64[np.ndarray, " _"]


@dataclass(frozen=True, eq=False)
class Curves:
    """What was read at the steps of a training.

    Args:
        steps: of the optimizer, rising.
        loss: at each step; NaN where it was NaN, or not read.
        known: whether the loss was read.
        gradient: norm over all parameters; NaN where it was not read.
        rate: the largest learning rate; NaN where it was not read.
    """

    steps: Int64[np.ndarray, " steps"]
    loss: Float64[np.ndarray, " steps"]
    known: Bool[np.ndarray, " steps"]
    gradient: Float64[np.ndarray, " steps"]
    rate: Float64[np.ndarray, " steps"]


@dataclass(frozen=True)
class Span:
    """What was found, and from which step to which.

    Args:
        words: its name.
        began: the step.
        ended: the step; None if it lasted to the end.
        severity: 2 is an error, 1 a warning, 0 a note.
        places: names of the layers or parameters concerned.
    """

    words: str
    began: int
    ended: int | None
    severity: int = 2
    places: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class _Panel:
    title: str
    steps: Counts
    values: Floats
    height: int


def course(name: str, curves: Curves, spans: Sequence[Span], look: Look) -> Figure:
    """Loss, gradient norm and learning rate under one another, and below them when what was found.

    Args:
        name: of what trained.
        curves: of the training; what was never read is left out, as is a rate that never changes.
        spans: of the findings.
        look: of the picture.

    Examples:
        >>> unread = np.full(3, np.nan)
        >>> curves = Curves(np.arange(1, 4), np.array([3.0, 2.0, 1.0]), np.ones(3, bool), unread, unread)
        >>> course("net", curves, [Span("plateau", 2, None)], Look()).data[0].y.tolist()
        [3.0, 2.0, 1.0]
    """
    panels, lanes = _panels(curves), _lanes(spans)
    heights = [panel.height for panel in panels] + [_LANE * len(lanes)] * bool(lanes)
    room = sum(heights) + _GAP * (len(heights) - 1)
    figure = make_subplots(
        len(heights), 1, shared_xaxes=True, row_heights=heights, vertical_spacing=_GAP / room
    )
    for row, panel in enumerate(panels, start=1):
        _draw_panel(figure, panel, row, look)
    if lanes:
        _draw_lanes(figure, lanes, _last(curves, spans), len(heights), look)
    for began in sorted({span.began for found in lanes.values() for span in found}):
        _mark(figure, began, look, yref="paper")
    look.finish(figure, f"The course of {short(name)}", words=_told(curves, spans))
    figure.update_xaxes(**PLAIN)
    figure.update_xaxes(title="optimizer step", row=len(heights))
    figure.update_layout(height=room + _TOP + _BOTTOM, margin={"t": _TOP, "b": _BOTTOM}, showlegend=False)
    return figure


def short(name: str, most: int = 40) -> str:
    """The name of a run as plotly can show it: without its middle if it is long, and without any markup.

    >>> short("python <train>.py --lr 0.1", 15)
    'python …-lr 0.1'
    """
    return escape(elided(name, most), quote=False)


def overlay(runs: Mapping[str, Curves], look: Look) -> Figure:
    """The losses of several runs in one picture, each with its name at its end.

    Args:
        runs: by their names, at least one; the last `MOST_RUNS` are drawn.
        look: of the picture.
    """
    figure, drawn = Figure(), dict(list(runs.items())[-MOST_RUNS:])
    axis = _axis(curves.loss for curves in drawn.values())
    for (name, curves), colour in zip(drawn.items(), look.colours, strict=False):
        _curve(figure, curves.steps, thinned(curves.loss), colour, short(name))
    _name_ends(figure, drawn, axis, look)
    figure.update_yaxes(title="loss", **axis)
    figure.update_xaxes(title="optimizer step", **PLAIN)
    some = f"The last {MOST_RUNS} of {len(runs)} are shown." if len(runs) > MOST_RUNS else ""
    grain = _grain([curves.loss for curves in drawn.values()])
    words = [f"The losses of {len(drawn)} runs.", some, grain]
    look.finish(figure, "The losses of the runs", words=" ".join(filter(None, words)))
    figure.update_layout(margin={"r": 140}, showlegend=False)
    return figure


def multiples(runs: Mapping[str, Curves], spans: Mapping[str, Sequence[Span]], look: Look) -> Figure:
    """The losses of several runs side by side on common axes, with lines where findings began.

    Args:
        runs: by their names, at least one; the last dozen are drawn.
        spans: what was found in each.
        look: of the picture.
    """
    drawn = dict(list(runs.items())[-_MOST_SMALL:])
    columns = min(2, len(drawn))
    rows = -(-len(drawn) // columns)
    figure = make_subplots(
        rows, columns, shared_xaxes="all", shared_yaxes="all", subplot_titles=[short(n, 20) for n in drawn],
        horizontal_spacing=0.03, vertical_spacing=0.22 / rows,
    )  # fmt: skip
    for place, (name, curves) in enumerate(drawn.items()):
        at = {"row": place // columns + 1, "col": place % columns + 1}
        _curve(
            figure, curves.steps, thinned(curves.loss, MOST // columns), look.colours[0], short(name), **at
        )
        for began in sorted({span.began for span in spans.get(name, ()) if span.severity}):
            _mark(figure, began, look, yref="y domain", **at)
    words = f"The losses of {len(drawn)} runs on common axes; dotted lines mark where findings began."
    look.finish(figure, "The runs side by side", words=words)
    figure.update_yaxes(**_axis(curves.loss for curves in drawn.values()))
    figure.update_xaxes(**PLAIN)
    figure.update_annotations(font={"size": 12})
    figure.update_layout(height=110 + 160 * rows, showlegend=False)
    return figure


def _panels(curves: Curves) -> list[_Panel]:
    """The loss, also if there is none, and what else was read and changes."""
    found = [_Panel("loss", curves.steps[curves.known], curves.loss[curves.known], _LOSS)]
    for title, values in (("gradient norm", curves.gradient), ("learning rate", curves.rate)):
        read = ~np.isnan(values)
        changes = title != "learning rate" or len(np.unique(values[read])) > 1
        if read.any() and changes:
            found.append(_Panel(title, curves.steps[read], values[read], _SMALL))
    return found


def _lanes(spans: Sequence[Span]) -> dict[str, list[Span]]:
    """Findings by their names, the worst first."""
    found: dict[str, list[Span]] = {}
    for span in sorted(spans, key=lambda span: (-span.severity, span.began)):
        found.setdefault(span.words, []).append(span)
    return dict(list(found.items())[:MOST_LANES])


def _draw_panel(figure: Figure, panel: _Panel, row: int, look: Look) -> None:
    axis = _axis([panel.values], panel.title != "learning rate")
    colour = look.colours[0] if row == 1 else look.ink
    _curve(figure, panel.steps, thinned(panel.values), colour, panel.title, row=row, col=1)
    low, high = _ends(axis)
    lost, zero = ~np.isfinite(panel.values), panel.values == 0
    if lost.any():
        words = "NaN" if np.isnan(panel.values).any() else "infinite"
        _cross(figure, panel.steps[lost], high, words, row, look)
    if zero.any() and "type" in axis:
        _cross(figure, panel.steps[zero], low, "zero", row, look)
    figure.update_yaxes(row=row, **axis)
    _write(figure, panel.title, row, x=0, y=1, xref="x domain", yref="y domain", yanchor="bottom")


def _cross(figure: Figure, steps: Counts, height: float, words: str, row: int, look: Look) -> None:
    """Crosses at an end of an axis that has no place for such values, and from where on there are some."""
    kept = steps[np.arange(min(len(steps), MOST)) * len(steps) // min(len(steps), MOST)]
    line = {"width": 2, "color": look.colours[1]}
    figure.add_trace(
        Scatter(
            x=kept, y=np.full(len(kept), height), mode="markers", name=words, cliponaxis=False,
            marker={"symbol": "x-thin", "size": 9, "line": line}, hovertemplate="step %{x}: " + words,
        ),
        row=row, col=1,
    )  # fmt: skip
    place = {"x": steps[0], "y": 1 if words != "zero" else 0, "yref": "y domain"}
    _write(
        figure, f"{words} from step {steps[0]}", row, yanchor="middle", bgcolor=look.ground, xshift=8, **place
    )


def _curve(figure: Figure, steps: Counts, seen: Thinned, colour: str, name: str, **at: int) -> None:
    """The median of each bin as a line, and the band of all values where steps were put together."""
    x = steps[seen.at]
    if seen.each > 1:
        figure.add_trace(band(x, seen.low, seen.high, colour, 0.3), **at)
    line = Scatter(x=x, y=seen.middle, mode="lines" if len(x) > _FEW else "lines+markers", name=name)
    line.update(line={"color": colour, "width": 1.8}, marker={"color": colour, "size": 4})
    figure.add_trace(line.update(hovertemplate="step %{x}: %{y:.4g}"), **at)


def _draw_lanes(figure: Figure, lanes: Mapping[str, Sequence[Span]], last: int, row: int, look: Look) -> None:
    """One lane for each finding: from when to when as a bar, and its name above."""
    for lane, (words, spans) in enumerate(lanes.items()):
        for span in spans:
            end = last if span.ended is None else span.ended
            colour = look.colours[1] if span.severity > 1 else look.pale
            told = f"{words}<br>from step {span.began} " + (
                "to the end" if span.ended is None else f"to {end}"
            )
            bar = Scatter(
                x=[span.began, max(end, span.began)], y=[lane, lane], mode="lines+markers", name=words
            )
            bar.update(line={"width": 7, "color": colour}, marker={"size": 7, "symbol": "square"})
            figure.add_trace(bar.update(hovertemplate=told), row=row, col=1)
        right = spans[0].began > last / 2
        place = {"x": last if right else spans[0].began, "xanchor": "right" if right else "left"}
        _write(figure, words, row, y=lane, yanchor="bottom", yshift=3, **place)
    range_ = [len(lanes) - 0.6, -1]
    figure.update_yaxes(row=row, range=range_, showticklabels=False, showgrid=False, zeroline=False)


def _write(figure: Figure, text: str, row: int, **place: Any) -> None:
    figure.add_annotation(
        text=text, showarrow=False, align="left", row=row, col=1, **{"xanchor": "left", **place}
    )


def _mark(figure: Figure, step: int, look: Look, yref: str, **at: int) -> None:
    """A dotted line where a finding began."""
    line = {"color": look.pale, "width": 1, "dash": "dot"}
    figure.add_shape(type="line", x0=step, x1=step, y0=0, y1=1, yref=yref, layer="below", line=line, **at)


def _axis(series: Iterable[Floats], powers: bool = True) -> dict[str, Any]:
    """An axis for all finite values, in powers of ten where they differ much and none is below zero."""
    held = np.concatenate([np.empty(0), *series])
    finite = held[np.isfinite(held)]
    if not len(finite):
        return {"range": [0.0, 1.0], "showticklabels": False}
    low, high = float(finite.min()), float(finite.max())
    least = float(finite[finite > 0].min(initial=np.inf))
    if powers and low >= 0 and _WIDE * least < high < np.inf:
        return {**logarithmic(least, high), "range": _wider(math.log10(least), math.log10(high))}
    return {"range": _wider(low, high)}


def _wider(low: float, high: float) -> list[float]:
    """With room at both ends, also where they are the same."""
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return [low - room, high + room]


def _ends(axis: Mapping[str, Any]) -> tuple[float, float]:
    """The least and the greatest value on an axis."""
    low, high = axis["range"]
    return (10.0**low, 10.0 ** min(high, _GREATEST)) if "type" in axis else (low, high)


def _name_ends(figure: Figure, runs: Mapping[str, Curves], axis: Mapping[str, Any], look: Look) -> None:
    """Each name right of where its curve ends, moved until none covers another."""
    low, high = axis["range"]
    ends = []
    for (name, curves), colour in zip(runs.items(), look.colours, strict=False):
        finite = curves.loss[np.isfinite(curves.loss)]
        last = float(finite[-1]) if len(finite) else _ends(axis)[1]
        place = math.log10(max(last, _ends(axis)[0])) if "type" in axis else last
        ends.append(((place - low) / (high - low), name, colour))
    free = 0.0
    for place, name, colour in sorted(ends):
        free = max(place, free)
        figure.add_annotation(
            text=short(name, 18), font={"color": colour}, x=1, y=free, xref="paper", yref="paper",
            xanchor="left", yanchor="middle", xshift=6, showarrow=False,
        )  # fmt: skip
        free += 0.055


def _told(curves: Curves, spans: Sequence[Span]) -> str:
    """The picture in words."""
    losses = curves.loss[curves.known]
    finite = losses[np.isfinite(losses)]
    said = ["No loss was read."]
    if len(losses):
        said = [f"The loss goes from {_number(losses[0])} to {_number(losses[-1])} in {len(losses)} steps."]
    if len(finite):
        said = [*said, f"Its least is {_number(finite.min())}, its greatest {_number(finite.max())}."]
    if spans:
        said.append(f"Found meanwhile: {lines(list(_lanes(spans)))}.")
    return " ".join([*said, _grain([losses])]).strip()


def _grain(series: Iterable[Floats]) -> str:
    """How many steps a point stands for, if there are several."""
    each = max((-(-len(values) // MOST) for values in series), default=1)
    return (
        f"Each point stands for up to {each} steps: their median, in a band of all of them."
        if each > 1
        else ""
    )


def _number(value: float) -> str:
    return number(value, 4) if math.isfinite(value) else "NaN" if math.isnan(value) else "infinity"


def _last(curves: Curves, spans: Sequence[Span]) -> int:
    """The last step that is known of."""
    known = [1, *curves.steps[-1:].tolist(), *(span.ended or span.began for span in spans)]
    return int(max(known))
