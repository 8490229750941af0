"""gradmend's check: one call of `diagnose` on a few batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from benchmarks.corpora.answers import Claim, Level
from benchmarks.corpora.cases import draw, penalized
from gradmend.diagnosis import diagnose
from gradmend.setup import Setup

BATCHES = (4, 16)
"""So many batches are given at least and at most: not more than one epoch has, so that no row comes twice."""

ROWS, VALUES = 8_000, 19_000_000
"""Of data as large as this a part may have been cut off, so that nobody knows how many steps an epoch has."""


def check(case: Any, seed: int) -> list[Claim]:
    """An error is an alarm, and each finding blames the part of its cause."""
    epoch, (least, most) = math.ceil(len(case.x_train) / case.batch_size), BATCHES
    batches = draw(case, min(most, max(least, epoch)), seed)
    diagnosis = diagnose(setup(case), batches, steps=planned(case))
    return [
        Claim(f.cause.title, Level[f.severity.name], (f.cause.part,), f.sentence) for f in diagnosis.findings
    ]


def setup(case: Any) -> Setup:
    """The case as a setup: a penalty as weight decay where that is the same, else as part of the loss."""
    if not penalized(case):
        return Setup(case.model, loss_fn=case.loss_fn, optimizer=case.optimizer)
    if decay := weight_decay(case):
        return Setup(case.model, loss_fn=case.loss_fn, optimizer=partial(decayed, case.optimizer, decay))

    def step(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        loss: Tensor = case.loss_fn(model(x), y) + model.penalty()
        return loss

    return Setup(case.model, optimizer=case.optimizer, step=step)


def weight_decay(case: Any) -> float | None:
    """What a PyTorch program writes for the penalty: twice its factor, if it is that of all squared weights.

    The gradient of the penalty is then that of the decay, which SGD and Adam add to the gradient of the loss.
    """
    penalties = {id(parameter): (l1, l2) for parameter, l1, l2 in case.model.penalties}
    weights = {id(parameter) for parameter in case.model.parameters() if parameter.ndim > 1}
    kinds = set(penalties.values())
    if penalties.keys() != weights or len(kinds) != 1:
        return None
    ((l1, l2),) = kinds
    return None if l1 else 2 * float(l2)


def decayed(make: Callable[[Any], Optimizer], decay: float, parameters: Iterable[Tensor]) -> Optimizer:
    """The optimizer with a group of its own for the weights, which decay; biases do not."""
    optimizer = make(parameters)
    (plain,) = optimizer.param_groups
    weights = [parameter for parameter in plain["params"] if parameter.ndim > 1]
    plain["params"] = [parameter for parameter in plain["params"] if parameter.ndim < 2]
    optimizer.add_param_group({**plain, "params": weights, "weight_decay": decay})
    return optimizer


def planned(case: Any) -> int | None:
    """How many steps the program takes, if that is known."""
    rows = len(case.x_train)
    if case.epochs is None or rows >= ROWS or case.x_train.numel() >= VALUES:
        return None
    return int(case.epochs * math.ceil(rows / case.batch_size))
