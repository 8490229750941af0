"""Processes: a copy of this process for each chunk of trials, several at a time."""

from __future__ import annotations

import multiprocessing
import signal
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

import torch

from gradmend.study.chunks import Chunk, Show, halves, room, work_of
from gradmend.study.outcome import Outcome
from gradmend.study.trials import lost, run_chunk

if TYPE_CHECKING:
    from gradmend.study.design import Study


def can_fork() -> bool:
    """Whether a copy of this process can train: not where autograd keeps threads for other devices."""
    return "fork" in multiprocessing.get_all_start_methods() and not torch.accelerator.is_available()


class Processes:
    """Runs each chunk in a process of its own, so many at a time, those with the most work first.

    They are made by fork and share what this process has in memory: nothing is imported or loaded again. One
    that dies, as for want of memory, does not touch this process; when this one dies, they end too.

    Args:
        count: how many at a time.
    """

    def __init__(self, count: int) -> None:
        self._count = count

    @property
    def room(self) -> float:
        """Bytes that one chunk may take."""
        return room(self._count)

    def run(
        self, study: Study, chunks: Sequence[Chunk], show: Show
    ) -> Iterator[tuple[Chunk, dict[str, Outcome]]]:
        """The chunks, or parts of them, with their outcomes by the keys of the trials, as they end."""
        waiting = sorted(chunks, key=work_of, reverse=True)[::-1]
        busy: dict[Any, _Copy] = {}
        try:
            while waiting or busy:
                while waiting and len(busy) < self._count:
                    copy = _Copy(study, waiting.pop())
                    busy[copy.told] = copy
                for told in wait(list(busy)):
                    news = busy[told].news()
                    if isinstance(news, int):
                        show(busy[told].chunk, news)
                        continue
                    copy = busy.pop(told)
                    if news is not None:
                        yield copy.chunk, news
                    elif len(copy.chunk.jobs) > 1:
                        waiting.extend(halves(copy.chunk))
                    else:
                        yield copy.chunk, {job.trial.key: lost(job) for job in copy.chunk.jobs}
        finally:
            for copy in busy.values():
                copy.end()


class _Copy:
    """A process that runs one chunk."""

    def __init__(self, study: Study, chunk: Chunk) -> None:
        self.chunk = chunk
        context = multiprocessing.get_context("fork")
        self.told, tell = context.Pipe(duplex=False)
        self._process = context.Process(target=_run, args=(tell, study, chunk), daemon=True)
        with warnings.catch_warnings():
            # threads of others, such as a notebook's, hold no lock that a training takes
            warnings.simplefilter("ignore", DeprecationWarning)
            self._process.start()
        tell.close()

    def news(self) -> int | dict[str, Outcome] | None:
        """Steps that were taken, or in the end the outcomes; None if the process died."""
        try:
            news: int | dict[str, Outcome] = self.told.recv()
        except EOFError:
            news = {}
        if isinstance(news, int):
            return news
        self.end()
        return news or None

    def end(self) -> None:
        """Kill the process, if it still runs."""
        self._process.kill()
        self._process.join()
        self.told.close()


def _run(tell: Connection, study: Study, chunk: Chunk) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits for this one
    tell.send(run_chunk(study, chunk, tell.send))
