"""What a program is to learn, read from its targets, and how well a network does it.

A repair may change what outputs mean: raw scores in place of probabilities, two units in place of one. So a
score reads the outputs as the loss does, and is comparable between a program, its repair and its fix.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

LossFn = Callable[[Tensor, Tensor], Tensor]

_ROWS, _MOST_LEVELS, _ASIDE = 256, 200, 0.1


@dataclass(frozen=True)
class Task:
    """What the targets ask for.

    Args:
        kind: one class of several, yes or no by each unit, or amounts.
        levels: the label of each class, in order.
        one_hot: whether a class is given by a row of zeros with a single one.
        mean: of amounts, per unit.
        deviation: of all amounts around it.
    """

    kind: Literal["class", "flags", "amounts"]
    levels: tuple[float, ...]
    one_hot: bool
    mean: Tensor
    deviation: float

    def labels(self, y: Tensor) -> Tensor:
        """The classes by number: their place among the levels."""
        if self.one_hot:
            return y.argmax(-1)
        levels = torch.tensor(self.levels, dtype=y.dtype)
        return (y.reshape(len(y), -1)[..., None] - levels).abs().argmin(-1).squeeze(-1)


def read_task(case: Any) -> Task:
    """Classes where the program measures accuracy, or all targets are 0 or 1; else amounts."""
    y = case.y_train
    values = y.unique()
    binary = bool(((y == 0) | (y == 1)).all())
    several = y.ndim > 1 and y.shape[-1] > 1
    one_hot = binary and several and bool((y.sum(-1) == 1).all())
    named = binary or (case.metric == "accuracy" and len(values) <= _MOST_LEVELS)
    mean = y.mean(0)
    deviation = float((y - mean).square().mean().sqrt())
    if one_hot:
        return Task("class", tuple(map(float, range(y.shape[-1]))), True, mean, deviation)
    if named and y[0].numel() == 1 and len(values) > 1:
        return Task("class", tuple(values.tolist()), False, mean, deviation)
    return Task("flags" if binary else "amounts", (0.0, 1.0) if binary else (), False, mean, deviation)


def constant(case: Any, task: Task) -> float:
    """The score of a guess that makes nothing of the input: the commonest class, or the mean, in training."""
    if task.kind == "amounts":
        return 0.0
    if task.kind == "flags":
        return float((case.y_test == task.mean.round()).float().mean())
    commonest = task.labels(case.y_train).flatten().bincount().argmax()
    return float((task.labels(case.y_test) == commonest).float().mean())


@torch.no_grad()
def score(model: nn.Module, loss_fn: LossFn, case: Any, task: Task) -> float:
    """The share of right outputs on the test rows, or R², which is never below -1.

    Raises:
        ValueError: if the outputs cannot be read as the task asks.
    """
    model.eval()
    output = torch.cat([model(part) for part in case.x_test.split(_ROWS)])
    model.train()
    if task.kind == "amounts":
        return _explained(output, case.y_test, task)
    if not bool(output.isfinite().all()):
        return 0.0
    if task.kind == "flags":
        return float(((output > _border(loss_fn, output, case, task)) == (case.y_test > 0.5)).float().mean())
    labels = task.labels(case.y_test)
    return float((_classes(output, labels, loss_fn, case, task) == labels).float().mean())


def _explained(output: Tensor, y: Tensor, task: Task) -> float:
    near = output.reshape(y.shape) if output.numel() == y.numel() else output
    error = float((near - (y.unsqueeze(-1) if y.ndim == near.ndim - 1 else y)).square().mean())
    variance = float((y - task.mean).square().mean()) or 1.0
    return max(-1.0, 1 - error / variance) if math.isfinite(error) else -1.0


def _classes(output: Tensor, labels: Tensor, loss_fn: LossFn, case: Any, task: Task) -> Tensor:
    if output.numel() == labels.numel():
        single = output.reshape(labels.shape)
        if len(task.levels) == 2:
            return (single > _border(loss_fn, output, case, task)).long()
        return (single[..., None] - torch.tensor(task.levels)).abs().argmin(-1)
    units = output.argmax(-1) if output.ndim > 1 else output
    if units.shape != labels.shape:
        raise ValueError(f"outputs {list(output.shape)} cannot be read as classes {list(labels.shape)}")
    if task.one_hot or not all(level in range(output.shape[-1]) for level in task.levels):
        return units
    return (units[..., None] == torch.tensor(task.levels)).long().argmax(-1)  # a unit for each number


def _border(loss_fn: LossFn, output: Tensor, case: Any, task: Task) -> float:
    """Where outputs of one unit begin to mean the second class: where its loss begins to be the lower one."""
    low, high = (_targets(case, task, level) for level in (0, 1))
    candidates = (0.5, 0.0, sum(task.levels) / 2)

    def prefers(value: float) -> bool:
        given = torch.full_like(output[: len(low)], value)
        return bool(loss_fn(given, high) < loss_fn(given, low))

    turns = (at for at in candidates if prefers(at + _ASIDE) and not prefers(at - _ASIDE))
    return next(turns, 0.5)


def _targets(case: Any, task: Task, level: int) -> Tensor:
    rows: Tensor = torch.zeros_like(case.y_test[:2])
    if task.one_hot:
        rows[..., level] = 1
        return rows
    return rows + task.levels[level]
