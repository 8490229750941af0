"""Attach: watching a script that does not know of it."""

from __future__ import annotations

import atexit
import os
import sys

from gradmend.attach.report import say, sum_up, without_us
from gradmend.attach.trainings import Trainings
from gradmend.journal import Journal, JournalError, Recording

__all__ = ["attach"]


def attach(journal: str, command: str, treat: bool = False) -> None:
    """Watch every training of this process from now on, and sum up on standard error at its end.

    Of a training on several processes each is watched, and the first one speaks for all. A journal that
    cannot be written is said, and the training goes on.

    Args:
        journal: the file to record to; nothing if it is empty.
        command: that was typed.
        treat: whether to act on what is found.
    """
    if os.environ.get("RANK", "0") == "0":
        sys.excepthook = without_us(sys.excepthook)
        recording = _recording(journal, command)
        atexit.register(_end, Trainings(recording, treat), recording, os.getpid())
    else:
        atexit.register(Trainings(None).end)


def _end(trainings: Trainings, recording: Recording | None, process: int) -> None:
    if os.getpid() != process:  # a child made by fork
        return
    failure = getattr(sys, "last_type", None)
    trainings.end(failure is not None and issubclass(failure, Exception))
    sum_up(trainings.watches)
    if recording is not None:
        recording.close("ended" if failure is None else failure.__name__)


def _recording(journal: str, command: str) -> Recording | None:
    if not journal:
        return None
    try:
        return Journal(journal).run(command=command)
    except JournalError as error:
        say(f"gradmend: {error} The training goes on, but is not recorded.\n")
        return None
