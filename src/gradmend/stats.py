"""Statistics of signals and gradients: pure functions of tensors, safe under `torch.func.vmap`.

Shapes: `rows` are samples of a signal, `b` of them with `n` values each, of any number of sites at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Float64, Shaped
from torch import Tensor

from gradmend.samples import places

Rows = Float[Tensor, "*sites b n"]

SAMPLES, VALUES = 16, 1024
"""Statistics of samples look at so many at most, and at so many of each sample's values."""

_TINY = 1e-38


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
    places = [dim + 1 for dim in range(1, x.dim() - 1) if dim != unit_dim]
    high, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)  # samples first: that is the fast way
    if places:
        high, low = high.amax(places), low.amin(places)
    return ((high == 0) & (low == 0)).flatten(1)


def nonzero_share(rows: Rows) -> Float[Tensor, "*sites"]:
    """The share of values that are not exactly zero.

    >>> nonzero_share(torch.tensor([[0.0, 2.0]])).item()
    0.5
    """
    return rows.sign().abs_().mean((-2, -1))


def sample_sums(rows: Rows) -> Float[Tensor, "*sites 6"]:
    """Sums over samples that `zeros`, `cosine` and `rank` are computed from.

    The share of values that are not zero; how many samples are not; then, of the Gram matrix of differences
    between their directions (unit vectors) and the first one's: trace, sum, norm of the row sums, norm.
    Differences keep their digits where samples are all but parallel.
    """
    sizes = rows.abs()
    largest = sizes.amax(-1, keepdim=True)
    units = rows / largest.clamp_min(_TINY)  # so that no square is too small or too large
    units.div_(torch.linalg.vector_norm(units, dim=-1, keepdim=True).clamp_min_(0.5))
    real = (largest > 0).to(rows.dtype)
    apart = (units - units[..., :1, :]).mul_(real)
    gram = apart @ apart.mT
    columns = gram.sum(-1)
    sums = (
        sizes.sign_().mean((-2, -1)),
        real.sum((-2, -1)),
        gram.diagonal(dim1=-2, dim2=-1).sum(-1),
        columns.sum(-1),
        torch.linalg.vector_norm(columns, dim=-1),
        torch.linalg.vector_norm(gram, dim=(-2, -1)),
    )
    return torch.stack(sums, dim=-1)


def zeros(sums: Sequence[float]) -> float:
    """The share of values that are exactly zero.

    >>> zeros(sample_sums(torch.tensor([[0.0, 2.0]])).tolist())
    0.5
    """
    return 1.0 - sums[0]


def cosine(sums: Sequence[float]) -> float:
    """The mean cosine over all pairs of samples that are not zero: 1 if all are parallel; NaN without two.

    1 - cosine is half the squared distance of two unit vectors: right down to about 1e-13 in float32.

    >>> cosine(sample_sums(torch.tensor([[1.0, 0.0], [0.0, 2.0]])).tolist())
    0.0
    """
    _, count, trace, total, _, _ = sums
    return 1 - (count * trace - total) / (count * (count - 1)) if count > 1 else math.nan


def rank(sums: Sequence[float]) -> float:
    """The effective rank of the directions of all samples that are not zero.

    (sum of eigenvalues)^2 / sum of squared eigenvalues of their covariance, which lies between 1 and
    min(b - 1, n) and needs no decomposition; NaN if all are equal. Source: Roy, Vetterli, The effective rank,
    2007, https://ieeexplore.ieee.org/document/7098875 (who take the exponential of the entropy in place of
    the second moment).

    >>> round(rank(sample_sums(torch.eye(4)).tolist()), 5)
    3.0
    """
    _, count, trace, total, columns, norm = sums
    if count < 2:
        return math.nan
    squares = norm**2 - 2 * columns**2 / count + (total / count) ** 2
    return (trace - total / count) ** 2 / squares if squares > 0 else math.nan


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
