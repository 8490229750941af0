"""Optimizers on a ravine and at a cliff."""

from __future__ import annotations

from itertools import product
from typing import Final

import numpy as np
import torch
from jaxtyping import Float64
from plotly.graph_objects import Contour, Figure
from torch import nn
from torch.optim import Adam

from gradmend.atlas.drawing import FRAME, LOOK, Line, Panel, chart, short
from gradmend.atlas.landscapes import CLIFF, RAVINE, Landscape, Path, ground, path, uncorrected
from gradmend.atlas.sizes import Sizes
from gradmend.atlas.words import sheet, sources
from gradmend.report.parts import Code, Dial, Page, Section

_CLIPS: Final[dict[str, float | None]] = {"no clipping": None, "norm 0.1": 0.1}
_STEPS: Final = {"ravine": 60, "cliff": 100}
_FLOOR: Final = 1e-4
"""Losses below are drawn alike."""

_LEVELS: Final = 20
_COPIES: Final = 200


def trip(land: Landscape, held: Path, title: str, points: int) -> Figure:
    """The path on the map, and the loss at each step below it."""
    losses = np.clip(held.losses, _FLOOR, 1e6)
    below = Panel(
        [Line("", np.arange(len(losses)), losses, LOOK.colours[1])],
        "step",
        "loss",
        log=True,
        reach=(-4.1, float(np.log10(max(losses.max(), 1.0))) + 0.2),
    )
    x, y = held.points.T
    way = Line("", x, y, LOOK.colours[1], mode="lines+markers", size=5, width=1.5)
    above = Panel([way], land.names[0], land.names[1])
    figure = chart([above, below], title, _outcome(held))
    figure.add_trace(_map(land, points), row=1, col=1)
    figure.data = (figure.data[-1], *figure.data[:-1])
    figure.add_trace(_mark(held.points[:1], "start", "circle-open"), row=1, col=1)
    figure.update_xaxes(FRAME, range=list(land.across), title_standoff=2, row=1, col=1)
    figure.update_yaxes(FRAME, range=list(land.up), row=1, col=1)
    figure.update_layout(height=640, showlegend=False, yaxis_domain=[0.4, 1.0], yaxis2_domain=[0.0, 0.27])
    return figure


def _map(land: Landscape, points: int) -> Contour:
    x, y, z = ground(land, points)
    heights = np.log10(np.maximum(z, _FLOOR))
    low, high = heights.min(), heights.max()
    return Contour(
        x=short(x),
        y=short(y),
        z=np.round(250 * (heights - low) / (high - low)).astype(np.uint8),
        colorscale=[[0.0, LOOK.ground], [1.0, LOOK.colours[4]]],
        ncontours=_LEVELS,
        line={"width": 0.5, "color": LOOK.pale},
        showscale=False,
        hoverinfo="skip",
        opacity=0.75,
    )


def _mark(point: Float64[np.ndarray, "1 2"], name: str, symbol: str) -> dict[str, object]:
    return {
        "type": "scatter",
        "x": short(point[:, 0]),
        "y": short(point[:, 1]),
        "mode": "markers+text",
        "name": name,
        "text": [name],
        "textposition": "top center",
        "textfont": {"color": LOOK.ink},
        "marker": {"color": LOOK.ink, "size": 12, "symbol": symbol, "line": {"width": 2}},
        "showlegend": False,
    }


def _outcome(held: Path) -> str:
    first, last = held.losses[0], held.losses[-1]
    if not np.isfinite(held.losses).all() or last > 1e3 * first:
        return f"It diverges: the loss leaves {first:.3g} and knows no bounds."
    jump = float((held.losses[1:] / np.maximum(held.losses[:-1], 1e-12)).max())
    thrown = f" On its way one step makes the loss {jump:,.0f} times as large." if jump > 3 else ""
    return f"In {len(held.losses) - 1} steps the loss goes from {first:.3g} to {last:.2g}.{thrown}"


def step_lengths(corrected: bool, steps: int, seed: int = 0) -> Float64[np.ndarray, " steps"]:
    """The root mean square of Adam's step over its learning rate, for gradients that are nothing but noise.

    Examples:
        >>> step_lengths(True, 1).round(3).tolist()
        [1.0]
    """
    weight = nn.Parameter(torch.zeros(_COPIES, dtype=torch.float64))
    optimizer = Adam([weight], lr=1.0) if corrected else uncorrected([weight], lr=1.0)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(steps):
        before = weight.detach().clone()
        weight.grad = torch.randn(_COPIES, generator=generator, dtype=torch.float64)
        optimizer.step()
        found.append(float((weight.detach() - before).square().mean().sqrt()))
    return np.array(found)


def _correction(sizes: Sizes) -> Figure:
    steps = 10 * sizes.steps
    lines = [
        Line(name, np.arange(1, steps + 1), step_lengths(corrected, steps, sizes.seed), colour)
        for name, corrected, colour in (
            ("with correction", True, LOOK.colours[0]),
            ("without", False, LOOK.colours[1]),
        )
    ]
    most = float(np.max(lines[1].y))
    words = (
        f"Without the correction the steps grow to {most:.1f} times the learning rate before they settle. "
        "That is a warm-up turned upside down."
    )
    panel = Panel(lines, "step", "step / learning rate", log_x=True, reach=(0.0, 1.15 * most))
    figure = chart([panel], "Adam's first steps on pure noise", words)
    figure.update_xaxes(dtick=1)
    return figure


def page(sizes: Sizes) -> Page:
    """Optimizers."""
    points, along, over = sizes.points, RAVINE.rates[: sizes.rates], CLIFF.rates[: sizes.rates]
    slopes = {
        (name, f"{rate:g}"): trip(
            RAVINE, path(RAVINE, name, rate, _STEPS["ravine"]), f"{name}, learning rate {rate:g}", points
        )
        for name, rate in product(RAVINE.optimizers, along)
    }
    falls = {
        (name, f"{rate:g}", words): trip(
            CLIFF,
            path(CLIFF, name, rate, _STEPS["cliff"], clip),
            f"{name}, learning rate {rate:g}, {words}",
            points,
        )
        for name, rate, (words, clip) in product(CLIFF.optimizers, over, _CLIPS.items())
    }
    return sheet(
        "Optimizers on a ravine and at a cliff",
        "The gradient says where down is, not how far. Optimizers differ in how they guess that.",
        Section(
            "A ravine",
            (
                "25 times as steep across as along. Plain SGD must go so slowly that it does not leap "
                "from wall to wall: above a rate of 2/25 = 0.08 it diverges, below it creeps along the "
                "floor. Momentum sums up what stays the same. Adagrad, RMSprop and Adam divide each "
                "coordinate by its own size, and so do not see the steepness.",
                Dial(
                    {"optimizer": RAVINE.optimizers, "learning rate": tuple(f"{rate:g}" for rate in along)},
                    slopes,
                ),
                Code(_PATH.format(land="RAVINE", rate=0.03, clip="", steps=_STEPS["ravine"]), "One path"),
            ),
        ),
        Section(
            "A cliff",
            (
                "The loss of one recurrent unit, h' = w σ(h) + b, that has to be 0.7 after 25 steps. "
                "Where its memory tips over, the loss has a wall, and at the wall the gradient is huge: "
                "one step throws the weights far away. Clipping keeps the direction and bounds the "
                "length. Set SGD to a rate of 2, then clip.",
                Dial(
                    {
                        "optimizer": CLIFF.optimizers,
                        "learning rate": tuple(f"{rate:g}" for rate in over),
                        "clipping": tuple(_CLIPS),
                    },
                    falls,
                ),
                "Clipping is for walls such as this one. It does nothing for gradients that vanish.",
                Code(
                    _PATH.format(land="CLIFF", rate=2.0, clip=", clip=0.1", steps=_STEPS["cliff"]),
                    "One path, clipped",
                ),
                Code("gradmend study clipping", "Does clipping save a training whose gradients explode?"),
            ),
        ),
        Section(
            "Why Adam corrects its averages",
            (
                "Adam's running averages begin at 0, so at first they are too small: the mean by 1 − "
                "0.9ᵗ, the mean square by 1 − 0.999ᵗ. Uncorrected, the division by the far too small "
                "mean square makes the first steps too long, when the network can bear them least.",
                _correction(sizes),
                Code(_LENGTHS.format(steps=10 * sizes.steps), "These lengths"),
            ),
        ),
        sources(
            (
                "Polyak, Some methods of speeding up the convergence of iteration methods, 1964",
                "https://doi.org/10.1016/0041-5553(64)90137-5",
            ),
            (
                "Sutskever et al., On the importance of initialization and momentum in deep learning, 2013",
                "https://proceedings.mlr.press/v28/sutskever13.html",
            ),
            ("Kingma, Ba, Adam, 2015", "https://arxiv.org/abs/1412.6980"),
            (
                "Pascanu, Mikolov, Bengio, On the difficulty of training recurrent neural networks, 2013",
                "https://arxiv.org/abs/1211.5063",
            ),
        ),
    )


_PATH = """from gradmend.atlas.landscapes import {land}, path

found = path({land}, "SGD", rate={rate}, steps={steps}{clip})
print(found.points[-1], found.losses[-1])"""

_LENGTHS = """from gradmend.atlas.optimizers import step_lengths

print(step_lengths(corrected=False, steps={steps}).max())"""
