"""Trainings: what trains in a process, noticed and watched."""

from __future__ import annotations

import functools
import os
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from itertools import count
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from gradmend.attach.report import say
from gradmend.attach.stand_ins import ByHand, call_after_init, call_before
from gradmend.journal import Recording
from gradmend.lines import remember_lines
from gradmend.watch import Watch, events

_PATIENCE, _TRIES = 20, 2
"""Steps after an optimizer was made in which calls are looked at for its model; and own ones among them."""


def _harmless(method: Callable[..., None]) -> Callable[..., None]:
    """What a training runs into of ours: an error there is said, and ends the looking for more trainings."""

    @functools.wraps(method)
    def harmless(self: Trainings, *args: Any) -> None:
        if self.on:
            try:
                method(self, *args)
            except Exception as error:
                self.stop()
                say(f"gradmend: cannot watch what trains: {type(error).__name__}: {error}\n")

    return harmless


class Trainings:
    """All trainings of a process: notices what trains, and watches it.

    What trains is the outermost module that is called and holds a parameter of an optimizer. Calls are looked
    at from the start, and from when an optimizer is made, until all have a model. Where weights change after
    a backward pass without any optimizer of torch, as in Keras, every backward pass counts as a step. From
    the first use of `torch.compile` on there is no hook on modules, for it would change what is compiled:
    then what trains is the module that holds the most parameters of an optimizer.

    Args:
        recording: takes what the watches read.
        treat: whether the watches act on what they find.
    """

    def __init__(self, recording: Recording | None, treat: bool = False) -> None:
        self.on = True
        self.watches: dict[str, Watch] = {}
        self._recording, self._treat = recording, treat
        self._process = os.getpid()
        self._compiles = False
        self._optimizers: list[weakref.ref[Optimizer]] = []
        self._called: list[weakref.ref[nn.Module]] = []
        self._made: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()
        self._within: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._watched: weakref.WeakSet[nn.Module | Optimizer] = weakref.WeakSet()
        self._tries: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        self._versions: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
        self._by_hand: list[ByHand] = []
        self._handle: RemovableHandle | None = None
        self._steps = 0
        self._undo = ExitStack()
        self._undo.enter_context(remember_lines())
        self._undo.callback(call_after_init(nn.Module, self._make))
        self._undo.callback(call_after_init(Optimizer, self._take))
        self._undo.callback(call_before(torch, "compile", self._compile))
        self._look()
        events.listen(self)

    @_harmless
    def before_backward(self, loss: Tensor, scale: float | Tensor) -> None:
        """Look for weights that changed without an optimizer, and for models whose calls cannot be seen."""
        for stepped in self._by_hand:
            stepped.end()
        if os.getpid() != self._process:
            return
        others = [made for made in self._alive() if not isinstance(made, ByHand)]
        if not others:
            for model in widest(self._candidates() or _outermost_on_the_stack()):
                if model not in self._watched and self._has_changed(model):
                    self._by_hand.append(ByHand(model.parameters()))
                    self._match(model)
                    events.listen(self._by_hand[-1])
        elif self._compiles and any(map(self._waits, others)):
            for model in widest(self._candidates()):
                self._match(model)

    def after_backward(self) -> None:
        """Nothing to do."""

    @_harmless
    def before_step(self, optimizer: Optimizer) -> None:
        """Look for the model of an optimizer as long as it has none."""
        if os.getpid() != self._process:
            return
        if self._waits(optimizer):
            self._take(optimizer)
            for model in widest(self._candidates()):
                self._match(model)
            self._tries[optimizer] = self._tries.get(optimizer, 0) + 1
            self._look()
        self._steps += 1
        if self._steps > _PATIENCE or not any(map(self._waits, self._alive())):
            self._look_away()

    def after_step(self, optimizer: Optimizer) -> None:
        """Nothing to do."""

    def after_update(self) -> None:
        """Nothing to do."""

    def stop(self) -> None:
        """Look for no more trainings; what is watched goes on."""
        self.on = False
        self._undo.close()
        self._look_away()
        events.unlisten(self)

    def end(self, failed: bool = False) -> None:
        """Stop watching; the script may have failed."""
        self.stop()
        for stepped in self._by_hand:
            events.unlisten(stepped)
        for watch in self.watches.values():
            watch.detach(failed)
        events.settle()

    def _waits(self, optimizer: Optimizer) -> bool:
        """Whether its model may still be found; it may hold parameters of no module."""
        return optimizer not in self._watched and self._tries.get(optimizer, 0) < _TRIES

    def _alive(self) -> list[Optimizer]:
        """The optimizers in the order in which they were made."""
        return [optimizer for reference in self._optimizers if (optimizer := reference()) is not None]

    def _candidates(self) -> list[nn.Module]:
        """What may train: what was called from outside, or any module where that could not be seen."""
        if self._compiles:
            return list(self._made.values())
        return [model for reference in self._called if (model := reference()) is not None]

    def _has_changed(self, model: nn.Module) -> bool:
        """Whether a parameter has been written to since the last time."""
        version = sum(parameter._version for parameter in model.parameters())
        return self._versions.setdefault(model, version) != version

    def _make(self, module: nn.Module) -> None:
        """A module is being made: it has nothing yet, perhaps not even a hash."""
        self._made[id(module)] = module

    @_harmless
    def _take(self, optimizer: Optimizer) -> None:
        alive = self._alive()
        if all(known is not optimizer for known in alive):
            self._optimizers = [weakref.ref(known) for known in (*alive, optimizer)]
            self._steps = 0
            self._look()

    @_harmless
    def _compile(self) -> None:
        self._compiles = True
        self._look_away()
        for watch in self.watches.values():
            watch.leave_modules()

    def _look(self) -> None:
        if self._handle is None and not self._compiles:
            self._handle = register_module_forward_pre_hook(self._see)

    def _look_away(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    @_harmless
    def _see(self, module: nn.Module, args: Any) -> None:
        """A module is called; it is the outermost so far if it is no part of one that was called before."""
        if torch.compiler.is_compiling() or self._handle is None:
            return
        if module in self._within or os.getpid() != self._process:
            return
        self._within.update(module.modules())
        self._called.append(weakref.ref(module))
        hooks = self._handle.hooks_dict_ref() or {}
        before = set(hooks)
        self._match(module)
        for key in set(hooks) - before:  # torch calls hooks made now from the next call on
            hooks[key](module, args)

    def _match(self, model: nn.Module) -> None:
        """Watch a model with the first optimizer that holds a parameter of it."""
        if model in self._watched:
            return
        own = {id(parameter) for parameter in model.parameters()}
        for optimizer in self._alive():
            if any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
                self._watched.update((model, optimizer))
                self._watch(model, optimizer)
                return

    def _watch(self, model: nn.Module, optimizer: Optimizer) -> None:
        name = next(name for name in _names(model) if name not in self.watches)
        sink = None if self._recording is None else self._recording.sink(name)
        self.watches[name] = Watch(model, optimizer, journal=sink, treat=self._treat)
        if self._compiles:
            self.watches[name].leave_modules()
        self.watches[name].attach()


def _names(model: nn.Module) -> Iterator[str]:
    """The class of the model, or of what it wraps; and numbers for more of them."""
    inner = getattr(model, "_orig_mod", model)
    inner = getattr(inner, "module", inner)
    name = type(inner).__name__
    yield name
    yield from (f"{name} {i}" for i in count(2))


def widest(models: Iterable[nn.Module]) -> list[nn.Module]:
    """Of models that train, those whose parameters are not all among another's."""
    held = [(model, {id(p) for p in model.parameters() if p.requires_grad}) for model in models]
    kept: list[tuple[nn.Module, set[int]]] = []
    for model, own in sorted(held, key=lambda pair: -len(pair[1])):
        if own and not any(own <= other for _, other in kept):
            kept.append((model, own))
    return [model for model, _ in kept]


def _outermost_on_the_stack() -> list[nn.Module]:
    """The outermost module one of whose methods is running: Keras calls its layers past torch's own hooks."""
    frame: FrameType | None = sys._getframe(1)
    found: list[nn.Module] = []
    while frame is not None:
        owner = frame.f_locals.get("self")
        found = [owner] if isinstance(owner, nn.Module) else found
        frame = frame.f_back
    return found
