"""Cards: what there is to say of each remedy, read from its docstring and its declarations."""

from __future__ import annotations

import inspect
import re
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from gradmend.causes import Cause
from gradmend.console import Printable
from gradmend.remedies import REMEDIES
from gradmend.remedies.base import Remedy

INTRUSION = (
    "data, loss or mode",
    "the way it trains, or its last layer",
    "initial weights",
    "gradient or regularization",
    "activations",
    "layers",
    "connections",
)
"""What remedies of the degrees 1 to 7 change, the least first."""


@dataclass(frozen=True)
class Card(Printable):
    """What there is to say of a remedy.

    Args:
        name: of its class.
        group: of its module.
        what: it does, in a sentence.
        about: when it helps and what it costs.
        parameters: by name, with what they mean.
        usual: its usual parameters, as in `REMEDIES`, where they are given.
        treats: the titles of the causes against which `mend` tries it.
        changes: how much of what the user built.
        source: author, year, link.

    Examples:
        >>> card(next(r for r in REMEDIES if type(r).__name__ == "ClipNorm")).what
        'Scale the whole gradient down when its norm exceeds a bound; its direction stays.'
    """

    name: str
    group: str
    what: str
    about: str
    parameters: dict[str, str]
    usual: tuple[str, ...]
    treats: tuple[str, ...]
    changes: str
    source: str

    @property
    def rows(self) -> tuple[tuple[str, str], ...]:
        """What is said under a heading of its own."""
        parameters = "; ".join(f"{name}: {text.rstrip('.')}" for name, text in self.parameters.items())
        rows = (
            ("Treats", ", ".join(self.treats)),
            ("Changes", self.changes),
            ("Parameters", parameters),
            ("Tried as", ", ".join(self.usual)),
            ("Source", self.source),
        )
        return tuple((key, text) for key, text in rows if text)

    def __rich__(self) -> RenderableType:
        rows = "".join(f"\n{key}: {text}" for key, text in self.rows)
        about = f"\n{self.about}\n" if self.about else ""
        return Text(f"{self.name}: {self.what}\n{about}{rows}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"remedy": self.name, **asdict(self)}


def card(remedy: Remedy) -> Card:
    """The card of a remedy, whatever its parameters."""
    kind = type(remedy)
    what, about, parameters, source = _read(inspect.getdoc(kind) or "")
    alike = [other for other in REMEDIES if type(other) is kind]
    return Card(
        name=kind.__name__,
        group=kind.__module__.rpartition(".")[2],
        what=what,
        about=about,
        parameters=parameters,
        usual=tuple(map(repr, alike)) if parameters else (),
        treats=tuple(cause.title for cause in Cause if cause in kind.treats),
        changes=f"{INTRUSION[kind.intrusion - 1]} ({kind.intrusion} of {len(INTRUSION)})",
        source=source,
    )


def cards() -> tuple[Card, ...]:
    """One for each kind of remedy, in the order in which `mend` tries them.

    >>> "Tailor" in {card.name for card in cards()}
    True
    """
    kinds = {type(remedy): remedy for remedy in reversed(REMEDIES)}
    return tuple(card(remedy) for remedy in reversed(kinds.values()))


def _read(text: str) -> tuple[str, str, dict[str, str], str]:
    """The parts of a docstring: its sentence, its prose, its arguments, its source."""
    first, *blocks = text.split("\n\n")
    prose = [block for block in blocks if not block.startswith(("Args:", "Source:"))]
    given = next((block for block in blocks if block.startswith("Args:")), "")
    source = next((block for block in blocks if block.startswith("Source:")), "")
    arguments = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", given, re.M)
    about = "\n\n".join(_joined(block) for block in prose)
    known = {name: _joined(meaning) for name, meaning in arguments}
    return _joined(first), about, known, _joined(source.removeprefix("Source:"))


def _joined(text: str) -> str:
    return " ".join(text.split())
