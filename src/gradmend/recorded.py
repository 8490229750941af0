"""Recorded: what a journal says of the trainings in it, as findings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from gradmend.causes import Cause
from gradmend.console import Printable, number
from gradmend.diagnosis import Finding, Severity
from gradmend.journal import Journal

_ENDED_WELL = "ended"


@dataclass(frozen=True)
class Lasted:
    """A finding, and the optimizer steps from which and to which it lasted; None to the end."""

    finding: Finding
    began: int
    ended: int | None


@dataclass(frozen=True)
class RecordedModel(Printable):
    """What is recorded of one model in one run.

    Args:
        name: of the model.
        steps: of the optimizer.
        loss: the first and the last that is known; None without any.
        findings: in the order in which they began.
        notes: what the watch had to say of itself.
    """

    name: str
    steps: int
    loss: tuple[float, float] | None
    findings: tuple[Lasted, ...]
    notes: tuple[str, ...]

    def __rich__(self) -> RenderableType:
        losses = "" if self.loss is None else f", loss {number(self.loss[0], 4)} to {number(self.loss[1], 4)}"
        head = Text.assemble((self.name, "bold"), f", {self.steps} steps{losses}")
        found = [part for entry in self.findings for part in (entry.finding, _span(entry))]
        return Group(head, *found, *(Text(note, style="dim") for note in self.notes))


@dataclass(frozen=True)
class RecordedRun(Printable):
    """One run of a journal.

    Args:
        name: of the run, or else the command that started it.
        started: local time.
        outcome: how it ended; `killed, or still running` if that was not recorded.
        models: that trained.
    """

    name: str
    started: str
    outcome: str
    models: tuple[RecordedModel, ...]

    @property
    def healthy(self) -> bool:
        """Whether no error lasted to the end."""
        found = [entry for model in self.models for entry in model.findings if entry.ended is None]
        return all(entry.finding.severity < Severity.ERROR for entry in found)

    def __rich__(self) -> RenderableType:
        head = Text.assemble((self.name, "bold"), f", {self.started}, {self.outcome}")
        verdict = Text("Nothing found that lasted.", "bold green") if self.healthy else Text()
        return Group(head, *(Padding(model, (0, 0, 0, 2)) for model in self.models), verdict)


@dataclass(frozen=True)
class Recorded(Printable):
    """What a journal holds, the oldest run first."""

    runs: tuple[RecordedRun, ...]

    @property
    def healthy(self) -> bool:
        """Whether no error lasted to the end of the newest run."""
        return not self.runs or self.runs[-1].healthy

    def __rich__(self) -> RenderableType:
        return Group(*self.runs) if self.runs else Text("No run is recorded here.")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: numbers, strings, lists; NaN and infinity become None."""
        return {"healthy": self.healthy, **super().to_dict()}


def read_recorded(journal: Journal) -> Recorded:
    """What a journal says of its runs, also while the last one is still written.

    Raises:
        JournalError: if it cannot be read.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     journal = Journal(folder + "/run.gradmend")
        ...     with journal.run("first") as recording:
        ...         recording.sink("net").write("step", 1, {"loss": 2.3})
        ...     recorded = read_recorded(journal)
        >>> recorded.runs[0].models[0].steps, recorded.healthy
        (1, True)
    """
    return Recorded(tuple(_run(journal, run) for run in journal.runs()))


def _run(journal: Journal, run: dict[str, Any]) -> RecordedRun:
    steps, findings, notes = journal.steps(run["id"]), journal.findings(run["id"]), journal.notes(run["id"])
    names = dict.fromkeys([*steps, *(row["model"] for row in (*findings, *notes))])
    models = (
        RecordedModel(
            name,
            int(steps[name]["step"][-1]) if name in steps else 0,
            _ends(steps[name]["loss"].tolist()) if name in steps else None,
            tuple(_lasted(row) for row in findings if row["model"] == name),
            tuple(row["text"] for row in notes if row["model"] == name),
        )
        for name in names
    )
    started = datetime.fromtimestamp(run["started"]).isoformat(" ", "seconds")
    outcome = "killed, or still running" if run["ended"] is None else run["outcome"] or _ENDED_WELL
    return RecordedRun(run["name"] or run["command"], started, outcome, tuple(models))


def _ends(losses: list[float]) -> tuple[float, float] | None:
    known = [loss for loss in losses if not math.isnan(loss)]
    return (known[0], known[-1]) if known else None


def _lasted(row: dict[str, Any]) -> Lasted:
    finding = Finding(
        Cause(row["cause"]),
        Severity[row["severity"].upper()],
        row["sentence"],
        row["measured"],
        row["expected"],
        row["unit"],
        tuple(row["sites"]),
        tuple(row["lines"]),
        tuple(row["evidence"]),
    )
    return Lasted(finding, row["began"], row["ended"])


def _span(entry: Lasted) -> Padding:
    until = "to the end" if entry.ended is None else f"to step {entry.ended}"
    return Padding(Text(f"from step {entry.began} {until}", style="dim"), (0, 0, 0, 8))
