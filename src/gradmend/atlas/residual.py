"""Residual against plain networks: gradients, their shattering, and what is learnt."""

from __future__ import annotations

import math
from itertools import product
from typing import Final

import numpy as np
import torch
from jaxtyping import Float64
from plotly.graph_objects import Figure
from torch import Tensor, nn

from gradmend.atlas import networks, trainings
from gradmend.atlas.drawing import LOOK, Line, Panel, chart, layers, reach
from gradmend.atlas.sizes import Sizes
from gradmend.atlas.words import sheet, sources
from gradmend.probe import measure
from gradmend.remedies import AddSkips
from gradmend.report.parts import Code, Dial, Page, Section
from gradmend.setup import Batch, Setup
from gradmend.study.design import Study
from gradmend.zoo.networks import mlp

_SKIPS: Final = {"plain": None, "residual": AddSkips(scale=1.0), "residual, branches × 1/√L": AddSkips()}
KINDS: Final = tuple(_SKIPS)
_COLOURS: Final = (LOOK.colours[1], LOOK.colours[4], LOOK.colours[0])
_SHOWN: Final = ("relu", "tanh")
_WIDTH: Final = 200
_REPEATS: Final = 3


def connected(kind: str, setup: Setup, batch: Batch) -> Setup:
    """A plain network with the skips of this kind."""
    skips = _SKIPS[kind]
    return setup if skips is None else skips.apply(setup, batch).setup


def network(sizes: Sizes, kind: str, activation: str, depth: int) -> Setup:
    """A network with He weights and the skips of this kind."""
    found = networks.network(sizes, depth=depth, activation=activation, init="he")
    return connected(kind, found.setup, networks.rows(sizes))


def gradients(setup: Setup, batch: Batch) -> Float64[np.ndarray, " layers"]:
    """Norms of the gradient at the sums of stream and branch, or at the layers where there are none."""
    profile = measure(setup, batch)
    sums = [reading for reading in profile.sites if reading.site.kind == "sum"]
    return np.array([reading.gradient_norm or 0.0 for reading in sums or profile.weighted()[1:-1]])


def descent(sizes: Sizes, activation: str, depth: int) -> Figure:
    """The gradient at every layer of the three networks."""
    batch = networks.rows(sizes)
    setups = {kind: network(sizes, kind, activation, depth) for kind in KINDS}
    held = {kind: gradients(setup, batch) for kind, setup in setups.items()}
    losses = {kind: setup.loss(batch).item() for kind, setup in setups.items()}
    lines = [
        Line(kind, layers(len(row)) + 1, np.where(row > 0, row, np.nan), colour)
        for (kind, row), colour in zip(held.items(), _COLOURS, strict=True)
    ]
    panel = Panel(lines, "layer", "gradient norm", log=True, reach=reach(list(held.values()), least=2.0))
    told = ", ".join(f"{losses[kind]:.3g} ({kind})" for kind in KINDS)
    return chart(
        [panel], f"{activation}, {depth} layers", f"The loss before the first step: {told}.", height=330
    )


def slopes(
    kind: str, depth: int, points: int, seed: int
) -> tuple[Float64[np.ndarray, " points"], Float64[np.ndarray, " points"]]:
    """The derivative of a network's output while its input moves along half a circle.

    Returns:
        Angles from 0 to pi, and the derivatives there over their root mean square.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = mlp(2, 1, width=_WIDTH, depth=depth + 1, activation="relu", init="he")
    angles = torch.linspace(0, math.pi, points, dtype=torch.float64)
    batch = (_circle(angles).float(), torch.zeros(points, 1))
    whole = connected(kind, Setup(model, nn.MSELoss()), batch).model.double()
    at = angles.clone().requires_grad_()
    (found,) = torch.autograd.grad(whole(_circle(at)).sum(), at)
    values = found.numpy()
    return angles.numpy(), values / np.sqrt(np.mean(values**2))


def _circle(angles: Float64[Tensor, " points"]) -> Float64[Tensor, "points 2"]:
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def alike(values: Float64[np.ndarray, " points"], most: int) -> Float64[np.ndarray, " lags"]:
    """The autocorrelation of a series over 0, 1, ... places.

    >>> alike(np.array([1.0, -1.0, 1.0, -1.0]), most=2).round(2).tolist()
    [1.0, -0.75]
    """
    centred = values - values.mean()
    total = float(centred @ centred) or 1.0
    return np.array([centred[: len(centred) - lag] @ centred[lag:] / total for lag in range(most)])


def shattering(sizes: Sizes, kind: str, depth: int) -> Figure:
    """The derivative along the circle, and how alike it is at neighbouring inputs."""
    points = 2 * sizes.points + 15
    x, held = slopes(kind, depth, points, sizes.seed)
    correlation = np.mean(
        [alike(slopes(kind, depth, points, sizes.seed + i)[1], points // 8) for i in range(_REPEATS)], axis=0
    )
    colour = _COLOURS[KINDS.index(kind)]
    above = Panel([Line("", x, held, colour, width=1.5)], "input: angle on the circle", "derivative")
    below = Panel(
        [
            Line(
                "",
                (x[1] - x[0]) * np.arange(len(correlation)),
                correlation,
                colour,
                mode="lines+markers",
                size=4,
            )
        ],
        "angle between two inputs",
        "correlation",
        reach=(-0.25, 1.05),
        mark=0.0,
    )
    near = float(correlation[min(4, len(correlation) - 1)])
    words = f"Gradients at inputs {4 * (x[1] - x[0]):.2f} apart have a correlation of {near:.2f}" + (
        ": neighbours agree."
        if near > 0.7
        else ": neighbours hardly agree."
        if near > 0.3
        else ": they are noise."
    )
    figure = chart([above, below], f"{kind}, {depth} layer" + "s" * (depth > 1), words, height=230)
    figure.update_layout(showlegend=False)
    return figure


def study(sizes: Sizes) -> Study:
    """The three kinds at several depths, trained."""
    connections = {kind: {} if skips is None else repr(skips) for kind, skips in _SKIPS.items()}
    return Study(
        "deep",
        factors={"connections": connections, "depth": list(_trained(sizes))},
        settings={"activation": "relu", "init": "he", "learning_rate": 0.03},
        steps=sizes.steps,
        seeds=range(sizes.seed, sizes.seed + sizes.seeds),
    )


def _trained(sizes: Sizes) -> tuple[int, ...]:
    """Depths that do not take too long."""
    return (5, 20, 50) if max(sizes.depths) >= 50 else sizes.depths


def learnt(sizes: Sizes) -> Figure:
    """The accuracy on new rows over depth."""
    held = trainings.measured(trainings.run(study(sizes)), "test_accuracy")
    depths = _trained(sizes)
    lines = []
    for kind, colour in zip(KINDS, _COLOURS, strict=True):
        seeds = np.stack([np.nan_to_num(held[kind, str(depth)], nan=0.1) for depth in depths])
        lines.append(Line(kind, depths, 100 * seeds.mean(1), colour, mode="lines+markers", size=7))
        lines += [Line("", depths, 100 * row, colour, mode="markers", size=4, opacity=0.6) for row in seeds.T]
    panel = Panel(lines, "layers", "right on new rows, %", log_x=True, reach=(0.0, 103.0))
    figure = chart([panel], f"After {sizes.steps} steps", "Large dots are means, small ones single seeds.")
    figure.update_xaxes(tickvals=list(depths), ticktext=list(map(str, depths)), dtick=None)
    return figure


def page(sizes: Sizes) -> Page:
    """Residual against plain."""
    shown = tuple(name for name in _SHOWN if name in sizes.activations)
    depths, broken = tuple(map(str, sizes.depths)), (1, *sizes.depths[:3:2])
    profiles = {(phi, str(depth)): descent(sizes, phi, depth) for phi, depth in product(shown, sizes.depths)}
    shattered = {(kind, str(depth)): shattering(sizes, kind, depth) for kind, depth in product(KINDS, broken)}
    return sheet(
        "Residual against plain",
        "A skip lets the gradient pass every layer unchanged. What it adds must then be kept small.",
        Section(
            "The gradient, layer by layer",
            (
                "A residual block computes x + f(x), so backward the gradient is passed on as it is, "
                "plus something. It does not vanish. But each block adds, so with f as large as x the "
                "signal doubles its square at every layer, and so does the gradient: look at 50 layers. "
                "Branches scaled by 1/√L, for L layers, add up to a bounded whole.",
                Dial({"activation": shown, "depth": depths}, profiles),
                Code(_SCALED.format(rows=sizes.rows), "The residual network with scaled branches"),
            ),
        ),
        Section(
            "Shattered gradients",
            (
                "An input moves along half a circle; this is the derivative of a ReLU network's output "
                "on the way. With depth, the one of a plain network turns into white noise: a step that "
                "is right for one sample says nothing about its neighbour. Residual networks keep it "
                "smooth.",
                Dial({"network": KINDS, "depth": tuple(map(str, broken))}, shattered),
                "So a gradient of the right size can still be useless. This is why a plain ReLU network "
                "with He weights has perfect norms at 100 layers and yet learns badly.",
                Code(_SLOPES, "Such a derivative"),
            ),
        ),
        Section(
            "What is learnt",
            (
                f"ReLU layers with He weights on handwritten digits, SGD, {sizes.seeds} seeds.",
                learnt(sizes),
                Code("gradmend study residual", "The same with more kinds of connections"),
            ),
        ),
        sources(
            (
                "He et al., Deep residual learning for image recognition, 2016",
                "https://arxiv.org/abs/1512.03385",
            ),
            ("Balduzzi et al., The shattered gradients problem, 2017", "https://arxiv.org/abs/1702.08591"),
            (
                "Hanin, Which neural net architectures give rise to exploding and vanishing gradients?, 2018",
                "https://arxiv.org/abs/1801.03744",
            ),
            ("Zhang, Dauphin, Ma, Fixup initialization, 2019", "https://arxiv.org/abs/1901.09321"),
        ),
    )


_SCALED = """import gradmend as gm
from gradmend.remedies import AddSkips
from gradmend.zoo import recipe

found = recipe("deep", depth=50, activation="relu", init="he")
batch = found.data.x[:{rows}], found.data.y[:{rows}]
print(gm.measure(AddSkips().apply(found.setup, batch).setup, batch))"""

_SLOPES = """from gradmend.atlas.residual import alike, slopes

x, derivative = slopes("plain", depth=20, points=200, seed=0)
print(alike(derivative, most=5))"""
