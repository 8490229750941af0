"""Statistics of signals and gradients: pure functions of tensors, safe under `torch.func.vmap`.

Shapes: `B` samples in the batch; what follows belongs to one sample. Sums run in float64, because the
squares of a vanishing signal are below float32's smallest number long before the signal itself is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Float64, Shaped
from torch import Tensor

Scalar = Float[Tensor, ""]
Sums = tuple[Scalar, Scalar]
_TINY = 1e-300

SAMPLES = 32
"""Statistics of pairs of samples look at no more than so many, drawn once for each size of batch."""


def mean(x: Shaped[Tensor, "..."]) -> Scalar:
    """The mean of all values.

    >>> mean(torch.tensor([1.0, 3.0])).item()
    2.0
    """
    return x.mean()


def norm(x: Shaped[Tensor, "..."]) -> Scalar:
    """The Euclidean norm of all values: the rms is the norm over the root of their number.

    >>> norm(torch.tensor([3.0, 4.0])).item()
    5.0
    """
    found: Tensor = torch.linalg.vector_norm(x, dtype=torch.float64)
    return found


def zero_fraction(x: Shaped[Tensor, "..."]) -> Scalar:
    """The share of values that are exactly zero.

    >>> zero_fraction(torch.tensor([0.0, 2.0])).item()
    0.5
    """
    return 1.0 - x.sign().abs_().mean()


def unit_activity(x: Shaped[Tensor, "..."], unit_dim: int) -> Float[Tensor, " units"]:
    """Per unit, the share of samples (and positions) for which it is not exactly zero.

    >>> unit_activity(torch.tensor([[0.0, 1.0], [0.0, 0.0]]), unit_dim=1).tolist()
    [0.0, 0.5]
    """
    return x.sign().abs_().movedim(unit_dim, 0).flatten(1).mean(dim=1)


def flat_fraction(x: Shaped[Tensor, "..."], steep: tuple[float, float]) -> Scalar:
    """Saturation: the share of inputs of an activation outside the interval where it is steep.

    Args:
        x: pre-activations, of any shape.
        steep: from `steep_interval`.

    >>> flat_fraction(torch.tensor([-9.0, 0.0, 1.0, 9.0]), (-6.0, 6.0)).item()
    0.5
    """
    low, high = steep
    if math.isinf(high):  # only below: two passes less
        return 0.5 - 0.5 * (x - low).sign_().mean()
    return (x.clamp(low, high) - x).sign().abs_().mean()


def some_samples(x: Shaped[Tensor, "B ..."]) -> Float64[Tensor, "b n"]:
    """At most 32 samples, each as one row in float64.

    Drawn at random, but always the same: a batch may be sorted, or its classes may take turns.

    >>> some_samples(torch.zeros(100, 2, 3)).shape
    torch.Size([32, 6])
    """
    chosen = x.index_select(0, _places(len(x), x.device)) if len(x) > SAMPLES else x
    return chosen.flatten(1).double()


@lru_cache(maxsize=256)
def _places(rows: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False):
        return torch.randperm(rows, generator=generator)[:SAMPLES].to(device)


def cosine_sums(rows: Float64[Tensor, "b n"]) -> Sums:
    """What the mean cosine is computed from: |sum of the unit vectors|^2, and how many are not zero."""
    norms = torch.linalg.vector_norm(rows, dim=1)
    total = norms.clamp_min(_TINY).reciprocal() @ rows
    return torch.dot(total, total), norms.sign().sum()


def cosine(length: Float64[Tensor, "*sites"], count: Float64[Tensor, "*sites"]) -> Float64[Tensor, "*sites"]:
    """The mean cosine over all pairs of samples: 1 if all are parallel; NaN without two non-zero samples.

    >>> rows = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    >>> cosine(*cosine_sums(rows)).item()
    0.0
    """
    return torch.where(count > 1.5, (length - count) / (count * (count - 1)), torch.nan)


def rank_sums(rows: Float64[Tensor, "b n"]) -> Sums:
    """What the effective rank is computed from: the norms of the centred samples and of their Gram matrix."""
    centred = rows - rows.mean(dim=0)
    return norm(centred), norm(centred @ centred.T)


def effective_rank(
    samples: Float64[Tensor, "*sites"], gram: Float64[Tensor, "*sites"]
) -> Float64[Tensor, "*sites"]:
    """How many directions the samples spread over: (sum of eigenvalues)^2 / sum of squared eigenvalues.

    This participation ratio of the covariance lies between 1 and min(b - 1, values per sample), and needs no
    decomposition; NaN if all samples are equal.

    Source: Roy, Vetterli, The effective rank, 2007, https://ieeexplore.ieee.org/document/7098875 (who take
    the exponential of the entropy in place of the second moment).

    >>> round(effective_rank(*rank_sums(torch.eye(4, dtype=torch.float64))).item(), 6)
    3.0
    """
    return (samples**2 / gram) ** 2


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
    with torch.enable_grad():
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
