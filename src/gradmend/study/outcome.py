"""What one trial of a study did, and what its measures mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

DONE, DIVERGED, NOT_APPLICABLE, FAILED = "done", "diverged", "not applicable", "failed"
STATUSES = (DONE, DIVERGED, NOT_APPLICABLE, FAILED)
"""What can become of a trial: it ended, its loss was no number, its remedy did not fit, or it raised."""


@dataclass(frozen=True)
class Measure:
    """What a number of a trial means.

    Args:
        sentence: what is measured.
        unit: of the number; "" for a plain count or ratio.
        better: "more" or "less"; None where neither is better.
    """

    sentence: str
    unit: str = ""
    better: Literal["more", "less"] | None = None


MEASURES: Mapping[str, Measure] = MappingProxyType(
    {
        "test_accuracy": Measure("share of right outputs on held-back data", better="more"),
        "train_accuracy": Measure("share of right outputs on the training data", better="more"),
        "gap": Measure("training accuracy less test accuracy", better="less"),
        "test_loss": Measure("loss on held-back data", better="less"),
        "train_loss": Measure("median loss of the last quarter of the steps", better="less"),
        "steps_to_target": Measure("optimizer steps until the target accuracy", "steps", "less"),
        "step_seconds": Measure("time of one optimizer step", "s", "less"),
        "seconds": Measure("time of the training", "s", "less"),
        "parameters": Measure("trainable numbers", better="less"),
        "memory": Measure("parameters, gradients, optimizer state, saved activations", "bytes", "less"),
        "gradient_ratio": Measure("gradient of the first layer over the last, at the start"),
    }
)


@dataclass(frozen=True)
class Outcome:
    """What one trial of a study did.

    Args:
        arm: factor -> label of its level; the same factors in the same order in all outcomes of a study.
        seed: of the trial.
        status: "done", "diverged", "not applicable" or "failed".
        reason: for the last two, one sentence; else "".
        measures: by the names of `MEASURES`; what is not known is missing.
        losses: per optimizer step.
        accuracies: on the training data, per epoch, while training.
        findings: names of `Cause` found at the start; of the arm's first seed only.

    Examples:
        >>> Outcome({"norm": "batch"}, 0, "done", "", {"test_accuracy": 0.9}, (2.3, 1.1), (0.9,)).status
        'done'
    """

    arm: Mapping[str, str]
    seed: int
    status: str
    reason: str
    measures: Mapping[str, float]
    losses: tuple[float, ...]
    accuracies: tuple[float, ...]
    findings: tuple[str, ...] = ()
