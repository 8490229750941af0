"""Phase: the plane of initializations of one activation, and where the layers of a network lie in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, TypeAlias

import numpy as np
from jaxtyping import Float64
from plotly.graph_objects import Contour, Figure, Scatter

from gradmend.console import number
from gradmend.look import Look, logarithmic
from gradmend.pictures.labels import safe, spread_out
from gradmend.theory import Activation, tabulate

Grow: TypeAlias = Callable[
    [Float64[np.ndarray, "..."], Float64[np.ndarray, "..."]], Float64[np.ndarray, "..."]
]
"""From weight and bias variances to chi."""

_LOGS: Final = np.arange(-80, 81) / 4
"""ln of the second moments at which an activation is read."""
_TINY: Final = 1e-300
_REACH: Final = (1e-2, 1e3)
"""Weight variances of a plane."""
_COLUMNS, _ROWS, _HALVINGS = 101, 33, 14
_LEAST: Final = 0.25
"""Bias variances that every plane shows."""
_ENTERING: Final = {"layer": "bias variance", "step": "variance of what enters at each step"}
_MOST: Final = 500
"""Layers that are drawn."""


@dataclass(frozen=True)
class Place:
    """A layer in the plane.

    Args:
        name: of the layer.
        weight_variance: fan_in x Var(W).
        bias_variance: Var(b).
    """

    name: str
    weight_variance: float
    bias_variance: float


@dataclass(frozen=True, eq=False)
class Plane:
    """The growth of the squared gradient per layer, where lengths have settled.

    Args:
        weight_variances: the columns.
        bias_variances: the rows.
        chi: above 1 gradients explode, below they vanish.
        critical: of each row, the weight variance where chi is 1, or NaN.
    """

    weight_variances: Float64[np.ndarray, " weights"]
    bias_variances: Float64[np.ndarray, " biases"]
    chi: Float64[np.ndarray, "biases weights"]
    critical: Float64[np.ndarray, " biases"]


@lru_cache(maxsize=16)
def plane(phi: Activation, biases: float) -> Plane:
    """The phases of an activation for weight variances from 0.01 to 1,000, from a table of its moments.

    As `theory.phase_diagram`, but for a picture: in a tenth of a second on a fine grid, to about a hundredth.

    Args:
        phi: the activation.
        biases: up to which bias variance.

    Example:
        >>> import torch
        >>> found = plane(torch.tanh, 0.05)
        >>> round(float(found.critical[-1]), 2)
        1.76

    Source: Poole et al., Exponential expressivity in deep neural networks through transient chaos, 2016,
    https://arxiv.org/abs/1606.05340
    """
    columns, rows = np.geomspace(*_REACH, _COLUMNS), biases * np.linspace(0.0, 1.0, _ROWS) ** 2
    grow = _growth(phi)
    chi = grow(columns[None, :], rows[:, None])
    return Plane(columns, rows, chi, _critical(grow, columns, rows, chi))


def _growth(phi: Activation) -> Grow:
    """Where the length map leads from 1 on, by interpolation between tabulated moments, and chi there."""
    table = tabulate(phi)
    moments = [table.moments(math.exp(log)) for log in _LOGS]
    output, slope = np.array([(each.output, each.slope) for each in moments]).T

    def grow(
        weights: Float64[np.ndarray, "..."], biases: Float64[np.ndarray, "..."]
    ) -> Float64[np.ndarray, "..."]:
        excess = np.log(np.maximum(weights[..., None] * output + biases[..., None], _TINY)) - _LOGS
        growth: Float64[np.ndarray, "..."] = weights * np.interp(_settled(excess), _LOGS, slope)
        return growth

    return grow


def _settled(excess: Float64[np.ndarray, "*plane logs"]) -> Float64[np.ndarray, "*plane"]:
    """ln of the fixed point: up from 1 where lengths grow, else down, to the first change of sign."""
    start = len(_LOGS) // 2
    upward = excess[..., start:] <= 0
    above = np.where(upward.any(-1), start + upward.argmax(-1), len(_LOGS) - 1)
    downward = excess[..., start::-1] >= 0
    below = np.where(downward.any(-1), start - downward.argmax(-1), 0)
    rises = excess[..., start] > 0
    high = np.where(rises, above, np.minimum(below + 1, start))
    low = np.where(rises, above - 1, below)
    ends = [np.take_along_axis(excess, at[..., None], -1)[..., 0] for at in (low, high)]
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.nan_to_num(ends[0] / (ends[0] - ends[1]), nan=0.0).clip(0.0, 1.0)
    settled: Float64[np.ndarray, "*plane"] = _LOGS[low] + share * (_LOGS[high] - _LOGS[low])
    return settled


def _critical(
    grow: Grow,
    columns: Float64[np.ndarray, " weights"],
    rows: Float64[np.ndarray, " biases"],
    chi: Float64[np.ndarray, "biases weights"],
) -> Float64[np.ndarray, " biases"]:
    """Of each row, the first crossing from order to chaos, found by halving."""
    crossing = (chi[:, :-1] < 1) & (chi[:, 1:] >= 1)
    first = crossing.argmax(axis=1)
    low, high = np.log(columns[first]), np.log(columns[first + 1])
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        chaotic = grow(np.exp(middle), rows) >= 1
        low, high = np.where(chaotic, low, middle), np.where(chaotic, middle, high)
    return np.where(crossing.any(axis=1), np.exp((low + high) / 2), np.nan)


def phase(
    phi: Activation,
    name: str,
    places: Mapping[str, Sequence[Place]],
    dark: bool = False,
    unit: str = "layer",
) -> Figure:
    """The ordered and the chaotic phase of an activation, the critical line, and the layers of a network.

    Args:
        phi: the activation.
        name: what it is called.
        places: of the layers, measured once or several times; by name, the last is drawn strong.
        dark: for a dark background.
        unit: what is repeated: a layer, or a step of a recurrent network.

    Example:
        >>> import torch
        >>> figure = phase(torch.tanh, "tanh", {"": [Place("1", 1 / 3, 0.01)]})
        >>> [trace.name for trace in figure.data]
        ['growth', 'edge of chaos', 'layers']

    Source: Schoenholz, Gilmer, Ganguli, Sohl-Dickstein, Deep information propagation, 2017,
    https://arxiv.org/abs/1611.01232
    """
    look, shown = Look(dark), [place for some in places.values() for place in some]
    biases = max(_LEAST, 1.5 * max((place.bias_variance for place in shown), default=0.0))
    found = plane(phi, biases)
    low, high = _view(found, shown)
    figure = Figure([_shades(found, look), _edge(found, look)])
    for order, (when, some) in enumerate(places.items(), start=1):
        figure.add_trace(_dots(when, some, (low, high), order == len(places), look))
    _sides(figure, found, low, high)
    bare = {"showgrid": False, "zeroline": False}
    figure.update_xaxes(dtick=1, tickfont={"size": 11})
    figure.update_xaxes(**logarithmic(low, high), range=np.log10([low, high]), **bare)
    figure.update_xaxes(title={"text": "weight variance (fan-in x Var W)", "font": {"size": 12}})
    figure.update_yaxes(range=[-0.05 * biases, biases], **bare)
    figure.update_yaxes(title={"text": _ENTERING[unit], "font": {"size": 12}})
    look.finish(
        figure,
        f"Phases of {safe(name)}, and where this network lies",
        words=_words(name, found, places, unit),
    )
    figure.update_layout(height=440)
    return figure


def _view(found: Plane, shown: Sequence[Place]) -> tuple[float, float]:
    """Weight variances that show the layers and, where it is in reach, the edge of chaos."""
    line = found.critical[np.isfinite(found.critical)].tolist()
    known = [v for v in (*line, *(place.weight_variance for place in shown)) if _REACH[0] < v < _REACH[1]]
    return max(_REACH[0], min(known, default=1.0) / 5), min(_REACH[1], max(known, default=1.0) * 6)


def _shades(found: Plane, look: Look) -> Contour:
    """Light where gradients keep their size; the colours are those of a factor of ten."""
    with np.errstate(divide="ignore"):
        shades = np.clip(-np.log10(found.chi), -1.0, 1.0)
    return Contour(
        x=found.weight_variances,
        y=found.bias_variances,
        z=shades,
        customdata=np.sqrt(found.chi),
        colorscale=look.scale,
        zmin=-1,
        zmax=1,
        contours={"start": -1, "end": 1, "size": 0.1, "showlines": False},
        showscale=False,
        opacity=0.5,
        name="growth",
        hovertemplate="gradient x %{customdata:.3g} per layer<extra></extra>",
    )


def _edge(found: Plane, look: Look) -> Scatter:
    return Scatter(
        x=found.critical,
        y=found.bias_variances,
        mode="lines",
        line={"color": look.ink, "width": 2},
        name="edge of chaos",
        hovertemplate="edge of chaos: %{x:.3g}, %{y:.3g}<extra></extra>",
    )


def _dots(when: str, places: Sequence[Place], view: tuple[float, float], last: bool, look: Look) -> Scatter:
    shown = [places[at] for at in spread_out(len(places), _MOST)]
    inside = np.clip([place.weight_variance for place in shown], view[0] * 1.02, view[1] / 1.02)
    told = [f"{safe(p.name)}: {number(p.weight_variance)}, {number(p.bias_variance)}" for p in shown]
    return Scatter(
        x=inside,
        y=[place.bias_variance for place in shown],
        text=told,
        mode="markers",
        marker={
            "color": look.ink,
            "size": 9,
            "symbol": "circle" if last else "circle-open",
            "opacity": 0.7,
        },
        name=f"layers {when}".strip(),
        hovertemplate="%{text}<extra></extra>",
    )


def _sides(figure: Figure, found: Plane, low: float, high: float) -> None:
    """Names the phases that are in view, at its upper corners."""
    ends = np.searchsorted(found.weight_variances, [low, high / 1.001])
    top = found.chi[-1, np.minimum(ends, len(found.weight_variances) - 1)]
    where = {"xref": "paper", "yref": "paper", "font": {"size": 12}}
    corners: tuple[dict[str, Any], ...] = {"x": 0.02, "xanchor": "left"}, {"x": 0.98, "xanchor": "right"}
    for corner, chi in zip(corners, top.tolist(), strict=True):
        words = "chaos:<br>gradients explode" if chi > 1 else "order:<br>gradients vanish"
        figure.add_annotation(text=words, showarrow=False, y=0.98, align=corner["xanchor"], **where, **corner)


def _words(name: str, found: Plane, places: Mapping[str, Sequence[Place]], unit: str) -> str:
    told = [_told(found, when, some, unit) for when, some in places.items() if some]
    line = f"On the line gradients keep their size through many {unit}s of {name}."
    return " ".join([line, *told])


def _told(found: Plane, when: str, places: Sequence[Place], unit: str) -> str:
    factor = math.sqrt(float(np.median([_chi(found, place) for place in places])))
    text = f"By theory a {unit} changes the norm of the gradient by a factor {number(factor)}."
    return f"{when.capitalize()}: {text}" if when else text


def _chi(found: Plane, place: Place) -> float:
    """At the nearest bias variance of the grid."""
    row = np.abs(found.bias_variances - place.bias_variance).argmin()
    return float(np.interp(place.weight_variance, found.weight_variances, found.chi[row]))
