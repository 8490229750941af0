"""Trials: the jobs of a chunk are built, trained together and judged."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import torch

from gradmend.data import Data
from gradmend.errors import GradmendError, NotApplicableError
from gradmend.setup import trainable
from gradmend.stack import lacks_memory, train_many
from gradmend.study.chunks import Chunk, Job, free_memory, halves, steps_per_epoch
from gradmend.study.outcome import DIVERGED, DONE, FAILED, NOT_APPLICABLE, Outcome
from gradmend.study.start import findings, first_batch, first_over_last, step_seconds
from gradmend.training import History
from gradmend.training.evaluation import evaluate
from gradmend.training.feed import feed
from gradmend.training.loop import one_thread

if TYPE_CHECKING:
    from gradmend.study.design import Study
    from gradmend.zoo import Recipe

_JUDGED, _AT_ONCE = 2000, 1000
"""Training rows whose accuracy is taken after training, as more would tell little more; and those at once."""

_TIMED = 3
"""Trials of an arm whose steps are timed: as many as an interval takes."""

_LONGEST = 300
"""Letters of a reason."""


def run_chunk(study: Study, chunk: Chunk, show: Callable[[int], None] | None = None) -> dict[str, Outcome]:
    """Train all trials of a chunk. What one raises becomes its outcome, and does not touch the others.

    If the memory does not suffice, or anything else fails, each half is tried by itself.

    Args:
        show: is told how many optimizer steps were taken.
    """
    try:
        return _run(study, chunk, show)
    except Exception as error:
        gc.collect()
        if len(chunk.jobs) > 1:
            return {key: o for half in halves(chunk) for key, o in run_chunk(study, half, show).items()}
        (job,) = chunk.jobs
        return {job.trial.key: failed(job, error)}


@dataclass(eq=False)
class _Built:
    job: Job
    recipe: Recipe
    ratio: float | None = None
    step_seconds: float | None = None
    findings: tuple[str, ...] = ()


def _run(study: Study, chunk: Chunk, show: Callable[[int], None] | None) -> dict[str, Outcome]:
    with one_thread():
        outcomes: dict[str, Outcome] = {}
        alike: dict[tuple[Data, int, int], list[_Built]] = {}
        for job in chunk.jobs:
            try:
                built = _built(study, job)
            except Exception as error:
                outcomes[job.trial.key] = failed(job, error)
                continue
            recipe = built.recipe
            alike.setdefault((recipe.data, recipe.batch_size, recipe.epochs), []).append(built)
        for trials in alike.values():
            for trial, history in zip(trials, _train(study, trials, show), strict=True):
                outcomes[trial.job.trial.key] = _outcome(study, trial, history)
        return outcomes


def _built(study: Study, job: Job) -> _Built:
    recipe = study.build(job.trial.arm, job.trial.seed)
    built = _Built(job, recipe)
    with suppress(Exception):  # what cannot be measured may train
        batch = first_batch(recipe, job.trial.seed)
        built.ratio = first_over_last(recipe.setup, batch)
        built.step_seconds = step_seconds(recipe.setup, batch) if job.turn < _TIMED else None
        built.findings = findings(recipe.setup, batch) if job.turn == 0 else ()
    return built


def _train(study: Study, trials: Sequence[_Built], show: Callable[[int], None] | None) -> list[History]:
    recipe = trials[0].recipe
    return train_many(
        [trial.recipe.setup for trial in trials],
        recipe.data,
        seeds=[trial.job.trial.seed for trial in trials],
        epochs=None if study.steps else recipe.epochs,
        steps=study.steps,
        batch_size=recipe.batch_size,
        show=show,
    )


def _outcome(study: Study, trial: _Built, history: History) -> Outcome:
    measures = {
        **_learnt(trial.recipe, history),
        "steps_to_target": _steps_to_target(history, study.target, steps_per_epoch(trial.recipe)),
        "step_seconds": trial.step_seconds,
        "seconds": trial.step_seconds and trial.step_seconds * history.steps,
        "parameters": sum(p.numel() for p in trainable(trial.recipe.setup.model)),
        "memory": trial.job.memory or None,
        "gradient_ratio": trial.ratio,
    }
    return Outcome(
        arm=dict(trial.job.trial.arm.levels),
        seed=trial.job.trial.seed,
        status=DIVERGED if history.diverged else DONE,
        reason="",
        measures={name: float(v) for name, v in measures.items() if v is not None and math.isfinite(v)},
        losses=history.loss,
        accuracies=history.accuracy or (),
        findings=trial.findings,
    )


def _learnt(recipe: Recipe, history: History) -> dict[str, float | None]:
    """What the trained network can do; of one that diverged nothing is known."""
    if history.diverged:
        return {}
    data = recipe.data
    spread = torch.linspace(0, len(data.x) - 1, min(len(data.x), _JUDGED)).long()
    some = feed((data.x[spread], data.y[spread]), _AT_ONCE, 0, torch.device("cpu"))
    _, right = evaluate(recipe.setup, some.epoch())
    held_back = history.test_accuracy
    return {
        "test_accuracy": held_back,
        "train_accuracy": right,
        "gap": None if right is None or held_back is None else right - held_back,
        "test_loss": history.test_loss,
        "train_loss": median(history.loss[-max(1, len(history.loss) // 4) :]),
    }


def _steps_to_target(history: History, target: float, per_epoch: int) -> int | None:
    """The optimizer steps to the end of the first epoch with this accuracy, if one had it."""
    reached = (epoch for epoch, right in enumerate(history.accuracy or (), start=1) if right >= target)
    return next((min(history.steps, epoch * per_epoch) for epoch in reached), None)


def failed(job: Job, error: Exception) -> Outcome:
    """The outcome of a trial that raised an error."""
    status = NOT_APPLICABLE if isinstance(error, NotApplicableError) else FAILED
    return Outcome(dict(job.trial.arm.levels), job.trial.seed, status, _reason(job, error), {}, (), ())


def lost(job: Job) -> Outcome:
    """The outcome of a trial whose process died, even alone."""
    reason = f"Its process died, perhaps for want of memory: {_memory(job)}."
    return Outcome(dict(job.trial.arm.levels), job.trial.seed, FAILED, reason, {}, (), ())


def _reason(job: Job, error: Exception) -> str:
    text = next(iter(str(error).splitlines()), "")
    if lacks_memory(error):
        return f"Out of memory, even alone: {_memory(job)}."
    named = text if isinstance(error, GradmendError) else f"{type(error).__name__}: {text}"
    return named if len(named) <= _LONGEST else f"{named[: _LONGEST - 3]}..."


def _memory(job: Job) -> str:
    need, free = (f"{size / 2**30:.1f} GiB" for size in (job.memory, free_memory()))
    return f"it takes about {need}, of {free} that are free"
