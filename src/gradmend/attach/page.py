"""The page of a watched script, written when it has ended."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from gradmend.attach.report import say


def write_page(place: Path, lang: str, command: str, journal: Path, run: int) -> None:
    """Write the page of a run. What goes wrong is said and harms nobody.

    Args:
        place: of the page.
        lang: of its words.
        command: that was typed.
        journal: that holds the run.
        run: its number.
    """
    try:
        from gradmend.journal import Journal
        from gradmend.recorded import read_recorded
        from gradmend.report.files import write
        from gradmend.report.page import render
        from gradmend.report.run import page_of

        runs = read_recorded(Journal(journal), [run]).runs
        write(place, render(replace(page_of(runs, command), command=command), lang))
        say(f"gradmend: the report is in {place}\n")
    except (Exception, KeyboardInterrupt) as error:
        say(f"gradmend: no report was written: {type(error).__name__}: {error}\n")
