"""A page as one HTML file that needs nothing else, and as what a live view swaps in."""

from __future__ import annotations

import gzip
import json
import re
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import cache, partial
from hashlib import sha256
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.graph_objects import Figure
from plotly.offline import get_plotlyjs

from gradmend.language import translated
from gradmend.report.drawing import Drawing, drawn, style
from gradmend.report.parts import Card, Code, Dial, Page, Part, Section, Table

__all__ = ["Card", "Code", "Dial", "Page", "Part", "Section", "Table", "content", "render"]

_HERE: Final = Path(__file__).parent
_NUMBER: Final = re.compile(
    r"[-+−x]?\d[\d.,]*(e[-+]?\d+)?( ?(%|[a-zA-Z]{1,3}|points))?( [\[(].*)?|-|NaN|inf|"
)
_WORDS: Final = {
    "theme": "Theme",
    "auto": "auto",
    "light": "light",
    "dark": "dark",
    "copied": "Copied",
    "select": "Press Ctrl+C",
    "missing": "There is no picture of this choice.",
    "old": "This browser is too old for the pictures.",
}
_JINJA: Final = Environment(
    loader=FileSystemLoader(_HERE),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(
    page: Page, lang: str = "en", *, plotly: str = "", nonce: str = "", more: str = "", head: str = ""
) -> str:
    """One HTML file that works without a network, from a disk or a server.

    Args:
        page: what it shows.
        lang: one of `gradmend.language.LANGUAGES`.
        plotly: the address of a file with plotly's code; by default the code is in the page.
        nonce: of scripts and styles, where a server says what is allowed; otherwise the page says it.
        more: a script that follows all others.
        head: HTML of a server's own at the end of the head.

    Examples:
        >>> text = render(Page("net.py", "Healthy: <nothing> found.", "good", ()))
        >>> "Healthy: &lt;nothing&gt; found." in text, "http-equiv" in text
        (True, True)
    """
    held, say = content(page, lang), partial(translated, lang=lang)
    library = get_plotlyjs() if held["figures"] and not plotly else ""
    scripts = [_text("page.js"), more]
    told = {**style(), "words": {key: say(text) for key, text in _WORDS.items()}}
    return _JINJA.get_template("page.html").render(
        page=page,
        lang=_TAGS.get(lang, lang),
        say=say,
        generator=f"gradmend {version('gradmend')}",
        made=_made(say),
        policy="" if nonce else _policy([*scripts, library], plotly),
        nonce=Markup(f' nonce="{nonce}"' if nonce else ""),
        plotly=plotly,
        packed=_packed(library) if library else "",
        heights=sorted(set(re.findall(r'data-height="(\d+)"', held["html"]))),
        css=Markup(_text("page.css")),
        head=Markup(head),
        scripts=[Markup(script) for script in scripts],
        main=Markup(held["html"]),
        style=Markup(_safe(json.dumps(told))),
        figures={id: Markup(_safe(data)) for id, data in held["figures"].items()},
    )


_BESIDE: Final = "'self' file:"
"""Browsers do not count a file beside a page on disk as its own."""

_TAGS: Final = {"zh": "zh-Hans"}


def content(page: Page, lang: str = "en") -> dict[str, Any]:
    """What a live view fetches: `html`, that of the main part, and `figures`, by id, as JSON for plotly.

    Args:
        page: what it shows.
        lang: one of `gradmend.language.LANGUAGES`.
    """
    say = partial(translated, lang=lang)
    placed = _Placed(say)
    sections = [
        {
            "id": placed.id(section.title),
            "title": section.title,
            "parts": [placed(part) for part in section.parts],
        }
        for section in page.sections
    ]
    html = _JINJA.get_template("main.html").render(page=page, sections=sections, say=say)
    return {"html": html, "figures": placed.figures}


class _Placed:
    """Gives parts what the template needs: ids that stay when the page is made again, and drawings."""

    def __init__(self, say: Callable[[str], str]) -> None:
        self.say = say
        self.figures: dict[str, str] = {}
        self.seen: Counter[str] = Counter()

    def __call__(self, part: Part) -> dict[str, Any]:
        found: dict[str, Any] = {"kind": type(part).__name__.lower(), "part": part}
        if isinstance(part, Figure):
            return found | self.figure(part)
        if isinstance(part, Table):
            return found | {"numeric": _numeric(part.rows)}
        if isinstance(part, Dial):
            return found | self.dial(part)
        return found

    def id(self, words: str) -> str:
        name = re.sub(r"[^a-z0-9]+", "-", words.lower())[:40].strip("-") or "part"
        self.seen[name] += 1
        return name if self.seen[name] == 1 else f"{name}-{self.seen[name]}"

    def figure(self, figure: Figure) -> dict[str, Any]:
        drawing = drawn(figure, self.say)
        id = self.id(f"figure {figure.layout.title.text or ''}")
        self.figures[id] = drawing.data
        return {"id": id, "shown": id, "drawing": drawing}

    def dial(self, dial: Dial) -> dict[str, Any]:
        """The figure of each choice of numbers, and a place of the greatest height."""
        made = {choice: self.figure(figure) for choice, figure in dial.figures.items()}
        places = {
            "-".join(map(str, at)): made[choice]["id"]
            for at, choice in zip(
                product(*(range(len(choices)) for choices in dial.dials.values())),
                product(*dial.dials.values()),
                strict=True,
            )
            if choice in made
        }
        first = next(iter(made.values()))["drawing"]
        height = max(each["drawing"].height for each in made.values())
        dials = [
            (name, choices, all(map(_NUMBER.fullmatch, choices))) for name, choices in dial.dials.items()
        ]
        return {
            "id": self.id(f"dial {' '.join(dial.dials)}"),
            "shown": next(iter(made.values()))["id"],
            "drawing": Drawing(first.title, first.words, height, ""),
            "places": json.dumps(places),
            "dials": dials,
        }


def _numeric(rows: Sequence[Sequence[str]]) -> set[int]:
    """The columns of numbers, and of a word here and there; the first has names, even if they are numbers."""
    return {at for at, cells in enumerate(zip(*rows, strict=True)) if at and _mostly_numbers(cells)}


def _mostly_numbers(cells: Sequence[str]) -> bool:
    others = [cell for cell in cells if not _NUMBER.fullmatch(cell)]
    return 2 * len(others) < len(cells) and not any(" " in cell for cell in others)


def _made(say: Callable[[str], str]) -> str:
    versions = f"gradmend {version('gradmend')}, torch {version('torch')}"
    return f"{say('Made by')} {versions}, {datetime.now():%Y-%m-%d %H:%M}"


def _policy(scripts: Sequence[str], address: str) -> str:
    """What the browser may do: run these very scripts, and nothing outside of the page."""
    allowed = " ".join([_digest(script) for script in scripts if script] + [_BESIDE] * bool(address))
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


@cache
def _digest(script: str) -> str:
    return f"'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'"


@cache
def _packed(script: str) -> str:
    """The code of plotly, most of a page, at two fifths of its size; the page unpacks it once it is shown."""
    return b64encode(gzip.compress(script.encode(), mtime=0)).decode()


@cache
def _text(name: str) -> str:
    return (_HERE / name).read_text("utf-8")


def _safe(data: str) -> str:
    """JSON that does not end the script it stands in."""
    return data.replace("<", "\\u003c")
