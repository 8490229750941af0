"""Rules on the output: whether its last activation and the number of its units suit loss and targets.

What the loss is, its behaviour tells (`gradmend.contract`), so losses written by hand count as torch's do.
Where that is not sure, the rules are silent.
"""

from __future__ import annotations

import math

from gradmend.causes import Cause
from gradmend.console import number
from gradmend.diagnosis.finding import Finding, Severity
from gradmend.diagnosis.terms import (
    AMOUNTS,
    PAIRS,
    SIGNS,
    by_number,
    class_numbers,
    classes,
    found,
    is_sigmoid,
    is_softmax,
    known,
)
from gradmend.profile import Profile
from gradmend.readings import LossReading, OutputReading, TargetReading

_LOGITS_LOSSES = ("cross_entropy", "binary_cross_entropy_with_logits")
_BEYOND = 1e-4
"""So far outside 0 and 1 is no rounding."""

_UNMET, _SLIGHT = 0.1, 0.01
"""Shares of the targets' variance that no output within bounds can explain."""


def softmax_before_logits_loss(profile: Profile) -> Finding | None:
    """The output is a softmax, or sums to one over its units, and the loss applies its own."""
    terms = known(profile)
    if terms is None:
        return _fed(profile, "softmax", Cause.SOFTMAX_BEFORE_LOGITS_LOSS)
    output, loss, _ = terms
    several = output.kind == "softmax" or loss.per_class
    if not _takes_logits(loss) or not is_softmax(output) or not several or output.units == 1:
        return None
    return _twice(profile, output.function or "softmax", loss, Cause.SOFTMAX_BEFORE_LOGITS_LOSS)


def sigmoid_before_logits_loss(profile: Profile) -> Finding | None:
    """The output is a sigmoid, or another activation between 0 and 1, and the loss applies its own."""
    terms = known(profile)
    if terms is None:
        return _fed(profile, "sigmoid", Cause.SIGMOID_BEFORE_LOGITS_LOSS)
    output, loss, _ = terms
    if not _takes_logits(loss) or not is_sigmoid(output):
        return None
    return _twice(profile, output.function or "sigmoid", loss, Cause.SIGMOID_BEFORE_LOGITS_LOSS)


def logits_before_probability_loss(profile: Profile) -> Finding | None:
    """The loss takes the logarithm of the output, or takes it for one, and the output need not be that.

    The output leaves the range from 0 to 1, or can, since it comes from a layer with weights, or from an
    activation with another range. A loss that divides by the sum over the classes asks only for numbers above
    0. A loss on logarithms of probabilities asks that their exponentials sum to one.
    """
    terms = known(profile)
    if terms is None or not _no_probability(*terms[:2]):
        return None
    output, loss, _ = terms
    wanted = "logarithms of probabilities" if loss.wants == "log probabilities" else "probabilities"
    last = f" of {output.function}" if output.function else ""
    text = (
        f"The loss takes {wanted}. The output{last} runs from {number(output.low)} to {number(output.high)} "
        f"in this batch{_may(output)}. {_cure(loss)}"
    )
    measured = output.low if output.low < 0 else output.high
    cause = Cause.LOGITS_BEFORE_PROBABILITY_LOSS
    return found(
        profile, cause, Severity.ERROR, text, measured, 0.0 if measured < 0 else 1.0, "output, its bound"
    )


def softmax_over_one_unit(profile: Profile) -> Finding | None:
    """The softmax of the output, or the sum that the loss divides by, runs over a single unit.

    It is 1 whatever the weights: exactly, for every sample.
    """
    contract = profile.contract
    output, loss = (contract.output, contract.loss) if contract else (None, None)
    if output is None or (len(output.shape) < 2 and math.prod(output.shape) < 2):
        return None
    constant = output.low == output.high == (0.0 if output.function == "log_softmax" else 1.0)
    of_loss = loss is not None and loss.family == "flat" and output.units == 1
    if not (output.kind == "softmax" and constant) and not of_loss:
        return None
    text = (
        "The sum over the classes has one unit only, so each output is divided by itself: it is 1 for "
        "every input. "
    )
    target = contract.target if contract else None
    amounts = target is not None and not target.whole and (target.low < 0 or target.high > 1)
    text += AMOUNTS if amounts else SIGNS if target is not None and target.signs else _SINGLE
    return found(profile, Cause.SOFTMAX_OVER_ONE_UNIT, Severity.ERROR, text, 1.0, 2.0, "units at least")


_SINGLE = "Type `nn.Sigmoid()` for one unit, or give the last layer one unit per class."


def softmax_over_the_batch(profile: Profile) -> Finding | None:
    """The output sums to one over the samples of the batch, or the softmax in the loss does."""
    contract = profile.contract
    output, loss = (contract.output, contract.loss) if contract else (None, None)
    of_loss = loss is not None and loss.axis == 0 and loss.family == "cross entropy"
    own = output is not None and output.kind == "softmax" and output.sums_to_one == 0
    if not of_loss and not own:
        return None
    text = "The softmax runs over the samples of the batch, so these share one probability. Type `dim=1`."
    return found(profile, Cause.SOFTMAX_OVER_THE_BATCH, Severity.ERROR, text)


def unreachable_targets(profile: Profile) -> Finding | None:
    """The range of the last activation leaves a large part of the targets unmet, whatever the weights.

    The least squared error that is possible within the range, over the variance of the targets (guessing
    their mean has 1): an error above 0.1, a warning above 0.01. Raw scores that cannot be negative cannot say
    no either.
    """
    terms, contract = known(profile), profile.contract
    if terms is None or contract is None:
        return None
    output, loss, target = terms
    never_no = loss.family == "binary cross entropy" and loss.wants == "logits" and output.bounds
    if never_no and output.bounds and output.bounds[0] >= 0 and not is_sigmoid(output) and target.low == 0:
        text = f"{output.function} puts out no negative score: no prediction falls below 1/2. Leave it out."
        return found(profile, Cause.UNREACHABLE_TARGETS, Severity.ERROR, text, 0.0, -math.inf, "lowest score")
    least = contract.shortfall
    if loss.wants != "values" or loss.family in ("hinge", "poisson") or least is None or least < _SLIGHT:
        return None
    severity = Severity.ERROR if least > _UNMET else Severity.WARNING
    text = (
        f"The targets run from {number(target.low)} to {number(target.high)}, and {output.function} "
        f"{_reach(output)}: "
        f"whatever the weights, {least:.0%} of their variance or more stays unexplained. Leave the last "
        "layer "
        "without activation, or scale the targets into its range."
    )
    return found(profile, Cause.UNREACHABLE_TARGETS, severity, text, least, 0.0, "least error over variance")


def wrong_output_count(profile: Profile) -> Finding | None:
    """Fewer units than classes, one unit compared with many targets, or many units with one target.

    Fewer units than classes: where the loss is no number, for else such targets are ignored on purpose. A
    note where there are more units than classes in twenty samples for each unit.
    """
    terms = known(profile)
    if terms is None:
        return None
    output, loss, target = terms
    units = output.units
    kinds = len(target.counts)
    if (
        loss.family == "binary cross entropy"
        and units == 1
        and class_numbers(target)
        and kinds > 2
        and not loss.blind(target)
    ):
        text = (
            f"One unit tells two classes apart, and the targets hold {kinds}. Give the last layer {kinds} "
            "units, "
            "and take `nn.CrossEntropyLoss()`."
        )
        return _count(profile, text, units, kinds)
    if by_number(output, loss, target) and target.whole and units > 1:
        return _numbered(profile, output, loss, target)
    wanted = _targets_per_place(output, target)
    elementwise = loss.wants == "values" or loss.family in ("binary cross entropy", "poisson")
    if loss.per_class or not elementwise or 1 not in (units, wanted) or units == wanted:
        return None
    if units > 1:
        text = f"All {units} units are compared with the same target, so all learn the same."
        return _count(profile, f"{text} Give the last layer one unit{_or_classes(loss, target)}.", units, 1)
    text = f"The one unit is compared with {wanted:.0f} targets, so it learns their mean."
    return _count(profile, f"{text} Give the last layer {wanted:.0f} units.", units, int(wanted))


def _targets_per_place(output: OutputReading, target: TargetReading) -> float:
    """How many targets stand beside the units of a sample, or of each of its steps."""
    places = output.shape if len(output.shape) == 1 else output.shape[:-1]
    return math.prod(target.shape) / math.prod(places) if len(output.shape) < 4 else math.nan


def _numbered(
    profile: Profile, output: OutputReading, loss: LossReading, target: TargetReading
) -> Finding | None:
    units = classes(output, loss)
    refused = not math.isfinite(profile.loss)  # else such a number is one to be ignored
    if target.high >= units and refused and not (target.low == 1 and target.high == units):
        text = (
            f"Classes run up to {number(target.high)}, and {units} units are numbered from 0 to {units - 1}."
        )
        return _count(profile, text, units, int(target.high) + 1)
    if units > target.high + 1 and target.samples >= PAIRS * units:
        text = f"There are {units} units, and {number(target.high + 1)} classes in {target.samples} samples."
        return _count(profile, text, units, int(target.high) + 1, Severity.NOTE)
    return None


def _count(
    profile: Profile, text: str, units: int, wanted: int, severity: Severity = Severity.ERROR
) -> Finding:
    return found(profile, Cause.WRONG_OUTPUT_COUNT, severity, text, float(units), float(wanted), "units")


def _or_classes(loss: LossReading, target: TargetReading) -> str:
    if loss.wants == "values" and not class_numbers(target):
        return ""
    return ", or number the classes and take `nn.CrossEntropyLoss()`"


def _takes_logits(loss: LossReading) -> bool:
    return loss.wants == "logits" and loss.family != "poisson"


def _twice(profile: Profile, function: str, loss: LossReading, cause: Cause) -> Finding:
    own = "sigmoid" if loss.family == "binary cross entropy" else "softmax"
    text = f"The {function} feeds a loss that takes raw scores and applies its own {own}. Leave it out."
    return found(profile, cause, Severity.ERROR, text)


def _fed(profile: Profile, function: str, cause: Cause) -> Finding | None:
    """By the names of torch's functions, where the loss itself was not looked at."""
    for loss in profile.anatomy.losses:
        guilty = [r for r in profile.sites if r.site.index in loss.direct and r.site.function == function]
        if guilty and loss.function in _LOGITS_LOSSES:
            own = "sigmoid" if "binary" in loss.function else "softmax"
            text = f"The {function} feeds {loss.function}, which takes raw scores and applies its own {own}."
            names, lines = (tuple(getattr(r.site, what) for r in guilty) for what in ("name", "line"))
            where = tuple(line for line in lines if line)
            return Finding(cause, Severity.ERROR, text, sites=names, where=where)
    return None


def _no_probability(output: OutputReading, loss: LossReading) -> bool:
    low, high = output.bounds or (0.0, 1.0)
    if loss.wants == "log probabilities":
        return output.logs_of_one is None and output.function != "log_softmax"
    if loss.wants != "probabilities":
        return False
    if loss.normalizes:
        return output.low < -_BEYOND or low < 0 or (output.kind == "activation" and not output.positive)
    return output.low < -_BEYOND or output.high > 1 + _BEYOND or low < 0 or high > 1


def _may(output: OutputReading) -> str:
    low, high = output.bounds or (0.0, 1.0)
    inside = output.low >= 0 and output.high <= 1
    return (
        f", and can run from {number(low)} to {number(high)}" if inside and (low, high) != (0.0, 1.0) else ""
    )


def _cure(loss: LossReading) -> str:
    if loss.wants == "log probabilities":
        return (
            "End the network with `nn.LogSoftmax(dim=1)`, or take `nn.CrossEntropyLoss()` on the raw scores."
        )
    if loss.per_class:
        return "End the network with `nn.Softmax(dim=1)`, or take `nn.CrossEntropyLoss()` on the raw scores."
    return "End the network with `nn.Sigmoid()`, or take `nn.BCEWithLogitsLoss()` on the raw scores."


def _reach(output: OutputReading) -> str:
    low, high = output.bounds or (-math.inf, math.inf)
    if output.kind == "softmax":
        return "sums to one over its units"
    return f"stays between {number(low)} and {number(high)}"


RULES = (
    softmax_before_logits_loss,
    sigmoid_before_logits_loss,
    softmax_over_one_unit,
    softmax_over_the_batch,
    wrong_output_count,
    unreachable_targets,
    logits_before_probability_loss,
)
