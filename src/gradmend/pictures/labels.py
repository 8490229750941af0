"""Labels: names of layers on axes and at points, however long, many or hostile they are."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any, Final

_LONG: Final = 48
_SHORT: Final = 24
_MOST: Final = 20
"""So many labels on an axis are legible on a telephone, too."""
_READ: Final = 200
_LETTER: Final = 6.5
_WIDTH: Final = 640
"""Pixels: of a letter, and of an axis."""


def safe(name: str, most: int = _LONG) -> str:
    """A name as plotly can show it: short enough, and without any markup.

    Of a path that is too long the first parts give way to their initials, but for numbers; what is still too
    long loses its middle.

    >>> safe("<b>x</b>"), safe("encoder.layers.12.attention.output", most=24), safe("x" * 99, most=5)
    ('&lt;b&gt;x&lt;/b&gt;', 'e.l.12.attention.output', 'xx…xx')
    """
    name = name if len(name) <= _READ else name[: _READ // 2] + name[-_READ // 2 :]
    parts = " ".join(name.split()).split(".")
    for place, part in enumerate(parts[:-1]):
        if len(".".join(parts)) > most:
            parts[place] = part if part.isdigit() else part[:1]
    return html.escape(elided(".".join(parts), most), quote=False)


def elided(text: str, most: int) -> str:
    """A long text without its middle.

    >>> elided("transformer.layers.11.attention", 15)
    'transfo…tention'
    """
    half = (most - 1) // 2
    return text if len(text) <= most else f"{text[:half]}…{text[-half:]}"


def spread_out(count: int, most: int) -> list[int]:
    """Both ends and places evenly between them, no more than `most`.

    >>> spread_out(9, 3), spread_out(2, 3), spread_out(0, 3)
    ([0, 4, 8], [0, 1], [])
    """
    if count <= most:
        return list(range(count))
    return [round(place * (count - 1) / (most - 1)) for place in range(most)]


def ticks(names: Sequence[str], most: int = _MOST) -> dict[str, Any]:
    """An axis that counts the names from 0 and shows at most so many of them.

    >>> ticks(["a", "b"])["ticktext"]
    ['a', 'b']
    """
    shown = _regular(len(names), most)
    labels = [safe(names[place], _SHORT) for place in shown]
    return {
        "tickmode": "array",
        "tickvals": shown,
        "ticktext": labels,
        "tickangle": -60 if below(labels) else 0,
        "tickfont": {"size": 11},
    }


def _regular(count: int, most: int) -> list[int]:
    """Places at one distance from the first on, and the last instead of what would be too near to it."""
    step = max(1, -(-count // most))
    places = list(range(0, count, step))
    keeps = count - 1 - places[-1] > 0.8 * step if len(places) > 1 else True
    return sorted({*(places if keeps else places[:-1]), count - 1}) if count else []


def below(labels: Sequence[str]) -> int:
    """How many pixels more labels take below an axis, for they are turned if they have no room side by side.

    >>> below(["a", "b"]), below(["encoder.layers.12.linear"] * 20)
    (0, 119)
    """
    widths = [_LETTER * len(html.unescape(label)) for label in labels]
    turned = max(widths, default=0.0) * len(widths) > _WIDTH
    return round(max(widths) * math.sin(math.radians(60))) - 16 if turned else 0
