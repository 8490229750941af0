"""Ranks: the same watch in every process of a training, for all of which the first one speaks.

The others write what they read into the store by which `torch.distributed` brought the processes together,
and the first one makes one number of it. There is no collective, and nobody waits for a process: what has not
come after some steps is left out. So no training hangs for being watched, wherever and whenever its processes
end, or if only some of them are watched.
"""

from __future__ import annotations

import json
import math
import os
import time
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeAlias

import numpy as np
import torch.distributed as dist
from torch import nn

from gradmend.causes import Cause
from gradmend.diagnosis import Finding, Severity
from gradmend.watch.pace import SHARES, Pace
from gradmend.watch.stream import Array, Table

Deliver: TypeAlias = Callable[[Table], None]

ROUND = 16
"""Steps from one letter to the next, and that are planned at once."""

_LATE = 4 * ROUND
"""Steps after which a number that has not come is not waited for."""

_ROOM = 64
"""Letters of a process that wait to be read; it writes no more meanwhile."""

_FAREWELL = 2.0
"""Seconds that the first process waits at its end for what the others have still to say."""

_PATIENCE = timedelta(seconds=10)
"""To wait for an answer of the store, at most."""

_LINEAR = frozenset(("mean", "silent", "dead", "zero", "cosine", "saturation"))
"""Statistics whose means are taken as they are; of all others it is that of the squares."""

_joined: Counter[str] = Counter()


def rank() -> int:
    """Of this process, 0 if it is the only one.

    >>> rank()
    0
    """
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", 0))


def join(model: nn.Module, pace: Pace) -> First | Other | None:
    """Find the watches on the same model in the other processes; None where there is no other process.

    The same are those on models of one class and as many parameters, in the order in which they begin.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    name = f"{type(model).__name__}/{sum(p.numel() for p in model.parameters())}"
    _joined[name] += 1
    try:
        found: Any = dist.distributed_c10d._get_default_store()
        store = found.clone()
    except (RuntimeError, AttributeError):  # there is none, as with MPI
        return None
    own = Safe(store, f"gradmend/{name}/{_joined[name]}")
    if dist.get_rank():
        return Other(own, dist.get_rank(), pace)
    return First(own, dist.get_world_size(), pace)


class Safe:
    """A store whose first error, as when its process has ended, makes it an empty one.

    Args:
        store: of torch; a connection of its own, for one that somebody waits on answers nobody else.
        prefix: of all keys.
    """

    def __init__(self, store: Any, prefix: str) -> None:
        self._store, self._prefix = store, prefix
        self._store.set_timeout(_PATIENCE)
        self._lost = False

    def set(self, key: str, value: str) -> None:
        """Put something there."""
        self._ask(self._store.set, self._name(key), value)

    def get(self, key: str) -> str | None:
        """What is there, if anything is."""
        if not self._ask(self._store.check, [self._name(key)]):
            return None
        found = self._ask(self._store.get, self._name(key))
        return None if found is None else found.decode()

    def has(self, key: str) -> bool:
        """Whether something is there."""
        return bool(self._ask(self._store.check, [self._name(key)]))

    def delete(self, key: str) -> None:
        """Take it away."""
        self._ask(self._store.delete_key, self._name(key))

    def _name(self, key: str) -> str:
        return f"{self._prefix}/{key}"

    def _ask(self, function: Callable[..., Any], *args: Any) -> Any:
        try:
            return None if self._lost else function(*args)
        except RuntimeError:
            self._lost = True


@dataclass(frozen=True)
class _Entry:
    """A table on its way, and how many values each of its rows stands for; rows as a checksum."""

    name: str
    step: int
    rows: int
    values: Array
    weights: Array

    def packed(self) -> list[Any]:
        return [self.name, self.step, self.rows, self.values.tolist(), self.weights.tolist()]


def _entry(name: str, table: Table, weights: Array | None) -> _Entry:
    counts = np.ones(len(table.rows), np.float32) if weights is None else weights
    return _Entry(name, table.step, zlib.crc32(repr(table.rows).encode()), table.values, counts)


class Other:
    """What a process that is not the first does: it writes letters.

    Args:
        store: of this watch.
        rank: of this process.
    """

    first = False

    def __init__(self, store: Safe, rank: int, pace: Pace) -> None:
        self.alone = False
        self._store, self._rank = store, rank
        self._entries: list[_Entry] = []
        self._plan = opening(pace)
        self._written = 0

    def take(self, name: str, table: Table, weights: Array | None, _deliver: Deliver) -> None:
        """Keep a table for the next letter."""
        self._entries.append(_entry(name, table, weights))
        if name == "losses" and not np.isfinite(table.values).all():
            self._write()

    def blame(self, step: int, finding: Finding) -> None:
        """Tell at once where a number was born that is not finite: before others can have got it."""
        self._write(origin=[step, finding.sentence, finding.sites, finding.where])
        self._store.has("first")  # the answer means that the letter is there

    def origin(self, step: int) -> Finding | None:
        """Only the first process is told."""

    @property
    def blamed(self) -> bool:
        """Whether another process has told where a number was born that is not finite."""
        return False

    def collect(self) -> None:
        """Nothing is written to this process."""

    def plan(self, step: int, possible: Sequence[str], _pace: Pace) -> tuple[str, ...]:
        """What to look at in this step: what all look at."""
        return tuple(name for name in self._plan.get(step, ()) if name in possible)

    def end_step(self, step: int, _pace: Pace) -> None:
        """Write a letter now and then, and read what is planned."""
        if step % ROUND:
            return
        self.alone = not self._store.has("first")
        self._write()
        found = json.loads(self._store.get(f"plan/{step // ROUND}") or "{}")
        later = {int(at): tuple(names) for at, names in found.items()}
        self._plan = {at: names for at, names in self._plan.items() if at > step} | later

    def begin(self) -> None:
        """Nothing to do: letters say that somebody writes."""

    def finish(self) -> None:
        """Say goodbye."""
        self._write(bye=True)

    def _write(self, **more: Any) -> None:
        """A letter with all that is known, if those before are read."""
        if self._written >= _ROOM and self._store.has(f"{self._rank}/{self._written - _ROOM}"):
            return
        letter = json.dumps({"entries": [entry.packed() for entry in self._entries], **more})
        self._entries.clear()
        self._store.set(f"{self._rank}/{self._written}", letter)
        self._written += 1


@dataclass
class _Waiting:
    """A table of the first process that waits for those of the others."""

    table: Table
    own: _Entry
    joint: bool
    deliver: Deliver
    others: dict[int, _Entry] = field(default_factory=dict)


class First:
    """What the first process does: it reads the letters of the others, and makes one table of many.

    Args:
        store: of this watch.
        world: how many processes there are.
    """

    first, alone = True, False

    def __init__(self, store: Safe, world: int, pace: Pace) -> None:
        self._store = store
        self._read = dict.fromkeys(range(1, world), 0)
        self._expected = set(self._read)
        self._waiting: deque[_Waiting] = deque()
        self._origins: list[tuple[int, int, Finding]] = []
        self._plans = opening(pace)
        self._early: dict[tuple[str, int], dict[int, _Entry]] = defaultdict(dict)
        self.begin()

    def begin(self) -> None:
        """Show the others that somebody reads."""
        self._store.set("first", "")

    def take(self, name: str, table: Table, weights: Array | None, deliver: Deliver) -> None:
        """Have `deliver` called with the table of all processes, when it is known."""
        joint = name == "losses" or table.step == 1 or table.step in self._plans
        waiting = _Waiting(table, _entry(name, table, weights), joint, deliver)
        waiting.others = self._early.pop((name, table.step), {})
        self._waiting.append(waiting)
        urgent = name == "losses" and not np.isfinite(table.values).all()
        if urgent:
            self.collect()
        self._deliver(table.step, urgent)

    def blame(self, step: int, finding: Finding) -> None:
        """Note where a number was born that is not finite."""
        self._origins.append((step, 0, finding))

    def origin(self, step: int) -> Finding | None:
        """Where a number was first born that is not finite, up to this step; it is told once."""
        known = [found for found in self._origins if found[0] <= step]
        self._origins = [found for found in self._origins if found[0] > step]
        if not known:
            return None
        _, rank, finding = min(known, key=lambda found: found[:2])
        return replace(finding, sentence=f"On rank {rank}: {finding.sentence}")

    @property
    def blamed(self) -> bool:
        """Whether it is known where a number was born that is not finite."""
        return bool(self._origins)

    def plan(self, step: int, possible: Sequence[str], pace: Pace) -> tuple[str, ...]:
        """What to look at in this step; what is suspected now is looked at by this process alone."""
        planned = tuple(name for name in self._plans.get(step, ()) if name in possible)
        return planned or (("exam",) if "exam" in possible and pace.alarm(step) else ())

    def end_step(self, step: int, pace: Pace) -> None:
        """Read the letters now and then, and plan the round after the next."""
        if step % ROUND:
            return
        self.collect()
        self._deliver(step)
        made = pace.ahead(range(step + ROUND + 1, step + 2 * ROUND + 1))
        self._store.set(f"plan/{step // ROUND + 1}", json.dumps(made))
        self._store.delete(f"plan/{step // ROUND - 2}")
        self._plans = {at: names for at, names in self._plans.items() if at > step - _LATE} | made
        for key in [key for key in self._early if key[1] < step - _LATE]:
            del self._early[key]

    def collect(self) -> None:
        """Read all letters that are there."""
        for rank, count in self._read.items():
            while letter := self._store.get(key := f"{rank}/{count}"):
                self._open(rank, json.loads(letter))
                self._store.delete(key)
                self._read[rank] = count = count + 1

    def finish(self) -> None:
        """Wait a while for the last letters, and deliver everything."""
        end = time.monotonic() + _FAREWELL
        self.collect()
        while self._expected and time.monotonic() < end:
            time.sleep(0.01)
            self.collect()
        self._store.delete("first")
        self._deliver(0, True)

    def _open(self, rank: int, letter: dict[str, Any]) -> None:
        self._expected.add(rank)
        for name, step, rows, values, weights in letter["entries"]:
            entry = _Entry(name, step, rows, np.array(values, np.float32), np.array(weights, np.float32))
            self._sort(rank, entry)
        if "origin" in letter:
            step, sentence, sites, where = letter["origin"]
            finding = Finding(
                Cause.NON_FINITE, Severity.ERROR, sentence, sites=tuple(sites), where=tuple(where)
            )
            self._origins.append((step, rank, finding))
        if letter.get("bye"):
            self._expected.discard(rank)

    def _sort(self, rank: int, entry: _Entry) -> None:
        """To the table that waits for it, or is still to come."""
        for waiting in self._waiting:
            if (waiting.own.name, waiting.own.step) == (entry.name, entry.step):
                waiting.others[rank] = entry
                return
        self._early[entry.name, entry.step][rank] = entry

    def _deliver(self, now: int, everything: bool = False) -> None:
        """In their order, those that are complete, or have waited long enough."""
        while self._waiting:
            waiting = self._waiting[0]
            missing = self._expected - waiting.others.keys() if waiting.joint else set()
            late = now - waiting.own.step > _LATE
            if missing and not (late or everything):
                return
            self._expected -= missing if late else set()
            self._waiting.popleft()
            same = {rank: other for rank, other in waiting.others.items() if other.rows == waiting.own.rows}
            if waiting.own.name == "losses":
                self._compare(waiting.own, same)
            entries = [waiting.own, *same.values()]
            waiting.deliver(replace(waiting.table, values=_together(entries, waiting.table.statistics)))

    def _compare(self, own: _Entry, others: dict[int, _Entry]) -> None:
        """Name a rank whose loss alone is not finite, if nobody has seen where that came from."""
        losses = {0: own.values.item(), **{rank: entry.values.item() for rank, entry in others.items()}}
        lost = [rank for rank, loss in sorted(losses.items()) if not math.isfinite(loss)]
        if 0 < len(lost) < len(losses) and not any(step <= own.step for step, *_ in self._origins):
            text = f"The loss is {losses[lost[0]]} there, and finite on rank {min(losses.keys() - {*lost})}."
            self._origins.append((own.step, lost[0], Finding(Cause.NON_FINITE, Severity.ERROR, text)))


def opening(pace: Pace) -> dict[int, tuple[str, ...]]:
    """What all processes look at from the second step on, before costs are known and anything is planned."""
    cheap = [name for name in SHARES if name != "exam"]
    return pace.ahead(range(2, ROUND + 1)) | pace.ahead(range(ROUND + 1, 2 * ROUND + 1), cheap)


def _together(entries: Sequence[_Entry], statistics: Sequence[str]) -> Array:
    """One table of several: [rows, statistics]. NaN is not known, and left out, except as a loss."""
    values = np.stack([entry.values for entry in entries]).astype(np.float64)
    if tuple(statistics) == ("loss",):
        return np.asarray(values.mean(0), np.float32)
    weights = np.stack([entry.weights for entry in entries])[..., None] * ~np.isnan(values)
    linear = np.array([name in _LINEAR for name in statistics])
    known = np.where(weights > 0, values, 0.0)
    with np.errstate(all="ignore"):
        found = (weights * np.where(linear, known, known**2)).sum(0) / weights.sum(0)
        return np.asarray(np.where(linear, found, np.sqrt(found)), np.float32)
