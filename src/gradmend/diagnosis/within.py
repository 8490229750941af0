"""Rules on what goes on within recurrent, attention, normalization and residual parts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from gradmend import theory
from gradmend.anatomy import Site
from gradmend.attention import AttentionReading
from gradmend.causes import Cause
from gradmend.diagnosis.finding import Finding, Severity
from gradmend.diagnosis.signal import ALARM, TOLD_APART, WARN, batch_normalized, exploding_gradient, finding
from gradmend.errors import SetupError
from gradmend.profile import Profile
from gradmend.readings import Reading, Response

_NO_PROGRESS = 0.02
"""Steps that lower the loss of their own batch by less than this share of it achieve nothing."""

_ONE_KEY, _HUGE = 0.05, 10.0
"""Entropy below which a head attends to one key, and the rms of logits that flattens a softmax: exp(-10)."""

_TOGETHER = math.exp(-6)
"""What may be left of 1 - cosine between tokens, as in six correlation lengths."""


def batch_norm_explosion(profile: Profile) -> Finding | None:
    """The gradient explodes, and most hidden layers have batch normalization and no residual connections.

    An error where there are more layers than 16 / ln chi (Yang et al. 2019), chi the factor that theory gives
    for this activation and batch: 1.49 for ReLU and 64 samples, and 40 layers.
    """
    symptom = exploding_gradient(profile)
    if symptom is None or not batch_normalized(profile):
        return None
    normalized = [r for r in profile.sites if r.site.function == "batch_norm"]
    phi = next((a.activation for r in normalized if (a := profile.anatomy.activation_after(r.site))), None)
    samples = math.prod(normalized[0].site.shape) // normalized[0].site.units
    try:
        most = theory.batch_norm_depth(phi, max(4, samples)) if phi else math.inf
    except SetupError:
        most = math.inf
    severity = Severity.ERROR if len(normalized) > most else symptom.severity
    text = (
        f"{len(normalized)} layers with batch normalization and no residual connections; the gradient grows "
        f"by {symptom.measured or 0.0:.1f} decades, and about {most:.0f} such layers can be trained."
    )
    depth = float(len(normalized))
    return finding(Cause.BATCH_NORM_EXPLOSION, severity, text, depth, most, "layers at most", normalized)


def residual_growth(profile: Profile) -> Finding | None:
    """The mean square of the residual stream grows by more than exp(9.2) over the blocks.

    Doubling at each block, that is after 13. An error beyond exp(13.8), 20 blocks; a remark if the stream is
    normalized before the layers that read its end, for then its size does not matter.
    """
    sums = profile.residuals
    if len(sums) < 3:
        return None
    last = max(sums, key=lambda r: r.rms)
    growth = 2 * math.log(last.rms / sums[0].stream)
    if not math.isfinite(growth) or growth < WARN:
        return None
    severity = Severity.ERROR if growth > ALARM else Severity.WARNING
    severity = Severity.NOTE if _normalized_after(profile, sums[-1].site) else severity
    factor = math.exp(growth / len(sums))
    text = (
        f"Over {len(sums)} sums the rms of the residual stream grows from {sums[0].stream:.3g} to "
        f"{last.rms:.3g}, by a factor {factor:.3g} each in its square."
    )
    grown = {r.site.index for r in sums if r.rms**2 > 2 * sums[0].stream ** 2}
    sites = [r for r in profile.sites if r.site.index in grown]
    return finding(Cause.RESIDUAL_GROWTH, severity, text, factor, 1.0, "factor per block", sites)


def vanishing_through_time(profile: Profile) -> Finding | None:
    """The gradient at the first steps of a sequence is a hundredth of that at the last ones, or less.

    A warning: a task that does not need the far steps learns well, and one that does may teach the gates to
    remember. An error if, besides, the optimizer's steps achieve nothing at all. A loss at every step keeps
    the gradient alive at each: then this is silent.
    """
    return _through_time(profile, Cause.VANISHING_THROUGH_TIME, sign=-1)


def exploding_through_time(profile: Profile) -> Finding | None:
    """The gradient at the first steps of a sequence is a hundred times that at the last; error: thousand."""
    return _through_time(profile, Cause.EXPLODING_THROUGH_TIME, sign=+1)


def attention_saturation(profile: Profile) -> Finding | None:
    """All heads of an attention give one key nearly everything, with logits of rms 10 and more.

    Sharp heads alone are no illness, trained ones look up single tokens. An error if half of all attention
    calls are like that and the optimizer's steps achieve nothing.
    """
    known = [(r, r.attention) for r in profile.sites if r.attention]
    sharp = [(r, a) for r, a in known if _saturated(a)]
    if not sharp:
        return None
    many = 2 * len(sharp) >= len(known) and _achieves_nothing(profile.response)
    severity = Severity.ERROR if many else Severity.WARNING
    entropy, logits = min(a.entropy for _, a in sharp), max(a.logit_rms for _, a in sharp)
    text = f"The entropy of attention is {entropy:.2g} of its maximum, its logits have rms {logits:.3g}."
    sites = [r for r, _ in sharp]
    return finding(Cause.ATTENTION_SATURATION, severity, text, entropy, 1.0, "share of the maximum", sites)


def attention_collapse(profile: Profile) -> Finding | None:
    """From the first to the last layer of tokens, 1 - their cosine falls by more than exp(-6).

    An error below 1e-4 of what it was, or below what float32 can tell apart. For networks with attention.
    """
    tokens = dict(profile.disturbance.tokens) if profile.disturbance else {}
    attends = [r.site.index for r in profile.sites if r.attention]
    points = [(r, tokens[r.site.index]) for r in profile.sites if r.site.index in tokens]
    points = [(r, gap) for r, gap in points if attends and r.site.units > 1]
    if len(points) < 3 or not points[0][1] > 0 or not points[-1][0].site.index > attends[-1]:
        return None
    first, last = points[0][1], max(points[-1][1], 0.0)
    if last > first * _TOGETHER:
        return None
    severity = Severity.ERROR if last < max(1e-4 * first, TOLD_APART) else Severity.WARNING
    text = f"The cosine between the tokens of a sample rises from {1 - first:.3f} to {1 - last:.6f}."
    near = [r for r, gap in points if gap < first * _TOGETHER]
    return finding(Cause.ATTENTION_COLLAPSE, severity, text, 1 - last, 1 - first, "cosine", near)


def _through_time(profile: Profile, cause: Cause, sign: int) -> Finding | None:
    found = [(r, log, steps) for r in profile.sites for log, steps in _logs(profile, r) if sign * log > WARN]
    if not found:
        return None
    _, log, steps = max(found, key=lambda item: sign * item[1])
    verb = "grows" if sign > 0 else "shrinks"
    text = (
        f"Over {steps} steps back in time the gradient {verb} by {abs(log) / 2 / math.log(10):.1f} decades, "
        f"a factor {math.exp(log / 2 / steps):.3g} per step."
    )
    fatal = sign * log > ALARM and (sign > 0 or _achieves_nothing(profile.response))
    severity = Severity.ERROR if fatal else Severity.WARNING
    sites = list({r.site.index: r for r, _, _ in found}.values())
    decades = log / 2 / math.log(10)
    return finding(cause, severity, text, decades, 0.0, "log10 of |first|/|last|", sites)


def _logs(profile: Profile, reading: Reading) -> list[tuple[float, int]]:
    """Per direction: ln of the squared gradient at the far end over that at the near one, and the steps."""
    if reading.time and reading.time.gradients:
        return [_ends(points) for points in reading.time.gradients if len(points) > 2]
    loop = next((calls for calls in profile.loops if calls[0] is reading), ())
    return [_ends([(i, call.gradient or 0.0) for i, call in enumerate(reversed(loop))])] if loop else []


def _ends(points: Sequence[tuple[int, float]]) -> tuple[float, int]:
    """Medians of the nearest and the farthest tenth, so that no single step decides; padding is left out."""
    reached = [value for _, value in points if value > 0]
    if len(reached) < 3 or not all(map(math.isfinite, reached)):
        return 0.0, 1
    tenth = max(1, len(reached) // 10)
    near, far = median(reached[:tenth]), median(reached[-tenth:])
    lost = points[-1][1] == 0 and len(reached) < len(points) // 2  # below the smallest number
    return 2 * math.log((1e-45 if lost else far) / near), points[-1][0] - points[0][0]


def _achieves_nothing(response: Response | None) -> bool:
    if response is None or not response.losses:
        return False
    best = min(*response.losses, response.reachable)
    return response.before - best < _NO_PROGRESS * abs(response.before)


def _saturated(attention: AttentionReading) -> bool:
    known = [entropy for entropy in attention.heads if not math.isnan(entropy)]
    return bool(known) and max(known) < _ONE_KEY and attention.logit_rms > _HUGE


def _normalized_after(profile: Profile, site: Site) -> bool:
    """Whether a normalization stands between the site and all layers with weights that read it."""
    waiting, seen = [site.index], set()
    while waiting:
        for reader in profile.anatomy.readers(waiting.pop()):
            if reader.weighted:
                return False
            if reader.kind != "normalization" and reader.index not in seen:
                seen.add(reader.index)
                waiting.append(reader.index)
    return True


RULES = (
    batch_norm_explosion,
    residual_growth,
    vanishing_through_time,
    exploding_through_time,
    attention_saturation,
    attention_collapse,
)
