"""Expectations and the maps of one layer, against closed forms and each other."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gradmend import theory
from gradmend.errors import GradmendError, SetupError
from gradmend.theory import critical, expectation, output_moment, slope_moment
from twins import ACTIVATIONS

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


def test_selu_contracts_mean_and_variance() -> None:
    """Klambauer et al., 2017: the Jacobian at (0, 1) is (0, 0.088834; 0, 0.782648), its norm 0.7877."""
    up, down = (expectation(torch.selu, 1 + step) for step in (1e-5, -1e-5))
    mean_slope, length_slope = (up - down) / 2e-5, theory.length_slope(torch.selu, 1.0, 1.0)
    assert mean_slope == pytest.approx(0.088834, abs=1e-6)
    assert math.hypot(mean_slope, length_slope) == pytest.approx(0.7877, abs=5e-5)


def test_scale_of_a_tailored_leaky_relu() -> None:
    """The unit tests of google-deepmind/dks have this pair."""
    phi = partial(F.leaky_relu, negative_slope=0.6291800290346)
    assert output_moment(phi, 1.0) ** -0.5 == pytest.approx(1.1969965497788, rel=1e-12)


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


# -- errors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: theory.length_map(torch.tanh, -1.0, 1.0), "`q` must be 0 or more, not -1.0"),
        (lambda: theory.fixed_point(torch.tanh, -1.0), "`weight_variance`"),
        (lambda: critical(torch.tanh, math.nan), "`bias_variance`"),
        (lambda: theory.correlation_map(torch.tanh, 1.5, 1.0, 1.0), "`c` is a cosine"),
        (lambda: theory.norm_factor(torch.relu, "bacth"), "Did you mean 'batch'"),
        (lambda: theory.norm_factor(torch.relu, "batch", 3), "4 samples"),
        (lambda: theory.norm_factor(torch.relu, "rms", q=-1.0), "`q`"),
        (lambda: theory.residual_growth(torch.relu, 3, 2.0, norm="prae"), "Did you mean 'pre'"),
        (lambda: theory.padding_factor((8, 8), 2), "one odd number"),
        (lambda: theory.padding_factor((8, 8), (3,)), "one per axis"),
        (lambda: theory.padding_factor((8, 0)), "1 or more"),
        (lambda: theory.squared_weight_gradient(1.0, 1.0, 0.0, 0.0, 0), "`batch_size` counts samples: not 0"),
        (lambda: theory.finite_width_deviation(10, 0), "`width`"),
        (lambda: theory.finite_width_mean(10, 0), "`width`"),
        (lambda: theory.length_map(torch.tanh, 1.0, 1.0, keep=0.0), "`keep` is a share"),
        (lambda: theory.depth_scales(torch.tanh, 1.0, keep=1.5), "`keep` is a share"),
        (lambda: theory.phase_diagram(torch.tanh, [-1.0], [0.0]), "`weight_variance`"),
        (lambda: theory.phase_diagram(torch.tanh, [1.0], [-1.0]), "`bias_variance`"),
        (lambda: critical(torch.log), "log has nan"),
        (lambda: critical(np.tanh), "cannot take"),
        (lambda: critical(math.tanh), "cannot take"),
        (lambda: critical(lambda _: {}["key"]), "cannot take.*'key'"),
        (lambda: critical(lambda _: 1.0), "gives a float, not a tensor"),
        (lambda: critical(lambda u: u.detach() ** 3), "Autograd cannot follow"),
        (lambda: critical(nn.ReLU), "not a tensor"),
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
