"""Setups of every kind, with a batch each: what remedies must not break."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from gradmend.setup import Batch, Setup
from gradmend.training.loop import Stepper
from helpers import ADAM, SGD, Convolutional, Functional, Tied, blobs, images, plain

LOSS = nn.CrossEntropyLoss()
Case = tuple[Setup, Batch]


class Shared(nn.Module):
    """One activation module, called after every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.middle, self.out = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.act = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.act(self.middle(self.act(self.inner(x)))))


class Block(nn.Module):
    """Two convolutions, around which the network may put a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = (
            nn.Conv2d(4, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 4, 1),
        )
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.act(self.norm(self.first(x))))


class Blocks(nn.Module):
    """Blocks in a row, with residual connections or without."""

    def __init__(self, residual: bool) -> None:
        super().__init__()
        self.stem, self.out = nn.Conv2d(1, 4, 3, stride=4), nn.Linear(36, 3)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for block in self.blocks:
            h = h + block(h) if self.residual else block(h)
        return self.out(h.flatten(1))


class Attending(nn.Module):
    """Self-attention with large weights, and a layer on the mean of its tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)
        self.attention.in_proj_weight.data.mul_(10)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attention(x, x, x, need_weights=False)[0].mean(1))


def own_step(model: nn.Module, batch: Batch) -> Tensor:
    return LOSS(model(batch[0]), batch[1])


def partly_evaluating() -> nn.Sequential:
    layers = [nn.Linear(8, 16), nn.BatchNorm1d(16).eval(), nn.Tanh(), nn.Dropout(0.5).eval()]
    return nn.Sequential(*layers, nn.Linear(16, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 3))


def cone() -> nn.Sequential:
    layers = [nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU()]
    return nn.Sequential(*layers, nn.Dropout(0.1), nn.Linear(12, 3))


def trained() -> Setup:
    """A live optimizer of two groups, with state."""
    model = plain(3, nn.Tanh, width=16)
    groups = [{"params": model[:2].parameters()}, {"params": model[2:].parameters(), "lr": 3e-3}]
    setup = Setup(model, LOSS, torch.optim.Adam(groups, lr=1e-3))
    step = Stepper(setup)
    for _ in range(3):
        step([blobs()])
    return setup


def normed() -> nn.Module:
    model = plain(2, nn.ReLU, width=16)
    for layer in (model[0], model[2]):
        weight_norm(layer)
    return model


x, y = blobs()
GENERAL: dict[str, Callable[[], Case]] = {
    "plain": lambda: (Setup(plain(4, nn.Sigmoid, width=16), LOSS, SGD), (x, y)),
    "convolutional": lambda: (Setup(Convolutional(), LOSS, SGD), images()),
    "functional": lambda: (Setup(Functional(), LOSS, ADAM), (x, y)),
    "tied": lambda: (Setup(Tied(), nn.MSELoss(), SGD), (x, x)),
    "shared": lambda: (Setup(Shared(), LOSS, SGD), (x, y)),
    "parametrized": lambda: (Setup(normed(), LOSS, SGD), (x, y)),
    "live": lambda: (trained(), (x, y)),
    "double": lambda: (Setup(plain(2, nn.ReLU, width=16).double(), LOSS, SGD), (x.double(), y)),
    "evaluating": lambda: (Setup(partly_evaluating(), LOSS, ADAM), (x, y)),
    "step": lambda: (Setup(plain(2, nn.Tanh, width=16), None, SGD, step=own_step), (x, y)),
    "cone": lambda: (Setup(cone(), LOSS, ADAM), (x, y)),
    "residual": lambda: (Setup(Blocks(residual=True), LOSS, SGD), images()),
    "blocks": lambda: (Setup(Blocks(residual=False), LOSS, SGD), images()),
    "attention": lambda: (Setup(Attending(), LOSS, ADAM), (x[:, :, None] * torch.ones(8), y)),
}
