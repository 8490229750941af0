"""Starts: how outputs and gradients are spread before the first step, for every initialization."""

from __future__ import annotations

from itertools import product
from typing import Any, Final

import numpy as np
from plotly.graph_objects import Figure
from plotly.subplots import make_subplots

from gradmend.atlas import networks
from gradmend.atlas.drawing import FRAME, LOOK, bytes_of, heat, layers, shades
from gradmend.atlas.sizes import Sizes
from gradmend.atlas.words import sheet, sources
from gradmend.report.parts import Code, Dial, Page, Section
from gradmend.spread import Spread, spread

_ENDS: Final = {"outputs": (-2.0, 2.0), "gradients": (-14.0, 2.0)}
_TICKS: Final[dict[str, dict[str, Any]]] = {
    "outputs": {"tickvals": [-2, -1, 0, 1, 2], "ticktext": ["≤ −2", "−1", "0", "1", "≥ 2"]},
    "gradients": {
        "tickvals": [-14, -10, -6, -2, 2],
        "ticktext": ["≤ 10⁻¹⁴", "10⁻¹⁰", "10⁻⁶", "10⁻²", "≥ 100"],
    },
}
_TITLES: Final = {"outputs": "outputs", "gradients": "sizes of gradients"}
_SHRUNK, _PILED = 0.5, 0.3
"""The spread of the last layer over that of the first, below which it shrinks; and shares at the ends."""

_LOST, _HUGE = -7.0, 1.0
"""Powers of ten."""


def start(sizes: Sizes, **settings: Any) -> Spread:
    """Histograms of every hidden layer of one network, before its first step."""
    return spread(networks.network(sizes, **settings).setup, networks.rows(sizes), _ENDS)


def panels(found: Spread, title: str, words: str) -> Figure:
    """Outputs above, gradients below: a column for each layer, dark where most values are."""
    figure = make_subplots(rows=2, cols=1, vertical_spacing=0.12, shared_xaxes=True)
    LOOK.finish(figure, title, words=words)
    for row, what in enumerate(_ENDS, 1):
        shares = getattr(found, what)
        low, high = _ENDS[what]
        middles = np.linspace(low, high, 2 * len(shares) + 1)[1::2]
        trace = heat(
            bytes_of(shares),
            layers(shares.shape[1]),
            middles,
            colorscale=shades(),
            zmin=0,
            zmax=250,
            showscale=False,
            hovertemplate="layer %{x}<extra></extra>",
        )
        figure.add_trace(trace, row=row, col=1)
        figure.update_yaxes(
            {**FRAME, **_TICKS[what], "range": [low, high], "title": _TITLES[what]}, row=row, col=1
        )
    figure.update_xaxes(FRAME)
    figure.update_xaxes(title="layer", row=2, col=1)
    figure.update_layout(height=560)
    return figure


def told(found: Spread) -> str:
    """What the histograms say, in a sentence."""
    first, last = (_deviation(found.outputs[:, layer]) for layer in (0, -1))
    piled = float(found.outputs[0, -1] + found.outputs[-1, -1])
    if last < max(_SHRUNK * first, 1e-9):
        outputs = "The outputs shrink from layer to layer"
    elif piled > _PILED:
        outputs = f"{piled:.0%} of the outputs of the last layer are 2 or more away from 0"
    else:
        outputs = "The outputs of the last layer are still spread"
    return f"{outputs}, and {_sized(_middle(found.gradients[:, 0]))}."


def _sized(gradient: float) -> str:
    """In words, what power of ten the gradients of the first layer are."""
    if gradient < _LOST:
        return "the gradients of the first layer are lost"
    if gradient > _HUGE:
        return "the gradients of the first layer are huge"
    return f"the gradients of the first layer are about {10**gradient:.0e}"


def _deviation(shares: np.ndarray) -> float:
    low, high = _ENDS["outputs"]
    values = np.linspace(low, high, 2 * len(shares) + 1)[1::2]
    middle = np.average(values, weights=shares)
    return float(np.sqrt(np.average((values - middle) ** 2, weights=shares)))


def _middle(shares: np.ndarray) -> float:
    low, high = _ENDS["gradients"]
    values = np.linspace(low, high, 2 * len(shares) + 1)[1::2]
    return float(values[int(np.searchsorted(np.cumsum(shares), 0.5))])


def page(sizes: Sizes) -> Page:
    """Every initialization with every activation."""
    depths = sizes.depths[:2]
    pictures = {}
    for init, phi, depth in product(sizes.inits, sizes.activations, depths):
        found = start(sizes, depth=depth, activation=phi, init=init)
        pictures[init, phi, str(depth)] = panels(found, f"{init} weights, {phi}, {depth} layers", told(found))
    dials = {"weights": sizes.inits, "activation": sizes.activations, "depth": tuple(map(str, depths))}
    return sheet(
        "Every start",
        "Before the first step, look at every layer: are its outputs spread, and does it get a gradient?",
        Section(
            "Ten initializations, ten activations",
            (
                "Each column is the histogram of one layer: dark where most of its values are. Outputs "
                "above, the sizes of their gradients below, layer 1 on the left. A healthy network looks "
                "the same in all columns.",
                Dial(dials, pictures),
            ),
        ),
        Section(
            "What to look for",
            (
                "Outputs that shrink to a line: the layers forget the input, for instance ReLU with "
                "torch's own weights. Outputs that pile up at the ends: saturated tanh units, with large "
                "weights. Gradients that slide down to the left: they vanish. Empty columns: no gradient "
                "at all, as with weights of zero.",
                "Which weights belong to which activation: xavier or orthogonal to tanh, he to the "
                "rectifiers, lecun to selu. Nothing of these helps the sigmoid, whose outputs are all "
                "positive and whose slope is 1/4 at best.",
                Code(
                    networks.setup_code(sizes, depth=depths[-1], activation="relu", init="he")
                    + "from gradmend.spread import spread\n\n"
                    + "spread(found.setup, batch).outputs  # shares of 47 bins, a column for each layer",
                    "The numbers of one picture",
                ),
                Code("gradmend study initializations", "The same question, as trainings"),
            ),
        ),
        sources(
            (
                "Glorot, Bengio, Understanding the difficulty of training deep feedforward neural "
                "networks, 2010",
                "https://proceedings.mlr.press/v9/glorot10a.html",
            ),
            ("He et al., Delving deep into rectifiers, 2015", "https://arxiv.org/abs/1502.01852"),
            ("Klambauer et al., Self-normalizing neural networks, 2017", "https://arxiv.org/abs/1706.02515"),
            (
                "Zhang, Botev, Martens, Deep learning without shortcuts (tailored), 2022",
                "https://arxiv.org/abs/2203.08120",
            ),
        ),
    )
