"""The journal: one SQLite file with what trainings did, written while they run and readable meanwhile."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradmend.journal.file import JournalError, number, select
from gradmend.journal.recording import Recording, Sink
from gradmend.journal.series import Series, read_series

__all__ = ["Journal", "JournalError", "Readings", "Recording", "Series", "Sink", "record"]

_ROOM = 64 << 20
"""Bytes that one run may take unless it is said otherwise; older steps are thinned out."""


@dataclass(frozen=True)
class Readings:
    """One table of statistics of one model at one step.

    Args:
        model: its name in the run.
        step: of the optimizer.
        table: what they are of: `gradients`, `weights`, `layers` or `sites`.
        rows: their names.
        statistics: the names of the columns.
        values: float32 of shape [rows, statistics]; NaN is not known.
    """

    model: str
    step: int
    table: str
    rows: tuple[str, ...]
    statistics: tuple[str, ...]
    values: NDArray[np.float32]


class Journal:
    """One SQLite file of runs. Nothing is opened before it is needed; any number may read while one writes.

    Args:
        path: of the file, by custom `*.gradmend`.

    Examples:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> journal = Journal(Path(folder.name) / "run.gradmend")
        >>> with journal.run("first", "python train.py") as recording:
        ...     recording.sink("net").write("step", 1, {"loss": 2.3, "gradient": 0.1, "rate": 0.01})
        >>> journal.runs()[0]["name"], journal.steps(1)["net"]["loss"]
        ('first', array([2.3]))
        >>> folder.cleanup()
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def run(self, name: str = "", command: str = "", *, room: int = _ROOM) -> Recording:
        """Begin to record a run. One file takes many runs, also of several processes at once.

        Args:
            name: of the run.
            command: that was typed to start it.
            room: bytes that it may take, about; older steps are thinned out.

        Raises:
            JournalError: if the file is none of ours, of a newer version, locked, or cannot be written.
        """
        return Recording(self.path, name, command, room)

    def runs(self) -> list[dict[str, Any]]:
        """All runs, the oldest first: id, name, command, started and ended (Unix time; None while it runs
        or when it was killed), outcome, python, torch, and how many rows were lost.
        """
        return list(select(self.path, "SELECT * FROM run ORDER BY id"))

    def steps(self, run: int) -> dict[str, dict[str, NDArray[Any]]]:
        """By the name of the model, the arrays `step`, `loss`, `gradient`, `rate`; NaN where not known.

        And `known`: whether the loss is, as a loss that is known may be NaN.
        """
        rows = list(select(self.path, "SELECT * FROM step WHERE run = ? ORDER BY model, step", run))
        models = dict.fromkeys(row["model"] for row in rows)
        return {model: _columns([row for row in rows if row["model"] == model]) for model in models}

    def readings(self, run: int) -> Iterator[Readings]:
        """All tables of statistics, step by step."""
        query = (
            "SELECT model, step, kind, sites, statistics, numbers FROM reading "
            "JOIN layout ON layout.run = reading.run AND layout.id = reading.layout "
            "WHERE reading.run = ? ORDER BY model, step"
        )
        for row in select(self.path, query, run):
            sites, statistics = tuple(json.loads(row["sites"])), tuple(json.loads(row["statistics"]))
            values = np.frombuffer(row["numbers"], "<f4").reshape(len(sites), len(statistics))
            yield Readings(row["model"], row["step"], row["kind"], sites, statistics, values)

    def series(self, run: int) -> list[Series]:
        """The same tables, those of one model, kind and layout together."""
        return list(read_series(self.path, run))

    def findings(self, run: int) -> list[dict[str, Any]]:
        """What was found, in the order in which it began; `ended` is None of what lasted to the end."""
        found = select(self.path, "SELECT * FROM finding WHERE run = ? ORDER BY began, id", run)
        return [{name: _plain(name, value) for name, value in row.items()} for row in found]

    def acts(self, run: int) -> list[dict[str, Any]]:
        """What was done about findings: model, step, cause, text, and a number before and after, of unit."""
        if not any(select(self.path, "SELECT 1 FROM sqlite_master WHERE name = 'act'")):
            return []  # a journal of before there were acts
        query = "SELECT model, step, cause, text, before, after, unit FROM act WHERE run = ? ORDER BY id"
        return [
            {name: _plain(name, value) for name, value in row.items()}
            for row in select(self.path, query, run)
        ]

    def notes(self, run: int) -> list[dict[str, Any]]:
        """What the watches had to say of themselves."""
        return list(select(self.path, "SELECT model, step, text FROM note WHERE run = ? ORDER BY id", run))


def record(path: str | Path, model: str) -> Sink:
    """A recording of a single model; closing the sink ends it."""
    return Journal(path).run(model).sink(model)


def _columns(rows: list[dict[str, Any]]) -> dict[str, NDArray[Any]]:
    numbers = {
        name: np.array([row[name] for row in rows], np.float64) for name in ("loss", "gradient", "rate")
    }
    known = np.array([row["loss"] is not None for row in rows], np.bool_)
    return {"step": np.array([row["step"] for row in rows], np.int64), **numbers, "known": known}


def _plain(name: str, value: Any) -> Any:
    if name in ("sites", "lines", "evidence"):
        return json.loads(value)
    return number(value) if name in ("measured", "expected", "before", "after") else value
