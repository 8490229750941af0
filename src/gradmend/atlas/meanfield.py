"""What mean-field theory expects of a plain network, layer by layer, before it is measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from gradmend.theory import Activation, tabulate
from gradmend.theory.meanfield import propagate
from gradmend.theory.quadrature import GaussianTable

_WHOLE = 1e300  # lengths beyond are all alike


@dataclass(frozen=True, eq=False)
class Course:
    """A signal on its way down, and the gradient on its way back.

    Args:
        lengths: second moments of the pre-activations.
        cosines: between those of two samples; 1 if the two began as one.
        gradients: norms of the gradient at the pre-activations over that at the last ones.
    """

    lengths: Float64[np.ndarray, " layers"]
    cosines: Float64[np.ndarray, " layers"]
    gradients: Float64[np.ndarray, " layers"]


def course(
    phi: Activation,
    depth: int,
    weight_variance: float,
    bias_variance: float = 0.0,
    square: float = 1.0,
    cosine: float = 1.0,
) -> Course:
    """What becomes of two samples in a plain network of infinite width.

    Args:
        phi: the activation.
        depth: hidden layers.
        weight_variance: fan_in x Var(W).
        bias_variance: Var(b).
        square: mean square of the input's values.
        cosine: between the two samples.

    Examples:
        >>> import torch
        >>> course(torch.relu, 3, weight_variance=2.0).gradients.round(6).tolist()
        [1.0, 1.0, 1.0]

    Source: Poole et al., 2016, https://arxiv.org/abs/1606.05340; Schoenholz et al., 2017,
    https://arxiv.org/abs/1611.01232
    """
    table = tabulate(phi)
    q = weight_variance * square + bias_variance
    gap = weight_variance * square * (1 - cosine) / q if q else 0.0
    lengths, gaps, factors = [], [], []
    for _ in range(depth):
        lengths.append(q)
        gaps.append(gap)
        q, gap, slope = _layer(table, min(q, _WHOLE), gap, weight_variance, bias_variance)
        factors.append(weight_variance * slope)
    return Course(np.array(lengths), 1 - np.array(gaps), _norms(factors))


def _layer(
    table: GaussianTable, q: float, gap: float, weight_variance: float, bias_variance: float
) -> tuple[float, float, float]:
    """As `propagate`, without the cosine where the two samples are one, which takes no time then."""
    if gap:
        return propagate(table, q, gap, weight_variance, bias_variance)
    moments = table.moments(q)
    return weight_variance * moments.output + bias_variance, 0.0, moments.slope


def _norms(factors: list[float]) -> Float64[np.ndarray, " layers"]:
    """Of the gradient at each layer over that at the last one, from the factors of the layers."""
    logs = [0.5 * math.log(factor) if factor > 0 else -math.inf for factor in factors[:-1]]
    return np.asarray(np.exp(np.cumsum([0.0, *reversed(logs)])[::-1]))
