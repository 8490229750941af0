"""Stand-ins: how a training is noticed that calls nothing of ours."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from gradmend.watch import events


def call_after_init(kind: type, call: Callable[[Any], None]) -> Callable[[], None]:
    """Have all that is made of a class shown to us; returns what ends that."""
    original = kind.__init__  # type: ignore[misc]

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        call(self)

    def undo() -> None:
        if kind.__init__ is init:  # type: ignore[misc]
            kind.__init__ = original  # type: ignore[misc]

    kind.__init__ = init  # type: ignore[misc]
    return undo


def call_before(home: Any, name: str, call: Callable[[], None]) -> Callable[[], None]:
    """Be called before a function of a module is; returns what ends that."""
    original = getattr(home, name)

    @functools.wraps(original)
    def function(*args: Any, **kwargs: Any) -> Any:
        call()
        return original(*args, **kwargs)

    def undo() -> None:
        if getattr(home, name) is function:
            setattr(home, name, original)

    setattr(home, name, function)
    return undo


class ByHand(Optimizer):
    """Stands for what changes weights in place of an optimizer: what follows a backward pass is a step."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(parameters, {})
        self._steps = False

    def before_backward(self, loss: Tensor, scale: float | Tensor) -> None:
        """Nothing to do."""

    def after_backward(self) -> None:
        """The step begins."""
        self._steps = True
        events.step_begins(self)

    def before_step(self, optimizer: Optimizer) -> None:
        """Nothing to do."""

    def after_step(self, optimizer: Optimizer) -> None:
        """Nothing to do."""

    def after_update(self) -> None:
        """Nothing to do."""

    def end(self) -> None:
        """The step has ended, if there was one."""
        if self._steps:
            self._steps = False
            events.step_ends(self)
