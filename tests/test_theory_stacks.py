"""Predictions for whole stacks of layers, against published values and random networks."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from gradmend import theory
from gradmend.theory import Layer, predict
from twins import ACTIVATIONS

qs = st.floats(-6, 6).map(lambda exponent: 10.0**exponent)
names = st.sampled_from(sorted(ACTIVATIONS))
few = settings(max_examples=30, deadline=None)


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


@pytest.mark.parametrize(
    ("name", "chi", "decades"),
    [
        ("relu", 1 / 6, -19),
        ("tanh", 1 / 3, -12),
        ("gelu", 1 / 12, -26),
        ("silu", 1 / 12, -26),
        ("sigmoid", 0.02, -42),
    ],
)
def test_the_default_of_torch_vanishes(name: str, chi: float, decades: float) -> None:
    """`nn.Linear` has fan_in x Var(W) = 1/3."""
    logs = predict([Layer(ACTIVATIONS[name], 1 / 3)] * 50, 1.0, 0.0).log_gradient
    assert math.exp(logs[-2]) == pytest.approx(chi, rel=2e-3)
    assert logs[0] / math.log(10) / 2 == pytest.approx(decades, abs=0.5)


def test_selu_explodes_slowly() -> None:
    logs = predict([Layer(torch.selu, 1.0)] * 101, 1.0, 0.0).log_gradient
    assert math.exp(logs[0]) == pytest.approx(1005, rel=1e-3)


@pytest.mark.parametrize(
    ("depth", "slope"),
    [(20, 0.181380), (50, 0.430523), (100, 0.570440), (200, 0.679600), (500, 0.786240)],
)
def test_tailored_leaky_relu_keeps_inputs_apart(depth: int, slope: float) -> None:
    """Zhang, Botev, Martens, Deep learning without shortcuts, 2022: cosine 0.9 where ReLU comes near 1."""
    phi = partial(F.leaky_relu, negative_slope=slope)
    output = (1 + slope**2) / 2
    tailored = predict([Layer(phi, 1 / output)] * (depth + 1), output, 0.0)
    assert tailored.cosine[-1] == pytest.approx(0.9, abs=1e-6)
    assert tailored.q[-1] == pytest.approx(1, rel=1e-9)
    assert tailored.log_gradient[0] == pytest.approx(0, abs=1e-9)


def test_inputs_collapse_in_relu_networks() -> None:
    cosine = predict([Layer(torch.relu, 2.0)] * 101, 1.0, 0.0).cosine
    assert (cosine[50], cosine[100]) == pytest.approx((0.988, 0.996), abs=5e-4)


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
    prediction = predict([Layer(torch.relu, weight_variance)] * 200, 1.0, 0.0)
    assert prediction.log_gradient[0] == pytest.approx(199 * math.log(weight_variance / 2), rel=1e-9)
    assert all(map(math.isfinite, prediction.q))
    assert prediction.cosine[-1] == pytest.approx(
        predict([Layer(torch.relu, 2.0)] * 200, 1.0, 0.0).cosine[-1]
    )


def test_predict_with_dead_weights() -> None:
    prediction = predict(
        [Layer(torch.tanh, 1.0), Layer(torch.tanh, 0.0, 0.0), Layer(torch.tanh, 1.0)], 1.0, 0.0
    )
    assert prediction.cosine[1:] == (1.0, 1.0)
    assert prediction.log_gradient[0] == -math.inf
