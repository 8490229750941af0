"""A session that also acts on what it finds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from gradmend.acts import Act
from gradmend.watch.session import Session
from gradmend.watch.treat import Autopilot, Moment


class TreatedSession(Session):
    """A session with an autopilot. It looks at each step before and after all that the session itself does.

    Args:
        parts: of a session.
        tell: of an autopilot.
    """

    def __init__(self, *parts: Any, tell: Callable[[int, str, Act | None], None]) -> None:
        super().__init__(*parts)
        self.pilot = Autopilot(self.stream, tell)
        self._examined: tuple[Any, Any] | None = None

    def stop(self) -> None:
        """Take away all hooks, and let go of what was kept."""
        super().stop()
        self.pilot.end()
        self._examined = None

    def before_step(self, optimizer: Optimizer) -> None:
        """The pilot changes the step before it is read, and may yet call it off."""
        model = self._model()
        treated = model is not None and self._owner.owns(optimizer)
        if model is not None and treated:
            self.pilot.before_step(Moment(self.step + 1, model, optimizer))
        super().before_step(optimizer)
        if model is not None and treated:
            self.pilot.before_update(Moment(self.step, model, optimizer))

    def after_step(self, optimizer: Optimizer) -> None:
        """All of the step is known; what the pilot does is no part of the time of a step."""
        super().after_step(optimizer)
        model = self._model()
        if model is not None and self.step and self._owner.owns(optimizer):
            call, self._examined = self._examined, None
            if self.pilot.after_step(Moment(self.step, model, optimizer, self.profile, call)):
                self._pace.insist()
                self._pace.begin()

    def _entered(self, module: nn.Module, args: Any) -> None:
        super()._entered(module, args)
        if self._exam is not None:
            self._examined = self._calls.now

    def _take_loss(self, step: int, rate: float | None, loss: float | None) -> None:
        if loss is not None:
            self.pilot.take_loss(step, loss)
        super()._take_loss(step, rate, loss)
