"""The store: the finished trials of a study, in tables of their own in a journal."""

from __future__ import annotations

import json
import platform
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from gradmend.console import lines, number
from gradmend.journal.file import JournalError, explained, open_to_read, open_to_write
from gradmend.study.outcome import FAILED, Outcome

if TYPE_CHECKING:
    from gradmend.study.design import Arm, Study

_TABLES = """
CREATE TABLE IF NOT EXISTS study (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL, question TEXT NOT NULL, definition TEXT NOT NULL,
    started REAL NOT NULL, python TEXT NOT NULL, torch TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS trial (
    study INTEGER NOT NULL REFERENCES study, key TEXT NOT NULL, arm TEXT NOT NULL, seed INTEGER NOT NULL,
    status TEXT NOT NULL, reason TEXT NOT NULL, measures TEXT NOT NULL, losses BLOB NOT NULL,
    accuracies BLOB NOT NULL, findings TEXT NOT NULL, finished REAL NOT NULL, PRIMARY KEY (study, key)
);
"""
"""Arms, measures and findings are JSON; losses and accuracies little-endian float32 and float64."""

_STUDY = "INSERT INTO study (name, question, definition, started, python, torch) VALUES (?, ?, ?, ?, ?, ?)"
_CHANGED = "UPDATE study SET question = ?, definition = ? WHERE id = ?"
_TRIAL = "INSERT OR REPLACE INTO trial VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"

_PATIENCE = 60_000
"""Milliseconds to wait for a watch that writes to the same file: a study must not lose what it trained."""

_FREE = frozenset(("name", "question", "measure", "seeds", "arms"))
"""Of a definition: what may change without a contradiction."""


@dataclass(frozen=True)
class StoredStudy:
    """What a journal holds of a study.

    Args:
        name: of the study.
        question: that it asks.
        definition: as the study described itself, from JSON.
        outcomes: of its trials by their keys, in the order in which they ended.
    """

    name: str
    question: str
    definition: dict[str, Any]
    outcomes: Mapping[str, Outcome]


class Trial(NamedTuple):
    """One of the trials that a study plans: an arm, a seed, and its key in a journal."""

    arm: Arm
    seed: int
    key: str


def trials_of(study: Study) -> list[Trial]:
    """All trials of a study, arm by arm."""
    return [Trial(arm, seed, study.key(arm, seed)) for arm in study.arms() for seed in study.seeds]


class Store:
    """Writes the trials of one study to a journal, which no other study may write to meanwhile.

    What `add` was given is on the disk when it returns; a process killed at any point loses nothing of it.

    Args:
        path: of the journal; the file is made where there is none.

    Raises:
        JournalError: if the file is none of ours, of a newer version, or cannot be written; or if a study
            is writing to it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._right = _sole_right(self.path)
        self._right.__enter__()
        try:
            self._connection = open_to_write(self.path)
            self._connection.execute("PRAGMA synchronous = FULL")
            self._connection.execute(f"PRAGMA busy_timeout = {_PATIENCE}")
        except BaseException:
            self._right.__exit__(None, None, None)
            raise

    def begin(self, study: Study, trials: Iterable[Trial]) -> int:
        """The number of the study in the journal; it is written there if it is new.

        Args:
            study: to be run.
            trials: all that it plans.

        Raises:
            JournalError: if the journal holds another study, or trials of this one that contradict it.
        """
        definition = json.dumps(study.definition())
        with self._transaction():
            for statement in _TABLES.split(";"):
                self._connection.execute(statement)
            found = self._connection.execute("SELECT id, name, definition FROM study").fetchone()
            if found is None:
                about = (study.name, study.question, definition, time.time())
                versions = (platform.python_version(), str(torch.__version__))
                return self._connection.execute(_STUDY, about + versions).lastrowid or 0
            number, name, before = found
            if name != study.name:
                raise JournalError(_other(self.path, name, study.name))
            self._refuse_contradiction(number, trials, json.loads(before), json.loads(definition))
            self._connection.execute(_CHANGED, (study.question, definition, number))
            return int(number)

    def done(self, study: int) -> set[str]:
        """The keys of the trials that need not be done again; those that failed may be."""
        query = "SELECT key FROM trial WHERE study = ? AND status != ?"
        with explained(self.path):
            return {key for (key,) in self._connection.execute(query, (study, FAILED))}

    def add(self, study: int, outcomes: Mapping[str, Outcome]) -> None:
        """Write outcomes by the keys of their trials: all of them, or none if the process is killed.

        Raises:
            JournalError: if the disk is full or the file locked.
        """
        with self._transaction():
            rows = [_row(study, key, outcome) for key, outcome in outcomes.items()]
            self._connection.executemany(_TRIAL, rows)

    def close(self) -> None:
        """Close the file for writing."""
        self._connection.close()
        self._right.__exit__(None, None, None)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with explained(self.path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def _refuse_contradiction(self, study: int, trials: Iterable[Trial], before: Any, now: Any) -> None:
        """Trials that are done must be of the plan, or of arms or seeds that were taken out of it."""
        query = "SELECT key, arm, seed FROM trial WHERE study = ? AND status != ?"
        rows = self._connection.execute(query, (study, FAILED))
        done = {(_levels(json.loads(arm)), seed): key for key, arm, seed in rows}
        planned = {(_levels(trial.arm.levels), trial.seed): trial.key for trial in trials}
        otherwise = sum(done[trial] != planned[trial] for trial in done.keys() & planned.keys())
        strange = _factors(done) and _factors(planned) and not _factors(done) & _factors(planned)
        if done and (otherwise or strange or before.get("target") != now.get("target")):
            raise JournalError(_contradiction(self.path, otherwise or len(done), len(done), before, now))


def read_study(path: str | Path) -> StoredStudy:
    """What a journal holds of a study, also while one is running.

    Raises:
        JournalError: if there is no such journal, or no study in it.
    """
    path = Path(path)
    with closing(open_to_read(path)) as connection, explained(path):
        if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'trial'").fetchone() is None:
            raise JournalError(f"{path} holds no study. `gradmend study NAME --journal {path}` writes one.")
        connection.row_factory = sqlite3.Row
        about = connection.execute("SELECT * FROM study").fetchone()
        rows = connection.execute("SELECT * FROM trial WHERE study = ? ORDER BY rowid", (about["id"],))
        outcomes = {row["key"]: _outcome(row) for row in rows}
    return StoredStudy(about["name"], about["question"], json.loads(about["definition"]), outcomes)


@contextmanager
def _sole_right(path: Path) -> Iterator[None]:
    """That of one process at a time to write a study to this journal; it ends with the process.

    It is SQLite's lock of an empty file beside the journal, as a lock of the journal would keep out readers.
    """
    file = path.with_name(path.name + "-study")
    while True:
        connection = _locked(path, file)
        try:
            if connection is not None:
                yield
                file.unlink(missing_ok=True)
                return
        finally:
            if connection is not None:
                connection.close()


def _locked(path: Path, file: Path) -> sqlite3.Connection | None:
    """A connection that holds the lock; None if the file was removed meanwhile by who held it before."""
    try:
        if not file.exists():  # to close it would end a lock that this process holds
            file.touch()
        before = file.stat().st_ino
        connection = sqlite3.connect(file, timeout=0, isolation_level=None, check_same_thread=False)
    except (OSError, sqlite3.Error) as error:
        folder = path.parent.absolute()
        raise JournalError(f"{path} cannot be written: {error}. Is {folder} a folder of yours?") from None
    try:
        connection.execute("BEGIN EXCLUSIVE")
    except sqlite3.Error:
        connection.close()
        raise JournalError(
            f"Another process is running a study with {path}. Wait for it, end it, or name another journal."
        ) from None
    with suppress(OSError):
        if file.stat().st_ino == before:
            return connection
    connection.close()
    return None


def _row(study: int, key: str, outcome: Outcome) -> tuple[object, ...]:
    arm, measures = json.dumps(dict(outcome.arm)), json.dumps(dict(outcome.measures), allow_nan=False)
    curves = np.array(outcome.losses, "<f4").tobytes(), np.array(outcome.accuracies, "<f8").tobytes()
    about = (study, key, arm, outcome.seed, outcome.status, outcome.reason, measures)
    return (*about, *curves, json.dumps(outcome.findings), time.time())


def _outcome(row: sqlite3.Row) -> Outcome:
    return Outcome(
        arm=json.loads(row["arm"]),
        seed=row["seed"],
        status=row["status"],
        reason=row["reason"],
        measures=json.loads(row["measures"]),
        losses=tuple(np.frombuffer(row["losses"], "<f4").tolist()),
        accuracies=tuple(np.frombuffer(row["accuracies"], "<f8").tolist()),
        findings=tuple(json.loads(row["findings"])),
    )


def _factors(trials: Iterable[tuple[tuple[tuple[str, str], ...], int]]) -> set[str]:
    return {factor for arm, _ in trials for factor, _ in arm}


def _levels(levels: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(levels.items()))


def _other(path: Path, held: str, name: str) -> str:
    return (
        f"{path} holds the study {held!r}, not {name!r}. Each study has a journal of its own: name "
        "another file."
    )


def _contradiction(path: Path, count: int, done: int, before: Any, now: Any) -> str:
    changed = list(differences(before, now))
    return (
        f"{path} contradicts the study: {count} of the {done} trials that are done were done otherwise. "
        f"{f'Changed since then: {lines(changed)}. ' if changed else ''}"
        "Change that back, or name another journal for the study as it is now."
    )


def differences(before: Any, now: Any, place: str = "") -> Iterator[str]:
    """Where two definitions differ, in words, but for what may be added to a study or taken out of it.

    >>> list(differences({"steps": 5, "seeds": [0, 1]}, {"steps": 9, "seeds": [0, 1, 2]}))
    ['steps was 5, is 9']
    """
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        names = before.keys() & now.keys() if place.startswith("factors") else {**before, **now}
        for name in sorted(set(names) - _FREE):
            yield from differences(before.get(name), now.get(name), f"{place}.{name}".lstrip("."))
    elif before != now:
        yield f"{place} was {_short(before)}, is {_short(now)}"


def _short(value: Any) -> str:
    text = number(value, 6) if isinstance(value, float) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
