"""Workers: who runs the chunks of a study."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

import torch

from gradmend.errors import SetupError, suggest
from gradmend.study.chunks import Chunk, Show, room
from gradmend.study.cluster import open_cluster
from gradmend.study.outcome import Outcome
from gradmend.study.processes import Processes, can_fork
from gradmend.study.trials import run_chunk

if TYPE_CHECKING:
    from gradmend.study.design import Study

WORKERS: Final = ("local", "ray")
"""Who can run a study."""


class Workers(Protocol):
    """Runs chunks, in any order."""

    @property
    def room(self) -> float:
        """Bytes that one chunk may take."""

    def run(
        self, study: Study, chunks: Sequence[Chunk], show: Show
    ) -> Iterator[tuple[Chunk, dict[str, Outcome]]]:
        """The chunks, or parts of them, with their outcomes by the keys of the trials, as they end.

        Args:
            study: that the chunks are of.
            chunks: to run.
            show: is told of steps, but not of all that were taken.
        """


class Here:
    """Runs one chunk after the other in this process."""

    @property
    def room(self) -> float:
        """Bytes that one chunk may take."""
        return room()

    def run(
        self, study: Study, chunks: Sequence[Chunk], show: Show
    ) -> Iterator[tuple[Chunk, dict[str, Outcome]]]:
        """The chunks with their outcomes by the keys of the trials, as they end."""
        return ((chunk, run_chunk(study, chunk, partial(show, chunk))) for chunk in chunks)


@contextmanager
def open_workers(kind: str) -> Iterator[Workers]:
    """The workers of a kind, until all is done.

    Args:
        kind: `local`, as many processes as torch has threads; or `ray`, a cluster's cores.

    Raises:
        SetupError: for another kind.
        MissingExtraError: if Ray is not installed.
        GradmendError: if the cluster cannot be reached.
    """
    if kind not in WORKERS:
        raise SetupError(f"There are no workers {kind!r}. {suggest(kind, WORKERS)}")
    if kind == "ray":
        with open_cluster() as cluster:
            yield cluster
        return
    cores = torch.get_num_threads()
    yield Processes(cores) if cores > 1 and can_fork() else Here()
