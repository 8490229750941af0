"""What the rules on output, loss and targets share."""

from __future__ import annotations

import math

from gradmend.causes import Cause
from gradmend.diagnosis.finding import Finding, Severity
from gradmend.profile import Profile
from gradmend.readings import LossReading, OutputReading, TargetReading

AMOUNTS = "Take `nn.MSELoss()`, with a last layer without activation."
SIGNS = "Take `nn.SoftMarginLoss()` on the raw scores."
"""What to do where the targets are amounts, or 1 and -1, and the loss is made for something else."""

PAIRS = 20
"""Fewer samples of each class than this do not tell how many classes there are."""


def known(profile: Profile) -> tuple[OutputReading, LossReading, TargetReading] | None:
    """Output, loss and targets, if all are known."""
    contract = profile.contract
    if contract is None or contract.output is None or contract.loss is None or contract.target is None:
        return None
    return contract.output, contract.loss, contract.target


def found(
    profile: Profile,
    cause: Cause,
    severity: Severity,
    sentence: str,
    measured: float | None = None,
    expected: float | None = None,
    unit: str = "",
) -> Finding:
    """A finding at the last function of the network, with its line and that of the loss."""
    contract = profile.contract
    output = contract.output if contract else None
    loss = contract.loss if contract else None
    sites = (output.site,) if output and output.site else ()
    where = tuple(dict.fromkeys(part.line for part in (output, loss) if part and part.line))
    return Finding(cause, severity, sentence, measured, expected, unit, sites, where)


def is_softmax(output: OutputReading) -> bool:
    """Whether the output sums to one over its units: by its last function, or by what was measured."""
    summed = output.sums_to_one not in (None, 0)
    return summed or (output.kind == "softmax" and output.function == "softmax")


def is_sigmoid(output: OutputReading) -> bool:
    """Whether each unit stays between 0 and 1 by itself."""
    return output.kind == "activation" and output.bounds == (0.0, 1.0)


def class_numbers(target: TargetReading) -> bool:
    """Whether each sample has one class, given by its number."""
    return target.whole and target.low >= 0 and target.one_hot is None and single(target)


def single(target: TargetReading) -> bool:
    """Whether there is one target per sample."""
    return math.prod(target.shape[1:]) == 1


def by_number(output: OutputReading, loss: LossReading, target: TargetReading) -> bool:
    """Whether the loss takes the numbers of classes: the target has no axis for them."""
    return loss.per_class and math.prod(target.shape) * classes(output, loss) == math.prod(output.shape)


def classes(output: OutputReading, loss: LossReading) -> int:
    """How many classes the loss sees."""
    return output.shape[loss.axis] if loss.axis is not None else 1
