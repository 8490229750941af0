"""Statistics of signals and gradients: pure functions of tensors, safe under `torch.func.vmap`.

Shapes: `rows` are samples of a signal, `b` of them with `n` values each, of any number of sites at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Float64, Shaped
from torch import Tensor
from torch.nn.functional import pad

from gradmend.samples import places

Rows = Float[Tensor, "*sites b n"]

SAMPLES, VALUES = 16, 1024
"""Statistics of samples look at so many at most, and at so many of each sample's values."""

_TINY = 1e-300
_EQUAL = 1e-14
"""A variance of unit vectors that is nothing but rounding."""

_FEWEST_BIASES, _UNEXPLAINED = 8, 0.1


def norm(x: Shaped[Tensor, "..."]) -> Float64[Tensor, ""]:
    """The Euclidean norm of all values, summed in float64: squares of vanishing signals need its range.

    >>> norm(torch.tensor([3.0, 4.0])).item()
    5.0
    """
    found: Tensor = torch.linalg.vector_norm(x, dtype=torch.float64)
    return found


def some_samples(x: Float[Tensor, "*sites B m"]) -> Rows:
    """At most 16 samples of a signal, and at most 1,024 evenly spaced values of each.

    The samples are drawn at random, but always the same: a batch may be sorted, or its classes take turns.
    The spacing shares no divisor with the number of values, so that all channels and places take part.

    >>> some_samples(torch.zeros(100, 6)).shape
    torch.Size([16, 6])
    """
    samples, values = x.shape[-2:]
    step = _spacing(values)
    chosen = x[..., ::step] if step > 1 else x
    return chosen.index_select(-2, places(samples, SAMPLES, x.device)) if samples > SAMPLES else chosen


@lru_cache(maxsize=256)
def _spacing(size: int) -> int:
    step = max(1, -(-size // VALUES))
    while math.gcd(step, size) > 1:
        step += 1
    return step


def flat_fraction(rows: Rows, steep: tuple[float, float]) -> Float[Tensor, "*sites"]:
    """Saturation: the share of inputs of an activation outside the interval where it is steep.

    Args:
        rows: pre-activations.
        steep: from `steep_interval`.

    >>> flat_fraction(torch.tensor([[-9.0, 0.0, 1.0, 9.0]]), (-6.0, 6.0)).item()
    0.5
    """
    return (rows.clamp(*steep) - rows).sign_().abs_().mean((-2, -1))


def silent_units(x: Float[Tensor, "sites B ..."], unit_dim: int) -> Bool[Tensor, "sites units"]:
    """Which units are exactly zero for all samples and places.

    Args:
        x: the outputs of several sites.
        unit_dim: which dimension of one of these outputs counts the units.

    >>> silent_units(torch.tensor([[[0.0, 1.0], [0.0, 0.0]]]), unit_dim=1).tolist()
    [[True, False]]
    """
    places = [dim for dim in range(1, x.dim() - 1) if dim != unit_dim]
    high, low = x.amax(1), x.amin(1)  # samples first: that is the fast way
    if places:
        high, low = high.amax(places), low.amin(places)
    return torch.logical_or(high, low).logical_not_()


def nonzero_share(rows: Rows) -> Float[Tensor, "*sites"]:
    """The share of values that are not exactly zero.

    >>> nonzero_share(torch.tensor([[0.0, 2.0]])).item()
    0.5
    """
    return rows.sign().abs_().mean((-2, -1))


def gram(rows: Rows) -> Float64[Tensor, "*sites 16 16"]:
    """Products of all pairs of samples, in float64; fewer than 16 samples are filled up by zeros.

    Those of float32 numbers are exact in float64 and cannot leave its range; float64 rows are scaled first.
    """
    if rows.dtype == torch.float64:
        rows = rows / rows.abs().amax(-1, keepdim=True).clamp_min(_TINY)
    rows = rows.double()
    products = rows @ rows.mT
    missing = SAMPLES - products.shape[-1]
    return pad(products, (0, missing, 0, missing)) if missing else products


def directions(gram: Float64[Tensor, "*sites b b"]) -> Float64[Tensor, "*sites 2"]:
    """How alike the directions of samples are: their mean cosine, and their effective rank.

    The mean is over all pairs of samples that are not zero: 1 if all are parallel, NaN without two.
    1 - cosine is right to about 1e-15, so that samples may be all but parallel.

    The rank is (sum of eigenvalues)^2 / sum of squared eigenvalues of the covariance of unit vectors, which
    lies between 1 and min(b - 1, n) and needs no decomposition; NaN if all are equal. Source: Roy, Vetterli,
    The effective rank, 2007, https://ieeexplore.ieee.org/document/7098875 (who take the exponential of the
    entropy in place of the second moment).

    >>> directions(gram(torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]))).round(decimals=5).tolist()
    [0.0, 1.0]
    """
    scale = gram.diagonal(dim1=-2, dim2=-1).clamp_min(_TINY).rsqrt()
    cosines = gram * scale[..., :, None] * scale[..., None, :]
    real = cosines.diagonal(dim1=-2, dim2=-1).round()  # 1, and 0 of a sample that is zero
    gaps = cosines - real[..., :, None] * real[..., None, :]  # keeps the digits of cosines next to 1
    count, columns = real.sum(-1), gaps.sum(-1)
    total = columns.sum(-1).masked_fill(count < 2, torch.nan)
    cosine = 1 + total.clamp_max(0) / (count * (count - 1))
    spread = (-total / count).masked_fill(-total < _EQUAL * count, torch.nan)
    squares = gaps.square().sum((-2, -1)) - 2 * columns.square().sum(-1) / count + spread.square()
    return torch.stack([cosine, spread.square() / squares], dim=-1)


def rows_equal(x: Shaped[Tensor, "units ..."]) -> Bool[Tensor, ""]:
    """Whether all units (rows) of a weight or of its gradient are the same to the last bit.

    >>> rows_equal(torch.ones(3, 2)).item()
    True
    """
    return (x - x[:1]).abs_().amax() == 0


def steep_interval(phi: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """The interval within which an activation's slope is at least 1 % of its maximum.

    An end is infinite where the activation stays steep: ReLU gives (0, inf), sigmoid about (-6, 6).

    >>> steep_interval(torch.relu)[1]
    inf
    """
    try:
        return _steep_interval(phi)
    except TypeError:  # not hashable, so not remembered
        return _steep_interval.__wrapped__(phi)


@lru_cache(maxsize=256)
def _steep_interval(phi: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    grid = torch.linspace(-20, 20, 4001, dtype=torch.float64)
    slopes = _slope(phi, grid)
    least = 0.01 * slopes.max()
    steep = grid[slopes >= least]
    return _edge(phi, steep[0].item(), -0.01, least), _edge(phi, steep[-1].item(), 0.01, least)


def _slope(phi: Callable[[Tensor], Tensor], x: Float64[Tensor, " n"]) -> Float64[Tensor, " n"]:
    x = x.detach().clone().requires_grad_()
    own = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)  # not those of a checkpoint
    with torch.enable_grad(), own:
        (slope,) = torch.autograd.grad(phi(x).sum(), x)
    return slope.abs()


def _edge(phi: Callable[[Tensor], Tensor], steep: float, step: float, least: Tensor) -> float:
    """Between a steep point of the grid and its flat neighbour, where the slope falls below `least`."""
    if abs(steep) >= 20:
        return math.copysign(math.inf, step)
    flat = steep + step
    for _ in range(50):
        middle = (steep + flat) / 2
        inside = _slope(phi, torch.tensor([middle], dtype=torch.float64)) >= least
        steep, flat = (middle, flat) if inside else (steep, middle)
    return steep


def absorbed_shift(weight: Shaped[Tensor, "..."], bias: Shaped[Tensor, "..."]) -> tuple[float, float] | None:
    """The shift for which W (x + shift) is W x + b, and the mean square of what of b it does not explain.

    None if it leaves more than a tenth, as it does of random biases, or if there are fewer than eight, which
    always look a little as if they were made so.

    >>> layer = torch.nn.Linear(50, 20)
    >>> absorbed_shift(layer.weight, layer.bias) is None
    True
    >>> shift, left = absorbed_shift(layer.weight, 0.5 * layer.weight.sum(1))
    >>> round(shift, 4)
    0.5
    """
    if len(bias) < _FEWEST_BIASES or weight.ndim < 2 or weight.shape[:1] != bias.shape:
        return None
    sums, biases = weight.detach().flatten(1).sum(1).double(), bias.detach().double()
    shift = sums @ biases / (sums @ sums)
    left, whole = ((biases - by * sums).square().mean().item() for by in (shift, 0.0))
    return (shift.item(), left) if left < _UNEXPLAINED * whole else None
