"""Tailored activations: shaped for the depth, so that plain networks train without skips or normalization.

They keep length and gradient at every layer, and are so nearly linear that two samples with nothing in common
are still apart at the end, whatever the depth. All is for weights of variance 1/fan_in and biases of 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float64
from torch import Tensor

from gradmend.errors import SetupError
from gradmend.theory.meanfield import find_root
from gradmend.theory.quadrature import Activation, panels

_REACH = 9.0  # deviations of the Gaussian: the mass beyond is 2e-19
_SHIFTS = [0.25 * k for k in range(-16, 17)]  # where shifts are looked for
_TRIES = 8  # steps of half an octave in which the input scale is looked for
_SMALL = 1e-3  # an input scale at which every smooth activation is nearly linear


@dataclass(frozen=True)
class Tailoring:
    """The four constants of `output_scale * (phi(input_scale * x + input_shift) + output_shift)`."""

    input_scale: float
    input_shift: float
    output_scale: float
    output_shift: float


def leaky_slope(depth: int, cosine: float = 0.9) -> float:
    """The slope of the leaky ReLU under which `depth` layers bring orthogonal samples to this cosine.

    One layer maps the cosine c to [(1 - a)^2 J(c) + 2 a c] / (1 + a^2), with J(c) = (sqrt(1 - c^2) + (pi -
    arccos c) c) / pi; the weights need variance 2/(1 + a^2)/fan_in. 0, plain ReLU, where that is enough.

    Args:
        depth: layers with an activation, one after the other.
        cosine: of two orthogonal samples after the last, above 0 and below 1.

    Raises:
        SetupError: for another cosine, or a depth below 1.

    Examples:
        >>> round(leaky_slope(50), 6), round(leaky_slope(1000), 3)
        (0.430523, 0.844)

    Source: Zhang, Botev, Martens, Deep learning without shortcuts: shaping the kernel with tailored
    rectifiers, 2022, https://arxiv.org/abs/2203.08120
    """
    if depth < 1 or not 0 < cosine < 1:
        raise SetupError(f"A slope needs depth >= 1 and 0 < cosine < 1, not {depth} and {cosine}.")

    def excess(slope: float) -> float:
        return _leaky_cosine(slope, depth) - cosine

    return 0.0 if excess(0.0) <= 0 else find_root(excess, 0.0, 1.0)


def _leaky_cosine(slope: float, depth: int) -> float:
    c = 0.0
    for _ in range(depth):
        relu = (math.sqrt(max(0.0, 1 - c * c)) + (math.pi - math.acos(c)) * c) / math.pi
        c = min(1.0, ((1 - slope) ** 2 * relu + 2 * slope * c) / (1 + slope**2))
    return c


@lru_cache(maxsize=64)
def tailor(phi: Activation, depth: int, curvature: float = 0.3) -> Tailoring:
    """The constants that make a smooth activation f keep length, gradient and angles through `depth` layers.

    E f^2 = 1, E z f f' = 1 (lengths come back to 1 as fast as they leave it), E f'^2 = 1, and
    E f''^2 = curvature / depth: how fast angles close, over all layers together.

    Args:
        phi: twice differentiable, and not linear.
        depth: layers with an activation, one after the other.
        curvature: more is less linear.

    Raises:
        SetupError: if no such constants are found.

    Examples:
        >>> found = tailor(torch.tanh, depth=64, curvature=0.2)
        >>> round(found.input_scale, 3), round(found.input_shift, 3)
        (0.059, 0.522)

    Sources: Martens et al., Rapid training of deep neural networks without skip connections or normalization
    layers using deep kernel shaping, 2021, https://arxiv.org/abs/2110.01765; Zhang, Botev, Martens, 2022,
    https://arxiv.org/abs/2203.08120
    """
    if depth < 1 or not curvature > 0:
        raise SetupError(f"Tailoring needs depth >= 1 and curvature > 0, not {depth} and {curvature}.")
    found = [shape for sign in (1.0, -1.0) if (shape := _solve(phi, curvature / depth, sign))]
    if not found:
        name = getattr(phi, "__name__", repr(phi))
        raise SetupError(f"{name} cannot be tailored to {depth} layers. tanh, softplus, GELU and SiLU can.")
    return min(found, key=lambda shape: (round(abs(shape.input_shift), 9), -shape.input_shift))


class _Moments(NamedTuple):
    """Of phi(scale z + shift), z ~ N(0, 1), for several shifts; the slopes are those in z."""

    mean: Float64[Tensor, " shifts"]
    variance: Float64[Tensor, " shifts"]
    slope: Float64[Tensor, " shifts"]  # E phi'^2
    bend: Float64[Tensor, " shifts"]  # E phi''^2
    drift: Float64[Tensor, " shifts"]  # Cov(phi, phi'')
    lean: Float64[Tensor, " shifts"]  # E phi''


def _moments(phi: Activation, scale: float, shifts: Sequence[float]) -> _Moments:
    nodes, weights = _gaussian()
    value, slope, bend = _derivatives(phi, nodes, scale, shifts)
    mean = value @ weights
    centred = value - mean[:, None]
    averages = (x @ weights for x in (centred**2, slope**2, bend**2, centred * bend, bend))
    return _Moments(mean, *averages)


@lru_cache
def _gaussian() -> tuple[Float64[Tensor, " nodes"], Float64[Tensor, " nodes"]]:
    nodes, widths = panels(torch.linspace(-_REACH, _REACH, 13, dtype=torch.float64, device="cpu"))
    return nodes, widths * torch.exp(-0.5 * nodes * nodes) / math.sqrt(2 * math.pi)


def _derivatives(
    phi: Activation, nodes: Float64[Tensor, " nodes"], scale: float, shifts: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Value, slope and bend, [shifts, nodes] each."""
    with torch.inference_mode(False), torch.enable_grad():
        z = nodes.expand(len(shifts), -1).clone().requires_grad_()
        value = phi(scale * z + nodes.new_tensor(shifts)[:, None])
        (slope,) = torch.autograd.grad(value.sum(), z, create_graph=True)
        bend = torch.autograd.grad(slope.sum(), z)[0] if slope.requires_grad else torch.zeros_like(z)
    return value.detach(), slope.detach(), bend


def _solve(phi: Activation, bend: float, sign: float) -> Tailoring | None:
    """The constants for E f''^2 = bend; `sign` says which of the two output shifts is meant."""
    straight = _shift(phi, _SMALL, sign, 0.0)
    if straight is None:
        return None
    start = straight

    def excess(scale: float) -> float:
        shift = _shift(phi, scale, sign, start)
        if shift is None:
            return math.nan
        at = _moments(phi, scale, [shift])
        return float(at.bend / at.slope) / bend - 1

    guess = _SMALL / math.sqrt(excess(_SMALL) + 1)  # E f''^2 goes with the square of the scale
    at_guess = excess(guess)
    step = 2**-0.5 if at_guess > 0 else 2**0.5
    for _ in range(_TRIES):
        at_next = excess(guess * step)
        if at_guess * at_next <= 0:
            scale = find_root(excess, guess, guess * step)
            return _constants(phi, scale, _shift(phi, scale, sign, start), sign)
        guess, at_guess = guess * step, at_next
    return None


def _shift(phi: Activation, scale: float, sign: float, near: float) -> float | None:
    """The input shift nearest to another that gives E f f'' = 0, with the output shift for E f^2 = E f'^2."""

    def excess(shifts: Sequence[float]) -> list[float]:
        at = _moments(phi, scale, shifts)
        values: list[float] = ((at.drift + _offset(at, sign) * at.lean) / at.slope).tolist()
        return values

    values = excess(_SHIFTS)
    pairs = zip(pairwise(_SHIFTS), pairwise(values), strict=True)
    around = [(a, b) for (a, b), (low, high) in pairs if low * high < 0]
    if not around:
        return None
    left, right = min(around, key=lambda pair: abs(sum(pair) / 2 - near))
    return find_root(lambda shift: excess([shift])[0], left, right)


def _offset(at: _Moments, sign: float) -> Float64[Tensor, " shifts"]:
    """The mean of phi + output_shift, so that its second moment is that of the slope; nan without."""
    return sign * (at.slope - at.variance).sqrt()


def _constants(phi: Activation, scale: float, shift: float | None, sign: float) -> Tailoring | None:
    if shift is None:
        return None
    at = _moments(phi, scale, [shift])
    return Tailoring(scale, shift, float(at.slope.rsqrt()), float(_offset(at, sign) - at.mean))
