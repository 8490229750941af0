"""Origins: which call in the source made each module, and what an edit's paths meant before all edits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import libcst as cst
import torch
from torch import nn

from gradmend.layers import definitions
from gradmend.lines import line_of_creation
from gradmend.patch.source import Source, Statement, mentioned, worked_on
from gradmend.setup import Setup
from gradmend.surgery import Edit


@dataclass(frozen=True)
class Origins:
    """Which call made each module of a model.

    Args:
        source: of the file.
        model: as the file makes it.
        target: the statement that defines what is mended.
    """

    source: Source
    model: nn.Module
    target: Statement
    calls: dict[nn.Module, cst.Call] = field(init=False, default_factory=dict)
    needed: list[Statement] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.needed.extend(reachable(self.source, self.target))
        for module in self.model.modules():
            candidates = self.candidates(module)
            if len(candidates) > 1 and type(module) is nn.Sequential:
                candidates = [call for call in candidates if self._lists(call, module)]
            if len(candidates) == 1:
                self.calls[module] = candidates[0]
        for module in self.model.modules():
            if isinstance(module, nn.Sequential):
                self._by_arguments(module)

    def candidates(self, module: nn.Module) -> list[cst.Call]:
        """The calls on the line that made a module, by the name of its class."""
        line, kind = self.source.is_here(line_of_creation(module)), type(module).__name__
        return [c for c in self.source.calls if self.source.line(c) == line and self.source.called(c) == kind]

    def made_by(self, call: cst.Call) -> list[nn.Module]:
        """The modules that one call made."""
        return [module for module, made in self.calls.items() if made is call]

    def _by_arguments(self, parent: nn.Sequential) -> None:
        """The calls that are the arguments of a call of nn.Sequential."""
        arguments = self.arguments(parent)
        for child, argument in zip(parent, arguments, strict=False):
            if isinstance(argument.value, cst.Call) and argument.value in self.candidates(child):
                self.calls[child] = argument.value

    def _lists(self, call: cst.Call, parent: nn.Sequential) -> bool:
        """Whether the arguments of a call seem to make the children of a module."""
        made = [self.source.called(a.value) if isinstance(a.value, cst.Call) else None for a in call.args]
        kinds = [type(child).__name__ for child in parent]
        pairs = zip(made, kinds, strict=False)
        return len(made) == len(kinds) and all(name in (None, kind) for name, kind in pairs)

    def arguments(self, parent: nn.Module) -> Sequence[cst.Arg]:
        """The arguments of the call of nn.Sequential that made a module, one for each child; else none."""
        call = self.calls.get(parent)
        if type(parent) is not nn.Sequential or call is None or len(call.args) != len(parent):
            return ()
        plain = all(not arg.star and arg.keyword is None for arg in call.args)
        return call.args if plain else ()

    def shared(self, call: cst.Call) -> str | None:
        """The place of other code that uses the function or class of this call; None if none does."""
        return self._shared(self.source.statement(call), frozenset())

    def _shared(self, statement: Statement, seen: frozenset[int]) -> str | None:
        if statement is self.target or not isinstance(statement, (cst.FunctionDef, cst.ClassDef)):
            return None
        for other in self.source.statements:
            if other is statement or id(other) in seen or statement.name.value not in mentioned(other):
                continue
            if not any(other is part for part in self.needed):
                return self.source.place(other)
            found = self._shared(other, seen | {id(statement)})
            if found:
                return found
        return None


def reachable(source: Source, target: Statement) -> list[Statement]:
    """The statements at the top level on which one depends by names, itself among them."""
    found, names = [target], set(mentioned(target))
    while True:
        more = [s for s in source.statements if not any(s is part for part in found) and worked_on(s) & names]
        if not more:
            return found
        found += more
        names |= {name for statement in more for name in mentioned(statement)}


class Rehearsal:
    """The edits once more, on a copy of the original: what their paths mean at each moment.

    Args:
        setup: as the file makes it.
    """

    def __init__(self, setup: Setup) -> None:
        twin = setup.copy()
        pairs = zip(setup.model.modules(), twin.model.modules(), strict=True)
        self.origins: dict[nn.Module, nn.Module] = {own: original for original, own in pairs}
        self.space: dict[str, Any] = {"model": twin.model}

    @property
    def model(self) -> nn.Module:
        """The copy, as the edits up to now have made it."""
        model: nn.Module = self.space["model"]
        return model

    def at(self, path: str) -> nn.Module | None:
        """The module that a path leads to now, if it leads to one."""
        return dict(self.model.named_modules(remove_duplicate=False)).get(path)

    def run(self, edit: Edit) -> bool:
        """Make an edit; whether that needs nothing but the model."""
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            try:
                exec(f"{definitions(edit.code)}\n{edit.code}", self.space)
            except Exception:  # most need a batch, which the file may not name
                return False
        return True

    def inherit(self, path: str, original: nn.Module) -> None:
        """Let the new module at a path count as the original whose place it took."""
        new = self.at(path)
        if new is not None:
            self.origins[new] = original

    def walk(self, path: str) -> Iterator[tuple[nn.Module, str]]:
        """Each module on the way along a path, with the name of the child that follows."""
        module = self.model
        for name in path.split("."):
            yield module, name
            module = module._modules[name] or module
