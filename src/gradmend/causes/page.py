"""The page of all causes, `docs/causes.md`: `python -m gradmend.causes.page > docs/causes.md`."""

from __future__ import annotations

import re
import sys

from gradmend.causes import PARTS, Cause

_HEAD = """\
# Causes

What gradmend can find, by the part of the setup that is to blame. `gradmend explain CAUSE` prints one of
them. This page is made from the same tables by `make docs`.
"""


def page() -> str:
    """All causes in Markdown, grouped by their part, each part in the order from roots to symptoms.

    >>> page().splitlines()[0]
    '# Causes'
    """
    groups = [(part, [cause for cause in Cause if cause.part == part]) for part in PARTS]
    known = [(part.replace("_", " "), causes) for part, causes in groups if causes]
    contents = [f"- {part}: " + ", ".join(map(_link, causes)) for part, causes in known]
    sections = ["\n\n".join((f"## {part.capitalize()}", *map(_entry, causes))) for part, causes in known]
    return "\n\n".join((_HEAD.strip(), "\n".join(contents), *sections)) + "\n"


def _link(cause: Cause) -> str:
    return f"[{cause.title}](#{cause.title.replace(' ', '-')})"


def _entry(cause: Cause) -> str:
    illness = cause.illness
    rows = (
        ("Why", illness.why),
        ("How it shows", illness.signs),
        ("What treats it", illness.cure),
        ("Source", re.sub(r"(https?://\S*[^\s.,;])", r"<\1>", illness.reference)),
    )
    text = "\n".join(f"- **{name}:** {value}" for name, value in rows)
    return f"### {cause.title}\n\n{illness.sentence}\n\n{text}"


if __name__ == "__main__":
    sys.stdout.write(page())
