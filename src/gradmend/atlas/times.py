"""Gradients through time, of plain, LSTM and GRU cells."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Final

import numpy as np
import torch
from jaxtyping import Float64
from plotly.graph_objects import Figure
from torch import nn

from gradmend import theory
from gradmend.atlas.drawing import LOOK, Line, Panel, chart, reach
from gradmend.atlas.sizes import Sizes
from gradmend.atlas.words import sheet, sources
from gradmend.probe import measure
from gradmend.remedies import Chrono, ForgetBias, OrthogonalRecurrence
from gradmend.report.parts import Code, Dial, Page, Section
from gradmend.setup import Setup
from gradmend.zoo import recurrent

_INPUTS: Final = 8
_ROWS: Final = 16
_RADII: Final = (0.5, 0.9, 1.0, 1.1, 1.5)
_WEIGHTS: Final = ("Gaussian", "orthogonal")
_CELLS: Final = ("lstm", "gru")
_GATES: Final = ("torch's own", "bias 1", "bias 2", "bias 4", "chrono")
_UNITS: Final = 64
_FLOOR: Final = -30.0


@dataclass(frozen=True, eq=False)
class Back:
    """The gradient on its way back through time.

    Args:
        steps: before the end of the sequence.
        norms: root mean square of the gradient at the input of that step, over that at the last one.
        growth: of a state's gradient per step, along the trajectory.
    """

    steps: Float64[np.ndarray, " steps"]
    norms: Float64[np.ndarray, " steps"]
    growth: float


def back(setup: Setup, batch: tuple[torch.Tensor, torch.Tensor]) -> Back:
    """Measure a recurrent network whose loss is at the end of the sequence."""
    profile = measure(setup, batch)
    time = next(reading.time for reading in profile.sites if reading.time is not None)
    steps, norms = (np.array(column, dtype=np.float64) for column in zip(*time.gradients[0], strict=True))
    return Back(steps, norms / norms[0] if norms[0] else norms, time.paths[0].growth)


def batch(steps: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences of noise, with classes that mean nothing: what counts is the way back."""
    generator = torch.Generator().manual_seed(seed)
    x = 0.5 * torch.randn(_ROWS, steps, _INPUTS, generator=generator)
    return x, torch.randint(2, (_ROWS,), generator=generator)


def network(cell: str, seed: int) -> Setup:
    """A recurrent network of the zoo."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Setup(recurrent(_INPUTS, 2, cell=cell, width=_UNITS), nn.CrossEntropyLoss())


def plain(weights: str, radius: float, steps: int, seed: int) -> Back:
    """Of a tanh RNN whose recurrent weights have this spectral radius.

    Args:
        weights: Gaussian or orthogonal.
    """
    setup, given = network("rnn", seed), batch(steps, seed)
    if weights == "orthogonal":
        setup = OrthogonalRecurrence().apply(setup, given).setup
    weight = setup.model.get_parameter("body.weight_hh_l0")
    with torch.no_grad():
        if weights == "Gaussian":
            weight.normal_(std=_UNITS**-0.5, generator=torch.Generator().manual_seed(seed))
        weight.mul_(radius)
    return back(setup, given)


def gated(cell: str, gates: str, steps: int, seed: int) -> Back:
    """Of an LSTM or a GRU with these biases of the gate that keeps the state."""
    setup, given = network(cell, seed), batch(steps, seed)
    if gates == "chrono":
        setup = Chrono(steps=steps).apply(setup, given).setup
    elif gates.startswith("bias"):
        setup = ForgetBias(float(gates.removeprefix("bias "))).apply(setup, given).setup
    return back(setup, given)


def drive(steps: int, seed: int) -> float:
    """The second moment of what enters each pre-activation from outside, with torch's own weights."""
    x, _ = batch(steps, seed)
    return float(x.square().mean()) / 3 * _INPUTS / _UNITS + 2 / (3 * _UNITS)


def picture(title: str, held: list[Back], factor: float | None = None) -> Figure:
    """Networks of several seeds, and the slope that theory gives."""
    lines = [
        Line(
            "measured" if i == 0 else "",
            each.steps,
            np.where(each.norms > 0, each.norms, np.nan),
            mode="lines+markers",
            width=0.9,
            size=4,
        )
        for i, each in enumerate(held)
    ]
    if factor is not None:
        lines.append(
            Line("theory", held[0].steps, factor ** (held[0].steps / 2), LOOK.ink, dash="dash", width=1.5)
        )
    ends = reach([line.y for line in lines], least=2.0, floor=_FLOOR)
    panel = Panel(lines, "steps before the end", "gradient, last step = 1", log=True, reach=ends, mark=1.0)
    return chart([panel], title, _fate(held), height=330)


def _fate(held: list[Back]) -> str:
    last = float(np.exp(np.mean([np.log(max(each.norms[-1], 1e-300)) for each in held])))
    steps = int(held[0].steps[-1])
    fate = "It is remembered." if 0.05 <= last <= 20 else "It explodes." if last > 1 else "It is forgotten."
    return f"What came {steps} steps ago gets {last:.2g} times the gradient of the last step. {fate}"


def _plain_factor(radius: float, steps: int, seed: int) -> float:
    return theory.rnn_factor(torch.tanh, radius**2, drive(steps, seed))


def page(sizes: Sizes) -> Page:
    """Gradients through time."""
    seeds = range(sizes.seed, sizes.seed + sizes.seeds)
    numbers, lengths = tuple(f"{radius:g}" for radius in _RADII), tuple(map(str, sizes.lengths))
    plains = {
        (weights, f"{radius:g}", str(steps)): picture(
            f"tanh, {weights} weights of radius {radius:g}",
            [plain(weights, radius, steps, seed) for seed in seeds],
            _plain_factor(radius, steps, sizes.seed),
        )
        for weights, radius, steps in product(_WEIGHTS, _RADII, sizes.lengths)
    }
    gateds = {
        (cell, gates, str(steps)): picture(
            f"{cell.upper()}, {gates}", [gated(cell, gates, steps, seed) for seed in seeds]
        )
        for cell, gates, steps in product(_CELLS, _GATES, sizes.lengths)
    }
    return sheet(
        "Gradients through time",
        "A recurrent network is as deep as the sequence is long, with the same weights at every step. "
        "What it keeps, it must keep on purpose.",
        Section(
            "Plain cells",
            (
                "h' = tanh(W h + V x + b). Going back one step multiplies the gradient by W and by the "
                "slope of tanh. If the largest stretch of W is below 1, the past fades; if it is well "
                "above 1, the state itself fills the flat ends of tanh or runs wild. The loss is at the "
                "end of the sequence, on the left.",
                Dial({"weights": _WEIGHTS, "spectral radius": numbers, "length": lengths}, plains),
                "A radius of 1 is not enough: the slopes of tanh are below 1 as soon as anything comes in.",
                Code(_PLAIN.format(steps=sizes.lengths[-1]), "One line"),
            ),
        ),
        Section(
            "Gates",
            (
                "An LSTM and a GRU carry the state past the weights, multiplied by a gate. torch draws "
                "its biases near 0, so the gate begins at 1/2: the state halves at every step, and after "
                "60 steps nothing is left. A bias of 1, 2 or 4 opens the gate to 0.73, 0.88 or 0.98. "
                "Chrono biases give each unit a memory of its own, from a few steps up to the length of "
                "the sequence.",
                Dial({"cell": _CELLS, "gates": _GATES, "length": lengths}, gateds),
                Code(_GATED.format(steps=sizes.lengths[-1]), "One line"),
                Code("gradmend study recurrent", "Over how many steps a trained network remembers"),
            ),
        ),
        sources(
            (
                "Bengio, Simard, Frasconi, Learning long-term dependencies with gradient descent is "
                "difficult, 1994",
                "https://doi.org/10.1109/72.279181",
            ),
            (
                "Hochreiter, Schmidhuber, Long short-term memory, 1997",
                "https://doi.org/10.1162/neco.1997.9.8.1735",
            ),
            (
                "Jozefowicz, Zaremba, Sutskever, An empirical exploration of recurrent network "
                "architectures, 2015",
                "https://proceedings.mlr.press/v37/jozefowicz15.html",
            ),
            (
                "Tallec, Ollivier, Can recurrent neural networks warp time?, 2018",
                "https://arxiv.org/abs/1804.11188",
            ),
        ),
    )


_PLAIN = """from gradmend.atlas.times import plain

found = plain("orthogonal", radius=1.0, steps={steps}, seed=0)
print(found.norms[-1], found.growth)"""

_GATED = """from gradmend.atlas.times import gated

print(gated("lstm", "chrono", steps={steps}, seed=0).norms[-1])"""
