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
from collections.abc import Sequence
from functools import lru_cache
from statistics import median

import torch

from gradmend import theory
from gradmend.anatomy import INPUT, Activation
from gradmend.causes import Cause
from gradmend.diagnosis.finding import Finding, Severity, where
from gradmend.disturbance import Echo
from gradmend.profile import Profile
from gradmend.readings import Reading

WARN, ALARM = 9.2, 13.8
"""Logarithms of the squared gradient ratio: a hundredfold and a thousandfold in the norm."""

_PACE = 0.01
"""An optimizer keeps pace if it changes the first weights at least so much of what it changes the last."""

TOLD_APART = 1e-12
"""1 - cosine of two inputs that differ by ten roundings of float32: (10 x 1.2e-7)^2 / 2."""

_BOUNDED_APART = 1e-6
"""What bounded activations need, for the weights that would spread closer inputs also saturate the units.

Measured with Adam, 300 steps: tanh and torch's own weights learn at 1e-4 (12 layers) and stay at guessing at
5e-7 (17); sigmoids learn at 2e-5 (5) and not at 1e-8 (6). ReLU, ELU and GELU still learn at 1e-10.
"""

_SIX_LENGTHS = 12.0
"""ln of a squared distance's growth over six correlation lengths: tanh of twice its critical variance."""

_LINEAR = 0.05
"""As long as neighbours are so much nearer than strangers, their squared distance grows by a factor."""

_ROUNDING_APART = 1e-8
"""1 - cosine of two inputs below which roundings of float32 make strangers of neighbours."""

_IN_COMMON, _NOTHING_IN_COMMON = 0.5, 0.2
"""Cosines of two gradients; their mean over 16 samples of 64 units scatters by about 0.1 around none."""

_SMALLEST = 1e-45
"""What stands for a gradient of exactly zero: the smallest number of float32."""

_USUAL_SAMPLES = 32
"""Fewer samples than this say nothing about dead units or collapse."""


def vanishing_gradient(profile: Profile) -> Finding | None:
    """The gradient at the first pre-activation is far smaller than at the last.

    An error if the optimizer's next step is too: it then changes the last layers only.
    """
    return _gradient(profile, Cause.VANISHING_GRADIENT, sign=-1)


def exploding_gradient(profile: Profile) -> Finding | None:
    """The gradient at the first pre-activation is far larger than at the last."""
    return _gradient(profile, Cause.EXPLODING_GRADIENT, sign=+1)


def input_lost(profile: Profile) -> Finding | None:
    """All samples are one and the same vector wherever that can be seen: they have no rank at all.

    One unit has no angles, so that layers of one unit say nothing.
    """
    known = [r for r in profile.sites if math.isfinite(r.cosine) and r.site.units > 1]
    same = [r for r in known if math.isnan(r.rank) and 1 - r.cosine < TOLD_APART]
    if not same or len(same) < len(known) or profile.samples < _USUAL_SAMPLES:
        return None
    text = "All samples are the same vector from here on: nothing of the input comes through."
    return finding(Cause.INPUT_LOST, Severity.ERROR, text, 1.0, 0.0, "cosine", same[:1])


def information_collapse(profile: Profile) -> Finding | None:
    """Between the first and the last hidden layer, 1 - cosine falls by more than exp(-6).

    An error below 1e-4; where the optimizer keeps pace, only at the end of float32's precision, or where
    bounded activations leave two inputs less than a thousandth apart.
    """
    layers = [r for r in profile.weighted()[:-1] if math.isfinite(r.cosine) and r.site.units > 1]
    if len(layers) < 3 or profile.samples < _USUAL_SAMPLES:
        return None
    first, last = (max(1 - layers[i].cosine, 1e-16) for i in (0, -1))
    ratio = last / first
    if ratio > math.exp(-6):
        return None
    near = [r for r in layers if (1 - r.cosine) / first < math.exp(-6)]
    least = _BOUNDED_APART if _bounded(profile) else TOLD_APART
    lost = last < least if _keeps_pace(profile) else ratio < 1e-4
    severity = Severity.ERROR if lost else Severity.WARNING
    ends = f"from {layers[0].cosine:.3f} to {layers[-1].cosine:.6f}"
    text = f"The cosine between samples rises {ends}: all inputs look alike."
    expected = 1 - first
    return finding(Cause.INFORMATION_COLLAPSE, severity, text, layers[-1].cosine, expected, "cosine", near)


def saturated_units(profile: Profile) -> Finding | None:
    """More than half of the inputs of a hidden bounded activation lie where its slope is under 1 %.

    An error above 90 %, or where the gradient explodes as well: the two are signs of one illness, and tanh
    networks with both stay at guessing (10 layers, weights of deviation 1), those with one do learn. Gates
    are left out: what multiplies another signal is meant to open and shut.
    """
    flat = [
        r
        for r in profile.sites
        if r.saturation is not None
        and r.saturation > 0.5
        and (r.zero or 0.0) < 0.25
        and hidden(profile, r)
        and not _gate(profile, r)
    ]
    if not flat:
        return None
    worst = max(r.saturation or 0.0 for r in flat)
    both = worst > 0.9 or exploding_gradient(profile) is not None
    severity = Severity.ERROR if both else Severity.WARNING
    text = f"Up to {worst:.0%} of the values entering an activation lie where it is flat."
    return finding(Cause.SATURATED_UNITS, severity, text, worst, 0.5, "share at most", flat)


def dead_units(profile: Profile) -> Finding | None:
    """More than half of the units of a hidden activation are zero for every measured sample.

    Only of activations that are zero over a whole interval: the zero of tanh is where it is steepest.
    """
    if profile.samples < _USUAL_SAMPLES:
        return None
    dead = [r for r in profile.sites if r.dead > 0.5 and hidden(profile, r) and _dies(r.site.activation)]
    if not dead:
        return None
    worst = max(r.dead for r in dead)
    severity = Severity.ERROR if worst > 0.9 else Severity.WARNING
    text = f"Up to {worst:.0%} of the units are zero for all {profile.samples} samples."
    return finding(Cause.DEAD_UNITS, severity, text, worst, 0.5, "share at most", dead)


def chaos(profile: Profile) -> Finding | None:
    """Inputs one percent apart become strangers: their squared distance grows by more than exp(9.2) in all.

    The rate per layer is measured while they are near each other, relative to the distance of two samples,
    and continued to the last layer. An error beyond exp(12): that is six correlation lengths, as far as a
    network can be trained (Schoenholz et al. 2017): tanh of fan-in x variance 4 has 0.294 per layer, and 42.
    """
    points = _distances(profile)
    reached = next((i for i, (_, apart) in enumerate(points) if apart > _LINEAR), None)
    if not reached or batch_normalized(profile):
        return None
    rate = math.log(points[reached][1] / points[0][1]) / reached
    total = rate * (len(points) - 1)
    if total < WARN:
        return None
    severity = Severity.ERROR if total > _SIX_LENGTHS else Severity.WARNING
    text = (
        f"The squared distance of neighbouring inputs grows by {math.exp(rate):.3g} times per layer: after "
        f"{reached} of {len(points) - 1} layers they are strangers."
    )
    far = [reading for reading, apart in points if apart > _LINEAR]
    return finding(Cause.CHAOS, severity, text, math.exp(rate), 1.0, "factor per layer", far)


def shattered_gradients(profile: Profile) -> Finding | None:
    """Gradients of inputs one percent apart agree at the last layer, and have cosine below 0.2 at the first.

    They keep 0.9 in 20 layers of ReLU with He's weights, 0.6 in 100, and none in 30 with batch normalization.
    A warning: networks learn with it, each sample by itself.
    """
    echoes = [e for e in (profile.disturbance.echoes if profile.disturbance else ()) if _known(e)]
    if len(echoes) < 3 or echoes[-1].gradient_cosine < _IN_COMMON:
        return None
    first = echoes[0].gradient_cosine
    if first > _NOTHING_IN_COMMON:
        return None
    lost = {e.index for e in echoes if e.gradient_cosine < _NOTHING_IN_COMMON}
    text = f"Gradients of inputs one percent apart have cosine {first:.2f} at the first layer."
    sites = [r for r in profile.sites if r.site.index in lost]
    return finding(Cause.SHATTERED_GRADIENTS, Severity.WARNING, text, first, 1.0, "cosine", sites)


def trouble(profile: Profile, shrinking: bool) -> Severity | None:
    """The worst severity among the symptoms of a shrinking (or else growing) signal."""
    growing = (exploding_gradient, saturated_units, chaos)
    rules = (vanishing_gradient, information_collapse) if shrinking else growing
    return max((found.severity for rule in rules if (found := rule(profile))), default=None)


def _gradient(profile: Profile, cause: Cause, sign: int) -> Finding | None:
    readings = _reached(profile)
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
    return finding(cause, severity, text, decades, 0.0, "log10 of |first|/|last|", far)


def _reached(profile: Profile) -> list[Reading]:
    """The weighted sites that the gradient tells of, each module once, by its call with the most of it.

    What lies before weights that begin at zero gets its gradient once these moved: it is not known yet.
    """
    reached = [r for r in profile.weighted() if r.gradient_norm is not None]
    zeros = [r.site.index for r in reached if r.weight_variance == 0]
    closed = max(zeros, default=INPUT)
    calls: dict[str, Reading] = {}
    for reading in (r for r in reached if r.gradient_norm or r.site.index > closed):
        name = reading.site.name.partition("#")[0]
        known = calls.get(name)
        if known is None or not (known.gradient_norm or 0.0) >= (reading.gradient_norm or 0.0):
            calls[name] = reading
    return sorted(calls.values(), key=lambda r: r.site.index)


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


def _distances(profile: Profile) -> list[tuple[Reading, float]]:
    """How far neighbours are apart at the hidden layers, until rounding is most of it."""
    apart = {e.index: e.apart for e in (profile.disturbance.echoes if profile.disturbance else ())}
    points = []
    for reading in profile.weighted()[:-1]:
        if reading.site.index not in apart or not 1 - reading.cosine > _ROUNDING_APART:
            break
        points.append((reading, apart[reading.site.index]))
    sound = points and all(math.isfinite(a) for _, a in points) and points[0][1] > 0
    return points if sound else []


def _known(echo: Echo) -> bool:
    return not math.isnan(echo.gradient_cosine)


def batch_normalized(profile: Profile) -> bool:
    """Whether most hidden layers are followed by batch normalization and no residual sums go around them."""
    weighted = profile.weighted()[:-1]
    after = [r.site for r in profile.sites if r.site.function == "batch_norm"]
    return 2 * len(after) > len(weighted) > 0 and 4 * len(profile.residuals) < len(weighted)


def _bounded(profile: Profile) -> bool:
    """Whether most hidden activations are."""
    functions = [r.site.activation for r in profile.sites if r.site.activation and hidden(profile, r)]
    return 2 * sum(_bound(phi) for phi in functions) > len(functions)


@lru_cache(maxsize=64)
def _bound(phi: Activation) -> bool:
    far = phi(torch.tensor([-1e4, 1e4], dtype=torch.float64))
    return bool(far.abs().max() < 100)


def _dies(phi: Activation | None) -> bool:
    """Whether it is zero over a whole interval."""
    return phi is not None and _rests(phi)


@lru_cache(maxsize=64)
def _rests(phi: Activation) -> bool:
    zero = phi(torch.linspace(-8, 8, 321, dtype=torch.float64)) == 0
    return bool((zero[1:] & zero[:-1]).any())


def _gate(profile: Profile, reading: Reading) -> bool:
    """Whether its output multiplies another signal."""
    return any(reader.kind == "product" for reader in profile.anatomy.readers(reading.site.index))


def hidden(profile: Profile, reading: Reading) -> bool:
    """Whether weights come after this site, so that it is not the output."""
    return any(r.site.index > reading.site.index for r in reversed(profile.weighted()))


def finding(
    cause: Cause,
    severity: Severity,
    sentence: str,
    measured: float,
    expected: float,
    unit: str,
    readings: Sequence[Reading],
) -> Finding:
    """A finding at these sites and at the lines of the user's code that made them."""
    sites = tuple(r.site.name for r in readings)
    return Finding(cause, severity, sentence, measured, expected, unit, sites, where(readings))


RULES = (
    input_lost,
    chaos,
    vanishing_gradient,
    exploding_gradient,
    information_collapse,
    shattered_gradients,
    saturated_units,
    dead_units,
)
