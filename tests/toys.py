"""Small data and networks for tests of training."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam

from gradmend.data import Data
from gradmend.setup import Setup
from gradmend.training import train
from gradmend.zoo import mlp

on_cpu = partial(train, device="cpu")


def toy(rows: int = 96, held_out: int = 32, classes: int | None = 3) -> Data:
    """Classes that a linear model can tell apart, or their scores."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows + held_out, 8, generator=generator)
    scores = x @ torch.randn(8, 3, generator=generator)
    y = scores.argmax(1) if classes else scores
    return Data(x[:rows], y[:rows], x[rows:], y[rows:], "toy", classes)


def network(*extra: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), *extra, nn.Linear(16, 3))


def plain_network() -> nn.Sequential:
    torch.manual_seed(0)
    return mlp(8, 3, width=16, depth=2, activation="tanh")


ADAM = partial(Adam, lr=0.01)


def setup(optimizer: Any = ADAM, **parts: Any) -> Setup:
    return Setup(network(nn.Dropout(0.2)), nn.CrossEntropyLoss(), optimizer, **parts)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
