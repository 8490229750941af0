"""Learning curves of arms: the median over seeds, and the band from the least to the greatest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Float64
from plotly.graph_objects import Figure, Scatter

from gradmend.look import Look, folded, logarithmic
from gradmend.pictures.lines import band as filled
from gradmend.study.grid import Grid
from gradmend.study.outcome import DIVERGED, DONE, Outcome

BINS = 100
"""Longer curves are drawn in so many bins."""

MOST_ARMS = 6

Table = Float64[np.ndarray, "seeds steps"]


@dataclass(frozen=True, eq=False)
class Band:
    """What the seeds of an arm did, per step or per bin of steps.

    Args:
        steps: the middle of each bin, from 1.
        middle: the median over seeds and steps of the bin; infinite once most trials are lost.
        low: the least of all seeds and steps of the bin.
        high: the greatest; infinite once a trial is lost.
    """

    steps: Float64[np.ndarray, " points"]
    middle: Float64[np.ndarray, " points"]
    low: Float64[np.ndarray, " points"]
    high: Float64[np.ndarray, " points"]


def learning(grid: Grid, rows: Sequence[int], look: Look, accuracy: bool = False) -> Figure:
    """The learning curves of some arms; a cross marks where a trial diverged.

    Args:
        grid: the outcomes.
        rows: of the arms, no more than `MOST_ARMS` are drawn.
        look: of the picture.
        accuracy: of the training data per epoch, instead of the loss per step.
    """
    figure = Figure()
    tables = {row: table(grid.cells[row], accuracy) for row in rows[:MOST_ARMS]}
    drawn = {row: held for row, held in tables.items() if held.size}
    top = max((float(held[np.isfinite(held)].max()) for held in drawn.values()), default=1.0)
    for (row, held), colour in zip(drawn.items(), look.colours, strict=False):
        _add(figure, held, grid.label(row), colour, top, 100.0 if accuracy else 1.0)
    what = "Training accuracy" if accuracy else "Loss"
    least = min((float(held[~np.isnan(held)].min()) for held in drawn.values()), default=1.0)
    scale = logarithmic(least, top) if least > 0 and not accuracy else {}
    figure.update_xaxes(title="epoch" if accuracy else "optimizer step")
    figure.update_yaxes(title=what + ", %" * accuracy, **scale)
    title = f"{what}: median over seeds, band from the least to the greatest"
    look.finish(
        figure, title, words="The base, and the best of the other arms. A cross: a trial diverged there."
    )
    figure.update_layout(legend={"y": -0.18, "yanchor": "top", "x": 0.0, "xanchor": "left"}, height=540)
    return figure


def table(cells: Sequence[Outcome | None], accuracy: bool = False) -> Table:
    """The curves of an arm's trials, one row each. A lost trial's loss is infinite, its accuracy 0.

    >>> trial = Outcome({}, 0, "diverged", "", {}, (2.0, float("nan")), ())
    >>> table([trial]).tolist()
    [[2.0, inf]]
    """
    held = [cell for cell in cells if cell is not None and cell.status in (DONE, DIVERGED)]
    curves = [np.array(cell.accuracies if accuracy else cell.losses) for cell in held]
    found = np.full((len(held), max(map(len, curves), default=0)), np.nan)
    for row, (cell, curve) in enumerate(zip(held, curves, strict=True)):
        found[row, : len(curve)] = curve
        if cell.status == DIVERGED:
            found[row, _lost(found[row]) :] = 0.0 if accuracy else np.inf
    return found


def _lost(curve: Float64[np.ndarray, " steps"]) -> int:
    broken = np.flatnonzero(~np.isfinite(curve))
    return int(broken[0]) if len(broken) else len(curve)


def band(curves: Table) -> Band:
    """Reduce curves to no more than `BINS` points without hiding what lies between.

    Args:
        curves: one row per seed, at least one; NaN after the end of a shorter one.

    Examples:
        >>> band(np.array([[3.0, 2.0], [5.0, 2.0], [7.0, 2.0]])).high.tolist()
        [7.0, 2.0]
    """
    steps = curves.shape[1]
    edges = np.linspace(0, steps, min(BINS, steps) + 1).astype(int)
    parts = [curves[:, start:end] for start, end in pairwise(edges)]
    middle, low, high = ([f(part) for part in parts] for f in (np.nanmedian, np.nanmin, np.nanmax))
    return Band((edges[:-1] + edges[1:] + 1) / 2, np.array(middle), np.array(low), np.array(high))


def _add(figure: Figure, curves: Table, words: str, colour: str, top: float, factor: float) -> None:
    seen = band(curves)
    low, high = (factor * np.minimum(side, top) for side in (seen.low, seen.high))
    figure.add_trace(filled(seen.steps, low, high, colour, 0.18, legendgroup=words))
    middle = np.where(np.isfinite(seen.middle), factor * seen.middle, np.nan)
    line = {"color": colour, "width": 2}
    figure.add_trace(Scatter(x=seen.steps, y=middle, name=folded(words), line=line, legendgroup=words))
    ends = [(end, curve[end - 1]) for curve in curves if np.isinf(curve).any() and (end := _lost(curve))]
    if ends:
        x, y = zip(*ends, strict=True)
        mark = {"symbol": "x", "size": 10, "color": colour}
        figure.add_trace(
            Scatter(
                x=x, y=y, mode="markers", marker=mark, name="diverged", legendgroup=words, showlegend=False
            )
        )
