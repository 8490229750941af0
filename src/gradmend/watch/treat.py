"""Treat: what a watch does about what it finds, where that can be treated while the training runs.

Acts are few and small: each is said, and can be read afterwards. Numbers come from what was measured in this
very training: its usual gradients, its rates before they were raised, its weights when all was well.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from gradmend.acts import Act
from gradmend.causes import Cause
from gradmend.console import number
from gradmend.diagnosis import Finding, Severity
from gradmend.errors import GradmendError
from gradmend.profile import Profile
from gradmend.remedies.gradient import ClipNorm
from gradmend.watch import rules
from gradmend.watch.notices import Notice
from gradmend.watch.origin import SPOILT_BATCH
from gradmend.watch.stream import Stream
from gradmend.watch.treat_draw import Silence, dead_layers, find_initialization, take_over
from gradmend.watch.treat_state import States, put_back
from gradmend.watch.treat_step import Throttle, highest_rate

_MOST = 5
"""Acts on one cause; what is there again after them is left to the user."""

_USUAL = 2.0
"""Times the usual norm to which gradients are clipped. Half to ten times it can do (Pascanu et al. 2013)."""

_TRIAL = 50
"""Steps at a lower rate for the loss to settle, and as many more to see whether it oscillates."""

_START = frozenset(
    (
        Cause.VANISHING_GRADIENT,
        Cause.WEIGHTS_TOO_SMALL,
        Cause.WEIGHTS_TOO_LARGE,
        Cause.EXPLODING_GRADIENT,
        Cause.CHAOS,
        Cause.INFORMATION_COLLAPSE,
        Cause.SYMMETRIC_WEIGHTS,
    )
)
"""What other weights treat, as long as nothing was learnt that would be lost with them."""


@dataclass(frozen=True)
class Moment:
    """A training between two steps.

    Args:
        step: the last one.
        model: that trains.
        optimizer: that steps it.
        profile: of the last step that was measured in full.
        call: arguments and keywords of the model in this step, if it was measured in full.
    """

    step: int
    model: nn.Module
    optimizer: Optimizer
    profile: Profile | None = None
    call: tuple[Any, Any] | None = None


class Autopilot:
    """Acts on findings: once for each time that they begin, a few times for each cause.

    | found | done |
    |---|---|
    | a loss that is not finite | the step is left out if the batch is to blame; else back, and a lower rate |
    | divergence | back, and a lower rate; where gradients have exploded, first clipping |
    | the rate was raised too far | back, and the rate as it was before |
    | oscillation | half the rate, until the loss does not oscillate any more |
    | exploding gradients | clipping at twice the usual norm |
    | dead units | their weights are drawn again; where they die once more, and half the rate |
    | vanishing or exploding signals before anything was learnt | all weights are drawn again |

    Back is to the last state that has proved good (`States`). Every further rate after that is the square of
    the one before: 1/2, 1/4, 1/16 ... of the user's, so that it soon arrives where it has to.

    Args:
        stream: what the watch has read.
        tell: is called with the step and the text of every act, and of what cannot be treated.
    """

    def __init__(self, stream: Stream, tell: Callable[[int, str, Act | None], None]) -> None:
        self.acts: list[Act] = []
        self._stream, self._tell = stream, tell
        self._throttle, self._states = Throttle(), States()
        self._found: list[Finding] = []
        self._tries: Counter[Cause] = Counter()
        self._lowered = self._spoilt = 0
        self._silence: Silence | None = None
        self._trial: Stream | None = None
        self._settled = 0
        self._able: bool | None = None

    # what it is told

    def take(self, notice: Notice) -> None:
        """A finding begins or ends."""
        if notice.ended is None and notice.finding.severity is Severity.ERROR:
            self._found.append(notice.finding)

    def take_loss(self, step: int, loss: float) -> None:
        """The loss of a step is known, and not yet among those of the stream."""
        losses = self._stream.losses
        high = math.inf if math.isnan(losses.start) else losses.start + 0.5 * abs(losses.start)
        healthy = math.isfinite(loss) and loss <= min(high, losses.bound)
        self._throttle.judge(step, healthy)
        if not healthy and not self._spoilt_by_batch:
            self._states.doubt()
        if self._trial is not None and step > self._settled:
            self._trial.losses.add(step, loss)

    def before_step(self, now: Moment) -> None:
        """The optimizer is about to step, and nothing of the step has been read yet."""
        if self._able is None:
            self._able = self._check(now)
        if self._able:
            if self._states.good is None:
                self._states.keep(now.step - 1, now.model, now.optimizer)
            self._throttle.before_step(now.step, now.optimizer)
            if self._silence is not None:
                self._silence.look(now.model, now.step)

    def before_update(self, now: Moment) -> None:
        """All of the step has been read: where the batch has spoilt it, the optimizer gets nothing."""
        lost = next((f for f in self._found if f.cause is Cause.NON_FINITE), None)
        if lost is None or not self._able or not self._spoilt_by_batch:
            return
        self._found.remove(lost)
        self._spoilt += 1
        if self._spoilt > _MOST:
            self._say(now, lost, f"{self._spoilt} batches in short order are not finite; that is left to you")
            return
        for group in now.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        self._done(now, lost, "the batch holds values that are not finite, so this step was left out")

    def after_step(self, now: Moment) -> bool:
        """The optimizer has stepped; returns whether the weights were changed since."""
        self._throttle.restore()
        if not self._able:
            return False
        self._look_again()
        if self._silence is not None and self._silence.sure:
            return self._redraw_dead(now, self._silence)
        if self._found:
            return self._treat(now)
        if self._states.keep(now.step, now.model, now.optimizer):
            self._spoilt = 0
        return False

    def end(self) -> None:
        """Let go of everything; rates are the user's again."""
        self._throttle.restore()
        self._states.clear()
        self._silence = self._trial = None

    @property
    def _spoilt_by_batch(self) -> bool:
        return self._stream.origin is not None and self._stream.origin.sentence == SPOILT_BATCH

    # what it does

    def _treat(self, now: Moment) -> bool:
        """Act on the gravest of what was found."""
        early = [f for f in self._found if f.cause in _START] if self._untrained(now) else []
        if early and now.call is not None:
            self._found = [f for f in self._found if f not in early or f.cause in _ORDER]
            if self._restart(now, early, now.call):
                return True
        if not self._found:
            return False
        self._found.sort(key=lambda f: _ORDER.index(f.cause) if f.cause in _ORDER else len(_ORDER))
        finding = self._found.pop(0)
        if finding.cause in _ORDER and self._may(finding, now):
            return _TREATMENTS[finding.cause](self, now, finding)
        return False

    def _untrained(self, now: Moment) -> bool:
        good = self._states.good
        return good is not None and good.step == 0 and not good.memory and not self._stream.losses.falling

    def _restart(self, now: Moment, findings: list[Finding], call: tuple[Any, Any]) -> bool:
        """Draw all weights again, and begin with all else as it was at first."""
        finding, causes = findings[0], frozenset(finding.cause for finding in findings)
        if not self._may(finding, now):
            return False
        try:
            change = find_initialization(now.model, now.optimizer, call, causes)
        except GradmendError as error:
            self._say(now, finding, f"weights cannot be drawn again: {error}")
            return False
        if change is None:
            self._say(now, finding, "weights drawn again would not help")
            return False
        self._go_back(now)
        take_over(change, now.model, now.optimizer)
        self._states.clear()
        self._states.keep(now.step, now.model, now.optimizer)
        text = f"{change.remedy.title}, and a new start"
        self._done(now, finding, text, finding.measured, None, finding.unit)
        return True

    def _go_back(self, now: Moment) -> str:
        """Give the training its last good state; what else was found is gone with the one that it was in."""
        good = self._states.good
        assert good is not None  # there is one from the first step on
        put_back(good, now.optimizer)
        self._states.doubt()
        self._found.clear()
        self._stream.forget(good.step)
        return f"back to the state of step {good.step}"

    def _go_back_slower(self, now: Moment, finding: Finding) -> bool:
        text = self._go_back(now)
        share = 0.5**2 ** max(0, self._lowered - 1)
        self._lowered += 1
        if self._throttle.exploded and self._throttle.bound is None:
            text = f"{text}, {self._bound()}"
        self._set_rate(now, finding, share, f"{text}, ")
        return True

    def _go_back_clipped(self, now: Moment, finding: Finding) -> bool:
        if self._throttle.bound is not None or not self._throttle.exploded:
            return self._go_back_slower(now, finding)
        self._clip(now, finding, f"{self._go_back(now)}, ")
        return True

    def _go_back_to_rate(self, now: Moment, finding: Finding) -> bool:
        text, rates = self._go_back(now), self._stream.rates
        self._set_rate(now, finding, rates.before / rates.now if rates.now else 0.5, f"{text}, ")
        return True

    def _slow_down(self, now: Moment, finding: Finding) -> bool:
        self._set_rate(now, finding, 0.5)
        self._trial, self._settled = Stream(), now.step + _TRIAL
        return False

    def _clip(self, now: Moment, finding: Finding, text: str = "") -> bool:
        before = self._throttle.bound
        if self._throttle.usual is None:
            self._say(now, finding, "no gradient has been healthy so far, so it is not known where to clip")
        else:
            text += self._bound()
            self._done(now, finding, text, before, self._throttle.bound, "bound of the gradient's norm")
        return False

    def _bound(self) -> str:
        """Clip from now on at a multiple of the usual norm."""
        self._throttle.bound = _USUAL * (self._throttle.usual or math.inf)
        return f"{ClipNorm(self._throttle.bound).title}, {_USUAL:g} times the usual"

    def _count_dead(self, now: Moment, finding: Finding) -> bool:
        layers = {} if now.profile is None else dead_layers(now.model, now.profile, finding.sites)
        if layers:
            self._silence = Silence(layers, now.step)
        else:
            self._say(now, finding, "it is not known which weights to draw again")
        return False

    def _redraw_dead(self, now: Moment, silence: Silence) -> bool:
        """Draw the weights of dead units again, and later see whether half of them are dead once more."""
        self._silence, count = None, silence.count
        finding = Finding(Cause.DEAD_UNITS, Severity.ERROR, "")
        again = silence.again
        if count < silence.least or (again and not self._may(finding, now)):
            return False
        try:
            silence.redraw(now.model, now.optimizer, now.step)
        except GradmendError as error:
            self._say(now, finding, f"weights cannot be drawn again: {error}")
            return False
        self._states.doubt()
        self._stream.forget(now.step)
        self._silence = Silence(silence.layers, now.step + _TRIAL, (count + 1) // 2, again=True)
        if again:
            self._set_rate(now, finding, 0.5, f"{count} units dead again and drawn again, ")
        else:
            self._done(now, finding, f"{count} units drawn again", float(count), 0.0, "dead units")
        return True

    def _look_again(self) -> None:
        """Whether the loss still oscillates at the lower rate."""
        if self._trial is not None and self._trial.losses.count >= _TRIAL:
            found, self._trial = rules.judge_course(self._trial), None
            self._found += [finding for finding in found if finding.cause is Cause.OSCILLATING_LOSS]

    def _set_rate(self, now: Moment, finding: Finding, share: float, text: str = "") -> None:
        planned, before = highest_rate(now.optimizer), self._throttle.factor
        self._throttle.factor *= share
        rates = planned * before, planned * self._throttle.factor
        text = f"{text}learning rate {number(rates[0])} -> {number(rates[1])}"
        self._done(now, finding, text, *rates, "learning rate")

    # what it says

    def _check(self, now: Moment) -> bool:
        """Whether this training can be treated at all."""
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if several or not all("lr" in group for group in now.optimizer.param_groups):
            why = "on several processes" if several else "without an optimizer of torch"
            self._tell(now.step, f"A training {why} is watched, but not treated.", None)
            return False
        return True

    def _may(self, finding: Finding, now: Moment) -> bool:
        """Whether it is worth another try; says when it is not any more."""
        self._tries[finding.cause] += 1
        if self._tries[finding.cause] == _MOST + 1:
            self._say(now, finding, f"there again after {_MOST} treatments, and left to you from here on")
        return self._tries[finding.cause] <= _MOST

    def _done(
        self,
        now: Moment,
        finding: Finding,
        text: str,
        before: float | None = None,
        after: float | None = None,
        unit: str = "",
    ) -> None:
        self.acts.append(Act(now.step, finding.cause, f"{finding.cause.title}: {text}.", before, after, unit))
        self._tell(now.step, self.acts[-1].text, self.acts[-1])

    def _say(self, now: Moment, finding: Finding, text: str) -> None:
        self._tell(now.step, f"{finding.cause.title}: {text}.", None)


_Treatment = Callable[[Autopilot, Moment, Finding], bool]

_TREATMENTS: dict[Cause, _Treatment] = {
    Cause.LEARNING_RATE_TOO_HIGH: Autopilot._go_back_to_rate,
    Cause.NON_FINITE: Autopilot._go_back_slower,
    Cause.DIVERGENCE: Autopilot._go_back_clipped,
    Cause.EXPLODING_GRADIENT: Autopilot._clip,
    Cause.EXPLODING_THROUGH_TIME: Autopilot._clip,
    Cause.DEAD_UNITS: Autopilot._count_dead,
    Cause.OSCILLATING_LOSS: Autopilot._slow_down,
}
"""What is done; the gravest first. A finding that is not here is not treatable in flight."""

_ORDER = tuple(_TREATMENTS)
