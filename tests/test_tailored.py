"""Tailored activations: the paper's numbers, the four conditions by another quadrature, and wide networks."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gradmend.errors import SetupError
from gradmend.theory import Tailoring, leaky_slope, tailor

SMOOTH = [torch.tanh, torch.sigmoid, F.softplus, F.gelu, F.silu, F.mish]


def shaped(phi: object, shape: Tailoring, x: Tensor) -> Tensor:
    return shape.output_scale * (phi(shape.input_scale * x + shape.input_shift) + shape.output_shift)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("depth", "slope"),
    [(20, 0.181380), (50, 0.430523), (100, 0.570440), (200, 0.679600), (500, 0.786240)],
)
def test_slopes_bring_orthogonal_samples_to_a_cosine_of_nine_tenths(depth: int, slope: float) -> None:
    assert leaky_slope(depth) == pytest.approx(slope, abs=1e-6)


def test_shallow_networks_stay_with_relu() -> None:
    assert leaky_slope(3) == 0.0


@pytest.mark.parametrize("depth", [30, 100])
def test_slope_agrees_with_a_wide_network(depth: int) -> None:
    slope, width = leaky_slope(depth), 600
    generator = torch.Generator().manual_seed(0)
    h = torch.linalg.qr(torch.randn(width, 8, generator=generator))[0].T * math.sqrt(width)
    for _ in range(depth):
        weight = torch.randn(width, width, generator=generator) * math.sqrt(2 / (1 + slope**2) / width)
        h = F.leaky_relu(h @ weight.T, slope)
    cosines = F.cosine_similarity(h[:4], h[4:])
    assert cosines.mean().item() == pytest.approx(
        0.9, abs=0.03
    )  # over networks of width 600 it strays by .01


def test_constants_of_tanh_are_those_of_the_authors_code() -> None:
    """Their test of a local curvature E f''^2 of 0.00303951 gives these four."""
    found = tailor(torch.tanh, 1, 0.0030395135282938455)
    wanted = (0.0580205218578, 0.5218639804100, 22.36066261763, -0.4796430704354)
    assert tuple(vars(found).values()) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("phi", SMOOTH)
@pytest.mark.parametrize(("depth", "curvature"), [(1, 0.3), (30, 0.3), (1000, 2.0)])
def test_the_four_conditions_hold(phi: object, depth: int, curvature: float) -> None:
    shape = tailor(phi, depth, curvature)  # type: ignore[arg-type]
    z, weight = map(torch.from_numpy, np.polynomial.hermite_e.hermegauss(120))
    weight = weight / math.sqrt(2 * math.pi)
    z = z.requires_grad_()
    f = shaped(phi, shape, z)
    (slope,) = torch.autograd.grad(f.sum(), z, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), z)
    values = (x.detach() for x in (f * f, slope**2, z * f * slope, bend**2 * depth))
    moments = [(weight.detach() * x).sum().item() for x in values]
    assert moments == pytest.approx([1, 1, 1, curvature], rel=1e-6)


def test_what_cannot_be_tailored_is_said() -> None:
    with pytest.raises(SetupError, match="cannot be tailored to 10 layers"):
        tailor(F.hardtanh, 10)
    with pytest.raises(SetupError, match="depth >= 1 and curvature > 0"):
        tailor(torch.tanh, 0)
    with pytest.raises(SetupError, match="0 < cosine < 1"):
        leaky_slope(10, 1.0)
