"""Normalization, residual branches, padding, weight gradients and finite width, against random networks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmend import theory
from gradmend.theory import Elementwise, Linear, Signal, propagate
from twins import ACTIVATIONS, dense, gaussian, growth, linear

WIDTH = 256


def normalize(h: Tensor, kind: str) -> Tensor:
    if kind == "rms":
        return F.rms_norm(h, h.shape[1:])
    return F.layer_norm(h, h.shape[1:]) if kind == "layer" else F.batch_norm(h, None, None, training=True)


# -- normalization --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch_size", "factor"),
    [(8, 1.7882), (16, 1.5900), (32, 1.5220), (64, 1.4931), (256, 1.4732), (None, 1.46694)],
)
def test_batch_normalization_makes_relu_explode(batch_size: int | None, factor: float) -> None:
    assert theory.norm_factor(nn.ReLU(), "batch", batch_size) == pytest.approx(factor, abs=6e-5)


@pytest.mark.parametrize("batch_size", [4, 5, 8, 33, 1000])
def test_batch_factor_of_relu_is_that_of_theorem_8(batch_size: int) -> None:
    """Yang et al., 2019. A sphere in few dimensions is where quadrature could fail."""
    c = -1 / (batch_size - 1)
    angle = math.acos(c)
    image, slope = (math.sqrt(1 - c * c) + (math.pi - angle) * c) / math.pi, 1 - angle / math.pi
    exact = (slope + batch_size - 1) / ((batch_size - 3) * (1 - image)) - 1 / (batch_size - 3)
    assert theory.norm_factor(torch.relu, "batch", batch_size) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("batch_size", [4, 8, 16, 64])
def test_batch_factor_of_a_linear_net(batch_size: int) -> None:
    exact = (batch_size - 2) / (batch_size - 3)
    assert theory.norm_factor(linear, "batch", batch_size) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("name", ["tanh", "gelu", "selu", "elu"])
def test_large_batches_come_to_their_limit(name: str) -> None:
    phi = ACTIVATIONS[name]
    limit = theory.norm_factor(phi, "batch", q=1.7)
    assert theory.norm_factor(phi, "batch", 100_000, q=1.7) == pytest.approx(limit, rel=1e-4)


def test_norm_factors() -> None:
    explosion = math.pi / (math.pi - 1)
    assert theory.norm_factor(torch.relu, "batch") == pytest.approx(explosion, rel=1e-12)
    assert theory.norm_factor(torch.relu, "layer", after=True) == pytest.approx(explosion, rel=1e-12)
    assert theory.norm_factor(torch.relu, "rms", after=True, q=2.0) == pytest.approx(1, rel=1e-12)
    assert theory.norm_factor(torch.relu, "layer") == pytest.approx(1, rel=1e-12)
    for kind in ("layer", "rms"):
        assert theory.norm_factor(F.gelu, kind) == pytest.approx(1.072032, abs=1e-6)
    assert theory.norm_factor(torch.tanh, "batch") == theory.isometry_gain(torch.tanh)
    assert math.isnan(theory.norm_factor(torch.ones_like, "layer", after=True))


@pytest.mark.parametrize("name", ["relu", "tanh", "gelu"])
@pytest.mark.parametrize(
    ("kind", "after", "weight_variance"),
    [("layer", False, 1.0), ("rms", False, 1.0), ("layer", True, 2.0), ("rms", True, 2.0)],
    ids=["layer-before", "rms-before", "layer-after", "rms-after"],
)
def test_norms_in_random_networks(name: str, kind: str, after: bool, weight_variance: float) -> None:
    phi = ACTIVATIONS[name]

    def block(h: Tensor) -> Tensor:
        return dense(normalize(phi(h), kind) if after else phi(normalize(h, kind)), weight_variance)

    measured = growth(block, lambda: gaussian(8, WIDTH), depth=30, seeds=3, skip=6)[1]
    factor = theory.norm_factor(phi, kind, after=after, q=weight_variance if after else 1.0)
    # Repeated with eight other seeds, ln chi was off by 0.02 at most.
    assert measured == pytest.approx(math.log(factor), abs=0.025)


@pytest.mark.parametrize(
    ("phi", "batch_size"),
    [(torch.relu, 8), (torch.relu, 32), (torch.tanh, 8), (F.gelu, 16), (linear, 8)],
    ids=["relu-8", "relu-32", "tanh-8", "gelu-16", "linear-8"],
)
def test_batch_norm_in_random_networks(phi: theory.Activation, batch_size: int) -> None:
    measured = growth(
        lambda h: dense(phi(normalize(h, "batch")), 1.0),
        lambda: gaussian(batch_size, WIDTH),
        depth=40,
        seeds=4,
        skip=12,
    )[1]
    # Repeated with eight other seeds, ln chi was off by 0.028 at most. Samples keep apart after 12 layers.
    assert measured == pytest.approx(math.log(theory.norm_factor(phi, "batch", batch_size)), abs=0.03)


@pytest.mark.parametrize(("name", "exponent"), [("silu", 1.1009), ("gelu", 1.0621), ("elu", 0.8602)])
def test_batch_normalization_parts_samples_by_the_exponent_of_the_variance(
    name: str, exponent: float
) -> None:
    """A quarter of a batch that is a little longer than the rest is so by that power one layer on."""
    phi = ACTIVATIONS[name]
    variances = [theory.output_moment(phi, q) - theory.expectation(phi, q) ** 2 for q in (1.001, 0.999)]
    assert math.log(variances[0] / variances[1]) / math.log(1.001 / 0.999) == pytest.approx(
        exponent, abs=1e-4
    )
    h, weight = normalize(gaussian(256, 2048), "batch"), gaussian(2048, 512)
    longer = torch.cat((h[:64] * math.sqrt(1.05), h[64:]))
    lengths = [normalize(phi(x) @ weight, "batch").square().mean(1) for x in (longer, h)]
    grown = lengths[0].log() - lengths[1].log()
    assert float(grown[:64].mean() - grown[64:].mean()) / math.log(1.05) == pytest.approx(exponent, abs=0.03)


def test_batch_norm_depth() -> None:
    assert theory.batch_norm_depth(torch.relu) == pytest.approx(16 / math.log(1.46694), rel=1e-4)
    assert theory.batch_norm_depth(torch.relu, 8) < theory.batch_norm_depth(torch.relu, 64)
    assert theory.batch_norm_depth(linear) == math.inf
    assert theory.batch_norm_depth(torch.sign) == 0
    assert math.isnan(theory.batch_norm_depth(torch.ones_like))


# -- residual branches ----------------------------------------------------------------------------------


def test_residual_growth_of_relu() -> None:
    """The three laws: exponential, bounded by e, none."""
    depth = 99
    grown = theory.residual_growth(torch.relu, depth, 2.0)
    assert math.exp(grown.log_length) == pytest.approx(6e29, rel=0.06)
    assert grown.log_gradient == pytest.approx(depth * math.log(2), rel=1e-12)
    bounded = theory.residual_growth(torch.relu, depth, 2.0, scale=0.1)
    assert math.exp(bounded.log_length) == pytest.approx(2.68, abs=0.005)
    deep = theory.residual_growth(torch.relu, 2500, 2.0, scale=0.02)
    assert deep.log_gradient == pytest.approx(1, abs=1e-3)
    beyond_float64 = theory.residual_growth(torch.relu, 2000, 2.0)
    assert beyond_float64.log_gradient == pytest.approx(2000 * math.log(2), rel=1e-12)
    assert beyond_float64.log_length == pytest.approx(2000 * math.log(2), rel=1e-12)
    assert theory.residual_growth(torch.tanh, depth, 2.0, scale=0.0) == theory.Growth(0.0, 0.0)


def test_residual_growth_of_tanh_is_exponential_in_the_root_of_depth() -> None:
    logs = [theory.residual_growth(torch.tanh, depth, 1.0).log_gradient for depth in (400, 1600, 6400)]
    assert logs[1] / logs[0] == pytest.approx(2, rel=0.01)
    assert logs[2] / logs[1] == pytest.approx(2, rel=0.01)


@pytest.mark.parametrize("depth", [50, 100, 200])
def test_pre_norm_grows_linearly(depth: int) -> None:
    grown = theory.residual_growth(torch.relu, depth, 2.0, norm="pre")
    assert math.exp(grown.log_gradient) == pytest.approx(depth + 1, rel=1e-9)
    assert grown.log_length == pytest.approx(grown.log_gradient)


def test_residual_factor() -> None:
    assert theory.residual_factor(torch.relu, 3.0, 2.0) == pytest.approx(2)
    assert theory.residual_factor(torch.relu, 1.0, 2.0, norm="post") == pytest.approx(1)
    assert theory.residual_factor(torch.tanh, 1.0, 1.0, norm="post") == pytest.approx(1.05, abs=0.005)
    assert theory.residual_factor(torch.relu, 4.0, 2.0, norm="pre") == pytest.approx(1.25)
    assert theory.residual_factor(torch.relu, 0.0, 2.0) == pytest.approx(2)
    assert theory.norm_factor(torch.tanh, "rms", q=0.0) == pytest.approx(1)


@pytest.mark.parametrize("name", ["relu", "tanh"])
@pytest.mark.parametrize(
    ("norm", "kind", "scale", "tolerance"),
    [
        # Repeated with eight other seeds, logarithms per block were off by 0.03, 0.0024, 0.006 and 0.022.
        (None, "rms", 1.0, 0.035),
        (None, "rms", 0.2, 0.004),
        *(("pre", kind, 1.0, 0.01) for kind in ("layer", "rms")),
        *(("post", kind, 1.0, 0.025) for kind in ("layer", "rms")),
    ],
)
def test_residual_blocks_in_random_networks(
    name: str, norm: str | None, kind: str, scale: float, tolerance: float
) -> None:
    phi, depth = ACTIVATIONS[name], 24

    def block(x: Tensor) -> Tensor:
        branch = scale * dense(phi(normalize(x, kind) if norm == "pre" else x), 2.0)
        return normalize(x + branch, kind) if norm == "post" else x + branch

    measured = growth(block, lambda: gaussian(8, WIDTH), depth, seeds=3)
    expected = theory.residual_growth(phi, depth, 2.0, scale, norm)
    logs = (expected.log_length / depth, expected.log_gradient / depth)
    assert measured == pytest.approx(logs, abs=tolerance)


# -- convolution ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4, 8, 32])
def test_padding_factor_of_kernel_three_is_closed(size: int) -> None:
    axis = (1 + 2 * math.cos(math.pi / (size + 1))) / 3
    assert theory.padding_factor((size, size)) == pytest.approx(axis**2, rel=1e-12)
    assert theory.padding_factor((size, 7, 5), (3, 1, 1)) == pytest.approx(axis, rel=1e-12)


def test_padding_factors() -> None:
    factors = [theory.padding_factor((size, size)) for size in (4, 8, 32)]
    assert factors == pytest.approx([0.762, 0.921, 0.994], abs=5e-4)
    assert theory.padding_factor((6, 9), 1) == 1
    assert theory.padding_factor((3,), 7) == pytest.approx(3 / 7)  # every place sees every other
    assert theory.padding_factor((4, 6), (3, 5)) == theory.padding_factor((6, 4), (5, 3))


@pytest.mark.parametrize(
    ("phi", "sizes", "kernel"),
    [
        (linear, (4, 4), (3, 3)),
        (linear, (4, 7), (3, 5)),
        (linear, (8, 8), (3, 3)),
        (torch.relu, (4, 4), (3, 3)),
    ],
    ids=["square", "oblong", "large", "relu"],
)
def test_zero_padding_in_random_networks(
    phi: theory.Activation, sizes: tuple[int, int], kernel: tuple[int, int]
) -> None:
    channels = 64
    fan_in = channels * kernel[0] * kernel[1]
    variance = (2.0 if phi is torch.relu else 1.0) / fan_in

    def block(h: Tensor) -> Tensor:
        return F.conv2d(phi(h), gaussian(channels, channels, *kernel, variance=variance), padding="same")

    measured = growth(block, lambda: gaussian(4, channels, *sizes), depth=16, seeds=6, skip=4)
    expected = math.log(theory.padding_factor(sizes, kernel))
    # Repeated with eight other seeds, the logarithms were off by 0.021 at most, those of ReLU by 0.06.
    assert measured == pytest.approx((expected, expected), abs=0.07 if phi is torch.relu else 0.03)


# -- weight gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["relu", "tanh"])
def test_weight_gradients_in_random_networks(name: str) -> None:
    """p and p_c are followed backward by chi and chi_c, x and x_c forward, through a real network."""
    phi, width, depth, batch_size, cosine = ACTIVATIONS[name], 256, 6, 4, 0.6
    seeds, squares = 60, torch.zeros(depth)
    for _ in range(seeds):
        x = gaussian(1, width).mul(cosine**0.5) + gaussian(batch_size, width).mul((1 - cosine) ** 0.5)
        weights = [gaussian(width, width, variance=2 / width).requires_grad_() for _ in range(depth)]
        for layer, weight in enumerate(weights):
            x = (phi(x) if layer else x) @ weight
        loss = (x * gaussian(1, width)).sum() / batch_size  # a mean over samples, the same gradient for each
        squares += torch.stack([g.square().sum() for g in torch.autograd.grad(loss, weights)]) / seeds
    path = propagate([Linear(2.0), Elementwise(phi)] * depth, Signal(1.0, gap=1 - cosine))
    lengths, cosines = path.lengths[::2], path.cosines[::2]
    gradient = gradient_cross = float(width)
    for layer in reversed(range(depth)):
        signal, signal_cross = float(width), width * cosine
        if layer:
            q, c = lengths[layer - 1], cosines[layer - 1]
            signal = width * theory.output_moment(phi, q)
            signal_cross = width * lengths[layer] * cosines[layer] / 2
        expected = theory.squared_weight_gradient(gradient, signal, gradient_cross, signal_cross, batch_size)
        # Repeated with eight other seeds, it was off by 9 % at most.
        assert float(squares[layer]) == pytest.approx(expected, rel=0.15)
        if layer:
            gradient *= theory.gradient_factor(phi, q, 2.0)
            gradient_cross *= theory.correlation_slope(phi, c, q, 2.0)


def test_weight_gradient_of_one_sample_has_no_cross_terms() -> None:
    assert theory.squared_weight_gradient(3.0, 2.0, 5.0, 7.0, 1) == 6
