"""gradmend's check: one call of `diagnose` on a few batches."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from benchmarks.corpora.answers import Claim, Level
from benchmarks.corpora.cases import draw, penalized
from gradmend.diagnosis import diagnose
from gradmend.setup import Setup

BATCHES = 8
ROWS, VALUES = 8_000, 19_000_000
"""Of data as large as this a part may have been cut off, so that nobody knows how many steps an epoch has."""


def check(case: Any, seed: int) -> list[Claim]:
    """An error is an alarm, and each finding blames the part of its cause."""
    diagnosis = diagnose(setup(case), draw(case, BATCHES, seed), steps=planned(case))
    return [
        Claim(f.cause.title, Level[f.severity.name], (f.cause.part,), f.sentence) for f in diagnosis.findings
    ]


def setup(case: Any) -> Setup:
    """The case as a setup: with its own loss function where the loss has no penalty of the weights."""
    if not penalized(case):
        return Setup(case.model, loss_fn=case.loss_fn, optimizer=case.optimizer)

    def step(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        loss: Tensor = case.loss_fn(model(x), y) + model.penalty()
        return loss

    return Setup(case.model, optimizer=case.optimizer, step=step)


def planned(case: Any) -> int | None:
    """How many steps the program takes, if that is known."""
    rows = len(case.x_train)
    if case.epochs is None or rows >= ROWS or case.x_train.numel() >= VALUES:
        return None
    return int(case.epochs * math.ceil(rows / case.batch_size))
