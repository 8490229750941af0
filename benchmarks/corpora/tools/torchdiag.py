"""torchdiag 0.1.0: its three checks at the end of a training (https://pypi.org/project/torchdiag)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torchdiag
from torch import Tensor

from benchmarks.corpora.answers import Claim, Level
from benchmarks.corpora.cases import draw
from benchmarks.corpora.training import claims, train, watched

PARTS: dict[str, tuple[str, ...]] = {
    "gradients: EXPLODE": ("learning_rate", "initialization", "normalization"),
    "gradients: VANISH": ("depth", "activation", "initialization", "normalization"),
    "gradients: no_grad": ("wiring",),
    "dead neurons": ("learning_rate", "initialization", "input", "activation"),
    "step: loss not finite": ("numerics", "learning_rate"),
    "step: no parameter changed": ("wiring", "learning_rate"),
}
"""What its advice would change; of gradients, which it gives none for, what their usual cures change."""


def check(case: Any, seed: int) -> list[Claim]:
    """Train, then let it verify a step and look at gradients and units.

    A unit's level is its own; an issue of gradients or of the step has none, and counts as an error.
    """
    model, optimizer = watched(case)
    train(case, optimizer, seed, lambda _: None)
    ((x, y),) = draw(case, 1, seed + 1)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        value: Tensor = case.loss_fn(output, target) + model.penalty()
        return value

    found = list(_step(torchdiag.verify_step(model, optimizer, loss, x, y)))
    found += list(_gradients(torchdiag.check_gradients(model)))
    found += list(_dead(torchdiag.check_dead_neurons(model, x)))
    return claims(found, PARTS)


def _step(result: dict[str, Any]) -> Iterator[tuple[str, Level, str]]:
    if not math.isfinite(result["loss"]):
        yield "step: loss not finite", Level.ERROR, f"Loss is {result['loss']}"
    if not result["params_updated"]:
        yield "step: no parameter changed", Level.ERROR, "No parameters changed"


def _gradients(report: dict[str, Any]) -> Iterator[tuple[str, Level, str]]:
    for name, reading in report.items():
        if reading["status"] != "OK":
            yield f"gradients: {reading['status']}", Level.ERROR, f"{name}: {reading.get('max')}"


def _dead(report: dict[str, Any]) -> Iterator[tuple[str, Level, str]]:
    for name, reading in report.items():
        if (percent := reading["dead_pct"]) > 20:
            level = Level.ERROR if percent > 50 else Level.WARNING
            yield "dead neurons", level, f"{name}: {percent:.0f} % dead"
