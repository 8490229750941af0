"""Rules on the batch: what batch normalization makes of a small one, and what a large one costs."""

from __future__ import annotations

import math

from gradmend.causes import Cause
from gradmend.diagnosis.finding import Finding, Severity, where
from gradmend.diagnosis.stepping import too_few_steps
from gradmend.profile import Profile
from gradmend.readings import Reading

_LARGE, _OUT_OF_PROPORTION = 128, 8
"""Rows that are called many, and how far beyond the noise scale such a batch is."""


def batch_of_one(profile: Profile) -> Finding | None:
    """A batch normalization takes mean and deviation of no more than two values, or of a single sample.

    Of two values it leaves the sign: both become +1 or -1, whatever they were. A single sample with many
    values is normalized by itself, and by running averages over all samples in evaluation: a warning.
    """
    training = [r for r in profile.sites if r.drift is not None]
    tiny = [r for r in training if _values(r) <= 2]
    alone = [r for r in training if r.site.shape[r.site.batch_dim] == 1]
    found = tiny or alone
    if not found:
        return None
    least = min(map(_values, found))
    text = f"Batch normalization takes mean and deviation of {least} values, from {profile.samples} samples."
    return Finding(
        Cause.BATCH_OF_ONE,
        Severity.ERROR if tiny else Severity.WARNING,
        text,
        float(least),
        32.0,
        "values per channel",
        sites=tuple(r.site.name for r in found),
        where=where(found),
    )


def _values(reading: Reading) -> int:
    return math.prod(reading.site.shape) // reading.site.units


def unfit_batch_size(profile: Profile) -> Finding | None:
    """The batch is eight times the gradient's noise scale, and the planned steps are too few.

    Beyond the noise scale a batch n times as large saves next to no steps (McCandlish et al. 2018); cut in
    eight it gives eight steps for one.
    """
    regime = profile.regime
    if regime is None or regime.noise_scale is None or profile.samples < _LARGE:
        return None
    excess = profile.samples / max(regime.noise_scale, 1.0)
    if excess < _OUT_OF_PROPORTION or too_few_steps(profile) is None:
        return None
    text = (
        f"{regime.noise_scale:.3g} rows would average the gradient's noise to its signal; the batch has "
        f"{profile.samples}, which leaves {profile.planned} steps."
    )
    return Finding(
        Cause.UNFIT_BATCH_SIZE,
        Severity.ERROR,
        text,
        float(profile.samples),
        max(regime.noise_scale, 1.0),
        "rows",
    )


RULES = (batch_of_one, unfit_batch_size)
