"""The rule on speed: numbers that the processor computes slowly."""

from __future__ import annotations

import math

from gradmend.causes import Cause
from gradmend.diagnosis.finding import Finding, Severity
from gradmend.profile import Profile

_SMALLEST_NORMAL = 1.1754944e-38
_MANY = 0.01
"""Denormal numbers take 10 to 100 times as long: a share of 1 % shows in the time of a step."""


def denormal_numbers(profile: Profile) -> Finding | None:
    """More than 1 % of the signals and gradients are denormal, or of the squares that Adam keeps of them.

    Of values about zero with deviation s, the share erf(tiny / (s sqrt 2)) lies below the smallest normal
    number of float32; of the squares of gradients, scaled by 1 - beta_2, the same with the root of tiny.
    """
    if profile.regime is None or profile.regime.flushes:
        return None
    shares = _signals(profile) + _squares(profile)
    total = sum(size for _, size in shares)
    denormal = sum(share * size for share, size in shares) / total if total else 0.0
    if denormal < _MANY:
        return None
    text = (
        f"About {denormal:.0%} of the signals, gradients and squares that the optimizer keeps are denormal."
    )
    return Finding(Cause.DENORMAL_NUMBERS, Severity.WARNING, text, denormal, 0.0, "share of all values")


def _signals(profile: Profile) -> list[tuple[float, int]]:
    """Share of denormal values, and of how many, of outputs and their gradients."""
    found = []
    for reading in profile.sites:
        size = math.prod(reading.site.shape)
        found.append((_below(_SMALLEST_NORMAL, reading.rms) * (1 - (reading.zero or 0.0)), size))
        if reading.gradient is not None:
            share = _below(_SMALLEST_NORMAL, reading.gradient) * (1 - (reading.gradient_zero or 0.0))
            found.append((share, size))
    return found


def _squares(profile: Profile) -> list[tuple[float, int]]:
    """The same for the averages of squared gradients, at the first step of an optimizer that keeps them."""
    assert profile.regime is not None
    kept = {name: group for group in profile.regime.optimizer.groups if group.betas for name in group.names}
    found = []
    for parameter in profile.parameters:
        if parameter.gradient and (group := kept.get(parameter.name)):
            assert group.betas is not None
            fresh = 1 - group.betas[1]
            limit = math.sqrt(_SMALLEST_NORMAL / fresh) if fresh > 0 else 0.0
            zero = math.sqrt(2.0**-149 / fresh) if fresh > 0 else 0.0
            share = _below(limit, parameter.gradient) - _below(zero, parameter.gradient)
            found.append((share, math.prod(parameter.shape)))
    return found


def _below(limit: float, rms: float) -> float:
    """The share of normal values with this deviation that are smaller than the limit; 0 for none at all."""
    return math.erf(limit / (rms * math.sqrt(2))) if 0 < rms < math.inf else 0.0


RULES = (denormal_numbers,)
