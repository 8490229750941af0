"""Rules on signals and gradients through depth.

Ratios are of squared norms, in natural logarithms, as in mean-field theory. A network of L layers trains
while L < 6 correlation lengths (Schoenholz et al. 2017), so the signal may shrink by exp(-6) and no more;
one net of finite width N scatters with standard deviation sqrt(5L/N) (Hanin, Nica 2018), so three of these
are added to every threshold.

An adaptive optimizer (Adam) divides the gradient by its own size, so it moves the first layers as much as the
last ones however small their gradient is: 12 to 16 ReLU layers with torch's own initialization train with
Adam in 150 steps, and do not with SGD. A shrinking signal is an error there only where numbers end: when the
gradient sinks below the optimizer's epsilon, or two inputs come as near as float32 can tell apart.
"""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import median

from gradmend import theory
from gradmend.anatomy import INPUT
from gradmend.causes import Cause
from gradmend.diagnosis.finding import Finding, Severity
from gradmend.profile import Profile
from gradmend.readings import Reading

WARN, ALARM = 9.2, 13.8
"""Logarithms of the squared gradient ratio: a hundredfold and a thousandfold in the norm."""

_CONTRACTING = 0.5
"""Squared-gradient factor at unit variance below which an activation shrinks whatever the weights."""

_PACE = 0.01
"""An optimizer keeps pace if it changes the first weights at least so much of what it changes the last."""

_TOLD_APART = 1e-12
"""1 - cosine of two inputs that differ by ten roundings of float32: (10 x 1.2e-7)^2 / 2."""

_SMALLEST = 1e-45
"""What stands for a gradient of exactly zero: the smallest number of float32."""

_USUAL_SAMPLES = 32
"""Fewer samples than this say nothing about dead units or collapse."""


_table = lru_cache(maxsize=64)(theory.tabulate)
"""The recorder gives one object per activation, so that each is read once, not once per layer and rule."""


def vanishing_gradient(profile: Profile) -> Finding | None:
    """The gradient at the first pre-activation is far smaller than at the last.

    An error if the optimizer's next step is too: it then changes the last layers only.
    """
    return _gradient(profile, Cause.VANISHING_GRADIENT, sign=-1)


def exploding_gradient(profile: Profile) -> Finding | None:
    """The gradient at the first pre-activation is far larger than at the last."""
    return _gradient(profile, Cause.EXPLODING_GRADIENT, sign=+1)


def input_lost(profile: Profile) -> Finding | None:
    """From the first layer on all samples are one and the same vector: they have no rank at all."""
    weighted = [r for r in profile.weighted() if math.isfinite(r.cosine)]
    same = [r for r in weighted if math.isnan(r.rank) and 1 - r.cosine < _TOLD_APART]
    if not same or len(same) < len(weighted) or profile.samples < _USUAL_SAMPLES:
        return None
    text = "All samples are the same vector from here on: nothing of the input comes through."
    return _finding(Cause.INPUT_LOST, Severity.ERROR, text, 1.0, 0.0, "cosine", same[:1])


def information_collapse(profile: Profile) -> Finding | None:
    """Between the first and the last hidden layer, 1 - cosine falls by more than exp(-6).

    An error below 1e-4, where the optimizer keeps pace only at the end of float32's precision.
    """
    hidden = [r for r in profile.weighted()[:-1] if math.isfinite(r.cosine)]
    if len(hidden) < 3 or profile.samples < _USUAL_SAMPLES:
        return None
    first, last = (max(1 - hidden[i].cosine, 1e-16) for i in (0, -1))
    ratio = last / first
    if ratio > math.exp(-6):
        return None
    near = [r for r in hidden if (1 - r.cosine) / first < math.exp(-6)]
    lost = last < _TOLD_APART if _keeps_pace(profile) else ratio < 1e-4
    severity = Severity.ERROR if lost else Severity.WARNING
    ends = f"from {hidden[0].cosine:.3f} to {hidden[-1].cosine:.6f}"
    text = f"The cosine between samples rises {ends}: all inputs look alike."
    expected = 1 - first
    return _finding(Cause.INFORMATION_COLLAPSE, severity, text, hidden[-1].cosine, expected, "cosine", near)


def saturated_units(profile: Profile) -> Finding | None:
    """More than half of the inputs of a hidden bounded activation lie where its slope is under 1 %.

    An error above 90 %, or where the gradient explodes as well: the two are signs of one illness, and tanh
    networks with both stay at guessing (10 layers, weights of deviation 1), those with one do learn.
    """
    flat = [
        r
        for r in profile.sites
        if r.saturation is not None and r.saturation > 0.5 and (r.zero or 0.0) < 0.25 and _hidden(profile, r)
    ]
    if not flat:
        return None
    worst = max(r.saturation or 0.0 for r in flat)
    both = worst > 0.9 or exploding_gradient(profile) is not None
    severity = Severity.ERROR if both else Severity.WARNING
    text = f"Up to {worst:.0%} of the values entering an activation lie where it is flat."
    return _finding(Cause.SATURATED_UNITS, severity, text, worst, 0.5, "share at most", flat)


def dead_units(profile: Profile) -> Finding | None:
    """More than half of the units of a hidden activation are zero for every measured sample."""
    if profile.samples < _USUAL_SAMPLES:
        return None
    dead = [r for r in profile.sites if r.dead > 0.5 and _hidden(profile, r)]
    if not dead:
        return None
    worst = max(r.dead for r in dead)
    severity = Severity.ERROR if worst > 0.9 else Severity.WARNING
    text = f"Up to {worst:.0%} of the units are zero for all {profile.samples} samples."
    return _finding(Cause.DEAD_UNITS, severity, text, worst, 0.5, "share at most", dead)


def contracting_activation(profile: Profile) -> Finding | None:
    """The signal is in trouble, and at unit variance the activation halves the squared gradient or worse."""
    severity = trouble(profile, shrinking=True)
    pairs = _pairs(profile)
    weak = [(r, phi) for r, phi in pairs if _gain(phi) < _CONTRACTING]
    if severity is None or 2 * len(weak) < len(pairs) or not weak:
        return None
    gain = median(_gain(phi) for _, phi in weak)
    after = [profile.anatomy.activation_after(r.site) for r, _ in weak]
    sites = [r for r in profile.sites if r.site in after]
    name = sites[0].site.function
    text = (
        f"Even at unit variance each {name} multiplies the squared gradient by {gain:.3f}, layer after layer."
    )
    return _finding(Cause.CONTRACTING_ACTIVATION, severity, text, gain, 1.0, "factor per layer", sites)


def weights_too_small(profile: Profile) -> Finding | None:
    """The signal shrinks, and weights of variance 1/E[phi'^2] would keep the gradient's size."""
    return _weights(profile, Cause.WEIGHTS_TOO_SMALL, shrinking=True)


def weights_too_large(profile: Profile) -> Finding | None:
    """The signal grows or saturates, and weights of variance 1/E[phi'^2] would keep the gradient's size."""
    return _weights(profile, Cause.WEIGHTS_TOO_LARGE, shrinking=False)


def trouble(profile: Profile, shrinking: bool) -> Severity | None:
    """The worst severity among the symptoms of a shrinking (or else growing) signal."""
    rules = (vanishing_gradient, information_collapse) if shrinking else (exploding_gradient, saturated_units)
    return max((found.severity for rule in rules if (found := rule(profile))), default=None)


def _gradient(profile: Profile, cause: Cause, sign: int) -> Finding | None:
    readings = [r for r in profile.weighted() if r.gradient_norm is not None]
    if len(readings) < 3 or not all(r.finite for r in readings) or not readings[-1].gradient_norm:
        return None
    if readings[-1].weight_variance == 0:  # an output layer that begins at zero: it opens with the first step
        return None
    logs = [2 * math.log(r.gradient_norm or _SMALLEST) for r in readings]
    width = int(median(r.site.units for r in readings))
    slack = 3 * theory.finite_width_deviation(len(readings), width)
    difference = max(logs[0], _at_the_input(profile)) - logs[-1]
    excess = sign * difference - slack
    if excess < WARN:
        return None
    decades = difference / 2 / math.log(10)
    factor = math.exp(difference / (len(readings) - 1))
    verb = "grows" if sign > 0 else "shrinks"
    text = (
        f"Over {len(readings)} layers the gradient {verb} by {abs(decades):.1f} decades towards the first "
        f"layer, a factor {factor:.3g} per layer in its square."
    )
    far = [r for r, log in zip(readings, logs, strict=True) if sign * (log - logs[-1]) > WARN]
    fatal = excess > ALARM and (sign > 0 or not _keeps_pace(profile))
    severity = Severity.ERROR if fatal else Severity.WARNING
    return _finding(cause, severity, text, decades, 0.0, "log10 of |first|/|last|", far)


def _at_the_input(profile: Profile) -> float:
    """ln |gradient|^2 at sums that the batch itself enters: past branches of weight zero, the way is open."""
    sums = [r for r in profile.sites if r.site.kind == "sum" and INPUT in r.site.inputs]
    return 2 * math.log(max((r.gradient_norm or 0.0 for r in sums), default=0.0) or _SMALLEST)


def _keeps_pace(profile: Profile) -> bool:
    """Whether the optimizer's next step changes the first weights about as much as the last layer.

    Its bias counts too: where the signal dies on its way forward, the last weights stand still as well.
    """
    updates = {p.name: p.update for p in profile.parameters if p.update is not None}
    weighted = [[updates[n] for n in r.site.parameters if n in updates] for r in profile.weighted()]
    return bool(weighted and weighted[0] and weighted[-1]) and max(weighted[0]) > _PACE * max(weighted[-1])


def _weights(profile: Profile, cause: Cause, shrinking: bool) -> Finding | None:
    severity = trouble(profile, shrinking)
    pairs = [(r, phi) for r, phi in _pairs(profile) if _gain(phi) >= _CONTRACTING]
    if severity is None or not pairs:
        return None
    steady = [1 / max(_table(phi).moments(r.rms**2).slope, 1e-12) for r, phi in pairs]
    ratios = [(r.weight_variance or 0.0) / wanted for (r, _), wanted in zip(pairs, steady, strict=True)]
    typical = median(ratios)
    if (typical > 0.9) if shrinking else (typical < 1.1):
        return None
    wrong = [r for (r, _), q in zip(pairs, ratios, strict=True) if (q < 0.9 if shrinking else q > 1.1)]
    measured = median(r.weight_variance or 0.0 for r, _ in pairs)
    text = f"Each layer multiplies the squared gradient by {typical:.3g} because of the size of its weights."
    return _finding(cause, severity, text, measured, median(steady), "fan-in x weight variance", wrong)


def _pairs(profile: Profile) -> list[tuple[Reading, theory.Activation]]:
    """Hidden weighted sites whose output goes straight into a known activation."""
    pairs = []
    for reading in profile.weighted():
        after = profile.anatomy.activation_after(reading.site)
        straight = after is not None and after.direct == (reading.site.index,)
        if after and straight and after.activation and reading.finite and reading.weight_variance is not None:
            pairs.append((reading, after.activation))
    return pairs


def _gain(phi: theory.Activation) -> float:
    """What a layer multiplies the squared gradient by when its weights keep unit variance."""
    moments = _table(phi).moments(1.0)
    return moments.slope / moments.output if moments.output else math.inf


def _hidden(profile: Profile, reading: Reading) -> bool:
    """Whether weights come after this site, so that it is not the output."""
    return any(r.site.index > reading.site.index for r in profile.weighted())


def _finding(
    cause: Cause,
    severity: Severity,
    sentence: str,
    measured: float,
    expected: float,
    unit: str,
    readings: list[Reading],
) -> Finding:
    sites = tuple(r.site.name for r in readings)
    where = tuple(dict.fromkeys(r.site.line for r in readings if r.site.line))
    return Finding(cause, severity, sentence, measured, expected, unit, sites, where)


RULES = (
    input_lost,
    contracting_activation,
    weights_too_small,
    weights_too_large,
    vanishing_gradient,
    exploding_gradient,
    information_collapse,
    saturated_units,
    dead_units,
)
