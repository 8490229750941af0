"""Source: the user's file as read by libcst, and as changed by splices, which leave all other bytes alone."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TypeAlias

import libcst as cst
from libcst import matchers as m
from libcst.metadata import ByteSpanPositionProvider, MetadataWrapper, ParentNodeProvider, PositionProvider

from gradmend.errors import TargetError

Statement: TypeAlias = cst.SimpleStatementLine | cst.BaseCompoundStatement

HOMES = {
    "torch": "torch",
    "nn": "torch.nn",
    "F": "torch.nn.functional",
    "Tensor": "torch.Tensor",
    "Any": "typing.Any",
    "Callable": "collections.abc.Callable",
    "Sequence": "collections.abc.Sequence",
    "partial": "functools.partial",
    "math": "math",
    "weight_norm": "torch.nn.utils.parametrizations.weight_norm",
    "parametrize": "torch.nn.utils.parametrize",
    "replace": "dataclasses.replace",
}
"""The names that the code of edits uses, and what they stand for."""


_MOST = 4096
"""Statements whose names are remembered."""


class Unpatched(Exception):
    """Why an edit cannot be written into the source, in words."""


@dataclass(frozen=True)
class Splice:
    """Text that takes the place of the bytes from `start` to `end`."""

    start: int
    end: int
    text: str


class Source:
    """A Python file: its syntax, and where each part of it stands in the text.

    Args:
        data: the bytes of the file.
        file: its name, as typed.

    Raises:
        TargetError: if it cannot be parsed.

    >>> source = Source(b"from torch import nn\\nmodel = nn.Linear(4, 2)\\n", "net.py")
    >>> source.qualified(source.calls[0].func), source.line(source.calls[0])
    ('torch.nn.Linear', 2)
    """

    def __init__(self, data: bytes, file: str) -> None:
        try:
            wrapper = MetadataWrapper(cst.parse_module(data))
        except (cst.ParserSyntaxError, UnicodeError, LookupError) as error:
            raise TargetError(f"{file} cannot be read as Python by libcst: {error}") from error
        self.file = file
        self.module = wrapper.module
        self.utf8 = self.module.code.encode()
        self.newline, self.indent = self.module.default_newline, self.module.default_indent
        self._spans = wrapper.resolve(ByteSpanPositionProvider)
        self._positions = wrapper.resolve(PositionProvider)
        self._parents = wrapper.resolve(ParentNodeProvider)

    # ---- places -----------------------------------------------------------------------------------------

    def span(self, node: cst.CSTNode) -> tuple[int, int]:
        """Where a node begins and ends, in bytes of UTF-8."""
        found = self._spans[node]
        return found.start, found.start + found.length

    def text(self, node: cst.CSTNode) -> str:
        """The text of a node."""
        start, end = self.span(node)
        return self.utf8[start:end].decode()

    def line(self, node: cst.CSTNode) -> int:
        """The line on which a node begins, from 1; that of a method's call is the line of its name."""
        func = node.func if isinstance(node, cst.Call) else None
        named = func.attr if isinstance(func, cst.Attribute) and _chained(func) else node
        return int(self._positions[named].start.line)

    def place(self, node: cst.CSTNode) -> str:
        """`file:line` of a node."""
        return f"{self.file}:{self.line(node)}"

    def is_here(self, line: str | None) -> int | None:
        """The line number of `file:line`, if it is this file's."""
        file, _, number = (line or "").rpartition(":")
        return int(number) if file and Path(file).resolve() == Path(self.file).resolve() else None

    @cached_property
    def starts(self) -> list[int]:
        """Where each line begins, and the end of the file."""
        ends = [match.end() for match in re.finditer(rb"\r\n|\n|\r", self.utf8)]
        return [0, *ends, *([len(self.utf8)] if not ends or ends[-1] != len(self.utf8) else [])]

    def above(self, statement: Statement) -> Splice:
        """An empty splice before a statement, its decorators and the comments above it."""
        decorators = getattr(statement, "decorators", ())
        first = min(self._positions[node].start.line for node in (statement, *decorators))
        lines: Sequence[cst.EmptyLine] = getattr(statement, "leading_lines", ())
        comments = 0
        while comments < len(lines) and lines[-1 - comments].comment is not None:
            comments += 1
        return self._at(self.starts[first - 1 - comments])

    def below(self, statement: Statement) -> Splice:
        """An empty splice after the line on which a statement ends."""
        return self._at(self.starts[self._positions[statement].end.line])

    def _at(self, offset: int) -> Splice:
        return Splice(offset, offset, "")

    def margin(self, statement: Statement) -> str:
        """The white space before a statement."""
        start = self.starts[self._positions[statement].start.line - 1]
        return re.match(rb"[ \t]*", self.utf8[start:])[0].decode()  # type: ignore[index]

    # ---- syntax -----------------------------------------------------------------------------------------

    @cached_property
    def calls(self) -> list[cst.Call]:
        """All calls, in the order of the text."""
        found = [node for node in m.findall(self.module, m.Call()) if isinstance(node, cst.Call)]
        return sorted(found, key=self.span)

    @cached_property
    def statements(self) -> list[Statement]:
        """Those at the top level."""
        return list(self.module.body)

    @cached_property
    def imports(self) -> dict[str, str]:
        """What the names that imports bind, anywhere in the file, stand for."""
        found: dict[str, str] = {}
        for node in m.findall(self.module, m.Import() | m.ImportFrom()):
            found |= _imported(node)
        return found

    def imports_before(self, end: Statement | None) -> dict[str, str]:
        """The same for imports at the top level, which always run, before a statement."""
        found: dict[str, str] = {}
        for statement in itertools.takewhile(lambda statement: statement is not end, self.statements):
            for part in statement.body if isinstance(statement, cst.SimpleStatementLine) else ():
                found |= _imported(part)
        return found

    @cached_property
    def names(self) -> frozenset[str]:
        """All names that the file binds or mentions."""
        return mentioned(self.module)

    def qualified(self, node: cst.BaseExpression) -> str:
        """The dotted name of an expression, its first part by the imports; "" where it has none."""
        if isinstance(node, cst.Name):
            return self.imports.get(node.value, node.value)
        if isinstance(node, cst.Attribute):
            owner = self.qualified(node.value)
            return f"{owner}.{node.attr.value}" if owner else ""
        return ""

    def called(self, call: cst.Call) -> str:
        """The last part of the name of what is called."""
        if isinstance(call.func, cst.Attribute):
            return call.func.attr.value
        return self.qualified(call.func).rpartition(".")[2]

    def inside(self, node: cst.CSTNode) -> Iterator[cst.CSTNode]:
        """What a node stands in, from the inside."""
        parent = self._parents.get(node)
        while parent is not None:
            yield parent
            parent = self._parents.get(parent)

    def statement(self, node: cst.CSTNode) -> Statement:
        """The statement at the top level that holds a node."""
        held = {id(part) for part in (node, *self.inside(node))}
        return next(statement for statement in self.statements if id(statement) in held)

    def block(self, node: cst.CSTNode) -> tuple[Sequence[Statement], Statement]:
        """The statements of the innermost function, or of the file, and the one that holds a node."""
        held = {id(part) for part in (node, *self.inside(node))}
        for parent in self.inside(node):
            if isinstance(parent, cst.FunctionDef) and isinstance(parent.body, cst.IndentedBlock):
                kinds = (cst.SimpleStatementLine, cst.BaseCompoundStatement)
                inner = [part for part in parent.body.body if isinstance(part, kinds)]
                found = [statement for statement in inner if id(statement) in held]
                if found:
                    return inner, found[0]
        return self.statements, self.statement(node)

    def within(self, call: cst.CSTNode, parts: Sequence[cst.CSTNode]) -> bool:
        """Whether a node is, or stands in, one of these."""
        held = {id(part) for part in parts}
        return any(id(part) in held for part in (call, *self.inside(call)))


def _chained(func: cst.Attribute) -> bool:
    """Whether a method is called on the value of another call, perhaps lines above it."""
    value = func.value
    while isinstance(value, cst.Attribute):
        value = value.value
    return not isinstance(value, cst.Name)


def _imported(node: cst.CSTNode) -> dict[str, str]:
    """What an import binds."""
    found: dict[str, str] = {}
    if isinstance(node, cst.Import):
        for alias in node.names:
            name = _dotted(alias.name)
            found |= {_as(alias): name} if alias.asname else {name.partition(".")[0]: name.partition(".")[0]}
    if isinstance(node, cst.ImportFrom) and not isinstance(node.names, cst.ImportStar):
        home = "." * len(node.relative) + (_dotted(node.module) if node.module else "")
        for alias in node.names:
            found[_as(alias)] = f"{home}.{_dotted(alias.name)}"
    return found


def _as(alias: cst.ImportAlias) -> str:
    own = alias.asname.name if alias.asname else alias.name
    return _dotted(own) if isinstance(own, (cst.Name, cst.Attribute)) else ""


def _dotted(node: cst.BaseExpression) -> str:
    if isinstance(node, cst.Attribute):
        return f"{_dotted(node.value)}.{node.attr.value}"
    return node.value if isinstance(node, cst.Name) else ""


class _Mentions(cst.CSTVisitor):
    """Names that are read or bound: no attributes, no keywords of arguments."""

    def __init__(self) -> None:
        self.found: set[str] = set()

    def visit_Name(self, node: cst.Name) -> None:
        self.found.add(node.value)

    def visit_Attribute(self, node: cst.Attribute) -> bool:
        node.value.visit(self)
        return False

    def visit_Arg(self, node: cst.Arg) -> bool:
        node.value.visit(self)
        return False

    def visit_Import(self, node: cst.Import) -> bool:
        self.found |= set(_imported(node))
        return False

    def visit_ImportFrom(self, node: cst.ImportFrom) -> bool:
        self.found |= set(_imported(node))
        return False


@lru_cache(maxsize=_MOST)
def mentioned(node: cst.CSTNode) -> frozenset[str]:
    """The names that a piece of code mentions, but for attributes and keywords.

    >>> sorted(mentioned(cst.parse_expression("f(a.b, key=c)")))
    ['a', 'c', 'f']
    """
    visitor = _Mentions()
    node.visit(visitor)
    return frozenset(visitor.found)


class _Bindings(cst.CSTVisitor):
    """Names that a statement binds in its own scope."""

    def __init__(self) -> None:
        self.found: set[str] = set()

    def visit_FunctionDef(self, node: cst.FunctionDef) -> bool:
        self.found.add(node.name.value)
        return False

    def visit_ClassDef(self, node: cst.ClassDef) -> bool:
        self.found.add(node.name.value)
        return False

    def visit_Lambda(self, node: cst.Lambda) -> bool:
        return False

    def visit_Import(self, node: cst.Import) -> None:
        self.found |= set(_imported(node))

    def visit_ImportFrom(self, node: cst.ImportFrom) -> None:
        self.found |= set(_imported(node))

    def visit_AssignTarget(self, node: cst.AssignTarget) -> None:
        self._bind(node.target)

    def visit_AnnAssign(self, node: cst.AnnAssign) -> None:
        self._bind(node.target)

    def visit_AugAssign(self, node: cst.AugAssign) -> None:
        self._bind(node.target)

    def visit_For(self, node: cst.For) -> None:
        self._bind(node.target)

    def visit_AsName(self, node: cst.AsName) -> None:
        self._bind(node.name)

    def visit_NamedExpr(self, node: cst.NamedExpr) -> None:
        self._bind(node.target)

    def _bind(self, target: cst.BaseExpression) -> None:
        if isinstance(target, cst.Name):
            self.found.add(target.value)
        elif isinstance(target, (cst.Tuple, cst.List)):
            for element in target.elements:
                self._bind(element.value)


@lru_cache(maxsize=_MOST)
def bound(node: cst.CSTNode) -> frozenset[str]:
    """The names that a statement binds where it stands.

    >>> sorted(bound(cst.parse_statement("for i, x in data: y = x")))
    ['i', 'x', 'y']
    """
    visitor = _Bindings()
    node.visit(visitor)
    return frozenset(visitor.found)


@lru_cache(maxsize=_MOST)
def worked_on(node: cst.CSTNode) -> frozenset[str]:
    """The names of what a statement binds, or changes by a call for its effect.

    >>> sorted(worked_on(cst.parse_statement("for i in range(3): layers.append(i)")))
    ['i', 'layers']
    """
    method = m.Expr(m.Call(func=m.Attribute(value=m.Name())))
    calls = [part.value for part in m.findall(node, method) if isinstance(part, cst.Expr)]
    owners = [mentioned(call.func) for call in calls if isinstance(call, cst.Call)]
    return bound(node).union(*owners)


def spliced(utf8: bytes, splices: Sequence[Splice]) -> bytes:
    """The text with all splices; those at one place in their order.

    >>> spliced(b"a(b)", [Splice(0, 0, "f("), Splice(2, 3, "c"), Splice(4, 4, ")")])
    b'f(a(c))'
    """
    done, at = [], 0
    for splice in sorted(splices, key=lambda splice: (splice.start, splice.end)):
        if splice.start < at:
            raise Unpatched("two edits change the same part of the source")
        done += [utf8[at : splice.start], splice.text.encode()]
        at = splice.end
    return b"".join([*done, utf8[at:]])
