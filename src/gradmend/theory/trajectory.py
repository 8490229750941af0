"""What mean-field theory predicts for a whole stack of layers, each with its own variances."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from gradmend.errors import SetupError
from gradmend.theory.meanfield import propagate
from gradmend.theory.quadrature import (
    LARGEST,
    SMALLEST,
    Activation,
    require_cosine,
    require_nonnegative,
    tabulate,
)


@dataclass(frozen=True)
class Layer:
    """One linear map and the activation after it.

    Args:
        phi: the activation, or None.
        weight_variance: fan_in x Var(W).
        bias_variance: Var(b).
    """

    phi: Activation | None
    weight_variance: float
    bias_variance: float = 0.0

    def __post_init__(self) -> None:
        require_nonnegative(weight_variance=self.weight_variance, bias_variance=self.bias_variance)


@dataclass(frozen=True)
class Prediction:
    """One number per layer, the first layer first.

    Args:
        q: the second moment of one pre-activation, held between 1e-290 and 1e290.
        cosine: the uncentred cosine between the pre-activations of two samples.
        log_gradient: ln(|d_l|^2 / |d_L|^2), d_l the gradient with respect to the whole pre-activation l.
    """

    q: tuple[float, ...]
    cosine: tuple[float, ...]
    log_gradient: tuple[float, ...]


def predict(layers: Sequence[Layer], q0: float, c0: float) -> Prediction:
    """Follow lengths and angles forward and gradients backward through a stack of layers.

    q_1 = weight_variance q0 + bias_variance, then the length map and the correlation map layer by layer;
    ln |d_l|^2 is the sum of ln chi over the layers after l, each at its own q.

    Args:
        layers: in order of execution. Widths do not matter, as long as they are large.
        q0: the mean square of one input value.
        c0: the (uncentred) cosine between two inputs.

    Example:
        >>> import torch
        >>> he = predict([Layer(torch.relu, 2.0)] * 50, q0=0.5, c0=0.0)
        >>> round(he.q[-1], 6), round(he.cosine[-1], 3), round(he.log_gradient[0], 6)
        (1.0, 0.987, 0.0)

    Source: Schoenholz et al., Deep information propagation, 2017, https://arxiv.org/abs/1611.01232
    """
    require_nonnegative(q0=q0)
    require_cosine(c0=c0)
    if not layers:
        raise SetupError("A prediction needs one layer at least. Give `[Layer(torch.relu, 2.0)]`.")
    activations = {id(layer.phi): layer.phi for layer in layers if layer.phi is not None}
    tables = {key: tabulate(phi) for key, phi in activations.items()}
    before = [None, *(tables.get(id(layer.phi)) for layer in layers[:-1])]
    q, gap = q0, 1 - c0
    lengths, cosines, log_factors = [], [], []
    for table, layer in zip(before, layers, strict=True):
        q, gap, slope = propagate(table, q, gap, layer.weight_variance, layer.bias_variance)
        q = min(max(q, SMALLEST), LARGEST)
        lengths.append(q)
        cosines.append(1 - gap)
        log_factors.append(_log(layer.weight_variance) + _log(slope))
    log_gradient = accumulate(reversed(log_factors[1:]), initial=0.0)
    return Prediction(tuple(lengths), tuple(cosines), tuple(log_gradient)[::-1])


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf
