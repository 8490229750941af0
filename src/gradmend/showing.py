"""The commands that show: `view` and `atlas`; and the report that other commands write."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradmend.errors import GradmendError, suggest
from gradmend.language import LANGUAGES

if TYPE_CHECKING:
    from gradmend.report.page import Page

ReportOption = Annotated[
    Path | None, typer.Option("--report", metavar="FILE", help="Write a page with pictures: out.html.")
]
LangOption = Annotated[str, typer.Option("--lang", help=f"Of the page: {' or '.join(LANGUAGES)}.")]

_USUAL = {
    "device": "cpu",
    "seed": 0,
    "steps": 200,
    "seconds": 120,
    "trials": 50,
    "workers": "local",
    "lang": "en",
}


@dataclass(frozen=True)
class Order:
    """A page that was asked for.

    Args:
        path: to write it to, where there is room.
        lang: of its words.
    """

    path: Path
    lang: str

    def fill(self, page: Page, command: str) -> str:
        """Write the page, and into it the command that made it; says where it is."""
        from gradmend.report.files import write
        from gradmend.report.page import render

        write(self.path, render(replace(page, command=command), self.lang))
        return f"The report is in {self.path}."


def ordered(path: Path | None, lang: str) -> Order | None:
    """The page that is asked for, if one is; whether it can be written is found out before the work.

    Raises:
        GradmendError: if it cannot be written there, or there is no such language.

    Examples:
        >>> ordered(Path("report.html"), "zh")
        Order(path=PosixPath('report.html'), lang='zh')
    """
    from gradmend.report.files import place

    if lang not in LANGUAGES:
        raise GradmendError(f"There is no language {lang!r}. {suggest(lang, LANGUAGES)}")
    return None if path is None else Order(place(path), lang)


def again(command: str, target: str, wishes: Mapping[str, Any]) -> str:
    """The command line of another command with the same options.

    >>> again("mend", "my net.keras", {"data": "a.npz", "loss": None, "seed": 0, "device": "cpu"})
    "gradmend mend 'my net.keras' --data a.npz"
    """
    asked = [
        (name, value) for name, value in wishes.items() if value is not None and _USUAL.get(name) != value
    ]
    return shlex.join(["gradmend", command, target, *(x for n, v in asked for x in (f"--{n}", str(v)))])


def view(
    journals: Annotated[list[Path], typer.Argument(metavar="JOURNAL...", help="Such as run.gradmend.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of this machine; 0: any that is free.")] = 0,
    browse: Annotated[bool, typer.Option("--open/--no-open", help="Open it in the browser.")] = True,
) -> None:
    """Show what journals hold in the browser, also while trainings still write them. Ctrl-C ends it."""
    from gradmend.view import serve

    serve(journals, port=port, browse=browse)


def atlas(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="For the pages; index.html is the first.")],
    lang: LangOption = "en",
) -> None:
    """Write a small site that shows, by measurements, why deep networks do or do not learn."""
    from gradmend.atlas import build

    pages = build(folder, lang, report=lambda text: typer.echo(text, err=True))
    typer.echo(f"{len(pages)} pages; open {folder / 'index.html'}")
