"""Running tools on cases, each in a process of its own that may not take too long."""

from __future__ import annotations

import copy
import io
import resource
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.corpora.answers import Answer, Claim
from benchmarks.corpora.cases import Json, Truth, builder, draw, penalized
from benchmarks.timing import first_line, host_seconds

Result = TypeVar("Result")

MEMORY = 4 * 2**30
"""Bytes that a case and a tool may take."""

_BLOCK = 0.05
"""Plain steps are timed for so many seconds at least."""


@dataclass(frozen=True)
class Job:
    """One tool on one case.

    Args:
        row: the line of the cases.
        cases: the file that it comes from.
        tool: the name of a module in `benchmarks.corpora.tools`.
        data: the folder of image sets that cases may need.
    """

    row: Json
    truth: Truth
    cases: Path
    tool: str
    seed: int = 0
    data: Path | None = None


def prepare(tools: Iterable[str], *modules: str) -> None:
    """Have these tools loaded and warm in the process that jobs are forked from, and modules loaded."""
    loaded = [f"benchmarks.corpora.tools.{tool}" for tool in tools]
    get_context("forkserver").set_forkserver_preload([*modules, *loaded, "benchmarks.corpora.warm"])


def run_all(
    run: Callable[[Job, float], Result], jobs: Iterable[Job], limit: float, processes: int = 1
) -> Iterator[Result]:
    """Run all jobs, in order; what takes more than `limit` seconds of wall time is ended."""
    pool = ThreadPoolExecutor(processes)
    try:
        yield from pool.map(lambda job: run(job, limit), jobs)
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupted run starts no further job


def run_one(job: Job, limit: float) -> Answer:
    """Let one tool look at one case."""
    found = isolated(partial(answer, job), limit)
    return found if isinstance(found, Answer) else Answer(job.truth, job.tool, "failed", found)


def isolated(work: Callable[[], Result], limit: float) -> Result | str:
    """What some work gives in a new process, forked from one that is prepared; or why it gives nothing."""
    context = get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(work, sender), daemon=True)
    process.start()
    sender.close()
    try:
        if receiver.poll(limit):
            found: Result = receiver.recv()
            return found
        return f"too slow: more than {limit:g} s"
    except EOFError:
        process.join()
        return f"its process died (exit code {process.exitcode})"
    finally:
        receiver.close()
        process.kill()
        process.join()
        process.close()


def _send(work: Callable[[], object], sender: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        sender.send(work())


def answer(job: Job) -> Answer:
    """Make the case and let the tool look at it, in this process."""
    module = builder(job.cases)
    blank = Answer(job.truth, job.tool, "failed")
    try:
        case = module.build(job.row, seed=job.seed, data_root=job.data)
    except module.CannotBuild as error:
        return replace(blank, status="not built", problem=str(error))
    known = replace(blank, own_step=penalized(case), stand_in=bool(case.data_is_standin))
    torch.manual_seed(job.seed)
    found: list[Claim] = []
    try:
        tool = import_module(f"benchmarks.corpora.tools.{job.tool}")
        step = step_seconds(case, job.seed)
        seconds = host_seconds(lambda: found.extend(tool.check(case, job.seed)))
    except Exception as error:  # each tool's errors are its own to choose
        return replace(known, problem=first_line(error))
    return replace(known, status="ran", claims=tuple(found), seconds=seconds, step_seconds=step)


def step_seconds(case: Any, seed: int) -> float:
    """CPU seconds of one plain forward and backward step of a copy, after a first one: the median."""
    twin = replace(case, model=copy.deepcopy(case.model))
    ((x, y),) = draw(case, 1, seed)

    def step() -> None:
        twin.model.zero_grad()
        twin.objective(x, y).backward()

    step()
    taken: list[float] = []
    while sum(taken) < _BLOCK:
        taken.append(host_seconds(step))
    return statistics.median(taken)
