"""Patch: the changes of a treatment, written into the user's source."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import unified_diff
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.text import Text
from torch.optim import Optimizer

from gradmend.console import Printable
from gradmend.errors import TargetError
from gradmend.patch.forms import Call, Insert, Swap
from gradmend.patch.helper import Doors, helper_splices, tuner_splices
from gradmend.patch.names import Names
from gradmend.patch.origins import Origins
from gradmend.patch.source import Source, Splice, Statement, Unpatched, bound, spliced
from gradmend.patch.structure import Structure, rehearse
from gradmend.patch.training import Training, Wish, read_wish
from gradmend.remedies import Change
from gradmend.remedies.code import code
from gradmend.setup import Setup
from gradmend.surgery import Edit
from gradmend.treatment import Treatment


@dataclass(frozen=True)
class Patch(Printable):
    """A file before and after the changes of a treatment.

    Args:
        file: as typed.
        name: that the target has afterwards.
        before: the bytes of the file.
        after: the bytes of the patched file; the same if nothing could be written into it.
        written: the changes that are in it, a line each, with `file:line` of the original.
        left: those that are not, with the reason.
    """

    file: str
    name: str
    before: bytes
    after: bytes
    written: tuple[str, ...]
    left: tuple[str, ...]

    def diff(self) -> bytes:
        """A unified diff in the encoding and with the line ends of the file; empty without changes."""
        path = Path(self.file)
        inside = path.resolve().is_relative_to(Path.cwd())
        shown = path.resolve().relative_to(Path.cwd()).as_posix() if inside else path.as_posix()
        names = [f"a/{shown}", f"b/{shown}"] if inside else [shown, shown]
        names = [f"{name}\t" if " " in name else name for name in names]
        old, new = (_lines(data.decode("latin-1")) for data in (self.before, self.after))
        left, right = (name.encode().decode("latin-1") for name in names)
        made = unified_diff(old, new, left, right)
        ends = "\n\\ No newline at end of file\n"
        return "".join(line if line.endswith("\n") else line + ends for line in made).encode("latin-1")

    def __rich__(self) -> RenderableType:
        lines = [f"Written: {line}" for line in self.written] + [f"Left: {line}" for line in self.left]
        return Text("\n".join(lines) or "Nothing to write.")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        keys = ("file", "name", "written", "left")
        return {key: getattr(self, key) for key in keys} | {"diff": self.diff().decode(errors="replace")}


def patched(
    data: bytes,
    file: str,
    name: str,
    setup: Setup,
    treatment: Treatment,
    typed: Sequence[str] = (),
    check: Callable[[bytes, str], bool] | None = None,
) -> Patch:
    """Write the changes of a treatment into the source of its target.

    What the source shows is changed where it stands: the call that makes a layer, a loss or an optimizer, the
    call of a function. All else that has code goes into one function, through which the model goes.

    Args:
        data: the bytes of the file.
        file: its name, as the modules remember it.
        name: of the target in the file.
        setup: as the file makes it.
        treatment: of this setup.
        typed: the parts of the setup that are not from the file: "loss", "optimizer".
        check: whether patched bytes, with the name of their target, give the mended model. Where they do not,
            less is written in place and more into the function.

    Raises:
        TargetError: if the file does not show the target.
    """
    source = Source(data, file)
    target = _definition(source, name)
    made, why = Patch(file, name, data, data, (), ()), UNPROVED
    for barred in _BARRED:
        writer = _Writer(source, target, name, setup, treatment, typed, barred)
        try:
            made, why = writer.patch(data), UNPROVED
        except (Unpatched, SyntaxError) as error:
            why = f"no patch that is Python: {error}"
            continue
        if check is None or not writer.whole or check(made.after, made.name):
            return made
    return replace(made, left=(*made.left, why))


UNPROVED = "the patched file does not give the mended model: look it through"

_BARRED: tuple[tuple[type, ...], ...] = ((), (Insert,), (Insert, Swap, Call))
"""What is not written in place, one after the other, until the patched file gives the mended model."""


class _Writer:
    def __init__(
        self,
        source: Source,
        target: Statement,
        name: str,
        setup: Setup,
        treatment: Treatment,
        typed: Sequence[str],
        barred: tuple[type, ...],
    ) -> None:
        self.source, self.target, self.name, self.barred = source, target, name, barred
        self.setup = setup
        self.names = Names(source, target)
        self.training = Training(source, self.names, target, setup, typed)
        self.doors = Doors(source, target, name, self.training)
        self.changes = treatment.changes
        self.splices: list[Splice] = []
        self.written: list[str] = []
        self.left: list[str] = []
        self.handled: list[Edit] = []
        self.held: list[tuple[Change, str]] = []
        self.whole = True

    def patch(self, data: bytes) -> Patch:
        """The patch of the file."""
        after = self.write()
        left = [*self.left, *(text for change in self.changes for text in change.by_hand)]
        first = len(self.source.file) + 1
        written = sorted(dict.fromkeys(self.written), key=lambda line: int(line[first:].partition(":")[0]))
        return Patch(self.source.file, self.name, data, after, tuple(written), tuple(dict.fromkeys(left)))

    def write(self) -> bytes:
        """The patched file."""
        self._model()
        self._train(read_wish(self.setup, self.changes))
        self._tune()
        for change in self.changes:
            missing = [e for e in change.edits if not any(e is other for other in self.handled)]
            self.left += [f"{edit.text}: {_by_hand(edit)}" for edit in missing]
        if not self.splices:
            return self.source.module.bytes
        utf8 = spliced(self.source.utf8, [*self.names.imports(), *self.splices])
        after = utf8.decode().encode(self.source.module.encoding)
        compile(after, self.source.file, "exec", dont_inherit=True)
        return after

    def _model(self) -> None:
        """The edits of the model: in place where that can be, the others by a helper."""
        steps = rehearse(self.setup, self.changes, self.source.file)
        origins = Origins(self.source, self.setup.model, self.target)
        structure = Structure(self.source, self.names, origins, steps, self.barred)
        written = structure.write()
        self.splices += written.splices
        self.written += written.lines
        self.handled += [step.edit for step in steps]
        needy = [step.edit.text for step in steps if not step.alone]
        self.left += [f"{text}: its code needs more than the model" for text in needy]
        self.whole = not needy
        for index, change in enumerate(self.changes):
            own = [step for step in structure.rest if step.change == index and step.alone]
            if own:
                edits = tuple(structure.translated(step) for step in own)
                why = next((structure.why[id(step)] for step in own if id(step) in structure.why), "")
                self.held.append((replace(change, edits=edits), why))
        if self.held:
            self._helper([change for change, _ in self.held])

    def _helper(self, changes: Sequence[Change]) -> None:
        try:
            door = self.doors.find()
            splices, name = helper_splices(self.source, self.names, door, code(changes))
        except Unpatched as reason:
            self.left += [f"{change.text}: {reason}" for change in changes]
            self.whole = False
            return
        self.splices += splices
        self.name = door.target or self.name
        place = f"{self.source.file}:{door.line}"
        for change, why in self.held:
            self.written.append(f"{place}: {change.text}, by `{name}`" + (f" ({why})" if why else ""))

    def _train(self, wish: Wish) -> None:
        """The edits of loss, optimizer and setup."""
        if wish.loss is not None:
            self._try(wish.edits["loss"], partial(self.training.write_loss, wish.loss))
        if "optimizer" in wish.edits:
            write = partial(self.training.write_optimizer, wish.optimizer, wish.options)
            self._try(wish.edits["optimizer"], write)
        call = self.training.setup_call()
        for key, value in wish.keywords.items():
            if call is not None and value:  # else it hangs on the optimizer itself, or is for the loop
                self._try(wish.edits[key], partial(self.training.write_keyword, call, key, value))

    def _tune(self) -> None:
        """The edits of a live optimizer that are more than options."""
        changes = [
            replace(c, edits=tuple(e for e in c.edits if self._for_optimizer(e))) for c in self.changes
        ]
        changes = [change for change in changes if change.edits]
        if not changes:
            return

        def write() -> tuple[list[Splice], str]:
            model = self.doors.model_name()
            if model is None or not isinstance(self.setup.optimizer, Optimizer):
                raise Unpatched("the optimizer is not made beside the model")
            call = self.training.optimizer_call()
            splices = tuner_splices(self.source, self.names, model, call, code(changes))
            return splices, f"{self.source.place(call)}: {', '.join(c.text for c in changes)}"

        self._try([edit for change in changes for edit in change.edits], write)

    def _for_optimizer(self, edit: Edit) -> bool:
        done = any(edit is other for other in self.handled)
        return not done and bool(re.search(r"^[^#\n]*\boptimizer\b", edit.code, re.M))

    def _try(self, edits: Sequence[Edit], write: Callable[[], tuple[list[Splice], str]]) -> None:
        self.handled += edits
        try:
            splices, line = write()
        except Unpatched as reason:
            self.left += [f"{edit.text}: {reason}" for edit in edits]
        else:
            self.splices += splices
            self.written.append(line)


def _definition(source: Source, name: str) -> Statement:
    """The last statement that binds the target."""
    found = [statement for statement in source.statements if name in bound(statement)]
    if not found:
        raise TargetError(f"{source.file} does not show how {name!r} is made, so no patch can be written.")
    return found[-1]


def _by_hand(edit: Edit) -> str:
    """What is left to the user: the code of an edit that is for a loop, as its comments say."""
    lines = edit.code.splitlines()
    said = any(line.startswith("#") for line in lines)
    words = "; ".join(line.lstrip("# ") for line in lines)
    return f"by hand: {words}" if said else "no place for it in the source"


def _lines(text: str) -> list[str]:
    """Lines with their ends, at line feeds alone."""
    return re.findall(r"[^\n]*\n|[^\n]+", text)
