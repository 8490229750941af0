"""Networks and batches that many tests share, and a fingerprint of all that measuring must not touch."""

import copy
import random
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmend.setup import Setup

SGD = partial(torch.optim.SGD, lr=0.1)
ADAM = partial(torch.optim.Adam, lr=1e-3)


def blobs(rows: int = 96, features: int = 8, classes: int = 3) -> tuple[Tensor, Tensor]:
    """Gaussian blobs, one per class, of about unit variance."""
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(rows) % classes
    centres = torch.randn(classes, features, generator=generator)
    return centres[y] + 0.5 * torch.randn(rows, features, generator=generator), y


def images(rows: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(rows, 1, 12, 12, generator=generator), torch.arange(rows) % 3


def plain(depth: int, activation: type[nn.Module], features: int = 8, width: int = 32) -> nn.Sequential:
    sizes = [features] + [width] * depth
    pairs = [(nn.Linear(a, b), activation()) for a, b in pairwise(sizes)]
    return nn.Sequential(*[layer for pair in pairs for layer in pair], nn.Linear(width, 3))


class Functional(nn.Module):
    """Activations as functions, a residual sum, a reused layer, a bare parameter, in-place ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 16)
        self.twice = nn.Linear(16, 16)
        self.weight = nn.Parameter(torch.randn(16, 16) / 4)
        self.bias = nn.Parameter(torch.zeros(16))
        self.out = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inner(x))
        h = h + F.relu(self.twice(h))
        h = F.leaky_relu(h @ self.weight + self.bias, 0.2)
        h = F.relu_(self.twice(h))
        return self.out(h)


class Convolutional(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 6, 3),
            nn.GELU(),
            nn.Dropout(0.1),
            nn.Flatten(),
            nn.Linear(6 * 16, 3),
        )


class Tied(nn.Module):
    """An autoencoder whose decoder uses the encoder's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(8, 4)
        self.bias = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.sigmoid(self.encoder(x)), self.encoder.weight.T, self.bias)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.gru = nn.GRU(8, 12, batch_first=True)
        self.out = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.gru(self.embed(x))[0][:, -1])


def setups() -> dict[str, tuple[Setup, Any]]:
    """A setup and a batch of each kind."""
    torch.manual_seed(0)
    loss = nn.CrossEntropyLoss()
    x, y = blobs()
    tokens = torch.randint(10, (16, 7))
    attention = nn.Sequential(
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True), nn.Flatten(), nn.Linear(40, 3)
    )
    return {
        "plain": (Setup(plain(3, nn.ReLU), loss, SGD), (x, y)),
        "functional": (Setup(Functional(), loss, ADAM), (x, y)),
        "convolutional": (Setup(Convolutional(), loss, SGD), images()),
        "tied": (Setup(Tied(), nn.MSELoss(), SGD), (x, x)),
        "recurrent": (Setup(Recurrent(), loss, ADAM), (tokens, tokens[:, 0] % 3)),
        "attention": (Setup(attention, loss, SGD), (torch.randn(16, 5, 8), torch.arange(16) % 3)),
    }


def fingerprint(setup: Setup) -> dict[str, Any]:
    """All that must be the same before and after, to the last bit."""
    model = setup.model
    optimizer = setup.optimizer if isinstance(setup.optimizer, torch.optim.Optimizer) else None
    hooks = {
        (name, kind): len(getattr(module, kind))
        for name, module in model.named_modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    }
    from torch.nn.modules import module as globals_

    return {
        "state": {key: value.clone() for key, value in model.state_dict().items()},
        "identity": [id(p) for p in model.parameters()] + [id(b) for b in model.buffers()],
        "grad": {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "hooks": hooks,
        "global hooks": (len(globals_._global_forward_hooks), len(globals_._global_forward_pre_hooks)),
        "optimizer": copy.deepcopy(optimizer.state_dict()) if optimizer else None,
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1],
        "python": random.getstate(),
        "modes of torch": len(torch.overrides._get_current_function_mode_stack()),
    }


def trace(setup: Setup) -> dict[str, Any]:
    """The fingerprint without Python's random numbers, which the type checks of the tests themselves draw."""
    return {key: value for key, value in fingerprint(setup).items() if key != "python"}


def assert_same(a: Any, b: Any, path: str = "") -> None:
    """Compare nested structures of tensors bit by bit."""
    if isinstance(a, Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, np.ndarray):
        assert np.array_equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (one, other) in enumerate(zip(a, b, strict=True)):
            assert_same(one, other, f"{path}[{i}]")
    else:
        assert a == b, path


class Net(nn.Module):
    """A forward pass given as a function of the module and the input, over some parts."""

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


class Table(nn.Module):
    """A row of scores for each number: no function that makes a site."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(10, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.scores[x]


def warm(setup: Setup, batch: Any, steps: int = 2) -> None:
    """Steps that give a live optimizer some state, and leave `.grad` filled."""
    optimizer = setup.build_optimizer()
    for _ in range(steps):
        optimizer.zero_grad()
        setup.loss(batch).backward()
        optimizer.step()


def assert_parameter(reading: Any, gradient: Tensor | None) -> None:
    if gradient is None:
        assert reading.gradient is None
    else:
        size = gradient.double().square().mean().sqrt().item()
        assert reading.gradient == pytest.approx(size, rel=1e-4, abs=1e-9)


class Book:
    """A journal in memory."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, int, Mapping[str, Any]]] = []

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        self.rows.append((kind, step, values))

    def of(self, kind: str) -> list[tuple[int, Mapping[str, Any]]]:
        return [(step, values) for found, step, values in self.rows if found == kind]

    def values(self, kind: str) -> list[Mapping[str, Any]]:
        return [values for _, values in self.of(kind)]
