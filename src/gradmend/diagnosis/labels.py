"""Rules on the targets: their numbers, their scale, and whether the inputs say anything about them."""

from __future__ import annotations

import math

from gradmend.causes import Cause
from gradmend.console import number
from gradmend.diagnosis.finding import Finding, Severity
from gradmend.diagnosis.terms import by_number, classes, found, known, single
from gradmend.profile import Profile
from gradmend.readings import LossReading, OutputReading, TargetReading

_FEW = 8
"""So few samples may well be all of one class."""

_MANY = 64
"""So many samples tell the share of a class, or whether it can be guessed from the input."""

_RARE = 0.1
"""Of all samples: what is not of the largest class, where there is hardly anything else."""


def labels_out_of_range(profile: Profile) -> Finding | None:
    """The loss expects other labels: 0 to C - 1 for C classes, 0 and 1 for no and yes."""
    terms = known(profile)
    text = _misnumbered(*terms, math.isfinite(profile.loss)) if terms is not None else None
    return None if text is None else found(profile, Cause.LABELS_OUT_OF_RANGE, Severity.ERROR, text)


def constant_labels(profile: Profile) -> Finding | None:
    """All targets of eight samples or more are the same, or the samples come sorted by class.

    Sorted: of three batches or more each holds one class, and these rise or fall. Amounts that are all zero
    are a warning, for an equation may be asked to hold, and its residual to vanish.
    """
    target = profile.contract.target if profile.contract else None
    if target is None or target.samples < _FEW or target.partial:
        return None
    if target.sorted:
        text = (
            "Each batch holds a single class: the samples are sorted. Type `DataLoader(..., shuffle=True)`."
        )
        return found(
            profile,
            Cause.CONSTANT_LABELS,
            Severity.ERROR,
            text,
            1.0,
            float(target.distinct),
            "classes per batch",
        )
    classes = [value for value, count in target.counts if count]
    one_class = target.one_hot is not None and len(classes) == 1
    if target.deviation > 1e-7 * abs(target.mean) and not one_class:
        return None
    value = classes[0] if one_class else target.mean
    text = f"All {target.samples} targets are {number(value)}: there is nothing to learn."
    loss = profile.contract.loss if profile.contract else None
    residual = value == 0 and loss is not None and loss.wants == "values"
    severity = Severity.WARNING if residual else Severity.ERROR
    return found(profile, Cause.CONSTANT_LABELS, severity, text, 1.0, 2.0, "different targets at least")


def shuffled_labels(profile: Profile) -> Finding | None:
    """The inputs say nothing about the targets: two quick guessers do no better than with permuted targets.

    The guessers are the nearest neighbour and a ridge regression; better is by three standard deviations of
    what permuted targets give. Only where neighbours mean something: images whose nearest neighbour is
    much nearer than any two.
    """
    guess = profile.contract.learnable if profile.contract else None
    if guess is None or guess.score > guess.chance + 3 * guess.spread:
        return None
    text = (
        f"From {guess.samples} samples, neither the most similar one nor a linear fit tells more about "
        "the targets "
        f"than chance ({guess.score:.2f}, with shuffled targets {guess.chance:.2f}). Look at a few pairs."
    )
    return found(profile, Cause.SHUFFLED_LABELS, Severity.WARNING, text, guess.score, guess.chance, "score")


def class_imbalance(profile: Profile) -> Finding | None:
    """More than nine of ten samples are of one class, of 64 or more: so right is who always says that.

    Silent if the loss counts the rarest class more than the commonest.
    """
    target = profile.contract.target if profile.contract else None
    if target is None or target.samples < _MANY or not (single(target) or target.one_hot == 1):
        return None
    counts = [count for _, count in target.counts]
    share = max(counts, default=0) / max(1, sum(counts))
    loss = profile.contract.loss if profile.contract else None
    if loss is not None and loss.weighted:
        return None
    if not 1 - _RARE < share < 1 or sum(count > 0 for count in counts) > 20:
        return None
    value = max(target.counts, key=lambda pair: pair[1])[0]
    text = (
        f"{share:.0%} of the samples are of class {number(value)}: an accuracy of {share:.0%} takes no "
        "learning. "
        "Weigh the rare classes (`weight=` or `pos_weight=`), or look at another measure."
    )
    return found(profile, Cause.CLASS_IMBALANCE, Severity.WARNING, text, share, 1 - _RARE, "share at most")


def unscaled_targets(profile: Profile) -> Finding | None:
    """Amounts, compared with an output without bounds, are ten times as large as it and as 1; or far smaller.

    An error from a hundred times on: that far the last weights must grow, by steps made for errors near 1.
    """
    terms = known(profile)
    if terms is None:
        return None
    output, loss, target = terms
    free = output.bounds is None or math.inf in output.bounds
    if loss.wants != "values" or loss.family in ("hinge", "poisson") or not free:
        return None
    ratio = target.rms / max(1.0, abs(output.low), abs(output.high))
    tiny = 0 < target.rms < 1e-3
    if ratio < 10 and not tiny:
        return None
    severity = Severity.ERROR if ratio > 100 else Severity.WARNING
    text = (
        f"The targets have mean {number(target.mean)} and deviation {number(target.deviation)}; the "
        "output runs from "
        f"{number(output.low)} to {number(output.high)}. Type `(y - y.mean()) / y.std()`, and undo it to "
        "predict."
    )
    return found(profile, Cause.UNSCALED_TARGETS, severity, text, target.rms, 1.0, "rms of the targets")


def _misnumbered(output: OutputReading, loss: LossReading, target: TargetReading, finite: bool) -> str | None:
    seen = f"The targets run from {number(target.low)} to {number(target.high)}"
    if by_number(output, loss, target) and loss.family == "cross entropy":
        last = classes(output, loss) - 1
        if not target.whole:
            return f"{seen}, and the loss cuts them down to whole classes, 0 to {last}. Do not scale labels."
        if target.low == 1 and target.high == last + 1 and not finite:
            return f"{seen}, and the loss numbers the classes from 0 to {last}. Type `y - 1`."
    outside = target.low < 0 or target.high > 1
    if (
        loss.family == "binary cross entropy"
        and outside
        and target.whole
        and not _classes_of_one(output, target)
    ):
        hint = "Type `(y + 1) / 2`." if target.signs else "Scale them to 0 and 1."
        return None if _signed(loss, target) else f"{seen}, and binary cross-entropy takes 0 and 1. {hint}"
    return None


def _classes_of_one(output: OutputReading, target: TargetReading) -> bool:
    """Left to the rule on the number of units."""
    return output.units == 1 and target.low >= 0 and target.distinct > 2


def _signed(loss: LossReading, target: TargetReading) -> bool:
    """`nn.SoftMarginLoss` behaves as binary cross-entropy, and takes 1 and -1: its slope ends for both."""
    return loss.wants == "logits" and target.signs and not loss.endless


RULES = (labels_out_of_range, constant_labels, unscaled_targets, shuffled_labels, class_imbalance)
