"""Expectations under Gaussian pre-activations, exact at kinks and deep in saturation.

Gauss-Hermite rules fail here: their nodes straddle kinks and miss what a saturated unit does near 0. A
composite Gauss-Legendre rule whose panels shrink toward 0 by halves, and end at every kink, does neither.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor, nn

from gradmend.errors import SetupError

Activation: TypeAlias = Callable[[Tensor], Tensor]
"""Any elementwise function of a tensor: `torch.tanh`, `nn.GELU()`, a lambda."""

SMALLEST, LARGEST = 1e-290, 1e290
"""Expectations are computed for second moments between these; beyond, the nearer one stands in."""

_REACH = 12.0  # standard deviations: the Gaussian mass beyond is 4e-33
_OCTAVES = 500  # nodes reach from 2**-500 to 2**500, the square roots of the float64 range
_PAIR_REACH = 9.0  # radii of two: the mass beyond is 3e-18
_PAIR_NODES = 10  # per panel, enough for about eight digits
_FINEST = 2.0**-54  # the interval around 0 that may be left out, in units of min(1, sqrt(q))


def expectation(f: Activation, q: float) -> float:
    """The mean of a function over one Gaussian pre-activation.

    E f(sqrt(q) z), z ~ N(0, 1)

    Args:
        f: an elementwise function, with any kinks or jumps.
        q: the second moment of the pre-activation.

    Examples:
        >>> round(expectation(torch.relu, 1.0), 6)  # 1 / sqrt(2 pi)
        0.398942
    """
    require_nonnegative(q=q)
    return tabulate(f).moments(q).mean


def output_moment(phi: Activation, q: float) -> float:
    """The second moment of an activation's output.

    E phi(sqrt(q) z)^2, z ~ N(0, 1)

    Args:
        phi: the activation.
        q: the second moment of the pre-activation.

    Examples:
        >>> round(output_moment(torch.tanh, 1.0), 6)
        0.394294
    """
    require_nonnegative(q=q)
    return tabulate(phi).moments(q).output


def slope_moment(phi: Activation, q: float) -> float:
    """The second moment of an activation's slope, by which it shrinks or grows a squared gradient.

    E phi'(sqrt(q) z)^2, z ~ N(0, 1)

    Args:
        phi: the activation.
        q: the second moment of the pre-activation; 0 is the limit from above.

    Examples:
        >>> round(slope_moment(torch.tanh, 1.0), 6)
        0.464403
    """
    require_nonnegative(q=q)
    return tabulate(phi).moments(q).slope


def require_nonnegative(**values: float) -> None:
    """Raise `SetupError` unless every value is 0 or more."""
    for name, value in values.items():
        if not value >= 0:
            raise SetupError(f"`{name}` must be 0 or more, not {value}.")


def require_cosine(**values: float) -> None:
    """Raise `SetupError` unless every value lies between -1 and 1."""
    for name, value in values.items():
        if not -1 <= value <= 1:
            raise SetupError(f"`{name}` is a cosine, from -1 to 1, not {value}.")


def require_share(**values: float) -> None:
    """Raise `SetupError` unless every value is above 0, and 1 at most."""
    for name, value in values.items():
        if not 0 < value <= 1:
            raise SetupError(f"`{name}` is a share above 0, 1 at most, not {value}.")


class Moments(NamedTuple):
    """Of a pre-activation h ~ N(0, q): E phi(h), E phi(h)^2, E phi'(h)^2, and the slope of E phi^2 in q.

    `along` is E (phi phi')^2 and `steepness` E (h phi')^2: what a gradient along phi, or h, makes of them.
    """

    mean: float
    output: float
    slope: float
    length: float
    along: float
    steepness: float


class Scatter(NamedTuple):
    """How one unit strays from the mean of all, h ~ N(0, q), g ~ N(0, 1): x = phi(h)^2, y = (g phi'(h))^2.

    Var x / (E x)^2, Cov(x, y) / (E x E y), Var y / (E y)^2, and the slope of ln E y in ln q.
    """

    output: float
    both: float
    slope: float
    bend: float


class PairMoments(NamedTuple):
    """Expectations over two pre-activations u1, u2 and the slopes phi' there."""

    output: float  # phi1^2
    pair: float  # phi1 phi2
    slope: float  # phi1'^2
    pair_slope: float  # phi1' phi2'
    steepness: float  # (u1 phi1')^2
    pair_steepness: float  # u1 phi1' u2 phi2'


@dataclass(frozen=True, eq=False)
class GaussianTable:
    """An activation read once at all nodes of the half line, so that each q costs one weighted sum."""

    phi: Activation
    kinks: Float64[Tensor, " kinks"]
    jumps: bool
    u: Float64[Tensor, " nodes"]
    width: Float64[Tensor, " nodes"]
    features: Float64[Tensor, "6 nodes"]

    def moments(self, q: float) -> Moments:
        """All moments at the second moment q of the pre-activation."""
        q = min(max(q, SMALLEST), LARGEST)
        here, z, weight = self._gaussian(math.sqrt(q))
        features = self.features[:, here]
        mean, output, slope, stein, along, steepness = (features @ weight).tolist()
        if self.jumps:  # then phi' does not tell it all, but dE phi^2 / dq = E phi^2 (z^2 - 1) / 2q
            stein = float(features[1] @ (weight * (z * z - 1))) / 2
        return Moments(mean, output, slope, stein / q, along, steepness)

    def scatter(self, q: float) -> Scatter:
        """How one unit strays from the moments at the second moment q of the pre-activation."""
        here, z, weight = self._gaussian(math.sqrt(min(max(q, SMALLEST), LARGEST)))
        u = self.u[here]
        squares = [x**2 for x in _value_and_slope(self.phi, torch.stack((u, -u)))]
        size, steep = (x / (weight * x).sum().clamp_min(SMALLEST) for x in squares)
        products = size * size, size * steep, 3 * steep * steep, steep * (z * z - 1) / 2
        output, both, slope, bend = (float((weight * x).sum()) for x in products)
        return Scatter(output - 1, both - 1, slope - 1, bend)

    def _gaussian(self, scale: float) -> tuple[slice, Tensor, Tensor]:
        """The nodes that count, in deviations of a Gaussian, and their weights on either side of 0."""
        ends = torch.tensor([_FINEST * min(1.0, scale), _REACH * scale], dtype=torch.float64, device="cpu")
        here = slice(*torch.searchsorted(self.u, ends).tolist())
        z = self.u[here] / scale
        return here, z, self.width[here] * torch.exp(-0.5 * z * z) / (scale * math.sqrt(2 * math.pi))

    def spread(self, q: float, gap: float) -> float:
        """E phi^2 - E phi(u1) phi(u2) of two pre-activations with cosine 1 - gap.

        As E (phi(u1) - phi(u2))^2 / 2 it keeps its digits when the two are all but equal.
        """
        if gap == 0:
            return 0.0
        u1, u2, weight = self._pair(q, gap)
        phi1, phi2 = self.phi(torch.stack((u1, u2))).detach().double()
        return 0.5 * float((weight * (phi1 - phi2) ** 2).sum())

    def pair_slope(self, q: float, gap: float) -> float:
        """E phi'(u1) phi'(u2) of two pre-activations with cosine 1 - gap."""
        u1, u2, weight = self._pair(q, gap)
        slope1, slope2 = _value_and_slope(self.phi, torch.stack((u1, u2)))[1]
        return float((weight * slope1 * slope2).sum())

    def spread_slope(self, q: float, gap: float) -> float:
        """What `spread` grows by with q x gap: `pair_slope`, and what the jumps of phi add to it."""
        if not self.jumps:
            return self.pair_slope(q, gap)
        q, step = min(max(q, SMALLEST), LARGEST), 1e-4 * min(gap, 2 - gap)
        return (self.spread(q, gap + step) - self.spread(q, gap - step)) / (2 * step * q)

    def batch(self, q: float, size: int) -> PairMoments:
        """Of two samples of a batch after its normalization: centred, and with no other correlation left.

        A unit's values over the batch lie on the sphere of `size` - 1 dimensions, each with second moment q.
        """
        u1, u2, weight = self._pair(q, 1 + 1 / (size - 1), dimensions=float(size - 1))
        u = torch.stack((u1, u2))
        value, slope = _value_and_slope(self.phi, u)
        moments = [
            float((weight * moment).sum())
            for x in (value, slope, u * slope)
            for moment in ((x**2).mean(0), x.prod(0))  # the nodes are half of the plane, mirrored at u1 = u2
        ]
        return PairMoments(*moments)

    def _pair(self, q: float, gap: float, dimensions: float = math.inf) -> tuple[Tensor, Tensor, Tensor]:
        """Nodes and weights for two Gaussians, in polar coordinates: there a kink at 0 is a ray.

        In finitely many dimensions: for two coordinates of a point on the sphere.
        """
        scale = math.sqrt(min(max(q, SMALLEST), LARGEST))
        theta = 2 * math.asin(math.sqrt(min(max(gap, 0.0), 2.0) / 2))
        angle, angle_width = panels(_angles(theta, scale), _PAIR_NODES)
        ray = torch.stack((angle.cos(), (angle - theta).cos()))
        radius, mass = _radial(self._radii(scale * ray.abs(), scale), dimensions)
        weight = angle_width[:, None] / math.pi * mass
        u1, u2 = scale * ray[:, :, None] * radius
        return u1, u2, weight

    def _radii(self, steepness: Float64[Tensor, "2 angles"], scale: float) -> Float64[Tensor, "angles edges"]:
        edges = _radial_edges(scale).expand(steepness.shape[1], -1)
        if not len(self.kinks):
            return edges
        kinks = (self.kinks / steepness[:, :, None]).movedim(0, 1).flatten(1)
        return torch.cat((edges, kinks.clamp(max=_PAIR_REACH)), dim=1).sort(dim=1).values


def _radial(edges: Float64[Tensor, "*b edges"], dimensions: float) -> tuple[Tensor, Tensor]:
    """Radii in a plane and their share of a Gaussian, or of the sphere of radius sqrt(dimensions)."""
    if dimensions == math.inf:
        radius, width = panels(edges, _PAIR_NODES)
        return radius, width * radius * torch.exp(-0.5 * radius**2)
    angle, width = panels((edges / math.sqrt(dimensions)).clamp(max=1).asin(), _PAIR_NODES)
    share = (dimensions - 2) * angle.sin() * angle.cos() ** (dimensions - 3)
    return math.sqrt(dimensions) * angle.sin(), width * share


def tabulate(phi: Activation) -> GaussianTable:
    """Read an activation at all nodes, or raise `SetupError` if it is not elementwise."""
    phi = _elementwise(phi)
    kinks = _kinks(phi)
    u, width = panels(torch.cat((_half_line(), kinks)).sort().values)
    signed = torch.stack((u, -u))
    value, slope = _value_and_slope(phi, signed)
    squares = value**2, slope**2, signed * value * slope, (value * slope) ** 2, (signed * slope) ** 2
    features = torch.stack((value, *squares)).sum(1)
    return GaussianTable(phi, kinks, _jumps(phi, kinks), u, width, features)


def panels(edges: Float64[Tensor, "*b edges"], nodes: int = 16) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the composite Gauss-Legendre rule between each two neighbouring edges."""
    x, w = _legendre(nodes)
    left, width = edges[..., :-1, None], edges.diff(dim=-1)[..., None]
    return (left + width * x).flatten(-2), (width * w).flatten(-2)


@lru_cache
def _legendre(nodes: int) -> tuple[Tensor, Tensor]:
    x, w = np.polynomial.legendre.leggauss(nodes)
    return torch.from_numpy((x + 1) / 2), torch.from_numpy(w / 2)


@lru_cache
def _half_line() -> Float64[Tensor, " edges"]:
    """0, every power of two, and the quarters up to 8, where the usual activations bend."""
    powers = torch.arange(-_OCTAVES, _OCTAVES + 1, dtype=torch.float64, device="cpu").exp2()
    quarters = torch.arange(0, 8.25, 0.25, dtype=torch.float64, device="cpu")
    return torch.cat((powers, quarters)).sort().values


def _graded(finest: float, longest: float) -> list[float]:
    """Distances finest, 3 finest, 9 finest ... below the longest, and the longest."""
    count = max(0, math.ceil(math.log(longest / finest, 3))) if longest > 0 else 0
    return [*(finest * 3**i for i in range(count)), longest]


def _angles(theta: float, scale: float) -> Float64[Tensor, " edges"]:
    """Half a turn (the other half mirrors it), graded toward the rays where u1 or u2 is 0."""
    first, second = math.pi / 2, math.pi / 2 + theta
    finest = max(min(0.5, 0.5 / scale), 1e-4)
    outer = [0.0, *_graded(finest, (math.pi - theta) / 2)]
    inner = _graded(finest, theta / 2)
    edges = {first - x for x in outer} | {second + x for x in outer}
    edges |= {first + x for x in inner} | {second - x for x in inner}
    return torch.tensor(sorted(edges), dtype=torch.float64, device="cpu")


def _radial_edges(scale: float) -> Float64[Tensor, " edges"]:
    finest = max(min(1.0, 1.0 / scale), 1e-2)
    return torch.tensor([0.0, *_graded(finest, _PAIR_REACH)], dtype=torch.float64, device="cpu")


def _kinks(phi: Activation) -> Float64[Tensor, " kinks"]:
    """Where |u| > 0 and phi or its slope jumps: narrow each panel onto its largest change, eight times."""
    edges = _half_line()
    edges = edges[(edges > 2**-6) & (edges < 2**10)]
    left, right = (torch.cat((side, -side)) for side in (edges[:-1], edges[1:]))
    steps = torch.linspace(0, 1, 65, dtype=torch.float64, device="cpu")
    for _ in range(8):  # 64**8 exceeds the resolution of float64
        u = left[:, None] + (right - left)[:, None] * steps
        value, slope = _value_and_slope(phi, u)
        jump = value.diff().abs() + slope.diff().abs()
        widest = jump.argmax(1, keepdim=True)
        left, right = u.gather(1, widest).squeeze(1), u.gather(1, widest + 1).squeeze(1)
    size = 1 + value.abs().amax(1) + slope.abs().amax(1)
    found: Tensor = left[jump.amax(1) > 1e-6 * size].abs()
    return found.unique()  # type: ignore[no-untyped-call,no-any-return]


def _jumps(phi: Activation, kinks: Float64[Tensor, " kinks"]) -> bool:
    """Whether phi itself, not only its slope, jumps at one of its kinks or at 0."""
    at = torch.cat((kinks, -kinks))
    before, after = (torch.cat((at * (1 + side), at.new_tensor([side]))) for side in (-1e-9, 1e-9))
    left, right = phi(torch.stack((before, after))).detach().double()
    return bool(((left - right).abs() > 1e-6 * (1 + left.abs())).any())


def _value_and_slope(phi: Activation, u: Float64[Tensor, "*n"]) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False), torch.enable_grad():
        u = u.detach().clone().requires_grad_()
        value = phi(u.clone()).double()  # a clone, because some activations work in place
        slope = torch.zeros_like(u)
        if value.requires_grad:
            (slope,) = torch.autograd.grad(value.sum(), u, materialize_grads=True)
    return value.detach(), slope


def _elementwise(phi: Activation) -> Activation:
    """The activation in float64 and free of hooks, once it has proved to act on each element alone."""
    call = _double(phi)
    name = getattr(phi, "__name__", repr(phi))
    try:
        return _proved(call, name)
    except SetupError:
        raise
    except Exception as error:  # the user's own code may raise anything
        try:
            return _proved(lambda u: call(u.float()), name)
        except Exception:
            raise SetupError(
                f"The activation {name} cannot take a float64 tensor of shape [4]: {error}"
            ) from error


def _proved(call: Activation, name: str) -> Activation:
    probe = torch.tensor([-2.0, -0.5, 0.5, 2.0], dtype=torch.float64, device="cpu")
    whole, part = call(probe.clone()), call(probe[1:3].clone())
    if not isinstance(whole, Tensor):
        raise SetupError(f"The activation {name} gives a {type(whole).__name__}, not a tensor.")
    if whole.shape != probe.shape or not torch.allclose(whole[1:3], part, equal_nan=True):
        raise SetupError(
            f"The activation {name} is not elementwise. Mean-field theory takes functions that act on "
            "each number alone and alike, such as `torch.tanh`, `nn.ReLU()` or a lambda."
        )
    (value, slope), (moved, _) = (_value_and_slope(call, probe + x) for x in (0.0123, 0.0123 + 2**-16))
    if not slope.any() and not torch.equal(value, moved):
        raise SetupError(
            f"Autograd cannot follow the activation {name}: its values vary, but its slope is 0. "
            "Build it of torch functions alone, without `.detach()`, `.item()` or numpy."
        )
    return call


def _double(phi: Activation) -> Activation:
    if not isinstance(phi, nn.Module):
        return phi
    if next(phi.parameters(), None) is not None or next(phi.buffers(), None) is not None:
        with torch.inference_mode(False):  # autograd refuses copies made in inference mode
            phi = copy.deepcopy(phi).to("cpu", torch.float64)
    return phi.forward  # not __call__: hooks that watch the model must not see these calls
