"""Mean-field theory of one layer, h' = W phi(h) + b, repeated without end: lengths, angles, gradients.

Everywhere `weight_variance` means fan_in x Var(W), which is 2 for He initialization at any width, and
`bias_variance` means Var(b). Sources: Poole et al., Exponential expressivity in deep neural networks through
transient chaos, 2016, https://arxiv.org/abs/1606.05340; Schoenholz, Gilmer, Ganguli, Sohl-Dickstein, Deep
information propagation, 2017, https://arxiv.org/abs/1611.01232.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from gradmend.theory.quadrature import (
    Activation,
    GaussianTable,
    Moments,
    require_cosine,
    require_nonnegative,
    tabulate,
)

_VANISHED = 1e-9  # a critical q below is 0
_NEUTRAL = 1e-10  # how far from 1 a growth factor may be and still count as 1
_SCALES = [math.exp(x / 4) for x in range(-110, 111)]  # q from 1e-12 to 1e12, 1 among them


@dataclass(frozen=True)
class DepthScales:
    """Over how many layers a disturbance changes e-fold: of length, of correlation, of the gradient."""

    length: float
    correlation: float
    gradient: float


@dataclass(frozen=True)
class Critical:
    """An initialization at the edge of chaos: gradients keep their norm at its fixed point q.

    Args:
        weight_variance: fan_in x Var(W).
        bias_variance: Var(b).
        q: the second moment of the pre-activations there.
        stable: whether lengths return to q. Where they do not, the criticality is lost with depth.
    """

    weight_variance: float
    bias_variance: float
    q: float
    stable: bool


def length_map(phi: Activation, q: float, weight_variance: float, bias_variance: float = 0.0) -> float:
    """The second moment of the pre-activations one layer on.

    q' = weight_variance x E phi(sqrt(q) z)^2 + bias_variance

    Args:
        phi: the activation.
        q: E h^2 of one pre-activation.
        weight_variance: fan_in x Var(W).
        bias_variance: Var(b).

    Example:
        >>> import torch
        >>> round(length_map(torch.relu, 3.0, weight_variance=2.0), 12)
        3.0

    Source: Poole et al., 2016, https://arxiv.org/abs/1606.05340
    """
    require_nonnegative(q=q, weight_variance=weight_variance, bias_variance=bias_variance)
    return weight_variance * tabulate(phi).moments(q).output + bias_variance


def length_slope(phi: Activation, q: float, weight_variance: float) -> float:
    """The slope of the length map: a fixed point with a slope below 1 attracts.

    dq'/dq = weight_variance x E[h phi(h) phi'(h)] / q, h ~ N(0, q): by Stein's lemma, right at kinks too.

    Args:
        phi: the activation.
        q: E h^2 of one pre-activation.
        weight_variance: fan_in x Var(W).

    Example:
        >>> import torch
        >>> round(length_slope(torch.selu, 1.0, weight_variance=1.0), 6)
        0.782648

    Source: Poole et al., 2016, https://arxiv.org/abs/1606.05340
    """
    require_nonnegative(q=q, weight_variance=weight_variance)
    return weight_variance * tabulate(phi).moments(q).length


def gradient_factor(phi: Activation, q: float, weight_variance: float) -> float:
    """The growth chi of the squared gradient norm through one layer, going backward.

    chi = weight_variance x E phi'(sqrt(q) z)^2

    Args:
        phi: the activation.
        q: E h^2 of one pre-activation.
        weight_variance: fan_in x Var(W).

    Example:
        >>> import torch
        >>> round(gradient_factor(torch.relu, 1.0, weight_variance=1 / 3), 6)  # the default of `nn.Linear`
        0.166667

    Source: Schoenholz et al., 2017, https://arxiv.org/abs/1611.01232
    """
    require_nonnegative(q=q, weight_variance=weight_variance)
    return weight_variance * tabulate(phi).moments(q).slope


def fixed_point(phi: Activation, weight_variance: float, bias_variance: float = 0.0) -> float:
    """Where the length map leads from q = 1: 0.0 below 1e-12, `math.inf` above 1e12.

    If every q is a fixed point, as for ReLU with weight variance 2, it is 1.

    Args:
        phi: the activation.
        weight_variance: fan_in x Var(W).
        bias_variance: Var(b).

    Example:
        >>> import torch
        >>> round(fixed_point(torch.tanh, 1.760955, bias_variance=0.05), 4)
        0.57

    Source: Poole et al., 2016, https://arxiv.org/abs/1606.05340
    """
    require_nonnegative(weight_variance=weight_variance, bias_variance=bias_variance)
    return _fixed_point(tabulate(phi), weight_variance, bias_variance)


def correlation_map(
    phi: Activation, c: float, q: float, weight_variance: float, bias_variance: float = 0.0
) -> float:
    """The cosine between the pre-activations of two samples one layer on.

    c' = (weight_variance x E[phi(u1) phi(u2)] + bias_variance) / q', where u1 and u2 have second moment q
    and cosine c. q' is that of the length map, so that the map is also right away from the fixed point.

    Args:
        phi: the activation.
        c: the (uncentred) cosine before, from -1 to 1.
        q: E h^2 of one pre-activation, the same for both samples.
        weight_variance: fan_in x Var(W).
        bias_variance: Var(b).

    Example:
        >>> import torch
        >>> round(correlation_map(torch.relu, 0.0, 1.0, weight_variance=2.0), 6)  # 1 / pi
        0.31831

    Source: Poole et al., 2016, https://arxiv.org/abs/1606.05340
    """
    require_nonnegative(q=q, weight_variance=weight_variance, bias_variance=bias_variance)
    require_cosine(c=c)
    return 1 - propagate(tabulate(phi), q, 1 - c, weight_variance, bias_variance)[1]


def correlation_slope(phi: Activation, c: float, q: float, weight_variance: float) -> float:
    """The slope of the correlation map at a fixed point q, and the growth of the gradients' inner product.

    chi_c = weight_variance x E[phi'(u1) phi'(u2)], where u1 and u2 have second moment q and cosine c

    Args:
        phi: the activation.
        c: the (uncentred) cosine, from -1 to 1.
        q: E h^2 of one pre-activation, the same for both samples.
        weight_variance: fan_in x Var(W).

    Example:
        >>> import torch
        >>> round(correlation_slope(torch.relu, 0.0, 1.0, weight_variance=2.0), 6)
        0.5

    Source: Schoenholz et al., 2017, https://arxiv.org/abs/1611.01232
    """
    require_nonnegative(q=q, weight_variance=weight_variance)
    require_cosine(c=c)
    return weight_variance * tabulate(phi).pair_slope(q, 1 - c)


def correlation_fixed_point(phi: Activation, weight_variance: float, bias_variance: float = 0.0) -> float:
    """The cosine to which any two samples come with depth: 1 in the ordered phase, less in the chaotic.

    Args:
        phi: the activation.
        weight_variance: fan_in x Var(W).
        bias_variance: Var(b).

    Example:
        >>> import torch
        >>> round(correlation_fixed_point(torch.tanh, 2.5, bias_variance=0.05), 4)
        0.4468

    Source: Poole et al., 2016, https://arxiv.org/abs/1606.05340
    """
    require_nonnegative(weight_variance=weight_variance, bias_variance=bias_variance)
    table = tabulate(phi)
    q = _fixed_point(table, weight_variance, bias_variance)
    return 1 - _gap_fixed_point(table, q, weight_variance, bias_variance)


def depth_scales(phi: Activation, weight_variance: float, bias_variance: float = 0.0) -> DepthScales:
    """Over how many layers lengths, correlations and gradients change e-fold near the fixed point.

    xi = 1 / |ln slope|, with the slopes of the length map at q*, of the correlation map at c* and of the
    gradient norm at q*. `math.inf` where a slope is 1.

    Args:
        phi: the activation.
        weight_variance: fan_in x Var(W).
        bias_variance: Var(b).

    Example:
        >>> import torch
        >>> round(depth_scales(torch.tanh, 1.5, bias_variance=0.05).correlation, 2)
        15.79

    Source: Schoenholz et al., 2017, https://arxiv.org/abs/1611.01232
    """
    require_nonnegative(weight_variance=weight_variance, bias_variance=bias_variance)
    table = tabulate(phi)
    q = _fixed_point(table, weight_variance, bias_variance)
    gap = _gap_fixed_point(table, q, weight_variance, bias_variance)
    moments = table.moments(q)
    pair_slope = table.pair_slope(q, gap) if gap else moments.slope
    slopes = (moments.length, pair_slope, moments.slope)
    return DepthScales(*(_e_folding(weight_variance * slope) for slope in slopes))


def trainable_depth(phi: Activation, weight_variance: float, bias_variance: float = 0.0) -> float:
    """How many layers can be trained, by the empirical rule of six correlation lengths: L < 6 xi_c.

    Args:
        phi: the activation.
        weight_variance: fan_in x Var(W).
        bias_variance: Var(b).

    Example:
        >>> import torch
        >>> round(trainable_depth(torch.tanh, 1.0, bias_variance=0.05))
        22

    Source: Schoenholz et al., 2017, https://arxiv.org/abs/1611.01232
    """
    return 6 * depth_scales(phi, weight_variance, bias_variance).correlation


def critical(phi: Activation, bias_variance: float = 0.0) -> Critical | None:
    """The initialization at the edge of chaos for this bias variance, or None if there is none.

    chi = 1 fixes the weight variance at every q, 1 / E phi'^2, and the fixed point then fixes the bias
    variance, q - E phi^2 / E phi'^2: the q where that is the one given. Of several, a stable one is
    preferred, then that closest to 1.

    Args:
        phi: the activation.
        bias_variance: Var(b).

    Example:
        >>> import torch
        >>> point = critical(torch.tanh, bias_variance=0.05)
        >>> round(point.weight_variance, 4), round(point.q, 4), point.stable
        (1.761, 0.57, True)

    Source: Schoenholz et al., 2017, https://arxiv.org/abs/1611.01232
    """
    require_nonnegative(bias_variance=bias_variance)
    table = tabulate(phi)

    def excess(q: float) -> float:
        _, output, slope, _ = table.moments(q)
        return q - output / slope - bias_variance if slope else math.nan

    points = [_critical_at(table, q, bias_variance) for q in _roots(excess)]
    return min(points, key=lambda p: (not p.stable, abs(math.log(p.q or _SCALES[0]))), default=None)


def propagate(
    table: GaussianTable | None, q: float, gap: float, weight_variance: float, bias_variance: float
) -> tuple[float, float, float]:
    """One layer: the next q, the next gap 1 - cosine, and E phi'^2; without a table phi is the identity.

    The gap keeps its digits where the cosine is all but 1. If the layer outputs only zeros, the gap is 0.
    """
    moments = table.moments(q) if table else Moments(0.0, q, 1.0, 1.0)
    spread = table.spread(q, gap) if table else q * gap
    length = weight_variance * moments.output + bias_variance
    return length, min(weight_variance * spread / length, 2.0) if length else 0.0, moments.slope


def _fixed_point(table: GaussianTable, weight_variance: float, bias_variance: float) -> float:
    def growth(q: float) -> float:
        return weight_variance * table.moments(q).output + bias_variance - q

    at_one = growth(1.0)
    if abs(at_one) < 1e-12:
        return 1.0
    way = [q for q in _SCALES if q >= 1] if at_one > 0 else [q for q in reversed(_SCALES) if q <= 1]
    for near, far in pairwise(way):
        if growth(far) * at_one <= 0:
            return _bisect(growth, near, far)
    return math.inf if at_one > 0 else 0.0


def _gap_fixed_point(table: GaussianTable, q: float, weight_variance: float, bias_variance: float) -> float:
    """1 - c*, by Newton's method from c = 0: the map is convex above 0, so no step goes too far."""
    q = min(max(q, _SCALES[0]), _SCALES[-1])
    moments = table.moments(q)
    if weight_variance * moments.slope <= 1 + _NEUTRAL:
        return 0.0
    ratio = weight_variance / (weight_variance * moments.output + bias_variance)
    gap = 1.0
    for _ in range(100):
        excess = gap - ratio * table.spread(q, gap)
        slack = 1 - ratio * q * table.pair_slope(q, gap)
        if abs(excess) < 1e-13 or slack < 1e-7 or gap < 1e-9:  # no slack: a linear phi, every c is fixed
            break
        gap -= excess / slack
    return gap if gap > 1e-9 else 0.0


def _critical_at(table: GaussianTable, q: float, bias_variance: float) -> Critical:
    if q < _VANISHED:
        q = 0.0
    near = table.moments(max(q, 1e-6))  # at 0 every length map is neutral: look just above
    stable = near.length <= (1 + _NEUTRAL) * near.slope
    return Critical(1 / table.moments(q).slope, bias_variance, q, stable)


def _roots(excess: Callable[[float], float]) -> list[float]:
    """Where the excess changes sign; for one that is 0 over a whole range, 1 or the end of the range at 0."""
    values = {q: excess(q) for q in _SCALES}
    flat = {q for q, value in values.items() if abs(value) < 1e-11 * q}
    roots = [q for q in (1.0, _SCALES[0]) if q in flat]
    for near, far in pairwise(_SCALES):
        if values[near] * values[far] < 0 and not {near, far} & flat:
            roots.append(_bisect(excess, near, far))
    return roots


def _bisect(function: Callable[[float], float], a: float, b: float) -> float:
    rising = function(b) > 0
    for _ in range(52):
        middle = (a + b) / 2
        a, b = (a, middle) if (function(middle) > 0) == rising else (middle, b)
    return (a + b) / 2


def _e_folding(slope: float) -> float:
    if slope <= 0:
        return 0.0
    rate = abs(math.log(slope))
    return 1 / rate if rate > _NEUTRAL else math.inf
