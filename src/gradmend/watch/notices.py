"""Notices: findings of a running training, when they appear and when they pass, once each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from rich.text import Text

from gradmend.causes import Cause
from gradmend.diagnosis import Finding, Severity
from gradmend.terminal import Terminal


@runtime_checkable
class Sink(Protocol):
    """Takes what a watch reads, such as a journal."""

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Take one record at once, and keep no more of the training waiting.

        Args:
            kind: step, reading, finding, act or note.
            step: of the optimizer, from 1.
            values: plain data and arrays of numpy.
        """


@dataclass(frozen=True)
class Notice:
    """A finding of a running training.

    Args:
        finding: what, where, and the evidence.
        began: the optimizer step at which it was found, from 1.
        ended: the step at which it was found to have passed; None as long as it lasts.
    """

    finding: Finding
    began: int
    ended: int | None = None


Report = Callable[[Notice], None]


class Notices:
    """Keeps the findings of several sources, and reports each when it begins and when it ends.

    Args:
        report: is called at both times.
        sink: gets both as records.
    """

    def __init__(self, report: Report, sink: Sink | None) -> None:
        self._report = report
        self._sink = sink
        self._all: list[Notice] = []
        self._lasting: dict[tuple[str, Cause], int] = {}

    @property
    def all(self) -> tuple[Notice, ...]:
        """In the order in which they began."""
        return tuple(self._all)

    def lasting(self, source: str) -> dict[Cause, Finding]:
        """What a source has found that has not passed."""
        places = {cause: place for (known, cause), place in self._lasting.items() if known == source}
        return {cause: self._all[place].finding for cause, place in places.items()}

    def update(self, source: str, step: int, findings: Iterable[Finding]) -> None:
        """Take what a source finds now; what it found before itself, and does not now, has passed."""
        found = {finding.cause: finding for finding in findings}
        for cause, finding in found.items():
            if not any(known == cause for _, known in self._lasting):
                self._lasting[source, cause] = len(self._all)
                self._all.append(Notice(finding, step))
                self._tell(len(self._all) - 1, step)
        passed = [key for key in self._lasting if key[0] == source and key[1] not in found]
        for key in passed:
            place = self._lasting.pop(key)
            self._all[place] = replace(self._all[place], ended=step)
            self._tell(place, step)

    def _tell(self, place: int, step: int) -> None:
        notice = self._all[place]
        if self._sink is not None:
            self._sink.write("finding", step, {"id": place, **record(notice)})
        self._report(notice)


def record(notice: Notice) -> dict[str, Any]:
    """A notice as plain data; unlike in JSON, numbers that are not finite stay what they are.

    >>> record(Notice(Finding(Cause.PLATEAU, Severity.NOTE, "It rests."), 3))["cause"]
    'plateau'
    """
    finding = notice.finding
    return {
        "cause": finding.cause.value,
        "severity": finding.severity.name.lower(),
        "sentence": finding.sentence,
        "sites": finding.sites,
        "where": finding.where,
        "measured": finding.measured,
        "expected": finding.expected,
        "unit": finding.unit,
        "evidence": finding.evidence,
        "began": notice.began,
        "ended": notice.ended,
    }


def print_notice(notice: Notice) -> None:
    """On standard error: in full when it begins, a line when it ends; notes are not printed."""
    if notice.finding.severity is Severity.NOTE:
        return
    terminal = Terminal(stderr=True)
    if notice.ended is None:
        terminal.print(Text(f"gradmend, step {notice.began}", style="dim"), notice.finding)
    else:
        passed = f"gradmend, step {notice.ended}: {notice.finding.cause.title} has passed"
        terminal.print(Text(passed, style="dim"))
