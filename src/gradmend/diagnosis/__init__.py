"""Diagnosis: what is wrong with a setup, where, and why."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from time import process_time

from gradmend.contract import read_contract
from gradmend.data import as_batches
from gradmend.diagnosis import (
    batch,
    capacity,
    inputs,
    labels,
    loss,
    output,
    regularization,
    signal,
    speed,
    stepping,
    weights,
    wiring,
    within,
)
from gradmend.diagnosis.disturb import disturb
from gradmend.diagnosis.finding import Diagnosis, Finding, Severity
from gradmend.diagnosis.intervention import decide
from gradmend.diagnosis.prognosis import Prognosis, prognose
from gradmend.diagnosis.reach import MOST_SECONDS, reach
from gradmend.diagnosis.rerun import drawn
from gradmend.diagnosis.trial import settle
from gradmend.errors import BatchError
from gradmend.inquiry import inquire
from gradmend.kinds import rows_in
from gradmend.probe import measure
from gradmend.profile import Profile
from gradmend.readings import Response
from gradmend.response import look_ahead, respond
from gradmend.room import Room, out_of_memory
from gradmend.setup import Batch, Setup

__all__ = ["RULES", "Diagnosis", "Finding", "Severity", "diagnose", "look"]

RULES: tuple[Callable[[Profile], Finding | None], ...] = (
    *output.RULES,
    *loss.RULES,
    *labels.RULES,
    *inputs.RULES,
    *wiring.RULES,
    *weights.RULES,
    *within.RULES,
    *signal.RULES,
    *batch.RULES,
    *regularization.RULES,
    *capacity.RULES,
    *stepping.RULES,
    *speed.RULES,
)
"""Each looks at a profile and says what it finds: exact contradictions first, then roots, then symptoms."""

_BATCHES, _SAMPLES = 4, 128
"""So many batches are looked at, of which the first so many samples are measured."""

_TRAINED, _FEW = 16, 8
"""On so many copies are trained; and with fewer rows in a batch, what fits what is read from all of these."""

_TRIED, _PACED = 6, 10
"""Steps that are tried on one batch; and where it counts how their pace changes, for more are planned."""

_SLOW, _FEWEST = 0.5, 4
"""Seconds of a step: of slower ones some dozen are too many. They are tried on fewer samples, but so many."""


def diagnose(
    setup: Setup,
    batches: Batch | Iterable[Batch],
    *,
    steps: int | None = None,
    seconds: float = MOST_SECONDS,
) -> Diagnosis:
    """Find out why a setup does not train, from one measured step and a few tried on a copy.

    Args:
        setup: what trains. It is left exactly as it was.
        batches: one batch `(x, y)` or several (a list, a `DataLoader`); at most four are looked at, and
            copies train on sixteen. Of batches given by name the target is known by `labels`, `label`,
            `targets`, `target` or `y`; without one, whether copies learn is not tried.
        steps: how many optimizer steps are planned; whether they suffice is judged only if they are told.
        seconds: of computing, for trainings of copies that tell how far the planned steps could get; if none
            are told, how far a thousand could, where nothing else is found and the prognosis leaves doubts.

    Returns:
        A diagnosis: `.healthy`, `.findings`, `.prognosis`, `.profile`; printing it shows a table. What there
        was not enough memory for is left out, and named in `.lacked`.

    Raises:
        BatchError: if model, batch and loss do not fit each other.
        DataError: if a batch is empty or holds NaN.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(8, 3), nn.Softmax(dim=1))
        >>> batch = (torch.randn(64, 8), torch.randint(3, (64,)))
        >>> [f.cause.title for f in diagnose(Setup(model, nn.CrossEntropyLoss()), batch).findings]
        ['softmax before logits loss']
    """
    every = as_batches(batches, limit=_TRAINED)
    given = every[:_BATCHES]
    room = Room()
    profile, step = _measured(setup, _enough(given), room)
    known = _known(every, _BATCHES)
    contract = read_contract(replace(setup, optimizer=None), known)  # which way it steps comes with the steps
    profile = replace(profile, contract=contract)
    fewer = [drawn(batch, _affordable(batch, step)) for batch in given]
    if fewer[0] is not given[0]:
        given, profile = fewer, replace(profile, tried=rows_in(fewer[0]))
    diagnosis = _judge(_tried(setup, given[0], profile, steps, room))
    stages: dict[str, Callable[[Diagnosis], Diagnosis]] = {
        "experiments on copies": lambda d: replace(
            d, findings=decide(setup, given[0], d.profile, d.findings)
        ),
        "a prognosis": lambda d: replace(d, prognosis=_prognosis(setup, given, d.profile)),
        "trials of what is suspected": lambda d: replace(d, findings=settle(setup, given, d.profile, d)),
    }
    for what, stage in stages.items():
        diagnosis = room.attempt(what, partial(stage, diagnosis)) or diagnosis
    return with_reach(setup, every, replace(diagnosis, lacked=tuple(room.lacked)), seconds)


def with_reach(setup: Setup, batches: Sequence[Batch], diagnosis: Diagnosis, seconds: float) -> Diagnosis:
    """With how far copies get in the planned steps: the last and dearest part of a diagnosis."""
    room = Room()
    found = room.attempt("trainings of copies", lambda: reach(setup, batches[:_TRAINED], diagnosis, seconds))
    findings = diagnosis.findings if found is None else found
    return replace(diagnosis, findings=findings, lacked=(*diagnosis.lacked, *room.lacked))


def _tried(setup: Setup, batch: Batch, profile: Profile, planned: int | None, room: Room) -> Profile:
    """With what the optimizer's steps do, and what becomes of the signal when the batch is disturbed."""
    if wiring.non_finite(profile) is not None:
        return profile
    if setup.optimizer is not None:
        stepped = partial(_stepped, setup, batch, profile, planned)
        profile = room.attempt("steps of the optimizer", stepped) or profile
    disturbance = room.attempt("disturbed batches", lambda: disturb(setup, batch, profile.anatomy))
    return replace(profile, disturbance=disturbance)


def _stepped(setup: Setup, batch: Batch, profile: Profile, planned: int | None) -> Profile:
    response = respond(setup, batch, _TRIED if planned is None else _PACED)
    profile = _with_response(profile, response, planned)
    return replace(profile, regime=inquire(setup, batch, profile))


def _measured(setup: Setup, batches: Sequence[Batch], room: Room) -> tuple[Profile, float]:
    """The profile, and how long one step of it took the processor.

    The first step of a process loads much of torch, so one that took long is measured once more.
    """
    found = room.attempt("the size of a step", lambda: _timed(setup, batches))
    if found is None:
        return _without_step(setup, batches)
    return _timed(setup, batches) if found[1] > _SLOW else found


def _without_step(setup: Setup, batches: Sequence[Batch]) -> tuple[Profile, float]:
    try:
        return _timed(replace(setup, optimizer=None), batches)
    except BatchError as error:
        if not out_of_memory(error):
            raise
        samples = max(map(rows_in, batches))
        raise BatchError(
            f"There is not enough memory for a forward and a backward pass of {samples} samples: give "
            "smaller batches, or a smaller model."
        ) from error


def _timed(setup: Setup, batches: Sequence[Batch]) -> tuple[Profile, float]:
    start = process_time()
    profile = measure(setup, iter(batches))  # a list of tensors would pass for one batch
    return profile, (process_time() - start) / len(batches)


def _affordable(batch: Batch, seconds: float) -> int:
    """How many samples to try steps on, so that each takes no longer than one that is called slow."""
    if seconds <= _SLOW:
        return rows_in(batch)
    return max(_FEWEST, 1 << int(math.log2(max(1.0, rows_in(batch) * _SLOW / seconds))))


def _with_response(profile: Profile, response: Response | None, planned: int | None) -> Profile:
    contract = profile.contract
    if contract is not None and response is not None:
        contract = replace(contract, descent=response.descent)
    return replace(profile, response=response, planned=planned, contract=contract)


def _prognosis(setup: Setup, batches: Sequence[Batch], profile: Profile) -> Prognosis | None:
    outlook = look_ahead(setup, batches)
    return None if isinstance(outlook, str) else prognose(profile, outlook)


def _enough(batches: Sequence[Batch]) -> list[Batch]:
    """The first batches, of so many samples together as say enough."""
    sizes = [rows_in(batch) for batch in batches]
    before = [sum(sizes[:i]) for i in range(len(sizes))]
    return [batch for batch, rows in zip(batches, before, strict=True) if rows < _SAMPLES]


def look(setup: Setup, batches: Batch | Iterable[Batch]) -> Diagnosis:
    """A quicker diagnosis, without steps on a copy: it says nothing of the learning rate."""
    given = _known(as_batches(batches, limit=_TRAINED), 1)
    profile = measure(setup, iter(given[:_BATCHES]))
    return _judge(replace(profile, contract=read_contract(setup, given)))


def _known(batches: list[Batch], enough: int) -> list[Batch]:
    """The batches that tell what fits what: of those with few rows all."""
    return batches if rows_in(batches[0]) < _FEW else batches[:enough]


def _judge(profile: Profile) -> Diagnosis:
    found = [finding for rule in RULES if (finding := rule(profile))]
    return Diagnosis(profile, tuple(sorted(found, key=lambda finding: -finding.severity)))
