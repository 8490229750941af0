"""Finite width: how far one network strays from what theory says of infinitely wide ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from gradmend.errors import SetupError
from gradmend.theory.quadrature import SMALLEST, Activation, tabulate


class Layer(NamedTuple):
    """One hidden layer of a network.

    Args:
        phi: the activation.
        q: the second moment of the pre-activations.
        units: how many there are.
    """

    phi: Activation
    q: float
    units: int


def finite_width_mean(depth: int, width: int) -> float:
    """How far ln(|d_1|^2 / |d_L|^2) lies from the mean-field prediction, on average over networks.

    -5 depth / (2 width), for ReLU layers with Gaussian weights at critical variance.

    Args:
        depth: how many layers.
        width: units per layer.

    Examples:
        >>> round(finite_width_mean(100, 256), 4)
        -0.9766

    Source: Hanin, Nica, Products of many large random matrices and gradients in deep neural networks, 2018,
    https://arxiv.org/abs/1812.05994
    """
    return -(finite_width_deviation(depth, width) ** 2) / 2


def finite_width_deviation(depth: int, width: int) -> float:
    """How far one network's ln(|d_1|^2 / |d_L|^2) strays from its mean over networks, as a deviation.

    sqrt(5 depth / width), for ReLU layers with Gaussian weights at critical variance.

    Args:
        depth: how many layers.
        width: units per layer.

    Examples:
        >>> round(finite_width_deviation(100, 256), 4)
        1.3975

    Source: Hanin, Nica, Products of many large random matrices and gradients in deep neural networks, 2018,
    https://arxiv.org/abs/1812.05994
    """
    if depth < 0 or width < 1:
        raise SetupError(f"`depth` counts layers and `width` units: not {depth} and {width}.")
    return math.sqrt(5 * depth / width)


def gradient_deviation(layers: Sequence[Layer], *, measured: bool = False) -> float:
    """How far one network's ln(|d_1|^2 / |d_L|^2) strays from its mean over networks, as a deviation.

    For one sample, Gaussian weights, no biases. A layer's units are so many draws: their mean phi^2 is off,
    and with it the lengths of all layers that follow; so is that of (g phi')^2, g the gradient behind phi.
    With a = d ln q_l+1 / d ln q_l, s_l = d ln |d_1|^2 / d ln q_l+1 and b = d ln E phi'^2 / d ln q_l,

    variance = sum Var(s_l phi^2 / E phi^2 + (g phi')^2 / E phi'^2) / units,  s_l-1 = a s_l + b.

    Where lengths repel (a > 1) s grows like a product of a: there lengths decide, and they are chance. It is
    the first order only: random networks of GELU and SiLU with He weights stray a tenth more over ten layers,
    a quarter more over fifty, with far outliers.

    Args:
        layers: the hidden ones, from the first to the last.
        measured: whether the lengths q of the network itself are known, so that they stray no more.

    Examples:
        >>> import torch
        >>> relu = [Layer(torch.relu, 1.0, units=256)] * 100
        >>> round(gradient_deviation(relu), 4) == round(finite_width_deviation(100, 256), 4)
        True

    Source: derived here; Hanin, Nica, 2018, https://arxiv.org/abs/1812.05994 has the case of ReLU.
    """
    tables = {phi: tabulate(phi) for phi in {layer.phi for layer in layers}}
    variance = lean = 0.0
    for layer in reversed(layers):
        table = tables[layer.phi]
        scatter, moments = table.scatter(layer.q), table.moments(layer.q)
        lean = 0.0 if measured else lean
        strays = lean**2 * scatter.output + 2 * lean * scatter.both + scatter.slope
        variance += strays / layer.units
        lean = lean * layer.q * moments.length / max(moments.output, SMALLEST) + scatter.bend
    return math.sqrt(variance)
