"""Deep networks with one thing set, and the digits to run through them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from gradmend.causes import Cause
from gradmend.diagnosis import signal, weights, within
from gradmend.diagnosis.disturb import disturb
from gradmend.diagnosis.finding import Finding
from gradmend.probe import measure
from gradmend.profile import Profile
from gradmend.setup import Setup

CE = nn.CrossEntropyLoss()
HE = partial(nn.init.kaiming_normal_, nonlinearity="relu")
LECUN = partial(nn.init.kaiming_normal_, nonlinearity="linear")
RULES = (*weights.RULES, *within.RULES, *signal.RULES)

_DIGITS = load_digits()
X, Y = torch.tensor(_DIGITS.data[:1280], dtype=torch.float32), torch.tensor(_DIGITS.target[:1280])
X = (X - X.mean(0)) / X.std(0).where(X.std(0) > 0, 1.0)


def batches(x: Tensor = X, y: Tensor = Y) -> list[tuple[Tensor, Tensor]]:
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return [(x[rows], y[rows]) for rows in order.split(128)]


BATCH = batches()[0]


def scaled(factor: float) -> Callable[[Tensor], Any]:
    """Gaussian weights with fan_in x variance = factor."""
    return lambda weight: nn.init.normal_(weight, 0, math.sqrt(factor / weight.shape[1]))


def mlp(
    depth: int,
    phi: Callable[[], nn.Module],
    init: Callable[[Tensor], Any] | None = None,
    width: int = 64,
    extra: Callable[[], nn.Module] | None = None,
    seed: int = 0,
) -> nn.Sequential:
    """Layers of 64 features, the weights drawn by `init` and the biases zero, or as torch has them."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += [nn.Linear(width if i else 64, width), *([extra()] if extra else []), phi()]
    model = nn.Sequential(*layers, nn.Linear(width, 10))
    for layer in model:
        if init and isinstance(layer, nn.Linear):
            init(layer.weight)
            nn.init.zeros_(layer.bias)
    return model


def profile(setup: Setup, batch: Any = BATCH) -> Profile:
    """Measured, with what a disturbance of the input does."""
    measured = measure(setup, batch)
    return replace(measured, disturbance=disturb(setup, batch, measured.anatomy))


def judged(
    seen: Profile, rules: Sequence[Callable[[Profile], Finding | None]] = RULES
) -> dict[Cause, Finding]:
    return {found.cause: found for rule in rules if (found := rule(seen))}


def found(setup: Setup, batch: Any = BATCH) -> dict[Cause, Finding]:
    """What the rules on signals find."""
    return judged(profile(setup, batch))
