"""Rules on learning rate, optimizer and planned steps: what the optimizer's steps do to one batch's loss."""

from __future__ import annotations

import math
from statistics import median

from gradmend.causes import Cause
from gradmend.diagnosis.attempts import USUAL_EPSILON
from gradmend.diagnosis.finding import Finding, Severity
from gradmend.diagnosis.signal import trouble
from gradmend.profile import Profile
from gradmend.readings import Response
from gradmend.regime import LEARNT

_FAR, _FARTHER = 16, 100
"""So many times longer a first step would be best: where planned steps are too few, where none are told."""

_LEFT, _FASTER = 0.5, 1.5
"""Shares: a training that leaves more of its loss is too short; a pace that rises by more keeps rising."""


def learning_rate_too_high(profile: Profile) -> Finding | None:
    """The first step is four times too long, and forty bring not half of what one of the right length would.

    A step of a quadratic valley does harm beyond twice the best length (LeCun, Simard, Pearlmutter 1992);
    both signs are asked for, because the first steps of an adaptive optimizer may overshoot and recover, as
    they do in a network that has learnt already; there they only count if it forgets. A loss that is no
    number does not recover.
    """
    response = profile.response
    if response is None or not math.isfinite(response.before):
        return None
    best, after = response.best_fraction, response.losses[-1]
    if math.isfinite(after) and (not response.overshoots or _remembers(profile)):
        return None
    text = (
        f"{len(response.losses)} more steps on one batch took its loss from {response.before:.4g} to "
        f"{after:.4g}; along the first step it is lowest at {best:.2g} of its length."
    )
    severity = Severity.ERROR
    return Finding(Cause.LEARNING_RATE_TOO_HIGH, severity, text, 1 / best, 1.0, "step over best step")


def _remembers(profile: Profile) -> bool:
    """Whether the outputs still fit their own targets better than those of other rows, after the steps."""
    regime, response = profile.regime, profile.response
    if regime is None or regime.novelty is None or response is None or not response.before:
        return False
    return regime.novelty * response.losses[-1] / response.before < LEARNT


def learning_rate_too_low(profile: Profile) -> Finding | None:
    """A few steps lower the loss by less than 0.1 %, though one a hundred times as long would by 5 %.

    Or the planned steps are too few (see `too_few_steps`), and sixteen times as long ones would do better.
    Silent while the signal itself is in trouble, for then small updates are a symptom. A warning in a
    network that has learnt already: low rates are how a training ends.
    """
    response = profile.response
    if response is None or trouble(profile, shrinking=True) is not None:
        return None
    best, scale = response.best_fraction, abs(response.before)
    fall, possible = response.before - min(response.losses), response.before - response.reachable
    crawling = best >= _FARTHER and fall <= 1e-3 * scale and possible >= 0.05 * scale
    if not crawling and not (best >= _FAR and too_few_steps(profile)):
        return None
    text = (
        f"{len(response.losses)} steps lower the loss of one batch by {fall / scale:.2g} of "
        f"itself; one step {best:.0f} times as long would by {possible / scale:.2g}."
    )
    ratios = [p.update_ratio for p in profile.parameters if p.update_ratio]
    learnt = profile.regime is not None and profile.regime.learnt
    return Finding(
        Cause.LEARNING_RATE_TOO_LOW,
        Severity.WARNING if learnt else Severity.ERROR,
        text,
        median(ratios) if ratios else 0.0,
        1e-3,
        "update over weight, rms",
    )


def too_few_steps(profile: Profile) -> Finding | None:
    """The planned steps would leave half of the loss, if they go on as those tried do.

    Steps on one batch are faster than those on all, which agree less. The distance is the whole loss: one
    batch can be learnt by heart, so its loss can go to zero. Silent in a network that has learnt, and where
    a longer step would not take away 1 % either: then it is not their number that is wrong.
    """
    response, planned = profile.response, profile.planned
    if response is None or planned is None or not 0 < response.before < math.inf:
        return None
    if response.overshoots or (profile.regime is not None and profile.regime.learnt):
        return None
    left, fall = _left(response, planned), 1 - min(response.losses) / response.before
    if not left > _LEFT or max(fall, 1 - response.reachable / response.before) < 0.01:
        return None
    text = (
        f"{planned} steps are planned; the first {len(response.losses)} tried on one batch lower its loss by "
        f"{fall:.2g} of itself, and if they go on like that the end leaves {left:.2g} of it."
    )
    return Finding(Cause.TOO_FEW_STEPS, Severity.ERROR, text, left, _LEFT, "share of the loss that is left")


def _left(response: Response, planned: int) -> float:
    """The share of the loss after the planned steps, from the pace in both halves of those tried.

    Straight on; growing as it grew, if the second half is clearly faster, as on the way off a saddle; nothing
    left to say (0) where the pace dies away, for then more steps do not help.
    """
    losses = (response.before, *response.losses)
    if planned < len(losses):
        return min(losses[: planned + 1]) / response.before
    half = len(response.losses) // 2
    early, late = losses[0] - losses[half], losses[half] - losses[2 * half]
    if late < early / 4:
        return 0.0
    blocks, growth = (planned - 2 * half) / half, late / early if early > 0 else 1.0
    if growth > _FASTER:
        blocks = growth * (growth ** min(blocks, 100.0) - 1) / (growth - 1)
    return (losses[2 * half] - late * blocks) / response.before


def unfit_optimizer(profile: Profile) -> Finding | None:
    """Epsilon keeps an adaptive optimizer from moving, or is zero in the parameters' own dtype.

    The first step of Adam is g / (|g| + epsilon) of its rate (Kingma, Ba 2015): where epsilon is ten times
    the gradient in half of the parameters it is a warning, at a hundred times an error, if epsilon was
    chosen: at the default of a library the gradient is to blame. A zero epsilon makes 0/0 of no gradient.
    """
    regime = profile.regime
    if regime is None:
        return None
    if any(group.vanishes and group.betas for group in regime.optimizer.groups):
        text = "Its epsilon is zero in the parameters' own dtype: where a gradient is zero, 0/0 follows."
        return Finding(Cause.UNFIT_OPTIMIZER, Severity.ERROR, text, 0.0, 1e-4, "epsilon")
    sizes = {p.name: p.gradient for p in profile.parameters if p.gradient}
    chosen = [(group.names, group.epsilon or 0.0) for group in regime.optimizer.groups]
    ratios = [
        epsilon / sizes[name]
        for names, epsilon in chosen
        if epsilon > USUAL_EPSILON
        for name in names
        if name in sizes
    ]
    if not ratios or median(ratios) < 10 or regime.learnt:
        return None
    slow = median(ratios)
    text = (
        f"Its epsilon is {slow:.3g} times the gradient in half of the parameters, and shortens steps as much."
    )
    severity = Severity.ERROR if slow >= 100 else Severity.WARNING
    return Finding(Cause.UNFIT_OPTIMIZER, severity, text, slow, 1.0, "epsilon over gradient, rms")


RULES = (
    learning_rate_too_high,
    learning_rate_too_low,
    unfit_optimizer,
    too_few_steps,
)
