"""Exam: one step of the user's own training, measured in full while it runs.

The recorder is there for one forward pass of the model, tensor hooks for its backward pass; nothing is
computed twice, and the step's results are to the last bit those of a step that is not measured.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from gradmend import stats
from gradmend.anatomy import Site
from gradmend.assembly import Step, assemble
from gradmend.causes import Cause
from gradmend.diagnosis import RULES, Finding
from gradmend.ledger import Ledger, Numbers
from gradmend.probe import Guard, Probe, add_parameters
from gradmend.profile import Profile
from gradmend.recorder import Call, Recorder
from gradmend.setup import parameters_of
from gradmend.watch.gradients import dense
from gradmend.watch.weights import Weights, local


class Exam:
    """Measures one step, from its forward pass to the optimizer. Its methods are called in their order.

    Args:
        model: that is about to run.
        guard: wraps what the user's training calls, so that it never sees an error.
    """

    def __init__(self, model: nn.Module, guard: Guard) -> None:
        self._ledger = Ledger()
        self._probe = _LiveProbe(self._ledger, model, guard)
        self._parameters = {n: p for n, p in parameters_of(model.named_modules()) if p.is_floating_point()}
        self._weights = Weights(list(self._parameters.values()))
        self._forward = ExitStack()
        self._batch: Any = None
        self._ran = self._back = self._stepped = False

    def begin(self, args: Any, kwargs: Any, caller: FrameType | None) -> None:
        """The model is called with these arguments; only lines of code within this frame's call matter."""
        self._batch = (args, kwargs)
        self._forward.enter_context(self._probe.recorder.watching(self._batch))
        self._probe.recorder.look_within(caller)

    def end(self) -> None:
        """It has returned, or raised."""
        if not self._ran:
            self._ran = True
            self._forward.close()
            self._probe.end_forward()

    def abort(self) -> None:
        """The forward pass has ended early."""
        self._forward.close()

    def first_lost(self) -> Site | None:
        """The first site of the forward pass whose output is not finite."""
        sizes = self._ledger.fetch()["moments"]
        sites = self._probe.anatomy.sites
        return next(
            (s for s in sites if s.index in sizes and not all(map(math.isfinite, sizes[s.index]))), None
        )

    def before_backward(self, loss: Tensor, scale: float | Tensor) -> None:
        """The gradients that come are those of the step."""
        if self._ran and not self._back:
            self._ledger.add("loss", [""], (loss.detach() / scale)[None, None])
            self._ledger.add("scale", [""], torch.as_tensor(scale, dtype=torch.float32).reshape(1, 1))
            self._probe.begin_backward()

    def after_backward(self) -> None:
        """All gradients are there."""
        if self._ran and not self._back:
            self._back = True
            self._probe.end_backward(self._probe.waited)

    def before_step(self) -> None:
        """Look at the parameters, and at the gradients that the optimizer gets."""
        found = ((name, dense(p.grad)) for name, p in self._parameters.items())
        gradients = {name: gradient for name, gradient in found if gradient is not None}
        if self._ran and gradients:
            self._stepped = True
            self._add_parameters(gradients)
            self._weights.before()

    def _add_parameters(self, gradients: Mapping[str, Tensor]) -> None:
        values = {name: local(p) for name, p in self._parameters.items()}
        add_parameters(self._ledger, values, gradients)
        numbers = self._ledger.fetch()
        self._whole(numbers, values)
        alike = numbers["alike"]
        for name in [name for name in gradients if any(alike.get(name, ()))]:  # so far only how rows begin
            equal = [stats.rows_equal(x) for x in (values[name], gradients[name])]
            self._ledger.add("alike", [name], [[float(all(equal))]])

    def _whole(self, numbers: Numbers, values: Mapping[str, Tensor]) -> None:
        """Of sharded parameters the norm of the whole, if it is all like the shard."""
        for name, p in self._parameters.items():
            if (part := values[name].numel()) not in (0, p.numel()):
                for group in ("value", "slope"):
                    if name in numbers[group]:
                        norm = numbers[group][name][0] * math.sqrt(p.numel() / part)
                        self._ledger.add(group, [name], [[norm]])

    def after_step(self, held: frozenset[int]) -> Profile | None:
        """The profile; None if the model did not run, or to no avail.

        Args:
            held: the `id` of every parameter that some optimizer steps.
        """
        if not self._stepped:
            return None
        self._ledger.add("update", list(self._parameters), self._weights.after()[:, 1:])
        numbers = self._ledger.fetch()
        if not self._back:
            self._ledger.add("loss", [""], [[math.nan]])
        elif (scale := numbers["scale"][""][0]) != 1:
            scaled = dict(numbers["gradient"])
            if not all(math.isfinite(row[0]) for row in scaled.values()):
                return None  # the scale was too large, and this step is not taken
            self._ledger.add("gradient", list(scaled), [[row[0] / scale] for row in scaled.values()])
        step = Step(self._probe.anatomy, self._parameters, numbers, self._probe.inside, False)
        profile = assemble(None, [self._batch], [step])
        trained = {name: id(p) in held for name, p in self._parameters.items()}
        return replace(
            profile, parameters=tuple(replace(p, trained=trained[p.name]) for p in profile.parameters)
        )


def running(model: nn.Module) -> tuple[FrameType | None, Mapping[str, Any]]:
    """Who is calling a model, and the variables of torch's call."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _CALL and (found := frame.f_locals).get("self") is model:
            return frame.f_back, found
        frame = frame.f_back
    return None, {}


_CALL = nn.Module._call_impl.__code__


def judge(profile: Profile) -> list[Finding]:
    """What the rules of diagnosis find that ask for one measured step and no more.

    Numbers that are not finite make all others meaningless, and a layer that is wholly dead explains every
    signal that ends there.
    """
    found = [finding for rule in RULES if (finding := rule(profile))]
    if lost := [finding for finding in found if finding.cause is Cause.NON_FINITE]:
        return lost
    cut = any(finding.cause is Cause.DEAD_UNITS and finding.measured == 1 for finding in found)
    return [finding for finding in found if not (cut and finding.cause in _SHRUNK)]


def tables(profile: Profile) -> Iterator[tuple[str, tuple[str, ...], tuple[str, ...], Tensor]]:
    """What a full look has seen of the weights, and of every site: name, rows, statistics and values."""
    found = [p for p in profile.parameters if math.prod(p.shape)]
    weights = [(p.rms, math.nan if p.update is None else p.update) for p in found]
    names = tuple(p.name for p in found)
    yield "weights", names, Weights.statistics, torch.tensor(weights).reshape(-1, 2)
    columns = ("mean", "rms", "gradient", "cosine", "zero", "dead", "saturation")
    rows = [[getattr(reading, column) for column in columns] for reading in profile.sites]
    known = [[math.nan if value is None else value for value in row] for row in rows]
    names = tuple(reading.site.name for reading in profile.sites)
    yield "sites", names, columns, torch.tensor(known).reshape(-1, len(columns))


_SHRUNK = frozenset(
    (
        Cause.CONTRACTING_ACTIVATION,
        Cause.WEIGHTS_TOO_SMALL,
        Cause.VANISHING_GRADIENT,
        Cause.INFORMATION_COLLAPSE,
        Cause.NO_GRADIENT,
    )
)


class _LiveProbe(Probe):
    """The probe of `measure`, led by a forward and backward pass that somebody else takes.

    Exams are seldom, and shall not need memory that the training has not: a small network's step has 1 MB.
    """

    recorder: CarefulRecorder

    def __init__(self, ledger: Ledger, model: nn.Module, guard: Guard) -> None:
        super().__init__(ledger, model, guard, partial(CarefulRecorder, guard=guard), frugal=True)
        self._waited: dict[int, Tensor] = {}

    def end_forward(self) -> None:
        """All sites have run: wait for the gradients that `inside` asks for."""
        super().end_forward()
        for index, tensor in enumerate(self.inside.watched):
            tensor.register_hook(self._guard(partial(self._waited.__setitem__, index)))  # type: ignore[no-untyped-call]

    @property
    def waited(self) -> list[Tensor | None]:
        """The gradients that have come of those."""
        return [self._waited.get(index) for index in range(len(self.inside.watched))]

    def _before(self, call: Call) -> None:
        if isinstance(call.weight, nn.Parameter):
            self.recorder.recognize(call.weight)
        with _exactly(call.signal.device.type):
            super()._before(call)

    def _after(self, call: Call, site: Site, output: Tensor) -> None:
        with _exactly(output.device.type):
            super()._after(call, site, output)


def _exactly(device: str) -> AbstractContextManager[object]:
    """Statistics are no part of what is to be computed in half precision."""
    lowered = torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if lowered else nullcontext()


class CarefulRecorder(Recorder):
    """A recorder whose own errors never reach the model that it looks at."""

    def __init__(
        self,
        model: nn.Module,
        before: Callable[..., None] | None,
        after: Callable[..., None] | None,
        guard: Guard,
    ) -> None:
        super().__init__(model, before, after)
        self._failed = guard(_raise)
        self._blind = False

    def look_within(self, caller: FrameType | None) -> None:
        """Lines of the user's code count that run within the call that this frame makes."""
        if caller is not None:
            self._boundary = caller

    def recognize(self, parameter: nn.Parameter) -> None:
        """Know it by its name: sharded parameters are others while their module runs."""
        if id(parameter) not in self._names:
            self._names |= {id(p): name for name, p in parameters_of(self.modules.items())}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As a recorder does; after an error of its own it only hands on what functions return."""
        if self._blind:
            return func(*args, **(kwargs or {}))
        once = _Once(func)
        try:
            return super().__torch_function__(once, types, args, kwargs)
        except Exception as error:
            if error is once.error:
                raise
            self._blind = True
            self._failed(error)
            return once.result[0] if once.result else func(*args, **(kwargs or {}))
        finally:
            once.result = ()  # for what is known of functions is kept by them


def _raise(error: Exception) -> None:
    raise error


class _Once:
    """A torch function that remembers what came of its call; everything else is the function's own."""

    def __init__(self, function: Any) -> None:
        self._function = function
        self.result: Sequence[Any] = ()
        self.error: Exception | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            result = self._function(*args, **kwargs)
        except Exception as error:
            self.error = error
            raise
        self.result = (result,)
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._function, name)

    def __hash__(self) -> int:
        return hash(self._function)

    def __eq__(self, other: object) -> bool:
        return other is self or other == self._function
