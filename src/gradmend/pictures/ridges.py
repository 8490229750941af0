"""Ridges: the histograms of all layers, one behind the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from jaxtyping import Float64
from plotly.graph_objects import Figure, Scatter
from plotly.subplots import make_subplots

from gradmend.look import Look
from gradmend.pictures.labels import safe, spread_out

Floats: TypeAlias = Float64[np.ndarray, " bins"]

_MOST: Final = 40
_PITCH: Final = 16
"""Pixels from one ridge to the next."""
_OVERLAP: Final = 2.2
"""How many of these a ridge is high."""
_SPIKE: Final = 1.4
"""Up to so many times the peak spikes are shown."""
_EMPTY: Final = 0.5
"""Of a layer with less than this share of its values in the bins, the rest being NaN, that is said."""


@dataclass(frozen=True, eq=False)
class Ridges:
    """The histograms of the layers of one network.

    Args:
        title: of the column.
        layers: names, from the input on.
        shares: of the values, in bins of one width [bins, layers].
        reach: from where to where the bins are.
        decades: whether the values are powers of ten.
        pale: whether they only serve for comparison.
    """

    title: str
    layers: tuple[str, ...]
    shares: Float64[np.ndarray, "bins layers"]
    reach: tuple[float, float]
    decades: bool = False
    pale: bool = False


def ridges(columns: Sequence[Ridges], title: str, dark: bool = False) -> Figure:
    """Columns of ridges, from the input at the top to the output.

    Of more than 40 layers 40 are drawn, evenly chosen. Each is scaled to its own peak; spikes at zero and at
    both ends are cut.

    Args:
        columns: at least one, each with at least one layer.
        title: of the picture.
        dark: for a dark background.

    Examples:
        >>> column = Ridges("outputs", ("0", "1"), np.full((3, 2), 1 / 3), (-1.0, 1.0))
        >>> [trace.name for trace in ridges([column], "Layers").data]
        ['0', '1']

    Source: Glorot, Bengio, Understanding the difficulty of training deep feedforward neural networks, 2010,
    https://proceedings.mlr.press/v9/glorot10a.html
    """
    look = Look(dark)
    same = len({column.layers for column in columns}) == 1
    titles = [column.title for column in columns]
    figure = make_subplots(cols=len(columns), subplot_titles=titles, horizontal_spacing=0.08 if same else 0.2)
    for place, column in enumerate(columns, start=1):
        shown = spread_out(len(column.layers), _MOST)
        for row, layer in enumerate(shown):
            figure.add_trace(_ridge(column, layer, row, look), row=1, col=place)
        names = {
            "tickvals": [-row for row in range(len(shown))],
            "ticktext": [safe(column.layers[layer], 20) for layer in shown],
            "showticklabels": place == 1 or not same,
            "ticklabelstandoff": 4,
        }
        _frame(figure, column, _reach(columns, column.decades), names, place, look)
    most = max(min(len(column.layers), _MOST) for column in columns)
    look.finish(figure, title, words=_words(columns))
    figure.update_layout(height=130 + round(_PITCH * (most + _OVERLAP)), showlegend=False)
    return figure


def _ridge(column: Ridges, layer: int, row: int, look: Look) -> Scatter:
    """A closed line on the base of its row; the rows go down from 0."""
    shares, (low, high) = column.shares[:, layer], column.reach
    middle = np.linspace(low, high, 2 * len(shares) + 1)[1::2]
    height = _OVERLAP * _heights(shares, middle, column.decades)
    colour = look.pale if column.pale else look.colours[0]
    return Scatter(
        x=np.concatenate([[low], middle, [high, low]]),
        y=np.concatenate([[0.0], height, [0.0, 0.0]]) - row,
        customdata=np.concatenate([[0.0], shares, [0.0, 0.0]]),
        name=safe(column.layers[layer]),
        text=safe(column.layers[layer]),
        mode="lines",
        fill="toself",
        fillcolor=colour,
        line={"color": colour, "width": 1},
        opacity=0.7,
        hoveron="points",
        hovertemplate="%{text}<br>%{x:.3g}: %{customdata:.1%}<extra></extra>",
    )


def _heights(shares: Floats, middle: Floats, decades: bool) -> Floats:
    """Over the peak between zero and both ends; what is higher there is cut, but still stands out.

    For zeros are many where there are rectifiers, and would make all else flat.
    """
    inner = np.ones(len(shares), dtype=bool)
    inner[[0, -1]] = False
    if not decades:
        inner[np.abs(middle).argmin()] = False
    peak = shares[inner].max(initial=0.0) or shares.max(initial=0.0) or 1.0
    heights: Floats = np.minimum(shares / peak, _SPIKE) / _SPIKE
    return heights


def _reach(columns: Sequence[Ridges], decades: bool) -> tuple[float, float]:
    """What is compared has one axis."""
    ends = [column.reach for column in columns if column.decades is decades]
    return min(low for low, _ in ends), max(high for _, high in ends)


def _frame(
    figure: Figure,
    column: Ridges,
    reach: tuple[float, float],
    names: dict[str, object],
    place: int,
    look: Look,
) -> None:
    rows = len(column.layers[:_MOST])
    figure.update_yaxes(
        **names, range=[-rows + 0.5, _OVERLAP + 0.1], showgrid=False, zeroline=False, row=1, col=place
    )
    ends = {
        "showgrid": False,
        "zeroline": False,
        "showline": True,
        "linecolor": look.pale,
        "ticks": "outside",
    }
    figure.update_xaxes(**ends, **_scale(column.decades, reach), range=reach, row=1, col=place)
    for row, layer in enumerate(spread_out(len(column.layers), _MOST)):
        if column.shares[:, layer].sum() < _EMPTY:
            figure.add_annotation(
                x=sum(reach) / 2,
                y=-row,
                text="NaN",
                showarrow=False,
                yanchor="bottom",
                row=1,
                col=place,
            )


def _scale(decades: bool, reach: tuple[float, float]) -> dict[str, object]:
    if not decades:
        return {"nticks": 4, "tickangle": 0}
    low, high = (round(end) for end in reach)
    powers = range(low, high + 1, max(1, (high - low) // 3))
    return {
        "tickvals": list(powers),
        "ticktext": [f"10<sup>{power}</sup>" for power in powers],
        "tickangle": 0,
    }


def _words(columns: Sequence[Ridges]) -> str:
    most = max(len(column.layers) for column in columns)
    some = f" {_MOST} of {most} layers are drawn." if most > _MOST else ""
    return (
        "One ridge for each layer, from the input at the top to the output, each scaled to its own peak. "
        f"What lies beyond an axis is counted at its edge; spikes there and at zero are cut.{some}"
    )
