"""View: what journals hold, in the browser, also while trainings still write them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from gradmend.errors import MissingExtraError

__all__ = ["serve"]

_PRINT = partial(print, flush=True)
"""It runs on for hours, and a pipe would keep the address until the end."""


def serve(
    paths: Sequence[Path | str],
    port: int = 0,
    browse: bool = True,
    told: Callable[[str], None] = _PRINT,
) -> None:
    """Show journals in the browser until Ctrl-C. Only this machine and who knows the address can see them.

    Args:
        paths: of the journals.
        port: of 127.0.0.1; 0 is any that is free.
        browse: whether to open the browser.
        told: gets the address, in a sentence.

    Raises:
        JournalError: if a file is no journal that can be read.
        MissingExtraError: without starlette and uvicorn.
        GradmendError: if the port is taken.
    """
    try:
        from gradmend.view.server import run
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "starlette", "view", "The live view") from None
    run([Path(path) for path in paths], port, browse, told)
