"""Lines: where in the user's code a layer was made, or a function is called."""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import FrameType

import jaxtyping
import torch
from torch import nn

_TORCH = f"{Path(torch.__file__).parent}{os.sep}"
_HERE = f"{Path(__file__).parent}{os.sep}"
_NOT_THE_USERS = (_TORCH, _HERE, f"{Path(jaxtyping.__file__).parent}{os.sep}", "<")
_CALLER = f"{_HERE}setup.py"
"""Calls the user's code, so what lies outside it is no part of a model."""

_created: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


@contextmanager
def remember_lines() -> Iterator[None]:
    """Remember, for every module made inside, the user's `file:line` that made it."""
    original = nn.Module.__init__

    def init(self: nn.Module, *args: object, **kwargs: object) -> None:
        original(self, *args, **kwargs)
        if line := line_of_caller(None):
            _created[self] = line

    nn.Module.__init__ = init  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__init__ = original  # type: ignore[method-assign]


@lru_cache(maxsize=1024)
def _is_users(file: str) -> bool:
    return not file.startswith(_NOT_THE_USERS)


def line_of_creation(module: nn.Module) -> str | None:
    """`file:line` that made a module, if that was remembered."""
    return _created.get(module)


def line_of_caller(boundary: FrameType | None) -> str | None:
    """`file:line` of the innermost frame that is neither torch's nor ours, up to `boundary`."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame is not boundary:
        file = frame.f_code.co_filename
        if file == _CALLER:
            return None
        if _is_users(file):
            return f"{file}:{frame.f_lineno}"
        frame = frame.f_back
    return None
