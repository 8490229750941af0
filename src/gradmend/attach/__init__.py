"""Attach: watching a script that does not know of it."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from gradmend.attach.page import write_page
from gradmend.attach.report import say, sum_up, without_us
from gradmend.attach.trainings import Trainings
from gradmend.journal import Journal, JournalError, Recording

__all__ = ["attach"]


def attach(journal: str, command: str, treat: bool = False, report: str = "", lang: str = "en") -> None:
    """Watch every training of this process from now on, and sum up on standard error at its end.

    Of a training on several processes each is watched, and the first one speaks for all. A journal that
    cannot be written is said, and the training goes on.

    Args:
        journal: the file to record to; nothing if it is empty.
        command: that was typed.
        treat: whether to act on what is found.
        report: the page to write at the end; nothing if it is empty.
        lang: of the page.
    """
    if os.environ.get("RANK", "0") == "0":
        sys.excepthook = without_us(sys.excepthook)
        folder = tempfile.mkdtemp(prefix="gradmend-") if report and not journal else ""
        recording = _recording(journal or (folder and str(Path(folder, "run.gradmend"))), command)
        page = partial(write_page, Path(report), lang, command) if report else None
        atexit.register(_end, Trainings(recording, treat), recording, os.getpid(), page, folder)
    else:
        atexit.register(Trainings(None).end)


def _end(
    trainings: Trainings,
    recording: Recording | None,
    process: int,
    page: Callable[[Path, int], None] | None,
    folder: str,
) -> None:
    if os.getpid() != process:  # a child made by fork
        return
    failure = getattr(sys, "last_type", None)
    trainings.end(failure is not None and issubclass(failure, Exception))
    sum_up(trainings.watches)
    if recording is not None:
        recording.close("ended" if failure is None else failure.__name__)
        if page is not None:
            page(recording.path, recording.run)
            _end_as_before(failure)
    if folder:
        shutil.rmtree(folder, ignore_errors=True)


def _end_as_before(failure: type[BaseException] | None) -> None:
    """Have Python end by the signal of Ctrl-C: it does if the last text that it ran was interrupted.

    Modules that were imported meanwhile, such as those with named tuples, have run some.
    """
    if failure is KeyboardInterrupt:
        with suppress(KeyboardInterrupt):
            exec("raise KeyboardInterrupt")


def _recording(journal: str, command: str) -> Recording | None:
    if not journal:
        return None
    try:
        return Journal(journal).run(command=command)
    except JournalError as error:
        say(f"gradmend: {error} The training goes on, but is not recorded.\n")
        return None
