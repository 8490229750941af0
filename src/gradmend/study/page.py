"""The pictures of a task, and what a page shows of a study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from plotly.graph_objects import Figure
from rich.table import Table

from gradmend.look import Look
from gradmend.report import page
from gradmend.report.page import Part, Section
from gradmend.study import figures
from gradmend.study.curves import MOST_ARMS, learning
from gradmend.study.grid import Grid
from gradmend.study.heatmap import axes, heatmap
from gradmend.study.outcome import MEASURES
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


MOST_ROWS: Final = 200
"""A table of a page has so many rows."""

_SECTIONS: Final = {
    "Which is best": ("ranking", "heatmap"),
    "What each level does": ("effects",),
    "What two levels do together": ("interactions",),
    "Pros and cons": ("pros and cons",),
    "What it costs": tuple(f"{measure} over " for measure in MEASURES),
    "How they learn": ("loss", "accuracy"),
    "How they start": ("gradient ratio",),
}
_WORDS: Final = {"+": "better", "-": "worse", "·": "not shown"}
LEGEND: Final = (
    "In brackets: the 95 % interval over seeds, each for itself. What it does not show is not claimed."
)


@dataclass(frozen=True)
class Shown:
    """What there is of a study.

    Args:
        figures: by name.
        tables: by name, as they print.
        size: how much was tried.
        evidence: of the recommendation.
        left_out: what could not be compared, and why.
        starts: pictures of the networks before the first step.
    """

    figures: Mapping[str, Figure]
    tables: Mapping[str, Table]
    size: str
    evidence: Sequence[str]
    left_out: Sequence[str]
    starts: Sequence[Figure]

    def sections(self) -> tuple[Section, ...]:
        """The recommendation's evidence first, then each picture with its table."""
        held: dict[str, list[Part]] = {"Why": [self.size, *self.evidence]}
        for title, names in _SECTIONS.items():
            drawn = [figure for name, figure in self.figures.items() if name.startswith(names)]
            told = [_told(table) for name, table in self.tables.items() if name.startswith(names)]
            held[title] = [*drawn, *told]
        held["How they start"] += self.starts
        held["What cannot be told"] = [*self.left_out, LEGEND]
        return tuple(Section(title, tuple(parts)) for title, parts in held.items() if parts)


def _told(table: Table) -> page.Table:
    """A printed table as one of a page, with words for marks."""
    columns = [[str(cell) for cell in column.cells] for column in table.columns]
    told = [
        [_WORDS.get(cell, cell) for cell in cells] if not c.header else cells
        for c, cells in zip(table.columns, columns, strict=True)
    ]
    headings = tuple(str(column.header) or "verdict" for column in table.columns)
    return page.Table(headings, tuple(zip(*told, strict=True)), str(table.title or ""))
