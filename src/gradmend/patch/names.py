"""Names: how the code of edits is spelled in a file that has its own imports."""

from __future__ import annotations

import io
import tokenize

import libcst as cst

from gradmend.patch.source import HOMES, Source, Splice, Statement, Unpatched

_WRITTEN = {
    "torch": "import torch",
    "math": "import math",
    "F": "import torch.nn.functional as F",
}


class Names:
    """Spells code by the imports that a file has, and collects those that it lacks.

    Args:
        source: of the file.
        before: the statement whose imports, and later ones, come too late.

    >>> names = Names(Source(b"import torch.nn as tnn\\n", "net.py"))
    >>> names.spell("F.relu(nn.Linear(2, 2)(x))")
    'tnn.functional.relu(tnn.Linear(2, 2)(x))'
    >>> names.spell("partial(torch.relu)"), sorted(names.lacking)
    ('partial(torch.relu)', ['partial', 'torch'])
    """

    def __init__(self, source: Source, before: Statement | None = None) -> None:
        self.source = source
        self.lacking: set[str] = set()
        self._own_imports = source.imports_before(before)
        self._known = {home: name for name, home in reversed(self._own_imports.items())}

    def spell(self, code: str) -> str:
        """The same code with the names of this file.

        Raises:
            Unpatched: if a name stands for something else here.
        """
        rows = code.splitlines(keepends=True)
        for row, start, end, name in reversed(_meant(code)):
            line = rows[row]
            rows[row] = line[:start] + self._own(name, HOMES[name]) + line[end:]
        return "".join(rows)

    def binds(self, name: str) -> bool:
        """Whether the file binds or mentions a name, for something other than what edits mean by it."""
        return name in self.source.names or self._starred

    @property
    def _starred(self) -> bool:
        lines = (s for s in self.source.statements if isinstance(s, cst.SimpleStatementLine))
        parts = (part for line in lines for part in line.body)
        return any(isinstance(p, cst.ImportFrom) and isinstance(p.names, cst.ImportStar) for p in parts)

    def _own(self, name: str, home: str) -> str:
        if home in self._known:
            return self._known[home]
        owner, _, last = home.rpartition(".")
        if owner and owner in self._known:
            return f"{self._known[owner]}.{last}"
        if name in self.source.names and self.source.imports.get(name) != home:
            raise Unpatched(f"{self.source.file} means something else by `{name}`")
        self.lacking.add(name)
        return name

    def imports(self) -> list[Splice]:
        """The imports that are lacking, after those that are there."""
        lines = [written(name) for name in sorted(self.lacking, key=list(HOMES).index)]
        newline = self.source.newline
        if not lines:
            return []
        last = self._last_import()
        text = "".join(line + newline for line in lines)
        if last is not None:
            place = self.source.below(last)
            return [Splice(place.start, place.end, ended(self.source, place) + text)]
        place = self._beginning()
        return [Splice(place.start, place.end, text + newline)]

    def _last_import(self) -> Statement | None:
        """The last of the imports that the file begins with."""
        last: Statement | None = None
        for statement in self.source.statements:
            if _is_import(statement):
                last = statement
            elif not _is_text(statement):
                break
        return last

    def _beginning(self) -> Splice:
        statements = self.source.statements
        if statements and _is_text(statements[0]):
            return self.source.below(statements[0])
        return self.source.above(statements[0]) if statements else Splice(0, 0, "")


def _meant(code: str) -> list[tuple[int, int, int, str]]:
    """Where code mentions the names that it shares with all edits: row, columns, name; no keywords."""
    tokens = list(tokenize.generate_tokens(io.StringIO(code).readline))
    imports = [
        row for row, line in enumerate(code.splitlines()) if line.split()[:1] in (["import"], ["from"])
    ]
    found, depth = [], 0
    for before, token, after in zip([None, *tokens], tokens, [*tokens[1:], None], strict=False):
        depth += (token.string in ("(", "[", "{")) - (token.string in (")", "]", "}"))
        attribute = before is not None and before.string == "."
        keyword = depth > 0 and after is not None and after.string == "="
        if (
            token.type == tokenize.NAME
            and token.string in HOMES
            and not attribute
            and not keyword
            and token.start[0] - 1 not in imports
        ):
            found.append((token.start[0] - 1, token.start[1], token.end[1], token.string))
    return found


def written(name: str) -> str:
    """The statement that imports a name of the edits' code.

    >>> written("nn")
    'from torch import nn'
    """
    home, _, last = HOMES[name].rpartition(".")
    return _WRITTEN.get(name, f"from {home} import {last}")


def ended(source: Source, place: Splice) -> str:
    """A line end, where a file stops without one."""
    full = place.start == 0 or source.utf8[place.start - 1 : place.start] in (b"\n", b"\r")
    return "" if full else source.newline


def _is_import(statement: Statement) -> bool:
    parts = statement.body if isinstance(statement, cst.SimpleStatementLine) else ()
    return bool(parts) and all(isinstance(part, (cst.Import, cst.ImportFrom)) for part in parts)


def _is_text(statement: Statement) -> bool:
    """Whether a statement is a docstring."""
    parts = statement.body if isinstance(statement, cst.SimpleStatementLine) else ()
    held = [part.value for part in parts if isinstance(part, cst.Expr)]
    return bool(held) and all(isinstance(value, (cst.SimpleString, cst.ConcatenatedString)) for value in held)
