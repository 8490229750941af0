"""How nouns print themselves: one rich rendering serves the terminal, `print` and notebooks."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import Enum
from functools import partial
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.measure import Measurement
from rich.padding import Padding
from rich.segment import Segment
from rich.table import Column, Table
from rich.text import Text

from gradmend.errors import GradmendError, suggest
from gradmend.terminal import Terminal, one_line

WIDTH = 80
"""Columns where nobody says how many there are."""

_LONG_WORD, _GAP = 20, 2
"""Columns of a terminal: of a word that a table does not break; between two cells."""
_BLOCKS = " ▏▎▍▌▋▊▉█"


class Printable:
    """A noun with a `__rich__` form; `str()` and notebooks show the same."""

    def __rich__(self) -> RenderableType:
        """What a rich console shows; each noun gives its own."""
        return repr(self)

    def __str__(self) -> str:
        return plain(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: numbers, strings, lists; NaN and infinity become None."""
        data: dict[str, Any] = plain_data(self)
        return data

    def figures(self, dark: bool = False) -> dict[str, Any]:
        """The pictures that there are, by their names, the most telling first: plotly figures.

        Args:
            dark: for a dark background.
        """
        return {}

    def plot(self, name: str | None = None, dark: bool = False) -> Any:
        """One of the `figures`, as a `plotly.graph_objects.Figure`.

        Args:
            name: of the picture; by default the most telling one.
            dark: for a dark background.

        Raises:
            GradmendError: if there is no such picture, or none at all.
        """
        known = self.figures(dark)
        if not known:
            raise GradmendError("There is nothing here that could be drawn.")
        name = next(iter(known)) if name is None else name
        if name not in known:
            raise GradmendError(f"There is no picture {name!r} here. {suggest(name, known)}")
        return known[name]

    def _repr_html_(self) -> str:
        return html(self)


@dataclass(frozen=True)
class Fitted:
    """What is drawn for the width that it gets.

    Args:
        draw: makes it for so many columns.
    """

    draw: Callable[[int], RenderableType]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterable[RenderableType]:
        yield self.draw(options.max_width)


class PlainTable(Table):
    """A table without rules; columns that stay in one line are broken where they would leave no room."""

    def __init__(self) -> None:
        super().__init__(box=None, pad_edge=False, header_style="bold")

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterable[RenderableType | Segment]:
        """The lines, for so many columns of the terminal."""
        needed = sum(_needed(column, console, options) + _GAP for column in self.columns) - _GAP
        table = copy(self)
        if needed > options.max_width:
            table.columns = [replace(column, no_wrap=False) for column in self.columns]
        yield from Table.__rich_console__(table, console, options)


def _needed(column: Column, console: Console, options: ConsoleOptions) -> int:
    """Columns of the terminal: for the longest line, or the longest word if that is not too long."""
    sizes = [Measurement.get(console, options, cell) for cell in (column.header, *column.cells)]
    if column.no_wrap:
        return max(size.maximum for size in sizes)
    return min(_LONG_WORD, max(size.minimum for size in sizes))


def plain(*renderables: RenderableType, width: int | None = None) -> str:
    """Render without colour, for where `print` goes.

    Args:
        renderables: to be shown one below the other.
        width: in columns; that of the terminal if nothing is said, but no more than 80.
    """
    out, file = Terminal(force_jupyter=False), io.StringIO()
    width = width or (min(WIDTH, out.width) if out.is_terminal else WIDTH)
    terminal = Terminal(out.encoding, width=width, file=file, color_system=None, force_jupyter=False)
    for renderable in renderables:
        terminal.print(renderable)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def html(renderable: RenderableType) -> str:
    """For a notebook, light or dark: coloured text that takes the colours of the page for the rest."""
    terminal = Terminal("utf-8", width=100, file=io.StringIO(), record=True, force_jupyter=False)
    terminal.print(renderable)
    return terminal.export_html(inline_styles=True, code_format=_HTML)


_HTML = '<pre style="white-space:pre;overflow-x:auto;line-height:1.2">{code}</pre>'


def bar(value: float, low: float, high: float, width: int = 20) -> str:
    """A horizontal bar for `value` between `low` (empty) and `high` (full).

    >>> bar(0.5, 0.0, 1.0, width=4)
    '██  '
    """
    if not math.isfinite(value) or high <= low:
        return " " * width
    eighths = round(max(0.0, min(1.0, (value - low) / (high - low))) * width * 8)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (_BLOCKS[rest] if rest else "")).ljust(width)


def number(value: float | None, digits: int = 3) -> str:
    """A number as people read it: few digits, scientific only when small or large.

    >>> [number(v) for v in (0.12345, 123456.0, 3.2e-19, None, math.nan)]
    ['0.123', '1.23e+05', '3.2e-19', '-', '-']
    """
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}g}"


def shortened(name: str, width: int) -> str:
    """A name in at most so many columns: both ends, and the numbers that tell layers apart.

    >>> shortened("transformer.h.11.attn.c_proj", 24), shortened("transformer.h.11.attn.c_proj", 16)
    ('transform…11.attn.c_proj', 'transf…11…c_proj')
    """
    parts = _SEPARATOR.split(one_line(name))
    for place in range(0, len(parts) - 1, 2):
        if place and not parts[place].isdigit():
            parts[place] = "…"
        text = _joined(parts)
        begin, over = text.find("…"), max(0, cell_len(text) - width)
        if over == 0 or begin - over >= _HEAD:
            return _head(text, begin - over) + text[begin:] if over else text
    return _fitted(_joined(parts), width)


_HEAD = 2
_SEPARATOR = re.compile(r"([./\\])")
_LEFT_OUT = re.compile(r"[./\\]*…[./\\…]*")


def _joined(parts: Sequence[str]) -> str:
    return _LEFT_OUT.sub("…", "".join(parts))


def _fitted(text: str, width: int) -> str:
    """Its first third and the rest from its end, no number in two."""
    if cell_len(text) <= width:
        return text
    tail = set_cell_size(text[::-1], 2 * (width - 1) // 3)[::-1].strip()
    tail = tail.lstrip("0123456789") if text[-len(tail) - 1].isdigit() else tail
    head = _head(text, max(0, width - 1 - cell_len(tail)))
    return _LEFT_OUT.sub("…", f"{head}…{tail}")


def _head(text: str, width: int) -> str:
    head = set_cell_size(text, width).rstrip()
    return head.rstrip("0123456789") if text[len(head)].isdigit() else head


def listed(rows: Iterable[tuple[str, str]]) -> RenderableType:
    """Names, never cut, and what there is to say of each: beside it, or below it where that is narrow."""
    return Fitted(partial(_listed, tuple(rows)))


def _listed(rows: Sequence[tuple[str, str]], width: int) -> RenderableType:
    if max((cell_len(name) for name, _ in rows), default=0) > width // 2:
        return Group(*(Group(name, Padding(Text(words), (0, 0, 0, 2))) for name, words in rows))
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    for name, words in rows:
        table.add_row(name, Text(words))
    return table


def bullets(sentences: Iterable[str]) -> RenderableType:
    """Sentences as a list."""
    table = Table.grid(padding=(0, 1))
    for sentence in sentences:
        table.add_row("-", Text(one_line(sentence)))
    return table if table.rows else Group()


def lines(items: Sequence[str], most: int = 4) -> str:
    """A short list in words: the first few, then how many more.

    >>> lines(["a", "b", "c"], most=2)
    'a, b and 1 more'
    """
    shown = ", ".join(items[:most])
    return shown if len(items) <= most else f"{shown} and {len(items) - most} more"


def plain_data(value: Any) -> Any:
    """Records, enumerations and functions as plain data that JSON can hold.

    >>> plain_data((1, float("nan"), math.sqrt))
    [1, None, 'sqrt']
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain_data(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Enum):
        return value.name.lower()
    if isinstance(value, Mapping):
        return {str(key): plain_data(item) for key, item in value.items()}
    if isinstance(value, (tuple, list, frozenset)):
        return [plain_data(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return getattr(value, "__name__", None) or repr(value)
