"""A watch says nothing of healthy trainings, however closely it looks."""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from benchmarks.workloads import GPT, SequenceClassifier, resnet
from torch import Tensor, nn
from torch.nn import functional as F

from gradmend.diagnosis import Severity
from gradmend.watch import Watch
from gradmend.zoo import mlp

Batches = Iterator[tuple[Tensor, Tensor]]
Build = Callable[[], tuple[nn.Module, Batches]]

SGD, MOMENTUM = partial(torch.optim.SGD, lr=0.05), partial(torch.optim.SGD, lr=0.02, momentum=0.9)
ADAM = partial(torch.optim.Adam, lr=1e-3)


def table(rows: int = 64) -> Batches:
    """Classes of random directions; fresh rows each time."""
    directions = torch.randn(20, 5)
    while True:
        x = torch.randn(rows, 20)
        yield x, (x @ directions).argmax(1)


def net(depth: int, activation: str, init: str, rows: int = 64, **options: object) -> Build:
    def build() -> tuple[nn.Module, Batches]:
        model = mlp(20, 5, width=64, depth=depth, activation=activation, init=init, **options)  # type: ignore[arg-type]
        return model, table(rows)

    return build


def sequences() -> tuple[nn.Module, Batches]:
    def batches() -> Batches:
        while True:
            x = torch.randn(32, 12, 8)
            yield x, (x[:, -3:, 0].sum(1) > 0).long()

    return SequenceClassifier(8, 32), batches()


def images() -> tuple[nn.Module, Batches]:
    def batches() -> Batches:
        patterns = torch.randn(10, 3, 16, 16)
        while True:
            y = torch.randint(10, (32,))
            yield patterns[y] + torch.randn(32, 3, 16, 16), y

    return resnet()[0], batches()


def language() -> tuple[nn.Module, Batches]:
    def batches() -> Batches:
        while True:
            x = torch.randint(8, (16, 1)) + torch.arange(17) * torch.randint(1, 4, (16, 1))
            yield x[:, :-1] % 32, x[:, 1:] % 32

    return GPT(2, 32, 16, vocabulary=32), batches()


HEALTHY = {
    "he relu 3, SGD": (net(3, "relu", "he"), SGD),
    "he relu 3, Adam": (net(3, "relu", "he"), ADAM),
    "he relu 8, momentum": (net(8, "relu", "he"), MOMENTUM),
    "he relu 12, Adam": (net(12, "relu", "he"), ADAM),
    "he relu 3, batches of 8": (net(3, "relu", "he", rows=8), partial(torch.optim.SGD, lr=0.01)),
    "default relu 4, Adam": (net(4, "relu", "default"), ADAM),
    "gelu 3, AdamW": (net(3, "gelu", "he"), partial(torch.optim.AdamW, lr=1e-3)),
    "gelu 8, Adam": (net(8, "gelu", "he"), ADAM),
    "silu 6, Adam": (net(6, "silu", "he"), ADAM),
    "tanh 3, momentum": (net(3, "tanh", "xavier"), MOMENTUM),
    "tanh 10, Adam": (net(10, "tanh", "xavier"), ADAM),
    "elu 6, SGD": (net(6, "elu", "he"), partial(torch.optim.SGD, lr=0.01)),
    "selu 20, Adam": (net(20, "selu", "lecun"), ADAM),
    "layer norm relu 8, SGD": (net(8, "relu", "he", norm="layer"), SGD),
    "batch norm relu 6, SGD": (net(6, "relu", "he", norm="batch"), SGD),
    "tailored relu 50, Adam": (net(50, "tailored", "tailored"), ADAM),
    "residual layer norm 20, Adam": (net(20, "relu", "he", norm="layer", skip=True), ADAM),
    "GRU, Adam": (sequences, partial(torch.optim.Adam, lr=3e-3)),
    "ResNet, momentum": (images, MOMENTUM),
    "transformer, Adam": (language, ADAM),
}


SLOW = {
    "ResNet, momentum": 25,
    "transformer, Adam": 60,
    "tailored relu 50, Adam": 60,
    "residual layer norm 20, Adam": 60,
}
"""Steps of those that take long; of the others 120."""


@pytest.mark.parametrize("name", HEALTHY)
def test_nothing_is_found_in_a_healthy_training(name: str) -> None:
    build, optimizer = HEALTHY[name]
    model, batches = build()
    live, notices = optimizer(model.parameters()), []
    losses = []
    with Watch(model, live, budget=5.0, report=notices.append) as watch:
        for _ in range(SLOW.get(name, 120)):
            x, y = next(batches)
            live.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            live.step()
            losses.append(loss.item())
    assert sum(losses[-10:]) < 0.97 * sum(losses[:10])
    assert watch.profile is not None
    assert [n.finding.sentence for n in notices if n.finding.severity >= Severity.WARNING] == []
