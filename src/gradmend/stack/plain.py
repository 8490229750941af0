"""Plain: what can be compared of models, functions and the objects that they hold."""

from __future__ import annotations

import sys
from collections.abc import Hashable, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

_OF_MODULES = ("_parameters", "_buffers", "_modules", "training")


def plain(value: Any) -> Hashable:
    """What can be compared of a value; what cannot is equal to itself only.

    Example:
        >>> plain(partial(sum, start=1)) == plain(partial(sum, start=1))
        True
        >>> plain(object()) == plain(object())
        False
    """
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype, torch.device)):
        return type(value), value
    if isinstance(value, (tuple, list, set, frozenset)):
        return type(value), tuple(map(plain, value))
    if isinstance(value, Mapping):
        return type(value), tuple((plain(key), plain(held)) for key, held in value.items())
    if isinstance(value, partial):
        return partial, plain(value.func), plain(value.args), plain(value.keywords)
    return _object(value)


def _object(value: Any) -> Hashable:
    if isinstance(value, FunctionType):
        cells = tuple(plain(cell.cell_contents) for cell in value.__closure__ or ())
        return value.__code__, plain(value.__defaults__), plain(value.__kwdefaults__), cells
    if isinstance(value, MethodType):
        return plain(value.__func__), plain(value.__self__)
    if isinstance(value, property):
        return property, plain(value.fget), plain(value.fset)
    if isinstance(value, type):
        return _type(value)
    if isinstance(value, nn.Module):
        return modules(value), tuple(map(plain, value.state_dict().values()))
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), tuple(value.flatten().tolist())
    if is_dataclass(value):
        return type(value), tuple(plain(getattr(value, field.name)) for field in fields(value))
    return _Only(value)


class _Only:
    """Equal to the same object only, which is kept so that no other takes its place in memory."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Only) and other._value is self._value

    def __hash__(self) -> int:
        return id(self._value)


def _type(kind: type) -> Hashable:
    """A class; one that was made on the way, as torch's parametrizations are, by what it holds."""
    home = sys.modules.get(kind.__module__)
    if getattr(home, kind.__qualname__, None) is kind or "<locals>" in kind.__qualname__:
        return kind
    held = tuple(
        (name, plain(part)) for name, part in vars(kind).items() if isinstance(part, (FunctionType, property))
    )
    return kind.__qualname__, tuple(map(_type, kind.__bases__)), held


def modules(model: nn.Module) -> Hashable:
    """All modules with what they hold, but for their numbers: parameters and buffers."""
    return tuple(map(_module, model.named_modules()))


def _module(named: tuple[str, nn.Module]) -> Hashable:
    path, module = named
    held = {key: value for key, value in vars(module).items() if key not in _OF_MODULES}
    return path, _type(type(module)), module.training, plain(held)
