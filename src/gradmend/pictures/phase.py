"""Phase: the plane of initializations of one activation, and where the layers of a network lie in it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from plotly.graph_objects import Contour, Figure, Scatter

from gradmend.console import number
from gradmend.look import Look, logarithmic
from gradmend.pictures.labels import safe, spread_out
from gradmend.theory import Activation
from gradmend.theory.plane import REACH, Plane, plane

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

    Examples:
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
    known = [v for v in (*line, *(place.weight_variance for place in shown)) if REACH[0] < v < REACH[1]]
    return max(REACH[0], min(known, default=1.0) / 5), min(REACH[1], max(known, default=1.0) * 6)


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
