"""Depth scales: the plane of initializations, and how far two samples stay apart."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float64
from plotly.graph_objects import Figure

from gradmend import theory
from gradmend.atlas import networks
from gradmend.atlas.activations import named
from gradmend.atlas.drawing import FRAME, LOOK, Line, Panel, chart, heat
from gradmend.atlas.meanfield import course
from gradmend.atlas.sizes import Sizes
from gradmend.atlas.words import sheet, sources
from gradmend.probe import measure
from gradmend.report.parts import Code, Dial, Page, Section
from gradmend.theory import PhaseDiagram

_SHOWN: Final = ("tanh", "relu", "sigmoid", "elu", "selu", "gelu", "silu")
_BIAS: Final = 0.05
_START: Final = 0.6
"""The cosine between the samples that are followed."""

_STRONG: Final = 0.15
"""Decades per layer beyond which the colours stay the same."""

_OWN, _OWN_BIAS = 1 / 3, 0.01
"""What torch's own linear layers have, of a few dozen inputs."""


@dataclass(frozen=True)
class Plane:
    """Which initializations are looked at.

    Args:
        weights: values of fan_in x Var(W).
        biases: values of Var(b).
    """

    weights: tuple[float, ...]
    biases: tuple[float, ...]


def plane(sizes: Sizes, activation: str) -> Plane:
    """The part of the plane where something happens; for the sigmoid that is far out."""
    most = 160.0 if activation == "sigmoid" else 4.0
    count = 33 if sizes.points > 60 else 6
    weights = np.linspace(most / 40, most, count)
    return Plane(tuple(weights.tolist()), tuple((np.linspace(0.0, 1.0, max(3, count // 2)) ** 2).tolist()))


def diagram(activation: str, found: PhaseDiagram) -> Figure:
    """The factor of the gradient over the plane, with the critical line."""
    held = found.critical.numpy()
    edge = Line("edge of chaos", held, found.bias_variances, LOOK.ink, width=3)
    own = Line("torch's own weights", [_OWN], [_OWN_BIAS], LOOK.ink, mode="markers", size=10)
    lines = [edge, own] if np.isfinite(held).any() else [own]
    panel = Panel(lines, "weight variance, fan_in × Var(W)", "bias variance")
    figure = chart([panel], f"{activation}: order and chaos", _phases(activation, found), height=380)
    decades = np.clip(np.log10(found.chi.numpy()) / 2, -_STRONG, _STRONG)
    figure.add_trace(
        heat(
            decades.astype(np.float32),
            found.weight_variances,
            found.bias_variances,
            colorscale=[[0.0, LOOK.colours[0]], [0.5, LOOK.ground], [1.0, LOOK.colours[1]]],
            zmin=-_STRONG,
            zmax=_STRONG,
            zsmooth="best",
            colorbar=_BAR,
            hoverinfo="skip",
        )
    )
    figure.data = (figure.data[-1], *figure.data[:-1])
    ends = [found.weight_variances[0], found.weight_variances[-1]]
    figure.update_xaxes(FRAME, range=ends)
    figure.update_yaxes(FRAME, range=[found.bias_variances[0], found.bias_variances[-1]])
    return figure


_BAR: Final[dict[str, Any]] = {
    "title": {"text": "gradient, factor per layer", "side": "top"},
    "orientation": "h",
    "thickness": 12,
    "len": 0.7,
    "y": -0.3,
    "yanchor": "top",
    "tickvals": [-_STRONG, float(np.log10(0.85)), 0.0, float(np.log10(1.2)), _STRONG],
    "ticktext": ["≤ 0.7", "0.85", "1", "1.2", "≥ 1.4"],
}


def _phases(activation: str, found: PhaseDiagram) -> str:
    chaos = float(found.chaotic.double().mean())
    if not torch.isfinite(found.critical).any():
        edge = "no edge that signals return to" if chaos else "no edge in this part of the plane"
        return f"{activation} has {edge}: left gradients vanish (blue), right they explode (orange)."
    return (
        "On the line gradients keep their size. Left of it they vanish (blue), right they explode (orange)."
    )


def pair(width: int, rows: int, seed: int) -> Float64[torch.Tensor, "rows width"]:
    """Samples of unit mean square of which each two have the cosine 0.6."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(1, width, generator=generator, dtype=torch.float64)
    own = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    mixed = math.sqrt(_START) * common + math.sqrt(1 - _START) * own
    return mixed / mixed.square().mean(1, keepdim=True).sqrt()


@dataclass(frozen=True, eq=False)
class Cosines:
    """Between the pre-activations of two samples, layer by layer."""

    measured: Float64[np.ndarray, " layers"]
    expected: Float64[np.ndarray, " layers"]


def cosines(sizes: Sizes, activation: str, variance: float, depth: int) -> Cosines:
    """Measured in a real network, and by mean-field theory."""
    found = networks.network(
        sizes,
        width=4 * sizes.width,
        depth=depth,
        activation=activation,
        weight_variance=variance,
        bias_variance=_BIAS,
    )
    x = pair(64, 16, sizes.seed).float()
    profile = measure(found.setup, (x, torch.zeros(16, dtype=torch.long)))
    measured = np.array([reading.cosine for reading in profile.weighted()[:-1]])
    start = float(np.mean(torch.corrcoef(x).numpy()[np.triu_indices(16, 1)]))
    expected = course(named(activation), depth, variance, _BIAS, square=1.0, cosine=start)
    return Cosines(measured, expected.cosines)


def apart(activation: str, variance: float, held: Cosines) -> Figure:
    """The cosine over depth."""
    along = np.arange(1, len(held.measured) + 1)
    scale = theory.depth_scales(named(activation), variance, _BIAS).correlation
    lines = [
        Line("theory", along, held.expected, LOOK.ink, dash="dash", width=1.5),
        Line("measured", along, held.measured, mode="markers", size=6),
    ]
    panel = Panel(lines, "layer", "cosine of two samples", mark=1.0, reach=(-0.05, 1.08))
    return chart([panel], f"{activation}, weight variance {variance:g}", _apart(held, scale))


def _apart(held: Cosines, scale: float) -> str:
    last = held.measured[-1]
    depth = (
        f" The depth scale is {scale:.2g} layers, so about {6 * scale:.0f} can be trained."
        if math.isfinite(scale)
        else ""
    )
    if last > 0.98:
        return f"All samples become one: nothing is left to tell them apart by.{depth}"
    return f"Two samples end at a cosine of {last:.2f}.{depth}"


def scales(sizes: Sizes, activation: str) -> Figure:
    """The depth scale of the correlation over the weight variance."""
    weights = np.linspace(0.1, 4.0, max(8, sizes.points // 3)) * (40.0 if activation == "sigmoid" else 1.0)
    found = [theory.depth_scales(named(activation), float(weight), _BIAS).correlation for weight in weights]
    values = np.clip(np.array(found), 0.1, 1e3)
    line = Line("", weights, 6 * values, LOOK.colours[0])
    panel = Panel(
        [line], "weight variance, fan_in × Var(W)", "layers that train, 6 ξ", log=True, reach=(0.0, 3.3)
    )
    best = float(weights[int(values.argmax())])
    words = f"Biases of variance {_BIAS}. The deepest networks train near a weight variance of {best:.2g}."
    return chart([panel], f"{activation}: how deep a network trains", words, height=280)


def page(sizes: Sizes) -> Page:
    """Phases and depth scales."""
    shown = tuple(name for name in _SHOWN if name in sizes.activations)
    diagrams = {}
    for name in shown:
        held = plane(sizes, name)
        diagrams[name,] = diagram(name, theory.phase_diagram(named(name), held.weights, held.biases))
    variances, depth = sizes.variances[1:], sizes.depths[-2]
    followed = tuple(name for name in shown if name != "sigmoid") or shown
    falls = {
        (name, f"{variance:g}"): apart(name, variance, cosines(sizes, name, variance, depth))
        for name, variance in product(followed, variances)
    }
    return sheet(
        "Order, chaos, and the edge between them",
        "Deep down, either all samples become one or neighbours become strangers. Only at the edge does "
        "a signal get through.",
        Section(
            "The plane of initializations",
            (
                "Two numbers say how the weights and biases are drawn. For each pair, theory says where "
                "signals settle, and by what one layer multiplies the gradient there. One line separates "
                "the two phases.",
                Dial({"activation": shown}, diagrams),
                "Rectifiers have no such line but the single point 2 at biases of 0. The sigmoid's lies "
                "at 100, where nobody would look for it.",
                Code(_PLANE, "The critical line"),
            ),
        ),
        Section(
            "Two samples on their way down",
            (
                f"Samples with a cosine of {_START} enter a network of {depth} layers of "
                f"{4 * sizes.width} units. In the ordered phase they become one. In the chaotic phase "
                "they end at a cosine below 1, whatever they were: even neighbours part. Both forget the "
                "input; the line is theory.",
                Dial({"activation": followed, "weight variance": tuple(f"{v:g}" for v in variances)}, falls),
                Code(_COSINES, "One of the lines"),
            ),
        ),
        Section(
            "How deep can it be?",
            (
                "Cosines come to their limit exponentially, over a depth scale ξ. A network much deeper "
                "than that knows nothing of its input at its end, and nothing of its error at its "
                "beginning. Empirically about 6 ξ layers can be trained; at the edge ξ is infinite.",
                Dial({"activation": shown}, {(name,): scales(sizes, name) for name in shown}),
                Code(_SCALES, "One point"),
            ),
        ),
        sources(
            (
                "Poole et al., Exponential expressivity in deep neural networks through transient chaos, "
                "2016",
                "https://arxiv.org/abs/1606.05340",
            ),
            ("Schoenholz et al., Deep information propagation, 2017", "https://arxiv.org/abs/1611.01232"),
            (
                "Hayou, Doucet, Rousseau, On the impact of the activation function on deep neural "
                "networks training, 2019",
                "https://arxiv.org/abs/1902.06853",
            ),
        ),
    )


_PLANE = """import torch
from gradmend.theory import phase_diagram

print(phase_diagram(torch.tanh, [1.0, 2.0, 3.0], [0.0, 0.05, 0.5]).critical)"""

_COSINES = """import torch
from gradmend.atlas.meanfield import course

print(course(torch.tanh, 50, weight_variance=1.5, bias_variance=0.05, cosine=0.6).cosines)"""

_SCALES = """import torch
from gradmend.theory import depth_scales, trainable_depth

print(depth_scales(torch.tanh, 1.5, 0.05), trainable_depth(torch.tanh, 1.5, 0.05))"""
