"""What the steps of a treated training are subject to: a share of the rate, and a bound of the gradient."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from gradmend.watch.gradients import dense

_RECENT, _FEWEST = 64, 16
"""Healthy steps of which the median norm is taken, at most and at least."""


_EXPLODED = 10.0
"""Times the usual norm: gradients of sound trainings differ by less."""


class Throttle:
    """Lowers the rate and clips the gradient of each step, and knows the norms of the healthy ones.

    The rate is lowered for the time of the step only, so that schedules, and what the user sees of the
    optimizer, are as without it.

    Attributes:
        factor: of the learning rates of all groups.
        bound: of the norm of the gradient; None for no bound.

    Examples:
        >>> weight = torch.ones(1, requires_grad=True)
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> throttle = Throttle()
        >>> throttle.factor, throttle.bound, weight.grad = 0.5, 0.2, torch.ones(1)
        >>> throttle.before_step(1, optimizer)
        >>> optimizer.step()
        >>> throttle.restore()
        >>> round(weight.item(), 4), optimizer.param_groups[0]["lr"]
        (0.9, 1.0)
    """

    def __init__(self) -> None:
        self.factor = 1.0
        self.bound: float | None = None
        self._planned: list[tuple[dict[str, Any], Any]] = []
        self._waiting: deque[tuple[int, Tensor]] = deque(maxlen=_RECENT)
        self._healthy: deque[Tensor] = deque(maxlen=_RECENT)
        self._all: deque[Tensor] = deque(maxlen=_RECENT)

    def before_step(self, step: int, optimizer: Optimizer) -> None:
        """An optimizer is about to take this step."""
        self.restore()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [gradient for p in parameters if (gradient := dense(p.grad)) is not None]
        if gradients:
            norm = get_total_norm([gradient.detach() for gradient in gradients])
            self._waiting.append((step, norm))
            if self.bound is not None:
                clip_grads_with_norm_(parameters, self.bound, norm)
        if self.factor != 1:
            self._planned = [(group, group["lr"]) for group in optimizer.param_groups]
            for group, rate in self._planned:
                group["lr"] = rate * self.factor

    def restore(self) -> None:
        """Give the optimizer the rates that the user had chosen."""
        for group, rate in self._planned:
            group["lr"] = rate
        self._planned = []

    def judge(self, step: int, healthy: bool) -> None:
        """Whether the loss of a step was as it should be."""
        while self._waiting and self._waiting[0][0] <= step:
            known, norm = self._waiting.popleft()
            self._all.append(norm)
            if known == step and healthy:
                self._healthy.append(norm)

    @property
    def usual(self) -> float | None:
        """The median norm of the gradient in the last healthy steps, before clipping; None of too few."""
        found = [norm for norm in _on_host(self._healthy) if 0 < norm < math.inf]
        return median(found) if len(found) >= _FEWEST else None

    @property
    def exploded(self) -> bool:
        """Whether some gradient of late was ten times the usual and more."""
        usual = self.usual
        return usual is not None and any(norm > _EXPLODED * usual for norm in _on_host(self._all))


def _on_host(norms: Iterable[Tensor]) -> list[float]:
    found = list(norms)
    values: list[float] = torch.stack(found).tolist() if found else []
    return values


def highest_rate(optimizer: Optimizer) -> float:
    """The largest learning rate of the groups."""
    return max(float(group["lr"]) for group in optimizer.param_groups)
