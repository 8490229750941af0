"""Words that all pages of the atlas share: how a page is put together, and where it says what it took."""

from __future__ import annotations

from gradmend.report.parts import Links, Page, Section

COMMAND = "gradmend atlas out/"
TITLE = "Atlas of deep learning"


def sheet(title: str, verdict: str, *sections: Section) -> Page:
    """One page of the atlas.

    Args:
        title: of what.
        verdict: what is to be learnt, in a sentence or two.
        sections: from top to bottom; the last one holds the sources.

    >>> sheet("Slopes", "They multiply.").command
    'gradmend atlas out/'
    """
    return Page(title, verdict, "note", sections, command=COMMAND)


def sources(*rows: tuple[str, str]) -> Section:
    """Where to read on: (authors, title, year) and the address, each."""
    return Section("Sources", (Links(tuple((address, words, "") for words, address in rows)),))
