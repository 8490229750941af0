"""Rules on the loss: whether it suits the targets and the output, whatever it is called."""

from __future__ import annotations

import math

from gradmend.causes import Cause
from gradmend.diagnosis.finding import Finding, Severity
from gradmend.diagnosis.terms import (
    AMOUNTS,
    SIGNS,
    class_numbers,
    found,
    is_sigmoid,
    is_softmax,
    known,
    single,
)
from gradmend.profile import Profile
from gradmend.readings import LossReading, OutputReading, TargetReading

_Judgement = tuple[Severity, str] | None

_IGNORED = 0.1
"""A loss that takes no notice of more samples than this learns from a part of the classes only."""


def unfit_loss(profile: Profile) -> Finding | None:
    """The loss is made for other targets, or for another output. The first that holds of:

    - it is no number for such targets, whatever the output;
    - it takes no notice of one of two targets (a hinge of 0 and 1, half of a cross-entropy);
    - it divides by targets at and around zero, so that others hardly count;
    - it takes targets below zero for zero;
    - cross-entropy, a hinge or a count's likelihood, with targets that are no classes, no signs or no counts;
    - cross-entropy that asks the same of all classes, as one that multiplies by their numbers;
    - cross-entropy of classes over units that may all be 1 at once: nothing holds them down;
    - the absolute error of probabilities against classes: its slope does not grow with the error, and fades
      with that of the squashing function (Zhang, Sabuncu 2018);
    - the squared error of the same, or binary cross-entropy over a softmax: these train, if slower (Golik,
      Doetsch, Ney 2013).
    """
    terms = known(profile)
    judges = (
        _undefined,
        _one_sided,
        _divided_by_zero,
        _floored,
        _no_classes,
        _no_signs,
        _no_counts,
        _all_alike,
        _free_units,
        _never_negative,
        _error_of_probabilities,
        _binary_over_softmax,
    )
    judgements = (judge(*terms) for judge in judges) if terms is not None else iter(())
    judgement = next((judgement for judgement in judgements if judgement is not None), None)
    return found(profile, Cause.UNFIT_LOSS, *judgement) if judgement else None


def mismatched_shapes(profile: Profile) -> Finding | None:
    """As many outputs as targets, and the loss is the same when samples swap targets.

    Mostly because their shapes differ, and all outputs are compared with all targets. Where the shapes are
    the same, a loss may compare two sets on purpose: then the outputs count together, not each by itself.
    """
    contract = profile.contract
    if contract is None or contract.paired is not False or contract.output is None or contract.target is None:
        return None
    output, target = contract.output.shape, contract.target.shape
    if math.prod(output) != math.prod(target):
        return None
    text = (
        f"The output has shape {list(output)}, the target {list(target)}: the loss compares every output "
        "with the targets of all samples. "
    )
    if output == target:
        text += "Look for a `squeeze` or `flatten` of one of the two within the loss."
    else:
        text += "Type `output.squeeze(-1)` or `target.unsqueeze(-1)`, whichever makes them alike."
    return found(profile, Cause.MISMATCHED_SHAPES, Severity.ERROR, text)


def _undefined(_: OutputReading, loss: LossReading, target: TargetReading) -> _Judgement:
    if loss.family != "undefined":
        return None
    text = "The loss is no number for such targets, whatever the output: look for a logarithm or a root."
    return Severity.ERROR, text if target.whole and target.low >= 0 else f"{text} {AMOUNTS}"


def _one_sided(output: OutputReading, loss: LossReading, target: TargetReading) -> _Judgement:
    zeros = loss.family == "hinge" and target.one_hot is not None
    some = loss.ignored >= _IGNORED and output.units == 1 and target.binary and target.distinct == 2
    if not zeros and not some:
        return None
    if loss.family == "hinge" or loss.wants == "logits":
        return (
            Severity.ERROR,
            "A hinge takes targets of 1 and -1; those of 0 count nothing. Type `2 * y - 1`.",
        )
    text = "The loss sees only the samples whose target is 1, and is lowest if the answer is always 1."
    return Severity.ERROR, f"{text} Take `nn.BCELoss()`, which counts both."


def _no_classes(output: OutputReading, loss: LossReading, target: TargetReading) -> _Judgement:
    dense = math.prod(target.shape) == math.prod(output.shape)
    outside = target.low < 0 or target.high > 1
    amounts = outside and not target.whole
    if loss.family == "binary cross entropy" and amounts and target.distinct > 2:
        return (
            Severity.ERROR,
            "Binary cross-entropy takes 0, 1 or a probability; these targets are amounts. " + AMOUNTS,
        )
    if loss.family == "cross entropy" and dense and target.signs:
        return Severity.ERROR, f"Cross-entropy takes probabilities; these targets are 1 and -1. {SIGNS}"
    if loss.family == "cross entropy" and dense and output.units == 1 and outside and target.whole:
        text = "Cross-entropy takes probabilities; these targets are numbers of classes."
        return Severity.ERROR, f"{text} {_CLASSES}"
    probable = target.distributions is not None or loss.wants == "log probabilities"
    if not loss.per_class or loss.family == "flat" or not dense or probable:
        return None
    if amounts:
        return (
            Severity.ERROR,
            "Cross-entropy takes classes or their probabilities; these targets are amounts. " + AMOUNTS,
        )
    if target.binary and output.units > 1:
        several = "Some targets name several classes at once, or none, and a softmax can only choose one."
        return Severity.WARNING, f"{several} Take `nn.BCEWithLogitsLoss()` on the raw scores."
    return None


def _divided_by_zero(_: OutputReading, loss: LossReading, target: TargetReading) -> _Judgement:
    if not loss.divides:
        return None
    cure = "Take `nn.BCEWithLogitsLoss()` on the raw scores." if target.binary else "Take `nn.MSELoss()`."
    cure = _CLASSES if target.one_hot == 1 else cure
    text = "The loss divides by the targets: those at and around 0 count, and all others hardly."
    return Severity.ERROR, f"{text} {cure}"


def _floored(_: OutputReading, loss: LossReading, target: TargetReading) -> _Judgement:
    if not loss.floored:
        return None
    text = f"The loss takes all targets below 0 for 0, and these go down to {target.low:.3g}."
    return Severity.ERROR, f"{text} {AMOUNTS}"


def _no_signs(_: OutputReading, loss: LossReading, target: TargetReading) -> _Judgement:
    if loss.family != "hinge" or target.one_hot is not None or (target.low >= -1 and target.high <= 1):
        return None
    kind, cure = ("numbers of classes", _CLASSES) if target.whole else ("amounts", AMOUNTS)
    return Severity.ERROR, f"A hinge takes targets of 1 and -1; these are {kind}. {cure}"


def _no_counts(_: OutputReading, loss: LossReading, target: TargetReading) -> _Judgement:
    if loss.family != "poisson" or target.low >= 0:
        return None
    text = "The likelihood of a Poisson distribution takes counts; some of these targets are negative."
    return Severity.ERROR, f"{text} {AMOUNTS}"


def _all_alike(output: OutputReading, loss: LossReading, target: TargetReading) -> _Judgement:
    numbers = class_numbers(target) and target.high < output.units
    if loss.family not in ("cross entropy", None) or not numbers or not loss.blind(target):
        return None
    text = "The loss multiplies by the number of the class, and asks the same of all of them."
    return Severity.ERROR, f"{text} {_CLASSES}"


_CLASSES = "Take `nn.CrossEntropyLoss()` on the raw scores, a unit for each class."


def _free_units(output: OutputReading, loss: LossReading, _: TargetReading) -> _Judgement:
    apart = loss.family == "cross entropy" and loss.wants == "probabilities" and is_sigmoid(output)
    if not apart or output.units == 1:
        return None
    if loss.normalizes:
        return (
            Severity.WARNING,
            "Cross-entropy of classes goes with a softmax, not with a unit by itself for each class.",
        )
    text = "The loss asks that the unit of the right class is 1, and nothing keeps all others from it."
    return (
        Severity.ERROR,
        f"{text} End the network with a softmax, or take `nn.CrossEntropyLoss()` on the raw scores.",
    )


def _never_negative(output: OutputReading, loss: LossReading, target: TargetReading) -> _Judgement:
    low = output.bounds[0] if output.bounds else -math.inf
    if loss.family != "hinge" or low < 0 or target.low >= 0:
        return None
    return (
        Severity.ERROR,
        f"A hinge asks for scores of both signs, and {output.function} gives none below 0. Leave it out.",
    )


def _error_of_probabilities(output: OutputReading, loss: LossReading, target: TargetReading) -> _Judgement:
    classes = target.one_hot is not None or (target.binary and target.distinct == 2 and single(target))
    if loss.wants != "values" or not classes or not (is_sigmoid(output) or is_softmax(output)):
        return None
    if math.prod(output.shape) != math.prod(target.shape):
        return None
    cure = "Take `nn.CrossEntropyLoss()`" if output.units > 1 else "Take `nn.BCEWithLogitsLoss()`"
    cure += f", and leave the {output.function or 'softmax'} out."
    if loss.family == "absolute":
        return (
            Severity.ERROR,
            f"The absolute error of a probability has hardly a slope where it is most wrong. {cure}",
        )
    return (
        Severity.WARNING,
        f"The squared error of a probability has little slope where it is most wrong. {cure}",
    )


def _binary_over_softmax(output: OutputReading, loss: LossReading, target: TargetReading) -> _Judgement:
    exclusive = is_softmax(output) and output.units > 1 and loss.wants == "probabilities"
    if loss.family != "binary cross entropy" or not exclusive or class_numbers(target):
        return None
    text = "The softmax lets one class win, and binary cross-entropy counts each class by itself."
    return Severity.WARNING, f"{text} Take `nn.CrossEntropyLoss()` on the raw scores."


RULES = (mismatched_shapes, unfit_loss)
