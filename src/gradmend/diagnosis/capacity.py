"""The rule on capacity: what the network cannot represent, whatever its weights."""

from __future__ import annotations

from gradmend.causes import Cause
from gradmend.diagnosis.finding import Finding, Severity
from gradmend.inquiry import bottleneck
from gradmend.profile import Profile
from gradmend.regime import Capacity

_UNEXPLAINED, _EXPLAINED = 0.1, 0.5
"""Shares of the targets' variance: no affine map explains so much, the nearest other row explains more."""

_LOST = 0.5
"""The share of the targets' variance that cannot get through: more is lost than learnt."""


def too_little_capacity(profile: Profile) -> Finding | None:
    """A network that is one affine map cannot fit the targets, or one layer is too narrow for them.

    Affine: the best such map explains under 10 % of the targets' variance (adjusted R²), the target of the
    nearest other row over half of it. Narrow: the last weights sum w units and nothing else, so the
    outputs have rank w, and half of the targets' variance lies outside any w directions (Eckart, Young
    1936); or through a single unit to three classes or more.
    """
    regime = profile.regime
    if regime is None:
        return None
    bent = _bent(profile, regime.capacity) if regime.affine else None
    return bent or _narrow(profile, regime.capacity)


def _bent(profile: Profile, capacity: Capacity | None) -> Finding | None:
    """What an affine network is asked for and cannot do."""
    if capacity is None:
        return None
    explained = max(capacity.linear, 0.0)
    if explained > _UNEXPLAINED or capacity.neighbour < _EXPLAINED:
        return None
    text = (
        f"The network is affine up to its output; the best affine map explains {explained:.0%} of the "
        f"targets' variance, the nearest other row {capacity.neighbour:.0%}."
    )
    return Finding(
        Cause.TOO_LITTLE_CAPACITY,
        Severity.ERROR,
        text,
        explained,
        capacity.neighbour,
        "share of the targets' variance",
        sites=tuple(site.name for site in profile.anatomy.weighted()),
    )


def _narrow(profile: Profile, capacity: Capacity | None) -> Finding | None:
    site = bottleneck(profile.anatomy)
    if site is None:
        return None
    outputs = profile.anatomy.weighted()[-1].units
    lost = capacity.lost[site.units - 1] if capacity and site.units <= len(capacity.lost) else 0.0
    if lost < _LOST and not (site.units == 1 and outputs >= 3):
        return None
    text = f"All passes through the {site.units} units of {site.name} on its way to {outputs} outputs"
    text += f": {lost:.0%} of the targets' variance cannot get through." if lost else "."
    return Finding(
        Cause.TOO_LITTLE_CAPACITY,
        Severity.ERROR,
        text,
        float(site.units),
        float(outputs),
        "units",
        sites=(site.name,),
        where=(site.line,) if site.line else (),
    )


RULES = (too_little_capacity,)
