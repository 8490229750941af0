"""Engine: runs what is left of a study, and keeps each trial in a journal as soon as it is finished."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from rich.progress import BarColumn, Progress, TimeRemainingColumn

from gradmend.journal import JournalError
from gradmend.study.analysis import Results
from gradmend.study.chunks import Chunk, plan, without, work_of
from gradmend.study.outcome import Outcome
from gradmend.study.store import Store, read_study, trials_of
from gradmend.study.workers import open_workers
from gradmend.terminal import Terminal

if TYPE_CHECKING:
    from gradmend.study.design import Study

_OFTEN, _PERIOD = 0.2, 600.0
"""Seconds between two looks of the progress bar, and from which it tells the speed: chunks may take long."""


def run(study: Study, path: str | Path, workers: str = "local", *, progress: bool = True) -> Results:
    """Run the trials of a study that its journal does not hold yet, and analyse all of them.

    Every finished chunk of trials is in the journal at once. A study that was killed goes on where it was,
    and one that was changed runs what is new. Only trials that failed are done again. Each computes with one
    thread, so that results do not depend on who runs it.

    Args:
        study: to run.
        path: of its journal, by custom `*.gradmend`; it is made where there is none.
        workers: `local`, or `ray`: the cluster of RAY_ADDRESS, or one of this machine's cores.
        progress: show a bar on standard error.

    Raises:
        JournalError: if the journal holds another study or trials that contradict this one, if a process is
            running a study with it, or if it cannot be written.
        MissingExtraError: for Ray, if it is not installed.
        GradmendError: if the workers cannot be reached or cannot run trials.
        KeyboardInterrupt: after Ctrl-C; what was finished is in the journal.
    """
    trials = trials_of(study)
    if not {trial.key for trial in trials} <= _held(path).keys():
        study.check()  # before a journal is made for what cannot be run
    with Store(path) as store:
        number = store.begin(study, trials)
        done = store.done(number)
        if any(trial.key not in done for trial in trials):
            with open_workers(workers) as crew:
                chunks = without(plan(study, trials, crew.room), done)
                with _bar(chunks, len(trials), progress) as bar:
                    for chunk, outcomes in crew.run(study, chunks, bar.step):
                        store.add(number, outcomes)
                        bar.finish(chunk)
    return finished(study, path)


def finished(study: Study, path: str | Path) -> Results:
    """What the journal holds of the trials that the study plans, analysed.

    Raises:
        JournalError: if there is no such journal, or no study in it.
    """
    held = read_study(path).outcomes
    planned = [trial for trial in trials_of(study) if trial.key in held]
    return Results(
        study.name,
        study.question,
        [replace(held[trial.key], arm=dict(trial.arm.levels)) for trial in planned],
        measure=study.measure,
        target=study.target,
        levels=study.levels,
        predicted=study.predicted,
    )


def _held(path: str | Path) -> Mapping[str, Outcome]:
    with suppress(JournalError):
        return read_study(path).outcomes
    return {}


class _Bar:
    """How much of the work is done, and how long the rest takes if it goes on like this.

    Args:
        progress: shows it; None shows nothing.
        chunks: all that is to do.
        count: trials of the study, of which those of no chunk are done.
    """

    def __init__(self, progress: Progress | None, chunks: Sequence[Chunk], count: int) -> None:
        self._progress = progress
        self._count = count
        self._done = count - sum(len(chunk.jobs) for chunk in chunks)
        self._finished, self._due = 0.0, 0.0
        self._begun: dict[str, float] = {}
        if progress is not None:
            total = sum(map(work_of, chunks))
            self._task = progress.add_task("", total=total, count=count, done=self._done)

    def step(self, chunk: Chunk, steps: int) -> None:
        """So many optimizer steps more were taken of a chunk."""
        key = chunk.jobs[0].trial.key
        self._begun[key] = min(work_of(chunk), self._begun.get(key, 0.0) + steps * chunk.work)
        if perf_counter() >= self._due:
            self._show()

    def finish(self, chunk: Chunk) -> None:
        """A chunk is in the journal."""
        self._begun.pop(chunk.jobs[0].trial.key, None)
        self._finished += work_of(chunk)
        self._done += len(chunk.jobs)
        self._show()

    def _show(self) -> None:
        self._due = perf_counter() + _OFTEN
        if self._progress is not None:
            completed = self._finished + sum(self._begun.values())
            self._progress.update(self._task, completed=completed, done=self._done, refresh=True)


@contextmanager
def _bar(chunks: Sequence[Chunk], count: int, shown: bool) -> Iterator[_Bar]:
    if not shown:
        yield _Bar(None, chunks, count)
        return
    trials = "{task.fields[done]} of {task.fields[count]} trials"
    terminal = Terminal(stderr=True)
    columns = (BarColumn(), trials, TimeRemainingColumn(), "left")
    with Progress(*columns, console=terminal, auto_refresh=False, speed_estimate_period=_PERIOD) as progress:
        yield _Bar(progress, chunks, count)
