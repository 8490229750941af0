"""Drawing: lines, panels and maps as the pages of the atlas have them; numbers are kept short."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import numpy as np
from plotly.graph_objects import Figure, Heatmap, Scatter
from plotly.subplots import make_subplots

from gradmend.look import Look

Values: TypeAlias = Sequence[float] | Sequence[int] | np.ndarray

LOOK: Final = Look()
"""Pages are drawn in light colours; they turn dark by themselves."""

_MOST: Final = 3e38
_HEIGHT: Final = 300
_HEAD: Final = 90
_MARGIN: Final = {"t": 84, "b": 52}
SPACED: Final = {"orientation": "h", "x": 0.0, "xanchor": "left", "y": 1.0, "yanchor": "bottom"}


@dataclass(frozen=True)
class Line:
    """One curve.

    Args:
        name: in the legend; "" for none.
        x: numbers along.
        y: numbers up; NaN leaves a gap.
        colour: of `Look`.
        mode: plotly's: lines, markers, lines+markers.
        dash: solid, dot or dash.
        width: in pixels.
        size: of its marks.
        opacity: of all of it.
        fill: plotly's, such as tozeroy.
        label: written at its end.
    """

    name: str
    x: Values
    y: Values
    colour: str = LOOK.colours[0]
    mode: str = "lines"
    dash: str = "solid"
    width: float | int = 2
    size: int = 6
    opacity: float = 1.0
    fill: str | None = None
    label: str = ""


@dataclass(frozen=True)
class Panel:
    """One pair of axes with its curves.

    Args:
        lines: the curves.
        x: title along.
        y: title up.
        log: whether the axis up is logarithmic.
        log_x: whether that along is.
        reach: ends of the axis up; powers of ten if it is logarithmic.
        reach_x: ends of that along; powers of ten if it is logarithmic.
        mark: height of a thin line across, such as 1 for "unchanged".
        flat: stretches along that are shaded.
        title: above it.
    """

    lines: Sequence[Line]
    x: str
    y: str
    log: bool = False
    log_x: bool = False
    reach: tuple[float, float] | None = None
    reach_x: tuple[float, float] | None = None
    mark: float | None = None
    flat: Sequence[tuple[float, float]] = field(default_factory=tuple)
    title: str = ""


def short(values: Values) -> np.ndarray:
    """Numbers as float32, which a page stores in half the room.

    >>> short([0.1, 2]).dtype
    dtype('float32')
    """
    return np.clip(np.asarray(values, dtype=np.float64), -_MOST, _MOST).astype(np.float32)


def chart(panels: Sequence[Panel], title: str, words: str, height: int = _HEIGHT) -> Figure:
    """Panels under one another.

    Args:
        panels: from top to bottom.
        title: of the picture.
        words: what is to be seen, in a sentence or two.
        height: of each panel, in pixels.

    Examples:
        >>> panel = Panel([Line("measured", [1, 2], [0.5, 0.25])], "layer", "gradient", log=True)
        >>> chart([panel], "Down", "It halves at every layer.").layout.meta["words"]
        'It halves at every layer.'
    """
    gap = 0.24 / len(panels) if len(panels) > 1 else 0.0
    titles = [panel.title for panel in panels] if any(panel.title for panel in panels) else None
    figure = make_subplots(rows=len(panels), cols=1, vertical_spacing=gap, subplot_titles=titles)
    LOOK.finish(figure, title, words=words)
    figure.update_layout(height=_HEAD + height * len(panels), margin=_MARGIN, legend=SPACED)
    shown: set[str] = set()
    for row, panel in enumerate(panels, 1):
        _draw(figure, panel, row, shown)
    figure.update_annotations(font={"size": 13})
    return figure


def _draw(figure: Figure, panel: Panel, row: int, shown: set[str]) -> None:
    for line in panel.lines:
        figure.add_trace(_trace(line, bool(line.name) and line.name not in shown), row=row, col=1)
        shown.add(line.name)
    shaded = {"fillcolor": LOOK.pale, "opacity": 0.18, "line_width": 0, "layer": "below"}
    for low, high in panel.flat:
        figure.add_vrect(low, high, **shaded, row=row, col=1)
    if panel.mark is not None:
        figure.add_hline(panel.mark, line={"color": LOOK.ink, "width": 1, "dash": "dot"}, row=row, col=1)
    figure.update_xaxes(_axis(panel.x, panel.log_x, panel.reach_x), row=row, col=1)
    figure.update_yaxes(_axis(panel.y, panel.log, panel.reach), row=row, col=1)


def _axis(title: str, log: bool, reach: tuple[float, float] | None) -> dict[str, Any]:
    kind = {"type": "log", "exponentformat": "power", "dtick": _decades(reach)} if log else {}
    ends = {} if reach is None else {"range": list(reach)}
    return {"title": {"text": title, "standoff": 6}, "zeroline": False, **kind, **ends}


def _decades(reach: tuple[float, float] | None) -> int | None:
    """Steps of whole powers of ten, so that few enough are written."""
    return None if reach is None else max(1, round((reach[1] - reach[0]) / 7))


def _trace(line: Line, legend: bool) -> Scatter:
    ends = [""] * (len(line.x) - 1) + [f" {line.label}"] if line.label else None
    return Scatter(
        x=short(line.x),
        y=short(line.y),
        name=line.name,
        legendgroup=line.name,
        showlegend=legend,
        mode=line.mode + ("+text" if line.label else ""),
        text=ends,
        textposition="middle right" if line.label else None,
        textfont={"color": line.colour} if line.label else None,
        cliponaxis=not line.label,
        line={"color": line.colour, "width": line.width, "dash": line.dash},
        marker={"color": line.colour, "size": line.size},
        opacity=line.opacity,
        fill=line.fill,
        hovertemplate="%{x:.4g}: %{y:.4g}"
        + (f"<extra>{line.name}</extra>" if line.name else "<extra></extra>"),
    )


def reach(values: Sequence[Values], least: float = 1.0, floor: float = -40.0) -> tuple[float, float]:
    """The ends of a logarithmic axis for positive values: powers of ten that all of them fit between.

    Args:
        values: of all curves; what is not positive and finite is left out.
        least: decades at least.
        floor: what lies below this power of ten is cut off.

    >>> reach([[1e-3, 0.0], [5.0]])
    (-3.25, 0.95)
    """
    held = np.concatenate([np.ravel(np.asarray(each, dtype=np.float64)) for each in values])
    held = np.log10(held[np.isfinite(held) & (held > 0)])
    if not held.size:
        return (-1.0, 1.0)
    low, high = max(floor, held.min()), max(held.max(), held.min() + least)
    return round(float(low) - 0.25, 2), round(float(high) + 0.25, 2)


def shades(dark: float = 1.0) -> list[list[float | str]]:
    """From the background to the first colour: how much of something there is."""
    return [[0.0, "#ffffff"], [dark, LOOK.colours[0]]]


def bytes_of(shares: np.ndarray) -> np.ndarray:
    """Shares from 0 to 1 in steps of 1/250, as whole numbers of one byte, drawn by their root.

    >>> bytes_of(np.array([0.0, 0.25, 1.0])).tolist()
    [0, 125, 250]
    """
    return np.asarray(250 * np.sqrt(np.clip(shares, 0.0, 1.0)) + 0.5, dtype=np.uint8)


def layers(count: int) -> np.ndarray:
    """1, 2, ... up to this many."""
    return np.arange(1, count + 1)


def heat(z: np.ndarray, x: Values, y: Values, **more: Any) -> Heatmap:
    """A map without a frame of its own."""
    return Heatmap(z=z, x=short(x), y=short(y), **more)


Axes: TypeAlias = Mapping[str, Any]
FRAME: Final[Axes] = {
    "showgrid": False,
    "zeroline": False,
    "showline": True,
    "mirror": True,
    "linecolor": LOOK.pale,
}
