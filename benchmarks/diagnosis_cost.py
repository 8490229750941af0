"""What `gradmend.diagnose` costs, experiments included, in plain forward and backward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradmend
from benchmarks.timing import Row, compare
from benchmarks.workloads import OptimizerFactory
from gradmend.zoo import mlp

DEPTH, WIDTH, ROWS, BATCHES = 20, 256, 128, 4
MOST = 40.0

Batch = tuple[Tensor, Tensor]

OPTIMIZERS = (partial(torch.optim.SGD, lr=0.01, momentum=0.9), partial(torch.optim.Adam, lr=1e-3))
NETWORKS = {
    "sound (ReLU, He)": ("relu", "he"),
    "sigmoid": ("sigmoid", "default"),
    "weights too small": ("relu", "small"),
}


def run() -> Iterator[Row | str]:
    torch.set_num_threads(1)
    yield f"One diagnosis of an MLP {DEPTH} x {WIDTH}, {BATCHES} batches of {ROWS}, over one plain step"
    for name, (activation, init) in NETWORKS.items():
        for optimizer in OPTIMIZERS:
            yield _cost(f"{name}, {optimizer.func.__name__}", activation, init, optimizer, _classes)
    name = "sound, labels drawn by lot: a trial looks for the cause"
    yield _cost(name, "relu", "he", OPTIMIZERS[0], _lots)


def _classes() -> Batch:
    """Ten clouds of points."""
    y = torch.randint(10, (ROWS,))
    centers = torch.randn(10, WIDTH, generator=torch.Generator().manual_seed(0))
    return centers[y] + torch.randn(ROWS, WIDTH), y


def _lots() -> Batch:
    return torch.randn(ROWS, WIDTH), torch.randint(10, (ROWS,))


def _cost(
    name: str, activation: str, init: str, optimizer: OptimizerFactory, batch: Callable[[], Batch]
) -> Row:
    torch.manual_seed(0)
    model = mlp(WIDTH, 10, width=WIDTH, depth=DEPTH, activation=activation, init=init)
    batches = [batch() for _ in range(BATCHES)]
    setup = gradmend.Setup(model, nn.CrossEntropyLoss(), optimizer)
    plain = partial(_step, model, *batches[0])
    return Row(name, compare(plain, {name: partial(gradmend.diagnose, setup, batches)}, budget=6)[name], MOST)


def _step(model: nn.Module, x: Tensor, y: Tensor) -> None:
    model.zero_grad(set_to_none=True)
    F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
