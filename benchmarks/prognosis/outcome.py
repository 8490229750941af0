"""What became of a setup that was really trained."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice

import torch
from torch import Tensor, nn

from benchmarks.prognosis.networks import Description, build
from benchmarks.prognosis.tasks import STEPS, task
from gradmend.setup import Setup

ENDS = (STEPS - 40, STEPS - 20, STEPS)
"""After which steps the score is taken; their mean counts."""

_ROWS = 400


@dataclass(frozen=True)
class Outcome:
    """The score of a setup after training, and of guessing and of the reference."""

    score: float
    guess: float
    reference: float

    @property
    def share(self) -> float:
        """Of the gap between guessing and the reference, the share that was closed."""
        return (self.score - self.guess) / (self.reference - self.guess)

    @property
    def trains(self) -> bool:
        return self.share >= 0.5


def train(d: Description, setup: Setup, x: Tensor, y: Tensor, seed: int = 0) -> Outcome:
    """Train the setup itself for `STEPS` steps; the seed is that of the batches and of dropout."""
    return Outcome(trained_score(setup, x, y, d.batch, seed), task(d.task).guess, reference(d.task))


def trained_score(setup: Setup, x: Tensor, y: Tensor, batch: int, seed: int) -> float:
    torch.manual_seed(seed)
    optimizer, scores = setup.build_optimizer(), []
    for k, rows in enumerate(islice(shuffled(len(x), batch), STEPS), start=1):
        if not step(setup, optimizer, (x[rows], y[rows])):
            return -1.0
        if k in ENDS:
            scores.append(score(setup, x[:_ROWS], y[:_ROWS]))
    return sum(scores) / len(scores)


def shuffled(rows: int, batch: int) -> Iterator[Tensor]:
    """Epoch after epoch in a new order, whole batches only."""
    while True:
        yield from torch.randperm(rows).split(batch)[: rows // batch]


def step(setup: Setup, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]) -> bool:
    """One step; False if the loss is no number, for from then on no weight is."""
    loss = setup.loss(batch)
    optimizer.zero_grad()
    loss.backward()
    if setup.gradient_transform is not None:
        setup.gradient_transform(list(setup.model.parameters()))
    optimizer.step()
    return math.isfinite(loss.item())


@torch.no_grad()
def score(setup: Setup, x: Tensor, y: Tensor) -> float:
    """The share of right answers, or of the variance explained (never below -1)."""
    setup.model.eval()
    output = setup.model(x)
    setup.model.train()
    if not output.isfinite().all():
        return -1.0
    if isinstance(setup.loss_fn, nn.BCEWithLogitsLoss):
        return ((output > 0) == (y > 0.5)).float().mean().item()
    if isinstance(setup.loss_fn, nn.CrossEntropyLoss):
        return (output.argmax(1) == y).float().mean().item()
    error = (output - y).double().square().mean() / (y - y.mean(0)).double().square().mean()
    return max(-1.0, 1 - error.item())


@cache
def reference(name: str) -> float:
    """The best score of plain, well-set networks, each trained twice."""
    kind = task(name).kind
    families = ("gru", "mlp") if kind in ("tokens", "sequences") else ("mlp",)
    return max(twice(plain(name, family, rate)) for family in families for rate in (1e-3, 3e-3, 1e-2))


def twice(d: Description) -> float:
    setups = [build(d) for _ in range(2)]
    return sum(trained_score(*setup, d.batch, seed) for seed, setup in enumerate(setups)) / 2


def plain(name: str, family: str, rate: float) -> Description:
    data = task(name)
    return Description(
        seed=0,
        task=name,
        family=family,
        width=64,
        depth=2 if family == "mlp" else 1,
        activation="relu",
        init="he" if family == "mlp" else "default",
        norm="none",
        dropout=0.0,
        output="right",
        loss="cross entropy" if data.classes else "square",
        inputs="standard",
        targets="standard",
        optimizer="Adam",
        rate=rate,
        clip=False,
        batch=64,
    )
