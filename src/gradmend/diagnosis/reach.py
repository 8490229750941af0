"""Reach: whether the planned steps bring a setup about as far as they bring its network set as usual.

Copies train for the planned steps on some batches and are judged by others: one as it is, one with all that
is usual at once (standardized data, fresh weights, Adam). Where the second gets much further, one thing after
the other is changed, and what closes most of the gap is to blame. So this should be told how many steps are
planned: with other settings nearly every network learns faster, and it is no fault to take one's time. Where
nothing is told, a thousand are taken to be, and only setups of a doubtful prognosis are tried.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from time import process_time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from gradmend.anatomy import Anatomy
from gradmend.causes import Cause
from gradmend.diagnosis.attempts import (
    Attempt,
    adapts,
    amounts,
    at_rate,
    drops,
    odd,
    regresses,
    standardized,
    too_large,
    undropped,
    with_adam,
)
from gradmend.diagnosis.changes import hidden_activations
from gradmend.diagnosis.finding import Diagnosis, Finding, Severity
from gradmend.diagnosis.trial import CONTESTED, UNTOLD, first
from gradmend.profile import Profile
from gradmend.room import out_of_memory
from gradmend.setup import Batch, Setup
from gradmend.training import Run
from gradmend.training.evaluation import evaluate, fit

_SECONDS, _SHARE, _BLOCK = 0.5, 0.25, 50
"""Seconds of computing of one training, and the most steps until they are counted. A training that takes less
than this share of the planned steps in its own tells too little."""

MOST_SECONDS = 6.0
"""Seconds of computing of all trainings together."""

_MARGIN, _LEFT = 0.06, 0.6
"""By so much at least the usual settings are better, and of what is missing they leave this share at most."""

_CLOSED, _ALIKE, _WORSE = 0.6, 0.02, 0.1
"""What closes so much of the gap is to blame. Of scores as near as the second the likelier cause is named
first. Where it gets worse by the third, more of it is not tried."""

_NOTHING, _WELL, _TIMES, _FEW = 0.1, 0.8, 16, 300
"""Scores of what has learnt nothing, and of what has learnt enough whatever more steps would bring; so many
times as many are tried, where no more than so many are planned."""

CURABLE = CONTESTED | {
    Cause.CONTRACTING_ACTIVATION,
    Cause.DEAD_UNITS,
    Cause.INFORMATION_COLLAPSE,
    Cause.SATURATED_UNITS,
    Cause.SYMMETRIC_WEIGHTS,
    Cause.VANISHING_GRADIENT,
    Cause.WEIGHTS_TOO_LARGE,
    Cause.WEIGHTS_TOO_SMALL,
}
"""Where one of these is found, trainings tell which of several cures is one."""

_LONGER = (4.0, 16.0, 64.0, 256.0, 1024.0)
"""So many times longer steps are tried, as long as it gets better."""

_AS_LONG, _SURE, _BATCHES = (3.0, 10.0), 0.9, 8
"""So many times as long steps are tried if it is untold how many are planned, for there may be ten times as
many. Not of a setup with errors, or of which it is so sure that it trains; not on fewer batches, which would
be learnt by heart; and only if all the steps fit into the time, for few that are longer say less than many.
"""

_SUPPOSITION = (
    "It is not told how many steps are planned (--planned-steps); 1000 were tried, and longer ones."
)

_BLAMED, _UNSEEN = 3, 0.25
"""So many causes at most; the share of the batches that copies are judged by."""

_USUAL = frozenset(("relu", "leaky_relu", "elu", "selu", "gelu", "silu", "prelu"))

_ROWS, _KNOWN = 16, 0.2
"""Fewer rows to be judged by tell too little; so do those of which more than this share has been seen."""


def judged(trained: Setup, held: Sequence[Batch]) -> float | None:
    """How well samples fit, and where there are classes, how many of them are right: the mean of both.

    An output that is far too large fits its targets better than others even if it is mostly wrong.
    """
    found = fit(trained, held)
    right = None if found is None else evaluate(trained, held)[1]
    return found if found is None or right is None else (found + right) / 2


def reach(
    setup: Setup,
    batches: Sequence[Batch],
    diagnosis: Diagnosis,
    seconds: float = MOST_SECONDS,
) -> tuple[Finding, ...]:
    """What keeps a setup from getting as far in the planned steps as it could, by trainings of copies.

    Args:
        batches: `(x, y)`; the last quarter is held back to judge by.
        diagnosis: what is known; a contradiction makes trainings needless.
        seconds: of computing; no training begins later.

    Returns:
        The findings, with what is to blame first; those given, where there is nothing to complain of, or no
        telling.

    Examples:
        >>> from gradmend.diagnosis import diagnose
        >>> x = torch.randn(512, 4)
        >>> net = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 3))
        >>> batches = [(rows, rows[:, :3].argmax(1)) for rows in x.split(32)]
        >>> slow = Setup(net, nn.CrossEntropyLoss(), partial(torch.optim.Adagrad, lr=1e-3))
        >>> diagnose(slow, batches, steps=150).findings[0].cause.title
        'learning rate too low'
    """
    profile, findings = diagnosis.profile, diagnosis.findings
    errors = {f.cause for f in findings if f.severity is Severity.ERROR}
    planned = profile.planned or _supposed(diagnosis, batches)
    if planned is None or not errors <= CURABLE or not _possible(setup, batches):
        return tuple(findings)
    rivals = _Rivals(setup, batches, planned, seconds)
    own = rivals.own((1.0,), _SHARE) if profile.planned else rivals.own(_AS_LONG, 1.0)
    if own is None or own > 1 - _MARGIN:
        return tuple(findings)
    usual = rivals.score(_usual(profile)) or -1.0
    if _better(usual, own):
        return _blamed(rivals, profile, findings, own, usual)
    if max(own, usual) < _NOTHING:
        return _senseless(findings, max(own, usual))
    return tuple(findings) if errors else _too_short(rivals, findings, own)


def _supposed(diagnosis: Diagnosis, batches: Sequence[Batch]) -> int | None:
    """How many steps are planned where that is untold; None where trainings are not worth their time."""
    prognosis = diagnosis.prognosis
    doubtful = diagnosis.healthy and (prognosis is None or prognosis.probability < _SURE)
    return UNTOLD if doubtful and len(batches) >= _BATCHES else None


def _better(other: float, own: float) -> bool:
    return other - own >= _MARGIN and 1 - other <= _LEFT * (1 - own)


def _possible(setup: Setup, batches: Sequence[Batch]) -> bool:
    if setup.optimizer is None or setup.accumulate > 1 or len(batches) < 4:
        return False
    if not all(isinstance(batch, (tuple, list)) and len(batch) == 2 for batch in batches):
        return False
    if not all(_plain(part) for batch in batches for part in batch):
        return False
    held = _held(batches)
    if sum(len(batch[-1]) for batch in batches[-held:]) < _ROWS:
        return False
    seen, unseen = _rows(batches[:-held]), _rows(batches[-held:])
    return sum(row in seen for row in unseen) <= _KNOWN * len(unseen)


def _plain(part: object) -> bool:
    strided = isinstance(part, Tensor) and part.layout == torch.strided and not part.is_nested
    return isinstance(part, Tensor) and strided and part.dim() > 0 and not part.is_complex()


def _held(batches: Sequence[Batch]) -> int:
    return max(1, int(_UNSEEN * len(batches)))


def _rows(batches: Sequence[Batch]) -> set[bytes]:
    """The rows of the inputs: what was seen may have been learnt by heart."""
    return {row.detach().cpu().float().numpy().tobytes() for batch in batches for row in batch[0]}


class _Rivals:
    """Trainings of copies, for as many steps as the first of them takes in its time."""

    def __init__(self, setup: Setup, batches: Sequence[Batch], planned: int, seconds: float) -> None:
        self.setup, self.batches = setup, batches
        self.planned, self.held = planned, _held(batches)
        self.taken = 0
        self.until = process_time() + seconds

    def own(self, times: Sequence[float], least: float) -> float | None:
        """Of the setup as it is, with so many times the steps.

        None if less than the least share of them fits into its time.
        """
        score = self.score(Attempt((), "", (1.0,)))
        share = self.taken / self.planned
        if score is None or share < least:
            return None
        longer = (self.after(Attempt((), "", ()), more / share) for more in times if more != share)
        return max([score, *(found for found in longer if found is not None)])  # longer ones go about as far

    def score(self, attempt: Attempt, enough: float = 1.0, least: float = -1.0) -> float | None:
        """The best at any of the rates, tried until one is enough or worse; None if none can be had."""
        found: list[float] = []
        for multiple in attempt.multiples:
            score = self.after(attempt, multiple)
            if score is None or score < max(found, default=least):
                break
            found.append(score)
            if score >= enough:
                break
        return max(found, default=None)

    def after(self, attempt: Attempt, multiple: float, times: int = 1) -> float | None:
        """How well held-back samples fit after so many times the steps; -1 if it diverges."""
        if process_time() > self.until:
            return None
        try:
            with warnings.catch_warnings(action="ignore"):
                changed = at_rate(attempt.make(self.setup.copy()), multiple)
                fed = attempt.feed(self.batches)
                run = Run(changed, fed[: -self.held], seed=0)
                self.taken = self.taken or _as_far_as_time(run, self.planned)
                run.train(times * self.taken)
                trial = run.trial("", partial(judged, held=fed[-self.held :]))
        except Exception as error:  # whatever the user's code makes of a change
            if out_of_memory(error):
                raise
            return None
        return -1.0 if trial.diverged else trial.fit


def _as_far_as_time(run: Run, planned: int) -> int:
    """Take the planned steps, or as many as there is time for; how many these are."""
    end, steps = process_time() + _SECONDS, 0
    while steps < planned and process_time() < end:
        steps = min(planned, steps + min(steps + 1, _BLOCK))
        run.train(steps)
    return steps


def _blamed(
    rivals: _Rivals, profile: Profile, findings: Sequence[Finding], own: float, usual: float
) -> tuple[Finding, ...]:
    """The single changes that close most of the gap: the one that comes first is the error."""
    known = {f.cause: f for f in findings}
    errors = {f.cause for f in findings if f.severity is Severity.ERROR}
    told = f"{rivals.taken} steps fit held-back samples by {own:.2f} (0: not at all, 1: wholly)"
    attempts = sorted(_attempts(profile), key=lambda a: not any(cause in known for cause in a.causes))
    blamed = dict[Cause, Finding]()
    helping = _helping(rivals, attempts, own, usual)
    helping.sort(key=lambda pair: not any(cause in errors for cause in pair[0].causes))
    for attempt, score in helping[:_BLAMED]:
        text = f"{told}, with {attempt.words} by {score:.2f}."
        for cause in (cause for cause in attempt.causes if cause not in blamed):
            severity = Severity.WARNING if blamed else Severity.ERROR
            found = known.get(cause) or Finding(cause, severity, cause.sentence, own, score, "fit")
            severity = max(found.severity, severity)
            blamed[cause] = replace(found, severity=severity, evidence=(*found.evidence, text))
    if not blamed:
        cause, text = Cause.SLOW_CONVERGENCE, f"{told}, with all that is usual by {usual:.2f}."
        blamed[cause] = Finding(cause, Severity.ERROR, cause.sentence, own, usual, "fit", evidence=(text,))
    if profile.planned is None:
        blamed = {cause: replace(f, evidence=(*f.evidence, _SUPPOSITION)) for cause, f in blamed.items()}
    return first(blamed, findings)


def _helping(
    rivals: _Rivals, attempts: Iterable[Attempt], own: float, usual: float
) -> list[tuple[Attempt, float]]:
    """What closes most of the gap, with its score: what does about as well as the best comes first."""
    found: list[tuple[Attempt, float]] = []
    for attempt in attempts:
        score = rivals.score(attempt, usual - _ALIKE, own - _WORSE)
        if score is not None and score >= own + _CLOSED * (usual - own):
            found.append((attempt, score))
        if sum(score >= usual - _ALIKE for _, score in found) == _BLAMED:
            break
    best = max((score for _, score in found), default=usual) - _ALIKE
    return sorted(found, key=lambda pair: pair[1] < best)


def _senseless(findings: Sequence[Finding], score: float) -> tuple[Finding, ...]:
    """Targets that seem shuffled are, if nothing is learnt of them by usual settings either."""
    text = f"Trained as planned or as usual, held-back samples are fitted by {score:.2f} (0: not at all)."
    suspect = next((f for f in findings if f.cause is Cause.SHUFFLED_LABELS), None)
    if suspect is None:
        return tuple(findings)
    worse = replace(suspect, severity=Severity.ERROR, evidence=(*suspect.evidence, text))
    return first({suspect.cause: worse}, findings)


def _too_short(rivals: _Rivals, findings: Sequence[Finding], own: float) -> tuple[Finding, ...]:
    """Where several times the planned steps get much further, and other settings do not."""
    if rivals.taken < rivals.planned or rivals.planned > _FEW or own > _WELL:
        return tuple(findings)
    longer = rivals.after(Attempt((), "", (1.0,)), 1.0, _TIMES)
    if longer is None or not _better(longer, own):
        return tuple(findings)
    cause = Cause.TOO_FEW_STEPS
    text = (
        f"{rivals.planned} steps fit held-back samples by {own:.2f}, {_TIMES} times as many by {longer:.2f}."
    )
    known = next((f for f in findings if f.cause is cause), None)
    found = known or Finding(cause, Severity.ERROR, cause.sentence, own, longer, "fit")
    worse = replace(found, severity=Severity.ERROR, evidence=(*found.evidence, text))
    return first({cause: worse}, findings)


# ---- what may bring it further ----------------------------------------------------------------------------


def _usual(profile: Profile) -> Attempt:
    """All that is usual at once."""
    places = _curved(profile.anatomy) or _straight(profile)

    def feed(batches: Sequence[Batch]) -> Sequence[Batch]:
        scaled = standardized(batches, member=0)
        return standardized(scaled, member=-1) if regresses(profile) else scaled

    def make(setup: Setup) -> Setup:
        return with_adam(_drawn(_bent(places, undropped(setup))))

    return Attempt((), "", (1.0, 10.0), make, feed)


def _attempts(profile: Profile) -> Iterator[Attempt]:
    if profile.inputs is not None and odd(profile.inputs.rms):
        yield Attempt(
            (Cause.UNSCALED_INPUT,), "the input standardized", (1.0,), feed=partial(standardized, member=0)
        )
    if amounts(profile):
        feed = partial(standardized, member=-1)
        yield Attempt((Cause.UNSCALED_TARGETS,), "the targets standardized", (1.0,), feed=feed)
    if drops(profile):
        yield Attempt((Cause.TOO_MUCH_DROPOUT,), "no dropout", (1.0,), undropped)
    if any(group.decay for group in (profile.regime.optimizer.groups if profile.regime else ())):
        yield Attempt((Cause.TOO_MUCH_WEIGHT_DECAY,), "no weight decay", (1.0,), _undecayed)
    if any(p.frozen for p in profile.parameters):
        yield Attempt((Cause.FROZEN_PARAMETERS,), "nothing frozen", (1.0,), _thawed)
    yield Attempt((Cause.LEARNING_RATE_TOO_HIGH,), "shorter steps", (0.1, 0.01))
    slow = (Cause.LEARNING_RATE_TOO_LOW, *([Cause.TOO_FEW_STEPS] if profile.planned else []))
    yield Attempt(slow, "longer steps", _LONGER)
    if not adapts(profile):
        yield Attempt((Cause.UNFIT_OPTIMIZER,), "Adam", (1.0, 10.0), with_adam)
    yield Attempt((_of_weights(profile),), "weights drawn afresh", (1.0,), _drawn)
    if places := _curved(profile.anatomy):
        words, make = "leaky ReLU in place of the hidden activations", partial(_bent, places)
        yield Attempt((Cause.CONTRACTING_ACTIVATION,), words, (1.0,), make)
    elif places := _straight(profile):
        words, make = "leaky ReLU between the layers", partial(_bent, places)
        yield Attempt((Cause.TOO_LITTLE_CAPACITY,), words, (1.0,), make)


def _of_weights(profile: Profile) -> Cause:
    """What fresh weights cure, as far as sizes tell."""
    if any(parameter.symmetric for parameter in profile.parameters):
        return Cause.SYMMETRIC_WEIGHTS
    return Cause.WEIGHTS_TOO_LARGE if too_large(profile) else Cause.WEIGHTS_TOO_SMALL


def _curved(anatomy: Anatomy) -> tuple[str, ...]:
    """The modules that are hidden activations, if none of them is one of the usual."""
    hidden = [site for site in hidden_activations(anatomy) if site.module]
    usual = any(site.function in _USUAL for site in hidden)
    return () if usual else tuple(dict.fromkeys(site.module for site in hidden))


def _straight(profile: Profile) -> tuple[str, ...]:
    """The layers of an affine network but the last."""
    affine = profile.regime is not None and profile.regime.affine
    return tuple(site.module for site in profile.anatomy.weighted()[:-1]) if affine else ()


def _bent(places: Sequence[str], setup: Setup) -> Setup:
    """With the leaky ReLU of what activations get, or behind layers."""

    def hook(module: nn.Module, given: tuple[Any, ...], output: Tensor) -> Tensor:
        layered = any(p.dim() > 1 for p in module.parameters(recurse=False))
        return nn.functional.leaky_relu(output if layered else given[0], 0.1)

    for place in places:
        setup.model.get_submodule(place).register_forward_hook(hook)
    return setup


def _undecayed(setup: Setup) -> Setup:
    optimizer = setup.build_optimizer()
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    return replace(setup, optimizer=optimizer)


def _thawed(setup: Setup) -> Setup:
    setup.model.requires_grad_(True)
    return setup


@torch.no_grad()
def _drawn(setup: Setup) -> Setup:
    """Weights of variance 2 / fan-in (He et al. 2015), biases of zero; everything learns."""
    draw = torch.Generator().manual_seed(0)
    for module in setup.model.modules():
        if isinstance(module, (nn.Linear, _ConvNd)):
            weight, bias = module.weight.requires_grad_(True), module.bias
            fresh = torch.randn(weight.shape, generator=draw) * math.sqrt(2 * len(weight) / weight.numel())
            weight.copy_(fresh.to(weight))
            if bias is not None:
                bias.requires_grad_(True).zero_()
    return setup
