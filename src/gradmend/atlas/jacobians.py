"""Why gradients vanish: the product of the layers' Jacobians."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from jaxtyping import Float, Float64
from plotly.graph_objects import Figure
from torch import Tensor, nn

from gradmend.atlas import networks
from gradmend.atlas.activations import named
from gradmend.atlas.drawing import LOOK, Line, Panel, chart, layers, reach
from gradmend.atlas.meanfield import course
from gradmend.atlas.sizes import Sizes
from gradmend.atlas.words import sheet, sources
from gradmend.report.parts import Code, Dial, Page, Section

_SHOWN = ("sigmoid", "tanh", "relu", "selu", "gelu")
_DEFAULT = 1 / 3
_UNDERFLOW = 1e-38
_DEEP = (1, 4, 16, 64)
_INITS = {"Gaussian": nn.init.normal_, "orthogonal": nn.init.orthogonal_}
_GAINS = {"none": 1.0, "relu": 2.0, "tanh": 1.0}
"""The critical variance of fan_in x Var(W) of each activation, with biases of 0."""


@dataclass(frozen=True, eq=False)
class Norms:
    """Norms of the gradient at the pre-activations over that at the last hidden layer.

    Args:
        measured: of one network each; 0 where float32 holds no smaller number.
        expected: by mean-field theory.
    """

    measured: Float64[np.ndarray, "networks layers"]
    expected: Float64[np.ndarray, " layers"]


def norms(sizes: Sizes, activation: str, variance: float, depth: int) -> Norms:
    """Measured and expected norms of the gradient, layer by layer.

    Examples:
        >>> from gradmend.atlas.sizes import QUICK
        >>> norms(QUICK, "relu", 2.0, depth=4).expected.round(6).tolist()
        [1.0, 1.0, 1.0, 1.0]
    """
    settings = {"depth": depth, "activation": activation, "weight_variance": variance}
    found = []
    for seed in range(sizes.seed, sizes.seed + min(2, sizes.seeds)):
        profile = networks.profile(sizes, **settings, seed=seed)
        held = np.array([reading.gradient_norm or 0.0 for reading in profile.weighted()[:-1]])
        found.append(held / held[-1] if held[-1] else held)
    square = float(networks.rows(sizes)[0].square().mean())
    return Norms(np.stack(found), course(named(activation), depth, variance, square=square).gradients)


def descent(activation: str, variance: float, norms: Norms) -> Figure:
    """The norm at each layer."""
    along = layers(norms.measured.shape[1])
    measured = [
        Line(
            "measured" if i == 0 else "",
            along,
            np.where(row > 0, row, np.nan),
            mode="markers+lines",
            width=0.8,
            size=4 if len(along) > 30 else 6,
            opacity=0.9,
        )
        for i, row in enumerate(norms.measured)
    ]
    theory = Line("theory", along, norms.expected, LOOK.ink, dash="dash", width=1.5)
    ends = reach([norms.measured, norms.expected], least=2.0)
    panel = Panel(
        [*measured, theory],
        "layer (the loss is on the right)",
        "gradient norm, last layer = 1",
        log=True,
        reach=ends,
        mark=1.0,
    )
    title = f"{activation}, {len(along)} layers, weight variance {variance:.3g}"
    return chart([panel], title, _fate(norms), height=340)


def _fate(norms: Norms) -> str:
    held = float(np.exp(np.log(np.maximum(norms.measured[:, 0], 1e-300)).mean()))
    lost = int((norms.measured == 0).sum(axis=1).max())
    if lost:
        return (
            f"The first {lost} layers get a gradient of exactly 0: it is smaller than any number that "
            "float32 has."
        )
    if 0.1 <= held <= 10:
        return f"The first layer gets {held:.2g} times the gradient of the last one: it can learn."
    fate = "vanishes" if held < 1 else "explodes"
    return f"The first layer gets {held:.2g} times the gradient of the last one: it {fate}."


def jacobian(
    weights: Sequence[Float[Tensor, "units units"]], phi: nn.Module, x: Float[Tensor, " units"]
) -> Float[Tensor, "units units"]:
    """The derivative of the last pre-activations by the input: the product of W and of the slopes.

    Args:
        weights: of each layer.
        phi: between the layers.
        x: the input.

    Examples:
        >>> jacobian([2 * torch.eye(2), 3 * torch.eye(2)], torch.nn.ReLU(), torch.tensor([1.0, -1.0]))
        tensor([[6., 0.],
                [0., 0.]])
    """
    held, product = weights[0] @ x, weights[0]
    for weight in weights[1:]:
        held = held.detach().requires_grad_()
        output = phi(held)
        (slope,) = torch.autograd.grad(output.sum(), held)
        product = weight @ (slope[:, None] * product)
        held = weight @ output.detach()
    return product


def singular_values(sizes: Sizes, activation: str, init: str) -> dict[int, Float64[np.ndarray, " units"]]:
    """Of the product of the first 1, 4, 16 and 64 Jacobians, the largest first; at the critical variance."""
    phi = nn.Identity() if activation == "none" else named(activation)
    generator = torch.Generator().manual_seed(sizes.seed)
    weights = [_drawn(sizes.width, init, generator) * _GAINS[activation] ** 0.5 for _ in range(max(_DEEP))]
    x = torch.randn(sizes.width, generator=generator, dtype=torch.float64)
    return {
        depth: torch.linalg.svdvals(jacobian(weights[:depth], phi, x)).detach().numpy() for depth in _DEEP
    }


def _drawn(width: int, init: str, generator: torch.Generator) -> Float[Tensor, "units units"]:
    """Weights of variance 1 / fan_in."""
    weight = torch.empty(width, width, dtype=torch.float64)
    if init == "orthogonal":
        return nn.init.orthogonal_(weight, generator=generator)
    return nn.init.normal_(weight, std=width**-0.5, generator=generator)


def spectrum(activation: str, init: str, values: dict[int, Float64[np.ndarray, " units"]]) -> Figure:
    """Singular values of the product, from the largest to the smallest."""
    colours = [LOOK.pale, LOOK.colours[4], LOOK.colours[0], LOOK.colours[1]]
    lines = [
        Line(
            f"{depth} layers" if depth > 1 else "1 layer",
            layers(len(held)),
            np.where(held > 1e-12, held, np.nan),
            colour,
        )
        for (depth, held), colour in zip(values.items(), colours, strict=True)
    ]
    panel = Panel(
        lines, "singular value, by size", "by what it stretches", log=True, mark=1.0, reach=(-12.3, 3.0)
    )
    deep = values[max(_DEEP)]
    ratio = deep[0] / max(deep[len(deep) // 2], 1e-300)
    words = (
        f"After {max(_DEEP)} layers the direction that is stretched most gets {ratio:.2g} times as much as "
        "the middle one."
    )
    between = "no activation" if activation == "none" else activation
    return chart([panel], f"{init} weights, {between}", words, height=340)


def page(sizes: Sizes) -> Page:
    """The product of Jacobians."""
    variances = (_DEFAULT, *sizes.variances[1:])
    shown = tuple(name for name in _SHOWN if name in sizes.activations)
    depths, numbers = tuple(map(str, sizes.depths)), tuple(f"{v:.3g}" for v in variances)
    pictures = {
        (phi, number, str(depth)): descent(phi, variance, norms(sizes, phi, variance, depth))
        for phi, (number, variance), depth in product(
            shown, zip(numbers, variances, strict=True), sizes.depths
        )
    }
    spectra = {
        (init, phi): spectrum(phi, init, singular_values(sizes, phi, init))
        for init, phi in product(_INITS, _GAINS)
    }
    remade = networks.code(
        sizes,
        "print(profile)",
        depth=sizes.depths[-1],
        activation=shown[0],
        weight_variance=round(variances[0], 3),
    )
    return sheet(
        "Why gradients vanish",
        "A gradient is multiplied once per layer. Anything but a factor of 1, a hundred times over, is "
        "nothing or infinity.",
        Section(
            "Turn the dials",
            (
                "Backpropagation sends the gradient from the loss back through every layer. Each one "
                "multiplies it by the same kind of matrix, slopes times weights. So its norm changes by "
                "about the same factor at each, and that is exponential in depth: a straight line on "
                "this scale. The line is mean-field theory; the dots are real networks on handwritten "
                "digits, two for each choice.",
                Dial({"activation": shown, "weight variance": numbers, "depth": depths}, pictures),
                "Weight variance means fan_in × Var(W). The first choice, 1/3, is what torch gives a "
                "linear layer if you say nothing. Try sigmoid at any variance, then ReLU at 2: its "
                "factor is 2 × 1/2 = 1, which is all that He initialization is about.",
                Code(remade, "One of these networks"),
            ),
        ),
        Section(
            "One number is not enough",
            (
                "The norm can be right while the directions are not. The product of many random matrices "
                "stretches a few directions and crushes all others. These are the singular values of the "
                "exact product of Jacobians, with weights of the critical variance.",
                Dial({"weights": tuple(_INITS), "activation": tuple(_GAINS)}, spectra),
                "Orthogonal matrices stretch nothing, so their product does not either: dynamical "
                "isometry. With tanh it nearly survives, for small inputs. With ReLU it cannot: half of "
                "the units are off at every layer, and the rank falls.",
                Code(_SPECTRUM.format(seed=sizes.seed, width=sizes.width), "The spectrum of one product"),
            ),
        ),
        sources(
            (
                "Hochreiter, Bengio, Frasconi, Schmidhuber, Gradient flow in recurrent nets, 2001",
                "https://www.bioinf.jku.at/publications/older/ch7.pdf",
            ),
            ("Schoenholz et al., Deep information propagation, 2017", "https://arxiv.org/abs/1611.01232"),
            (
                "Saxe, McClelland, Ganguli, Exact solutions to the nonlinear dynamics of learning in "
                "deep linear networks, 2014",
                "https://arxiv.org/abs/1312.6120",
            ),
            (
                "Pennington, Schoenholz, Ganguli, Resurrecting the sigmoid in deep learning through "
                "dynamical isometry, 2017",
                "https://arxiv.org/abs/1711.04735",
            ),
        ),
    )


_SPECTRUM = """from gradmend.atlas.jacobians import singular_values
from gradmend.atlas.sizes import Sizes

found = singular_values(Sizes(seed={seed}, width={width}), activation="tanh", init="orthogonal")
print({{depth: values[:3] for depth, values in found.items()}})"""
