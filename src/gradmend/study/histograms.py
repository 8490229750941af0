"""Histograms: how the outputs and the gradients of every layer are spread before the first step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from jaxtyping import Float64
from plotly.graph_objects import Figure, Heatmap
from plotly.subplots import make_subplots
from torch import Tensor

from gradmend.anatomy import Anatomy, Site
from gradmend.errors import NotApplicableError, SetupError, suggest
from gradmend.recorder import Call
from gradmend.study.look import Look
from gradmend.study.start import first_batch, passed
from gradmend.zoo import Recipe

if TYPE_CHECKING:
    from gradmend.study.design import Arm, Study

Shares = Float64[np.ndarray, "bins layers"]

_BINS: Final = 47
"""An odd number, so that zeros, ones and the like lie within bins, not between them."""
_RANGES: Final = {"outputs": (-2.0, 2.0), "gradients": (-14.0, 2.0)}
"""Values, and powers of ten; what lies beyond is counted at the edge."""

_TICKS: Final = {"outputs": [-1, 0, 1], "gradients": [-12, -6, 0]}
_AXES: Final = {"outputs": "value", "gradients": "log10 of size"}
_MOST: Final = 60
_PANEL, _HEAD = 90, 120
"""Heights in pixels."""


@dataclass(frozen=True)
class Spread:
    """What share of the values of a layer lies in which of 47 equal bins.

    Args:
        outputs: of each hidden layer after its activation, from -2 to 2 [bins, layers].
        gradients: of the loss by these outputs: log10 of their sizes from -14 to 2 [bins, layers].
    """

    outputs: Shares
    gradients: Shares


def spread(recipe: Recipe, seed: int) -> Spread:
    """Histograms of each hidden layer, of one forward and backward pass that leaves no trace.

    Args:
        recipe: what trains.
        seed: draws the batch.

    Example:
        >>> from gradmend.zoo import recipe
        >>> found = spread(recipe("deep", depth=3), 0)
        >>> found.outputs.shape, found.outputs.sum(axis=0)
        ((47, 3), array([1., 1., 1.]))
    """
    outputs: dict[int, Tensor] = {}
    gradients: dict[int, Tensor] = {}

    def watch(_: Call, site: Site, output: Tensor) -> None:
        if output.requires_grad:
            outputs[site.index] = output.detach()
            output.register_hook(partial(gradients.__setitem__, site.index))  # type: ignore[no-untyped-call]

    anatomy = passed(recipe.setup, first_batch(recipe, seed), watch)
    places = [place for place in _hidden(anatomy) if place in gradients]
    return Spread(
        _shares([outputs[place] for place in places], "outputs"),
        _shares([gradients[place].abs().log10() for place in places], "gradients"),
    )


def _hidden(anatomy: Anatomy) -> list[int]:
    """The outputs of all layers with weights but the last: of the activation that follows, if one does."""
    layers = anatomy.weighted()[:-1] or [site for site in anatomy.sites if site.kind == "recurrent"]
    return list(dict.fromkeys((anatomy.activation_after(site) or site).index for site in layers))


def _shares(values: Sequence[Tensor], what: str) -> Shares:
    low, high = _RANGES[what]
    counts = [torch.histc(one.float().nan_to_num(high).clamp(low, high), _BINS, low, high) for one in values]
    shares = [(count / count.sum()).double().numpy() for count in counts]
    return np.stack(shares, axis=1) if shares else np.zeros((_BINS, 0))


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
    if what not in _RANGES:
        raise SetupError(f"There is no picture {what!r} of a study. {suggest(what, _RANGES)}")
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
        shares: Shares = getattr(spread(study.build(arm, study.seeds[0]), study.seeds[0]), what)
    except NotApplicableError:
        return None
    return shares


def _panel(shares: Shares, what: str) -> Heatmap:
    low, high = _RANGES[what]
    middle = np.linspace(low, high, 2 * _BINS + 1)[1::2]
    layers = np.arange(1, shares.shape[1] + 1)
    told = "layer %{x}, %{y:.2f}: %{z:.1%}<extra></extra>"
    return Heatmap(x=layers, y=middle, z=np.sqrt(shares), coloraxis="coloraxis", hovertemplate=told)


def _finished(figure: Figure, title: str, what: str, rows: int, look: Look) -> Figure:
    look.finish(figure, title)
    ground = "#111111" if look.dark else "#ffffff"
    figure.update_layout(
        height=_HEAD + _PANEL * rows,
        coloraxis={
            "colorscale": [[0.0, ground], [1.0, look.colours[0]]],
            "cmin": 0,
            "cmax": 1,
            "showscale": False,
        },
        showlegend=False,
    )
    figure.update_annotations(font={"size": 11})
    frame = {"showgrid": False, "zeroline": False, "showline": True, "mirror": True, "linecolor": look.pale}
    figure.update_xaxes(frame)
    figure.update_yaxes({**frame, "range": _RANGES[what], "tickvals": _TICKS[what]})
    figure.update_xaxes(title={"text": "layer", "font": {"size": 11}}, row=rows)
    figure.update_yaxes(title={"text": _AXES[what], "font": {"size": 11}}, row=(rows + 1) // 2, col=1)
    return figure
