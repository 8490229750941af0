"""Curves: the losses of short trainings beside each other, and what one training did."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

import numpy as np
from plotly.graph_objects import Figure, Scatter
from plotly.subplots import make_subplots

from gradmend.console import number
from gradmend.look import Look, logarithmic
from gradmend.pictures.labels import safe
from gradmend.pictures.lines import band as filled
from gradmend.pictures.thinning import MOST, Thinned, Values, thinned

_BINS: Final = 120
"""Of one curve among others."""
_TRIALS: Final = 8
_WIDE: Final = 20.0
"""A greatest loss so many times the least asks for powers of ten."""
_HIGH: Final = 10.0
"""Losses above so many times the first are beyond the picture."""
_ROW: Final = 22
_LONG: Final = 44
"""Letters of a name, per line."""
_RANKS: Final = {"first": 1, "chosen": 2, "other": 3}


@dataclass(frozen=True, eq=False)
class Curve:
    """The losses of one training.

    Args:
        name: what trained.
        losses: of every optimizer step; the last ones may be NaN or infinite.
        place: `first` for what the others are compared with, `chosen`, or `other`.
    """

    name: str
    losses: Values
    place: str = "other"


def trials(curves: Sequence[Curve], dark: bool = False) -> Figure:
    """Losses over steps: medians of short stretches, with a band from the least to the greatest.

    Of more than eight the longest are drawn.

    Args:
        curves: at least one step in all.
        dark: for a dark background.

    Examples:
        >>> figure = trials([Curve("untreated", [2.0, 2.0], "first"), Curve("mended", [2.0, 0.1], "chosen")])
        >>> [trace.name for trace in figure.data]
        ['untreated', 'mended · chosen']
    """
    look = Look(dark)
    shown = _longest(curves)
    figure = Figure()
    for curve, (colour, width) in zip(shown, _styles(shown, look), strict=True):
        seen = thinned(curve.losses, _BINS)
        name = _wrapped(f"{curve.name} · chosen" if curve.place == "chosen" else curve.name)
        for trace in _traces(seen, name, colour, width, band=curve.place != "other"):
            figure.add_trace(trace.update(legendrank=_RANKS[curve.place]))
        _ended(figure, curve.losses, colour)
    figure.update_yaxes(_axis([curve.losses for curve in shown]), title=_small("loss"))
    figure.update_xaxes(title=_small("optimizer step"), rangemode="tozero", zeroline=False)
    look.finish(figure, "What the trials learned", words=_words(curves, shown))
    foot = 70 + _ROW * sum(1 + trace.name.count("<br>") for trace in figure.data if trace.showlegend is None)
    legend = {"orientation": "v", "x": 0, "xanchor": "left", "y": -64 / 300, "yanchor": "top"}
    figure.update_layout(height=360 + foot, margin={"b": foot}, legend=legend)
    return figure


def history(losses: Values, accuracy: Values, tested: float | None = None, dark: bool = False) -> Figure:
    """The loss over the steps of a training, and below it the accuracy of its epochs.

    Args:
        losses: of every optimizer step, at least one.
        accuracy: while training, of each epoch; empty if there is none.
        tested: the accuracy on test rows after training.
        dark: for a dark background.

    Examples:
        >>> figure = history([2.0, 1.0], [0.5, 0.75], tested=0.7)
        >>> [trace.name for trace in figure.data]
        ['loss', 'accuracy', 'test accuracy']
    """
    look, known = Look(dark), len(accuracy) > 0 or tested is not None
    figure = make_subplots(1 + known, shared_xaxes=True, vertical_spacing=0.08)
    for trace in _traces(thinned(losses, MOST), "loss", look.colours[0], 2.0, band=True):
        figure.add_trace(trace.update(showlegend=False), row=1, col=1)
    _ended(figure, losses, look.colours[0])
    figure.update_yaxes(_axis([losses]), title=_small("loss"), row=1, col=1)
    for trace in _shares(len(losses), accuracy, tested, look) if known else ():
        figure.add_trace(trace, row=2, col=1)
    if known:
        figure.update_yaxes(title=_small("accuracy"), tickformat=".0%", row=2, col=1)
    figure.update_xaxes(title=_small("optimizer step"), row=1 + known, col=1)
    figure.update_xaxes(rangemode="tozero", zeroline=False)
    look.finish(
        figure, "What the training did", words=" ".join([_course(losses), *_grain(len(losses), MOST)])
    )
    figure.update_layout(height=360 + 160 * known, showlegend=tested is not None)
    return figure


def _wrapped(name: str) -> str:
    """A name in as many lines as a narrow page needs."""
    return "<br>".join(safe(line, _LONG) for line in textwrap.wrap(name[: 4 * _LONG], _LONG))


def _longest(curves: Sequence[Curve]) -> list[Curve]:
    """Those that got furthest, in their order; what is compared or chosen stays."""
    first = sorted(curves, key=lambda curve: (curve.place == "other", -len(curve.losses)))[:_TRIALS]
    kept = {id(curve) for curve in first}
    return sorted(
        (curve for curve in curves if id(curve) in kept),
        key=lambda curve: curve.place == "chosen",
    )


def _styles(curves: Sequence[Curve], look: Look) -> Iterator[tuple[str, float]]:
    others = iter([*look.colours[2:4], *look.colours[4:7], look.colours[1]])
    for curve in curves:
        if curve.place == "first":
            yield look.pale, 2.0
        elif curve.place == "chosen":
            yield look.colours[0], 3.0
        else:
            yield next(others), 1.2


def _traces(seen: Thinned, name: str, colour: str, width: float, band: bool) -> Iterator[Scatter]:
    """A band where values were brought together, and the line of their medians."""
    if band and seen.each > 1:
        yield filled(seen.at + 1, seen.low, seen.high, colour, 0.25, name=name)
    yield Scatter(
        x=seen.at + 1,
        y=seen.middle,
        mode="lines" if len(seen.at) > 1 else "markers",
        line={"color": colour, "width": width},
        marker={"color": colour},
        name=name,
        hovertemplate="step %{x}: %{y:.4g}<extra></extra>",
    )


def _ended(figure: Figure, losses: Values, colour: str) -> None:
    """A cross at the last finite loss before one that was none."""
    values = np.asarray(losses, dtype=np.float64)
    if np.isfinite(values).all() or not math.isfinite(values[0]):
        return
    lost = int((~np.isfinite(values)).argmax())
    words = "NaN" if np.isnan(values[lost]) else "inf"
    figure.add_trace(
        Scatter(
            x=[lost],
            y=[values[lost - 1]],
            mode="markers+text",
            text=[words],
            textposition="middle right",
            marker={"color": colour, "symbol": "x", "size": 9},
            hoverinfo="skip",
            showlegend=False,
            name=words,
        )
    )


def _axis(series: Sequence[Values]) -> dict[str, Any]:
    """Powers of ten where losses are that wide; what has exploded runs out of the picture."""
    values = [np.asarray(each, dtype=np.float64) for each in series]
    finite = np.concatenate([each[np.isfinite(each)] for each in values])
    if not len(finite):
        return {"range": [0, 1]}
    starts = [float(each[0]) for each in values if len(each) and np.isfinite(each[0])]
    low, high = float(finite.min()), float(finite.max())
    high = min(high, _HIGH * max(starts, default=high)) if high > 0 else high
    if low > 0 and high > _WIDE * low:
        small = {"dtick": 1, "tickfont": {"size": 11}}
        return {**small, **logarithmic(low, high), "range": [math.log10(low) - 0.1, math.log10(high) + 0.1]}
    return {"range": [min(0.0, low), high + 0.05 * (high - min(0.0, low))]}


def _shares(steps: int, accuracy: Values, tested: float | None, look: Look) -> Iterator[Scatter]:
    ends = np.arange(1, len(accuracy) + 1) * steps / max(1, len(accuracy))
    seen, colour = thinned(accuracy, MOST), look.colours[0]
    if len(accuracy):
        yield Scatter(
            x=ends[seen.at],
            y=seen.middle,
            mode="lines+markers" if seen.each == 1 and len(accuracy) <= 60 else "lines",
            line={"color": colour, "width": 2},
            name="accuracy",
            hovertemplate="%{y:.2%}<extra></extra>",
            showlegend=tested is not None,
        )
    if tested is not None:
        yield Scatter(
            x=[steps],
            y=[tested],
            mode="markers",
            marker={"color": look.colours[1], "size": 10, "symbol": "diamond"},
            name="test accuracy",
            hovertemplate="%{y:.2%} on test rows<extra></extra>",
        )


def _small(words: str) -> dict[str, Any]:
    return {"text": words, "font": {"size": 12}}


def _words(curves: Sequence[Curve], shown: Sequence[Curve]) -> str:
    told = [f"{curve.name}: {_course(curve.losses)}" for curve in shown if curve.place != "other"]
    left = [f"{len(shown)} of {len(curves)} trials are drawn."] if len(shown) < len(curves) else []
    return " ".join([*told, *_grain(max(len(curve.losses) for curve in shown), _BINS), *left])


def _course(losses: Values) -> str:
    """From where to where, by medians of the first and the last tenth."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    if not finite:
        return "The loss was no number from the first step on."
    tenth = max(1, len(finite) // 10)
    ends = f"from {number(median(finite[:tenth]))} to {number(median(finite[-tenth:]))}"
    lost = " and then was no number" if len(finite) < len(losses) else ""
    return f"The loss went {ends} in {len(losses)} steps{lost}."


def _grain(longest: int, bins: int) -> list[str]:
    each = -(-longest // bins)
    return [f"Each point is the median of up to {each} steps, the band their extremes."] if each > 1 else []
