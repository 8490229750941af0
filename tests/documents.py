"""Pages of the documentation as programs: their blocks of code run in order, and print what stands below."""

from __future__ import annotations

import io
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from gradmend.cli import main

CLOSE = 0.15
"""Numbers may differ by so much: other processors sum in another order, and trainings amplify it."""

_BAR = re.compile(r"[█-▏◆](?: *[█-▏◆])*")
_WORD = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?|[^\s\d]+?(?=[-+]?\d|\s|$)")

OTHERS = "..."
"""Stands for any lines."""


@dataclass(frozen=True)
class Block:
    """What stands between fences: its language, the file that it is, if any, and its first line."""

    language: str
    file: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    """All blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w+)(?: title=\"(.+?)\")?\n(.*?)^```", text, re.M | re.S)
    return [Block(m[1], m[2] or "", m[3], text[: m.start()].count("\n") + 1) for m in found]


def run(page: Path) -> Iterator[str]:
    """Run a page in the folder of the process; yields where something else is printed than stands there."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for block, after in pairwise([*blocks(page), Block("", "", "", 0)]):
        here = f"{page.name}, line {block.line}"
        if block.file:
            Path(block.file).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            printed = _printed(exec, compile("\n" * block.line + block.text, str(page), "exec"), names)
            if after.language == "text" and not alike(after.text, printed):
                yield f"{here} prints:\n{printed}"
        elif block.language == "console":
            for command, expected in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n?)*)", block.text, re.M):
                printed = typed(command)
                if expected.strip() and not alike(expected, printed):
                    yield f"{here}, {command} prints:\n{printed}"


def typed(command: str) -> str:
    """What a command prints, on both streams; those that start programs have a process of their own."""
    program, *arguments = shlex.split(command)
    assert program == "gradmend"
    if arguments[0] != "run":
        return _printed(_main, arguments)
    whole = [sys.executable, "-m", program, *arguments]
    done = subprocess.run(whole, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
    return done.stdout


def _main(arguments: Sequence[str]) -> None:
    with suppress(SystemExit):
        main(list(arguments))


def _printed(function: Any, *arguments: Any) -> str:
    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(out):
        function(*arguments)
    return out.getvalue()


def alike(expected: str, printed: str) -> bool:
    """Whether something was printed as it stands there, blank lines aside.

    >>> alike("loss 0.300\\n...\\nend", "loss 0.301\\n1\\n2\\nend"), alike("loss 0.3", "loss 0.9")
    (True, False)
    """
    return _alike(_lines(expected), _lines(printed))


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def _alike(expected: Sequence[str], printed: Sequence[str]) -> bool:
    if not expected:
        return not printed
    if expected[0] == OTHERS:
        return any(_alike(expected[1:], printed[i:]) for i in range(len(printed) + 1))
    return bool(printed) and _same(expected[0], printed[0]) and _alike(expected[1:], printed[1:])


def _same(expected: str, printed: str) -> bool:
    """Word by word, where bars may have any length and numbers are close."""
    words, others = (_WORD.findall(_BAR.sub("█", line)) for line in (expected, printed))
    return len(words) == len(others) and all(map(_same_word, words, others))


def _same_word(expected: str, printed: str) -> bool:
    try:
        return math.isclose(float(expected), float(printed), rel_tol=CLOSE)
    except ValueError:
        return expected == printed
