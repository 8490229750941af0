"""Rules on how model, loss, optimizer and input fit together. They are exact and need no training."""

from __future__ import annotations

import math
from collections.abc import Iterable

from gradmend.causes import Cause
from gradmend.console import lines, number
from gradmend.diagnosis.finding import Finding, Severity
from gradmend.profile import Profile
from gradmend.readings import ParameterReading, Reading

_LOGITS_LOSSES = ("cross_entropy", "binary_cross_entropy_with_logits")


def non_finite(profile: Profile) -> Finding | None:
    """Values are NaN or infinite: names the first site forward, else the loss, else the first one backward.

    An error if it reaches the loss or a parameter's gradient. Minus infinity in a mask does not, nor does the
    infinite slope of a root where a ReLU cuts it off.
    """
    gradients = [p.gradient for p in profile.parameters if p.gradient is not None]
    sound = math.isfinite(profile.loss)
    fatal = not sound or not all(map(math.isfinite, gradients))
    forward = [r for r in profile.sites if fatal and not math.isfinite(r.rms)]
    slopes = [r for r in reversed(profile.sites) if sound and r.gradient is not None]
    backward = [r for r in slopes if not math.isfinite(r.gradient or 0.0)]
    culprit = next(iter(forward or backward), None)
    if culprit is None and not fatal:
        return None
    place = f"{culprit.site.function} at {culprit.site.name}" if culprit else "the loss"
    way = "output" if forward or not backward else "gradient"
    return Finding(
        Cause.NON_FINITE,
        Severity.ERROR if fatal else Severity.WARNING,
        f"The first {way} that is not a finite number comes from {place}.",
        sites=(culprit.site.name,) if culprit else (),
        where=_where([culprit] if culprit else []),
    )


def softmax_before_logits_loss(profile: Profile) -> Finding | None:
    """The output that reaches a logits loss is a softmax, unchanged but for its shape."""
    return _squashed(profile, "softmax", Cause.SOFTMAX_BEFORE_LOGITS_LOSS)


def sigmoid_before_logits_loss(profile: Profile) -> Finding | None:
    """The output that reaches a logits loss is a sigmoid, unchanged but for its shape."""
    return _squashed(profile, "sigmoid", Cause.SIGMOID_BEFORE_LOGITS_LOSS)


def not_in_optimizer(profile: Profile) -> Finding | None:
    """Parameters that receive a gradient are in no parameter group."""
    missing = [p for p in profile.parameters if p.trained is False and p.gradient is not None]
    return _parameters(
        missing, Cause.NOT_IN_OPTIMIZER, Severity.ERROR, "get a gradient and no optimizer step"
    )


def no_gradient(profile: Profile) -> Finding | None:
    """Parameters that want a gradient get none: the loss does not depend on them."""
    wanting = [p for p in profile.parameters if not p.frozen]
    if all(p.gradient == 0 for p in wanting if p.gradient is not None):
        what = "get a gradient of exactly zero"
        return _parameters(wanting, Cause.NO_GRADIENT, Severity.ERROR, what)
    lost = [p for p in wanting if p.gradient is None]
    return _parameters(
        lost, Cause.NO_GRADIENT, Severity.WARNING, "are not reached by the gradient of the loss"
    )


def frozen_parameters(profile: Profile) -> Finding | None:
    """Parameters with `requires_grad=False`."""
    frozen = [p for p in profile.parameters if p.frozen]
    return _parameters(frozen, Cause.FROZEN_PARAMETERS, Severity.NOTE, "are frozen")


def symmetric_weights(profile: Profile) -> Finding | None:
    """All rows of a weight are equal to the last bit, and so are the rows of its gradient.

    Equal rows alone are no illness: an output layer of zeros gets different gradients per class.
    """
    equal = [p for p in profile.parameters if p.symmetric]
    what = "have equal rows that get equal gradients, so all their units stay identical"
    return _parameters(equal, Cause.SYMMETRIC_WEIGHTS, Severity.ERROR, what)


def unscaled_input(profile: Profile) -> Finding | None:
    """What the first layer gets has rms above 10 or below 0.05, or a column that drowns the others.

    A column drowns the others if it deviates a hundred times the median column. Those that hardly vary, such
    as the pixels at the edge of an image, do no harm; those that drown all others do, because the learning
    rate must suit the largest (LeCun et al. 1998). The bounds of the rms
    leave room for every usual scaling ([0, 1], [-1, 1], standardized); raw pixels (rms about 100) and raw
    tables are outside. A network that begins by rescaling its input is exempt.
    """
    inputs = profile.inputs
    if inputs is None:
        return None
    low, high = inputs.deviations
    spread = high / low if low > 0 else 1.0
    if 0.05 <= inputs.rms <= 10 and spread <= 100:
        return None
    severity = Severity.ERROR if not 0.005 <= inputs.rms <= 50 or spread > 1000 else Severity.WARNING
    sentence = f"The input has mean {number(inputs.mean)} and rms {number(inputs.rms)}"
    if spread > 100:
        sentence += f"; one column deviates by {number(high)}, half of them by {number(low)} or less"
    readings = profile.weighted()[:1]
    return Finding(
        Cause.UNSCALED_INPUT,
        severity,
        sentence + ".",
        inputs.rms,
        1.0,
        "rms of the input",
        where=_where(readings),
    )


def _squashed(profile: Profile, function: str, cause: Cause) -> Finding | None:
    for loss in profile.anatomy.losses:
        guilty = [r for r in profile.sites if r.site.index in loss.direct and r.site.function == function]
        if guilty and loss.function in _LOGITS_LOSSES:
            return Finding(
                cause,
                Severity.ERROR,
                f"The {function} at {guilty[0].site.name} feeds {loss.function}, which expects raw scores "
                f"and applies its own {'sigmoid' if 'binary' in loss.function else 'softmax'}.",
                sites=tuple(r.site.name for r in guilty),
                where=_where(guilty),
            )
    return None


def _parameters(
    readings: list[ParameterReading], cause: Cause, severity: Severity, what: str
) -> Finding | None:
    if not readings:
        return None
    names = tuple(p.name for p in readings)
    return Finding(cause, severity, f"{lines(names)} {what}.", float(len(names)), 0.0, "parameters", names)


def _where(readings: Iterable[Reading]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(r.site.line for r in readings if r.site.line))


RULES = (
    non_finite,
    softmax_before_logits_loss,
    sigmoid_before_logits_loss,
    not_in_optimizer,
    no_gradient,
    symmetric_weights,
    unscaled_input,
)
