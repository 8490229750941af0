"""The thread that writes: rows wait in memory for a moment and go to the file many at a time."""

from __future__ import annotations

import os
import sqlite3
import sys
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import Event, Lock, Thread
from typing import TypeAlias

from gradmend.journal.file import WAIT, explanation
from gradmend.journal.thinning import ROW, thin

Row: TypeAlias = tuple[str, Sequence[object]]
"""A statement of SQL and what to put into it."""

_INTERVAL, _PAUSE = 0.25, 2.0
"""Seconds between two writes, which is what a killed process loses; and after one that failed."""

_BATCH, _MOST_WAITING = 2_000, 20_000
"""Rows of one transaction; and those that wait while none succeeds. What comes then is counted and lost."""

_SHORT = 0.1
"""Seconds to wait for another process that is writing: for so long the training may not fork."""

_LOST = "UPDATE run SET lost = ? WHERE id = ?"

_writing = Lock()
"""No fork while SQLite holds its own locks: a child that inherits them held would wait for ever."""

if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(
        before=_writing.acquire, after_in_parent=_writing.release, after_in_child=_writing.release
    )


class Writer:
    """Writes the rows of one run in a thread of its own. A full disk or a locked file only delays it.

    Args:
        connection: to the file; the writer closes it.
        path: of the file, for messages.
        run: its number.
        room: bytes that the rows of the run may take; older steps are thinned out.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path, run: int, room: int) -> None:
        self._path, self._run, self._room = path, run, room
        self._waiting: deque[Row] = deque()
        self._lost = self._lost_written = self._since_thinned = 0
        self._failed = self._told = False
        self._ending = Event()
        self._process = os.getpid()
        self._thread = Thread(target=self._work, args=(connection,), name="gradmend journal", daemon=True)
        self._thread.start()

    def add(self, statement: str, values: Sequence[object], *, keep: bool = False) -> None:
        """Take a row; returns at once. In a child made by fork it does nothing.

        Args:
            statement: of SQL.
            values: of the row.
            keep: even if very many are waiting.
        """
        if os.getpid() != self._process:
            return
        if keep or len(self._waiting) < _MOST_WAITING:
            self._waiting.append((statement, values))
        else:
            self._lost += 1

    def close(self) -> None:
        """Write what is waiting and end the thread."""
        if os.getpid() == self._process:
            self._ending.set()
            self._thread.join()

    def _work(self, connection: sqlite3.Connection) -> None:
        ended = False
        while not ended:
            ended = self._ending.wait(_PAUSE if self._failed else _INTERVAL)
            try:
                self._write(connection, WAIT if ended else _SHORT)
                self._failed = self._told = False
            except sqlite3.Error as error:
                self._complain(error)
                if not isinstance(
                    error, sqlite3.OperationalError
                ):  # full or locked may pass, damage does not
                    break
        with _writing:
            connection.close()

    def _write(self, connection: sqlite3.Connection, patience: float) -> None:
        """All that is waiting; what could not be written goes on waiting."""
        with _writing:
            connection.execute(f"PRAGMA busy_timeout = {int(1000 * patience)}")
        while self._waiting or self._lost > self._lost_written:
            batch = [self._waiting.popleft() for _ in range(min(_BATCH, len(self._waiting)))]
            try:
                with _writing:
                    self._commit(connection, batch)
            except sqlite3.Error:
                self._waiting.extendleft(reversed(batch))
                raise

    def _commit(self, connection: sqlite3.Connection, batch: Sequence[Row]) -> None:
        lost, fresh = self._lost, self._since_thinned + sum(map(_size, batch))
        due = fresh > self._room // 8
        connection.execute("BEGIN IMMEDIATE")
        try:
            for statement, values in batch:
                connection.execute(statement, values)
            connection.execute(_LOST, (lost, self._run))
            if due:
                thin(connection, self._run, self._room)
            connection.execute("COMMIT")
        except sqlite3.Error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        self._lost_written, self._since_thinned = lost, 0 if due else fresh

    def _complain(self, error: sqlite3.Error) -> None:
        """Once each time that it fails; that another process writes is no failure, unless at the end."""
        self._failed = True
        if not self._told and ("locked" not in str(error) or self._ending.is_set()):
            self._told = True
            what = explanation(self._path, error)
            with suppress(OSError, ValueError, AttributeError):  # stderr may be closed, or None
                sys.stderr.write(f"gradmend: {what} The training goes on, but is not recorded.\n")


def _size(row: Row) -> int:
    return ROW + sum(len(value) for value in row[1] if isinstance(value, bytes))
