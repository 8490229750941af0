"""Rules on the learning rate: what the optimizer's own steps do to the loss of one batch."""

from __future__ import annotations

import math
from statistics import median

from gradmend.causes import Cause
from gradmend.diagnosis.finding import Finding, Severity
from gradmend.diagnosis.signal import trouble
from gradmend.profile import Profile


def learning_rate_too_high(profile: Profile) -> Finding | None:
    """The first step is four times too long, and forty bring not half of what one of the right length would.

    A step of a quadratic valley does harm beyond twice the best length (LeCun, Simard, Pearlmutter 1992);
    both signs are asked for, because the first steps of an adaptive optimizer may overshoot and recover, as
    they do in a network that has learnt already. A loss that is no number does not recover.
    """
    response = profile.response
    if response is None or not math.isfinite(response.before):
        return None
    best, after = response.best_fraction, response.losses[-1]
    if math.isfinite(after) and not response.overshoots:
        return None
    text = (
        f"{len(response.losses)} more steps on one batch took its loss from {response.before:.4g} to "
        f"{after:.4g}; along the first step it is lowest at {best:.2g} of its length."
    )
    severity = Severity.ERROR
    return Finding(Cause.LEARNING_RATE_TOO_HIGH, severity, text, 1 / best, 1.0, "step over best step")


def learning_rate_too_low(profile: Profile) -> Finding | None:
    """A few steps lower the loss by less than 0.1 %, though one a hundred times as long would by 5 %.

    Silent while the signal itself is in trouble, for then small updates are a symptom.
    """
    response = profile.response
    if response is None or trouble(profile, shrinking=True) is not None:
        return None
    best = response.best_fraction
    fall = response.before - min(response.losses)
    possible = response.before - response.reachable
    if best < 100 or fall > 1e-3 * abs(response.before) or possible < 0.05 * abs(response.before):
        return None
    ratios = [p.update_ratio for p in profile.parameters if p.update_ratio]
    text = (
        f"{len(response.losses)} steps lower the loss of one batch by {fall / abs(response.before):.2g} of "
        f"itself; one step {best:.0f} times as long would by {possible / abs(response.before):.2g}."
    )
    measured = median(ratios) if ratios else 0.0
    return Finding(
        Cause.LEARNING_RATE_TOO_LOW, Severity.ERROR, text, measured, 1e-3, "update over weight, rms"
    )


RULES = (
    learning_rate_too_high,
    learning_rate_too_low,
)
