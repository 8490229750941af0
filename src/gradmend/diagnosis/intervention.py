"""Intervention: which of several possible causes is the one, by what happens when each is taken away.

A signal that dies or grows may be due to the input, the weights, the activation or the normalization. One of
them at a time is replaced while a batch runs forward and backward, and the rules look again: the cause is the
one without which the symptoms are gone. Nothing of the setup is changed, and a healthy profile costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from gradmend.causes import Cause
from gradmend.console import number
from gradmend.diagnosis.changes import (
    USUAL,
    Drawn,
    Normalized,
    PerSample,
    Scaled,
    Standardized,
    hidden_activations,
    variances,
)
from gradmend.diagnosis.finding import Finding, Severity
from gradmend.diagnosis.rerun import Change, Trace, Traces, cosine_gap, followed, rerun, samples_of
from gradmend.diagnosis.signal import (
    dead_units,
    exploding_gradient,
    information_collapse,
    saturated_units,
    vanishing_gradient,
)
from gradmend.profile import Profile
from gradmend.readings import Reading
from gradmend.setup import Batch, Setup

_ENOUGH = 0.05
"""A step of another length shows something if it lowers the loss by this share of it."""

_ROWS = 64
"""So many samples run through the changed network: enough to tell which units are dead."""


@dataclass(frozen=True)
class Symptom:
    """What has several possible causes: its rule, and the number that shows it."""

    rule: Callable[[Profile], Finding | None]
    what: str
    size: Callable[[Profile], float]


@dataclass(frozen=True)
class Suspect:
    """A possible cause, and what takes it away.

    Args:
        causes: those it may be found under; none if taking it away only shows what would help.
        words: of what is different without it.
        change: the change of a rerun.
    """

    causes: tuple[Cause, ...]
    words: str
    change: Change


def decide(setup: Setup, batch: Batch, profile: Profile, findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Tell the cause from the suspects, by cheap experiments on one batch.

    Args:
        batch: one of those that were measured.
        profile: of this setup.
        findings: what the rules found in it.

    Returns:
        The findings: the cause first among the errors, with its evidence, and suspects that are not to
        blame as warnings. Those given, if none of them is an error that has several possible causes.

    Examples:
        >>> from gradmend.diagnosis import RULES
        >>> from gradmend.probe import measure
        >>> import torch
        >>> from torch import nn
        >>> layers = [layer for _ in range(20) for layer in (nn.Linear(32, 32), nn.ReLU())]
        >>> setup = Setup(nn.Sequential(*layers), nn.MSELoss())
        >>> batch = torch.randn(64, 32), torch.randn(64, 32)
        >>> profile = measure(setup, batch)
        >>> found = [finding for rule in RULES if (finding := rule(profile))]
        >>> decide(setup, batch, profile, found)[0].cause.title
        'weights too small'
    """
    errors = {f.cause for f in findings if f.severity is Severity.ERROR}
    symptoms = {cause: symptom for cause, symptom in SYMPTOMS.items() if cause in errors}
    if not symptoms:
        return tuple(findings)
    outcomes = _try_all(setup, batch, profile, symptoms)
    helped = any(outcome.helps for outcome in outcomes)
    told = _tell(findings, symptoms, outcomes) if helped else _with_step(profile, findings)
    return tuple(sorted(told, key=lambda found: (-found.severity, not found.evidence)))


@dataclass(frozen=True)
class _Outcome:
    suspect: Suspect
    helps: bool
    sentence: str


def _try_all(setup: Setup, batch: Batch, profile: Profile, symptoms: dict[Cause, Symptom]) -> list[_Outcome]:
    """Take away one suspect after the other; what is no cause by itself only if nothing else helps."""
    outcomes: list[_Outcome] = []
    rows = samples_of(batch, profile.anatomy, _ROWS)
    for suspect in suspects(profile):
        if not suspect.causes and any(o.helps for o in outcomes):
            break
        traces = next((found for some in rows if (found := rerun(setup, some, suspect.change))), None)
        if traces and followed(traces, profile.anatomy.sites):
            outcomes.append(_outcome(suspect, profile, without(profile, traces), symptoms))
    return outcomes


def _outcome(
    suspect: Suspect, profile: Profile, changed: Profile, symptoms: dict[Cause, Symptom]
) -> _Outcome:
    left = [cause for cause, symptom in symptoms.items() if symptom.rule(changed) is not None]
    shown = symptoms[left[0]] if left else next(iter(symptoms.values()))
    before, after = number(shown.size(profile)), number(shown.size(changed))
    way = f"stays at {after}, from {before}" if left else f"goes from {before} to {after}"
    return _Outcome(suspect, not left, f"With {suspect.words}, {shown.what} {way}.")


def suspects(profile: Profile) -> list[Suspect]:
    """What may be to blame in this profile, in the order in which it is taken away."""
    found = []
    inputs, functions = profile.inputs, hidden_activations(profile.anatomy)
    if inputs is not None and not USUAL[0] <= inputs.rms <= USUAL[1]:
        found.append(Suspect((Cause.UNSCALED_INPUT,), "the input standardized", Standardized()))
    if functions:
        found.append(
            Suspect(_WEIGHTS, f"weights of variance {_drawn(profile)}/fan-in", Drawn(profile.anatomy))
        )
        words = f"leaky ReLU in place of {functions[0].function}, and weights for it"
        found.append(Suspect((Cause.CONTRACTING_ACTIVATION,), words, Drawn(profile.anatomy, leaky=True)))
    if any(site.function == "batch_norm" for site in profile.anatomy.sites):
        words = "layer normalization in place of batch normalization"
        found.append(Suspect((Cause.BATCH_NORM_EXPLOSION,), words, PerSample()))
    if branches := _branches(profile):
        words = f"branches scaled by 1/sqrt({len(branches)})"
        found.append(Suspect((Cause.RESIDUAL_GROWTH,), words, Scaled(branches)))
    between = Suspect((), "normalization between all layers", Normalized())
    return [*found, between] if functions else found


def without(profile: Profile, traces: Traces) -> Profile:
    """The profile as it would be measured in the rerun."""
    sites = tuple(_seen(r, traces[r.site.index]) for r in profile.sites if r.site.index in traces)
    return replace(profile, sites=sites)


def _seen(reading: Reading, trace: Trace) -> Reading:
    """The numbers that the rules on symptoms look at."""
    return replace(
        reading,
        rms=reading.rms if trace.rms is None else trace.rms,
        cosine=math.nan if trace.rows is None else 1 - cosine_gap(trace.rows),
        gradient=trace.gradient,
        dead=0.0 if trace.silent is None else trace.silent.float().mean().item(),
        saturation=None if trace.flat is None else trace.flat.item(),
    )


def _drawn(profile: Profile) -> str:
    values = variances(profile.anatomy, leaky=False)
    hidden = [values[site.index] for site in profile.anatomy.weighted()[:-1]] or [1.0]
    return number(max(set(hidden), key=hidden.count))


def _branches(profile: Profile) -> frozenset[int]:
    """The last sites of the branches of a stream that grows."""
    sums = [r for r in profile.residuals if r.growth > 1.1]
    return frozenset(max(r.site.direct) for r in sums) if len(sums) > 2 else frozenset()


def _tell(
    findings: Sequence[Finding], symptoms: Iterable[Cause], outcomes: Sequence[_Outcome]
) -> list[Finding]:
    """The findings with the evidence at the cause; suspects that are not to blame become warnings.

    An input out of scale stays what it is: it does harm in other ways as well.
    """
    helped = next((o for o in outcomes if o.helps), None)
    if helped is None:
        return list(findings)
    present = {f.cause for f in findings}
    guilty = next(c for c in (*helped.suspect.causes, *symptoms) if c in present)
    evidence = (helped.sentence, *(o.sentence for o in outcomes if not o.helps))
    innocent = {c for o in outcomes for c in o.suspect.causes} | _STEPS
    innocent -= {guilty, Cause.UNSCALED_INPUT, *symptoms}
    return [_judged(f, guilty, innocent, evidence) for f in findings]


def _judged(found: Finding, guilty: Cause, innocent: Collection[Cause], evidence: tuple[str, ...]) -> Finding:
    if found.cause is guilty:
        return replace(found, severity=Severity.ERROR, evidence=evidence)
    return (
        replace(found, severity=min(found.severity, Severity.WARNING)) if found.cause in innocent else found
    )


def _with_step(profile: Profile, findings: Sequence[Finding]) -> list[Finding]:
    """Learning rates with what a step of another length would do, as far as it would do something."""
    response = profile.response
    if response is None or response.before - response.reachable < _ENOUGH * abs(response.before):
        return list(findings)
    share = (response.before - response.reachable) / abs(response.before)
    text = f"One step {number(response.best_fraction)} times as long lowers the loss by {share:.0%}."
    return [replace(f, evidence=(text,)) if f.cause in _STEPS else f for f in findings]


# ---- what shows -------------------------------------------------------------------------------------------


def _ratio(profile: Profile) -> float:
    """Of the gradient at the first weights over that at the last."""
    norms = [r.gradient_norm for r in profile.weighted() if r.gradient_norm is not None]
    return norms[0] / norms[-1] if norms and norms[-1] else math.nan


def _cosine(profile: Profile) -> float:
    """Between samples, at the last hidden layer."""
    return next((r.cosine for r in reversed(profile.weighted()[:-1]) if math.isfinite(r.cosine)), math.nan)


def _flat(profile: Profile) -> float:
    return max((r.saturation or 0.0 for r in profile.sites), default=math.nan)


def _dead(profile: Profile) -> float:
    return max((r.dead for r in profile.sites), default=math.nan)


_GRADIENT = "the gradient at the first layer over that at the last"
SYMPTOMS = {
    Cause.DEAD_UNITS: Symptom(dead_units, "the share of dead units", _dead),
    Cause.SATURATED_UNITS: Symptom(saturated_units, "the share of flat values", _flat),
    Cause.VANISHING_GRADIENT: Symptom(vanishing_gradient, _GRADIENT, _ratio),
    Cause.EXPLODING_GRADIENT: Symptom(exploding_gradient, _GRADIENT, _ratio),
    Cause.INFORMATION_COLLAPSE: Symptom(information_collapse, "the cosine between samples", _cosine),
}
"""What has several possible causes: units first, for they bring about the others."""

_WEIGHTS = (Cause.SYMMETRIC_WEIGHTS, Cause.WEIGHTS_TOO_SMALL, Cause.WEIGHTS_TOO_LARGE)
_STEPS = frozenset((Cause.LEARNING_RATE_TOO_HIGH, Cause.LEARNING_RATE_TOO_LOW))
