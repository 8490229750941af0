"""What the live view shows: the page of the chosen runs, made anew only when something was written."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from datetime import datetime
from hashlib import blake2b
from pathlib import Path
from threading import Lock
from typing import Any, Final

import numpy as np
from plotly.graph_objects import Figure

from gradmend.console import lines
from gradmend.journal import Journal, JournalError
from gradmend.journal.file import explained, open_to_read
from gradmend.recorded import RecordedRun, read_recorded
from gradmend.report.page import Page
from gradmend.report.run import page_of


class Followed:
    """A journal, and whether it was written to.

    Args:
        path: of the file.

    Raises:
        JournalError: if it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._inode = -1
        self._connection: sqlite3.Connection | None = None
        self.state()

    def state(self) -> str:
        """Another text whenever the file holds something else, or is another one.

        Raises:
            JournalError: if it cannot be read.
        """
        inode = self.path.stat().st_ino if self.path.exists() else 0
        if self._connection is None or inode != self._inode:
            self.close()
            self._connection, self._inode = open_to_read(self.path), inode
        with explained(self.path):
            (version,) = self._connection.execute("PRAGMA data_version").fetchone()
        return f"{inode}.{version}"

    def close(self) -> None:
        """Let go of the file."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class Kept:
    """Draws, and knows again what it has drawn from the very same numbers, until `forget` is called twice.

    Examples:
        >>> kept, drawn = Kept(), []
        >>> def draw(values):
        ...     drawn.append(len(values))
        ...     return Figure()
        >>> kept(draw, np.arange(3)) is kept(draw, np.arange(3)), drawn
        (True, [3])
    """

    def __init__(self) -> None:
        self._now: dict[str, Figure] = {}
        self._before: dict[str, Figure] = {}

    def __call__(self, function: Callable[..., Figure], *given: Any) -> Figure:
        """What the function makes of these."""
        digest = blake2b(function.__name__.encode())
        _feed(digest, given)
        key = digest.hexdigest()
        if key not in self._now:
            self._now[key] = self._before.get(key) or function(*given)
        return self._now[key]

    def forget(self) -> None:
        """Let go of what was not asked for since the last time."""
        self._before, self._now = self._now, {}


def _feed(digest: blake2b, value: Any) -> None:
    if isinstance(value, np.ndarray):
        digest.update(f"{value.dtype}{value.shape}".encode())
        digest.update(np.ascontiguousarray(value).data)
    elif is_dataclass(value):
        _feed(digest, [getattr(value, each.name) for each in fields(value)])
    elif isinstance(value, Mapping):
        _feed(digest, list(value.items()))
    elif isinstance(value, (list, tuple)):
        digest.update(f"{len(value)}".encode())
        for each in value:
            _feed(digest, each)
    else:
        digest.update(repr(value).encode())


_NOTHING: Final = {"runs": [], "chosen": [], "running": False}


@dataclass(frozen=True)
class Content:
    """What the browser gets.

    Args:
        tag: changes with the rest.
        page: to be rendered.
        about: the runs that there are (`key`, `name`, `state`), the keys of those `chosen`, and whether one
            of these is `running`.
    """

    tag: str
    page: Page
    about: Mapping[str, Any]


class Live:
    """The content of the page for any choice of runs, made anew only when something was written.

    Args:
        paths: of the journals.

    Raises:
        JournalError: if one cannot be read.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._journals = [Followed(path) for path in paths]
        self._title = lines([path.name for path in paths])
        self._lock, self._kept = Lock(), Kept()
        self._ended: dict[str, RecordedRun] = {}
        self._content: Content | None = None

    def content(self, chosen: Collection[str] = ()) -> Content:
        """The page, with the runs of these keys; by default the newest of each journal."""
        with self._lock:
            try:
                return self._now(chosen)
            except JournalError as error:
                return Content(_digest(str(error)), Page(self._title, str(error), "error", ()), _NOTHING)

    def _now(self, chosen: Collection[str]) -> Content:
        states = [journal.state() for journal in self._journals]
        tag = _digest(repr((states, sorted(chosen))))
        if self._content is None or self._content.tag != tag:
            self._content = self._made(tag, chosen)
            self._kept.forget()
        return self._content

    def close(self) -> None:
        """Let go of the files."""
        for journal in self._journals:
            journal.close()

    def _made(self, tag: str, chosen: Collection[str]) -> Content:
        found = [
            _Entry(f"{place}.{row['id']}", journal.path, row)
            for place, journal in enumerate(self._journals, start=1)
            for row in Journal(journal.path).runs()
        ]
        newest = list({entry.path: entry for entry in found}.values())
        shown = [entry for entry in found if entry.key in chosen] or newest
        runs = [self._read(entry) for entry in shown]
        self._ended = {e.key: run for e, run in zip(shown, runs, strict=True) if e.row["ended"] is not None}
        studies = [study for journal in self._journals for study in _study(journal.path)]
        sections = [section for study in studies for section in study.sections]
        page = page_of(runs, self._title, sections, self._kept)
        if studies and not any(model.steps for run in runs for model in run.models):
            page = replace(page, verdict=studies[-1].verdict, tone=studies[-1].tone)
        return Content(tag, page, _about(found, shown))

    def _read(self, entry: _Entry) -> RecordedRun:
        """A run; one that has ended is read once, as long as it is shown."""
        known = self._ended.get(entry.key) if entry.row["ended"] is not None else None
        return known or read_recorded(Journal(entry.path), [entry.row["id"]]).runs[0]


@dataclass(frozen=True)
class _Entry:
    """A run: the number of its journal and its own, and what the journal says of it."""

    key: str
    path: Path
    row: Mapping[str, Any]


def _about(found: Sequence[_Entry], shown: Sequence[_Entry]) -> dict[str, Any]:
    runs = [
        {
            "key": entry.key,
            "name": entry.row["name"] or entry.row["command"] or entry.path.name,
            "started": datetime.fromtimestamp(entry.row["started"]).isoformat(" ", "seconds"),
        }
        for entry in found
    ]
    running = any(entry.row["ended"] is None for entry in shown)
    return {"runs": runs, "chosen": [entry.key for entry in shown], "running": running}


def _study(path: Path) -> list[Page]:
    """The page of the study in a journal, if there is one with trials."""
    from gradmend.study.analysis import Results
    from gradmend.study.store import read_study

    try:
        held = read_study(path)
    except JournalError:
        return []
    told = {name: held.definition[name] for name in ("measure", "target") if name in held.definition}
    outcomes = list(held.outcomes.values())
    return [Results(held.name, held.question, outcomes, **told).page()] if outcomes else []


def _digest(text: str) -> str:
    return blake2b(text.encode(), digest_size=12).hexdigest()
