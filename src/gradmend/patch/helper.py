"""Helper: edits that have code but no place of their own become a function; the model goes through it."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import libcst as cst
import torch
from libcst import matchers as m
from torch.optim import Optimizer

from gradmend.patch.names import Names, ended, written
from gradmend.patch.source import HOMES, Source, Splice, Statement, Unpatched, bound, mentioned
from gradmend.patch.training import Training

_DRAWS = "with torch.random.fork_rng(devices=[]):"
"""So that the file draws the same random numbers after it as before."""

_OPTIMIZERS = frozenset(n for n, kind in vars(torch.optim).items() if isinstance(kind, type))


@dataclass(frozen=True)
class Door:
    """Where the model goes through the helper.

    Args:
        anchor: the empty splice at which the helper is defined.
        splices: that call it; `{}` stands for its name.
        of_setup: whether it takes a setup and returns one, rather than a model.
        target: the new name of the target, if it gets one.
        line: of the call.
    """

    anchor: Splice
    splices: tuple[Splice, ...]
    line: int
    of_setup: bool = False
    target: str | None = None


class Doors:
    """Finds where the model that TARGET names can go through a function.

    Args:
        source: of the file.
        target: the statement that defines it.
        name: of the target.
        training: finds the call of `Setup`.
    """

    def __init__(self, source: Source, target: Statement, name: str, training: Training) -> None:
        self.source, self.target, self.name, self.training = source, target, name, training

    def find(self) -> Door:
        """The door.

        Raises:
            Unpatched: if there is none.
        """
        if isinstance(self.target, cst.ClassDef):
            return self._of_class()
        call = self.training.setup_call()
        if call is not None and self.source.within(call, [self.target]):
            return self._of_setup_call(call)
        if isinstance(self.target, cst.FunctionDef):
            return self._of_returns(self.target)
        if m.findall(self.target, m.Lambda()):
            return self._of_lambda()
        if self._makes_setup(self.target):
            return self._rebound(self.source.statements, self.name, of_setup=True)
        return self._rebound(self.source.statements, self.name)

    def _of_class(self) -> Door:
        """A function that makes a mended model: other users of the class stay as they are."""
        name = free_name(f"mended_{self.name.lower()}", self.source.names)
        text = f"\n\ndef {name}(*args, **kwargs):\n    return {{}}({self.name}(*args, **kwargs))\n"
        place = self.source.below(self.target)
        splice = Splice(place.start, place.end, styled(self.source, text))
        return Door(place, (splice,), self.source.line(self.target), target=name)

    def _of_setup_call(self, call: cst.Call) -> Door:
        given = self.training.argument(call, "model")
        if given is None:
            raise Unpatched(f"{self.source.place(call)} does not show its model")
        if isinstance(given.value, cst.Name):
            block, _ = self.source.block(call)
            if any(given.value.value in bound(statement) for statement in block):
                return self._rebound(block, given.value.value)
            if any(given.value.value in bound(statement) for statement in self.source.statements):
                return self._rebound(self.source.statements, given.value.value)
        return self._wrapped([given.value])

    def _of_returns(self, function: cst.FunctionDef) -> Door:
        found = [n.value for n in m.findall(function, m.Return()) if isinstance(n, cst.Return) and n.value]
        own = [node for node in found if _scope(self.source, node) is function]
        if not own:
            raise Unpatched(f"{self.source.place(function)} returns nothing that the source shows")
        return self._wrapped(own, of_setup=self._makes_setup(function))

    def _of_lambda(self) -> Door:
        found = [n.body for n in m.findall(self.target, m.Lambda()) if isinstance(n, cst.Lambda)]
        if len(found) != 1:
            raise Unpatched(f"{self.source.place(self.target)} is no plain definition")
        return self._wrapped(found, of_setup=self._makes_setup(self.target))

    def _makes_setup(self, statement: Statement) -> bool:
        """Whether a statement makes a setup, by a call or by a function of this file."""
        known = {s.name.value: s for s in self.source.statements if isinstance(s, cst.FunctionDef)}
        names, seen = set(mentioned(statement)), {statement}
        while more := [known[name] for name in names if name in known and known[name] not in seen]:
            seen |= set(more)
            names |= {name for found in more for name in mentioned(found)}
        calls = [c for c in self.source.calls if self.source.called(c) == "Setup"]
        return any(self.source.within(call, list(seen)) for call in calls)

    def model_name(self) -> str | None:
        """What the model is called beside the optimizer, if it has a name."""
        call = self.training.setup_call()
        if call is None:
            plain = isinstance(self.target, cst.SimpleStatementLine)
            return self.name if plain and not self._makes_setup(self.target) else None
        given = self.training.argument(call, "model")
        return given.value.value if given is not None and isinstance(given.value, cst.Name) else None

    def _wrapped(self, nodes: Sequence[cst.BaseExpression], of_setup: bool = False) -> Door:
        self._check_live(nodes[0])
        splices = []
        for node in nodes:
            start, end = self.source.span(node)
            splices += [Splice(start, start, "{}("), Splice(end, end, ")")]
        anchor = self.source.above(self.source.statement(nodes[0]))
        return Door(anchor, tuple(splices), self.source.line(nodes[0]), of_setup)

    def _rebound(self, block: Sequence[Statement], name: str, of_setup: bool = False) -> Door:
        """`model = mended(model)` after the model is made, and before anything is made of it."""
        at = max(i for i, statement in enumerate(block) if name in bound(statement))
        anchor = self.source.above(self.source.statement(block[at]))
        if of_setup or _consumes(block[at], name):
            self._check_live(block[at])
        for index, statement in enumerate(block[at + 1 :], start=at + 1):
            if name in mentioned(statement) and _consumes(statement, name):
                break
            if name in mentioned(statement) and _works_on(statement, name):
                at = index
        line = block[at]
        place, margin = self.source.below(line), self.source.margin(line)
        text = f"{ended(self.source, place)}{margin}{name} = {{}}({name}){self.source.newline}"
        if isinstance(line, cst.BaseCompoundStatement):
            text = self.source.newline + text
        return Door(anchor, (Splice(place.start, place.end, text),), self.source.line(line), of_setup)

    def _check_live(self, node: cst.CSTNode) -> None:
        if isinstance(self.training.setup.optimizer, Optimizer) and "optimizer" not in self.training.typed:
            place = self.source.place(node)
            raise Unpatched(f"{place} hides the model, of which the optimizer is made already")


def _scope(source: Source, node: cst.CSTNode) -> cst.CSTNode | None:
    scopes = (n for n in source.inside(node) if isinstance(n, (cst.FunctionDef, cst.ClassDef, cst.Lambda)))
    return next(scopes, None)


def _consumes(statement: Statement, name: str) -> bool:
    """Whether a statement makes something of the model that a new model would not reach, or runs it."""
    if isinstance(statement, cst.If) and "__name__" in mentioned(statement):
        return True
    if m.findall(statement, m.Return()):
        return True
    for call in m.findall(statement, m.Call()):
        func = call.func if isinstance(call, cst.Call) else None
        last = func.attr.value if isinstance(func, cst.Attribute) else getattr(func, "value", "")
        if (last in _OPTIMIZERS or last in ("Setup", "backward")) and name in mentioned(statement):
            return True
    return False


def _works_on(statement: Statement, name: str) -> bool:
    """Whether a statement seems to change the model: a loop over it, a call for its effect, an assignment."""
    if isinstance(statement, (cst.FunctionDef, cst.ClassDef)):
        return False
    if not isinstance(statement, cst.SimpleStatementLine):
        return True
    for part in statement.body:
        if isinstance(part, cst.Expr) and isinstance(part.value, cst.Call):
            return not m.matches(part.value.func, m.Name("print"))
        targets = [target.target for target in part.targets] if isinstance(part, cst.Assign) else []
        if any(isinstance(t, (cst.Attribute, cst.Subscript)) and name in mentioned(t) for t in targets):
            return True
    return False


def helper_splices(source: Source, names: Names, door: Door, code: str) -> tuple[list[Splice], str]:
    """The definition of the helper, its calls, and its name.

    Args:
        source: of the file.
        names: spells code there.
        door: where it is called.
        code: Python that changes a variable called `model`.
    """
    head, body = _split(code)
    body = names.spell(_own_names(body, source))
    definitions = [text for text in head if names.spell(text) not in map(source.text, source.statements)]
    taken = any(names.binds(_name(text)) for text in definitions)
    name = free_name("mended", source.names)
    definitions = [names.spell(text) for text in definitions]
    if "torch.manual_seed(" in code:
        body = f"{names.spell(_DRAWS)}\n{textwrap.indent(body, '    ')}"
    if door.of_setup:
        body = f"model = setup.model\n{body}\nreturn {names.spell('replace')}(setup, model=model)"
    else:
        body = f"{body}\nreturn model"
    inner = "\n\n".join([*definitions, body]) if taken else body
    given = "setup" if door.of_setup else "model"
    function = f'def {name}({given}):\n    """Mend what kept this network from learning."""\n'
    function += textwrap.indent(inner, "    ") + "\n"
    parts = [function] if taken else [*definitions, function]
    text = styled(source, "\n\n".join(part.strip("\n") + "\n" for part in parts))
    calls = [Splice(s.start, s.end, s.text.replace("{}", name, 1)) for s in door.splices]
    return [apart(source, door.anchor, text, more=door.target is None), *calls], name


def apart(source: Source, place: Splice, text: str, more: bool) -> Splice:
    """Definitions with two empty lines before them, and after them where `more` follows."""
    above = source.utf8[: place.start].decode()
    kept = len(above) - len(above.rstrip("\r\n"))
    lines = above[len(above) - kept :].count("\n") if above.strip() else 3
    gap = source.newline * max(0, 3 - lines)
    return Splice(place.start, place.end, gap + text + (source.newline * 2 if more else ""))


def tuner_splices(source: Source, names: Names, model: str, call: cst.Call, code: str) -> list[Splice]:
    """A helper for a live optimizer: its definition, and the call after the optimizer is made.

    Args:
        source: of the file.
        names: spells code there.
        model: what the model is called there.
        call: that makes the optimizer.
        code: Python that changes variables called `optimizer` and `model`.

    Raises:
        Unpatched: if the optimizer is not given a name where it is made.
    """
    _, line = source.block(call)
    parts = line.body if isinstance(line, cst.SimpleStatementLine) else ()
    given = [part for part in parts if isinstance(part, cst.Assign) and part.value is call]
    target = given[0].targets[0].target if given else None
    if not isinstance(target, cst.Name):
        raise Unpatched(f"{source.place(call)} gives the optimizer no name")
    name, (head, body) = free_name("tuned", source.names), _split(code)
    body = "\n\n".join([*head, body])
    text = f'def {name}(optimizer, {model}):\n    """Give the optimizer what it lacked."""\n'
    body = re.sub(r"\bmodel\b", model, _own_names(body, source))
    text += textwrap.indent(f"{names.spell(body)}\nreturn optimizer\n", "    ")
    place = source.below(line)
    more = f"{ended(source, place)}{source.margin(line)}{target.value} = {name}({target.value}, {model})"
    after = Splice(place.start, place.end, more + source.newline)
    return [apart(source, source.above(source.statement(line)), styled(source, text), more=True), after]


def free_name(name: str, taken: frozenset[str]) -> str:
    """A name that is not taken: with a number, if it has to be.

    >>> free_name("mended", frozenset({"mended"}))
    'mended_2'
    """
    tries = (name if i == 1 else f"{name}_{i}" for i in range(1, len(taken) + 2))
    return next(attempt for attempt in tries if attempt not in taken)


def styled(source: Source, text: str) -> str:
    """Text with the indentation and the line ends of a file."""
    spaces = re.compile(r"^((?: {4})+)", re.M)
    text = spaces.sub(lambda found: source.indent * (len(found[1]) // 4), text)
    return text.replace("\n", source.newline)


def _split(code: str) -> tuple[list[str], str]:
    """The definitions that code begins with, without imports, and the rest."""
    lines, statements = code.splitlines(), ast.parse(code).body
    head: list[str] = []
    last = 0
    for statement in statements:
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            first = min([statement.lineno, *(d.lineno for d in statement.decorator_list)])
            head.append("\n".join(lines[first - 1 : statement.end_lineno]))
        elif not isinstance(statement, (ast.Import, ast.ImportFrom)):
            break
        last = statement.end_lineno or last
    return head, "\n".join(lines[last:]).strip("\n")


def _name(definition: str) -> str:
    found = re.search(r"^(?:def|class) (\w+)", definition, re.M)
    return found[1] if found else ""


def _own_names(body: str, source: Source) -> str:
    """Code without imports that the file has, and from the file that it becomes a part of."""
    common = "|".join(re.escape(written(name)) for name in HOMES)
    body = re.sub(rf"^[ \t]*(?:{common})\n", "", body, flags=re.M)
    pattern = rf"^[ \t]*from {re.escape(Path(source.file).stem)} import (\w+) as (\w+)\n"
    renamed = [(own, name) for own, name in re.findall(pattern, body, re.M) if own != name]
    if renamed:
        raise Unpatched(f"the edit renames {renamed[0][0]}")
    return re.sub(pattern, "", body, flags=re.M)
