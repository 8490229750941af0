"""A workbench: plans are applied to copies there, looked at and tried, and nothing is done twice."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Sequence
from time import perf_counter

from gradmend.diagnosis import Diagnosis, look
from gradmend.diagnosis.reach import judged
from gradmend.errors import GradmendError, NoEffectWarning
from gradmend.readout import lower
from gradmend.remedies import Change, Remedy
from gradmend.setup import Batch, Budget, Setup
from gradmend.training import Run, Trial
from gradmend.treatment.plans import Plan, describe

_KEPT = 8
"""So many changed copies of the setup are kept for further trials."""


class TimeIsUp(Exception):
    """The budget of the whole search is spent."""


class Workbench:
    """What plans do to copies of a setup, and how far these get.

    Args:
        setup: stays as it is.
        batches: the last fifth is held back from the trials, where there are five or more.
        budget: of each trial in steps, of the whole in seconds and trials.
        say: is told what is being done.
    """

    def __init__(
        self, setup: Setup, batches: Sequence[Batch], budget: Budget, say: Callable[[str], None]
    ) -> None:
        self.setup, self.given = setup, batches
        self.seen = list(batches[: max(1, len(batches) - len(batches) // 5)])
        self.held = list(batches[len(self.seen) :]) or self.seen
        self.budget = budget
        self.say = say
        self.until = perf_counter() + budget.seconds
        self.trials: dict[tuple[Plan, int, int], Trial] = {}
        self._found: dict[Plan, Remedy] = {}
        self._applied: dict[Plan, tuple[Change, ...]] = {}
        self._concrete: dict[Plan, Plan] = {}
        self._runs: dict[tuple[Plan, int], Run] = {}

    def apply(self, plan: Plan) -> tuple[Change, ...]:
        """Apply the remedies of a plan, one after the other; those without effect are left out."""
        if not plan:
            return ()
        if plan not in self._applied:
            before = self.apply(plan[:-1])
            change = self._change(plan, before[-1].setup if before else self.setup)
            self._applied[plan] = (*before, change) if change.edits else before
            if len(self._applied) > _KEPT:
                del self._applied[next(iter(self._applied))]
        return self._applied[plan]

    def _change(self, plan: Plan, setup: Setup) -> Change:
        """What the last remedy of a plan does; what it finds, such as a learning rate, is found once."""
        with warnings.catch_warnings(action="ignore", category=NoEffectWarning):
            change = self._found.get(plan, plan[-1]).apply(setup, self.seen)
        self._found[plan] = change.remedy
        return change

    def look(self, plan: Plan) -> Diagnosis | None:
        """What one step shows after a plan; None if it changes nothing or cannot be applied."""
        self.pause()
        self.say(f"looking at {describe(plan)}")
        try:
            changes = self.apply(plan)
            return look(changes[-1].setup, self.seen) if len(changes) == len(plan) else None
        except GradmendError:
            return None

    def concrete(self, plan: Plan) -> Plan:
        """The same plan with what its remedies found, such as a learning rate, and without idle ones."""
        if plan not in self._concrete:
            self._concrete[plan] = tuple(change.remedy for change in self.apply(plan))
        return self._concrete[plan]

    def score(self, plan: Plan, steps: int | None = None, seed: int = 0) -> float:
        """How well held-back samples fit after a trial: -1 to 1; without targets, how far the loss fell."""
        trial = self.trial(plan, steps or self.budget.steps, seed)
        if trial.diverged:
            return -1.0
        if trial.fit is not None:
            return trial.fit
        untreated = next(other for (tried, *_), other in self.trials.items() if not tried)
        return lower(trial.final_loss, untreated.initial_loss)

    def trial(self, plan: Plan, steps: int, seed: int = 0) -> Trial:
        """Train a copy; the same plan is not tried twice."""
        key = (self.concrete(plan), steps, seed)
        if key not in self.trials:
            self.pause(steps - self._taken().get((key[0], seed), 0))
            self.say(f"trying {describe(plan)}")
            run = self._run_of(key[0], seed)
            run.train(steps, max(1.0, self.until - perf_counter()))
            self.trials[key] = run.trial(describe(key[0]), self._judge)
        return self.trials[key]

    def _run_of(self, plan: Plan, seed: int) -> Run:
        """A copy that trains with a plan: one that has begun, if it is still kept."""
        if (plan, seed) not in self._runs:
            changes = self.apply(plan)
            order = random.Random(seed).sample(self.seen, len(self.seen)) if seed else self.seen
            self._runs[plan, seed] = Run(changes[-1].setup if changes else self.setup, order, seed)
            if len(self._runs) > _KEPT:
                del self._runs[next(iter(self._runs))]
        return self._runs[plan, seed]

    def _judge(self, trained: Setup) -> float | None:
        """How well held-back samples fit."""
        return judged(trained, self.held)

    def _taken(self) -> dict[tuple[Plan, int], int]:
        """The optimizer steps that each plan was tried for: they go on from where they stopped."""
        longest: dict[tuple[Plan, int], int] = {}
        for (plan, _, seed), trial in self.trials.items():
            longest[plan, seed] = max(longest.get((plan, seed), 0), len(trial.losses))
        return longest

    def pause(self, steps: int = 0) -> None:
        """Between two pieces of work: end here if the time is over, or the trials leave too few steps."""
        left = self.budget.trials * self.budget.steps - sum(self._taken().values())
        if perf_counter() > self.until or left < max(1, steps):
            raise TimeIsUp
