"""Mean-field theory against closed forms, published and independently computed values, and real networks."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gradmend import theory
from gradmend.errors import GradmendError, SetupError
from gradmend.theory import Layer, critical, expectation, output_moment, predict, slope_moment

LEAKY = partial(F.leaky_relu, negative_slope=0.01)
ACTIVATIONS = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "leaky": LEAKY,
    "elu": F.elu,
    "selu": torch.selu,
    "gelu": F.gelu,
    "silu": F.silu,
    "erf": torch.erf,
}
COSINES = (-1.0, -0.9, -0.3, 0.0, 0.5, 0.99, 0.999999, 1.0)
SCALES = (1e-6, 0.1, 1.0, 30.0, 1e4)

qs = st.floats(-6, 6).map(lambda exponent: 10.0**exponent)
cosines = st.floats(-1, 1)
names = st.sampled_from(sorted(ACTIVATIONS))
few = settings(max_examples=30, deadline=None)


def relu_correlation(c: float) -> float:
    return (math.sqrt(1 - c * c) + (math.pi - math.acos(c)) * c) / math.pi


# -- expectations ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mean", "output", "slope", "gain"),
    [
        ("sigmoid", 0.5, 0.293379, 0.044836, 0.152827),
        ("tanh", 0, 0.394294, 0.464403, 1.177807),
        ("relu", 0.398942, 0.5, 0.5, 1),
        ("leaky", 0.394953, 0.500050, 0.500050, 1),
        ("elu", 0.160521, 0.644945, 0.668102, 1.035905),
        ("selu", 0, 1, 1.071575, 1.071575),
        ("gelu", 0.282095, 0.425221, 0.455851, 1.072032),
        ("silu", 0.206621, 0.355776, 0.379482, 1.066634),
        ("erf", 0, 0.464559, 0.569410, 1.225700),
    ],
)
def test_moments_at_unit_variance(name: str, mean: float, output: float, slope: float, gain: float) -> None:
    phi = ACTIVATIONS[name]
    computed = (expectation(phi, 1.0), output_moment(phi, 1.0), slope_moment(phi, 1.0))
    assert (*computed, theory.isometry_gain(phi)) == pytest.approx((mean, output, slope, gain), abs=6e-7)


@pytest.mark.parametrize("q", [1e-200, *SCALES, 1e12, 1e200])
@pytest.mark.parametrize("a", [0.0, 0.01, 0.3, 1.0])
def test_moments_of_leaky_relu_are_exact(a: float, q: float) -> None:
    phi = partial(F.leaky_relu, negative_slope=a)
    assert expectation(phi, q) == pytest.approx((1 - a) * math.sqrt(q / (2 * math.pi)), rel=1e-12)
    assert output_moment(phi, q) == pytest.approx((1 + a * a) / 2 * q, rel=1e-12)
    assert slope_moment(phi, q) == pytest.approx((1 + a * a) / 2, rel=1e-12)


@pytest.mark.parametrize("q", [1e-6, 1.0, 1e4, 1e8])
def test_moments_of_erf_are_exact(q: float) -> None:
    assert output_moment(torch.erf, q) == pytest.approx(
        2 / math.pi * math.asin(2 * q / (1 + 2 * q)), rel=1e-10
    )
    assert slope_moment(torch.erf, q) == pytest.approx(4 / math.pi / math.sqrt(1 + 4 * q), rel=1e-12)


def dense(f: theory.Activation, q: float) -> float:
    """A slow twin: the midpoint rule in steps far below both scales of the integrand."""
    z = (torch.arange(4_000_000, dtype=torch.float64) + 0.5) * 6e-6 - 12
    return float((f(math.sqrt(q) * z) * torch.exp(-z * z / 2)).sum()) * 6e-6 / math.sqrt(2 * math.pi)


@pytest.mark.parametrize(("phi", "q"), [(torch.tanh, 1e4), (torch.sigmoid, 250.0)])
def test_saturated_moments_are_exact(phi: theory.Activation, q: float) -> None:
    slope = (
        (lambda u: 1 - torch.tanh(u) ** 2) if phi is torch.tanh else (lambda u: F.sigmoid(u) * F.sigmoid(-u))
    )
    assert output_moment(phi, q) == pytest.approx(dense(lambda u: phi(u) ** 2, q), rel=1e-9)
    assert slope_moment(phi, q) == pytest.approx(dense(lambda u: slope(u) ** 2, q), rel=1e-9)


def gaussian_mass(a: float, b: float) -> float:
    return (math.erf(b / math.sqrt(2)) - math.erf(a / math.sqrt(2))) / 2


@pytest.mark.parametrize("q", [0.01, 1.0, 100.0])
@pytest.mark.parametrize(
    ("phi", "low", "high"),
    [
        (F.hardtanh, -1, 1),
        (F.relu6, 0, 6),
        (partial(F.hardtanh, min_val=-0.7, max_val=1.234), -0.7, 1.234),
        (lambda u: u.clamp(-50 / 7, 0.1), -50 / 7, 0.1),
    ],
    ids=["hardtanh", "relu6", "uneven", "lambda"],
)
def test_kinks_away_from_zero(phi: theory.Activation, low: float, high: float, q: float) -> None:
    mass = gaussian_mass(low / math.sqrt(q), high / math.sqrt(q))
    assert slope_moment(phi, q) == pytest.approx(mass, rel=1e-9)


@pytest.mark.parametrize(
    ("f", "mean"), [(torch.sign, 0), (lambda u: (u > 0.3).double(), 0.5 - gaussian_mass(0, 0.3))]
)
def test_jumps(f: theory.Activation, mean: float) -> None:
    assert expectation(f, 1.0) == pytest.approx(mean, abs=1e-9)


@few
@given(a=st.floats(-3, 3), b=st.floats(-3, 3), q=qs)
def test_expectation_is_linear(a: float, b: float, q: float) -> None:
    whole = expectation(lambda u: a * torch.relu(u) + b * torch.cos(u), q)
    parts = a * expectation(torch.relu, q) + b * expectation(torch.cos, q)
    assert whole == pytest.approx(parts, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("inference", [True, False])
def test_modules_are_read_and_left_alone(inference: bool) -> None:
    calls: list[nn.Module] = []
    prelu, inplace = nn.PReLU(init=0.5), nn.ReLU(inplace=True)
    for module in (prelu, inplace):
        module.register_forward_hook(lambda module, *_: calls.append(module))
    with torch.inference_mode(inference):
        assert slope_moment(prelu, 1.0) == pytest.approx(0.625)
        assert output_moment(inplace, 1.0) == pytest.approx(0.5)
        assert theory.correlation_map(inplace, 0.0, 1.0, 2.0) == pytest.approx(1 / math.pi, rel=1e-6)
    assert not calls
    assert prelu.weight.dtype == torch.float32
    assert prelu.weight.grad is None


# -- one layer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("q", SCALES)
@pytest.mark.parametrize("c", COSINES)
def test_correlation_of_relu_is_the_arc_cosine_kernel(c: float, q: float) -> None:
    """Cho, Saul, 2009. Eight digits of 1 - c', which is what deep networks hinge on."""
    computed = 1 - theory.correlation_map(torch.relu, c, q, 2.0)
    assert computed == pytest.approx(1 - relu_correlation(c), rel=1e-7, abs=1e-14)
    assert theory.correlation_slope(torch.relu, c, q, 2.0) == pytest.approx(
        1 - math.acos(c) / math.pi, abs=1e-8
    )


@pytest.mark.parametrize("q", SCALES)
@pytest.mark.parametrize("c", COSINES)
def test_correlation_of_erf(c: float, q: float) -> None:
    """Williams, 1997."""
    length, pair = (2 / math.pi * math.asin(2 * q * x / (1 + 2 * q)) for x in (1, c))
    slope = 4 / math.pi / math.sqrt((1 + 2 * q) ** 2 - 4 * q * q * c * c)
    assert theory.correlation_map(torch.erf, c, q, 1.3) == pytest.approx(pair / length, abs=1e-7)
    assert theory.correlation_slope(torch.erf, c, q, 1.3) == pytest.approx(1.3 * slope, rel=1e-7)


@pytest.mark.parametrize("c", COSINES)
def test_correlation_of_leaky_relu(c: float) -> None:
    a = 0.3
    expected = ((1 - a) ** 2 * relu_correlation(c) + 2 * a * c) / (1 + a * a)
    phi = partial(F.leaky_relu, negative_slope=a)
    assert theory.correlation_map(phi, c, 1.0, 1.7) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("c", [-0.8, 0.2, 0.95])
def test_correlation_slope_is_a_slope(name: str, c: float) -> None:
    phi, q, step = ACTIVATIONS[name], 0.7, 1e-4
    length = theory.length_map(phi, q, 1.3, 0.1)
    after, before = (theory.correlation_map(phi, c + d, q, 1.3, 0.1) for d in (step, -step))
    slope = theory.correlation_slope(phi, c, q, 1.3) * q / length
    assert slope == pytest.approx((after - before) / (2 * step), rel=1e-5)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("q", [0.01, 1.0, 50.0])
def test_length_slope_is_a_slope(name: str, q: float) -> None:
    phi = ACTIVATIONS[name]
    after, before = (theory.length_map(phi, q * x, 1.3) for x in (1 + 1e-5, 1 - 1e-5))
    assert theory.length_slope(phi, q, 1.3) == pytest.approx((after - before) / (2e-5 * q), rel=1e-7)


def test_selu_normalizes_itself_forward_but_not_backward() -> None:
    alpha, scale = 1.6732632423543778, 1.0507009873554805
    chi = scale**2 * (0.5 + alpha**2 * math.exp(2) * math.erfc(math.sqrt(2)) / 2)
    assert theory.fixed_point(torch.selu, 1.0) == pytest.approx(1, abs=1e-10)
    assert theory.length_slope(torch.selu, 1.0, 1.0) == pytest.approx(0.782648, abs=1e-6)
    assert theory.gradient_factor(torch.selu, 1.0, 1.0) == pytest.approx(chi, rel=1e-12)
    assert chi == pytest.approx(1.07157499, abs=1e-8)


@few
@given(name=names, q=qs, factor=st.floats(1.01, 100))
def test_length_map_is_monotone(name: str, q: float, factor: float) -> None:
    phi = ACTIVATIONS[name]
    assert theory.length_map(phi, q * factor, 1.0) > theory.length_map(phi, q, 1.0)


@few
@given(name=names, c=cosines, q=qs, bias=st.floats(0, 1))
def test_correlation_map_stays_a_cosine_and_keeps_one(name: str, c: float, q: float, bias: float) -> None:
    phi = ACTIVATIONS[name]
    assert -1 - 1e-7 <= theory.correlation_map(phi, c, q, 1.5, bias) <= 1
    assert theory.correlation_map(phi, 1.0, q, 1.5, bias) == 1


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
    phi, q = ACTIVATIONS[name], 1.0
    fixed = theory.fixed_point(phi, weight_variance, bias_variance)
    q = predict([Layer(phi, weight_variance, bias_variance)] * 301, 1.0, 1.0).q[-1]
    if abs(theory.length_slope(phi, min(max(fixed, 1e-9), 1e9), weight_variance) - 1) > 0.1:
        assert fixed == pytest.approx(q, rel=1e-6, abs=1e-9) or math.isinf(fixed) == (q > 1e9)


@pytest.mark.parametrize(
    ("weight_variance", "chi", "cosine", "scale"),
    [
        (1.0, 0.75903, 1, 3.63),
        (1.3, 0.88016, 1, 7.83),
        (1.5, 0.93864, 1, 15.79),
        (2.0, 1.04767, 0.74408, 25.21),
        (2.5, 1.13352, 0.44680, 11.80),
        (3.0, 1.20893, 0.29932, 9.05),
        (4.0, 1.34240, 0.16506, 6.98),
    ],
)
def test_depth_scales_of_tanh(weight_variance: float, chi: float, cosine: float, scale: float) -> None:
    q = theory.fixed_point(torch.tanh, weight_variance, 0.05)
    scales = theory.depth_scales(torch.tanh, weight_variance, 0.05)
    assert theory.gradient_factor(torch.tanh, q, weight_variance) == pytest.approx(chi, abs=6e-6)
    assert theory.correlation_fixed_point(torch.tanh, weight_variance, 0.05) == pytest.approx(
        cosine, abs=6e-6
    )
    assert scales.correlation == pytest.approx(scale, abs=6e-3)
    assert scales.gradient == pytest.approx(1 / abs(math.log(chi)), rel=1e-3)
    assert scales.length == pytest.approx(1 / -math.log(theory.length_slope(torch.tanh, q, weight_variance)))
    assert theory.trainable_depth(torch.tanh, weight_variance, 0.05) == 6 * scales.correlation


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
    assert critical(torch.sign) is None
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


# -- other factors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch_size", "factor"),
    [(8, 1.7882), (16, 1.5900), (32, 1.5220), (64, 1.4931), (256, 1.4732), (None, 1.46694)],
)
def test_batch_normalization_makes_relu_explode(batch_size: int | None, factor: float) -> None:
    assert theory.norm_factor(nn.ReLU(), "batch", batch_size) == pytest.approx(factor, abs=6e-5)


def test_norm_factors() -> None:
    assert theory.norm_factor(torch.relu, "batch") == pytest.approx(math.pi / (math.pi - 1), rel=1e-12)
    assert theory.norm_factor(torch.tanh, "batch", 64) == theory.isometry_gain(torch.tanh)
    for kind in ("layer", "rms"):
        assert theory.norm_factor(F.gelu, kind) == pytest.approx(1.072032, abs=1e-6)


def test_residual_factor() -> None:
    depth = 100
    bounded = theory.residual_factor(torch.relu, 1.0, 2.0, 1 / math.sqrt(depth)) ** depth
    assert bounded == pytest.approx((1 + 1 / depth) ** depth, rel=1e-10)
    assert theory.residual_factor(torch.tanh, 1.0, 2.0, 0.0) == 1


def test_finite_width_deviation() -> None:
    assert theory.finite_width_deviation(100, 256) == pytest.approx(1.40, abs=0.005)


# -- whole stacks ---------------------------------------------------------------------------------------

WIDTH = 512
VARIANCES = {"small": WIDTH * 0.01**2, "unit": WIDTH * 1.0, "default": 1 / 3, "xavier": 1.0, "he": 2.0}


@pytest.mark.parametrize(
    ("name", "chis", "decades"),
    [
        ("sigmoid", (0.00318, 2.170, 0.0200, 0.0556, 0.1006), (-124, 17, -84, -62, -49)),
        ("tanh", (0.0512, 12.25, 0.331, 0.952, 1.096), (-64, 54, -24, -1.1, 2.0)),
        ("relu", (0.0256, 256, 0.1667, 0.5, 1), (-79, 119, -39, -15, 0)),
        ("leaky", (0.0256, 256, 0.1667, 0.5, 1), (-79, 119, -39, -15, 0)),
        ("elu", (0.0511, 256, 0.331, 0.931, 1.083), (-64, 119, -24, -1.5, 1.7)),
        ("selu", (0.1070, 282.8, 0.685, 1.0718, 1.175), (-48, 121, -8.1, 1.5, 3.5)),
        ("gelu", (0.0128, 256, 0.0838, 0.2537, 0.543), (-94, 119, -53, -30, -13)),
        ("silu", (0.0128, 256, 0.0836, 0.2520, 0.515), (-94, 119, -53, -30, -14)),
    ],
)
def test_gradients_over_100_layers(name: str, chis: tuple[float, ...], decades: tuple[float, ...]) -> None:
    """The column of orthogonal weights is that of Xavier: fan_in x Var(W) = 1 in both."""
    for weight_variance, chi, decade in zip(VARIANCES.values(), chis, decades, strict=True):
        log_gradient = predict([Layer(ACTIVATIONS[name], weight_variance)] * 100, 1.0, 0.0).log_gradient
        # The reference is a mean over layers that starts elsewhere, which shows in the third digit.
        assert math.exp(log_gradient[0] / 99) == pytest.approx(chi, rel=4e-3)
        assert log_gradient[0] / math.log(10) / 2 == pytest.approx(
            decade, abs=0.06 if abs(decade) < 10 else 0.6
        )
        assert log_gradient[-1] == 0


def stack(x: Tensor, layer: Layer, depth: int) -> list[Tensor]:
    """The pre-activations of a real random network, all of one width."""
    hidden = [x]
    for index in range(depth):
        signal = layer.phi(hidden[-1]) if index and layer.phi else hidden[-1]
        weight = torch.randn(WIDTH, WIDTH, dtype=torch.float64) * math.sqrt(layer.weight_variance / WIDTH)
        bias = torch.randn(WIDTH, dtype=torch.float64) * math.sqrt(layer.bias_variance)
        hidden.append(signal @ weight.T + bias)
    return hidden[1:]


def observe(layer: Layer, depth: int) -> Tensor:
    """ln q, cosine and ln(|d_l|^2 / |d_L|^2) of every layer of one random network."""
    x = torch.randn(2, WIDTH, dtype=torch.float64)
    x[1] = 0.6 * x[0] + 0.8 * x[1]
    x = F.normalize(x) * math.sqrt(WIDTH)
    x.requires_grad_()
    hidden = stack(x, layer, depth)
    cotangent = torch.randn(2, WIDTH, dtype=torch.float64)
    gradients = torch.autograd.grad(hidden[-1], hidden, cotangent)
    lengths = torch.stack([h.square().mean().log() for h in hidden])
    cosine = torch.stack([h[0] / h[0].norm() @ (h[1] / h[1].norm()) for h in hidden])
    norms = torch.stack([g.square().sum().log() for g in gradients])
    return torch.stack((lengths, cosine, norms - norms[-1])).detach()


@pytest.mark.parametrize(
    ("name", "weight_variance", "bias_variance", "depth"),
    [
        ("relu", 2.0, 0.0, 50),
        ("relu", 1 / 3, 0.0, 30),
        ("leaky", 2.2, 0.1, 20),
        ("tanh", 1.760955, 0.05, 50),
        ("tanh", 4.0, 0.05, 20),
        ("sigmoid", 1.0, 0.1, 10),
        ("elu", 1.5, 0.05, 30),
        ("selu", 1.0, 0.0, 30),
        ("gelu", 2.0, 0.2, 30),
        ("silu", 1.0, 0.0, 20),
    ],
)
def test_predictions_against_real_networks(
    name: str, weight_variance: float, bias_variance: float, depth: int
) -> None:
    torch.manual_seed(0)
    seeds = 5
    layer = Layer(ACTIVATIONS[name], weight_variance, bias_variance)
    lengths, cosines, gradients = torch.stack([observe(layer, depth) for _ in range(seeds)]).mean(0)
    prediction = predict([layer] * depth, 1.0, 0.6)
    # One network strays by sqrt(5 L / N), and its logarithm lies 5 L / 2 N too low.
    tolerance = 4 * theory.finite_width_deviation(depth, WIDTH) / math.sqrt(seeds) + 2.5 * depth / WIDTH
    assert lengths.tolist() == pytest.approx([math.log(q) for q in prediction.q], abs=tolerance)
    assert gradients.tolist() == pytest.approx(prediction.log_gradient, abs=tolerance)
    # A sample cosine strays by 1 / sqrt(N) at once, and by a few times that after several layers.
    assert cosines.tolist() == pytest.approx(prediction.cosine, abs=4 * 2.5 / math.sqrt(WIDTH * seeds))


def test_predict_is_the_maps_iterated() -> None:
    layers = [
        Layer(torch.tanh, 1.5, 0.1),
        Layer(None, 0.5, 0.2),
        Layer(F.gelu, 2.0, 0.0),
        Layer(None, 3.0, 0.0),
    ]
    prediction = predict(layers, q0=2.0, c0=0.4)
    q1 = 1.5 * 2.0 + 0.1
    c1 = (1.5 * 2.0 * 0.4 + 0.1) / q1
    q2 = theory.length_map(torch.tanh, q1, 0.5, 0.2)
    c2 = theory.correlation_map(torch.tanh, c1, q1, 0.5, 0.2)
    q3, c3 = 2.0 * q2, c2
    q4 = theory.length_map(F.gelu, q3, 3.0)
    c4 = theory.correlation_map(F.gelu, c3, q3, 3.0)
    chis = (theory.gradient_factor(torch.tanh, q1, 0.5), 2.0, theory.gradient_factor(F.gelu, q3, 3.0))
    logs = [math.log(chi) for chi in chis]
    assert prediction.q == pytest.approx((q1, q2, q3, q4))
    assert prediction.cosine == pytest.approx((c1, c2, c3, c4))
    assert prediction.log_gradient == pytest.approx((sum(logs), sum(logs[1:]), logs[2], 0))


def test_collapse_of_relu_follows_its_power_law() -> None:
    """1 - c_l approaches 9 pi^2 / (2 l^2), which only a map exact near c = 1 can show."""
    depth = 2000
    gap = 1 - predict([Layer(torch.relu, 2.0)] * depth, 1.0, 0.0).cosine[-1]
    assert gap == pytest.approx(4.5 * math.pi**2 / depth**2, rel=0.02)


@pytest.mark.parametrize("weight_variance", [1e-6, 1e6])
def test_predict_survives_the_ends_of_float64(weight_variance: float) -> None:
    prediction = predict([Layer(torch.relu, weight_variance)] * 1000, 1.0, 0.0)
    assert prediction.log_gradient[0] == pytest.approx(999 * math.log(weight_variance / 2), rel=1e-9)
    assert all(map(math.isfinite, prediction.q))
    assert prediction.cosine[-1] == pytest.approx(
        predict([Layer(torch.relu, 2.0)] * 1000, 1.0, 0.0).cosine[-1]
    )


def test_predict_with_dead_weights() -> None:
    prediction = predict(
        [Layer(torch.tanh, 1.0), Layer(torch.tanh, 0.0, 0.0), Layer(torch.tanh, 1.0)], 1.0, 0.0
    )
    assert prediction.cosine[1:] == (1.0, 1.0)
    assert prediction.log_gradient[0] == -math.inf


# -- errors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: theory.length_map(torch.tanh, -1.0, 1.0), "`q` must be 0 or more, not -1.0"),
        (lambda: theory.fixed_point(torch.tanh, -1.0), "`weight_variance`"),
        (lambda: critical(torch.tanh, math.nan), "`bias_variance`"),
        (lambda: theory.correlation_map(torch.tanh, 1.5, 1.0, 1.0), "`c` is a cosine"),
        (lambda: predict([Layer(torch.tanh, 1.0)], 1.0, -2.0), "`c0` is a cosine"),
        (lambda: predict([], 1.0, 0.0), "one layer at least"),
        (lambda: Layer(torch.tanh, -1.0), "`weight_variance`"),
        (lambda: theory.norm_factor(torch.relu, "bacth"), "Did you mean 'batch'"),
        (lambda: theory.norm_factor(torch.relu, "batch", 3), "4 samples"),
        (lambda: theory.finite_width_deviation(10, 0), "`width`"),
        (lambda: slope_moment(torch.sum, 1.0), "sum is not elementwise"),
        (lambda: slope_moment(nn.Softmax(dim=-1), 1.0), "not elementwise"),
        (lambda: slope_moment(nn.Linear(3, 3), 1.0), "cannot take"),
    ],
)
def test_errors_say_what_was_given(call: theory.Activation, said: str) -> None:
    with pytest.raises(SetupError, match=said) as error:
        call()  # type: ignore[call-arg]
    assert isinstance(error.value, GradmendError)


def test_exports() -> None:
    assert sorted(theory.__all__) == theory.__all__
    assert all(hasattr(theory, name) for name in theory.__all__)
