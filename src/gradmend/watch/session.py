"""Session: a watch while it is attached: what it does at each event of the training."""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from gradmend.causes import Cause
from gradmend.diagnosis import Finding, Severity
from gradmend.probe import compiled
from gradmend.profile import Profile
from gradmend.setup import parameters_of
from gradmend.watch import events, rules
from gradmend.watch.exam import Exam, judge, running, tables
from gradmend.watch.gate import Gate
from gradmend.watch.gradients import Gradients
from gradmend.watch.losses import Loss, Losses
from gradmend.watch.mail import Mail
from gradmend.watch.notices import Notices, Sink
from gradmend.watch.origin import Calls, find_origin
from gradmend.watch.owner import Owner, rate
from gradmend.watch.pace import SHARES, Pace
from gradmend.watch.ranks import First, Other, join
from gradmend.watch.stream import Stream, Table, as_array
from gradmend.watch.taps import Taps, layers
from gradmend.watch.weights import Weights, local

_COURSE = 50
"""Steps after which the course of the losses is judged, and again whenever they have doubled."""

_ALL, _SOME, _FEW = tuple(SHARES), ("exam", "gradients", "weights"), ("gradients", "weights")
"""What can be looked at: once the layers are known, before, and where the model as a whole is not called."""

_UNSEEN = 3
"""Full looks at which the model is not called as a whole before it is taken that it never is."""


class Session:
    """Listens to a training, and looks at its steps as often as the pace says.

    Args:
        model: is not kept alive.
        optimizer: whose steps count; None takes the first one seen that holds a parameter of the model.
        pace: what to look at, and when.
        notices: takes the findings.
        sink: takes what is read.
        fail: is called with what a watch of its own does wrong, and never by the training.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        pace: Pace,
        notices: Notices,
        sink: Sink | None,
        fail: Callable[[Exception], None],
    ) -> None:
        self.step = 0
        self.profile: Profile | None = None
        self.stream = Stream()
        self.on = False
        self.compiled = compiled(model.modules())
        self._model = weakref.ref(model, lambda _: self._let_go())
        self._owner = Owner(self._model, optimizer)
        self._pace, self._notices, self._sink, self._failed = pace, notices, sink, fail
        self._mail, self._losses, self._calls = Mail(), Losses(), Calls()
        self._names: tuple[str, ...] = ()
        self._sizes = self._counts = as_array(torch.zeros(0))
        self._ranks: First | Other | None = None
        self._gradients: Gradients | None = None
        self._weights: Weights | None = None
        self._taps: Taps | None = None
        self._exam: Exam | None = None
        self._entrance = Gate(self.guard(self._entered))
        self._exit: RemovableHandle | None = None
        self._looking: tuple[str, ...] = ()
        self._open = self._late = self._warned = self._unsure = False
        self._norm: float | None = None
        self._scale: float | Tensor = 1.0
        self._unseen, self._next_course = 0, _COURSE
        self._candidates: frozenset[Cause] = frozenset()
        self._leave = self.guard(self._left)
        self._listener = events.Guarded(self, lambda function: pace.timed(self.guard(function)))

    def start(self) -> None:
        """Begin with the next step, or go on."""
        self.on = True
        events.listen(self._listener)
        self._pace.begin()
        if self._ranks is not None:
            self._ranks.begin()
        self._plan()

    def stop(self) -> None:
        """Take away all hooks and let go of the parameters; may be called at any time."""
        self.on = False
        events.unlisten(self._listener)
        self._abort()
        self._disarm()
        self._let_go()

    def leave_modules(self) -> None:
        """From now on look at no signals, so that there is no hook on modules."""
        self.compiled = True
        self._abort()
        self._disarm()
        self._looking = tuple(name for name in self._looking if name in _FEW)

    def _let_go(self) -> None:
        """The model is gone, perhaps while another is compiled: hooks are taken away at the next event."""
        self._gradients, self._weights, self._exam = None, None, None
        self._calls.forget()

    def finish(self) -> None:
        """Stop, and read what is still on its way."""
        if self.on:
            self.guard(self._mail.fetch)(True)
            if self._ranks is not None:
                self.guard(self._ranks.finish)()
            self.stop()

    def look_back(self) -> None:
        """The training has raised an error, perhaps over numbers that were not finite in its last call."""
        model = self._model()
        if model is not None and (found := self._calls.find_now(model)):
            self._notices.update("end", self.step + 1, [found])

    def guard(self, function: Callable[..., None]) -> Callable[..., None]:
        """A function whose errors end the session and never reach the training."""

        @functools.wraps(function)
        def guarded(*args: Any) -> None:
            if self.on:
                try:
                    function(*args)
                except Exception as error:  # whatever it is, it is not the user's
                    self.stop()
                    self._failed(error)

        return guarded

    # events of the training

    def before_backward(self, loss: Tensor, scale: float | Tensor) -> None:
        """A loss is about to be propagated."""
        if self._model() is None:
            self.stop()
            return
        found = self._losses.add(loss, scale)
        self._late = isinstance(found, Tensor)
        if not (self._calls.now is None or isinstance(found, Tensor) or math.isfinite(found)):
            self._find_origin(*self._calls.now)
        self._scale = scale
        if self._exam is not None:
            self._exam.before_backward(loss, scale)

    def after_backward(self) -> None:
        """Its gradients are there."""
        self._calls.end(self._late)
        if self._exam is not None:
            self._exam.after_backward()
        if self._losses.several:
            self._see_call()

    def before_step(self, optimizer: Optimizer) -> None:
        """Gradients are now what the optimizer gets."""
        if self._model() is None:
            self.stop()
            return
        if not self._owner.owns(optimizer):
            self._losses.put_aside()
            self.stream.game = self._owner.rivals
            self._see_call()
            return
        self.step += 1
        self.stream.skipped = 0
        if self.step == 1 and (model := self._model()) is not None:
            self._ranks = join(model, self._pace)
        if self._gradients is None:
            self._build()
        if "gradients" in self._looking and self._gradients is not None:
            self._post("gradients", self._names, self._gradients.statistics, self._gradients.read())
        self._look_at_weights()
        if self._exam is not None:
            self._exam.before_step()
        self._tell(self._losses.take(), functools.partial(self._gather_loss, self.step, rate(optimizer)))

    def _look_at_weights(self) -> None:
        """If planned, or if something else than the optimizer wrote them; training fills them up soon."""
        if self._weights is None:
            return
        strange = self._weights.overwritten() or self.stream.gone
        if strange and self._ranks is None and self._pace.suspect(self.step, "weights"):
            self._looking = (*self._looking, "weights")
        if "weights" in self._looking:
            self._weights.before()

    def after_step(self, optimizer: Optimizer) -> None:
        """The parameters have moved."""
        if not self._owner.owns(optimizer) or not self.step:
            return
        if "weights" in self._looking and self._weights is not None:
            self._post("weights", self._names, self._weights.statistics, self._weights.after())
        if "taps" in self._looking and self._taps is not None:
            self._taps.close()
            self._post("layers", self._taps.names, self._taps.statistics, self._taps.read(self._scale))
        if "exam" in self._looking:
            self._end_exam()
        self._mail.fetch()
        if self._ranks is not None:
            self._exchange(self._ranks)
        if self.step >= self._next_course and self._speaks:
            self._review()
        self._pace.note(self._looking)
        self._plan()

    def after_update(self) -> None:
        """A step for which losses still wait was skipped: what was looked at in it comes to nothing."""
        if not self._losses.waiting or (loss := self._losses.take()) is None:
            return
        self._abort()
        self._open_again()
        self.stream.skipped += 1
        self._tell(loss, functools.partial(self._judge_loss, self.step + 1))

    # looking

    def _plan(self) -> None:
        """Choose what to look at in the next step."""
        possible = _ALL if self._whole and self._taps is not None else _SOME if self._whole else _FEW
        step, ranks = self.step + 1, self._ranks
        self._looking = (
            self._pace.next(step, possible) if ranks is None else ranks.plan(step, possible, self._pace)
        )
        self._open_again()

    def _open_again(self) -> None:
        """Wait for the model's next call."""
        self._open = False
        self._see_call()

    def _see_call(self) -> None:
        if self._whole:
            self._entrance.open()

    @property
    def _whole(self) -> bool:
        """Whether the model is called as a whole, by what is known of it."""
        return not self.compiled and self._unseen < _UNSEEN

    def _disarm(self) -> None:
        self._entrance.close()
        if self._exit is not None:
            self._exit.remove()
            self._exit = None

    def _entered(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling() or module is not self._model() or not torch.is_grad_enabled():
            return
        self._disarm()
        caller, variables = running(module)
        self._calls.now = call = args, variables.get("kwargs", {})
        if self._open:
            return
        self._open = True
        if "taps" in self._looking and self._taps is not None:
            self._taps.open()
        if "exam" in self._looking:
            self._exam = Exam(module, self.guard)
            self._exit = register_module_forward_hook(self._leave, always_call=True)
            self._exam.begin(*call, caller)

    def _left(self, module: nn.Module, _args: Any, output: Any) -> None:
        if module is not self._model() or self._exam is None:
            return
        if output is None:  # it raised
            self._abort()
        else:
            self._exam.end()

    def _abort(self) -> None:
        if self._exam is not None:
            self._exam.abort()
        if self._taps is not None:
            self._taps.close()
        self._exam, self._calls.now = None, None

    def _build(self) -> None:
        """Look at the parameters that the model has now."""
        model = self._model()
        named = [] if model is None else parameters_of(model.named_modules())
        named = [(name, p) for name, p in named if p.is_floating_point() and p.numel()]
        self._names, parameters = tuple(name for name, _ in named), [p for _, p in named]
        self._sizes = as_array(torch.tensor([p.numel() for p in parameters])) ** 0.5
        self._counts = as_array(torch.tensor([local(p).numel() for p in parameters]))
        self._gradients, self._weights = Gradients(parameters), Weights(parameters)

    def _end_exam(self) -> None:
        exam, self._exam = self._exam, None
        self._disarm()
        profile = None if exam is None else exam.after_step(self._owner.held())
        self._unseen = self._unseen + 1 if exam is None else 0
        if profile is None:
            return
        first, self.profile = self.profile is None, profile
        self.stream.locate(profile.anatomy)
        self._follow(profile)
        for name, rows, statistics, values in tables(profile):
            self._post(name, rows, statistics, values)
        if self._speaks:
            self._decide(judge(profile), first)

    def _follow(self, profile: Profile) -> None:
        """Look at the layers and parameters that this profile is of."""
        model = self._model()
        if model is None:
            return
        found = layers(profile.anatomy, dict(model.named_modules()))
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._taps = Taps(found, device, self.guard) if found else None
        self._build()

    def _find_origin(self, args: Any, kwargs: Any) -> None:
        model, self._calls.now = self._model(), None
        if self._ranks is not None:
            self._ranks.collect()
        if model is not None and self.stream.origin is None and not (self._ranks and self._ranks.blamed):
            self.stream.origin = find_origin(model, args, kwargs)
            if self._ranks is not None:
                self._ranks.blame(self.step + 1, self.stream.origin)

    # other processes

    @property
    def _speaks(self) -> bool:
        """Whether this process says what is found, and not the first one for all."""
        return self._ranks is None or self._ranks.first

    def _exchange(self, ranks: First | Other) -> None:
        ranks.end_step(self.step, self._pace)
        if ranks.alone:  # in the first process this model is not watched
            self._ranks = None

    def _gather(self, name: str, table: Table) -> None:
        """Take a reading of this process, together with those of the others."""
        if self._ranks is None:
            self._take(name, table)
        else:
            weights = self._counts if name in ("gradients", "weights") else None
            self._ranks.take(name, table, weights, lambda found: self._take(name, found))

    def _gather_loss(self, step: int, rate: float | None, loss: float | None) -> None:
        if self._ranks is None or loss is None:
            self._take_loss(step, rate, loss)
            return
        own = Table(step, ("",), ("loss",), as_array(torch.tensor([[loss]])))
        self._ranks.take("losses", own, None, lambda found: self._take_losses(rate, found))
        if not self._ranks.first:
            self.stream.losses.add(step, loss)
            if math.isfinite(loss):
                self.stream.origin = None

    def _take_losses(self, rate: float | None, found: Table) -> None:
        if self._ranks is not None:
            self.stream.origin = self._ranks.origin(found.step) or self.stream.origin
        self._take_loss(found.step, rate, found.values.item())

    # judging

    def _tell(self, loss: Loss | None, take: Callable[[Any], None]) -> None:
        """Have a loss taken as a number, once it is one."""
        if isinstance(loss, Tensor):
            self._mail.post(loss, lambda x: take(x.item()))
        else:
            take(loss)

    def _post(self, name: str, rows: tuple[str, ...], statistics: tuple[str, ...], values: Tensor) -> None:
        step = self.step
        self._mail.post(values, lambda x: self._gather(name, Table(step, rows, statistics, as_array(x))))

    def _take(self, name: str, table: Table) -> None:
        self.stream.add(name, table)
        self._write("reading", table.step, {"table": name, **vars(table)})
        if name == "gradients":
            self._norm = table.norm("gradient", self._sizes)
        judges = rules.TABLE_RULES.get(name, ())
        if name == "gradients" and self.compiled:  # nothing can look closer
            judges = (rules.silent_layer,)
        if judges:
            self._notices.update(name, table.step, [found for rule in judges if (found := rule(self.stream))])
        if rules.suspects(self.stream, name):
            self._pace.suspect(self.step)

    def _take_loss(self, step: int, rate: float | None, loss: float | None) -> None:
        self._write("step", step, {"loss": loss, "gradient": self._norm, "rate": rate})
        self._norm = None
        self.stream.rates.add(step, rate)
        if loss is not None:
            self._judge_loss(step, loss)

    def _judge_loss(self, step: int, loss: float) -> None:
        if not (math.isfinite(loss) or self.stream.origin or (model := self._model()) is None):
            self.stream.origin = self._calls.find_later(model)
        if loss > self.stream.losses.bound:
            self._pace.suspect(step)
        self.stream.losses.add(step, loss)
        if self._speaks and (self.stream.lasting or not rules.calm(self.stream)):
            found = [finding for rule in rules.STEP_RULES if (finding := rule(self.stream))]
            self._notices.update("losses", step, found)
            self.stream.lasting = self._notices.lasting("losses")
        if math.isfinite(loss):
            self.stream.origin = None

    def _decide(self, findings: list[Finding], first: bool) -> None:
        """What the first full look finds is so, and what two in a row do; warnings wait for the losses."""
        self._unsure = self.step < _COURSE and any(f.cause is Cause.NOT_IN_OPTIMIZER for f in findings)
        if self._unsure:  # optimizers that have not stepped yet are not known
            findings = [f for f in findings if f.cause is not Cause.NOT_IN_OPTIMIZER]
        self._warned = any(f.severity is Severity.WARNING for f in findings)
        if self.step < _COURSE or self.stream.losses.falling:
            findings = [f for f in findings if f.severity is not Severity.WARNING]
        causes = frozenset(finding.cause for finding in findings)
        sure = causes if first else causes & (self._candidates | frozenset(self._notices.lasting("exam")))
        self._notices.update("exam", self.step, [f for f in findings if f.cause in sure])
        self._candidates = causes
        if causes - sure:
            self._pace.insist()

    def _review(self) -> None:
        """Judge the course of the losses, and look again at what there were warnings of, or was too early."""
        self._next_course = 2 * self.step
        self._notices.update("course", self.step, rules.judge_course(self.stream))
        again = self._unsure or (self._warned and not self.stream.losses.falling)
        if again or rules.in_turn(self.stream):
            self._pace.insist()

    def _write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        if self._sink is not None:
            self._sink.write(kind, step, values)
