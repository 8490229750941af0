"""The file of a journal: its tables, and how it is opened; errors of SQLite in words that help."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from gradmend.errors import GradmendError, suggest

VERSION = 1
"""Of the tables. A reader refuses a higher one; tables that come later leave those here as they are."""

_APPLICATION = 0x67724D44
"""SQLite's application id, by which a journal is told from other SQLite files: "grMD"."""

WAIT = 2.0
"""Seconds to wait for another process that is writing; one of ours takes milliseconds."""

_TABLES = """
CREATE TABLE IF NOT EXISTS run (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL, command TEXT NOT NULL, started REAL NOT NULL, ended REAL,
    outcome TEXT, python TEXT NOT NULL, torch TEXT, lost INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE IF NOT EXISTS step (
    run INTEGER NOT NULL REFERENCES run, model TEXT NOT NULL, step INTEGER NOT NULL,
    loss REAL, gradient REAL, rate REAL, PRIMARY KEY (run, model, step)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS layout (
    run INTEGER NOT NULL REFERENCES run, id INTEGER NOT NULL, kind TEXT NOT NULL, sites TEXT NOT NULL,
    statistics TEXT NOT NULL, PRIMARY KEY (run, id)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS reading (
    run INTEGER NOT NULL REFERENCES run, model TEXT NOT NULL, step INTEGER NOT NULL,
    layout INTEGER NOT NULL, numbers BLOB NOT NULL, PRIMARY KEY (run, model, step, layout)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS finding (
    run INTEGER NOT NULL REFERENCES run, model TEXT NOT NULL, id INTEGER NOT NULL, cause TEXT NOT NULL,
    severity TEXT NOT NULL, sentence TEXT NOT NULL, measured REAL, expected REAL, unit TEXT NOT NULL,
    sites TEXT NOT NULL, lines TEXT NOT NULL, evidence TEXT NOT NULL, began INTEGER NOT NULL, ended INTEGER,
    PRIMARY KEY (run, model, id)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS note (
    id INTEGER PRIMARY KEY, run INTEGER NOT NULL REFERENCES run, model TEXT NOT NULL, step INTEGER NOT NULL,
    text TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS act (
    id INTEGER PRIMARY KEY, run INTEGER NOT NULL REFERENCES run, model TEXT NOT NULL, step INTEGER NOT NULL,
    cause TEXT NOT NULL, text TEXT NOT NULL, before REAL, after REAL, unit TEXT NOT NULL
);
"""
"""Lists are JSON, numbers of readings little-endian float32. NaN is the text nan, as NULL is not known."""


class JournalError(GradmendError):
    """A journal cannot be found, read or written."""


def open_to_write(path: Path) -> sqlite3.Connection:
    """A connection that writes; the file is made where there is none. Any thread may use it, one at a time.

    Raises:
        JournalError: if the file is none of ours, of a newer version, locked, or cannot be written.
    """
    with explained(path):
        connection = sqlite3.connect(path, timeout=WAIT, isolation_level=None, check_same_thread=False)
        try:
            _prepare(connection, path)
        except BaseException:
            connection.close()
            raise
        return connection


def open_to_read(path: Path) -> sqlite3.Connection:
    """A connection that reads, also while others write, and also where nothing can be written.

    Raises:
        JournalError: if there is no such file, or it is none of ours, of a newer version or locked.
    """
    if not path.is_file():
        near = [str(file) for file in path.parent.glob("*.gradmend")]
        raise JournalError(f"There is no journal {str(path)!r}. {suggest(str(path), near)}")
    with explained(path):
        connection = _connect_to_read(path)
        try:
            _refuse_others(connection, path)
        except BaseException:
            connection.close()
            raise
        return connection


def select(path: Path, query: str, *values: object) -> Iterator[dict[str, Any]]:
    """The rows that a query gives, by the names of their columns; as they are at its start.

    Raises:
        JournalError: if the file cannot be read.
    """
    with closing(open_to_read(path)) as connection, explained(path):
        connection.row_factory = sqlite3.Row
        for row in connection.execute(query, values):
            yield dict(row)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Errors of SQLite as a JournalError that says what to do."""
    try:
        yield
    except sqlite3.Error as error:
        raise JournalError(explanation(path, error)) from None


def explanation(path: Path, error: sqlite3.Error) -> str:
    """What is wrong with the file, in one or two sentences.

    >>> explanation(Path("run.gradmend"), sqlite3.OperationalError("database or disk is full"))
    'The disk of run.gradmend is full.'
    """
    text = str(error)
    if "locked" in text:
        return f"{path} is locked by another process. End it, or name another file."
    if "not a database" in text:
        return _NOT_OURS.format(path)
    if "full" in text:
        return f"The disk of {path} is full."
    if "malformed" in text:
        return f"{path} is damaged ({text}). What can be saved: sqlite3 {path} .recover"
    if "readonly" in text or "unable to open" in text:
        return f"{path} cannot be opened to write ({text}). Name a file in a folder that you may write to."
    return f"{path}: {text}."


def stored(value: float | None) -> float | str | None:
    """A number as SQLite can hold it: there, NaN would become NULL, which here is what is not known.

    >>> stored(float("nan")), stored(None), stored(1.5)
    ('nan', None, 1.5)
    """
    return "nan" if value is not None and value != value else value


def number(value: float | str | None) -> float | None:
    """A number as it was before it was stored.

    >>> number("nan"), number(None), number(1.5)
    (nan, None, 1.5)
    """
    return None if value is None else float(value)


_NOT_OURS = "{} is not a journal of gradmend. `gradmend run train.py` writes one."


def _connect_to_read(path: Path) -> sqlite3.Connection:
    """Only one that may write clears up behind it; and a file in a folder that is closed must not change."""
    address = f"file:{quote(str(path.absolute()))}"
    connection = sqlite3.connect(
        f"{address}?mode=rw", uri=True, timeout=WAIT, isolation_level=None, check_same_thread=False
    )
    try:
        connection.execute("SELECT 1 FROM sqlite_master")
    except sqlite3.OperationalError as error:
        connection.close()
        if "locked" in str(error) or Path(f"{path}-wal").exists():
            raise
        return sqlite3.connect(f"{address}?immutable=1", uri=True, check_same_thread=False)
    return connection


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    if not _is_empty(connection):
        _refuse_others(connection, path)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA journal_size_limit = 4194304")
    connection.execute("PRAGMA synchronous = NORMAL")  # a killed process loses nothing, a power cut the end
    connection.execute("BEGIN IMMEDIATE")
    for statement in _TABLES.split(";"):
        connection.execute(statement)
    connection.execute(f"PRAGMA application_id = {_APPLICATION}")
    connection.execute(f"PRAGMA user_version = {VERSION}")
    connection.execute("COMMIT")


def _is_empty(connection: sqlite3.Connection) -> bool:
    return connection.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone() is None


def _refuse_others(connection: sqlite3.Connection, path: Path) -> None:
    """Raise a JournalError unless the tables are ours and known."""
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if application != _APPLICATION:
        raise JournalError(_NOT_OURS.format(path))
    if version > VERSION:
        raise JournalError(
            f"{path} is of version {version}, this gradmend reads up to {VERSION}. "
            "Type: pip install --upgrade gradmend"
        )
