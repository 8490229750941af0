"""A step of `train` over a step of the loop that people write, on the network of the mnist recipe."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from benchmarks.timing import Row, compare
from gradmend.data import Data, load
from gradmend.training import train
from gradmend.zoo import recipe

STEPS = 200
REACH = 1.05


def run() -> Iterator[Row | str]:
    torch.set_num_threads(1)
    yield "A step of train over a step of a loop written by hand, network of the mnist recipe"
    for optimizer in (torch.optim.Adam, torch.optim.SGD):
        for batch_size in (32, 128):
            name = f"train, {optimizer.__name__}, batch {batch_size}"
            ours, plain = _loops(optimizer, batch_size)
            yield Row(name, compare(plain, {name: ours})[name], REACH)


def _loops(
    optimizer: Callable[..., torch.optim.Optimizer], batch_size: int
) -> tuple[Callable[[], object], Callable[[], object]]:
    data = _data(STEPS * batch_size)
    factory = partial(optimizer, lr=1e-3)
    setup = replace(recipe("mnist", data=data).setup, optimizer=factory)
    model = setup.copy().model
    plain = partial(_plain_loop, model, nn.CrossEntropyLoss(), factory(model.parameters()), data, batch_size)
    return partial(train, setup, data, epochs=1, batch_size=batch_size, device="cpu"), plain


def _plain_loop(
    model: nn.Module, loss_fn: nn.Module, optimizer: torch.optim.Optimizer, data: Data, batch_size: int
) -> None:
    x, y = data.x, data.y
    model.train()
    for idx in torch.split(torch.randperm(len(x)), batch_size):
        optimizer.zero_grad()
        loss = loss_fn(model(x[idx]), y[idx])
        loss.backward()
        optimizer.step()


def _data(rows: int) -> Data:
    if os.environ.get("GRADMEND_DATA"):
        mnist = load("mnist")
        return Data(mnist.x[:rows], mnist.y[:rows], mnist.x[:0], mnist.y[:0], "mnist", classes=10)
    torch.manual_seed(0)
    x, y = torch.randn(rows, 784), torch.randint(10, (rows,))
    return Data(x, y, x[:0], y[:0], "synthetic", classes=10)
