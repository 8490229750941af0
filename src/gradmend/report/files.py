"""Where pages are written: never over a file that is somebody else's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from gradmend.errors import GradmendError

MARKER: Final = '<meta name="generator" content="gradmend '
"""What a page of ours holds among its first characters."""

_HEAD: Final = 2000


def place(path: Path) -> Path:
    """Make sure, before the work begins, that a page can be written here.

    Args:
        path: of the file. A page of ours may be there already; it will be replaced.

    Returns:
        The same path.

    Raises:
        GradmendError: if there is a folder or somebody else's file, or no folder to write to.

    Examples:
        >>> place(Path("no such folder/out.html"))
        Traceback (most recent call last):
        gradmend.errors.GradmendError: There is no folder 'no such folder' for the report. Make it first, \
or choose another place.
    """
    folder = path.parent
    if path.is_dir():
        raise GradmendError(
            f"{str(path)!r} is a folder. Name a file in it, such as {str(path / 'out.html')!r}."
        )
    if not folder.is_dir():
        raise GradmendError(
            f"There is no folder {str(folder)!r} for the report. Make it first, or choose another place."
        )
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise GradmendError(f"The report cannot be written to {str(path)!r}: it is not writable.")
    if path.exists() and not _ours(path):
        raise GradmendError(
            f"{str(path)!r} is no page of gradmend, so it is not overwritten. "
            "Choose another name, or move the file away."
        )
    return path


def write(path: Path, text: str) -> None:
    """Write a page where `place` has found room."""
    place(path).write_text(text, encoding="utf-8")


def _ours(path: Path) -> bool:
    """An empty file holds nothing to lose."""
    with path.open("rb") as file:
        head = file.read(_HEAD).decode("utf-8", "replace")
    return not head or MARKER in head
