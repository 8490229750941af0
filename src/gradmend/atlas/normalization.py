"""Batch normalization before and after: what it cures, what it moves, and what it makes explode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Final

import numpy as np
import torch
from jaxtyping import Float64
from plotly.graph_objects import Figure

from gradmend import theory
from gradmend.atlas import networks, starts
from gradmend.atlas.activations import named
from gradmend.atlas.drawing import LOOK, Line, Panel, chart, layers, reach
from gradmend.atlas.sizes import Sizes
from gradmend.atlas.words import sheet, sources
from gradmend.probe import measure
from gradmend.report.parts import Code, Dial, Page, Section
from gradmend.training.loop import Stepper

_NORMS: Final = {"none": None, "batch normalization": "batch", "layer normalization": "layer"}
_SHOWN: Final = ("relu", "tanh", "sigmoid", "gelu")
_EXPLODING: Final = ("relu", "tanh")
_BATCHES: Final = (8, 64)
_EVERY: Final = 10
_DRIFTING: Final = 5
"""Hidden layers of the network whose training is followed."""


def _spreads(sizes: Sizes, names: Sequence[str], depth: int) -> Dial:
    pictures = {}
    for (words, norm), phi in product(_NORMS.items(), names):
        found = starts.start(sizes, depth=depth, activation=phi, norm=norm)
        pictures[words, phi] = starts.panels(found, f"{phi}, {depth} layers: {words}", starts.told(found))
    return Dial({"normalization": tuple(_NORMS), "activation": tuple(names)}, pictures)


def gradients(
    sizes: Sizes, activation: str, norm: str | None, rows: int, depth: int, skip: bool = False
) -> Float64[np.ndarray, " layers"]:
    """Norms of the gradient at the outputs of the linear layers, over that at the last hidden one."""
    found = networks.network(sizes, depth=depth, activation=activation, init="he", norm=norm, skip=skip)
    profile = measure(found.setup, (found.data.x[:rows], found.data.y[:rows]))
    held = np.array(
        [reading.gradient_norm or 0.0 for reading in profile.weighted() if reading.site.kind == "linear"]
    )
    return np.asarray(held[:-1] / held[-2])


def explosion(sizes: Sizes, activation: str, rows: int, depth: int) -> Figure:
    """The gradient in a deep network with and without batch normalization, and what theory says of it."""
    kinds = {
        "batch normalization": gradients(sizes, activation, "batch", rows, depth),
        "none": gradients(sizes, activation, None, rows, depth),
        "batch normalization and skips": gradients(sizes, activation, "batch", rows, depth, skip=True),
    }
    factor = theory.norm_factor(named(activation), "batch", rows)
    along = layers(depth)
    expected = factor ** ((depth - along) / 2)
    colours = (LOOK.colours[1], LOOK.pale, LOOK.colours[0])
    lines = [
        Line(name, along, np.where(held > 0, held, np.nan), colour)
        for (name, held), colour in zip(kinds.items(), colours, strict=True)
    ]
    lines.append(Line("theory of batch normalization", along, expected, LOOK.ink, dash="dash", width=1.5))
    ends = reach([*kinds.values(), expected], least=3.0)
    panel = Panel(lines, "layer", "gradient norm, last layer = 1", log=True, mark=1.0, reach=ends)
    words = (
        f"With batch normalization the gradient grows by {factor**0.5:.3g} per layer going backward: "
        f"{factor ** (depth / 2):.2g} times over {depth} layers. Skips hold it."
    )
    return chart([panel], f"{activation}, {depth} layers, batches of {rows}", words, height=340)


@dataclass(frozen=True, eq=False)
class Drift:
    """The inputs of one activation while a network trains.

    Args:
        steps: at which they were measured.
        middle: their mean.
        deviation: their standard deviation.
    """

    steps: Float64[np.ndarray, " times"]
    middle: Float64[np.ndarray, " times"]
    deviation: Float64[np.ndarray, " times"]


def drift(sizes: Sizes, norm: str | None) -> tuple[Drift, ...]:
    """What every activation of a network gets as input, every ten steps of its training.

    Returns:
        One record for each hidden layer.
    """
    found = networks.network(sizes, depth=_DRIFTING, activation="relu", init="he", norm=norm)
    setup, batches = found.setup, _batches(sizes)
    step = Stepper(setup)
    seen = []
    for at in range(sizes.steps + 1):
        if at % _EVERY == 0:
            profile = measure(setup, networks.rows(sizes))
            place = "linear" if norm is None else "normalization"
            sites = [reading for reading in profile.sites if reading.site.kind == place][:_DRIFTING]
            seen.append([(at, reading.mean, reading.variance**0.5) for reading in sites])
        step([batches[at % len(batches)]])
    table = np.array(seen, dtype=np.float64)
    return tuple(Drift(*table[:, layer].T) for layer in range(table.shape[1]))


def _batches(sizes: Sizes) -> list[tuple[torch.Tensor, torch.Tensor]]:
    data = networks.digits()
    order = torch.randperm(len(data.x), generator=torch.Generator().manual_seed(sizes.seed))
    return [(data.x[part], data.y[part]) for part in torch.split(order, sizes.rows)[:-1]]


def drifting(layer: int, kinds: dict[str, Drift]) -> Figure:
    """The mean and the deviation of a layer's inputs over the steps."""
    colours = (LOOK.colours[1], LOOK.colours[0])
    panels = [
        Panel(
            [
                Line(name, held.steps, getattr(held, what), colour)
                for (name, held), colour in zip(kinds.items(), colours, strict=True)
            ],
            "step" if what == "deviation" else "",
            title,
        )
        for what, title in (("middle", "mean"), ("deviation", "standard deviation"))
    ]
    moved = {
        name: float(np.ptp(held.deviation) / max(held.deviation[0], 1e-9)) for name, held in kinds.items()
    }
    words = "While it trains, the deviation of these inputs changes by " + " and by ".join(
        f"{change:.0%} ({name})" for name, change in moved.items()
    )
    return chart(panels, f"What the activation of layer {layer} gets", f"{words}.", height=210)


def page(sizes: Sizes) -> Page:
    """Batch normalization."""
    shown = tuple(name for name in _SHOWN if name in sizes.activations)
    exploding = tuple(name for name in _EXPLODING if name in sizes.activations)
    depth, deep = sizes.depths[1], sizes.depths[-2]
    batches = tuple(rows for rows in _BATCHES if rows <= max(sizes.rows, 8))
    exploded = {
        (phi, str(rows)): explosion(sizes, phi, rows, deep) for phi, rows in product(exploding, batches)
    }
    drifts = {name: drift(sizes, norm) for name, norm in (("none", None), ("batch normalization", "batch"))}
    moved = {
        (str(layer + 1),): drifting(layer + 1, {name: held[layer] for name, held in drifts.items()})
        for layer in range(_DRIFTING)
    }
    return sheet(
        "Batch normalization, before and after",
        "It makes every start look healthy. In a deep plain network it also makes gradients explode, at "
        "every layer a little.",
        Section(
            "What it does to the signal",
            (
                "torch's own weights are too small for a deep network: the outputs shrink from layer to "
                "layer. Batch normalization sets the mean of each unit to 0 and its variance to 1, over "
                "the batch, before the activation. Switch it on and off.",
                _spreads(sizes, shown, depth),
                Code(
                    networks.setup_code(sizes, depth=depth, activation=shown[0], norm="batch")
                    + "from gradmend.spread import spread\n\n"
                    + "spread(found.setup, batch).outputs",
                    "One of these networks",
                ),
            ),
        ),
        Section(
            "What it does to the gradient",
            (
                "Going backward the gradient is divided by each layer's deviation, and loses what lies "
                "along mean and scale. What comes out is larger, not equal: for ReLU and large batches "
                "by a factor of √(π/(π−1)) = 1.21 per layer. At 100 layers that is a hundred million. So "
                "very deep networks with batch normalization and without skips do not train.",
                Dial({"activation": exploding, "rows in a batch": tuple(map(str, batches))}, exploded),
                "With skips most of the gradient goes past the normalization. That is why residual "
                "networks and batch normalization belong together.",
                Code(
                    networks.code(
                        sizes, "print(profile)", depth=deep, activation=exploding[0], init="he", norm="batch"
                    ),
                    "The exploding one",
                ),
            ),
        ),
        Section(
            "What it holds still while training",
            (
                f"A network of {_DRIFTING} ReLU layers, trained by SGD. The layers before an activation "
                "change, and with them what it gets as input. With normalization it gets the same mean "
                "and deviation at every step, but for the learned scale and shift.",
                Dial({"layer": tuple(str(layer + 1) for layer in range(_DRIFTING))}, moved),
                "This drift was the reason for which batch normalization was invented. Later work found "
                "that it helps because the loss becomes smoother, also when noise is added that makes "
                "the drift worse.",
                Code("gradmend study normalization", "Which normalization makes a deep network trainable"),
            ),
        ),
        sources(
            ("Ioffe, Szegedy, Batch normalization, 2015", "https://arxiv.org/abs/1502.03167"),
            (
                "Yang et al., A mean field theory of batch normalization, 2019",
                "https://arxiv.org/abs/1902.08129",
            ),
            (
                "Santurkar et al., How does batch normalization help optimization?, 2018",
                "https://arxiv.org/abs/1805.11604",
            ),
            (
                "De, Smith, Batch normalization biases residual blocks towards the identity function, 2020",
                "https://arxiv.org/abs/2002.10444",
            ),
        ),
    )
