"""What a page is made of: records without behaviour."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from plotly.graph_objects import Figure

TONES = ("error", "warning", "note", "good")
"""How bad it is what is told."""


@dataclass(frozen=True)
class Code:
    """Text to be copied as it is.

    Args:
        text: shown in a fixed width, with a button that copies it.
        words: what it is.
    """

    text: str
    words: str = ""


@dataclass(frozen=True)
class Card:
    """Something found.

    Args:
        head: what.
        tone: one of `TONES`.
        lines: sentences about it.
        where: `file:line`, each.
        more: label and text of what is folded away.
        facts: label and text of what is told in a word.
    """

    head: str
    tone: str
    lines: tuple[str, ...] = ()
    where: tuple[str, ...] = ()
    more: tuple[tuple[str, str], ...] = ()
    facts: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Table:
    """Rows under headings.

    Args:
        headings: of the columns.
        rows: each as long as the headings; the first cell names the row.
        words: what it is.
    """

    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: str = ""


@dataclass(frozen=True)
class Dial:
    """Figures of which one is shown, chosen by dials: sliders for numbers, lists for words.

    Args:
        dials: the name of each dial, and its choices; the first ones are chosen to begin with.
        figures: by a tuple of the choices of all dials, in their order.
        words: what the dials are for.
    """

    dials: Mapping[str, tuple[str, ...]]
    figures: Mapping[Any, Figure]
    words: str = ""


@dataclass(frozen=True)
class Links:
    """Where to read on.

    Args:
        rows: an address, which is that of a file beside the page or begins with https; what is there; and a
            sentence about it.
    """

    rows: tuple[tuple[str, str, str], ...]


Part: TypeAlias = str | Figure | Code | Card | Table | Dial | Links
"""A text is a paragraph."""


@dataclass(frozen=True)
class Section:
    """Parts under a heading."""

    title: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Page:
    """A report.

    Args:
        title: of what.
        verdict: the result in one sentence.
        tone: of the verdict, one of `TONES`.
        sections: from top to bottom.
        notes: what else is to be known, at the end.
        command: that makes this page again.
        ways: addresses and titles of the pages beside it, this one among them without an address.
    """

    title: str
    verdict: str
    tone: str
    sections: tuple[Section, ...]
    notes: tuple[str, ...] = ()
    command: str = ""
    ways: tuple[tuple[str, str], ...] = ()
