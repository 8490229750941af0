"""The activations and random networks that predictions are held against."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

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


def linear(x: Tensor) -> Tensor:
    return 1.0 * x


def gaussian(*shape: int, variance: float = 1.0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64) * math.sqrt(variance)


def dense(x: Tensor, variance: float, width: int | None = None) -> Tensor:
    """A new random layer: fan_in x Var(W) is the variance."""
    fan_in = x.shape[-1]
    return x @ gaussian(fan_in, width or fan_in, variance=variance / fan_in)


def signals(block: Callable[[Tensor], Tensor], x: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """ln of the mean square of the signal before and after each block, and ln |gradient|^2 there."""
    stream = [x.clone().requires_grad_()]
    for _ in range(depth):
        stream.append(block(stream[-1]))
    gradients = torch.autograd.grad(stream[-1], stream, torch.randn_like(stream[-1]))
    lengths = torch.stack([s.detach().square().mean().log() for s in stream])
    return lengths, torch.stack([g.square().sum().log() for g in gradients])


def growth(
    block: Callable[[Tensor], Tensor], x: Callable[[], Tensor], depth: int, seeds: int, skip: int = 0
) -> tuple[float, float]:
    """ln of the growth per block of lengths and of squared gradients after the first few, over networks."""
    runs = [signals(block, x(), depth) for _ in range(seeds)]
    lengths, gradients = (torch.stack(part).mean(0) for part in zip(*runs, strict=True))
    layers = depth - skip
    return float(lengths[-1] - lengths[skip]) / layers, float(gradients[skip] - gradients[-1]) / layers
