"""Histograms: how the outputs and the gradients of every layer of every arm are spread at the start."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import numpy as np
from plotly.graph_objects import Figure, Heatmap
from plotly.subplots import make_subplots

from gradmend.errors import NotApplicableError, SetupError, suggest
from gradmend.look import Look
from gradmend.spread import BINS, Shares, spread
from gradmend.study.start import first_batch

if TYPE_CHECKING:
    from gradmend.study.design import Arm, Study

RANGES: Final = {"outputs": (-2.0, 2.0), "gradients": (-14.0, 2.0)}
"""Values, and powers of ten: the same for all arms; what lies beyond is counted at the edge."""

_TICKS: Final = {"outputs": [-1, 0, 1], "gradients": [-12, -6, 0]}
_AXES: Final = {"outputs": "value", "gradients": "log10 of size"}
_MOST: Final = 60
_PANEL, _HEAD = 90, 120
"""Heights in pixels."""


def histograms(study: Study, what: str = "outputs", dark: bool = False) -> Figure:
    """A panel for each arm, with the histogram of each layer as a column: dark where most values are.

    Args:
        study: of which every arm is built once, with its first seed; 60 arms at most are drawn.
        what: outputs or gradients.
        dark: for a dark background.

    Raises:
        SetupError: for another name.

    Source: Glorot, Bengio, Understanding the difficulty of training deep feedforward neural networks, 2010,
    https://proceedings.mlr.press/v9/glorot10a.html
    """
    if what not in RANGES:
        raise SetupError(f"There is no picture {what!r} of a study. {suggest(what, RANGES)}")
    arms = study.arms()[:_MOST]
    columns = max(1, len(next(reversed(study.levels.values()), ())))
    columns = columns if columns <= 4 else 3
    rows = math.ceil(len(arms) / columns)
    titles = [" · ".join(arm.levels.values()) for arm in arms]
    gaps = {"horizontal_spacing": 0.04, "vertical_spacing": 0.3 / rows}
    figure = make_subplots(rows, columns, shared_xaxes=True, shared_yaxes=True, subplot_titles=titles, **gaps)
    for place, arm in enumerate(arms):
        row, column = divmod(place, columns)
        if (shares := _of(study, arm, what)) is not None:
            figure.add_trace(_panel(shares, what), row=row + 1, col=column + 1)
    return _finished(
        figure, f"{what.capitalize()} of the layers, before the first step", what, rows, Look(dark)
    )


def _of(study: Study, arm: Arm, what: str) -> Shares | None:
    try:
        recipe = study.build(arm, study.seeds[0])
    except NotApplicableError:
        return None
    shares: Shares = getattr(spread(recipe.setup, first_batch(recipe, study.seeds[0]), RANGES), what)
    return shares


def _panel(shares: Shares, what: str) -> Heatmap:
    low, high = RANGES[what]
    middle = np.linspace(low, high, 2 * BINS + 1)[1::2]
    layers = np.arange(1, shares.shape[1] + 1)
    told = "layer %{x}, %{y:.2f}: %{z:.1%}<extra></extra>"
    return Heatmap(x=layers, y=middle, z=np.sqrt(shares), coloraxis="coloraxis", hovertemplate=told)


def _finished(figure: Figure, title: str, what: str, rows: int, look: Look) -> Figure:
    words = "A column for each layer: the stronger the colour, the more of its values lie there."
    look.finish(figure, title, words=words)
    figure.update_layout(
        height=_HEAD + _PANEL * rows,
        coloraxis={
            "colorscale": [[0.0, look.ground], [1.0, look.colours[0]]],
            "cmin": 0,
            "cmax": 1,
            "showscale": False,
        },
        showlegend=False,
    )
    figure.update_annotations(font={"size": 11})
    frame = {"showgrid": False, "zeroline": False, "showline": True, "mirror": True, "linecolor": look.pale}
    figure.update_xaxes(frame)
    figure.update_yaxes({**frame, "range": RANGES[what], "tickvals": _TICKS[what]})
    figure.update_xaxes(title={"text": "layer", "font": {"size": 11}}, row=rows)
    figure.update_yaxes(title={"text": _AXES[what], "font": {"size": 11}}, row=(rows + 1) // 2, col=1)
    return figure
