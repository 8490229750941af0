"""Findings and the diagnosis that holds them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from gradmend.causes import Cause
from gradmend.console import Printable, lines, number, plain_data
from gradmend.diagnosis.prognosis import Prognosis
from gradmend.profile import Profile, depth_picture
from gradmend.readings import Reading


class Severity(IntEnum):
    """How bad a finding is. Only errors make a setup unhealthy."""

    NOTE = 0
    WARNING = 1
    ERROR = 2


_HARDLY = 0.1
"""A probability to train that is less than this goes into the verdict."""

_STYLES = {Severity.NOTE: "dim", Severity.WARNING: "yellow", Severity.ERROR: "bold red"}


@dataclass(frozen=True)
class Finding(Printable):
    """A cause, where it shows, and the evidence.

    Args:
        cause: what is wrong.
        severity: how bad it is.
        sentence: what was seen here, in one plain sentence.
        measured: the number that was measured.
        expected: what it should be, or what theory predicts for a sound network.
        unit: of both.
        sites: names of the sites or parameters concerned.
        where: `file:line` in the user's code, as far as known.
        evidence: what experiments on a copy of the step have shown, a sentence each.
    """

    cause: Cause
    severity: Severity
    sentence: str
    measured: float | None = None
    expected: float | None = None
    unit: str = ""
    sites: tuple[str, ...] = ()
    where: tuple[str, ...] = ()
    evidence: tuple[str, ...] = ()

    def __rich__(self) -> RenderableType:
        head = Text.assemble(
            (f"{self.severity.name.lower():8}", _STYLES[self.severity]),
            (self.cause.title, "bold"),
            no_wrap=True,
            overflow="ellipsis",
        )
        if self.sites:
            head.append(f"  at {lines(self.sites)}")
        details = [self.sentence]
        if self.measured is not None:
            against = f", expected {number(self.expected)}" if self.expected is not None else ""
            details.append(f"measured {number(self.measured)}{against} ({self.unit})")
        details.extend(self.evidence)
        if self.where:
            details.append(lines([_short(line) for line in self.where]))
        return Group(head, *(Padding(Text(detail), (0, 0, 0, 8)) for detail in details))


@dataclass(frozen=True)
class Diagnosis(Printable):
    """What was measured and what is wrong: the worst first, roots before their symptoms."""

    profile: Profile
    findings: tuple[Finding, ...]
    prognosis: Prognosis | None = None

    @property
    def healthy(self) -> bool:
        """Whether nothing was found that keeps the setup from training."""
        return all(finding.severity < Severity.ERROR for finding in self.findings)

    @property
    def causes(self) -> frozenset[Cause]:
        """The causes of all errors."""
        return frozenset(f.cause for f in self.findings if f.severity is Severity.ERROR)

    @property
    def verdict(self) -> str:
        """The result in one sentence."""
        errors = [f for f in self.findings if f.severity is Severity.ERROR]
        if errors:
            return f"This setup will hardly train: {errors[0].cause.title}."
        if self.doubtful:
            return "Nothing is broken, but as it stands this setup will hardly train."
        if self.findings:
            worst = self.findings[0]
            remark = "remarks" if worst.severity is Severity.NOTE else "a warning"
            return f"Healthy, with {remark}: {worst.cause.title}."
        return "Healthy: nothing found."

    @property
    def doubtful(self) -> bool:
        """Whether the prognosis is that it will hardly train."""
        return self.prognosis is not None and self.prognosis.probability < _HARDLY

    def __rich__(self) -> RenderableType:
        good = "bold yellow" if self.doubtful else "bold green"
        verdict = Text(self.verdict, style=good if self.healthy else "bold red")
        notes = [] if self.prognosis is None else [Text(self.prognosis.sentence)]
        if (tried := self.profile.tried) is not None:
            notes.append(Text(f"A step takes long: steps were tried on {tried} samples of each batch."))
        return Group(depth_picture(self.profile), Text(), *self.findings, Text(), *notes, verdict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: numbers, strings, lists; NaN and infinity become None."""
        return {
            "healthy": self.healthy,
            "verdict": self.verdict,
            "findings": plain_data(self.findings),
            "prognosis": None if self.prognosis is None else self.prognosis.to_dict(),
            "profile": self.profile.to_dict(),
        }


def where(readings: Iterable[Reading]) -> tuple[str, ...]:
    """The lines of the user's code that made these sites, each once."""
    return tuple(dict.fromkeys(r.site.line for r in readings if r.site.line))


def _short(line: str) -> str:
    """`file:line` relative to where the user stands, if it lies below."""
    here = str(Path.cwd()) + "/"
    return line.removeprefix(here)
