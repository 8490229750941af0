"""Rules on how model, loss and optimizer are put together. They are exact and need no training."""

from __future__ import annotations

import math

from gradmend.causes import Cause
from gradmend.console import lines
from gradmend.diagnosis.finding import Finding, Severity, where
from gradmend.profile import Profile
from gradmend.readings import ParameterReading

_UPHILL = 0.3
"""Cosine between step and gradient: momentum and noise reach less, a wrong sign 1 (about 1/2 with Adam)."""


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
        where=where([culprit] if culprit else []),
    )


def wrong_direction(profile: Profile) -> Finding | None:
    """The optimizer's next step climbs the gradient, or the loss falls as outputs and targets part: not both.

    Climbing: the cosine between step and gradient is above 0.3, and no part of the first step lowers the
    loss. That of the loss's own sign is found at outputs made up for it.
    """
    contract = profile.contract
    if contract is None:
        return None
    negated = contract.loss is not None and contract.loss.sign < 0
    climbing = contract.descent is not None and contract.descent > _UPHILL and _only_rises(profile)
    if negated == climbing:
        return None
    if climbing:
        text = (
            "The optimizer steps along the gradient, not against it: is `maximize=True`, or a minus missing?"
        )
        cosine = contract.descent
        return Finding(
            Cause.WRONG_DIRECTION, Severity.ERROR, text, cosine, -1.0, "cosine of step and gradient"
        )
    text = (
        "The loss falls as outputs and targets part: training drives them apart. Is there a minus too many?"
    )
    where = (contract.loss.line,) if contract.loss and contract.loss.line else ()
    return Finding(Cause.WRONG_DIRECTION, Severity.ERROR, text, -1.0, 1.0, "sign of the loss", where=where)


def eval_mode(profile: Profile) -> Finding | None:
    """Dropout or batch normalization is in eval mode.

    A note, for training loops call `train()`; a warning where only a part is, and its parameters are not
    frozen.
    """
    contract = profile.contract
    if contract is None or not (contract.asleep or contract.evaluating):
        return None
    if contract.evaluating:
        text = "The model was given in eval mode, and measured in train mode. Type `model.train()` to train."
        return Finding(Cause.EVAL_MODE, Severity.NOTE, text)
    text = f"In eval mode, while the rest trains: {lines(contract.asleep)}. Type `model.train()`."
    return Finding(Cause.EVAL_MODE, Severity.WARNING, text, sites=contract.asleep)


def not_in_optimizer(profile: Profile) -> Finding | None:
    """Parameters that receive a gradient are in no parameter group."""
    missing = [p for p in profile.parameters if p.trained is False and p.gradient is not None]
    return _parameters(
        missing, Cause.NOT_IN_OPTIMIZER, Severity.ERROR, "get a gradient and no optimizer step"
    )


def no_gradient(profile: Profile) -> Finding | None:
    """Parameters that want a gradient get none: the loss does not depend on them.

    A loss of exactly zero has no slope where nothing is left to learn from this batch, as with hinges.
    """
    loss = profile.contract.loss if profile.contract else None
    satisfied = profile.loss == 0 and (loss is None or loss.family != "flat")
    wanting = [p for p in profile.parameters if not p.frozen]
    if not satisfied and all(p.gradient == 0 for p in wanting if p.gradient is not None):
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


def _parameters(
    readings: list[ParameterReading], cause: Cause, severity: Severity, what: str
) -> Finding | None:
    if not readings:
        return None
    names = tuple(p.name for p in readings)
    return Finding(cause, severity, f"{lines(names)} {what}.", float(len(names)), 0.0, "parameters", names)


def _only_rises(profile: Profile) -> bool:
    """Whether no part of the first step lowers the loss, as far as that was tried."""
    response = profile.response
    if response is None:
        return True
    slack = 1e-3 * abs(response.before)
    return all(not loss < response.before - slack for fraction, loss in response.line if fraction <= 1)


RULES = (
    non_finite,
    wrong_direction,
    not_in_optimizer,
    no_gradient,
    eval_mode,
    frozen_parameters,
)
