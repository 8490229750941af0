"""Tracing: the forward of one module as a `torch.fx` graph, as text, and as a module that runs the text."""

from __future__ import annotations

import ast
import copy
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import CodeType, FrameType
from typing import Any, ClassVar

import torch
from torch import fx, nn

from gradmend.errors import SetupError
from gradmend.lines import line_of_definition

_BUILTINS = {"torch": "import torch", "inf": "from math import inf", "nan": "from math import nan"}
_BUILTINS["device"] = "from torch import device"
_FREED = re.compile(r";  \w+(?: = \w+)* = None(?=\n|$)")
"""What fx writes to free memory early."""

_PLACE = re.compile(r"  # (?P<file>\S.*):(?P<line>\d+)$", re.M)
"""Behind a line of a traced forward: the user's line that it came from."""


class Rewritten:
    """First among the bases of a class whose forward was traced: `forwards` in training, in evaluation."""

    forwards: ClassVar[tuple[str, str]]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle and copy by the user's class and the text of the forwards."""
        return _blank, (type(self).__mro__[2], type(self).forwards), vars(self).copy()


class _Tracer(fx.Tracer):
    """Traces one forward only: its children, whatever they are, stay calls.

    Args:
        code: of the user's forward; each node gets the innermost line in its file.
    """

    def __init__(self, code: CodeType | None) -> None:
        super().__init__()
        self.code = code

    def create_proxy(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        """The call as a node that remembers its line."""
        proxy = super().create_proxy(*args, **kwargs)
        frame: FrameType | None = sys._getframe(1)
        line = None
        while frame is not None and self.code is not None:
            if frame.f_code.co_filename == self.code.co_filename:
                line = line or f"{frame.f_code.co_filename}:{frame.f_lineno}"
            if frame.f_code is self.code:
                proxy.node.meta["line"] = line
                break
            frame = frame.f_back
        return proxy

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """A module that forward makes on the fly is no child: what it does becomes part of the graph."""
        known = self.submodule_paths is not None and m in self.submodule_paths
        return super().call_module(m, forward, args, kwargs) if known else forward(*args, **kwargs)


_FACTORIES = (
    *("zeros", "ones", "full", "empty", "eye", "arange", "linspace"),
    *("rand", "randn", "randint", "tensor", "as_tensor"),
)


@contextmanager
def _recorded_factories(tracer: fx.Tracer) -> Iterator[None]:
    """Inside, tensors that a forward makes are made by the graph, anew in each call."""
    originals = {name: getattr(torch, name) for name in _FACTORIES}
    try:
        for name, make in originals.items():
            setattr(torch, name, _recorded(tracer, make))
        yield
    finally:
        for name, make in originals.items():
            setattr(torch, name, make)


def _recorded(tracer: fx.Tracer, make: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: tracer.create_proxy("call_function", make, args, kwargs)


def trace(module: nn.Module, training: bool) -> fx.Graph:
    """The graph of a module's own forward in one mode; what its children do stays a call of each.

    Arguments that have defaults keep them. The module is left as it was.

    Raises:
        SetupError: if it cannot be traced, with `file:line`.

    Examples:
        >>> class Net(nn.Sequential):
        ...     def forward(self, x):
        ...         return torch.relu(self[0](x))
        >>> print(source(trace(Net(nn.Linear(2, 2)), training=True)))
        import torch
        <BLANKLINE>
        def forward(self, x):
            _0 = getattr(self, "0")(x)
            relu = torch.relu(_0)
            return relu
    """
    twin, own = copy.copy(module), type(module)
    vars(twin).update({key: held.copy() for key, held in vars(twin).items() if type(held) is dict})
    twin.training, before = training, set(vars(twin))
    forward = _compiled(own.forwards[not training]) if issubclass(own, Rewritten) else own.forward
    try:
        twin.__class__ = type(own.__name__, (own,), {"forward": _required_only(forward)})
        tracer = _Tracer(getattr(inspect.unwrap(forward), "__code__", None))
        with _recorded_factories(tracer):
            graph = tracer.trace(twin)
    except Exception as error:  # the user's code meets proxies, and may raise anything
        raise _untraceable(module, str(error), error) from error
    if set(vars(twin)) - before or any(isinstance(value, fx.Proxy) for value in vars(twin).values()):
        raise _untraceable(module, "it uses tensors from outside, or keeps some.")
    for node in graph.nodes:
        node.type = None
    return graph


def _untraceable(module: nn.Module, why: str, error: Exception | None = None) -> SetupError:
    return SetupError(f"{line_of_forward(module, error)}: torch.fx cannot trace this forward: {why}")


def _required_only(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward with only those arguments that have no default: `if mask is None` is then decided."""
    parameters = list(inspect.signature(forward).parameters.values())
    wanted = [p.name for p in parameters if p.default is p.empty]
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        raise TypeError("it takes any number of arguments")
    names = ", ".join(wanted)
    space: dict[str, Any] = {"original": forward}
    exec(f"def forward({names}): return original({names})", space)
    wrapped: Callable[..., Any] = space["forward"]
    return wrapped


def source(graph: fx.Graph) -> str:
    """The graph as Python text, with the imports that it needs and the user's lines as comments."""
    written = graph.python_code("self")
    lines = {node.name: node.meta["line"] for node in graph.nodes if "line" in node.meta}
    plain = _FREED.sub("", written.src).strip()
    used = {name: value for name, value in written.globals.items() if re.search(rf"\b{name}\b", plain)}
    rows = plain.split("\n")
    text = "\n".join(row + _comment(lines.get(row.strip().partition(" = ")[0])) for row in rows)
    imports = [_BUILTINS[name] if name in _BUILTINS else _import(name, used[name]) for name in used]
    return "\n".join([*dict.fromkeys(imports), "", text])


def _comment(line: str | None) -> str:
    """The user's line, if it stands in a file."""
    return f"  # {line}" if line and not line.startswith("<") else ""


def without_lines(text: str) -> str:
    """The text of a traced forward without the user's lines.

    >>> without_lines("    a = self.a(x)  # net.py:7")
    '    a = self.a(x)'
    """
    return _PLACE.sub("", text)


def _import(name: str, value: Any) -> str:
    module, own = getattr(value, "__module__", None), getattr(value, "__qualname__", ".")
    if not module or not own.isidentifier():
        raise SetupError(f"The forward calls {value!r}, which cannot be imported by a name.")
    return f"from {module} import {own} as {name}"


@lru_cache(maxsize=256)
def _compiled(text: str) -> Callable[..., Any]:
    """The function, each line of which counts as the user's line that it came from."""
    tree, space, file, line = ast.parse(text), dict[str, Any](), "<rewritten forward>", 1
    places = {row: found for row, part in enumerate(text.split("\n"), 1) if (found := _PLACE.search(part))}
    for statement in tree.body[-1].body if places else ():  # type: ignore[attr-defined]
        found = places.get(statement.lineno)
        file, line = (found["file"], int(found["line"])) if found else (file, line)
        for node in ast.walk(statement):
            vars(node).update({"lineno": line, "end_lineno": line} if hasattr(node, "lineno") else {})
    exec(compile(tree, file, "exec"), space)
    forward: Callable[..., Any] = space["forward"]
    return forward


_classes: dict[tuple[type[nn.Module], tuple[str, str]], type[nn.Module]] = {}


def class_with(own: type[nn.Module], forwards: tuple[str, str]) -> type[nn.Module]:
    """The subclass with these forwards: one for all copies of a module."""
    if (own, forwards) not in _classes:
        training, evaluating = map(_compiled, forwards)

        def by_mode(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return (training if self.training else evaluating)(self, *args, **kwargs)

        forward = training if forwards[0] == forwards[1] else by_mode
        space = {
            "forward": forward,
            "forwards": forwards,
            "__module__": own.__module__,
            "__doc__": own.__doc__,
        }
        _classes[own, forwards] = type(own.__name__, (Rewritten, own), space)
    return _classes[own, forwards]


def _blank(own: type[nn.Module], forwards: tuple[str, str]) -> nn.Module:
    """A module of the subclass, before its state is put in."""
    kind = class_with(own, forwards)
    return kind.__new__(kind)


def own_class(module: nn.Module) -> type[nn.Module]:
    """The user's class of a module, whether its forward was rewritten or not."""
    kind = type(module)
    return kind.__mro__[2] if issubclass(kind, Rewritten) else kind


def line_of_forward(module: nn.Module, error: Exception | None = None) -> str:
    """`file:line` of the module's forward, or in its file the line that raised the error."""
    own = inspect.getsourcefile(own_class(module).forward)
    frames = traceback.extract_tb(error.__traceback__) if error else []
    raised = [f"{frame.filename}:{frame.lineno}" for frame in frames if frame.filename == own]
    return raised[-1] if raised else line_of_definition(own_class(module).forward) or type(module).__name__
