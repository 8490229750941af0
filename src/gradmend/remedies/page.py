"""The page of all remedies, `docs/remedies.md`: `python -m gradmend.remedies.page > docs/remedies.md`."""

from __future__ import annotations

import re
import sys

from gradmend.remedies.card import Card, cards

_HEAD = """\
# Remedies

What `gradmend mend` can change, by the part of the setup that it changes. Each is a small record in
`gradmend.remedies` that works on a copy: `Tailor().apply(setup, batches)` gives the change as a setup, as
text and as code. `gradmend explain REMEDY` prints one of them. This page is made from their docstrings by
`make docs`.
"""


def page() -> str:
    """All remedies in Markdown, grouped by what they change.

    >>> page().splitlines()[0]
    '# Remedies'
    """
    known = cards()
    groups = {
        group: [c for c in known if c.group == group] for group in dict.fromkeys(c.group for c in known)
    }
    contents = [f"- {group}: " + ", ".join(map(_link, held)) for group, held in groups.items()]
    sections = [
        "\n\n".join((f"## {group.capitalize()}", *map(_entry, held))) for group, held in groups.items()
    ]
    return "\n\n".join((_HEAD.strip(), "\n".join(contents), *sections)) + "\n"


def _link(card: Card) -> str:
    return f"[{card.name}](#{card.name.lower()})"


def _entry(card: Card) -> str:
    text = "\n".join(f"- **{key}:** {_said(card, key, value)}" for key, value in card.rows)
    return "\n\n".join(part for part in (f"### {card.name}", card.what, card.about, text) if part)


def _said(card: Card, key: str, value: str) -> str:
    return ", ".join(f"`{call}`" for call in card.usual) if key == "Tried as" else _linked(value)


def _linked(text: str) -> str:
    return re.sub(r"(https?://\S*[^\s.,;)])", r"<\1>", text)


if __name__ == "__main__":
    sys.stdout.write(page())
