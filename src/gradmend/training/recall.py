"""Recall: go back to the step in which the first number was born that is not finite, and measure it."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradmend.errors import GradmendError
from gradmend.probe import measure
from gradmend.profile import Profile
from gradmend.setup import Batch, Setup
from gradmend.training.loop import Meter, Stepper

_MOST_BYTES = 2**28
"""Of a larger training nothing is kept: a second copy might not fit beside it."""


@dataclass(frozen=True)
class _State:
    """What a stretch of steps began with: live tensors, copies of them, and what is no tensor."""

    live: list[Tensor]
    copies: list[Tensor]
    memory: dict[Tensor, dict[str, Any]]
    settings: list[dict[str, Any]]
    schedule: dict[str, Any] | None
    random: tuple[Tensor, list[Tensor]]


class Recall:
    """Keeps the state at the beginning of the last two stretches of steps, and their batches.

    A stretch is what the meter fetches at once, 50 steps at most: one copy of the weights in fifty steps. The
    stretch before the present one counts, for its last step may have made what the next loss shows.

    Args:
        setup: that trains.
        step: takes its steps.
        meter: notes their losses.
    """

    def __init__(self, setup: Setup, step: Stepper, meter: Meter) -> None:
        self._setup, self._step, self._meter = setup, step, meter
        self._before: _State | None = None
        self._now: _State | None = None
        self._earlier: list[Sequence[Batch]] = []
        self._groups: list[Sequence[Batch]] = []

    def keep(self, batches: Sequence[Batch]) -> None:
        """Remember the batches of the next step, and at the beginning of a stretch how all stands."""
        if self._meter.fetched:
            self._before, self._now = self._now, self._save(self._before)
            self._earlier, self._groups = self._groups, []
        if self._now is not None:
            self._groups.append(batches)

    def wreck(self) -> Profile | None:
        """The profile of the step that made the first number that is not finite; None if it is not known.

        That is the step before the first such loss, if its gradient or update is not finite, else the step
        of that loss. All is put back afterwards as the training left it.
        """
        state, groups = self._before or self._now, [*self._earlier, *self._groups]
        losses = self._meter.losses[-len(groups) :] if groups else []
        first = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), None)
        if state is None or first is None:
            return None
        after = self._save(None)
        try:
            self._restore(state)
            return self._again(groups[: first + 1])
        except GradmendError:
            return None
        finally:
            if after is not None:
                self._restore(after)

    def _again(self, groups: Sequence[Sequence[Batch]]) -> Profile:
        """Take the steps once more; measure the last but one, and where it is sound the last."""
        *others, last = groups
        for place, batches in enumerate(others):
            if place == len(others) - 1 and not _sound(profile := measure(self._setup, iter(batches))):
                return profile
            self._step(batches)
        return measure(self._setup, iter(last))

    @torch.no_grad()
    def _save(self, last: _State | None) -> _State | None:
        optimizer, schedule = self._step.optimizer, self._step.schedule
        live = self._tensors()
        if sum(t.nbytes for t in live) > _MOST_BYTES:
            return None
        if last is not None and [*map(id, last.live)] == [*map(id, live)]:
            copies = last.copies
            torch._foreach_copy_(copies, live)
        else:
            copies = [t.detach().clone() for t in live]
        return _State(
            live=live,
            copies=copies,
            memory={p: dict(entry) for p, entry in optimizer.state.items()},
            settings=[{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups],
            schedule=None if schedule is None else copy.deepcopy(schedule.state_dict()),
            random=(torch.get_rng_state(), torch.cuda.get_rng_state_all()),
        )

    @torch.no_grad()
    def _restore(self, state: _State) -> None:
        optimizer, schedule = self._step.optimizer, self._step.schedule
        for live, saved in zip(state.live, state.copies, strict=True):
            live.copy_(saved)
        optimizer.state.clear()
        optimizer.state.update({p: dict(entry) for p, entry in state.memory.items()})
        for group, settings in zip(optimizer.param_groups, state.settings, strict=True):
            group.update(settings)
        if schedule is not None and state.schedule is not None:
            schedule.load_state_dict(copy.deepcopy(state.schedule))
        torch.set_rng_state(state.random[0])
        torch.cuda.set_rng_state_all(state.random[1])

    def _tensors(self) -> list[Tensor]:
        model, memory = self._setup.model, self._step.optimizer.state.values()
        kept = [value for entry in memory for value in entry.values() if isinstance(value, Tensor)]
        held = [p for group in self._step.optimizer.param_groups for p in group["params"]]
        return list({id(t): t for t in (*model.parameters(), *held, *model.buffers(), *kept)}.values())


def _sound(profile: Profile) -> bool:
    """Whether loss, gradients and updates are numbers."""
    found = [value for p in profile.parameters for value in (p.gradient, p.update) if value is not None]
    return all(map(math.isfinite, (profile.loss, *found)))
