"""Structure: edits of the model that are written where the source makes the layer or calls the function."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import libcst as cst
from torch import nn

from gradmend.patch.forms import Call, Insert, Swap, function_call, read_form
from gradmend.patch.names import Names
from gradmend.patch.origins import Origins, Rehearsal
from gradmend.patch.source import Source, Splice, Unpatched, bound
from gradmend.remedies import Change
from gradmend.setup import Setup
from gradmend.surgery import Edit

_STRINGS = re.compile(r"""(["'])([\w.]*)\1""")
Step = tuple[nn.Module, str]
"""A module of the rehearsal, and the name of one of its children."""


@dataclass(frozen=True)
class Rehearsed:
    """An edit of the model with what its paths meant when it was made.

    Args:
        change: which of the changes it belongs to.
        form: what it does, if that can be written in place.
        origin: the module of the file that it changes, if it is one.
        ways: for each path in its code, the modules on the way to it.
        ends: the modules that the paths lead to.
        made: the module that is new at its path.
        alone: whether its code needs nothing but the model.
    """

    change: int
    edit: Edit
    form: Swap | Insert | Call | None
    origin: nn.Module | None
    ways: dict[str, tuple[Step, ...]]
    ends: dict[str, nn.Module]
    made: nn.Module | None
    alone: bool


def rehearse(setup: Setup, changes: Sequence[Change], file: str) -> list[Rehearsed]:
    """Make all edits of the model once more, and look what they are about."""
    rehearsal, found = Rehearsal(setup), []
    for index, edit in ((i, edit) for i, change in enumerate(changes) for edit in change.edits):
        if not concerns_model(edit):
            continue
        form = read_form(edit, file)
        paths = {path for _, path in _STRINGS.findall(edit.code)}
        ends = {path: end for path in paths if path and (end := rehearsal.at(path)) is not None}
        parents = {path.rpartition(".")[0] for path in paths - set(ends)}
        ends |= {path: end for path in parents if path and (end := rehearsal.at(path)) is not None}
        ways = {path: tuple(rehearsal.walk(path)) for path in ends}
        path = edit.where if form is None else form.path
        old = rehearsal.at(path)
        origin = rehearsal.origins.get(old) if old is not None else None
        alone = rehearsal.run(edit)
        if isinstance(form, Swap) and origin is not None:
            rehearsal.inherit(path, origin)
        found.append(Rehearsed(index, edit, form, origin, ways, ends, rehearsal.at(path), alone))
    return found


def concerns_model(edit: Edit) -> bool:
    """Whether an edit has code for the model, and for nothing else."""
    return bool(re.search(r"^[^#\n]*\bmodel\b", edit.code, re.M)) and not re.search(
        r"^[^#\n]*\boptimizer\b", edit.code, re.M
    )


@dataclass
class Written:
    """What is written in place: splices, the lines that say so, and why others are not."""

    splices: list[Splice]
    lines: list[str]
    edits: list[Edit]


class Structure:
    """Finds the edits that can be written in place.

    Args:
        source: of the file.
        names: spells code there.
        origins: of the modules.
        steps: all edits of the model.
        barred: forms that are not to be written in place.
    """

    def __init__(
        self,
        source: Source,
        names: Names,
        origins: Origins,
        steps: Sequence[Rehearsed],
        barred: tuple[type, ...] = (),
    ) -> None:
        self.source, self.names, self.origins, self.barred = source, names, origins, barred
        self.steps = list(steps)
        self.rest = list(steps)
        self.why: dict[int, str] = {}
        self.flat: list[Rehearsed] = []

    def write(self) -> Written:
        """Choose edits, and write them."""
        chosen = [step for step in self.steps if self._fits(step)]
        while True:
            self.rest = [step for step in self.steps if not any(step is other for other in chosen)]
            self.flat = [step for step in chosen if isinstance(step.form, Insert)]
            bad = [step for step in chosen if not self._alike(step, chosen) or self._needed(step)]
            if not bad:
                break
            chosen = [step for step in chosen if not any(step is other for other in bad)]
        self.names.lacking.clear()  # what edits needed that are not written
        written = Written([], [], [step.edit for step in chosen])
        for step in chosen:
            for call, (splice, words) in self._texts(step):
                if splice not in written.splices:
                    written.splices.append(splice)
                    written.lines.append(f"{self.source.place(call)}: {words}")
        return written

    # ---- which -----------------------------------------------------------------------------------------

    def _fits(self, step: Rehearsed) -> bool:
        """Whether the source shows what an edit changes."""
        if step.origin is None or step.form is None or isinstance(step.form, self.barred):
            return False
        try:
            return bool(self._texts(step))
        except Unpatched as reason:
            self.why[id(step)] = str(reason)
            return False

    def _alike(self, step: Rehearsed, chosen: Sequence[Rehearsed]) -> bool:
        """Whether all that the same piece of source makes is changed alike."""
        fellows = [other.origin for other in chosen if self._same(step, other)]
        missing = [m for m in self._meant(step) if not any(m is fellow for fellow in fellows)]
        if missing:
            line = self._texts(step)[0][0]
            reason = f"{self.source.place(line)} makes layers of which only some change"
            self.why[id(step)] = reason
        return not missing

    def _same(self, one: Rehearsed, other: Rehearsed) -> bool:
        a, b = one.form, other.form
        if isinstance(a, Call) and isinstance(b, Call):
            return a.places == b.places and a.new == b.new
        return type(a) is type(b) and a is not None and b is not None and a.new == b.new

    def _meant(self, step: Rehearsed) -> list[nn.Module]:
        """The modules that the piece of source stands for which an edit changes."""
        if isinstance(step.form, Call):
            call = self._function(step, step.form)[0]
            own = next((n for n in self.source.inside(call) if isinstance(n, cst.ClassDef)), None)
            named = own.name.value if own is not None else ""
            modules = self.origins.model.modules()
            return [m for m in modules if any(kind.__name__ == named for kind in type(m).__mro__)]
        assert step.origin is not None
        if isinstance(step.form, Insert):
            return [step.origin]
        return [m for call, _ in self._texts(step) for m in self.origins.made_by(call)] or [step.origin]

    def _needed(self, step: Rehearsed) -> bool:
        """Whether an edit that stays needs what another one would do away with."""
        form = step.form
        for other in self.rest:
            if isinstance(form, Call) and other.made is step.made and "__class__" in other.edit.code:
                return True  # its forward holds all calls, changed or not
            for path, way in other.ways.items():
                end = other.ends[path]
                if isinstance(form, Call) and any(m is step.made and n in form.children for m, n in way):
                    return True
                if isinstance(form, Insert) and end is step.made:
                    return True
                if isinstance(form, Insert) and end is self._parent_of(step) and "list(" in other.edit.code:
                    return True
        return False

    # ---- what ------------------------------------------------------------------------------------------

    def _texts(self, step: Rehearsed) -> list[tuple[cst.Call, tuple[Splice, str]]]:
        """The calls in the source that an edit changes, with the splice and the words for each."""
        if isinstance(step.form, Call):
            return [(call, self._instead(call, step.form)) for call in self._function(step, step.form)]
        if isinstance(step.form, Insert):
            return [self._inserted(step, step.form)]
        if isinstance(step.form, Swap) and step.origin is not None:
            call = self._made(step.origin)
            return [(call, self._swapped(call, step, step.form))]
        return []

    def _made(self, module: nn.Module) -> cst.Call:
        call = self.origins.calls.get(module)
        if call is None:
            raise Unpatched(f"the source does not show which call makes {type(module).__name__}")
        if other := self.origins.shared(call):
            raise Unpatched(f"{self.source.place(call)} is also used by {other}")
        return call

    def _swapped(self, call: cst.Call, step: Rehearsed, form: Swap) -> tuple[Splice, str]:
        old = self.source.text(call)
        if form.new == "nn.Identity()" and (gone := self._left_out(call, step)):
            return gone, f"{old} left out"
        new = self.names.spell(form.new)
        return Splice(*self.source.span(call), new), f"{old} -> {new}"

    def _left_out(self, call: cst.Call, step: Rehearsed) -> Splice | None:
        """The last argument of nn.Sequential is taken out, where nothing counts the layers."""
        parents = [m for m in self.origins.calls if isinstance(m, nn.Sequential)]
        for parent in parents:
            made = self.origins.calls[parent]
            last = made.args[-1] if len(made.args) > 1 else None
            if last is None or last.value is not call or self._counted(made):
                continue
            if any(way[-1][1] == step.edit.where for other in self.rest for way in other.ways.values()):
                continue
            return self._without(made.args[-2], last)
        return None

    def _without(self, before: cst.Arg, last: cst.Arg) -> Splice:
        """Cuts the last argument: its line if it has one to itself, else from the end of the one before."""
        first, following = self._whole_line(last)
        if first is not None:
            return Splice(first, following, "")
        return Splice(self.source.span(before.value)[1], self.source.span(last.value)[1], "")

    def _counted(self, made: cst.Call) -> bool:
        """Whether the source takes layers by their number, so that these must not change."""
        names = bound(self.source.block(made)[1])
        for node in cst.matchers.findall(self.source.module, cst.matchers.Subscript()):
            if isinstance(node, cst.Subscript):
                text = self.source.text(node.value)
                if text in names or text.startswith("self."):
                    return True
        return False

    def _parent_of(self, step: Rehearsed) -> nn.Module | None:
        path = step.form.path if step.form is not None else ""
        return step.ways[path][-1][0] if path in step.ways else None

    def _inserted(self, step: Rehearsed, form: Insert) -> tuple[cst.Call, tuple[Splice, str]]:
        """One more argument of nn.Sequential, beside the layer."""
        if not form.path.rpartition(".")[2].isdecimal():
            raise Unpatched("the source shows no call of nn.Sequential around the layer")
        parents = [m for m in self.origins.model.modules() if self.origins.arguments(m)]
        for parent in parents:
            places = [i for i, child in enumerate(parent.children()) if child is step.origin]
            made = self._made(parent)
            if len(places) != 1 or len(self.origins.made_by(made)) != 1 or self._counted(made):
                continue
            argument = self.origins.arguments(parent)[places[0]]
            new = self.names.spell(form.new)
            words = f"{new} {'after' if form.after else 'before'} {self.source.text(argument.value)}"
            call = argument.value if isinstance(argument.value, cst.Call) else made
            return call, (self._beside(argument, new, form.after), words)
        raise Unpatched("the source shows no call of nn.Sequential around the layer")

    def _beside(self, argument: cst.Arg, new: str, after: bool) -> Splice:
        """One more argument: on a line of its own where its neighbour has one."""
        first, following = self._whole_line(argument)
        if first is None:
            start, end = self.source.span(argument.value)
            return Splice(end, end, f", {new}") if after else Splice(start, start, f"{new}, ")
        margin = self.source.utf8[first : self.source.span(argument)[0]].decode()
        line = f"{margin}{new},{self.source.newline}"
        place = following if after else first
        return Splice(place, place, line)

    def _whole_line(self, argument: cst.Arg) -> tuple[int | None, int]:
        """Where the line of an argument and the next one begin, if it has a line to itself, with a comma."""
        start, end = self.source.span(argument)
        first = max(offset for offset in self.source.starts if offset <= start)
        following = min((offset for offset in self.source.starts if offset >= end), default=end)
        around = self.source.utf8[first:start] + b"|" + self.source.utf8[end:following]
        alone = re.fullmatch(rb"\s*\|\s*,\s*(#.*)?\s*", around)
        return (first if alone else None), following

    def _function(self, step: Rehearsed, form: Call) -> list[cst.Call]:
        """The calls of functions in the source that an edit replaces."""
        found = []
        for line, function in form.places:
            own = self._named(step, line, function, len(form.children) or 1)
            for call in own:
                if not isinstance(self.source.statement(call), cst.ClassDef):
                    raise Unpatched(f"{self.source.place(call)} stands in a function that others may call")
                if other := self.origins.shared(call):
                    raise Unpatched(f"{self.source.place(call)} is also used by {other}")
            found += own
        return found

    def _named(self, step: Rehearsed, line: int | None, function: str, wanted: int) -> list[cst.Call]:
        """The calls of a function on a line; without a line, all in the class, if it has as many."""
        own = [c for c in self.source.calls if self.source.called(c) == function]
        if line is not None:
            own, wanted = [c for c in own if self.source.line(c) == line], 1
        else:
            classes = [s for s in self.source.statements if isinstance(s, cst.ClassDef)]
            classes = [s for s in classes if s.name.value == type(step.origin).__name__]
            own = [c for c in own if self.source.within(c, classes)]
            wanted = wanted if len(own) > 1 else 1  # a loop of the forward calls it several times
        if len(own) != wanted:
            where = f"{self.source.file}:{line}" if line is not None else self.source.file
            raise Unpatched(f"{where} does not show which call of `{function}` is meant")
        return own

    def _instead(self, call: cst.Call, form: Call) -> tuple[Splice, str]:
        """Another function on the same argument, or the argument alone."""
        given = _signal(call, self.source)
        span, old = self.source.span(call), self.source.text(call)
        if form.new is None:
            atom = isinstance(given, (cst.Name, cst.Call, cst.Attribute, cst.Subscript)) or given.lpar
            text = self.source.text(given)
            return Splice(*span, text if atom else f"({text})"), f"{old} -> {text}"
        of_torch = self.source.qualified(call.func).startswith("torch.") and "functional" not in (
            self.source.qualified(call.func)
        )
        new = function_call(form.new, self.source.text(given), of_torch)
        if new is None:
            raise Unpatched(f"{form.new} has no plain function")
        new = self.names.spell(new)
        return Splice(*span, new), f"{old} -> {new}"

    # ---- paths of the others ---------------------------------------------------------------------------

    def translated(self, step: Rehearsed) -> Edit:
        """An edit that stays, with the paths that the layers have after the insertions."""
        new = {path: self._path(step, path) for path in step.ways}

        def moved(path: str) -> str:
            owner, _, last = path.rpartition(".")
            return new.get(path) or (f"{new[owner]}.{last}" if owner in new else path)

        code = _STRINGS.sub(lambda found: f"{found[1]}{moved(found[2])}{found[1]}", step.edit.code)
        return replace(step.edit, code=code, where=moved(step.edit.where))

    def _path(self, step: Rehearsed, path: str) -> str:
        wraps = {id(other.made): other for other in self.flat}
        parents = {id(self._parent_of(other)) for other in self.flat}
        names: list[str] = []
        child: str | None = None
        parent: nn.Module | None = None
        for module, name in step.ways[path]:
            if id(module) in wraps and child is not None and parent is not None:
                offset = 0 if name == "body" else 1 if name == "after" else -1
                names[-1] = str(self._index(parent, child) + offset)
            elif id(module) in parents:
                parent, child = module, name
                names.append(str(self._index(module, name)))
            else:
                names.append(name)
        return ".".join(names)

    def _index(self, parent: nn.Module, child: str) -> int:
        """The number of a layer after the insertions before it."""
        mine = [o.form for o in self.flat if self._parent_of(o) is parent and isinstance(o.form, Insert)]
        at = [int(form.path.rpartition(".")[2]) for form in mine]
        before = [int(f.path.rpartition(".")[2]) for f in mine if not f.after]
        return int(child) + sum(i < int(child) for i in at) + (int(child) in before)


def _signal(call: cst.Call, source: Source) -> cst.BaseExpression:
    """What a function or method of one signal is applied to."""
    if isinstance(call.func, cst.Attribute) and not source.qualified(call.func).startswith("torch."):
        owner = source.qualified(call.func.value).partition(".")[0]
        if source.text(call.func.value) == "self" or owner in source.imports.values():
            raise Unpatched(f"{source.place(call)} calls a function of another kind")
        return call.func.value
    named = [arg.value for arg in call.args if arg.keyword is not None and arg.keyword.value == "input"]
    plain = [arg.value for arg in call.args if arg.keyword is None and not arg.star]
    if not (plain or named):
        raise Unpatched(f"{source.place(call)} has no argument that is known")
    return (plain or named)[0]
