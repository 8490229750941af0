"""Forms: what an edit of a model does, read from its code."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from gradmend.surgery import Edit

_WITHOUT_DRAWING = ("activation", "dropout", "normalization", "batchnorm", "instancenorm", "flatten")
_FUNCTIONS = {"ReLU": "relu", "LeakyReLU": "leaky_relu", "ELU": "elu", "SELU": "selu", "GELU": "gelu"}
_FUNCTIONS |= {"SiLU": "silu", "Softmax": "softmax", "LogSoftmax": "log_softmax", "Softplus": "softplus"}
_FUNCTIONS |= {"Tanh": "tanh", "Sigmoid": "sigmoid", "Dropout": "dropout"}
_OF_TORCH = ("tanh", "sigmoid")
"""Those that torch.nn.functional keeps for old code only."""


@dataclass(frozen=True)
class Swap:
    """Another module in the place of one; `new` is the expression that makes it."""

    path: str
    new: str


@dataclass(frozen=True)
class Insert:
    """A module `new` before or after the one at a path."""

    path: str
    new: str
    after: bool


@dataclass(frozen=True)
class Call:
    """Another function in the place of calls in the forward of the module at a path; None leaves them out.

    Args:
        children: the names that the new modules have.
        places: line, if it is known, and function of each call.
    """

    path: str
    new: str | None
    children: tuple[str, ...]
    places: tuple[tuple[int | None, str], ...]


def read_form(edit: Edit, file: str) -> Swap | Insert | Call | None:
    """What an edit does, where it can be said in place; None for all others.

    Args:
        edit: of a model.
        file: whose calls it may change.

    >>> read_form(Edit("1", 'model.set_submodule("1", nn.ReLU())', ""), "net.py")
    Swap(path='1', new='nn.ReLU()')
    >>> code = 'model.set_submodule("0", After(model.get_submodule("0"), nn.LayerNorm((2,))))'
    >>> read_form(Edit("0", code, ""), "net.py")
    Insert(path='0', new='nn.LayerNorm((2,))', after=True)
    """
    statements = ast.parse(edit.code).body
    if statements and _is_put(statements[0]):
        return _put(edit.code, statements)
    return _call(edit, statements, file)


def _put(code: str, statements: list[ast.stmt]) -> Swap | Insert | None:
    calls = [s.value for s in statements if _is_put(s) and isinstance(s, ast.Expr)]
    first, *others = [call for call in calls if isinstance(call, ast.Call)]
    path, value = _string(first.args[0]), first.args[1]
    again = [f"model.get_submodule({path!r})" == ast.unparse(other.args[1]) for other in others]
    if len(calls) != len(statements) or path is None or not all(again):
        return None
    if _is_plain(value):
        return Swap(path, ast.get_source_segment(code, value) or "")
    if not isinstance(value, ast.Call) or not isinstance(value.func, ast.Name) or len(value.args) != 2:
        return None
    kept = ast.unparse(value.args[0]) == f"model.get_submodule({path!r})"
    if others or value.func.id not in ("After", "Before") or not kept or not _is_plain(value.args[1]):
        return None
    return Insert(path, ast.get_source_segment(code, value.args[1]) or "", value.func.id == "After")


def _call(edit: Edit, statements: list[ast.stmt], file: str) -> Call | None:
    if not statements or not ast.unparse(statements[0]).startswith("module = model"):
        return None
    news: dict[str, ast.expr] = {}
    for statement in statements:
        target = statement.targets[0] if isinstance(statement, ast.Assign) else None
        if isinstance(target, ast.Attribute) and target.attr != "__class__":
            news[target.attr] = statement.value  # type: ignore[attr-defined]
    texts = {ast.get_source_segment(edit.code, value) for value in news.values()}
    given, _, _ = edit.text.rpartition(" -> ")
    pattern = rf"(?:{re.escape(file)}:(\d+)|{re.escape(edit.where)}): (\w+)"
    found = [re.fullmatch(pattern, part) for part in given.split(", ")]
    if len(texts) > 1 or not all(found) or not all(map(_is_plain, news.values())):
        return None
    places = tuple((int(f[1]) if f[1] else None, f[2]) for f in found if f is not None)
    return Call(edit.where, texts.pop() if texts else None, tuple(news), places)


def _is_put(statement: ast.stmt) -> bool:
    call = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(call, ast.Call) and ast.unparse(call.func) == "model.set_submodule"


def _string(node: ast.expr) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _is_plain(value: ast.expr) -> bool:
    """Whether an expression makes layers of torch's that draw no random numbers."""
    kinds = [n for n in ast.walk(value) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "nn"]
    names = {node.id for node in ast.walk(value) if isinstance(node, ast.Name)}
    return bool(kinds) and names <= {"nn", "torch"} and all(_draws_nothing(kind.attr) for kind in kinds)


def _draws_nothing(kind: str) -> bool:
    home = getattr(nn, kind).__module__.rpartition(".")[2]
    return kind == "Identity" or (home in _WITHOUT_DRAWING and kind != "MultiheadAttention")


def function_call(new: str, given: str, of_torch: bool) -> str | None:
    """The call of a function for the expression that makes its module; None where there is none.

    Args:
        new: makes a module.
        given: the text of the argument.
        of_torch: prefers `torch.relu` to `F.relu`.

    >>> function_call("nn.LeakyReLU(negative_slope=0.2)", "x + 1", of_torch=False)
    'F.leaky_relu(x + 1, negative_slope=0.2)'
    """
    call = ast.parse(new, mode="eval").body
    kind = call.func.attr if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) else ""
    name = _FUNCTIONS.get(kind)
    if name is None or not isinstance(call, ast.Call) or call.args:
        return None
    options = "".join(f", {ast.unparse(keyword)}" for keyword in call.keywords)
    options += ", training=self.training" if name == "dropout" else ""
    torchs = name in _OF_TORCH or (of_torch and hasattr(torch, name) and name != "dropout")
    assert hasattr(torch if torchs else F, name)
    return f"{'torch' if torchs else 'F'}.{name}({given}{options})"
