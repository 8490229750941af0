"""Trial: whether a setup learns in the steps that it is given, and what would let it learn.

A few steps stand for many: steps k times as long go about as far as k times as many, as long as they do not
overshoot (Goyal et al., Accurate, large minibatch SGD, 2017, https://arxiv.org/abs/1706.02677). So 24 steps
on copies (96 where they cost little), at several lengths up to the one that makes up for all that are
planned, show what becomes of it.

What counts is the fit: by how much the loss of samples with their own targets is lower than with those of
other samples, as a share of the sum of both. It is 0 for a network that makes nothing of its input, whatever
the loss, and 1 for one that has learnt its batches by heart. Of a squared error it is about R².

A setup that learns needs no repair: what was suspected of keeping it from learning is then a warning. In one
that does not, one thing after the other is changed: what lets it learn is the cause.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import cycle, islice
from statistics import fmean, stdev

import torch
from torch import Tensor

from gradmend.causes import Cause
from gradmend.diagnosis.attempts import Attempt, at_rate, attempts
from gradmend.diagnosis.finding import Diagnosis, Finding, Severity
from gradmend.diagnosis.positional import positional
from gradmend.harmless import seed_noise, undisturbed, untouched
from gradmend.profile import Profile
from gradmend.readout import lower
from gradmend.room import out_of_memory
from gradmend.setup import Batch, Setup

_STEPS, _MORE, _LITTLE, UNTOLD = 24, 96, 1_000_000, 1000
"""Steps of one attempt; more where they cost little: weights times rows. How many are planned if untold."""

_WELL, _LEARNS, _FAR_BETTER = 0.5, 0.2, 3.0
"""Fits: of what learns well, and of what learns; and how much better it is without what is to blame.

Of 125 small programs and mutations of them, trained in full, nearly all that end near the best of their kind
have a fit above 0.2, and nearly all that end below half of it have one below 0.1.
"""

_HOPELESS, _RISEN = 0.003, 0.1
"""What fits no better after half of the steps is given up: what learns in the end has ten times this by then.
A loss that rose by more than this share shows that still longer steps are too long as well.
"""

_BLAMED = 3
"""So many changes that let it learn are enough to choose from."""

_PERMUTED = 16
"""So many permutations of the targets tell what chance gives."""

_DOUBT = 0.3
"""A setup whose prognosis is better than this is not tried without a finding."""

_FEW = 8
"""Fewer samples are learnt by heart whatever is wrong, so that they acquit nothing."""

_ROWS, _VALUES, _SECONDS = 128, 1_000_000, 20.0
"""So many rows of each batch at most, of so many values; no attempt after so many seconds of computing."""

CONTESTED = frozenset(
    (
        Cause.UNSCALED_INPUT,
        Cause.UNSCALED_TARGETS,
        Cause.STRAY_COLUMN,
        Cause.UNFIT_BATCH_SIZE,
        Cause.TOO_MUCH_DROPOUT,
        Cause.TOO_MUCH_WEIGHT_DECAY,
        Cause.LEARNING_RATE_TOO_HIGH,
        Cause.LEARNING_RATE_TOO_LOW,
        Cause.TOO_FEW_STEPS,
        Cause.UNFIT_OPTIMIZER,
    )
)
"""What slows a training: whether it keeps one from learning, only a training shows."""


def settle(
    setup: Setup, batches: Sequence[Batch], profile: Profile, diagnosis: Diagnosis
) -> tuple[Finding, ...]:
    """Let a trial decide what only slows a training, and what keeps a suspicious one from learning.

    Args:
        batches: at least one, `(x, y)`, or by name with `labels`; the steps go through them in turn.
        profile: of this setup.
        diagnosis: what was found, with its prognosis.

    Returns:
        The findings. Those given, if they are beyond doubt, or if no trial is possible.

    Examples:
        >>> from functools import partial
        >>> from torch import nn
        >>> from gradmend.diagnosis import diagnose
        >>> x = torch.randn(256, 4)
        >>> adam = partial(torch.optim.Adam, lr=1e-6)
        >>> net = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 3))
        >>> batches = [(rows, rows[:, :3].argmax(1)) for rows in x.split(64)]
        >>> diagnose(Setup(net, nn.CrossEntropyLoss(), adam), batches).findings[0].cause.title
        'learning rate too low'
    """
    findings = diagnosis.findings
    errors = {f.cause for f in findings if f.severity is Severity.ERROR}
    shuffled = any(f.cause is Cause.SHUFFLED_LABELS for f in findings)
    setup, batches = positional(setup, batches)
    suspicious = errors <= CONTESTED if errors else shuffled or _doubtful(profile, diagnosis)
    if not suspicious or not _possible(setup, batches):
        return findings
    trial = _Trial(setup, [_some(batch) for batch in batches])
    planned = profile.planned or UNTOLD
    own = trial.best(Attempt((), "", _multiples(planned, trial.steps)), _WELL, planned)
    if own is None:
        return findings
    if shuffled and (by_heart := _by_heart(trial, findings)):
        return by_heart
    if own >= _WELL and sum(len(batch[-1]) for batch in trial.batches) >= _FEW:
        return _acquitted(findings, own, trial, planned)
    return findings if own >= _LEARNS else _convicted(trial, profile, findings, own, planned)


def _doubtful(profile: Profile, diagnosis: Diagnosis) -> bool:
    """Whether little speaks for it: a bad prognosis, or none."""
    if profile.response is None or not math.isfinite(profile.loss):
        return False
    return diagnosis.prognosis is None or diagnosis.prognosis.probability < _DOUBT


def _possible(setup: Setup, batches: Sequence[Batch]) -> bool:
    if setup.optimizer is None or setup.accumulate > 1 or (setup.loss_fn is None and setup.step is None):
        return False
    if not all(isinstance(batch, (tuple, list)) and len(batch) > 1 for batch in batches):
        return False
    shapes = {tuple(map(_shape, batch)) for batch in batches}
    if len(shapes) != 1 or None in next(iter(shapes)):
        return False
    rows = [{len(part) for part in batch} for batch in batches]
    return all(len(found) == 1 for found in rows) and sum(map(max, rows)) > 2


def _shape(part: object) -> tuple[int, ...] | None:
    """Of one row; None of what rows cannot be taken from."""
    if not isinstance(part, Tensor) or part.is_nested or part.layout != torch.strided or not part.dim():
        return None
    return tuple(part.shape[1:])


def _some(batch: Batch) -> Batch:
    """As many rows as a trial needs."""
    values = max(t[0].numel() for t in batch)
    rows = min(_ROWS, max(8, _VALUES // max(1, values)))
    return tuple(t[:rows] for t in batch)


def _multiples(planned: int, steps: int) -> tuple[float, ...]:
    """How many times longer steps are tried: the middle first, for most setups learn there.

    >>> _multiples(24, 24), _multiples(96, 24), _multiples(2400, 24)
    ((1.0,), (1.0, 4.0), (16.0, 4.0, 64.0, 1.0, 100.0))
    """
    most = max(1.0, planned / steps)
    found = [4.0**k for k in range(10) if 4.0**k < most / 1.3] + [most]
    middle = math.sqrt(most)
    return tuple(sorted(found, key=lambda m: abs(math.log(m / middle))))


class _Trial:
    """Attempts on copies of one setup, with the same batches and the same noise."""

    def __init__(self, setup: Setup, batches: Sequence[Batch]) -> None:
        self.setup, self.batches = setup, batches
        cost = sum(p.numel() for p in setup.model.parameters()) * max(len(batch[-1]) for batch in batches)
        self.steps = _MORE if cost <= _LITTLE else _STEPS
        self.end = time.process_time() + _SECONDS
        self.too_long: dict[tuple[object, object], float] = {}

    def best(self, attempt: Attempt, enough: float, planned: int | None = None) -> float | None:
        """The best fit at any of the rates, or the first that is enough. None if out of time."""
        found: list[float] = []
        steps = self.steps if planned is None else min(self.steps, planned)
        for multiple in attempt.multiples:
            if time.process_time() > self.end:
                break
            found.append(self.fit(attempt, multiple, steps))
            if found[-1] >= enough:
                break
        return max(found, default=None)

    def fit(self, attempt: Attempt, multiple: float, steps: int) -> float:
        """The fit after some steps; 0 where they do not lower the loss, or shorter ones were too long."""
        if multiple >= self.too_long.get((attempt.make, attempt.feed), math.inf):
            return 0.0
        return self.after(attempt, multiple, steps, self.batches, _told_apart) or 0.0

    def after(
        self,
        attempt: Attempt,
        multiple: float,
        steps: int,
        batches: Sequence[Batch],
        look: Callable[[Setup, Batch], float | None],
    ) -> float | None:
        """What is seen of the batches together after some steps on them.

        None where their loss is no lower than before, or the user's code refuses what becomes of the weights.
        """
        try:
            with undisturbed(self.setup.model):
                trial = attempt.make(self.setup.copy())
                fed = attempt.feed(batches)
                with undisturbed(trial.model):
                    together = _together(fed)
                    before, walk = _loss(trial, together), _walk(trial, fed, multiple)
                    deque(islice(walk, steps // 2), maxlen=0)
                    if _told_apart(trial, fed[0]) >= _HOPELESS or steps == 1:
                        deque(islice(walk, steps - steps // 2), maxlen=0)
                    loss = _loss(trial, together)
                    if not loss <= before + _RISEN * abs(before):
                        self.too_long[attempt.make, attempt.feed] = multiple
                    return look(trial, together) if loss < before else None
        except Exception as error:  # argument checks, assertions
            if out_of_memory(error):
                raise
            return None


def _walk(trial: Setup, batches: Sequence[Batch], multiple: float) -> Iterator[None]:
    """Step on the batches, over and over, at a multiple of the rate."""
    optimizer = at_rate(trial, multiple).build_optimizer()
    held = [p for group in optimizer.param_groups for p in group["params"]]
    seed_noise(0)
    for batch in cycle(batches):
        optimizer.zero_grad()
        loss = trial.loss(untouched(batch))
        loss.backward()  # type: ignore[no-untyped-call]
        if trial.gradient_transform is not None:
            trial.gradient_transform(held)
        optimizer.step()
        yield


def _together(batches: Sequence[Batch]) -> Batch:
    return tuple(torch.cat(parts) for parts in zip(*batches, strict=True))


def _told_apart(setup: Setup, batch: Batch) -> float:
    """How far the loss of the batch with its own targets is below that with others."""
    own, others = _own_and_others(setup, batch, 2)
    return lower(own, fmean(others))


@torch.no_grad()
def _own_and_others(setup: Setup, batch: Batch, count: int) -> tuple[float, list[float]]:
    """The loss of a batch with its own targets, and with those of other rows in so many ways."""
    rows = len(batch[-1])
    shifts = {rows * k // (count + 1) for k in range(1, count + 1)} - {0} or {1}
    seed_noise(0)
    targets = [batch[-1].roll(shift, 0) for shift in (0, *sorted(shifts))]
    own, *others = (loss.item() for loss in setup.losses(untouched(batch), targets))
    return own, others


@torch.no_grad()
def _loss(setup: Setup, batch: Batch) -> float:
    seed_noise(0)
    return setup.loss(untouched(batch)).item()


def _by_heart(trial: _Trial, findings: Sequence[Finding]) -> tuple[Finding, ...] | None:
    """Where the inputs seem to say nothing about the targets: an error if the network itself finds nothing.

    It learns all batches but the last by heart, and its outputs for the last fit their targets no better than
    permuted ones: by two deviations of these.
    """
    seen, unseen = trial.batches[:-1], trial.batches[-1]
    suspect = next((f for f in findings if f.cause is Cause.SHUFFLED_LABELS), None)
    if suspect is None or not seen:
        return None

    def told(setup: Setup, learnt: Batch) -> float | None:
        if _told_apart(setup, learnt) < _LEARNS:
            return None
        own, others = _own_and_others(setup, unseen, _PERMUTED)
        return (fmean(others) - own) / max(stdev(others), 1e-12)

    multiples = (multiple for multiple in (1.0, 4.0, 16.0) if time.process_time() < trial.end)
    found = (trial.after(Attempt((), "", ()), multiple, trial.steps, seen, told) for multiple in multiples)
    better = next((value for value in found if value is not None), math.inf)
    if better > 2:
        return None
    text = "The network learns its batches by heart, and of another one no more than of permuted targets."
    worse = replace(suspect, severity=Severity.ERROR, evidence=(*suspect.evidence, text))
    return tuple(sorted((worse if f is suspect else f for f in findings), key=lambda f: -f.severity))


def _asked(trial: _Trial, planned: int) -> str:
    if planned <= trial.steps:
        return f"All {planned} steps fit the batches by"
    return f"{trial.steps} steps, long enough for {planned}, fit the batches by"


def _acquitted(findings: Sequence[Finding], own: float, trial: _Trial, planned: int) -> tuple[Finding, ...]:
    """What was suspected becomes a warning, with what the trial showed."""
    text = f"It learns all the same: {_asked(trial, planned)} {own:.2f} (0: not at all, 1: by heart)."
    told = [
        replace(f, severity=Severity.WARNING, evidence=(*f.evidence, text))
        if f.cause in CONTESTED and f.severity is Severity.ERROR
        else f
        for f in findings
    ]
    return tuple(sorted(told, key=lambda f: -f.severity))


def _convicted(
    trial: _Trial, profile: Profile, findings: Sequence[Finding], own: float, planned: int
) -> tuple[Finding, ...]:
    """The cause without which the setup learns, first among the errors; others of that kind are warnings."""
    known = {f.cause: f for f in findings}
    likely = sorted(
        attempts(profile, planned / trial.steps), key=lambda a: not any(cause in known for cause in a.causes)
    )
    enough, blamed = max(_WELL, _FAR_BETTER * own), dict[Cause, Finding]()
    for attempt in likely:
        fit = trial.best(attempt, enough)
        if fit is None or fit < enough:
            continue
        text = f"{_asked(trial, planned)} {max(own, 0.0):.2f} (0: not at all, 1: by heart)"
        text += f", with {attempt.words} by {fit:.2f}."
        cause = next((cause for cause in attempt.causes if cause in known), attempt.causes[0])
        severity = Severity.WARNING if blamed else Severity.ERROR
        found = known.get(cause) or Finding(cause, severity, cause.sentence, max(own, 0.0), fit, "fit")
        severity = max(found.severity, severity)
        blamed[cause] = replace(found, severity=severity, evidence=(*found.evidence, text))
        if len(blamed) == _BLAMED:
            break
    return first(blamed, findings)


def first(changed: Mapping[Cause, Finding], findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """The findings with the changed ones among them, first of each severity."""
    rest = (f for f in findings if f.cause not in changed)
    return tuple(sorted((*changed.values(), *rest), key=lambda f: -f.severity))
