"""Events: what happens in a running training, without a hook on any model or optimizer.

While someone listens, one global pre and post hook sees the steps of all optimizers, and stand-ins for
`torch.autograd.backward` and of a `GradScaler` see the losses. All are taken away with the last listener.
"""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle


@runtime_checkable
class Listener(Protocol):
    """Is told of every training in this process."""

    def before_backward(self, loss: Tensor, scale: float | Tensor) -> None:
        """A backward pass begins at this loss, which a `GradScaler` has multiplied by `scale`."""

    def after_backward(self) -> None:
        """It has ended."""

    def before_step(self, optimizer: Optimizer) -> None:
        """An optimizer is about to step: gradients are unscaled, accumulated and clipped."""

    def after_step(self, optimizer: Optimizer) -> None:
        """It has stepped."""

    def after_update(self) -> None:
        """A `GradScaler` has ended a step, also one in which it let no optimizer step."""


class Guarded:
    """A listener that never raises.

    Args:
        listener: that may.
        guard: makes functions that do not.
    """

    def __init__(
        self, listener: Listener, guard: Callable[[Callable[..., None]], Callable[..., None]]
    ) -> None:
        self.before_backward = guard(listener.before_backward)
        self.after_backward = guard(listener.after_backward)
        self.before_step = guard(listener.before_step)
        self.after_step = guard(listener.after_step)
        self.after_update = guard(listener.after_update)


_listeners: tuple[Listener, ...] = ()
_remove: list[Callable[[], None]] = []
_own: list[RemovableHandle] = []
"""Hooks on an optimizer, from the start of a step to its end."""

_scaled: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}
"""What a `GradScaler` made, by its `id`, and its scale then."""


def listen(listener: Listener) -> None:
    """Tell a listener of all events from the next one on."""
    global _listeners
    _listeners = (*_listeners, listener)
    if not _remove:
        _install()


def unlisten(listener: Listener) -> None:
    """Tell it no more; after the last one all is as it was before.

    The optimizers' hooks may be running just now, when torch allows none to be removed. So they go with the
    next backward pass or `settle`.
    """
    global _listeners
    _listeners = tuple(other for other in _listeners if other is not listener)


def settle() -> None:
    """Take everything away if nobody listens. Not to be called from within the hook of an optimizer."""
    if not _listeners:
        while _remove:
            _remove.pop()()
        _let_go_of_hooks()
        _scaled.clear()


def _forget() -> None:
    """A child made by fork has a training of its own, if any, and nobody listens to it."""
    global _listeners
    _listeners = ()


os.register_at_fork(after_in_child=_forget)


def _install() -> None:
    hooks = (register_optimizer_step_pre_hook(_before_step), register_optimizer_step_post_hook(_after_step))
    _remove.extend(hook.remove for hook in hooks)
    _stand_in(torch.autograd, "backward", _backward)
    _stand_in(GradScaler, "scale", _scale)
    _stand_in(GradScaler, "update", _update)


def _stand_in(home: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Put a function in the place of another, until it is removed; what others put over it stays."""
    original = getattr(home, name)
    ours = make(original)
    setattr(home, name, ours)

    def remove() -> None:
        if getattr(home, name) is ours:
            setattr(home, name, original)

    _remove.append(remove)


def _before_step(
    optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Be called once more after the optimizer's own hooks, if it has any: they may clip."""
    _let_go_of_hooks()
    if not optimizer._optimizer_step_pre_hooks:
        return _begin(optimizer, args, kwargs)
    _own.append(optimizer.register_step_pre_hook(_begin))  # torch comes to it in this very step
    return None


def _let_go_of_hooks() -> None:
    while _own:
        _own.pop().remove()


def _begin(
    optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Tell the listeners; where the backward pass runs in a closure of the step, once that has run."""
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        step_begins(optimizer)
        return None
    told = _told_after(closure, optimizer)
    if "closure" in kwargs:
        return args, {**kwargs, "closure": told}
    return (args[0], told, *args[2:]), kwargs


def step_begins(optimizer: Optimizer) -> None:
    """Tell the listeners, as torch does of its own optimizers' steps."""
    for listener in _listeners:
        listener.before_step(optimizer)


def _told_after(closure: Callable[[], Any], optimizer: Optimizer) -> Callable[[], Any]:
    """A closure after whose first call the listeners are told that the step begins."""
    waiting = [optimizer]

    @functools.wraps(closure, updated=())
    def told() -> Any:
        found = closure()
        while waiting:
            step_begins(waiting.pop())
        return found

    return told


def _after_step(optimizer: Optimizer, _args: object, _kwargs: object) -> None:
    _let_go_of_hooks()
    step_ends(optimizer)


def step_ends(optimizer: Optimizer) -> None:
    """Tell the listeners, as torch does of its own optimizers' steps."""
    for listener in _listeners:
        listener.after_step(optimizer)


def _backward(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def backward(tensors: Tensor | Sequence[Tensor], *args: Any, **kwargs: Any) -> None:
        if not _listeners:
            settle()
            return original(tensors, *args, **kwargs)
        root = tensors[0] if isinstance(tensors, (tuple, list)) and len(tensors) == 1 else tensors
        inner = torch._C._current_graph_task_id() != -1  # a checkpoint's, within another one
        if inner or not isinstance(root, Tensor) or root.numel() != 1:
            return original(tensors, *args, **kwargs)
        scale = _scale_of(root)
        for listener in _listeners:
            listener.before_backward(root, scale)
        original(tensors, *args, **kwargs)
        for listener in _listeners:
            listener.after_backward()

    return backward


def _scale(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def scale(self: GradScaler, outputs: Any) -> Any:
        found = original(self, outputs)
        if isinstance(found, Tensor) and found is not outputs and self._scale is not None:
            _scaled.clear()  # one loss at a time; those that were never propagated are forgotten
            _scaled[id(found)] = weakref.ref(found), self._scale
        return found

    return scale


def _update(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def update(self: GradScaler, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        for listener in _listeners:
            listener.after_update()

    return update


def _scale_of(root: Tensor) -> float | Tensor:
    found = _scaled.get(id(root))
    return found[1].clone() if found is not None and found[0]() is root else 1.0
