"""Rules on weights and activations: the roots of signals that die or grow."""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import median

from gradmend import theory
from gradmend.causes import Cause
from gradmend.console import lines
from gradmend.diagnosis.finding import Finding, Severity
from gradmend.diagnosis.signal import finding, hidden, trouble
from gradmend.profile import Profile
from gradmend.readings import Reading

CONTRACTING = 0.5
"""Squared-gradient factor at unit variance below which an activation shrinks whatever the weights."""

_SQUEEZED = 0.1
"""The share of the gradient that a softmax between layers leaves, where it is an error."""

_table = lru_cache(maxsize=64)(theory.tabulate)
"""The recorder gives one object per activation, so that each is read once, not once per layer and rule."""


def contracting_activation(profile: Profile) -> Finding | None:
    """The signal is in trouble, and at unit variance the activation halves the squared gradient or worse.

    A softmax between layers is one without any trouble: of n units it leaves 1/n, signal and gradient alike.
    """
    return _softmax(profile) or _contracting(profile)


def _softmax(profile: Profile) -> Finding | None:
    """An error where it takes more than nine tenths of the gradient."""
    readings = {r.site.index: r for r in profile.sites}
    shares = {}
    for reading in profile.sites:
        before = [readings[i] for i in reading.site.direct if i in readings]
        if _between_layers(profile, reading) and before and before[0].gradient and reading.gradient:
            shares[reading.site.index] = before[0].gradient / reading.gradient
    if not shares:
        return None
    least = min(shares.values())
    severity = Severity.ERROR if least < _SQUEEZED else Severity.WARNING
    text = f"A softmax stands between layers, and leaves {least:.2g} of the gradient."
    sites = [readings[index] for index in shares]
    return finding(Cause.CONTRACTING_ACTIVATION, severity, text, least, 1.0, "factor of the gradient", sites)


def _between_layers(profile: Profile, reading: Reading) -> bool:
    """Whether it is a softmax whose output goes into layers, and weights neither a signal nor constants."""
    if reading.site.function != "softmax" or reading.attention or not hidden(profile, reading):
        return False
    readers = profile.anatomy.readers(reading.site.index)
    return not any(r.kind == "product" or (r.weighted and not r.parameters) for r in readers)


def _contracting(profile: Profile) -> Finding | None:
    severity = trouble(profile, shrinking=True)
    pairs = _pairs(profile)
    weak = [(r, phi) for r, phi in pairs if gain(phi) < CONTRACTING]
    if severity is None or 2 * len(weak) < len(pairs) or not weak:
        return None
    typical = median(gain(phi) for _, phi in weak)
    after = [profile.anatomy.activation_after(r.site) for r, _ in weak]
    sites = [r for r in profile.sites if r.site in after]
    name = sites[0].site.function
    text = (
        f"Even at unit variance each {name} multiplies the squared gradient by {typical:.3f}, layer by layer."
    )
    return finding(Cause.CONTRACTING_ACTIVATION, severity, text, typical, 1.0, "factor per layer", sites)


def weights_too_small(profile: Profile) -> Finding | None:
    """The signal shrinks, and weights of variance 1/E[phi'^2] would keep the gradient's size."""
    return _weights(profile, Cause.WEIGHTS_TOO_SMALL, shrinking=True)


def weights_too_large(profile: Profile) -> Finding | None:
    """The signal grows or saturates, and weights of variance 1/E[phi'^2] would keep the gradient's size."""
    return _weights(profile, Cause.WEIGHTS_TOO_LARGE, shrinking=False)


def _weights(profile: Profile, cause: Cause, shrinking: bool) -> Finding | None:
    severity = trouble(profile, shrinking)
    pairs = [(r, phi) for r, phi in _pairs(profile) if gain(phi) >= CONTRACTING]
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
    return finding(cause, severity, text, measured, median(steady), "fan-in x weight variance", wrong)


def _pairs(profile: Profile) -> list[tuple[Reading, theory.Activation]]:
    """Hidden weighted sites whose output goes straight into a known activation."""
    pairs = []
    for reading in profile.weighted():
        after = profile.anatomy.activation_after(reading.site)
        straight = after is not None and after.direct == (reading.site.index,)
        if after and straight and after.activation and reading.finite and reading.weight_variance is not None:
            pairs.append((reading, after.activation))
    return pairs


def gain(phi: theory.Activation) -> float:
    """What a layer multiplies the squared gradient by when its weights keep unit variance."""
    moments = _table(phi).moments(1.0)
    return moments.slope / moments.output if moments.output else math.inf


def symmetric_weights(profile: Profile) -> Finding | None:
    """All rows of a weight are equal to the last bit, and so are the rows of its gradient.

    Equal rows alone are no illness: an output layer of zeros gets different gradients per class. Nor are
    gradients of zero, which come from a layer behind that begins at zero, unless all but one are like that.
    """
    matrices = [p for p in profile.parameters if len(p.shape) > 1]
    equal = [p for p in matrices if p.symmetric]
    moved = [p for p in equal if p.gradient]
    names = tuple(p.name for p in (equal if len(equal) >= len(matrices) - 1 else moved))
    if not names:
        return None
    text = f"{lines(names)} have equal rows that get equal gradients, so all their units stay identical."
    count = float(len(names))
    return Finding(Cause.SYMMETRIC_WEIGHTS, Severity.ERROR, text, count, 0.0, "parameters", names)


RULES = (
    symmetric_weights,
    contracting_activation,
    weights_too_small,
    weights_too_large,
)
