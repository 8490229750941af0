"""How pictures look: light or dark, colours that colour-blind people tell apart, 800 pixels wide."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from plotly.graph_objects import Figure

WIDTH = 800
_SHORT = 1e3
_ROW = 30
_LINE = 44  # letters of a label, per line


@dataclass(frozen=True)
class Look:
    """Colours and fonts of a picture.

    Source of the colours: Okabe, Ito, Color Universal Design, 2008, https://jfly.uni-koeln.de/color/

    Args:
        dark: for a dark background.
    """

    dark: bool = False

    @property
    def ink(self) -> str:
        """Of lines that mark "no difference" and the like."""
        return "#d0d0d0" if self.dark else "#404040"

    @property
    def pale(self) -> str:
        """Of what is not shown to be anything."""
        return "#8c8c8c"

    @property
    def ground(self) -> str:
        """The background."""
        return "#111111" if self.dark else "#ffffff"

    @property
    def grid(self) -> str:
        """Of the lines behind a picture."""
        return "#2e2e2e" if self.dark else "#e6e6e6"

    @property
    def colours(self) -> tuple[str, ...]:
        """Eight that all eyes tell apart, the first two for good and bad."""
        first = ("#56B4E9", "#E69F00") if self.dark else ("#0072B2", "#D55E00")
        rest = ("#0072B2", "#D55E00") if self.dark else ("#56B4E9", "#E69F00")
        return (*first, "#009E73", "#CC79A7", *rest, "#F0E442" if self.dark else "#B8A800", self.ink)

    @property
    def scale(self) -> list[list[float | str]]:
        """From worse over nothing to better."""
        return [[0.0, self.colours[1]], [0.5, "#303030" if self.dark else "#f4f4f4"], [1.0, self.colours[0]]]

    def verdict(self, of: int) -> str:
        """The colour of better (1), worse (-1) and neither shown (0)."""
        return {1: self.colours[0], -1: self.colours[1], 0: self.pale}[of]

    def finish(self, figure: Figure, title: str, rows: int | None = None, words: str = "") -> Figure:
        """Give a figure its title, size and background.

        Args:
            figure: changed in place.
            title: of the picture.
            rows: of labels that it has to hold; None for a picture of the usual height.
            words: what is to be seen, in a sentence or two; kept in `figure.layout.meta["words"]`.
        """
        figure.update_layout(
            template="plotly_dark" if self.dark else "plotly_white",
            meta={"words": words},
            title={"text": title, "font": {"size": 16}, "x": 0.02, "xanchor": "left"},
            font={"size": 13},
            width=WIDTH,
            height=480 if rows is None else 150 + _ROW * rows,
            margin={"l": 20, "r": 20, "t": 60, "b": 50},
            legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 1.0, "xanchor": "right"},
        )
        figure.update_xaxes(automargin=True)
        figure.update_yaxes(automargin=True)
        return figure


def swapped() -> dict[str, str]:
    """Of each colour of a light picture the one that takes its place on a dark background.

    >>> swapped()["#ffffff"]
    '#111111'
    """
    names = [name for name, held in vars(Look).items() if isinstance(held, property)]
    light, dark = ([c for name in names for c in _strings(getattr(Look(d), name))] for d in (False, True))
    return dict(zip(light, dark, strict=True))


def _strings(held: Any) -> list[str]:
    if isinstance(held, (tuple, list)):
        return [each for part in held for each in _strings(part)]
    return [held] if isinstance(held, str) else []


def logarithmic(low: float, high: float) -> dict[str, Any]:
    """An axis of powers of ten, with 2 and 5 between them where it is short.

    Args:
        low: the least value on it.
        high: the greatest.

    Examples:
        >>> logarithmic(0.3, 4.0)["ticktext"]
        ['0.1', '0.2', '0.5', '1', '2', '5', '10']
    """
    if not 0 < low <= high < _SHORT * low:
        return {"type": "log", "exponentformat": "power"}
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [m * 10.0**k for k in decades for m in (1, 2, 5)][: 3 * len(decades) - 2]
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}


def folded(words: str) -> str:
    """A long label in lines, broken between the parts of an arm.

    >>> folded("a" * 30 + " + " + "b" * 30).count("<br>")
    1
    """
    text, *rest = words.split(" + ")
    width = len(text)
    for part in rest:
        fits = width + len(part) + 3 <= _LINE
        text += (" + " if fits else " +<br>") + part
        width = width + len(part) + 3 if fits else len(part)
    return text
