"""Recorded: what a journal says of the trainings in it, as findings."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from gradmend.acts import Act
from gradmend.causes import Cause
from gradmend.console import Printable, number, plain_data
from gradmend.diagnosis import Finding, Severity
from gradmend.journal import Journal
from gradmend.terminal import GREEN, one_line

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from gradmend.pictures.heat import Heat
    from gradmend.pictures.training import Training

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
        acts: what was done about the findings while it trained.
        curves: its steps, as `Journal.steps` gives them.
        heats: gives what was read of its layers and parameters over the steps.
    """

    name: str
    steps: int
    loss: tuple[float, float] | None
    findings: tuple[Lasted, ...]
    notes: tuple[str, ...]
    acts: tuple[Act, ...] = ()
    curves: Mapping[str, NDArray[Any]] = field(default_factory=dict, repr=False, compare=False)
    heats: Callable[[], Mapping[str, Heat]] = field(default=dict, repr=False, compare=False)

    def figures(self, dark: bool = False) -> dict[str, Figure]:
        """The course of the training, and what was read of each layer over its steps.

        Args:
            dark: for a dark background.
        """
        from gradmend.look import Look
        from gradmend.pictures.training import pictures

        return pictures(self.drawing(), Look(dark))

    def drawing(self, name: str = "") -> Training:
        """What there is to draw of it.

        Args:
            name: another one for it.
        """
        from gradmend.pictures.course import Curves, Span
        from gradmend.pictures.training import Training

        curves = self.curves or {name: np.empty(0) for name in ("loss", "gradient", "rate")}
        steps, known = curves.get("step", np.empty(0, np.int64)), curves.get("known", np.empty(0, np.bool_))
        spans = tuple(
            Span(
                entry.finding.cause.title,
                entry.began,
                entry.ended,
                entry.finding.severity,
                entry.finding.sites,
            )
            for entry in self.findings
        )
        read = Curves(steps, curves["loss"], known, curves["gradient"], curves["rate"])
        return Training(name or self.name, read, spans, self.heats())

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, without the curves; NaN and infinity become None."""
        plain: dict[str, Any] = plain_data(replace(self, curves={}, heats=dict))
        return {name: value for name, value in plain.items() if name not in ("curves", "heats")}

    @property
    def size(self) -> str:
        """How long it trained, and from which loss to which."""
        losses = "" if self.loss is None else f", loss {number(self.loss[0], 4)} to {number(self.loss[1], 4)}"
        return f"{self.steps} steps{losses}"

    def __rich__(self) -> RenderableType:
        head = Text.assemble((one_line(self.name), "bold"), f", {self.size}")
        found = [part for entry in self.findings for part in (entry.finding, _span(entry))]
        said = [*(f"step {act.step}: {act.text}" for act in self.acts), *self.notes]
        return Group(head, *found, *(Text(one_line(note), style="dim") for note in said))


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

    def figures(self, dark: bool = False) -> dict[str, Figure]:
        """The pictures of its models; of several the losses in one first.

        Args:
            dark: for a dark background.
        """
        if len(self.models) == 1:
            return self.models[0].figures(dark)
        drawn = _compared([model.drawing() for model in self.models], dark)
        for model in self.models:
            drawn |= {f"{model.name}: {name}": figure for name, figure in model.figures(dark).items()}
        return drawn

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; NaN and infinity become None."""
        about = {"name": self.name, "started": self.started, "outcome": self.outcome}
        return {**about, "models": [model.to_dict() for model in self.models]}

    def __rich__(self) -> RenderableType:
        head = Text.assemble((one_line(self.name), "bold"), f", {self.started}, {self.outcome}")
        verdict = Text("Nothing found that lasted.", f"bold {GREEN}") if self.healthy else Text()
        return Group(head, *(Padding(model, (0, 0, 0, 2)) for model in self.models), verdict)


@dataclass(frozen=True)
class Recorded(Printable):
    """What a journal holds, the oldest run first."""

    runs: tuple[RecordedRun, ...]

    @property
    def healthy(self) -> bool:
        """Whether no error lasted to the end of the newest run."""
        return not self.runs or self.runs[-1].healthy

    def figures(self, dark: bool = False) -> dict[str, Figure]:
        """The pictures of the newest run; of several runs a comparison first.

        Args:
            dark: for a dark background.
        """
        if len(self.runs) < 2:
            return {} if not self.runs else self.runs[0].figures(dark)
        return _compared(drawings(self.runs), dark) | self.runs[-1].figures(dark)

    def __rich__(self) -> RenderableType:
        return Group(*self.runs) if self.runs else Text("No run is recorded here.")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: numbers, strings, lists; NaN and infinity become None."""
        return {"healthy": self.healthy, "runs": [run.to_dict() for run in self.runs]}


def read_recorded(journal: Journal, runs: Collection[int] | None = None) -> Recorded:
    """What a journal says of its runs, also while the last one is still written.

    Args:
        journal: to read.
        runs: their numbers; by default all.

    Raises:
        JournalError: if it cannot be read.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     journal = Journal(folder + "/run.gradmend")
        ...     with journal.run("first") as recording:
        ...         recording.sink("net").write("step", 1, {"loss": 2.3})
        ...     recorded = read_recorded(journal)
        >>> recorded.runs[0].models[0].steps, recorded.healthy
        (1, True)
    """
    return Recorded(tuple(_run(journal, run) for run in journal.runs() if runs is None or run["id"] in runs))


def _run(journal: Journal, run: dict[str, Any]) -> RecordedRun:
    steps, findings, notes = journal.steps(run["id"]), journal.findings(run["id"]), journal.notes(run["id"])
    acts = journal.acts(run["id"])
    names = dict.fromkeys([*steps, *(row["model"] for row in (*findings, *acts, *notes))])
    read = cache(partial(_heats, journal, run["id"]))
    models = (
        RecordedModel(
            name,
            int(steps[name]["step"][-1]) if name in steps else 0,
            _ends(steps[name]["loss"].tolist()) if name in steps else None,
            tuple(_lasted(row) for row in findings if row["model"] == name),
            tuple(row["text"] for row in notes if row["model"] == name),
            tuple(_act(row) for row in acts if row["model"] == name),
            steps.get(name, {}),
            partial(_of, name, read),
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


def _act(row: dict[str, Any]) -> Act:
    values = (row["text"], row["before"], row["after"], row["unit"])
    return Act(row["step"], Cause(row["cause"]), *values)


def _heats(journal: Journal, run: int) -> dict[str, Mapping[str, Heat]]:
    from gradmend.journal.heats import heats

    series = journal.series(run)
    models = dict.fromkeys(table.model for table in series)
    return {model: heats([table for table in series if table.model == model]) for model in models}


def _of(model: str, read: Callable[[], Mapping[str, Mapping[str, Heat]]]) -> Mapping[str, Heat]:
    return read().get(model, {})


def drawings(runs: Sequence[RecordedRun]) -> list[Training]:
    """What there is to draw of all models of these runs, with names that tell them apart."""
    found = []
    for place, run in enumerate(runs, start=1):
        for model in run.models:
            words = [f"{place}: {run.name.removeprefix('python ')}", *[model.name] * (len(run.models) > 1)]
            found.append(model.drawing(", ".join(words)))
    return found


def _compared(trainings: Sequence[Training], dark: bool) -> dict[str, Figure]:
    from gradmend.look import Look
    from gradmend.pictures.training import comparison

    return comparison(trainings, Look(dark)) if trainings else {}


def _span(entry: Lasted) -> Padding:
    until = "to the end" if entry.ended is None else f"to step {entry.ended}"
    return Padding(Text(f"from step {entry.began} {until}", style="dim"), (0, 0, 0, 8))
