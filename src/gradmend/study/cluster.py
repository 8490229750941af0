"""Cluster: the machines of a Ray cluster run chunks of trials as tasks."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from gradmend.errors import GradmendError, MissingExtraError
from gradmend.study.chunks import SHARE, Chunk, Show, halves, room, work_of
from gradmend.study.outcome import Outcome
from gradmend.study.trials import lost, run_chunk

if TYPE_CHECKING:
    from gradmend.study.design import Study

_RETRIES = 1
"""So often a chunk is given to another worker, when one or its machine died with it; then it is halved."""

_OBJECTS = 200 << 20
"""Bytes for what the processes of a local cluster share: the study and outcomes, which are small."""

_LOOK, _KNOCK = 0.5, 10.0
"""Seconds between two looks at the tasks, so that Ctrl-C is heard; and for a cluster to answer."""


class Cluster:
    """Runs each chunk as a task of one core. Chunks of machines that go away are done again by others.

    Args:
        ray: the module, connected to a cluster.
    """

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._task = ray.remote(num_cpus=1, max_retries=_RETRIES)(_run)

    @property
    def room(self) -> float:
        """Bytes that one chunk may take: what a core has on the machine with the least."""
        machines = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        return SHARE * min((m["memory"] / m["CPU"] for m in machines if m.get("CPU")), default=room())

    def run(
        self, study: Study, chunks: Sequence[Chunk], show: Show
    ) -> Iterator[tuple[Chunk, dict[str, Outcome]]]:
        """The chunks, or parts of them, with their outcomes by the keys of the trials, as they end."""
        begin = partial(self._task.remote, [self._ray.put(study)], sys.path)
        waiting = {begin(chunk): chunk for chunk in sorted(chunks, key=work_of, reverse=True)}
        try:
            while waiting:
                for task in self._ray.wait(list(waiting), timeout=_LOOK)[0]:
                    chunk = waiting.pop(task)
                    if (outcomes := self._outcomes(task, chunk)) is None:
                        waiting |= {begin(half): half for half in halves(chunk)}
                    else:
                        show(chunk, len(chunk.jobs) * chunk.steps)
                        yield chunk, outcomes
        finally:
            for task in waiting:
                self._ray.cancel(task, force=True)

    def _outcomes(self, task: Any, chunk: Chunk) -> dict[str, Outcome] | None:
        """None if it took several workers down, perhaps for want of memory, and can be halved."""
        try:
            outcomes: dict[str, Outcome] = self._ray.get(task)
            return outcomes
        except self._ray.exceptions.RayTaskError as error:
            why = str(error.cause).splitlines()[0].rstrip(".")
            raise GradmendError(
                f"A Ray worker cannot run trials: {why}. The same gradmend, and your own modules, must be "
                "found on every machine of the cluster."
            ) from error
        except self._ray.exceptions.RayError:
            return None if len(chunk.jobs) > 1 else {job.trial.key: lost(job) for job in chunk.jobs}


@contextmanager
def open_cluster() -> Iterator[Cluster]:
    """The cluster that Ray is connected to, else that of RAY_ADDRESS, else one of this machine's cores alone.

    A connection that was made here ends here, and so does a cluster that was started here.

    Raises:
        MissingExtraError: if Ray is not installed.
        GradmendError: if the cluster cannot be reached.
    """
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError("ray", "ray", 'A study with workers="ray"') from error
    if ray.is_initialized():
        yield Cluster(ray)
        return
    _connect(ray)
    try:
        yield Cluster(ray)
    finally:
        ray.shutdown()


def _connect(ray: Any) -> None:
    address = os.environ.get("RAY_ADDRESS")
    local = {"address": "local", "include_dashboard": False, "object_store_memory": _OBJECTS}
    try:
        if address:
            _knock(address)
        ray.init(**({"address": address} if address else local), log_to_driver=False, logging_level="ERROR")
    except (OSError, RuntimeError, ValueError) as error:
        where = f"be reached at RAY_ADDRESS={address}" if address else "start on this machine"
        raise GradmendError(f"Ray cannot {where}: {error}.") from error


def _knock(address: str) -> None:
    """Raise an OSError if nobody listens at host:port; Ray itself would try for minutes."""
    host, colon, port = address.rpartition("//")[2].rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), _KNOCK).close()


def _run(held: list[Any], path: Sequence[str], chunk: Chunk) -> dict[str, Outcome]:
    return run_chunk(_fetched(held[0], tuple(path)), chunk)


@lru_cache(maxsize=1)
def _fetched(held: Any, path: Sequence[str]) -> Study:
    """The study, once for each worker process, which looks for modules where the driver does."""
    import ray

    sys.path += [folder for folder in path if folder not in sys.path]
    study: Study = ray.get(held)
    return study
