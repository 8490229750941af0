"""Statistics of signals and gradients: pure functions of tensors, safe under `torch.func.vmap`.

Shapes: `B` samples in the batch; what follows belongs to one sample. Sums run in float64, because the
squares of a vanishing signal are below float32's smallest number long before the signal itself is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Float64, Shaped
from torch import Tensor

Scalar = Float64[Tensor, ""]
SAMPLES_FOR_RANK = 64


def mean(x: Shaped[Tensor, "..."]) -> Scalar:
    """The mean of all values.

    >>> mean(torch.tensor([1.0, 3.0])).item()
    2.0
    """
    return x.double().mean()


def mean_square(x: Shaped[Tensor, "..."]) -> Scalar:
    """The mean of the squared values; its root is the rms.

    >>> mean_square(torch.tensor([3.0, 4.0])).item()
    12.5
    """
    norm: Tensor = torch.linalg.vector_norm(x, dtype=torch.float64)
    return norm.square() / x.numel()


def zero_fraction(x: Shaped[Tensor, "..."]) -> Scalar:
    """The share of values that are exactly zero.

    >>> zero_fraction(torch.tensor([0.0, 2.0])).item()
    0.5
    """
    return 1.0 - x.sign().abs_().mean().double()


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
    return (x.clamp(low, high) - x).sign().abs_().mean().double()


def sample_cosine(x: Shaped[Tensor, "B ..."]) -> Scalar:
    """The mean cosine over all pairs of samples: 1 if all are parallel; NaN without two non-zero samples.

    >>> sample_cosine(torch.tensor([[1.0, 0.0], [0.0, 2.0]])).item()
    0.0
    """
    rows = x.flatten(1).double()
    norms = torch.linalg.vector_norm(rows, dim=1)
    inverse = torch.where(norms > 0, 1 / norms, 0.0)
    count = (norms > 0).double().sum()
    total = inverse @ rows
    return torch.where(count > 1, (total @ total - count) / (count * (count - 1)), torch.nan)


def effective_rank(x: Shaped[Tensor, "B ..."]) -> Scalar:
    """How many directions the samples spread over: (sum of eigenvalues)^2 / sum of squared eigenvalues.

    This participation ratio of the covariance lies between 1 and min(B - 1, values per sample). It needs
    no decomposition. At most the first 64 samples are looked at; NaN if all samples are equal.

    Source: Roy, Vetterli, The effective rank, 2007, https://ieeexplore.ieee.org/document/7098875 (who take
    the exponential of the entropy in place of the second moment).

    >>> round(effective_rank(torch.eye(4)).item(), 6)
    3.0
    """
    rows = x[:SAMPLES_FOR_RANK].flatten(1)
    centred = rows - rows.mean(dim=0)
    scaled = centred / centred.abs().amax()
    gram = (scaled @ scaled.T).double()
    spread: Tensor = gram.trace() ** 2 / gram.square().sum()
    return spread


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
    grid = torch.linspace(-20, 20, 4001, dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(phi(grid).sum(), grid)
    steep = grid.detach()[slope.abs() >= 0.01 * slope.abs().max()]
    low, high = steep[0].item(), steep[-1].item()
    return (-float("inf") if low <= -20 else low, float("inf") if high >= 20 else high)
