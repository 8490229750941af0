"""Whether `mend` repairs the programs of the corpora: each trained as it is, well set, fixed, and mended."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import process_time
from typing import Any, ClassVar

import torch

from benchmarks.corpora.answers import to_truth
from benchmarks.corpora.cases import Json, Truth, builder, draw
from benchmarks.corpora.references import affordable, own_steps, train_copy, well_set
from benchmarks.corpora.runner import Job, isolated, step_seconds
from benchmarks.corpora.tasks import Task, constant, read_task, score
from benchmarks.corpora.tools.gradmend import setup as as_setup
from benchmarks.timing import first_line
from gradmend import Budget, Setup, mend

BATCHES, ROWS = (8, 128), 4_000
"""So many batches `mend` is given at least and at most, and about so many rows."""

TRIAL_STEPS, TRIAL_SECONDS = 200, 30.0
"""The budget of `mend`: steps of one trial (never more than the program takes), seconds of all."""

POINTS, SHARE = 0.05, 0.9
"""A program trains if it comes so close to its fix, or reaches such a share of a well-set network."""

LEARNT = 0.1
"""A reference that is better than a constant guess by less has learnt nothing, so it tells nothing."""


@dataclass(frozen=True)
class Outcome:
    """What became of a program.

    Args:
        status: "ran", "not built", "too slow" or "failed".
        problem: why it did not run.
        kind: "class", "flags" or "amounts".
        own: how many steps the program takes by itself.
        steps: how many each training took here.
        guess: the score of a constant; scores are accuracy, or R² of amounts, on the test rows.
        untreated: the score of the program as it is.
        fixed: of its published fix, where it has one.
        well: of a network of its size that is set well.
        mended: after `mend`; None where the program trains as it is.
        changes: what `mend` changed.
        seconds: CPU time of the training of the program as it is.
        mend_seconds: CPU time of `mend`.
    """

    tool: ClassVar[str] = "gradmend"
    truth: Truth
    status: str
    problem: str = ""
    kind: str = ""
    own: int = 0
    steps: int = 0
    guess: float = math.nan
    untreated: float = math.nan
    fixed: float | None = None
    well: float | None = None
    mended: float | None = None
    changes: tuple[str, ...] = ()
    seconds: float = 0.0
    mend_seconds: float = 0.0
    stand_in: bool = False

    @property
    def bar(self) -> float | None:
        """The score from which on it trains; None where no reference learns."""
        near = self.fixed - POINTS if self._learns(self.fixed) and self.fixed is not None else math.inf
        part = SHARE * self.well if self._learns(self.well) and self.well is not None else math.inf
        return min(near, part) if math.isfinite(min(near, part)) else None

    def _learns(self, reference: float | None) -> bool:
        return reference is not None and reference >= self.guess + LEARNT

    @property
    def judged(self) -> bool:
        """Whether there is something that it can be measured against."""
        return self.status == "ran" and self.bar is not None

    @property
    def trains(self) -> bool:
        """Whether it trains as it is."""
        return self.bar is not None and self.untreated >= self.bar

    @property
    def repaired(self) -> bool:
        """Whether it trains after `mend`."""
        return self.bar is not None and self.mended is not None and self.mended >= self.bar


def read(paths: Iterable[Path]) -> list[Outcome]:
    """The outcomes in these files."""
    rows = (json.loads(line) for path in paths for line in path.read_text().splitlines())
    return [_outcome(row) for row in rows]


def _outcome(row: Json) -> Outcome:
    return Outcome(truth=to_truth(row.pop("truth")), changes=tuple(row.pop("changes")), **row)


def concerns(row: Json) -> bool:
    """Whether there is something to repair."""
    return bool(row["labels"]["verdict"] == "buggy")


def run_one(job: Job, limit: float) -> Outcome:
    """Train and mend one program in a process of its own."""
    found = isolated(partial(outcome, job), limit)
    return found if isinstance(found, Outcome) else Outcome(job.truth, "failed", found)


def outcome(job: Job) -> Outcome:
    """Train one program as it is and its references; mend it if it does not train."""
    module, blank = builder(job.cases), Outcome(job.truth, "not built")
    try:
        case = module.build(job.row, seed=job.seed, data_root=job.data)
    except module.CannotBuild as error:
        return replace(blank, problem=str(error))
    steps = affordable(case, step_seconds(case, job.seed))
    known = replace(blank, own=own_steps(case), steps=steps, stand_in=bool(case.data_is_standin))
    if not steps:
        return replace(known, status="too slow", problem=f"of {known.own} steps too few fit")
    try:
        return _compared(known, case, job)
    except Exception as error:  # whatever a program may raise
        return replace(known, status="failed", problem=first_line(error))


def _compared(known: Outcome, case: Any, job: Job) -> Outcome:
    task, broken = read_task(case), as_setup(case)
    untreated, seconds = trained(broken, case, task, known.steps, job.seed)
    found = replace(
        known, status="ran", kind=task.kind, guess=constant(case, task), untreated=untreated, seconds=seconds
    )
    found = replace(found, well=well_score(case, task, known.steps, job.seed), fixed=_fixed(job))
    if not found.judged or found.trains:
        return found
    start = process_time()
    treatment = mend(broken, given(case, job.seed), budget(known.steps), steps=known.steps)
    spent = process_time() - start
    mended, _ = trained(treatment.setup, case, task, known.steps, job.seed)
    texts = tuple(change.text for change in treatment.changes)
    return replace(found, mended=mended, changes=texts, mend_seconds=spent)


def budget(steps: int) -> Budget:
    """What `mend` may spend on a program of so many steps."""
    return Budget(steps=min(TRIAL_STEPS, steps), seconds=TRIAL_SECONDS)


def given(case: Any, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The batches that `mend` is given: the first ones of the first epoch."""
    epoch = math.ceil(len(case.x_train) / case.batch_size)
    least, most = BATCHES
    return draw(case, min(epoch, most, max(least, ROWS // case.batch_size)), seed)


def trained(setup: Setup, case: Any, task: Task, steps: int, seed: int) -> tuple[float, float]:
    """The score after training, and the CPU seconds of it."""
    model, seconds = train_copy(setup, case, steps, seed)
    return score(model, setup.loss_fn or case.loss_fn, case, task), seconds


def well_score(case: Any, task: Task, steps: int, seed: int) -> float | None:
    """The score of a well-set network of the same size; None where there is none that fits the targets."""
    try:
        return trained(well_set(case, task, seed), case, task, steps, seed)[0]
    except ValueError:
        return None


def _fixed(job: Job) -> float | None:
    """The published fix, trained for its own steps as far as they can be afforded."""
    module = builder(job.cases)
    partner = next((r for r in module.load(job.cases) if r["id"] == job.row.get("pair_id")), None)
    if partner is None:
        return None
    try:
        case = module.build(partner, seed=job.seed, data_root=job.data)
    except module.CannotBuild:
        return None
    steps = affordable(case, step_seconds(case, job.seed))
    return trained(as_setup(case), case, read_task(case), steps, job.seed)[0] if steps else None
