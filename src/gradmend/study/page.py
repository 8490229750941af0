"""The pictures of a task, and the page that shows all."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from html import escape

import numpy as np
from plotly.graph_objects import Figure
from plotly.offline import get_plotlyjs
from rich.console import Console, RenderableType
from rich.terminal_theme import DEFAULT_TERMINAL_THEME, MONOKAI

from gradmend.study import figures
from gradmend.study.curves import MOST_ARMS, learning
from gradmend.study.grid import Grid
from gradmend.study.heatmap import axes, heatmap
from gradmend.study.look import Look
from gradmend.study.ranking import Place, pareto, ranking

COSTS = ("seconds", "parameters")
"""What the measure is weighed against."""


def task_figures(
    grid: Grid, measure: str, predicted: Sequence[tuple[float, float]], look: Look
) -> dict[str, Figure]:
    """The pictures of the arms of one task, by name; those for which numbers are missing are left out.

    Args:
        grid: the outcomes on the task.
        measure: that is compared.
        predicted: the line of `heatmap`.
        look: of the pictures.
    """
    places = ranking(grid, measure)
    drawn: dict[str, Figure] = {}
    if any(place.mean.seeds for place in places):
        drawn["ranking"] = figures.ladder(places, measure, look)
    for cost in COSTS:
        points = pareto(grid, measure, cost) if cost != measure else ()
        if points:
            drawn[f"{measure} over {cost}"] = figures.front(points, measure, cost, look)
    if axes(grid):
        drawn["heatmap"] = heatmap(grid, measure, predicted, look)
    return drawn | _curves(grid, places, look) | _gradients(grid, look)


def _curves(grid: Grid, places: Sequence[Place], look: Look) -> dict[str, Figure]:
    rows = _shown(grid, places)
    cells = [cell for row in rows for cell in grid.cells[row] if cell is not None]
    drawn = {}
    if any(cell.losses for cell in cells):
        drawn["loss"] = learning(grid, rows, look)
    if any(len(cell.accuracies) > 1 for cell in cells):
        drawn["accuracy"] = learning(grid, rows, look, accuracy=True)
    return drawn


def _shown(grid: Grid, places: Sequence[Place]) -> list[int]:
    """The base, and the best of the others."""
    best = [grid.row[tuple(place.arm.values())] for place in places]
    rows = dict.fromkeys([row for row in (grid.base,) if row is not None] + best)
    return list(rows)[:MOST_ARMS]


def _gradients(grid: Grid, look: Look) -> dict[str, Figure]:
    known = ~np.isnan(grid.values("gradient_ratio"))
    return {"gradient ratio": figures.gradients(grid, look)} if known.any() else {}


def page(title: str, text: RenderableType, pictures: Iterable[Figure], dark: bool) -> str:
    """One HTML page that needs nothing else, with plotly's own code in it.

    Args:
        title: of the page.
        text: that stands above the pictures.
        pictures: in their order.
        dark: whether the background is dark.
    """
    ink, ground = ("#e0e0e0", "#111111") if dark else ("#202020", "#ffffff")
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(text)
    words = console.export_html(
        theme=MONOKAI if dark else DEFAULT_TERMINAL_THEME, inline_styles=True, code_format="<pre>{code}</pre>"
    )
    drawn = "\n".join(figure.to_html(full_html=False, include_plotlyjs=False) for figure in pictures)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>body{{max-width:860px;margin:2em auto;color:{ink};background:{ground}}}"
        f"pre{{overflow-x:auto}}</style><script>{get_plotlyjs()}</script></head>"
        f"<body>{words}\n{drawn}</body></html>\n"
    )
