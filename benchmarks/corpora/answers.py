"""What a tool says of a case, and the file of JSON lines that keeps it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from benchmarks.corpora.cases import Json, Truth


class Level(IntEnum):
    """How bad a tool says that it is. Notes blame nothing."""

    NOTE = 0
    WARNING = 1
    ERROR = 2


@dataclass(frozen=True)
class Claim:
    """One finding of a tool.

    Args:
        rule: the tool's own name of what it found.
        level: how bad.
        parts: the parts of the setup to blame; gradmend names one, a peer what its advice would change.
        sentence: what it says.
    """

    rule: str
    level: Level
    parts: tuple[str, ...]
    sentence: str = ""


@dataclass(frozen=True)
class Answer:
    """All that a tool said of a case.

    Args:
        status: "ran", "not built" or "failed".
        problem: why it did not run.
        claims: the worst first, as the tool orders them.
        seconds: of the tool, in CPU time.
        step_seconds: of one plain forward and backward step of the case.
        own_step: whether the loss has a weight penalty.
        stand_in: whether the data only resemble the program's own.
    """

    truth: Truth
    tool: str
    status: str
    problem: str = ""
    claims: tuple[Claim, ...] = ()
    seconds: float = 0.0
    step_seconds: float = 0.0
    own_step: bool = False
    stand_in: bool = False

    def alarm(self, level: Level) -> bool:
        """Whether something at least so bad was found; a tool that failed raises none."""
        return any(claim.level >= level for claim in self.claims)

    @property
    def blamed(self) -> tuple[Claim, ...]:
        """The claims that blame something: warnings and errors."""
        return tuple(claim for claim in self.claims if claim.level >= Level.WARNING)


def to_line(found: Any) -> str:
    """A record, such as an answer, as one line of JSON with its end."""
    return json.dumps(asdict(found)) + "\n"


def read(paths: Iterable[Path]) -> list[Answer]:
    """The answers in these files."""
    lines = (line for path in paths for line in path.read_text().splitlines())
    return [_answer(json.loads(line)) for line in lines]


def _answer(row: Json) -> Answer:
    claims = [
        Claim(c["rule"], Level(c["level"]), tuple(c["parts"]), c["sentence"]) for c in row.pop("claims")
    ]
    return Answer(truth=to_truth(row.pop("truth")), claims=tuple(claims), **row)


def to_truth(row: Json) -> Truth:
    """What is known of a case, from plain data."""
    return Truth(**{**row, "faults": tuple(row["faults"]), "parts": tuple(row["parts"])})
