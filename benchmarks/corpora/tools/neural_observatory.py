"""neural-observatory 0.5.1, all analyzers (https://pypi.org/project/neural-observatory)."""

from __future__ import annotations

from typing import Any

from neural_observatory import Observatory

from benchmarks.corpora.answers import Claim, Level
from benchmarks.corpora.training import claims, rule_of, train, watched

LEVELS = {"critical": Level.ERROR, "warning": Level.WARNING, "info": Level.NOTE, "healthy": Level.NOTE}

_FLOW = ("depth", "activation", "initialization", "normalization")
_STEP = ("learning_rate",)

PARTS: dict[str, tuple[str, ...]] = {
    "gradient_health: vanishing gradients": _FLOW,
    "gradient_health: exploding gradients": ("learning_rate", "initialization", "normalization"),
    "gradient_health: norm collapsed": _FLOW,
    "gradient_health: in gradients -- training is broken": ("numerics", "learning_rate"),
    "dead_neurons: are dead": ("learning_rate", "initialization", "activation"),
    "dead_neurons: appear dead": ("learning_rate", "initialization", "activation"),
    "activation_statistics: sparsity": ("activation", "initialization"),
    "activation_statistics: saturation": ("activation", "initialization", "normalization"),
    "anomaly_detection: detected in": ("numerics", "learning_rate"),
    "anomaly_detection: spike": _STEP,
    "parameter_health: training is broken": ("numerics", "learning_rate"),
    "parameter_health: parameter drift": _STEP,
    "parameter_health: step-to-step parameter change": _STEP,
    "parameter_health: norm near zero": ("regularization", "initialization"),
    "embedding_drift: drift": _STEP,
    "attention_health: attention entropy": (),
}
"""By analyzer and words. Where it gives no advice, what the usual cures of the symptom change."""


def check(case: Any, seed: int) -> list[Claim]:
    """Watch a training and read the report; findings that name layers count once per kind."""
    model, optimizer = watched(case)
    with Observatory(model) as observatory:
        train(case, optimizer, seed, lambda _: observatory.step())
        results = observatory.report().results
    found = ((result, text) for result in results for text in result.warnings)
    return claims(((_rule(r.analyzer_name, text), LEVELS[r.status.value], text) for r, text in found), PARTS)


def _rule(analyzer: str, sentence: str) -> str:
    own = {rule: parts for rule, parts in PARTS.items() if rule.startswith(analyzer)}
    return rule_of(sentence, own)
