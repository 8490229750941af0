"""Lines: where in the user's code a layer was made, or a function is called."""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType

import jaxtyping
import torch
from torch import nn

_TORCH = f"{Path(torch.__file__).parent}{os.sep}"
_HERE = f"{Path(__file__).parent}{os.sep}"
_NOT_THE_USERS = (_TORCH, _HERE, f"{Path(jaxtyping.__file__).parent}{os.sep}", "<")
_PACKAGES = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")
_STANDARD = f"{Path(os.__file__).parent}{os.sep}"
_BUILDING = (f"keras{os.sep}",)
"""Packages that are to their users what torch is: their lines say nothing of a network."""

_CALLER = f"{_HERE}setup.py"
"""Calls the user's code, so what lies outside it is no part of a model."""

_created: dict[int, tuple[weakref.ref[nn.Module], str]] = {}
"""By `id`, as a module that is being made may have no hash yet."""


@contextmanager
def remember_lines() -> Iterator[None]:
    """Remember, for every module made inside, the `file:line` that made it, of the user's or of a package."""
    original = nn.Module.__init__

    def init(self: nn.Module, *args: object, **kwargs: object) -> None:
        original(self, *args, **kwargs)
        if line := _line_of_maker(sys._getframe(1)):
            key = id(self)
            _created[key] = weakref.ref(self, lambda _: _created.pop(key, None)), line

    nn.Module.__init__ = init  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__init__ = original  # type: ignore[method-assign]


def _line_of_maker(frame: FrameType | None) -> str | None:
    while frame is not None and (role := _role(frame.f_code)) != "caller":
        if role in _LINES:
            return _line(frame)
        frame = frame.f_back
    return None


_LINES = ("user", "installed")
"""Whose code has lines that may be named."""

_roles: dict[int, tuple[str | None, CodeType]] = {}
"""By the `id` of the code, which is kept alive beside it: hashing code takes longer than all else here."""


def _role(code: CodeType) -> str | None:
    """Whether a function is the user's, or an installed package's, or one of those that matter here."""
    known = _roles.get(id(code))
    if known is None:
        if len(_roles) >= _MOST:
            _roles.clear()
        known = _roles[id(code)] = _judge(code), code
    return known[0]


_MOST = 4096


def _judge(code: CodeType) -> str | None:
    if code is nn.Module._call_impl.__code__:
        return "module"
    if code.co_filename == _CALLER:
        return "caller"
    if code.co_filename.startswith(_NOT_THE_USERS):
        return None
    for packages in _PACKAGES:
        _, installed, name = code.co_filename.rpartition(packages)
        if installed:
            return None if name.startswith(_BUILDING) else "installed"
    return None if code.co_filename.startswith(_STANDARD) else "user"


def line_of_definition(function: object) -> str | None:
    """`file:line` where the user's function, or the forward of the user's module, begins."""
    function = getattr(function, "func", function)
    function = type(function).forward if isinstance(function, nn.Module) else function
    code = getattr(function, "__code__", None)
    if code is None or _role(code) not in _LINES:
        return None
    return f"{code.co_filename}:{code.co_firstlineno}"


def line_of_creation(module: nn.Module) -> str | None:
    """`file:line` that made a module, if that was remembered."""
    made = _created.get(id(module))
    return made[1] if made is not None and made[0]() is module else None


def line_of_caller(boundary: FrameType | None) -> str | None:
    """`file:line` of the innermost frame of the user's, up to `boundary`; else of an installed package's."""
    return module_and_line({}, boundary)[1]


def module_and_line(paths: Mapping[int, str], boundary: FrameType | None) -> tuple[str | None, str | None]:
    """The path of the innermost module that is running, and `file:line` of the innermost line of the user's.

    Without any of the user's, as in models that a package brings, the line is the innermost of that package.

    Args:
        paths: of modules, by their `id`.
        boundary: frames further out are not looked at.
    """
    path: str | None = None
    line: str | None = None
    others: str | None = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame is not boundary:
        role = _role(frame.f_code)
        if role == "caller":
            break
        if role == "module" and path is None:
            path = paths.get(id(frame.f_locals["self"]))
        elif role == "user" and line is None:
            line = _line(frame)
        elif role == "installed" and others is None:
            others = _line(frame)
        frame = frame.f_back
    return path, line or others


def _line(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
