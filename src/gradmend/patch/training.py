"""Training: edits of the loss, the optimizer and the setup, written into the calls that make them."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import libcst as cst
import torch
from libcst import matchers as m

from gradmend.patch.names import Names
from gradmend.patch.origins import reachable
from gradmend.patch.source import Source, Splice, Statement, Unpatched, bound
from gradmend.remedies import Change
from gradmend.setup import Setup, trainable
from gradmend.surgery import Edit

_OPTION = re.compile(r"for group in optimizer\.param_groups:\n    group\[(['\"])(\w+)\1\] = (.+)")
_LOSS_NAMES = ("loss_fn", "criterion", "loss")
_PLAIN_FIELDS = ("accumulate", "batch_size")
_MADE_FIELDS = ("schedule", "gradient_transform")
_PUBLIC = (torch.optim.lr_scheduler, torch.nn.utils)


@dataclass
class Wish:
    """What the edits ask of the training, all together.

    Args:
        optimizer: the name of another class.
        options: of the optimizer, as code.
        loss: the expression of another loss.
        keywords: of the setup, as code.
        edits: those that this is from, by the part that they change.
    """

    optimizer: str | None = None
    options: dict[str, str] = field(default_factory=dict)
    loss: str | None = None
    keywords: dict[str, str] = field(default_factory=dict)
    edits: dict[str, list[Edit]] = field(default_factory=dict)


def read_wish(setup: Setup, changes: Sequence[Change]) -> Wish:
    """What changes ask of the training: later ones count."""
    wish = Wish()
    for before, change in zip([setup, *(c.setup for c in changes)], changes, strict=False):
        for edit in change.edits:
            _read_edit(wish, edit)
        known = [edit for held in wish.edits.values() for edit in held]
        for name, text in _changed_fields(before, change.setup).items():
            wish.keywords[name] = text
            own = [edit for edit in change.edits if not any(edit is other for other in known)]
            wish.edits.setdefault(name, []).extend(own)
    return wish


def _read_edit(wish: Wish, edit: Edit) -> None:
    if found := _OPTION.fullmatch(edit.code):
        wish.options[found[2]] = found[3]
        wish.edits.setdefault("optimizer", []).append(edit)
        return
    statements = ast.parse(edit.code).body
    values = {ast.unparse(s.targets[0]): s.value for s in statements if isinstance(s, ast.Assign)}
    if len(values) != len(statements):
        return
    made = values.get("optimizer")
    if isinstance(made, ast.Call) and ast.unparse(made.func).startswith("torch.optim."):
        wish.optimizer = ast.unparse(made.func).rpartition(".")[2]
        wish.options = {str(k.arg): ast.unparse(k.value) for k in made.keywords}
        wish.edits["optimizer"] = [*wish.edits.get("optimizer", []), edit]
    elif "loss_fn" in values:
        made = values.pop("loss_fn")
        new = ast.unparse(_Inlined(values).visit(made))
        wish.loss = new if wish.loss is None else _around(new, wish.loss)
        wish.edits["loss"] = [*wish.edits.get("loss", []), edit]


def _around(new: str, old: str) -> str:
    """A loss made of the one before, which it calls `loss_fn`.

    >>> _around("partial(twice, loss_fn)", "nn.MSELoss()")
    'partial(twice, nn.MSELoss())'
    """
    return re.sub(r"\bloss_fn\b", lambda _: old, new)


class _Inlined(ast.NodeTransformer):
    """Puts the values of local names in their place."""

    def __init__(self, values: dict[str, ast.expr]) -> None:
        self.values = values

    def visit_Name(self, node: ast.Name) -> ast.expr:
        """The value of a name, if it has one."""
        return self.values.get(node.id, node) if isinstance(node.ctx, ast.Load) else node


def _changed_fields(before: Setup, after: Setup) -> dict[str, str]:
    """The fields of a setup that hold something else, as code; "" where there is no code."""
    plain = {name: getattr(after, name) for name in _PLAIN_FIELDS}
    found = {name: repr(value) for name, value in plain.items() if value != getattr(before, name)}
    made = [n for n in _MADE_FIELDS if getattr(before, n) is None and getattr(after, n) is not None]
    return found | {name: _written(getattr(after, name)) for name in made}


def _written(value: Any) -> str:
    """The code of a partial function of torch's; "" for anything else."""
    if not isinstance(value, partial):
        return ""
    name = value.func.__name__
    home = next((h.__name__ for h in _PUBLIC if getattr(h, name, None) is value.func), "")
    plain = all(isinstance(v, (int, float, str, bool)) for v in (*value.args, *value.keywords.values()))
    if not home or not plain:
        return ""
    options = [*map(repr, value.args), *(f"{key}={v!r}" for key, v in value.keywords.items())]
    return f"partial({', '.join([f'{home}.{name}', *options])})"


class Training:
    """Finds the calls that make loss, optimizer and setup.

    Args:
        source: of the file.
        names: spells code there.
        target: the statement that defines what is mended.
        setup: as the file makes it.
        typed: the parts that come from the command line: "loss", "optimizer".
    """

    def __init__(
        self, source: Source, names: Names, target: Statement, setup: Setup, typed: Sequence[str]
    ) -> None:
        self.source, self.names, self.setup, self.typed = source, names, setup, typed
        self.target = target
        self.needed = reachable(source, target)

    def setup_call(self) -> cst.Call | None:
        """The one call of `Setup` in what the target depends on."""
        calls = [c for c in self.source.calls if self.source.called(c) == "Setup"]
        calls = [c for c in calls if self.source.within(c, self.needed) and not any(a.star for a in c.args)]
        own = [c for c in calls if self.source.within(c, [self.target])] or calls
        return own[0] if len(own) == 1 else None

    def argument(self, call: cst.Call, name: str) -> cst.Arg | None:
        """The argument of a call of `Setup` for a field."""
        return find_argument(call, [f.name for f in fields(Setup)], name)

    # ---- loss ------------------------------------------------------------------------------------------

    def write_loss(self, new: str) -> tuple[list[Splice], str]:
        """Another loss."""
        if "loss" in self.typed:
            raise Unpatched("the loss is the one that was typed; leave out --loss and put it into the file")
        if (function := self._loss_function()) is not None:
            return self._rebound(function, new)
        node = self._loss()
        old = self.source.text(node)
        text = _around(self.names.spell(new), old)
        text = f"({text})" if text.startswith("lambda") else text
        return [Splice(*self.source.span(node), text)], f"{self.source.place(node)}: {old} -> {text}"

    def _loss_function(self) -> cst.FunctionDef | None:
        """The function of the file that is the loss by its name."""
        named = [s for s in self.source.statements if isinstance(s, cst.FunctionDef)]
        own = [s for name in _LOSS_NAMES for s in named if s.name.value == name]
        alone = len(own) == 1 and self._assigned(own[0].name.value) is None
        return own[0] if alone and self.setup_call() is None else None

    def _rebound(self, function: cst.FunctionDef, new: str) -> tuple[list[Splice], str]:
        """The name of a function bound to something else after it."""
        name, place = function.name.value, self.source.below(function)
        text = _around(self.names.spell(new), name)
        line = f"{self.source.newline}{name} = {text}{self.source.newline}"
        return [Splice(place.start, place.end, line)], f"{self.source.place(function)}: {name} = {text}"

    def _loss(self) -> cst.BaseExpression:
        call = self.setup_call()
        given = self.argument(call, "loss_fn") if call is not None else None
        if given is not None:
            return self._value(given.value)
        for name in _LOSS_NAMES:
            if value := self._assigned(name):
                return value
        raise Unpatched(f"{self.source.file} makes no loss")

    def _value(self, node: cst.BaseExpression) -> cst.BaseExpression:
        """What a name was set to, if that is plain to see; else the expression itself."""
        if isinstance(node, cst.Name):
            local = self._assigned(node.value, self.source.block(node)[0])
            return local or self._assigned(node.value) or node
        return node

    def _assigned(self, name: str, block: Sequence[Statement] | None = None) -> cst.BaseExpression | None:
        """The value of the one assignment to a name in a block."""
        statements = [s for s in block or self.source.statements if name in bound(s)]
        if len(statements) != 1 or not isinstance(statements[0], cst.SimpleStatementLine):
            return None
        for part in statements[0].body:
            target: cst.BaseExpression | None = None
            if isinstance(part, cst.Assign):
                target = part.targets[0].target
            if isinstance(part, cst.AnnAssign):
                target = part.target
            if isinstance(part, (cst.Assign, cst.AnnAssign)) and m.matches(target or part, m.Name(name)):
                return part.value
        return None

    # ---- optimizer -------------------------------------------------------------------------------------

    def optimizer_call(self) -> cst.Call:
        """The call that makes the optimizer, or the partial function that will."""
        if "optimizer" in self.typed:
            raise Unpatched("the optimizer is the one that was typed; give --optimizer otherwise")
        kind = type(self.setup.build_optimizer()).__name__
        calls = [c for c in self.source.calls if kind in (self.source.called(c), self._of_partial(c))]
        needed = (
            self.needed
            if self.setup_call()
            else [s for s in self.source.statements if "optimizer" in bound(s)]
        )
        own = [call for call in calls if self.source.within(call, needed)]
        if len(own) != 1:
            raise Unpatched(f"{self.source.file} makes {'several' if own else 'no optimizer'} for this model")
        return own[0]

    def _of_partial(self, call: cst.Call) -> str:
        first = call.args[0].value if call.args else None
        return self.source.qualified(first).rpartition(".")[2] if self._is_partial(call) and first else ""

    def _is_partial(self, call: cst.Call) -> bool:
        return self.source.called(call) == "partial"

    def write_optimizer(self, kind: str | None, options: dict[str, str]) -> tuple[list[Splice], str]:
        """Another optimizer, or other options of the same."""
        call = self.optimizer_call()
        if any(arg.star for arg in call.args):
            raise Unpatched(f"{self.source.place(call)} takes its arguments from elsewhere")
        splices = self._options(call, options) if kind is None else [self._class(call, kind, options)]
        new = ", ".join(f"{key}={value}" for key, value in options.items())
        words = f"{kind or self.source.called(call)}({new})" if kind else new
        return splices, f"{self.source.place(call)}: {self.source.text(call)} -> {words}"

    def _class(self, call: cst.Call, kind: str, options: dict[str, str]) -> Splice:
        written = "".join(f", {key}={value}" for key, value in options.items())
        name = self.names.spell(f"torch.optim.{kind}")
        start, end = self.source.span(call.args[0])[0], self.source.span(call.args[-1].value)[1]
        if self._is_partial(call):
            return Splice(start, end, name + written)
        given = self.source.text(call.args[0].value)
        self._check_groups(call, "")
        live = self.setup.build_optimizer()
        held = [p for group in live.param_groups for p in group["params"]]
        if len(held) != len(trainable(self.setup.model)):
            raise Unpatched(f"{self.source.place(call)} gets some of the parameters only")
        return Splice(self.source.span(call.func)[0], end, f"{name}({given}{written}")

    def _options(self, call: cst.Call, options: dict[str, str]) -> list[Splice]:
        kind = type(self.setup.build_optimizer())
        names = list(inspect.signature(kind).parameters)
        names = ["", *names] if self._is_partial(call) else names
        if not self._is_partial(call):
            for option in options:
                self._check_groups(call, option)
        return keyword_splices(self.source, call, names, options)

    def _check_groups(self, call: cst.Call, option: str) -> None:
        given = self.source.text(call.args[0].value) if call.args else ""
        if re.search(rf"""["']{option or "params"}["']""", given):
            raise Unpatched(f"{self.source.place(call)} sets it for each group of parameters")

    # ---- setup -----------------------------------------------------------------------------------------

    def write_keyword(self, call: cst.Call, name: str, value: str) -> tuple[list[Splice], str]:
        """Another field of the setup that a call makes."""
        text = self.names.spell(value)
        splices = keyword_splices(self.source, call, [f.name for f in fields(Setup)], {name: text})
        return splices, f"{self.source.place(call)}: {name}={text}"


def find_argument(call: cst.Call, names: Sequence[str], name: str) -> cst.Arg | None:
    """The argument of a call for one of its parameters."""
    for index, arg in enumerate(call.args):
        given = arg.keyword.value if arg.keyword is not None else None
        if given == name or (given is None and not arg.star and names[index : index + 1] == [name]):
            return arg
    return None


def keyword_splices(
    source: Source, call: cst.Call, names: Sequence[str], values: dict[str, str]
) -> list[Splice]:
    """Set parameters of a call: values that are there are exchanged, others appended.

    >>> source = Source(b"SGD(p, 0.5)", "net.py")
    >>> keyword_splices(source, source.calls[0], ["params", "lr"], {"lr": "0.1", "momentum": "0.9"})
    [Splice(start=7, end=10, text='0.1'), Splice(start=10, end=10, text=', momentum=0.9')]
    """
    splices, more = [], ""
    for name, value in values.items():
        arg = find_argument(call, names, name)
        if arg is None:
            more += f", {name}={value}"
        else:
            splices.append(Splice(*source.span(arg.value), value))
    if more and call.args:
        end = source.span(call.args[-1].value)[1]
        splices.append(Splice(end, end, more))
    return splices
