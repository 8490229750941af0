"""The terminal: wherever nouns print themselves, in the characters and the colours that there are."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Final

from rich.cells import cell_len
from rich.console import Console, ConsoleDimensions, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text
from rich.theme import Theme

WIDEST: Final = 120
"""The most columns that are used: longer lines are hard to read."""

GREEN, RED, ORANGE, BLUE = "color(28)", "color(196)", "color(130)", "color(31)"
"""Colours that can be read on white and on black."""

_THEME = Theme(
    {"bar.complete": BLUE, "bar.finished": GREEN, "progress.remaining": BLUE, "rule.line": "dim"},
    inherit=True,
)
_STAND_INS = dict(zip("█▉▊▋▌▍▎▏◆·…–—", "#####   o.~--", strict=True))
_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_BREAKING = re.compile("[\t\n]|" + _STEERING.pattern)
_PICTURES, _DELETE, _UNKNOWN = 0x2400, "\u2421", "\ufffd"


class Terminal(Console):
    """Prints nouns wherever it leads: to a wide or a narrow terminal, a file, a pipe, a log.

    Nothing is taken for markup, and what the encoding lacks is replaced by what it has. There are no codes
    for colours where `NO_COLOR` is set or nobody would see them; `FORCE_COLOR` brings them back, but nothing
    moves without a terminal. Characters that steer a terminal, such as those that begin an escape sequence,
    are shown and not sent.

    Args:
        encoding: that of the file, if that is not known from it.
        options: those of `rich.console.Console`.

    Examples:
        >>> Terminal(width=20).print("a [red]name\\x1b[0m")
        a [red]name␛[0m
    """

    def __init__(self, encoding: str = "", **options: Any) -> None:
        self._told = encoding
        usual = {
            "markup": False,
            "highlight": False,
            "emoji": False,
            "color_system": _colours(),
            "theme": _THEME,
        }
        super().__init__(**{**usual, **options})
        columns = self._columns()
        if columns != self.width:
            self.size = ConsoleDimensions(columns, self.height)

    def _columns(self) -> int:
        columns = self._width or self.width
        if self._width is None and self.is_terminal:  # rich looks at others, and takes a dumb one to have 80
            with suppress(OSError, ValueError):
                columns = os.get_terminal_size(self.file.fileno()).columns or columns
        return min(columns, WIDEST)

    @property
    def encoding(self) -> str:
        """Of the file."""
        return self._told or super().encoding

    @property
    def is_terminal(self) -> bool:
        """Whether somebody watches."""
        with suppress(AttributeError, ValueError):  # no file, or a closed one
            return self.file.isatty()
        return False

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """The segments of what is to be printed, in characters that the terminal has."""
        if isinstance(renderable, Text):
            renderable = _breakable(self._legible(renderable), options or self.options)
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=spelled(segment.text, self.encoding))

    def render_str(self, text: str, **options: Any) -> Text:
        """The same of a string."""
        return self._legible(super().render_str(text, **options))

    def _legible(self, text: Text) -> Text:
        shown = spelled(_STEERING.sub(_picture, text.plain), self.encoding)
        if shown == text.plain:
            return text
        text = text.copy()
        text.plain = shown
        return text


def _breakable(text: Text, options: ConsoleOptions) -> Text:
    """A text whose words, where one is too long, can be broken before a value and not within its number."""
    whole = text.spans or options.no_wrap or "=" not in text.plain
    if whole or max(map(cell_len, text.plain.split())) <= options.max_width:
        return text
    return Text(text.plain.replace("=", "= "), style=text.style)


def _colours() -> str | None:
    if os.environ.get("NO_COLOR"):
        return None
    return "auto" if os.environ.get("FORCE_COLOR", "0") in ("", "0") else "256"


def _picture(found: re.Match[str]) -> str:
    """A character that shows another one, which cannot be seen."""
    code = ord(found[0])
    if code < ord(" "):
        return chr(_PICTURES + code)
    return _DELETE if found[0] == "\x7f" else _UNKNOWN


def spelled(text: str, encoding: str) -> str:
    """As many characters, all of which an encoding has.

    >>> spelled("█▏ Müller… 层", "ascii")
    '#  Muller~ ?'
    """
    with suppress(UnicodeEncodeError):
        text.encode(encoding)
        return text
    return "".join(_spelled(character, encoding) for character in text)


def _spelled(character: str, encoding: str) -> str:
    for candidate in (character, unicodedata.normalize("NFD", character)[0], _STAND_INS.get(character, "?")):
        with suppress(UnicodeEncodeError):
            candidate.encode(encoding)
            return candidate
    return "?"


def one_line(text: str) -> str:
    r"""A text whose line breaks, and all that steers a terminal, are shown and do nothing.

    >>> one_line("two\nlines")
    'two␊lines'
    """
    return _BREAKING.sub(_picture, text)
