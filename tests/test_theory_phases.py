"""Fixed points, depth scales, dropout, and the line between order and chaos."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gradmend import theory
from gradmend.theory import Elementwise, Linear, Signal, critical, propagate, slope_moment
from twins import ACTIVATIONS, LEAKY, dense, gaussian

names = st.sampled_from(sorted(ACTIVATIONS))
few = settings(max_examples=30, deadline=None)


# -- fixed points and depth -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phi", "weight_variance", "bias_variance", "q"),
    [
        (torch.relu, 2.0, 0.0, 1.0),  # every q is one
        (torch.relu, 1 / 3, 0.0, 0.0),
        (torch.relu, 1.0, 0.5, 1.0),
        (torch.relu, 2.1, 0.0, math.inf),
        (torch.relu, 2.0, 0.1, math.inf),
        (torch.tanh, 1.0, 0.0, 0.0),
        (torch.tanh, 1.760955, 0.05, 0.570048),
        (torch.tanh, 0.0, 0.3, 0.3),
    ],
)
def test_fixed_point(phi: theory.Activation, weight_variance: float, bias_variance: float, q: float) -> None:
    assert theory.fixed_point(phi, weight_variance, bias_variance) == pytest.approx(q, abs=1e-6)


@few
@given(name=names, weight_variance=st.floats(0.1, 3), bias_variance=st.floats(0, 1))
def test_the_length_map_iterated_arrives_at_the_fixed_point(
    name: str, weight_variance: float, bias_variance: float
) -> None:
    phi = ACTIVATIONS[name]
    fixed = theory.fixed_point(phi, weight_variance, bias_variance)
    at_one = (1 - bias_variance) / weight_variance  # the input after which the first q is 1
    layers = [Linear(weight_variance, bias_variance), Elementwise(phi)] * 301
    q = propagate(layers, Signal(at_one, gap=0.0)).lengths[-2]
    if abs(theory.length_slope(phi, min(max(fixed, 1e-9), 1e9), weight_variance) - 1) > 0.1:
        assert fixed == pytest.approx(q, rel=1e-6, abs=1e-9) or math.isinf(fixed) == (q > 1e9)


@pytest.mark.parametrize(
    ("weight_variance", "chi", "cosine", "scale", "depth"),
    [
        (1.0, 0.75903, 1, 3.63, 22),
        (1.3, 0.88016, 1, 7.83, 47),
        (1.5, 0.93864, 1, 15.79, 95),
        (2.0, 1.04767, 0.74408, 25.21, 151),
        (2.5, 1.13352, 0.44680, 11.80, 71),
        (3.0, 1.20893, 0.29932, 9.05, 54),
        (4.0, 1.34240, 0.16506, 6.98, 42),
    ],
)
def test_depth_scales_of_tanh(
    weight_variance: float, chi: float, cosine: float, scale: float, depth: int
) -> None:
    q = theory.fixed_point(torch.tanh, weight_variance, 0.05)
    scales = theory.depth_scales(torch.tanh, weight_variance, 0.05)
    assert theory.gradient_factor(torch.tanh, q, weight_variance) == pytest.approx(chi, abs=6e-6)
    assert theory.correlation_fixed_point(torch.tanh, weight_variance, 0.05) == pytest.approx(
        cosine, abs=6e-6
    )
    assert scales.correlation == pytest.approx(scale, abs=6e-3)
    assert scales.gradient == pytest.approx(1 / abs(math.log(chi)), rel=1e-3)
    assert scales.length == pytest.approx(1 / -math.log(theory.length_slope(torch.tanh, q, weight_variance)))
    assert round(theory.trainable_depth(torch.tanh, weight_variance, 0.05)) == depth


def test_depth_scales_at_the_edges() -> None:
    critical_relu = theory.depth_scales(torch.relu, 2.0)
    assert (critical_relu.length, critical_relu.correlation, critical_relu.gradient) == (math.inf,) * 3
    default = theory.depth_scales(torch.relu, 1 / 3)
    assert default.gradient == pytest.approx(1 / math.log(6))
    exploding = theory.depth_scales(torch.relu, 3.0)
    assert exploding.gradient == pytest.approx(1 / math.log(1.5))
    assert theory.correlation_fixed_point(torch.relu, 3.0) == pytest.approx(1, abs=1e-6)
    assert theory.correlation_fixed_point(lambda u: 1.0 * u, 2.0) == pytest.approx(0, abs=1e-6)
    assert theory.depth_scales(torch.tanh, 0.0, 1.0) == theory.DepthScales(0.0, 0.0, 0.0)


@few
@given(name=names, weight_variance=st.floats(0.5, 4), bias_variance=st.floats(0.01, 1))
def test_the_fixed_cosine_is_fixed(name: str, weight_variance: float, bias_variance: float) -> None:
    phi = ACTIVATIONS[name]
    q = min(theory.fixed_point(phi, weight_variance, bias_variance), 1e12)
    c = theory.correlation_fixed_point(phi, weight_variance, bias_variance)
    assert theory.correlation_map(phi, c, q, weight_variance, bias_variance) == pytest.approx(c, abs=1e-6)


# -- dropout --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "cosine", "scale"),
    [(1.0, 1, None), (0.99, 0.766, 14.5), (0.95, None, 6.8), (0.9, None, 4.7), (0.8, None, 2.9)],
)
def test_dropout_destroys_criticality(keep: float, cosine: float | None, scale: float | None) -> None:
    weight_variance = 1.760955
    fixed = theory.correlation_fixed_point(torch.tanh, weight_variance, 0.05, keep)
    assert cosine is None or fixed == pytest.approx(cosine, abs=5e-4)
    scales = theory.depth_scales(torch.tanh, weight_variance, 0.05, keep)
    assert scale is None or scales.correlation == pytest.approx(scale, abs=0.05)
    assert theory.trainable_depth(torch.tanh, weight_variance, 0.05, keep) == 6 * scales.correlation


@settings(max_examples=15, deadline=None)
@given(name=names, keep=st.floats(0.1, 0.99), bias_variance=st.floats(0.0, 1), excess=st.floats(0.1, 3))
def test_dropout_raises_lengths_and_parts_samples(
    name: str, keep: float, bias_variance: float, excess: float
) -> None:
    phi = ACTIVATIONS[name]
    assert theory.length_map(phi, 0.7, excess, bias_variance, keep) == pytest.approx(
        theory.length_map(phi, 0.7, excess / keep, bias_variance)
    )
    assert theory.gradient_factor(phi, 0.7, excess, keep) == theory.gradient_factor(phi, 0.7, excess / keep)
    assert theory.length_slope(phi, 0.7, excess, keep) == theory.length_slope(phi, 0.7, excess / keep)
    q = min(theory.fixed_point(phi, excess, bias_variance, keep), 1e12)
    c = theory.correlation_fixed_point(phi, excess, bias_variance, keep)
    assert c < 1
    if q:
        assert theory.correlation_map(phi, c, q, excess, bias_variance, keep) == pytest.approx(c, abs=1e-6)


def test_dropout_of_a_constant_leaves_what_the_masks_leave() -> None:
    """Two samples differ by their masks only: c* = (2 + 0) / (2 / keep + 0)."""
    assert theory.correlation_fixed_point(torch.ones_like, 2.0, 0.0, keep=0.8) == pytest.approx(0.8)


@pytest.mark.parametrize(("weight_variance", "keep"), [(1.760955, 0.9), (2.5, 0.8), (0.8, 0.5)])
def test_dropout_in_random_networks(weight_variance: float, keep: float) -> None:
    width, depth, seeds = 512, 30, 4
    bias = 0.05

    def block(h: Tensor) -> Tensor:
        kept = torch.rand_like(h) < keep
        return dense(torch.tanh(h) * kept / keep, weight_variance) + gaussian(width, variance=bias)

    q = theory.fixed_point(torch.tanh, weight_variance, bias, keep)
    cosines, chi = [], 0.0
    for _ in range(seeds):
        h = gaussian(1, width, variance=q).expand(2, -1).clone().requires_grad_()
        stream = [h]
        for _ in range(depth):
            stream.append(block(stream[-1]))
            a, b = stream[-1].detach()
            cosines.append(float(a @ b / a.norm() / b.norm()))
        first, last = torch.autograd.grad(stream[-1], (stream[0], stream[-1]), gaussian(2, width))
        chi += float((first.square().sum() / last.square().sum()).log()) / depth / seeds
    settled = [c for i, c in enumerate(cosines) if i % depth >= 15]
    expected = theory.correlation_fixed_point(torch.tanh, weight_variance, bias, keep)
    # Repeated with eight other seeds, the cosine was off by 0.05 at most, ln chi by 0.025.
    assert sum(settled) / len(settled) == pytest.approx(expected, abs=0.06)
    assert chi == pytest.approx(
        math.log(theory.gradient_factor(torch.tanh, q, weight_variance, keep)), abs=0.03
    )


# -- the edge of chaos ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phi", "bias_variance", "weight_variance", "q"),
    [
        (torch.relu, 0.0, 2, 1),
        (LEAKY, 0.0, 2 / 1.0001, 1),
        (torch.tanh, 0.0, 1, 0),
        (torch.tanh, 2.01e-5, 1.049996, 0.025919),
        (torch.tanh, 0.01, 1.424205, 0.273301),
        (torch.tanh, 0.05, 1.760955, 0.570048),
        (torch.tanh, 0.1, 1.986073, 0.805799),
        (torch.tanh, 0.2, 2.285152, 1.164496),
        (torch.tanh, 0.3, 2.505127, 1.461169),
        (F.elu, 0.05, 1.533718, None),
        (torch.selu, 0.05, 0.901766, None),
        (torch.erf, 0.05, 1.375839, None),
        (lambda u: torch.tanh(u), 0.05, 1.760955, 0.570048),
        (F.hardtanh, 0.0, 1, 0),
    ],
)
def test_critical(
    phi: theory.Activation, bias_variance: float, weight_variance: float, q: float | None
) -> None:
    point = critical(phi, bias_variance)
    assert point is not None
    assert point.stable
    assert point.weight_variance == pytest.approx(weight_variance, abs=2e-6)
    assert q is None or point.q == pytest.approx(q, abs=2e-6)


@pytest.mark.parametrize(
    ("phi", "bias_variance", "weight_variance", "q"),
    [(F.gelu, 0.17292239, 1.98305826, 3.5616), (F.silu, 0.55514317, 1.98800468, 14.3202)],
    ids=["gelu", "silu"],
)
def test_gelu_and_silu_are_half_stable(
    phi: theory.Activation, bias_variance: float, weight_variance: float, q: float
) -> None:
    """Roberts, Yaida, Hanin, The principles of deep learning theory, 2022, section 5.3.4."""
    below, point, above = (critical(phi, bias_variance * x) for x in (0.999, 1.0, 1.001))
    assert below is not None
    assert point is not None
    assert above is not None
    assert (point.weight_variance, point.q) == pytest.approx((weight_variance, q), rel=2e-5)
    assert theory.length_slope(phi, point.q, point.weight_variance) == pytest.approx(1, abs=1e-6)
    assert not below.stable
    assert above.stable


def test_sigmoid_is_critical_only_far_from_use() -> None:
    point = critical(torch.sigmoid)
    assert point is not None
    assert (point.weight_variance, point.q) == pytest.approx((103, 45.6), rel=1e-3)


def test_no_critical_point() -> None:
    assert critical(torch.relu, 0.1) is None
    assert critical(torch.square) is None
    for flat in (torch.sign, torch.ones_like, torch.zeros_like, torch.round):
        assert critical(flat) is None
        assert critical(flat, 0.3) is None
    unstable = critical(F.gelu)
    assert unstable is not None
    assert not unstable.stable


@few
@given(q=st.floats(0.01, 10))
def test_critical_line_of_erf(q: float) -> None:
    weight_variance = math.pi / 4 * math.sqrt(1 + 4 * q)
    bias_variance = q - weight_variance * 2 / math.pi * math.asin(2 * q / (1 + 2 * q))
    point = critical(torch.erf, bias_variance)
    assert point is not None
    assert (point.weight_variance, point.q) == pytest.approx((weight_variance, q), rel=1e-6)
    assert theory.fixed_point(torch.erf, weight_variance, bias_variance) == pytest.approx(q, rel=1e-6)


# -- activations of any kind ----------------------------------------------------------------------------


class Single(nn.Module):
    """Takes float32 only, as layers that hold constants do."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.lerp(torch.tanh(x), torch.zeros(1), 0.0)


@pytest.mark.parametrize(
    ("phi", "like"),
    [
        (Single(), torch.tanh),
        (lambda u: torch.tanh(u.float()), torch.tanh),
        (nn.Hardtanh(), F.hardtanh),
        (nn.Tanh().half(), torch.tanh),
        (lambda u: u.tanh_(), torch.tanh),
        (lambda u: u.clamp(-1, 1), F.hardtanh),
    ],
    ids=["float32-only", "float32-inside", "module", "half", "inplace", "clamp"],
)
def test_critical_of_any_callable(phi: theory.Activation, like: theory.Activation) -> None:
    point, expected = critical(phi, 0.05), critical(like, 0.05)
    assert point is not None
    assert expected is not None
    assert point.weight_variance == pytest.approx(expected.weight_variance, rel=1e-5)
    assert point.stable == expected.stable


@pytest.mark.parametrize("bias_variance", [0.1, 0.5])
@pytest.mark.parametrize(
    ("phi", "slope"),
    [
        (torch.cos, lambda q: (1 - math.exp(-2 * q)) / 2),
        (torch.sin, lambda q: (1 + math.exp(-2 * q)) / 2),
        (torch.exp, lambda q: math.exp(2 * q)),
        (lambda u: torch.relu(u - 0.5), lambda q: math.erfc(0.5 / math.sqrt(2 * q)) / 2),
        (lambda u: torch.where(u > 0.5, u - 0.3, u), lambda _: 1.0),
        (lambda u: torch.tanh(u) + 0.1 * torch.sign(u), lambda q: slope_moment(torch.tanh, q)),
    ],
    ids=["even", "odd", "unbounded", "kink-off-0", "jump-off-0", "jump-at-0"],
)
def test_a_critical_point_is_one(
    phi: theory.Activation, slope: Callable[[float], float], bias_variance: float
) -> None:
    point = critical(phi, bias_variance)
    assert point is not None
    assert point.weight_variance * slope(point.q) == pytest.approx(1, rel=1e-9)
    up, at, down = (
        theory.length_map(phi, point.q * x, point.weight_variance, bias_variance) for x in (1.001, 1, 0.999)
    )
    assert at == pytest.approx(point.q, rel=1e-9)
    rise = (up - down) / (0.002 * point.q)
    assert theory.length_slope(phi, point.q, point.weight_variance) == pytest.approx(rise, rel=1e-4)
    assert point.stable == (rise < 1)


def test_critical_where_every_length_is_fixed() -> None:
    assert critical(torch.abs) == theory.Critical(1.0, 0.0, 1.0, True)
    assert critical(torch.abs, 0.05) is None


def staircase(u: Tensor) -> Tensor:
    return torch.where(u > 0, 1.0, -1.0) + 0.0 * u


def test_jumps_have_angles_of_their_own() -> None:
    """Of sign, E phi phi = 2 / pi asin(c); no gradient passes, and yet angles go to a fixed point."""
    weight_variance, bias_variance = 2.0, 0.3
    q = weight_variance + bias_variance
    for phi in (torch.sign, staircase):
        c = theory.correlation_fixed_point(phi, weight_variance, bias_variance)
        assert q * c == pytest.approx(weight_variance * 2 / math.pi * math.asin(c) + bias_variance, rel=1e-6)
        slope = weight_variance / q * 2 / math.pi / math.sqrt(1 - c * c)
        scales = theory.depth_scales(phi, weight_variance, bias_variance)
        assert scales.correlation == pytest.approx(-1 / math.log(slope), rel=1e-4)
        assert scales.gradient == 0
        assert theory.length_slope(phi, 1.0, weight_variance) == pytest.approx(0, abs=1e-9)


# -- phase diagrams -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tanh", "relu", "gelu", "selu"])
def test_phase_diagram_holds_what_its_points_hold(name: str) -> None:
    phi, weights, biases = ACTIVATIONS[name], (0.5, 1.0, 2.0, 3.0), (0.0, 0.2)
    diagram = theory.phase_diagram(phi, weights, biases)
    assert (diagram.weight_variances, diagram.bias_variances) == (weights, biases)
    for row, bias in enumerate(biases):
        point = critical(phi, bias)
        line = point.weight_variance if point and point.stable else math.nan
        assert float(diagram.critical[row]) == pytest.approx(line, nan_ok=True)
        for column, weight in enumerate(weights):
            q, chi = float(diagram.q[row, column]), float(diagram.chi[row, column])
            assert q == theory.fixed_point(phi, weight, bias)
            assert chi == theory.gradient_factor(phi, q, weight)
            assert bool(diagram.chaotic[row, column]) == (chi > 1 + 1e-9)
            cosine = theory.correlation_fixed_point(phi, weight, bias)
            assert float(diagram.cosine[row, column]) == cosine
            scale = theory.depth_scales(phi, weight, bias).correlation
            assert float(diagram.correlation[row, column]) == scale


def test_the_critical_line_parts_the_phases() -> None:
    diagram = theory.phase_diagram(torch.tanh, [x / 4 for x in range(1, 17)], [0.0, 0.1, 0.3])
    weights = torch.tensor(diagram.weight_variances)
    assert torch.equal(diagram.chaotic, weights > diagram.critical[:, None])
    assert bool((diagram.cosine[diagram.chaotic] < 1).all())
    assert bool((diagram.cosine[~diagram.chaotic] == 1).all())


def test_an_empty_phase_diagram() -> None:
    assert theory.phase_diagram(torch.tanh, [], [0.1]).chi.shape == (1, 0)
