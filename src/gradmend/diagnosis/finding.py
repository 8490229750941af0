"""Findings and the diagnosis that holds them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from gradmend.causes import Cause
from gradmend.console import Fitted, Printable, lines, number, plain_data, shortened
from gradmend.diagnosis.prognosis import Prognosis
from gradmend.profile import Profile, depth_picture
from gradmend.readings import Reading
from gradmend.terminal import GREEN, ORANGE, RED, one_line

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from gradmend.pictures.depth import Mark


class Severity(IntEnum):
    """How bad a finding is. Only errors make a setup unhealthy."""

    NOTE = 0
    WARNING = 1
    ERROR = 2


_HARDLY = 0.1
"""A probability to train that is less than this goes into the verdict."""

_STYLES = {Severity.NOTE: "dim", Severity.WARNING: ORANGE, Severity.ERROR: f"bold {RED}"}
_INDENT, _MOST = 8, 4


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

    @property
    def numbers(self) -> str:
        """What was measured against what is expected, in words; "" if nothing was.

        Examples:
            >>> Finding(Cause.PLATEAU, Severity.NOTE, "It rests.", 1.5, 1.0, "loss").numbers
            '1.5, expected 1 (loss)'
        """
        if self.measured is None:
            return ""
        against = f", expected {number(self.expected)}" if self.expected is not None else ""
        return f"{number(self.measured)}{against}" + (f" ({self.unit})" if self.unit else "")

    @property
    def places(self) -> tuple[str, ...]:
        """`where`, relative to where the user stands if it lies below."""
        return tuple(line.removeprefix(f"{Path.cwd()}/") for line in self.where)

    def __rich__(self) -> RenderableType:
        return Fitted(self._lines)

    def _lines(self, width: int) -> RenderableType:
        head = Text.assemble(
            (f"{self.severity.name.lower():{_INDENT}}", _STYLES[self.severity]), (self.cause.title, "bold")
        )
        places = _fitting(self.sites, width - head.cell_len - len("  at "))
        head.append(f"  at {places}" if places else "")
        below = [shortened(name, width - _INDENT - 1) for name in self.sites if not places]
        details = [f"at {lines(below, 1)}"] if below else []
        details.append(one_line(self.sentence))
        details.extend([f"measured {self.numbers}"] if self.numbers else [])
        details.extend(map(one_line, self.evidence))
        if self.where:
            details.append(lines([shortened(line, width - _INDENT - 1) for line in self.places]))
        return Group(head, *(Padding(Text(detail), (0, 0, 0, _INDENT)) for detail in details))


@dataclass(frozen=True)
class Diagnosis(Printable):
    """What was measured and what is wrong: the worst first, roots before their symptoms.

    Args:
        profile: what was measured.
        findings: what is wrong.
        prognosis: whether it will train.
        lacked: what was left out because there was not enough memory for it.
    """

    profile: Profile
    findings: tuple[Finding, ...]
    prognosis: Prognosis | None = None
    lacked: tuple[str, ...] = ()

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

    @property
    def limits(self) -> tuple[str, ...]:
        """What time or memory did not suffice for, a sentence each."""
        tried, lacked = self.profile.tried, ", ".join(self.lacked)
        held = {
            f"A step takes long: steps were tried on {tried} samples of each batch.": tried,
            f"Left out, as there was not enough memory: {lacked}.": lacked,
        }
        return tuple(sentence for sentence, told in held.items() if told)

    def __rich__(self) -> RenderableType:
        colour = (ORANGE if self.doubtful else GREEN) if self.healthy else RED
        verdict = Text(self.verdict, style=f"bold {colour}")
        told = [] if self.prognosis is None else [self.prognosis.sentence]
        notes = map(Text, (*told, *self.limits))
        found: list[RenderableType] = [Text(), *self.findings] if self.findings else []
        return Group(depth_picture(self.profile), *found, Text(), *notes, verdict)

    @property
    def marks(self) -> tuple[Mark, ...]:
        """The findings that have a place in the network, for pictures of it."""
        from gradmend.pictures.depth import Mark

        placed = [finding for finding in self.findings if finding.sites]
        return tuple(Mark(f.cause.title, f.severity.name.lower(), frozenset(f.sites)) for f in placed)

    def figures(self, dark: bool = False) -> dict[str, Figure]:
        """The pictures that there are, by their names, the most telling first.

        Args:
            dark: for a dark background.
        """
        from gradmend.portrait import portraits

        return portraits({"": self.profile.portrait}, self.marks, dark)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: numbers, strings, lists; NaN and infinity become None."""
        return {
            "healthy": self.healthy,
            "verdict": self.verdict,
            "findings": plain_data(self.findings),
            "lacked": list(self.lacked),
            "prognosis": None if self.prognosis is None else self.prognosis.to_dict(),
            "profile": self.profile.to_dict(),
        }


def where(readings: Iterable[Reading]) -> tuple[str, ...]:
    """The lines of the user's code that made these sites, each once."""
    return tuple(dict.fromkeys(r.site.line for r in readings if r.site.line))


def _fitting(names: Sequence[str], width: int) -> str:
    """As many names as there is room for, and how many more there are; "" where there is none for one."""
    told = (lines([one_line(name) for name in names], most) for most in range(_MOST, 0, -1))
    return next((text for text in told if cell_len(text) <= width), "")
