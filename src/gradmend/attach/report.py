"""What is said of a watched script, and what is kept out of what Python says of it."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.text import Text

from gradmend.console import lines, number
from gradmend.diagnosis import Severity
from gradmend.terminal import GREEN, RED, Terminal, one_line
from gradmend.watch import Watch

_HERE = str(Path(__file__).parents[1]) + "/"


def say(text: str) -> None:
    """Write to standard error, if there is one."""
    with suppress(OSError, ValueError, AttributeError):  # stderr may be closed, or None
        sys.stderr.write(text)


def sum_up(watches: Mapping[str, Watch]) -> None:
    """Say on standard error what became of each model."""
    terminal = Terminal(stderr=True, soft_wrap=True)
    stepped = {name: watch for name, watch in watches.items() if watch.step or watch.findings}
    with terminal.capture() as said:  # rich itself ends the process where stderr is closed
        for name, watch in stepped.items():
            terminal.print(_summary(name, watch))
        if not stepped:
            terminal.print("gradmend: no optimizer of torch made a step, so nothing was watched.")
    say(said.get())


def _summary(name: str, watch: Watch) -> Text:
    """A line on the training of one model."""
    found = [notice for notice in watch.findings if notice.finding.severity > Severity.NOTE]
    lasting = [notice.finding.cause.title for notice in found if notice.ended is None]
    passed = [notice.finding.cause.title for notice in found if notice.ended is not None]
    text = Text.assemble(
        (f"gradmend: {one_line(name)}", "bold"), f", {watch.step} steps, last loss {_loss(watch.loss)}: "
    )
    text.append(lines(lasting) if lasting else "nothing found", f"bold {RED if lasting else GREEN}")
    text.append(f" (passed: {lines(passed)})" if passed else "")
    return text.append(f", {len(watch.acts)} treatments" if watch.acts else "")


def _loss(loss: float | None) -> str:
    return number(loss, 4) if loss is None or math.isfinite(loss) else str(loss)


def without_us(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Show tracebacks as they are without gradmend."""

    def excepthook(kind: type[BaseException], error: BaseException, _: TracebackType | None) -> None:
        shown: BaseException | None = error
        seen: set[int] = set()
        while shown is not None and id(shown) not in seen:
            seen.add(id(shown))
            shown.__traceback__ = _theirs(shown.__traceback__)
            shown = shown.__cause__ or shown.__context__
        hook(kind, error, error.__traceback__)

    return excepthook


def _theirs(trace: TracebackType | None) -> TracebackType | None:
    """The traceback without the frames of gradmend."""
    links = []
    while trace is not None:
        if not trace.tb_frame.f_code.co_filename.startswith(_HERE):
            links.append(trace)
        trace = trace.tb_next
    for link, following in zip(links, [*links[1:], None], strict=True):
        link.tb_next = following
    return links[0] if links else None
