"""torchmortem 0.1.1, all collectors and detectors (https://github.com/sebseager/torchmortem)."""

from __future__ import annotations

from typing import Any

from torchmortem import Autopsy

from benchmarks.corpora.answers import Claim, Level
from benchmarks.corpora.training import claims, rule_of, train, watched

LEVELS = {"CRITICAL": Level.ERROR, "WARNING": Level.WARNING, "INFO": Level.NOTE}

PARTS: dict[str, tuple[str, ...]] = {
    "gradient_flow: vanishing gradients": ("depth", "activation", "normalization"),
    "gradient_flow: exploding gradients": ("learning_rate", "initialization", "normalization", "recurrence"),
    "gradient_flow: gradient stalling": ("activation", "initialization", "depth"),
    "dead_units: dead units": ("activation", "learning_rate", "initialization", "normalization"),
    "saturation: activation saturation": ("activation", "normalization", "learning_rate", "initialization"),
    "update_ratio: ratio too low": ("learning_rate", "optimizer"),
    "update_ratio: ratio too high": ("learning_rate", "schedule", "optimizer"),
    "loss_dynamics: training divergence": ("learning_rate", "numerics", "schedule"),
    "loss_dynamics: loss plateau": ("learning_rate", "schedule", "optimizer"),
    "loss_dynamics: catapult phase": (),
    "loss_dynamics: edge of stability": (),
    "weight_norm: norm explosion": ("regularization", "learning_rate"),
    "weight_norm: stagnant weight norms": ("learning_rate", "wiring"),
    "weight_norm: norm imbalance": ("optimizer", "normalization", "initialization"),
    "rank_collapse: rank collapse": ("regularization", "capacity", "learning_rate", "optimizer"),
    "gradient_noise: gradient noise": ("batch", "optimizer", "learning_rate"),
}
"""What its advice (`remediation`) would change, by category and title."""


def check(case: Any, seed: int) -> list[Claim]:
    """Watch a training and read the report; findings that name layers count once per kind."""
    model, optimizer = watched(case)
    with Autopsy(model, optimizer=optimizer) as autopsy:
        train(case, optimizer, seed, lambda loss: autopsy.step(loss=loss.item()))
    findings = autopsy.get_report().findings
    return claims(((rule_of(f.title, PARTS), LEVELS[f.severity.name], f.summary) for f in findings), PARTS)
