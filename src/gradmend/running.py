"""The commands on trainings that run, and on those that are recorded: `run` and `export`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from shlex import join
from typing import Annotated, NoReturn

import typer

from gradmend.errors import TargetError, suggest
from gradmend.language import LANGUAGES, translated

AS_TYPED = {"ignore_unknown_options": True, "allow_interspersed_args": False}
"""What follows the script is the script's."""

_STARTUP = Path(__file__).with_name("startup")


def run(
    script: Annotated[str, typer.Argument(metavar="SCRIPT", help="Your training: train.py.")],
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="ARGS", help="Of the script, as without gradmend.")
    ] = None,
    module: Annotated[bool, typer.Option("-m", help="SCRIPT is a module: package.train.")] = False,
    journal: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Record the training, such as in run.gradmend.")
    ] = None,
    treat: Annotated[
        bool, typer.Option("--treat", help="Act on findings that can be treated while it runs, and say so.")
    ] = False,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page with pictures at its end: out.html.")
    ] = None,
    lang: Annotated[str, typer.Option(help=f"Of the page: {' or '.join(LANGUAGES)}.")] = "en",
) -> None:
    """Run a training script as it is and watch it: findings as they appear, and a summary, on stderr.

    Its numbers, stdout and exit code are as without gradmend. Also: torchrun -m gradmend run train.py
    """
    if not module and not Path(script).exists():
        near = [str(path) for path in sorted(Path(script).parent.glob("*.py"))]
        raise TargetError(f"There is no file {script!r}. {suggest(script, near)}")
    translated("", lang)  # complains of a language that there is not
    if report is not None:
        from gradmend.report.files import place

        place(report)
    start(["-m", script] if module else [script], arguments or [], journal, treat, report, lang)


def start(
    script: list[str],
    arguments: list[str],
    journal: Path | None,
    treat: bool = False,
    report: Path | None = None,
    lang: str = "en",
) -> NoReturn:
    """Become a Python that runs the script and watches it.

    Args:
        script: what to tell Python: a file, or `-m` and a module.
        arguments: of the script.
        journal: to record to.
        treat: whether to act on what is found.
        report: where to write a page at the end.
        lang: of the page.
    """
    command = [sys.executable, *script, *arguments]
    original = os.environ.get("PYTHONPATH", "")
    told = {
        "PYTHONPATH": os.pathsep.join([str(_STARTUP), *([original] if original else [])]),
        "GRADMEND_PYTHONPATH": original,
        "GRADMEND_COMMAND": join(["python", *command[1:]]),
        "GRADMEND_JOURNAL": "" if journal is None else str(journal.absolute()),
        "GRADMEND_TREAT": "1" if treat else "",
        "GRADMEND_REPORT": "" if report is None else str(report.absolute()),
        "GRADMEND_LANG": lang,
    }
    sys.stdout.flush()
    os.execve(sys.executable, command, {**os.environ, **told})


def export(
    journal: Annotated[Path, typer.Argument(metavar="JOURNAL", help="Such as run.gradmend.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="For the files, one for each table.")],
    kind: Annotated[str, typer.Option("--format", help="csv or parquet.")] = "csv",
) -> None:
    """Write the tables of a journal as CSV or Parquet."""
    from gradmend.journal import Journal
    from gradmend.journal.export import export

    for file in export(Journal(journal), folder, kind):
        typer.echo(file)
