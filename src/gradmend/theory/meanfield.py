"""Mean-field theory of one layer, h' = W phi(h) + b, repeated without end: lengths, angles, gradients.

Everywhere `weight_variance` means fan_in x Var(W), which is 2 for He initialization at any width, and
`bias_variance` means Var(b). `keep` is for dropout after the activation: lengths and gradients see
weight_variance / keep, but two samples, whose masks differ, have only weight_variance in common, so that
their cosine falls short of 1 at any depth.

Sources: Poole et al., Exponential expressivity in deep neural networks through transient chaos, 2016,
https://arxiv.org/abs/1606.05340; Schoenholz, Gilmer, Ganguli, Sohl-Dickstein, Deep information propagation,
2017, https://arxiv.org/abs/1611.01232.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from gradmend.errors import SetupError
from gradmend.theory.quadrature import (
    Activation,
    GaussianTable,
    Moments,
    require_cosine,
    require_nonnegative,
    require_share,
    tabulate,
)

NEUTRAL = 1e-10  # how far from 1 a growth factor may be and still count as 1
SCALES = [math.exp(x / 4) for x in range(-110, 111)]  # q from 1e-12 to 1e12, 1 among them

_TOLD_APART = 1e-9  # a gap 1 - cosine* below is 0
_BLURRED = 1e-7  # what the quadrature of pairs cannot tell from 0


@dataclass(frozen=True)
class DepthScales:
    """Over how many layers a disturbance changes e-fold: of length, of correlation, of the gradient."""

    length: float
    correlation: float
    gradient: float


def length_map(
    phi: Activation, q: float, weight_variance: float, bias_variance: float = 0.0, keep: float = 1.0
) -> float:
    """The second moment of the pre-activations one layer on.

    q' = weight_variance / keep x E phi(sqrt(q) z)^2 + bias_variance

    Args:
        phi: the activation.
        q: E h^2 of one pre-activation.
        weight_variance: fan_in x Var(W).
        bias_variance: Var(b).
        keep: how likely dropout after the activation keeps a unit.

    Examples:
        >>> import torch
        >>> round(length_map(torch.relu, 3.0, weight_variance=2.0), 12)
        3.0

    Source: Poole et al., 2016, https://arxiv.org/abs/1606.05340
    """
    require_nonnegative(q=q, weight_variance=weight_variance, bias_variance=bias_variance)
    require_share(keep=keep)
    return weight_variance / keep * tabulate(phi).moments(q).output + bias_variance


def length_slope(phi: Activation, q: float, weight_variance: float, keep: float = 1.0) -> float:
    """The slope of the length map: a fixed point with a slope below 1 attracts.

    dq'/dq = weight_variance / keep x E[h phi(h) phi'(h)] / q, h ~ N(0, q): by Stein's lemma, right at
    kinks too. Where phi jumps, E[phi(h)^2 (h^2 / q - 1)] / 2q stands in for that expectation.

    Args:
        phi: the activation.
        q: E h^2 of one pre-activation.
        weight_variance: fan_in x Var(W).
        keep: how likely dropout after the activation keeps a unit.

    Examples:
        >>> import torch
        >>> round(length_slope(torch.selu, 1.0, weight_variance=1.0), 6)
        0.782648

    Source: Poole et al., 2016, https://arxiv.org/abs/1606.05340
    """
    require_nonnegative(q=q, weight_variance=weight_variance)
    require_share(keep=keep)
    return weight_variance / keep * tabulate(phi).moments(q).length


def gradient_factor(phi: Activation, q: float, weight_variance: float, keep: float = 1.0) -> float:
    """The growth chi of the squared gradient norm through one layer, going backward.

    chi = weight_variance / keep x E phi'(sqrt(q) z)^2

    Args:
        phi: the activation.
        q: E h^2 of one pre-activation.
        weight_variance: fan_in x Var(W).
        keep: how likely dropout after the activation keeps a unit.

    Examples:
        >>> import torch
        >>> round(gradient_factor(torch.relu, 1.0, weight_variance=1 / 3), 6)  # the default of `nn.Linear`
        0.166667

    Source: Schoenholz et al., 2017, https://arxiv.org/abs/1611.01232
    """
    require_nonnegative(q=q, weight_variance=weight_variance)
    require_share(keep=keep)
    return weight_variance / keep * tabulate(phi).moments(q).slope


def fixed_point(
    phi: Activation, weight_variance: float, bias_variance: float = 0.0, keep: float = 1.0
) -> float:
    """Where the length map leads from q = 1: 0.0 below 1e-12, `math.inf` above 1e12.

    If every q is a fixed point, as for ReLU with weight variance 2, it is 1.

    Args:
        phi: the activation.
        weight_variance: fan_in x Var(W).
        bias_variance: Var(b).
        keep: how likely dropout after the activation keeps a unit.

    Examples:
        >>> import torch
        >>> round(fixed_point(torch.tanh, 1.760955, bias_variance=0.05), 4)
        0.57

    Source: Poole et al., 2016, https://arxiv.org/abs/1606.05340
    """
    require_nonnegative(weight_variance=weight_variance, bias_variance=bias_variance)
    require_share(keep=keep)
    return steady_length(read(phi).moments, weight_variance / keep, bias_variance)


def correlation_map(
    phi: Activation,
    c: float,
    q: float,
    weight_variance: float,
    bias_variance: float = 0.0,
    keep: float = 1.0,
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
        keep: how likely dropout after the activation keeps a unit.

    Examples:
        >>> import torch
        >>> round(correlation_map(torch.relu, 0.0, 1.0, weight_variance=2.0), 6)  # 1 / pi
        0.31831

    Source: Poole et al., 2016, https://arxiv.org/abs/1606.05340
    """
    require_nonnegative(q=q, weight_variance=weight_variance, bias_variance=bias_variance)
    require_cosine(c=c)
    require_share(keep=keep)
    return 1 - propagate(tabulate(phi), q, 1 - c, weight_variance, bias_variance, keep)[1]


def correlation_slope(phi: Activation, c: float, q: float, weight_variance: float) -> float:
    """The slope of the correlation map at a fixed point q, and the growth of the gradients' inner product.

    chi_c = weight_variance x E[phi'(u1) phi'(u2)], where u1 and u2 have second moment q and cosine c, with
    dropout or without. Of an activation that jumps it is the growth only, for gradients do not see jumps.

    Args:
        phi: the activation.
        c: the (uncentred) cosine, from -1 to 1.
        q: E h^2 of one pre-activation, the same for both samples.
        weight_variance: fan_in x Var(W).

    Examples:
        >>> import torch
        >>> round(correlation_slope(torch.relu, 0.0, 1.0, weight_variance=2.0), 6)
        0.5

    Source: Schoenholz et al., 2017, https://arxiv.org/abs/1611.01232
    """
    require_nonnegative(q=q, weight_variance=weight_variance)
    require_cosine(c=c)
    return weight_variance * tabulate(phi).pair_slope(q, 1 - c)


def correlation_fixed_point(
    phi: Activation, weight_variance: float, bias_variance: float = 0.0, keep: float = 1.0
) -> float:
    """The cosine to which any two samples come with depth: 1 in the ordered phase, less in the chaotic.

    Args:
        phi: the activation.
        weight_variance: fan_in x Var(W).
        bias_variance: Var(b).
        keep: how likely dropout after the activation keeps a unit.

    Examples:
        >>> import torch
        >>> round(correlation_fixed_point(torch.tanh, 2.5, bias_variance=0.05), 4)
        0.4468

    Source: Poole et al., 2016, https://arxiv.org/abs/1606.05340
    """
    require_nonnegative(weight_variance=weight_variance, bias_variance=bias_variance)
    require_share(keep=keep)
    table = read(phi)
    q = steady_length(table.moments, weight_variance / keep, bias_variance)
    return 1 - steady_gap(table, q, weight_variance, bias_variance, keep)


def depth_scales(
    phi: Activation, weight_variance: float, bias_variance: float = 0.0, keep: float = 1.0
) -> DepthScales:
    """Over how many layers lengths, correlations and gradients change e-fold near the fixed point.

    xi = 1 / |ln slope|, with the slopes of the length map at q*, of the correlation map at c* and of the
    gradient norm at q*. `math.inf` where a slope is 1.

    Args:
        phi: the activation.
        weight_variance: fan_in x Var(W).
        bias_variance: Var(b).
        keep: how likely dropout after the activation keeps a unit.

    Examples:
        >>> import torch
        >>> round(depth_scales(torch.tanh, 1.5, bias_variance=0.05).correlation, 2)
        15.79

    Source: Schoenholz et al., 2017, https://arxiv.org/abs/1611.01232
    """
    require_nonnegative(weight_variance=weight_variance, bias_variance=bias_variance)
    require_share(keep=keep)
    table = read(phi)
    q = steady_length(table.moments, weight_variance / keep, bias_variance)
    gap = steady_gap(table, q, weight_variance, bias_variance, keep)
    moments = table.moments(q)
    return DepthScales(
        length=e_folding(weight_variance / keep * moments.length),
        correlation=correlation_length(table, q, gap, weight_variance),
        gradient=e_folding(weight_variance / keep * moments.slope),
    )


def trainable_depth(
    phi: Activation, weight_variance: float, bias_variance: float = 0.0, keep: float = 1.0
) -> float:
    """How many layers can be trained, by the empirical rule of six correlation lengths: L < 6 xi_c.

    `batch_norm_depth` is the rule with batch normalization.

    Args:
        phi: the activation.
        weight_variance: fan_in x Var(W).
        bias_variance: Var(b).
        keep: how likely dropout after the activation keeps a unit.

    Examples:
        >>> import torch
        >>> round(trainable_depth(torch.tanh, 1.0, bias_variance=0.05))
        22

    Source: Schoenholz et al., 2017, https://arxiv.org/abs/1611.01232
    """
    return 6 * depth_scales(phi, weight_variance, bias_variance, keep).correlation


def propagate(
    table: GaussianTable | None,
    q: float,
    gap: float,
    weight_variance: float,
    bias_variance: float,
    keep: float = 1.0,
) -> tuple[float, float, float]:
    """One layer: the next q, the next gap 1 - cosine, and E phi'^2; without a table phi is the identity.

    The gap keeps its digits where the cosine is all but 1. If the layer outputs only zeros, the gap is 0.
    """
    moments = table.moments(q) if table else Moments(0.0, q, 1.0, 1.0, q, q)
    spread = (table.spread(q, gap) if table else q * gap) + (1 / keep - 1) * moments.output
    length = weight_variance / keep * moments.output + bias_variance
    return length, min(weight_variance * spread / length, 2.0) if length else 0.0, moments.slope


def read(phi: Activation) -> GaussianTable:
    """The table of an activation, or `SetupError` if it is no number somewhere."""
    table = tabulate(phi)
    output = table.moments(1.0).output
    if not math.isfinite(output):
        name = getattr(phi, "__name__", repr(phi))
        raise SetupError(f"Fixed points need an activation with a finite E phi(z)^2: {name} has {output}.")
    return table


def steady_length(moments: Callable[[float], Moments], weight_variance: float, bias_variance: float) -> float:
    """The fixed point of the length map to which it leads from q = 1, 0.0 or `math.inf`."""

    def growth(q: float) -> float:
        return weight_variance * moments(q).output + bias_variance - q

    at_one = growth(1.0)
    if abs(at_one) < 1e-12:
        return 1.0
    way = [q for q in SCALES if q >= 1] if at_one > 0 else [q for q in reversed(SCALES) if q <= 1]
    for near, far in pairwise(way):
        if growth(far) * at_one <= 0:
            return find_root(growth, near, far)
    return math.inf if at_one > 0 else 0.0


def steady_gap(
    table: GaussianTable, q: float, weight_variance: float, bias_variance: float, keep: float = 1.0
) -> float:
    """1 - c* at the fixed point q: where one layer maps a gap to itself, for smaller ones it makes larger."""
    q = min(max(q, SCALES[0]), SCALES[-1])
    moments = table.moments(q)
    length = weight_variance / keep * moments.output + bias_variance
    ordered = keep == 1 and not table.jumps and weight_variance * moments.slope <= 1 + NEUTRAL
    if ordered or not length:
        return 0.0

    dropped = (1 / keep - 1) * moments.output

    @cache
    def shrinkage(gap: float) -> float:
        return 1 - weight_variance * (table.spread(q, gap) + dropped) / (length * gap)

    if shrinkage(1.0) < _BLURRED:  # also where phi is linear, and every gap is fixed
        return 1.0
    least = max(0.999 * weight_variance * dropped / length, _TOLD_APART)  # what dropout alone tells apart
    return find_root(shrinkage, least, 1.0, _BLURRED / 100) if shrinkage(least) < 0 else 0.0


def correlation_length(table: GaussianTable, q: float, gap: float, weight_variance: float) -> float:
    """Over how many layers the gap of two samples comes e-fold nearer to its fixed point."""
    slope = table.spread_slope(q, gap) if gap else table.moments(q).slope
    return e_folding(weight_variance * slope)


def find_root(function: Callable[[float], float], a: float, b: float, tolerance: float = 1e-12) -> float:
    """Where a function that changes sign between a and b is 0, to a relative tolerance.

    Source: Anderson, Bjoerck, A new high order method of regula falsi type for computing a root of an
    equation, 1973, https://doi.org/10.1007/BF01951936
    """
    at_a, at_b = function(a), function(b)
    for _ in range(200):
        if not at_b or abs(b - a) <= tolerance * abs(b):
            break
        step = at_b * (b - a) / (at_b - at_a)
        c = b - math.copysign(max(abs(step), tolerance * abs(b) / 2), step)  # so that the far end comes too
        at_c = function(c)
        if at_c * at_b < 0:
            a, at_a = b, at_b
        else:  # the far end stays: weigh it less
            at_a *= 1 - at_c / at_b if abs(at_c) < abs(at_b) else 0.5
        b, at_b = c, at_c
    return b


def e_folding(slope: float) -> float:
    """Over how many layers what grows or shrinks by this factor per layer does so e-fold."""
    if slope <= 0:
        return 0.0
    rate = abs(math.log(slope))
    return math.inf if rate <= NEUTRAL else 1 / rate
