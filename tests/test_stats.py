"""Each statistic against a slow twin written out in plain loops."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor, nn

from gradmend import stats

tensors = arrays.arrays(
    "float32",
    arrays.array_shapes(min_dims=2, max_dims=4, min_side=2, max_side=5),
    elements=st.floats(-8, 8, width=32).map(lambda v: 0.0 if abs(v) < 1 else v),
).map(torch.from_numpy)


def pairs_cosine(x: Tensor) -> float:
    rows = [row.flatten().double() for row in x if row.abs().sum() > 0]
    cosines = [
        (a @ b / a.norm() / b.norm()).item() for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j
    ]
    return sum(cosines) / len(cosines) if cosines else math.nan


def directions(x: Tensor) -> list[float]:
    """Mean cosine and effective rank."""
    found: list[float] = stats.directions(stats.gram(stats.some_samples(x.flatten(1)))).tolist()
    return found


@given(tensors)
def test_norm_and_nonzero_share(x: Tensor) -> None:
    values = x.double().flatten().tolist()
    assert stats.norm(x).item() == pytest.approx(math.sqrt(sum(v * v for v in values)), rel=1e-12)
    nonzero = sum(v != 0 for v in values) / len(values)
    rows = stats.some_samples(x.flatten(1))
    assert stats.nonzero_share(rows).item() == pytest.approx(nonzero, abs=1e-6)  # counted in float32


SCALES = {torch.float32: (1e-44, 1e-30, 1.0, 1e30, 1e37), torch.float64: (1e-250, 1.0, 1e250)}


@given(tensors, st.sampled_from([(dtype, scale) for dtype, scales in SCALES.items() for scale in scales]))
def test_cosine_of_samples(x: Tensor, kind: tuple[torch.dtype, float]) -> None:
    """Down to numbers of float32 that have no more than three bits."""
    dtype, scale = kind
    x = x.to(dtype) * scale
    measured, _ = directions(x)
    assert measured == pytest.approx(pairs_cosine(x.double() / scale), abs=1e-14, nan_ok=True)


@given(st.floats(-9, -1))
def test_cosine_keeps_its_digits_where_samples_are_all_but_parallel(exponent: float) -> None:
    rows = torch.ones(32, 64) + 10**exponent * torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    units = nn.functional.normalize(stats.some_samples(rows).double(), dim=1)
    gap = torch.pdist(units).square().mean().item() / 2
    assert 1 - directions(rows)[0] == pytest.approx(gap, rel=1e-6, abs=1e-14)


@given(tensors, st.integers(1, 3))
def test_silent_units(x: Tensor, dim: int) -> None:
    dim = min(dim, x.dim() - 1)
    x = x.clone()
    x.select(dim, 0).zero_()
    twin = [not x.select(dim, unit).any() for unit in range(x.shape[dim])]
    assert stats.silent_units(x[None], dim)[0].tolist() == twin


def rank(x: Tensor) -> float:
    return directions(x)[1]


def test_effective_rank_counts_directions() -> None:
    basis = torch.linalg.qr(torch.randn(20, 5))[0]
    signal = torch.randn(2000, 5) @ basis.T
    units = nn.functional.normalize(stats.some_samples(signal).double(), dim=1)
    twin = torch.linalg.eigvalsh(torch.cov(units.T))
    assert rank(signal) == pytest.approx((twin.sum() ** 2 / (twin**2).sum()).item(), rel=1e-5)
    assert 3.5 < rank(signal) < 5.01
    assert math.isnan(rank(torch.ones(4, 3)))
    assert math.isnan(rank(torch.randn(1, 37).expand(15, -1)))


def test_squares_do_not_underflow() -> None:
    assert stats.norm(torch.full((4, 4), 1e-30)).item() == pytest.approx(4e-30, rel=1e-5)
    assert directions(torch.full((4, 4), 1e-30))[0] == pytest.approx(1.0)


@pytest.mark.parametrize("values", [3, 1024, 1025, 4096, 49 * 512, 3 * 224 * 224])
def test_sampled_values_come_from_everywhere(values: int) -> None:
    chosen = stats.some_samples(torch.arange(values).double().expand(2, -1))[0].long()
    assert len(chosen) <= stats.VALUES
    for side in (2, 4, 7, 8, 14, 32):
        if values % side == 0 and len(chosen) >= 8 * side:
            assert len(set((chosen % side).tolist())) == side  # every column of a map that is `side` wide


@pytest.mark.parametrize(
    ("phi", "low", "high"),
    [
        (torch.sigmoid, -5.98, 5.98),
        (torch.tanh, -2.99, 2.99),
        (torch.relu, 0.0, math.inf),
        (nn.LeakyReLU(0.1), -math.inf, math.inf),
        (nn.Hardtanh(), -1.0, 1.0),
        (nn.ELU(), -4.6, math.inf),
    ],
)
def test_steep_interval(phi: nn.Module, low: float, high: float) -> None:
    """Within a grid step of the points where the slope is one hundredth of its maximum."""
    assert stats.steep_interval(phi) == pytest.approx((low, high), abs=0.02)


def test_flat_fraction_is_the_share_of_small_slopes() -> None:
    x = (5 * torch.randn(64, 8, dtype=torch.float64)).requires_grad_()
    (slope,) = torch.autograd.grad(torch.tanh(x).sum(), x)
    twin = (slope < 0.01).double().mean().item()
    flat = stats.flat_fraction(x.detach(), stats.steep_interval(torch.tanh)).item()
    assert flat == pytest.approx(twin, abs=0.005)  # the interval's ends lie on a grid of step 0.01


@pytest.mark.parametrize(
    "statistic", [stats.norm, stats.gram, lambda x: stats.directions(stats.gram(x)), stats.some_samples]
)
def test_safe_under_vmap(statistic: object) -> None:
    x = torch.randn(3, 6, 4)
    together = torch.func.vmap(statistic)(x)  # type: ignore[arg-type]
    alone = torch.stack([statistic(part) for part in x])  # type: ignore[operator]
    torch.testing.assert_close(together, alone)
