"""A measure over two numeric factors, with the line that theory predicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64
from plotly.graph_objects import Figure, Heatmap, Scatter

from gradmend.look import Look
from gradmend.study import wording
from gradmend.study.effects import comparable, mean
from gradmend.study.grid import Grid

Means = Float64[np.ndarray, "up across"]

_LEAST_LEVELS = 3
_WIDE = 15  # times the least level: such an axis is logarithmic


def axes(grid: Grid) -> tuple[str, str] | None:
    """The two factors of a study, across and up, if both are numeric and no other is varied; a depth goes up.

    >>> axes(Grid({"depth": ("1", "2", "4"), "weight_variance": ("1", "2", "3")}, (), (), ()))
    ('weight_variance', 'depth')
    """
    if len(grid.varied) != 2 or any(_numbers(grid.levels[factor]) is None for factor in grid.varied):
        return None
    first, second = grid.varied
    return (second, first) if first == "depth" else (first, second)


def _numbers(labels: Sequence[str]) -> list[float] | None:
    try:
        found = [float(label) for label in labels]
    except ValueError:
        return None
    return found if len(set(found)) >= _LEAST_LEVELS else None


def heatmap(grid: Grid, measure: str, predicted: Sequence[tuple[float, float]], look: Look) -> Figure:
    """The mean of a measure at each pair of levels.

    Args:
        grid: outcomes of two numeric factors, see `axes`.
        measure: that is drawn.
        predicted: points (across, up) of a line that theory draws.
        look: of the picture.

    Raises:
        ValueError: if the factors are not numeric.
    """
    factors = axes(grid)
    if factors is None:
        raise ValueError(f"The factors {grid.varied} are not two with at least three numbers each.")
    across, up = (Axis(factor, sorted(map(float, grid.levels[factor]))) for factor in factors)
    unit, scale = wording.unit(measure)
    title = wording.name(measure) + (f", {unit}" if unit else "")
    means, words = _means(grid, measure, across, up)
    cells = {"x": across.edges, "y": up.edges, "z": scale * means, "hovertext": words, "hoverinfo": "text"}
    figure = Figure(Heatmap(**cells, colorscale="Cividis", colorbar={"title": {"text": title}}))
    figure.update_xaxes(across.layout)
    figure.update_yaxes(up.layout)
    for colour, width in (("black", 6), ("white", 3)) if predicted else ():
        figure.add_trace(_line(predicted, colour, width))
    words_of = " and ".join(factor.replace("_", " ") for factor in reversed(factors))
    drawn = "; line: predicted" if predicted else ""
    told = f"{wording.name(measure).capitalize()} over {words_of}{drawn}"
    return look.finish(figure, told, words="Each cell is the mean over seeds; the numbers are in the table.")


@dataclass(frozen=True)
class Axis:
    """A numeric factor as an axis, logarithmic if its levels range widely.

    Args:
        factor: its name.
        levels: ascending.
    """

    factor: str
    levels: list[float]

    @property
    def wide(self) -> bool:
        """Whether the axis is logarithmic."""
        return self.levels[0] > 0 and self.levels[-1] / self.levels[0] > _WIDE

    @property
    def edges(self) -> Float64[np.ndarray, " edges"]:
        """Half-way between the levels, and as far beyond the outer ones."""
        at = np.log(self.levels) if self.wide else np.array(self.levels)
        middle = (at[1:] + at[:-1]) / 2
        edges = np.concatenate([[2 * at[0] - middle[0]], middle, [2 * at[-1] - middle[-1]]])
        return np.asarray(np.exp(edges) if self.wide else edges)

    @property
    def layout(self) -> dict[str, Any]:
        """Ticks at the levels, and the range from edge to edge."""
        ends = self.edges[[0, -1]]
        return {
            "title": self.factor.replace("_", " "),
            "type": "log" if self.wide else "linear",
            "range": (np.log10(ends) if self.wide else ends).tolist(),
            "tickvals": self.levels,
            "ticktext": [f"{level:g}" for level in self.levels],
            "showgrid": False,
        }


def _means(grid: Grid, measure: str, across: Axis, up: Axis) -> tuple[Means, list[list[str]]]:
    values = comparable(grid, measure)
    means = np.full((len(up.levels), len(across.levels)), np.nan)
    words = [[""] * len(across.levels) for _ in up.levels]
    for row in range(len(grid.arms)):
        named, held = grid.named(row), mean(values[row], measure)
        place = up.levels.index(float(named[up.factor])), across.levels.index(float(named[across.factor]))
        means[place] = held.value
        words[place[0]][place[1]] = f"{grid.label(row)}<br>{wording.value(held, measure)}"
    return means, words


def _line(points: Sequence[tuple[float, float]], colour: str, width: int) -> Scatter:
    x, y = zip(*points, strict=True)
    style = {"color": colour, "width": width}
    return Scatter(x=x, y=y, mode="lines", line=style, showlegend=False, hoverinfo="skip")
