"""Thinning: the newest quarter of a run keeps all its steps, the older ones only one of every so many."""

from __future__ import annotations

import sqlite3

ROW = 64
"""Bytes of a row without its numbers, about."""

_SHARE_OF_STEPS = 4
"""Steps may take one of so many parts of the room, readings the rest."""


def thin(connection: sqlite3.Connection, run: int, room: int) -> None:
    """Thin out the old steps of a run, model by model, until its rows take no more than `room` bytes, about.

    Findings, acts and notes stay, as there are few.
    """
    named = "SELECT model FROM step WHERE run = ?1 UNION SELECT model FROM reading WHERE run = ?1"
    models = connection.execute(named, (run,)).fetchall()
    for (model,) in models:
        steps_room = room // _SHARE_OF_STEPS // len(models)
        _thin(connection, "step", "model", run, model, steps_room // ROW)
        size = "SELECT coalesce(avg(length(numbers)), 0) FROM reading WHERE run = ? AND model = ?"
        (each,) = connection.execute(size, (run, model)).fetchone()
        most = int((room // len(models) - steps_room) / (ROW + each))
        _thin(connection, "reading", "layout", run, model, most)


def _thin(connection: sqlite3.Connection, table: str, series: str, run: int, model: str, most: int) -> None:
    """Of the older three quarters, keep the first row of each series in every stretch of `width` steps.

    The width is a power of two, so that what is thinned again and again stays evenly spaced.
    """
    whose = f"FROM {table} WHERE run = ? AND model = ?"
    (count,) = connection.execute(f"SELECT count(*) {whose}", (run, model)).fetchone()
    if count <= most:
        return
    newest = f"SELECT step {whose} ORDER BY step DESC LIMIT 1 OFFSET ?"
    (cut,) = connection.execute(newest, (run, model, most // 4)).fetchone()
    densest = f"SELECT min(step), count(*) {whose} AND step < ? GROUP BY {series} ORDER BY 2 DESC"
    first, old = connection.execute(densest, (run, model, cut)).fetchone() or (cut, 1)
    width = 1 << (max(2, 2 * (cut - first) // old) - 1).bit_length()
    firsts = f"SELECT {series}, min(step) {whose} AND step < ? GROUP BY {series}, step / ?"
    connection.execute(
        f"DELETE {whose} AND step < ? AND ({series}, step) NOT IN ({firsts})",
        (run, model, cut, run, model, cut, width),
    )
