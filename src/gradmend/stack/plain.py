"""Plain: what can be compared of models, functions and the objects that they hold."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Hashable, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

_OF_MODULES = ("_parameters", "_buffers", "_modules", "training")
_EMPTY = {key: value for key, value in vars(nn.Module()).items() if key not in _OF_MODULES}
"""Hooks and the like, of a module that has none."""

_LARGE = 10_000
"""Numbers of a constant that are not worth comparing."""


def plain(value: Any) -> Hashable:
    """What can be compared of a value; what cannot is equal to itself only.

    Of modules that is everything but the numbers in their parameters and buffers.

    Examples:
        >>> plain(partial(sum, start=1)) == plain(partial(sum, start=1))
        True
        >>> plain(object()) == plain(object())
        False
        >>> plain(nn.Linear(2, 3)) == plain(nn.Linear(2, 3)) != plain(nn.Linear(2, 3, bias=False))
        True
    """
    return _Reader().read(value)


class _Reader:
    """Reads a value and what it holds, which may be the value itself."""

    def __init__(self) -> None:
        self._inside: list[int] = []

    def read(self, value: Any) -> Hashable:
        simple = (bool, int, float, complex, str, bytes, torch.dtype, torch.device)
        if value is None or isinstance(value, simple):
            return type(value), value
        if id(value) in self._inside:
            return "within", self._inside.index(id(value))
        self._inside.append(id(value))
        try:
            return self._held(value)
        finally:
            self._inside.pop()

    def _held(self, value: Any) -> Hashable:
        if isinstance(value, (tuple, list, set, frozenset)):
            return type(value), tuple(map(self.read, value))
        if isinstance(value, Mapping):
            return type(value), tuple((self.read(key), self.read(held)) for key, held in value.items())
        if isinstance(value, Tensor):
            return _tensor(value)
        if isinstance(value, nn.Module):
            return self._module(value)
        parts = _parts(value)
        return _Only(value) if parts is None else (type(value), *map(self.read, parts))

    def _module(self, module: nn.Module) -> Hashable:
        held = {key: value for key, value in vars(module).items() if _tells(key, value)}
        tensors = {**module._parameters, **module._buffers}
        form = tuple((name, None if t is None else _form(t)) for name, t in tensors.items())
        inner = tuple((name, self.read(child)) for name, child in module._modules.items())
        return self.read(type(module)), module.training, form, inner, self.read(held)


def _tells(key: str, value: Any) -> bool:
    """Whether an attribute of a module says something of it, beside its tensors and inner modules."""
    return not (key in _OF_MODULES or (key in _EMPTY and value == _EMPTY[key]))


def _parts(value: Any) -> tuple[Any, ...] | None:
    """What a function, a class or a record is made of; None of what is not known."""
    if isinstance(value, partial):
        return value.func, value.args, value.keywords
    if isinstance(value, FunctionType):
        cells = tuple(cell.cell_contents for cell in value.__closure__ or ())
        return (
            value.__code__.co_code,
            value.__code__.co_consts,
            value.__defaults__,
            value.__kwdefaults__,
            cells,
        )
    if isinstance(value, MethodType):
        return value.__func__, value.__self__
    if isinstance(value, property):
        return value.fget, value.fset
    if isinstance(value, CodeType):
        return value.co_code, value.co_consts, value.co_names
    if isinstance(value, weakref.ref):
        return (value(),)
    if isinstance(value, type):
        return _of_type(value)
    if is_dataclass(value):
        return tuple(getattr(value, field.name) for field in fields(value))
    return None


def _of_type(kind: type) -> tuple[Any, ...] | None:
    """A class that was made on the way, as torch's parametrizations are, by what it holds."""
    home = sys.modules.get(kind.__module__)
    if getattr(home, kind.__qualname__, None) is kind or "<locals>" in kind.__qualname__:
        return None
    held = {name: part for name, part in vars(kind).items() if isinstance(part, (FunctionType, property))}
    return kind.__qualname__, kind.__bases__, held


def _tensor(tensor: Tensor) -> Hashable:
    """Parameters are compared by form, constants number by number."""
    if isinstance(tensor, nn.Parameter):
        return _form(tensor)
    if tensor.numel() > _LARGE or tensor.is_sparse:
        return _Only(tensor)
    return _form(tensor), tuple(tensor.flatten().tolist())


def _form(tensor: Tensor) -> Hashable:
    return tuple(tensor.shape), tensor.dtype, tensor.device, tensor.requires_grad


class _Only:
    """Equal to the same object only, which is kept so that no other takes its place in memory."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Only) and other._value is self._value

    def __hash__(self) -> int:
        return id(self._value)
