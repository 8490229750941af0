"""Predictions for whole stacks of layers, against published values and random networks."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gradmend import theory
from gradmend.theory import Elementwise, Gradient, Linear, Rule, Signal, propagate
from twins import ACTIVATIONS

WIDTH = 512
VARIANCES = {"small": WIDTH * 0.01**2, "unit": WIDTH * 1.0, "default": 1 / 3, "xavier": 1.0, "he": 2.0}


def stack(
    phi: theory.Activation, weight_variance: float, depth: int, bias_variance: float = 0.0
) -> list[Rule]:
    """Its pre-activations are at every second place."""
    layers = [Linear(weight_variance, bias_variance), Elementwise(phi)] * depth
    return layers[:-1]


def decades(found: theory.Prediction) -> float:
    """log10(|d_1| / |d_L|)."""
    return found.log_gradients[0] / math.log(100)


@pytest.mark.parametrize(
    ("name", "chis", "logs"),
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
def test_gradients_over_100_layers(name: str, chis: tuple[float, ...], logs: tuple[float, ...]) -> None:
    """The column of orthogonal weights is that of Xavier: fan_in x Var(W) = 1 in both."""
    for weight_variance, chi, log in zip(VARIANCES.values(), chis, logs, strict=True):
        found = propagate(stack(ACTIVATIONS[name], weight_variance, 100), Signal(1.0, gap=1.0))
        # The reference is a mean over layers that starts elsewhere, which shows in the third digit.
        assert math.exp(found.log_gradients[0] / 99) == pytest.approx(chi, rel=4e-3)
        assert decades(found) == pytest.approx(log, abs=0.06 if abs(log) < 10 else 0.6)
        assert found.log_gradients[-1] == 0


@pytest.mark.parametrize(
    ("name", "chi", "log"),
    [
        ("relu", 1 / 6, -19),
        ("tanh", 1 / 3, -12),
        ("gelu", 1 / 12, -26),
        ("silu", 1 / 12, -26),
        ("sigmoid", 0.02, -42),
    ],
)
def test_the_default_of_torch_vanishes(name: str, chi: float, log: float) -> None:
    """`nn.Linear` has fan_in x Var(W) = 1/3."""
    found = propagate(stack(ACTIVATIONS[name], 1 / 3, 50), Signal(1.0, gap=1.0))
    assert math.exp(found.log_gradients[-3]) == pytest.approx(chi, rel=2e-3)
    assert decades(found) == pytest.approx(log, abs=0.5)


def test_selu_explodes_slowly() -> None:
    found = propagate(stack(torch.selu, 1.0, 101), Signal(1.0, gap=1.0))
    assert math.exp(found.log_gradients[0]) == pytest.approx(1005, rel=1e-3)


@pytest.mark.parametrize(
    ("depth", "slope"),
    [(20, 0.181380), (50, 0.430523), (100, 0.570440), (200, 0.679600), (500, 0.786240)],
)
def test_tailored_leaky_relu_keeps_inputs_apart(depth: int, slope: float) -> None:
    """Zhang, Botev, Martens, Deep learning without shortcuts, 2022: cosine 0.9 where ReLU comes near 1."""
    phi = partial(F.leaky_relu, negative_slope=slope)
    output = (1 + slope**2) / 2
    tailored = propagate(stack(phi, 1 / output, depth + 1), Signal(output, gap=1.0))
    assert tailored.cosines[-1] == pytest.approx(0.9, abs=1e-6)
    assert tailored.lengths[-1] == pytest.approx(1, rel=1e-9)
    assert tailored.log_gradients[0] == pytest.approx(0, abs=1e-9)


def test_inputs_collapse_in_relu_networks() -> None:
    cosines = propagate(stack(torch.relu, 2.0, 101), Signal(1.0, gap=1.0)).cosines[::2]
    assert (cosines[50], cosines[100]) == pytest.approx((0.988, 0.996), abs=5e-4)


def play(x: Tensor, phi: theory.Activation, layer: Linear, depth: int) -> list[Tensor]:
    """The pre-activations of a real random network, all of one width."""
    hidden = [x]
    for index in range(depth):
        signal = phi(hidden[-1]) if index else hidden[-1]
        weight = torch.randn(WIDTH, WIDTH, dtype=torch.float64) * math.sqrt(layer.weight_variance / WIDTH)
        bias = torch.randn(WIDTH, dtype=torch.float64) * math.sqrt(layer.bias_variance)
        hidden.append(signal @ weight.T + bias)
    return hidden[1:]


def observe(phi: theory.Activation, layer: Linear, depth: int) -> Tensor:
    """ln q, cosine and ln(|d_l|^2 / |d_L|^2) of every layer of one random network."""
    x = torch.randn(2, WIDTH, dtype=torch.float64)
    x[1] = 0.6 * x[0] + 0.8 * x[1]
    x = F.normalize(x) * math.sqrt(WIDTH)
    x.requires_grad_()
    hidden = play(x, phi, layer, depth)
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
    seeds, phi = 5, ACTIVATIONS[name]
    layer = Linear(weight_variance, bias_variance)
    lengths, cosines, gradients = torch.stack([observe(phi, layer, depth) for _ in range(seeds)]).mean(0)
    found = propagate(stack(phi, weight_variance, depth, bias_variance), Signal(1.0, gap=0.4))
    # One network strays by sqrt(5 L / N), and its logarithm lies 5 L / 2 N too low.
    tolerance = 4 * theory.finite_width_deviation(depth, WIDTH) / math.sqrt(seeds) + 2.5 * depth / WIDTH
    assert lengths.tolist() == pytest.approx([math.log(q) for q in found.lengths[::2]], abs=tolerance)
    assert gradients.tolist() == pytest.approx(found.log_gradients[::2], abs=tolerance)
    # A sample cosine strays by 1 / sqrt(N) at once, and by a few times that after several layers.
    assert cosines.tolist() == pytest.approx(found.cosines[::2], abs=4 * 2.5 / math.sqrt(WIDTH * seeds))


def test_a_stack_is_the_maps_iterated() -> None:
    tanh, gelu = Elementwise(torch.tanh), Elementwise(F.gelu)
    layers = [Linear(1.5, 0.1), tanh, Linear(0.5, 0.2), Linear(2.0), gelu, Linear(3.0)]
    found = propagate(layers, Signal(2.0, gap=0.6), {5: Gradient(cosine=0.3)})
    q1 = 1.5 * 2.0 + 0.1
    c1 = (1.5 * 2.0 * 0.4 + 0.1) / q1
    q2 = theory.length_map(torch.tanh, q1, 0.5, 0.2)
    c2 = theory.correlation_map(torch.tanh, c1, q1, 0.5, 0.2)
    q3, c3 = 2.0 * q2, c2
    q4 = theory.length_map(F.gelu, q3, 3.0)
    c4 = theory.correlation_map(F.gelu, c3, q3, 3.0)
    chis = (theory.gradient_factor(torch.tanh, q1, 0.5), 2.0, theory.gradient_factor(F.gelu, q3, 3.0))
    logs = [math.log(chi) for chi in chis]
    linear = (0, 2, 3, 5)
    assert [found.lengths[i] for i in linear] == pytest.approx([q1, q2, q3, q4])
    assert [found.cosines[i] for i in linear] == pytest.approx([c1, c2, c3, c4], abs=1e-6)
    assert [found.log_gradients[i] for i in linear] == pytest.approx([sum(logs), sum(logs[1:]), logs[2], 0])
    cross = theory.correlation_slope(F.gelu, c3, q3, 3.0) * theory.correlation_slope(torch.tanh, c1, q1, 0.5)
    first = found.gradients[0]
    assert first is not None
    assert first.cosine * math.exp(first.log) == pytest.approx(0.3 * 2.0 * cross, rel=1e-5)


def test_collapse_of_relu_follows_its_power_law() -> None:
    """1 - c_l approaches 9 pi^2 / (2 l^2), which only a map exact near c = 1 can show."""
    last = propagate(stack(torch.relu, 2.0, 2000), Signal(1.0, gap=1.0)).signals[-1]
    assert last is not None
    assert last.gap == pytest.approx(4.5 * math.pi**2 / 2000**2, rel=0.02)


@pytest.mark.parametrize("weight_variance", [1e-6, 1e6])
def test_the_ends_of_float64(weight_variance: float) -> None:
    found, usual = (
        propagate(stack(torch.relu, v, 200), Signal(1.0, gap=1.0)) for v in (weight_variance, 2.0)
    )
    assert found.log_gradients[0] == pytest.approx(199 * math.log(weight_variance / 2), rel=1e-9)
    assert all(map(math.isfinite, found.lengths))
    assert found.cosines[-1] == pytest.approx(usual.cosines[-1])


def test_dead_weights() -> None:
    tanh = Elementwise(torch.tanh)
    found = propagate([Linear(1.0), tanh, Linear(0.0), tanh, Linear(1.0)], Signal(1.0, gap=1.0))
    assert found.cosines[2:] == (1.0, 1.0, 1.0)
    assert found.log_gradients[0] == -math.inf
