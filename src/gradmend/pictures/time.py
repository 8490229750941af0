"""Time: the gradient on its way back through the steps of sequences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from plotly.graph_objects import Figure

from gradmend.console import number
from gradmend.look import Look
from gradmend.pictures.labels import safe
from gradmend.pictures.lines import PREDICTED, Line, decades, draw, line

_MOST: Final = 6
"""So many lines can be told apart; of more the worst are drawn."""
_BESIDE: Final = 3
"""So many names have room above the picture; more are listed below it."""
_ROW: Final = 22


@dataclass(frozen=True)
class Series:
    """The gradient along time in one layer and direction.

    Args:
        name: of the layer, and which way it reads.
        back: steps before the end, rising.
        sizes: root mean square of the gradient there.
        factor: by which it should change per step back, as single steps have it; NaN if unknown.
    """

    name: str
    back: tuple[int, ...]
    sizes: tuple[float, ...]
    factor: float = math.nan

    @property
    def change(self) -> float:
        """Powers of ten between both ends, either way; infinite if one of them is no positive number."""
        ends = [self.sizes[0], self.sizes[-1]] if self.sizes else []
        known = len(ends) == 2 and all(0 < end < math.inf for end in ends)
        return abs(math.log10(ends[1]) - math.log10(ends[0])) if known else math.inf


def through_time(measured: Mapping[str, Sequence[Series]], dark: bool = False) -> Figure:
    """The gradient's size against steps back from the end, on an axis of powers of ten.

    A band shows what single steps let expect. Of several measurements the last is in colour and those before
    it are pale, without bands. Of many layers those are drawn whose gradient changes most.

    Args:
        measured: by name, such as before and after; at least one series in all.
        dark: for a dark background.

    Examples:
        >>> figure = through_time({"": [Series("rnn", (0, 1, 2), (1.0, 0.5, 0.25), factor=0.5)]})
        >>> [trace.y.tolist() for trace in figure.data]
        [[1.0, 0.5, 0.25], [1.0, 0.5, 0.25]]

    Source: Pascanu, Mikolov, Bengio, On the difficulty of training recurrent neural networks, 2013,
    https://arxiv.org/abs/1211.5063
    """
    look = Look(dark)
    drawn = {name: _worst(series) for name, series in measured.items()}
    lines = list(_lines(drawn, look))
    figure = Figure()
    draw(figure, lines, decades(lines))
    title = {"text": "steps back in time", "font": {"size": 12}}
    figure.update_xaxes(title=title, rangemode="tozero", zeroline=False)
    title = {"text": "size of the gradient (root mean square)", "font": {"size": 12}}
    figure.update_yaxes(title=title)
    look.finish(figure, "The gradient through time", words=_words(drawn, measured))
    listed = sum(trace.showlegend for trace in figure.data)
    foot = 70 + _ROW * listed if listed > _BESIDE else 60
    below = {"orientation": "v", "x": 0, "xanchor": "left", "y": -60 / 300, "yanchor": "top"}
    legend = below if listed > _BESIDE else {}
    figure.update_layout(height=360 + foot, margin={"b": foot}, legend=legend)
    return figure


def _worst(series: Sequence[Series]) -> list[Series]:
    chosen = sorted(range(len(series)), key=lambda place: -series[place].change)[:_MOST]
    return [series[place] for place in sorted(chosen)]


def _lines(measured: Mapping[str, Sequence[Series]], look: Look) -> Iterator[Line]:
    colours = [look.colours[place] for place in (0, 3, 2, 1, 6, 7)]
    for order, (when, series) in enumerate(measured.items(), start=1):
        last = order == len(measured)
        for each, colour in zip(series, colours, strict=False):
            label = safe(each.name)
            words = f"{label}, {when}" if when else label
            names = [f"{label}, {back} steps back" for back in each.back]
            at = np.array(each.back, dtype=np.int64)
            if len(measured) == 1 and len(predicted := _predicted(each)):
                yield line(PREDICTED, names, at, predicted, look.colours[4])
            yield line(words, names, at, each.sizes, colour if last else look.pale)


def _predicted(series: Series) -> list[float | None]:
    """From the size at the nearest step on; none where that or the factor is unknown."""
    if not series.sizes or not series.factor > 0 or not 0 < series.sizes[0] < math.inf:
        return []
    start = math.log(series.sizes[0])
    logs = [start + (back - series.back[0]) * math.log(series.factor) for back in series.back]
    return [math.exp(log) if _SMALLEST < log < _LARGEST else None for log in logs]


_SMALLEST, _LARGEST = -700.0, 700.0
"""Numbers of which exp is a positive number, too."""


def _words(drawn: Mapping[str, Sequence[Series]], given: Mapping[str, Sequence[Series]]) -> str:
    told = [_told(when, each) for when, series in drawn.items() for each in series]
    count, shown = (max(len(series) for series in some.values()) for some in (given, drawn))
    left = [f"{shown} of {count} layers and directions are drawn."] if shown < count else []
    known = len(drawn) == 1 and any(_predicted(each) for series in drawn.values() for each in series)
    band = ["The band changes as single steps of the network do."] if known else []
    return " ".join([*told, *band, *left])


def _told(when: str, series: Series) -> str:
    ends = f"from {number(series.sizes[0])} at the end to {number(series.sizes[-1])}"
    text = f"Over {series.back[-1] - series.back[0]} steps back the gradient at {series.name} goes {ends}."
    return f"{when.capitalize()}: {text}" if when else text
