"""The plane of initializations: where gradients keep their norm, and the phases on both sides of that line.

Of a plain recurrent network this is the plane too, with what enters at each step for bias variance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from gradmend.theory.meanfield import (
    NEUTRAL,
    SCALES,
    correlation_length,
    find_root,
    read,
    steady_gap,
    steady_length,
)
from gradmend.theory.quadrature import Activation, Moments, require_nonnegative

_VANISHED = 1e-9  # a critical q below is 0


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


@dataclass(frozen=True, eq=False)
class PhaseDiagram:
    """What becomes of signals far down, over a grid of initializations: one row per bias variance.

    Args:
        weight_variances: the columns, fan_in x Var(W).
        bias_variances: the rows, Var(b).
        q: the second moment of the pre-activations at the fixed point, 0 and `inf` included.
        chi: the growth per layer of the squared gradient norm there.
        cosine: that to which any two samples come.
        correlation: over how many layers their cosine comes e-fold nearer to it.
        critical: of each row, the weight variance where chi is 1 at a stable fixed point, or `nan`.
    """

    weight_variances: tuple[float, ...]
    bias_variances: tuple[float, ...]
    q: Float64[Tensor, "biases weights"]
    chi: Float64[Tensor, "biases weights"]
    cosine: Float64[Tensor, "biases weights"]
    correlation: Float64[Tensor, "biases weights"]
    critical: Float64[Tensor, " biases"]

    @property
    def chaotic(self) -> Bool[Tensor, "biases weights"]:
        """Where gradients explode. Elsewhere the phase is ordered, and they vanish, or critical."""
        return self.chi > 1 + NEUTRAL


def phase_diagram(
    phi: Activation, weight_variances: Sequence[float], bias_variances: Sequence[float]
) -> PhaseDiagram:
    """The ordered and the chaotic phase of an activation and the critical line between them.

    Args:
        phi: the activation.
        weight_variances: values of fan_in x Var(W).
        bias_variances: values of Var(b).

    Examples:
        >>> diagram = phase_diagram(torch.tanh, [1.0, 2.0, 3.0], [0.05])
        >>> diagram.chaotic.tolist(), round(float(diagram.critical), 3)
        ([[False, True, True]], 1.761)

    Source: Poole et al., 2016, https://arxiv.org/abs/1606.05340
    """
    for weight_variance in weight_variances:
        require_nonnegative(weight_variance=weight_variance)
    for bias_variance in bias_variances:
        require_nonnegative(bias_variance=bias_variance)
    table = read(phi)
    moments = lru_cache(maxsize=None)(table.moments)  # one scan for a fixed point serves all

    def point(weight_variance: float, bias_variance: float) -> tuple[float, float, float, float]:
        q = steady_length(moments, weight_variance, bias_variance)
        gap = steady_gap(table, q, weight_variance, bias_variance)
        chi = weight_variance * moments(q).slope
        return q, chi, 1 - gap, correlation_length(table, q, gap, weight_variance)

    def line(bias_variance: float) -> float:
        found = _critical(moments, bias_variance)
        return found.weight_variance if found and found.stable else math.nan

    grid = _tensor([point(w, b) for b in bias_variances for w in weight_variances])
    q, chi, cosine, correlation = grid.reshape(len(bias_variances), len(weight_variances), 4).unbind(-1)
    critical_line = _tensor([line(b) for b in bias_variances])
    return PhaseDiagram(
        tuple(weight_variances), tuple(bias_variances), q, chi, cosine, correlation, critical_line
    )


def critical(phi: Activation, bias_variance: float = 0.0) -> Critical | None:
    """The initialization at the edge of chaos for this bias variance, or None if there is none.

    chi = 1 fixes the weight variance at every q, 1 / E phi'^2, and the fixed point then fixes the bias
    variance, q - E phi^2 / E phi'^2: the q where that is the one given. Of several, a stable one is
    preferred, then that closest to 1.

    Args:
        phi: the activation.
        bias_variance: Var(b).

    Examples:
        >>> import torch
        >>> point = critical(torch.tanh, bias_variance=0.05)
        >>> round(point.weight_variance, 4), round(point.q, 4), point.stable
        (1.761, 0.57, True)

    Source: Schoenholz et al., 2017, https://arxiv.org/abs/1611.01232
    """
    require_nonnegative(bias_variance=bias_variance)
    return _critical(read(phi).moments, bias_variance)


def _critical(moments: Callable[[float], Moments], bias_variance: float) -> Critical | None:
    def excess(q: float) -> float:
        at = moments(q)
        return q - at.output / at.slope - bias_variance if at.slope else math.nan

    points = [_critical_at(moments, q, bias_variance) for q in _roots(excess)]
    return min(points, key=lambda p: (not p.stable, abs(math.log(p.q or SCALES[0]))), default=None)


def _critical_at(moments: Callable[[float], Moments], q: float, bias_variance: float) -> Critical:
    if q < _VANISHED:
        q = 0.0
    near = moments(max(q, 1e-6))  # at 0 every length map is neutral: look just above
    stable = near.length <= (1 + NEUTRAL) * near.slope
    return Critical(1 / moments(q).slope, bias_variance, q, stable)


def _roots(excess: Callable[[float], float]) -> list[float]:
    """Where the excess changes sign; for one that is 0 over a whole range, 1 or the end of the range at 0."""
    values = {q: excess(q) for q in SCALES}
    flat = {q for q, value in values.items() if abs(value) < 1e-11 * q}
    roots = [q for q in (1.0, SCALES[0]) if q in flat]
    for near, far in pairwise(SCALES):
        if values[near] * values[far] < 0 and not {near, far} & flat:
            roots.append(find_root(excess, near, far))
    return roots


def _tensor(values: Sequence[float] | Sequence[tuple[float, ...]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")
