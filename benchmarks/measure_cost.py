"""One measured step (`measure`) over a plain forward and backward pass, on a deep fully connected net."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import nn

from benchmarks.timing import Row, compare
from gradmend.probe import measure
from gradmend.setup import Setup
from gradmend.zoo import mlp

REACH = 3.0


def run() -> Iterator[Row]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = mlp(256, 10, width=256, depth=100, activation="relu", init="he")
    batch = (torch.randn(128, 256), torch.randint(10, (128,)))
    sgd = partial(torch.optim.SGD, lr=0.1)
    for name, optimizer in (("", None), (", with update ratios", sgd)):
        setup = Setup(model, nn.CrossEntropyLoss(), optimizer)
        ratio = compare(partial(measure, setup, batch), partial(_plain_step, setup, batch))
        yield Row(f"measure / forward+backward, MLP 100 x 256{name}", ratio, REACH)


def _plain_step(setup: Setup, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    setup.model.zero_grad()
    setup.loss(batch).backward()
