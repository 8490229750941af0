"""Figures as a page holds them: plain data without title, template and width, which the page has itself."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from plotly.graph_objects import Figure

from gradmend.look import Look, swapped
from gradmend.pictures.labels import elided

_TAG: Final = re.compile(r"<(?!/?(?:br|b|i|sup|sub|extra)>)")
_ANY_TAG: Final = re.compile(r"<[^>]*>")
_WORDS: Final = frozenset({"text", "name", "ticktext", "hovertext", "hovertemplate", "title", "customdata"})
_AXES: Final = frozenset({"x", "y"})
_MOST, _TITLE = 120, 60
"""Letters of a label, and pixels that a title would take."""

_HEIGHT: Final = 480

FONT: Final = 'system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Noto Sans CJK SC", sans-serif'


@dataclass(frozen=True)
class Drawing:
    """A figure, ready for a page.

    Args:
        title: plain text.
        words: what is to be seen.
        height: in pixels.
        data: for plotly, as JSON.
    """

    title: str
    words: str
    height: int
    data: str


def drawn(figure: Figure, say: Callable[[str], str] = str) -> Drawing:
    """Take out of a figure what the page has itself, and make its words harmless.

    Args:
        figure: with the colours of a light `Look`; it stays as it is.
        say: translates a text.

    Examples:
        >>> from plotly.graph_objects import Scatter
        >>> made = drawn(Look().finish(Figure(Scatter(y=[1, 2], name="<img>")), "Loss", words="It falls."))
        >>> made.title, made.words, made.height, "<img>" in made.data
        ('Loss', 'It falls.', 420, False)
    """
    held = json.loads(figure.to_json())
    layout = held["layout"]
    title, words = (
        (layout.pop("title", None) or {}).get("text", ""),
        (layout.get("meta") or {}).get("words", ""),
    )
    for own in ("template", "width", "meta"):
        layout.pop(own, None)
    height = layout.get("height", _HEIGHT) - (_TITLE if title else 0)
    layout |= {"height": height, "margin": {**layout.get("margin", {}), "t": 24}}
    told = {"title": _bare(say(title)), "words": say(words)}
    data = {**told, "data": _harmless(held["data"], say), "layout": _harmless(layout, say)}
    return Drawing(**told, height=height, data=json.dumps(data, separators=(",", ":")))


def _harmless(value: Any, say: Callable[[str], str], shown: bool = False) -> Any:
    """The same data with its texts translated, elided, and without tags that plotly would obey."""
    if isinstance(value, dict):
        return {key: _harmless(each, say, _shown(key, each)) for key, each in value.items()}
    if isinstance(value, list):
        return [_harmless(each, say, shown) for each in value] if shown or not _numbers(value) else value
    return _label(say(value)) if shown and isinstance(value, str) else value


def _shown(key: str, value: Any) -> bool:
    """Whether what a key holds is shown as text."""
    return key in _WORDS or (key in _AXES and isinstance(value, list))


def _numbers(values: list[Any]) -> bool:
    return all(value is None or isinstance(value, (int, float)) for value in values)


def _label(text: str) -> str:
    return _TAG.sub("&lt;", elided(text, _MOST))


def _bare(text: str) -> str:
    """A title without plotly's markup."""
    return html.unescape(_ANY_TAG.sub("", re.sub(r"<br\s*/?>", " ", text)))


def style() -> dict[str, Any]:
    """What the figures of a page share: plotly's template, and the dark colour of each light one."""
    look = Look()
    axis: dict[str, Any] = {"gridcolor": look.grid, "zerolinecolor": look.grid, "linecolor": look.pale}
    axis |= {"automargin": True, "exponentformat": "power", "title": {"font": {"size": 13}, "standoff": 10}}
    layout = {
        "font": {"family": FONT, "size": 13, "color": look.ink},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "colorway": list(look.colours),
        "xaxis": axis,
        "yaxis": axis,
        "hoverlabel": {"bgcolor": look.ground, "bordercolor": look.pale, "font": {"color": look.ink}},
    }
    return {"template": {"layout": layout}, "colours": swapped()}
