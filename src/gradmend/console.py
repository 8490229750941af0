"""How nouns print themselves: one rich rendering serves the terminal, `print` and notebooks."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

from rich.console import Console, RenderableType

WIDTH = 80
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

    def _repr_html_(self) -> str:
        console = Console(record=True, width=100, file=io.StringIO())
        console.print(self)
        return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")


def plain(*renderables: RenderableType, width: int = WIDTH) -> str:
    """Render without colour, at most `width` columns wide."""
    console = Console(width=width, file=io.StringIO(), color_system=None, legacy_windows=False)
    for renderable in renderables:
        console.print(renderable)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines())


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
