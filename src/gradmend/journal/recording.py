"""Recording one run: what watches tell becomes rows."""

from __future__ import annotations

import atexit
import json
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from gradmend.journal.file import explained, open_to_write, stored
from gradmend.journal.writer import Writer

_RUN = "INSERT INTO run (name, command, started, python, torch) VALUES (?, ?, ?, ?, ?)"
_ENDED = "UPDATE run SET ended = ?, outcome = ? WHERE id = ?"
_STEP = "INSERT OR REPLACE INTO step VALUES (?, ?, ?, ?, ?, ?)"
_LAYOUT = "INSERT INTO layout VALUES (?, ?, ?, ?, ?)"
_READING = "INSERT OR REPLACE INTO reading VALUES (?, ?, ?, ?, ?)"
_FINDING = "INSERT OR REPLACE INTO finding VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_ACT = "INSERT INTO act (run, model, step, cause, text, before, after, unit) VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
_NOTE = "INSERT INTO note (run, model, step, text) VALUES (?, ?, ?, ?)"


class Recording:
    """One run while it is recorded; it ends by `close`, or with the process.

    Args:
        path: of the journal; the file is made where there is none.
        name: of the run.
        command: that was typed to start it.
        room: bytes that its rows may take.

    Raises:
        JournalError: if the file is none of ours, of a newer version, locked, or cannot be written.
    """

    def __init__(self, path: Path, name: str, command: str, room: int) -> None:
        self.path = path
        connection = open_to_write(path)
        try:
            with explained(path):
                about = (name, command, time.time(), platform.python_version(), _torch())
                self.run = connection.execute(_RUN, about).lastrowid or 0
        except BaseException:
            connection.close()
            raise
        self._writer = Writer(connection, path, self.run, room)
        self._layouts: dict[tuple[str, tuple[str, ...], tuple[str, ...]], int] = {}
        atexit.register(self.close)

    def sink(self, model: str) -> Sink:
        """What takes the rows of the model of this name."""
        return Sink(self, model)

    def step(self, model: str, step: int, values: Mapping[str, Any]) -> None:
        """Take `loss`, `gradient` (norm) and `rate` of a step; None is unknown, NaN is not."""
        numbers = (stored(values.get(name)) for name in ("loss", "gradient", "rate"))
        self._writer.add(_STEP, (self.run, model, step, *numbers))

    def reading(self, model: str, step: int, values: Mapping[str, Any]) -> None:
        """Take a `table`: `values`, float32 [rows, statistics], with its names of `rows` and `statistics`."""
        layout = self._layout(values["table"], tuple(values["rows"]), tuple(values["statistics"]))
        numbers = np.asarray(values["values"], "<f4").tobytes()
        self._writer.add(_READING, (self.run, model, step, layout, numbers))

    def finding(self, model: str, values: Mapping[str, Any]) -> None:
        """Take a finding, or the end of one by the same `id`."""
        text = (values["cause"], values["severity"], values["sentence"])
        numbers = (stored(values["measured"]), stored(values["expected"]), values["unit"])
        lists = (json.dumps(values[name]) for name in ("sites", "where", "evidence"))
        span = (values["began"], values["ended"])
        self._writer.add(_FINDING, (self.run, model, values["id"], *text, *numbers, *lists, *span), keep=True)

    def act(self, model: str, step: int, values: Mapping[str, Any]) -> None:
        """Take what was done about a finding: `cause`, `text`, `before`, `after`, `unit`."""
        numbers = (stored(values["before"]), stored(values["after"]), values["unit"])
        row = (self.run, model, step, values["cause"], values["text"], *numbers)
        self._writer.add(_ACT, row, keep=True)

    def note(self, model: str, step: int, text: str) -> None:
        """Take what a watch has to say of itself."""
        self._writer.add(_NOTE, (self.run, model, step, text), keep=True)

    def close(self, outcome: str | None = None) -> None:
        """Write all that is waiting and end the run.

        Args:
            outcome: how it ended, if that is known.
        """
        atexit.unregister(self.close)
        self._writer.add(_ENDED, (time.time(), outcome, self.run), keep=True)
        self._writer.close()

    def __enter__(self) -> Recording:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close("ended" if kind is None else kind.__name__)

    def _layout(self, table: str, sites: tuple[str, ...], statistics: tuple[str, ...]) -> int:
        key = (table, sites, statistics)
        if key not in self._layouts:
            self._layouts[key] = len(self._layouts) + 1
            row = (self.run, self._layouts[key], table, json.dumps(sites), json.dumps(statistics))
            self._writer.add(_LAYOUT, row, keep=True)
        return self._layouts[key]


@dataclass(frozen=True)
class Sink:
    """Takes the rows of one model of a run; to write returns at once."""

    recording: Recording
    model: str

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Take one row.

        Args:
            kind: `step`, `reading`, `finding`, `act` or `note`.
            step: of the optimizer.
            values: of the row by name, as the method of the recording of that name takes them.

        Raises:
            ValueError: for another kind.
        """
        if kind == "step":
            self.recording.step(self.model, step, values)
        elif kind == "reading":
            self.recording.reading(self.model, step, values)
        elif kind == "finding":
            self.recording.finding(self.model, values)
        elif kind == "act":
            self.recording.act(self.model, step, values)
        elif kind == "note":
            self.recording.note(self.model, step, values["text"])
        else:
            raise ValueError(f"A journal takes step, reading, finding, act and note, not {kind!r}.")

    def close(self) -> None:
        """End the whole recording."""
        self.recording.close()


def _torch() -> str | None:
    try:
        return version("torch")
    except PackageNotFoundError:
        return None
