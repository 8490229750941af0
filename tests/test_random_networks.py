"""Predictions against random networks that play the same graphs: the Monte Carlo twin of every rule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gradmend.theory import (
    BatchNormalization,
    Convolution,
    Dropout,
    Elementwise,
    Gradient,
    Linear,
    Node,
    Normalization,
    Rule,
    Scale,
    Signal,
    Sum,
    propagate,
)

RELU, TANH, GELU = (Elementwise(phi) for phi in (torch.relu, torch.tanh, F.gelu))

Graph = Sequence[Node | Rule]


def play(graph: Graph, x: Tensor) -> list[Tensor]:
    """The values at every node of one network with random weights, as wide everywhere as its input."""
    weights: dict[object, Tensor] = {}
    values: list[Tensor] = []
    for index, item in enumerate(graph):
        node = item if isinstance(item, Node) else Node(item)
        read = [x if i < 0 else values[i] for i in node.inputs or (index - 1,)]
        values.append(play_rule(node, read, weights))
    return values


def play_rule(node: Node, read: list[Tensor], weights: dict[object, Tensor]) -> Tensor:
    x, rule = read[0], node.rule
    match rule:
        case Linear():
            weight = normal((x[0].numel(), x.shape[1]), rule.weight_variance / x[0].numel())
            weight = weights.setdefault(node.weights, weight) if node.weights else weight
            return (x.flatten(1) + rule.shift) @ weight + normal(x.shape[1], rule.bias_variance)
        case Convolution():
            return play_convolution(rule, x)
        case Elementwise():
            return rule.phi(x)
        case Normalization():
            axes = list(range(1, x.dim()))
            middle = x.mean(axes, keepdim=True) if rule.centred else 0.0
            variance = (x - middle).square().mean(axes, keepdim=True)
            return rule.gain * (x - middle) / (variance + rule.eps).sqrt() + normal(x[0].shape, rule.bias**2)
        case BatchNormalization():
            normed = rule.gain * F.batch_norm(x, None, None, training=True, eps=rule.eps + 1e-14)
            return normed + normal((x.shape[1], *[1] * (x.dim() - 2)), rule.bias**2)
        case Sum():
            return x + rule.sign * read[1]
        case Scale():
            return rule.factor * x
        case Dropout():
            return F.dropout(x, 1 - rule.keep)
    raise AssertionError(rule)


def play_convolution(rule: Convolution, x: Tensor) -> Tensor:
    channels, axes = x.shape[1], len(rule.kernel)
    weight = normal(
        (channels, channels, *rule.kernel), rule.weight_variance / channels / math.prod(rule.kernel)
    )
    bias = normal(channels, rule.bias_variance) + rule.shift * weight.flatten(1).sum(1)
    sides = {"stride": rule.stride, "padding": rule.padding, "dilation": rule.dilation}
    if rule.transposed:
        function = (F.conv_transpose1d, F.conv_transpose2d)[axes - 1]
        return function(x, weight, bias, **sides)
    missing = [
        (o - 1) * s + d * (k - 1) + 1 - i - 2 * p
        for i, o, k, s, p, d in zip(rule.inputs, rule.outputs, rule.kernel, *sides.values(), strict=True)
    ]
    if max(missing) > 0:
        around = [side for m in reversed(missing) for side in (m // 2, m - m // 2)]
        x = F.pad(x, around, mode="circular")
    return (F.conv1d, F.conv2d)[axes - 1](x, weight, bias, **sides)


def normal(shape: int | Sequence[int], variance: float) -> Tensor:
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    return torch.randn(shape, dtype=torch.float64) * math.sqrt(variance)


def source(shape: Sequence[int], q: float, c: float) -> Tensor:
    """Samples whose mean square is q and whose cosines are c, exactly."""
    size = math.prod(shape[1:])
    basis = torch.linalg.qr(torch.randn(size, shape[0] + 1, dtype=torch.float64)).Q.T * math.sqrt(size * q)
    return (math.sqrt(c) * basis[:1] + math.sqrt(1 - c) * basis[1:]).reshape(*shape).requires_grad_()


def observe(graph: Graph, shape: Sequence[int], q: float, c: float) -> Tensor:
    """Of every node of one network: q, mean, q x cosine; and, over that of the last, (1, cosine) x |d|^2."""
    x = source(shape, q, c)
    values = play(graph, x)
    last = values[-1]
    gradients = torch.autograd.grad(last, values, torch.randn_like(last), allow_unused=True)
    seen = torch.stack([gradients[-1].square().sum()] * 5)
    rows = []
    for value, gradient in zip(values, gradients, strict=True):
        square, product = pairs(value.detach())
        slope = torch.zeros(2) if gradient is None else torch.stack(pairs(gradient)) * gradient[0].numel()
        numbers = [square, value.detach().mean(), product, *(slope / seen[0] * len(value))]
        rows.append(torch.stack([number.double() for number in numbers]))
    return torch.stack(rows)


def pairs(x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean square of one value, and the mean product of the values of two samples."""
    rows = x.flatten(1)
    square = rows.square().sum()
    together = (rows.sum(0).square().sum() - square) / (len(rows) - 1)
    return square / rows.numel(), together / rows.numel()


def assert_agrees(
    graph: Graph, shape: Sequence[int], q: float = 1.0, c: float = 0.3, nets: int = 30, slack: float = 0.0
) -> None:
    """Means over networks lie within five of their deviations, and `slack`, of what theory says."""
    seen = torch.stack([observe(graph, shape, q, c) for _ in range(nets)])
    means, errors = seen.mean(0), 5 * seen.std(0) / math.sqrt(nets)
    found = propagate(graph, Signal(q, 1 - c), {len(graph) - 1: Gradient(cosine=0.0)})
    assert not found.refused
    for index, (signal, gradient) in enumerate(zip(found.signals, found.gradients, strict=True)):
        assert signal is not None
        assert gradient is not None
        size = signal.length
        slope = math.exp(gradient.log)
        predicted = [size, signal.mean, size * (1 - signal.gap), slope, slope * gradient.cosine]
        scales = [size, math.sqrt(size), size, slope, slope]
        for name, mean, error, wanted, scale in zip(
            ("q", "mean", "product", "gradient", "gradients' product"),
            means[index].tolist(),
            errors[index].tolist(),
            predicted,
            scales,
            strict=True,
        ):
            assert abs(mean - wanted) <= error + (slack + 1e-9) * scale, (index, name, mean, wanted, error)


MLP, MAP, LINE = (8, 128), (4, 48, 5, 6), (4, 64, 9)


def conv(inputs: Sequence[int], outputs: Sequence[int], kernel: int = 3, **sides: int | bool) -> Convolution:
    given = {"stride": 1, "padding": 1, "dilation": 1} | sides
    transposed = bool(given.pop("transposed", False))
    rows = [(given[key],) * len(inputs) for key in ("stride", "padding", "dilation")]
    return Convolution(1.5, 0.1, tuple(inputs), tuple(outputs), (kernel,) * len(inputs), *rows, transposed)


BLOCK = [Linear(2.0), RELU, Linear(1.0)]
GRAPHS: dict[str, tuple[Graph, Sequence[int]]] = {
    "tanh with biases": ([Linear(1.5, 0.2), TANH] * 4, MLP),
    "relu": ([Linear(2.0), RELU] * 4, MLP),
    "biases that take the mean out": ([Linear(2.5), RELU, Linear(1.5, 0.1, shift=-0.6), RELU] * 2, MLP),
    "biases that add a mean": ([Linear(1.5), TANH, Linear(1.0, shift=0.5), TANH] * 2, MLP),
    "layer norm before": ([Linear(2.0, 0.1), Normalization(gain=1.5, bias=0.2, eps=0.3), GELU] * 3, MLP),
    "layer norm after": ([Linear(2.0), RELU, Normalization(gain=0.7)] * 3, MLP),
    "rms norm after": ([Linear(2.0), RELU, Normalization(centred=False, gain=0.7, eps=0.1)] * 3, MLP),
    "batch norm, relu": ([Linear(1.0), BatchNormalization(8), RELU] * 3 + [Linear(1.0)], MLP),
    "batch norm, tanh": ([Linear(1.0), BatchNormalization(8, gain=2.0), TANH] * 3 + [Linear(1.0)], MLP),
    "batch norm, eps": ([Linear(1.0), BatchNormalization(8, eps=3.0), RELU] * 2 + [Linear(1.0)], MLP),
    "batch norm after": (
        [Linear(1.0), TANH, BatchNormalization(32, 1.3, 0.4)] * 2 + [Linear(1.0)],
        (32, 128),
    ),
    "residual": ([Linear(1.0), TANH, Linear(1.5, 0.1), Scale(0.5), Node(Sum(), (0, 3)), TANH], MLP),
    "residual with means": ([Linear(1.0), RELU, Linear(2.0), RELU, Node(Sum(), (1, 3)), Linear(1.0)], MLP),
    "difference": ([Linear(1.0), RELU, Linear(2.0), RELU, Node(Sum(-1.0), (1, 3)), Linear(1.0)], MLP),
    "pre-norm": ([Linear(3.0), Normalization(), *BLOCK, Node(Sum(), (0, 4)), Linear(1.0)], MLP),
    "post-norm": ([Linear(3.0), *BLOCK, Node(Sum(), (0, 3)), Normalization(), TANH], MLP),
    "batch norm of a sum": (
        [Linear(1.0), RELU, Linear(1.0), Node(Sum(), (0, 2)), BatchNormalization(8), RELU, Linear(1.0)],
        MLP,
    ),
    "dropout": ([Linear(2.0), RELU, Dropout(0.7)] * 3 + [Linear(1.0)], MLP),
    "two branches": (
        [Linear(1.0), TANH, Node(Linear(2.0), (1,)), Node(Linear(0.5), (1,)), Node(Sum(), (2, 3)), TANH],
        MLP,
    ),
    "zero padding": ([conv((5, 6), (5, 6)), TANH] * 3, MAP),
    "padding and a shift": ([replace(conv((5, 6), (5, 6)), shift=-0.5), RELU] * 3, MAP),
    "circular padding": ([conv((5, 6), (5, 6), padding=0), RELU] * 3, MAP),
    "no padding": ([conv((5, 6), (3, 4), padding=0), RELU, Linear(1.0)], MAP),
    "stride": ([conv((5, 6), (3, 3), stride=2), RELU, Linear(1.0)], MAP),
    "dilation": ([conv((5, 6), (5, 6), dilation=2, padding=2), RELU] * 2, MAP),
    "one axis": ([conv((9,), (9,), 5, padding=2), TANH] * 2, LINE),
    "transposed": ([conv((9,), (17,), stride=2, transposed=True), TANH, conv((17,), (9,), stride=2)], LINE),
    "batch norm of maps": (
        [conv((5, 6), (5, 6)), BatchNormalization(4, positions=30), RELU] * 2 + [Linear(1.0)],
        MAP,
    ),
}
FINITE = {"batch norm of maps": 0.1}
"""Positions count as samples; here there are few of them, and neighbours are alike."""


@pytest.mark.parametrize("name", GRAPHS)
def test_random_networks_agree(name: str) -> None:
    """Slack: of order depth / width for nonlinear functions of what strays with the width."""
    graph, shape = GRAPHS[name]
    assert_agrees(graph, shape, slack=FINITE.get(name, 4 / shape[1]))
