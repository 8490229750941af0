"""Activations: their slopes, where they are flat, and what they make of gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64
from plotly.graph_objects import Figure
from torch import nn

from gradmend import theory
from gradmend.atlas import networks
from gradmend.atlas.drawing import LOOK, Line, Panel, chart
from gradmend.atlas.meanfield import course
from gradmend.atlas.sizes import Sizes
from gradmend.atlas.words import sheet, sources
from gradmend.report.parts import Code, Dial, Page, Section, Table
from gradmend.stats import steep_interval
from gradmend.zoo.networks import mlp

_REACH = 8.0
_DEPTH = 12
_DEFAULT = 1 / 3
"""fan_in x Var(W) of torch's own weights."""

_BIAS = 0.05


def named(name: str) -> nn.Module:
    """An activation of `zoo.mlp`, in float64.

    >>> named("relu")
    ReLU()
    """
    return mlp(1, 1, width=1, depth=1, activation=name)[1].double()


@dataclass(frozen=True, eq=False)
class Shape:
    """An activation over its input.

    Args:
        z: inputs.
        value: outputs.
        slope: derivatives.
        steep: between which inputs the slope is at least 1 % of its maximum.
    """

    z: Float64[np.ndarray, " points"]
    value: Float64[np.ndarray, " points"]
    slope: Float64[np.ndarray, " points"]
    steep: tuple[float, float]


def shape(phi: nn.Module, points: int) -> Shape:
    """Outputs and derivatives, by autograd.

    Examples:
        >>> shape(named("tanh"), 3).slope.round(3).tolist()
        [0.0, 1.0, 0.0]
    """
    z = torch.linspace(-_REACH, _REACH, points, dtype=torch.float64, requires_grad=True)
    value = phi(z.clone())
    (slope,) = torch.autograd.grad(value.sum(), z)
    return Shape(z.detach().numpy(), value.detach().numpy(), slope.numpy(), steep_interval(phi))


def curve(name: str, shape: Shape) -> Figure:
    """An activation and its slope; shaded where it is flat, below the inputs of a healthy layer."""
    low, high = (min(max(end, -_REACH), _REACH) for end in shape.steep)
    flat = [ends for ends in ((-_REACH, low), (high, _REACH)) if ends[1] - ends[0] > 0.01]
    bell = 0.9 * np.exp(-(shape.z**2) / 2)
    upper = Panel(
        [Line("output", shape.z, shape.value), Line("slope", shape.z, shape.slope, LOOK.colours[1])],
        "",
        "output, slope",
        reach=(-1.7, 2.7),
        mark=0.0,
        flat=flat,
    )
    lower = Panel(
        [Line("inputs of unit variance", shape.z, bell, LOOK.pale, fill="tozeroy", width=1, opacity=0.7)],
        "input z",
        "how often",
        reach=(0.0, 1.0),
        flat=flat,
    )
    figure = chart([upper, lower], f"{name} and its slope", _flatness(name, shape), height=250)
    figure.update_layout(yaxis_domain=[0.32, 1.0], yaxis2_domain=[0.0, 0.22], height=450)
    figure.update_yaxes(showticklabels=False, row=2)
    return figure


def _flatness(name: str, shape: Shape) -> str:
    low, high = shape.steep
    top = f"The largest slope of {name} is {shape.slope.max():.3g}."
    if math.isinf(low) and math.isinf(high):
        return f"{top} It is flat nowhere."
    if math.isinf(high):
        return f"{top} It is flat (shaded) below {round(low, 1) + 0.0:.3g}."
    return f"{top} It is flat (shaded) below {low:.3g} and above {high:.3g}."


@dataclass(frozen=True)
class Growth:
    """By what one layer multiplies the norm of the gradient.

    Args:
        variances: fan_in x Var(W).
        measured: the mean factor over the layers of a real network.
        expected: the same by mean-field theory, for the same layers.
    """

    variances: tuple[float, ...]
    measured: tuple[float, ...]
    expected: tuple[float, ...]


def growth(sizes: Sizes, name: str) -> Growth:
    """Measured and expected factors of the gradient's norm per layer, in networks of a dozen layers."""
    variances = tuple(np.geomspace(0.25, 4.0, 9 if sizes.points > 60 else 3).round(3).tolist())
    pairs = [_factors(sizes, name, variance) for variance in variances]
    return Growth(variances, *(tuple(column) for column in zip(*pairs, strict=True)))


def _factors(sizes: Sizes, name: str, variance: float) -> tuple[float, float]:
    profile = networks.profile(sizes, depth=_DEPTH, activation=name, weight_variance=variance)
    first, last = (
        reading.gradient_norm or 0.0 for reading in (profile.weighted()[0], profile.weighted()[-2])
    )
    square = float(networks.rows(sizes)[0].square().mean())
    expected = course(named(name), _DEPTH, variance, square=square).gradients[0]
    return (first / last) ** (1 / (_DEPTH - 1)), float(expected) ** (1 / (_DEPTH - 1))


def factors(name: str, growth: Growth) -> Figure:
    """The factor per layer over the variance of the weights."""
    panel = Panel(
        [
            Line("theory", growth.variances, growth.expected, LOOK.ink, dash="dash", width=1.5),
            Line("measured", growth.variances, growth.measured, mode="markers", size=9),
        ],
        "weight variance, fan_in × Var(W)",
        "gradient, factor per layer",
        log=True,
        log_x=True,
        mark=1.0,
        reach=(-1.6, 0.5),
    )
    figure = chart([panel], f"{name}: what one layer does to the gradient", _crossing(name, growth))
    ticks = [0.25, 0.5, 1, 2, 4]
    figure.update_xaxes(tickvals=ticks, ticktext=[str(tick) for tick in ticks], dtick=None)
    figure.update_yaxes(
        tickvals=[0.03, 0.1, 0.3, 1, 3], ticktext=["0.03", "0.1", "0.3", "1", "3"], dtick=None
    )
    return figure


def _crossing(name: str, growth: Growth) -> str:
    low, high = min(growth.measured), max(growth.measured)
    if high < 1:
        return f"{name}: the gradient shrinks at every layer, whatever the weights between 0.25 and 4."
    if low > 1:
        return f"{name}: the gradient grows at every layer."
    at = float(np.interp(0.0, np.log(growth.measured), np.log(growth.variances)))
    return f"{name}: the gradient keeps its size near a weight variance of {math.exp(at):.2g}."


def table(names: Sequence[str]) -> Table:
    """What theory says of each activation."""
    rows = tuple(_row(name) for name in names)
    headings = (
        "activation",
        "largest slope",
        "flat outside",
        "gradient per layer",
        "layers that train",
        "critical variance",
    )
    words = (
        "By mean-field theory. Gradient per layer and layers that train: with torch's own weights. "
        "Critical variance: of the weights, where gradients keep their size, with biases of variance "
        f"{_BIAS}."
    )
    return Table(headings, rows, words)


def _row(name: str) -> tuple[str, ...]:
    phi = named(name)
    found = shape(phi, 601)
    q = theory.fixed_point(phi, _DEFAULT)
    factor = math.sqrt(theory.gradient_factor(phi, q, _DEFAULT))
    depth = theory.trainable_depth(phi, _DEFAULT)
    edge = theory.critical(phi, _BIAS)
    kept = "none" if edge is None else f"{edge.weight_variance:.3g}" + ("" if edge.stable else ", unstable")
    ends = ", ".join("–" if math.isinf(end) else f"{round(end, 1) + 0.0:.1f}" for end in found.steep)
    return name, f"{found.slope.max():.3g}", ends, f"{factor:.2f}", f"{depth:.0f}", kept


def page(sizes: Sizes) -> Page:
    """Activations and derivatives."""
    names = sizes.activations
    shapes = {(name,): curve(name, shape(named(name), sizes.points)) for name in names}
    grown = {(name,): factors(name, growth(sizes, name)) for name in names}
    remade = networks.code(
        sizes,
        "first, last = profile.weighted()[0], profile.weighted()[-2]\n"
        f"print((first.gradient_norm / last.gradient_norm) ** (1 / {_DEPTH - 1}))",
        depth=_DEPTH,
        activation=names[0],
        weight_variance=1.0,
    )
    return sheet(
        "Activations and their slopes",
        "Going backward, every layer multiplies the gradient by the slope of its activation. Small "
        "slopes, many layers: nothing is left.",
        Section(
            "The slope is what the gradient meets",
            (
                "Going forward, a layer applies its activation. Going backward, it multiplies the "
                "gradient by the slope of that activation, at the very inputs that it got. Where the "
                "curve is flat, the gradient ends.",
                Dial({"activation": names}, shapes),
                "The sigmoid is the classical trap. Its slope is 0.25 at best, and nearly 0 a few units "
                "away from the middle. A rectifier has slope 1 or 0: it shrinks nothing, but a unit "
                "whose inputs are always negative is dead.",
                Code(_SHAPE.format(name=names[0]), "The curve and where it is flat"),
            ),
        ),
        Section(
            "Slope times weights",
            (
                "The weights can make up for a small slope. One layer multiplies the squared gradient by "
                "χ = fan_in × Var(W) × E[slope²]. Dots are real networks of 12 layers on handwritten digits; "
                "the line is mean-field theory, without anything fitted.",
                Dial({"activation": names}, grown),
                "Below the dotted line gradients vanish, above it they explode. A layer should sit on "
                "it. For ReLU that is a weight variance of 2: He initialization.",
                Code(remade, "One of the dots"),
            ),
        ),
        Section(
            "All of them beside each other",
            (
                table(names),
                "torch's own initialization of linear layers has a weight variance of 1/3. That is too "
                "little for every activation here: a few layers, and the gradient is gone. The critical "
                "variance is unstable where lengths drift away from it; rectifiers and softplus have "
                "none with such biases.",
            ),
        ),
        sources(
            (
                "Glorot, Bengio, Understanding the difficulty of training deep feedforward neural "
                "networks, 2010",
                "https://proceedings.mlr.press/v9/glorot10a.html",
            ),
            ("He et al., Delving deep into rectifiers, 2015", "https://arxiv.org/abs/1502.01852"),
            (
                "Poole et al., Exponential expressivity in deep neural networks through transient chaos, "
                "2016",
                "https://arxiv.org/abs/1606.05340",
            ),
        ),
    )


_SHAPE = """import torch
from gradmend.atlas.activations import named, shape

found = shape(named("{name}"), points=121)
print(found.slope.max(), found.steep)"""
