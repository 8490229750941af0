"""Search: from the causes to the least plan that cures them and lets the setup train."""

from __future__ import annotations

import heapq
import itertools
import math
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import cast

from gradmend.causes import Cause
from gradmend.diagnosis import Diagnosis, look
from gradmend.errors import GradmendError, NoEffectWarning
from gradmend.readout import lower
from gradmend.remedies import (
    REMEDIES,
    Change,
    DepthRates,
    LearningRate,
    Remedy,
    StandardizeInput,
    Tailor,
    UseOptimizer,
    anatomy_of,
)
from gradmend.setup import Batch, Budget, Setup
from gradmend.training import Trial, run_trial
from gradmend.training.evaluation import evaluate, fit
from gradmend.treatment.plans import Plan, cost, describe, joined, kind

_LOOKS, _ALIKE, _STRUCTURES, _TOGETHER, _SPEEDS, _ENTRANTS = 14, 2, 3, 4, 3, 8
"""Plans looked at; kept of one set of kinds, and in all; remedies in one; ways to train it; entrants."""

_TUNED = 2
"""Learning rates are found for so many of the best structures: that takes as long as a trial or two."""

_RUNGS = (4, 2, 1)
"""Trials take a quarter of the budget's steps, a half, and all; each time the better half goes on."""

_TOLERANCE = 0.05
"""A plan may lose this share of the best gain and still win by changing less."""

_KEPT = 8
"""So many changed copies of the setup are kept for further trials."""

_VERY_DEEP = 100
"""In so many layers and more those between the first and the last must learn more slowly."""

_LEARNS = 0.5
"""A setup without errors that scores so well in a trial is left alone, whatever the prognosis says."""

_PATIENCE = 4
"""So many times a trial's steps are tried of a setup without errors."""

_COST_OF_CURE = 0.1
"""What a plan may lose in score by curing a contradiction: new output units have to be learnt, too."""

_CONTRADICTIONS = frozenset(
    cause for cause in Cause if cause.illness.part in ("output", "loss", "labels", "wiring")
)
"""A setup may learn in spite of these, but not what was meant."""

_FIRM: Plan = (StandardizeInput(), Tailor(), UseOptimizer("Adam"))
"""Nearly all that trains at all trains with these: what to fall back on, to be reduced to what is needed."""


class TimeIsUp(Exception):
    """The budget of the whole search is spent."""


class Search:
    """One run of `mend`: what it works on, what it has tried, and the best so far.

    Args:
        setup: stays as it is.
        batches: the last fifth is held back from the trials, where there are five or more.
        budget: of each trial in steps, of the whole in seconds and trials.
        say: is told what is being done.
    """

    def __init__(
        self, setup: Setup, batches: Sequence[Batch], budget: Budget, say: Callable[[str], None]
    ) -> None:
        self.setup = setup
        self.seen = list(batches[: max(1, len(batches) - len(batches) // 5)])
        self.held = list(batches[len(self.seen) :]) or self.seen
        self.budget = budget
        self.say = say
        self.until = perf_counter() + budget.seconds
        self.trials: dict[tuple[Plan, int, int], Trial] = {}
        self.best: Plan = ()
        self.treatable = frozenset[Cause]()
        self._found: dict[Plan, Remedy] = {}
        self._cured: dict[Plan, bool] = {}
        self._applied: dict[Plan, tuple[Change, ...]] = {}

    def learns(self, planned: int | None) -> bool:
        """Whether the setup learns as it is, in the steps that are planned, if the budget allows so many."""
        steps = min(planned or self.budget.steps, _PATIENCE * self.budget.steps)
        return self.score((), steps) >= _LEARNS

    def run(self, before: Diagnosis) -> tuple[Change, ...]:
        """Gather plans, race them, take away what is not needed, confirm; interrupted, the best so far."""
        try:
            self._run(before)
        except (KeyboardInterrupt, TimeIsUp):
            self.say("ending early, with the best so far")
            self.best = self.best or self.leader()
        return self.apply(self.best)

    def _run(self, before: Diagnosis) -> None:
        self.trial((), self.budget.steps)
        finalists = self.race(self.gather(before))
        better = filter(self.better, [*finalists, *self.tuned(finalists)])
        for plan in sorted(better, key=self.rank):
            self.best = plan
            for less in dict.fromkeys((self.reduced(plan), self.concrete(plan))):
                if self.confirmed(less):
                    self.best = less
                    return
        self.best = ()

    def leader(self) -> Plan:
        """The plan of the best trial so far, if it beats the setup as it is."""
        scores = {key[0]: self.score(*key) for key in self.trials}
        best = max(scores, key=scores.__getitem__, default=())
        return best if best and scores[best] > scores.get((), -1.0) else ()

    # ---- plans ------------------------------------------------------------------------------------------

    def gather(self, before: Diagnosis) -> list[Plan]:
        """Plans that leave nothing to find which remedies treat, each with several ways to train it."""
        anatomy = anatomy_of(self.setup, self.seen[0])
        usable = [remedy for remedy in REMEDIES if remedy.applies_to(self.setup, anatomy)]
        found = frozenset(finding.cause for finding in before.findings)
        causes = before.causes or found | {Cause.SLOW_CONVERGENCE}
        self.treatable = causes & frozenset[Cause]().union(*(remedy.treats for remedy in usable))
        if not self.treatable:
            return []
        start = look(self.setup, self.seen)
        repairs, repaired = self.repairs(start, usable)
        structures = list(self.structures(repairs, repaired, usable)) or [repairs]
        speeds = list(self.speeds(causes - start.causes, usable))
        plans = [joined(structure, speed) for speed in speeds for structure in structures][:_ENTRANTS]
        deep = (DepthRates(),) if len(anatomy.weighted()) > _VERY_DEEP else ()
        firm = joined(repairs, (r for r in (*_FIRM, *deep) if r.applies_to(self.setup, anatomy)))
        return [plan for plan in dict.fromkeys([*plans, firm]) if plan]

    def repairs(self, start: Diagnosis, usable: Sequence[Remedy]) -> tuple[Plan, Diagnosis]:
        """What resolves the contradictions, one after the other, and what one step shows then."""
        plan, diagnosis = cast(Plan, ()), start
        while wrong := diagnosis.causes & self.treatable & _CONTRADICTIONS:
            looks = ((more, self.look(more)) for more in self.extensions(plan, wrong, usable))
            good = ((more, found) for more, found in looks if found and not wrong <= found.causes)
            step = next(good, None)
            if step is None:
                break
            plan, diagnosis = step
        return plan, diagnosis

    def structures(self, base: Plan, start: Diagnosis, usable: Sequence[Remedy]) -> Iterator[Plan]:
        """What cures all that one step shows, the least intrusive first, by looking at copies."""
        treatable = frozenset[Cause]().union(*(remedy.treats for remedy in usable))
        order, full = itertools.count(), Counter[frozenset[str]]()
        queue: list[tuple[int, int, Plan, Diagnosis]] = [(cost(base), next(order), base, start)]
        seen, looks = set[Plan](), 0
        while queue and looks < _LOOKS and full.total() < _STRUCTURES:
            *_, plan, diagnosis = heapq.heappop(queue)
            left = diagnosis.causes & treatable
            if not left:
                kinds = frozenset(map(kind, plan))
                full[kinds] += 1
                if full[kinds] <= _ALIKE:
                    yield plan
                continue
            for more in self.extensions(plan, left, usable):
                if more in seen or full[frozenset(map(kind, more))] >= _ALIKE or looks >= _LOOKS:
                    continue
                seen.add(more)
                looks += 1
                if found := self.look(more):
                    worse = len(found.causes & treatable) - len(left)
                    heapq.heappush(queue, (cost(more) + max(0, worse), next(order), more, found))

    @staticmethod
    def extensions(plan: Plan, left: frozenset[Cause], usable: Sequence[Remedy]) -> list[Plan]:
        """The plan with one more remedy that treats what is found first, of a kind not used yet."""
        if len(plan) == _TOGETHER:
            return []
        used = {kind(remedy) for remedy in plan}
        first = next(cause for cause in Cause if cause in left)
        return [joined(plan, (r,)) for r in usable if first in r.treats and kind(r) not in used]

    @staticmethod
    def speeds(hidden: frozenset[Cause], usable: Sequence[Remedy]) -> Iterator[Plan]:
        """What treats that which only steps show; first nothing, as other weights may do."""
        yield ()
        found = [r for r in usable if r.treats & hidden and not isinstance(r, LearningRate)]
        optimizers = [r for r in usable if isinstance(r, UseOptimizer)]
        for remedy in list(dict.fromkeys([*found, *optimizers]))[:_SPEEDS]:
            yield (remedy,)

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

    # ---- trials -----------------------------------------------------------------------------------------

    def race(self, plans: Sequence[Plan]) -> list[Plan]:
        """The plans that train best, by successive halving (Jamieson, Talwalkar, 2016)."""
        for rung in _RUNGS:
            steps = max(1, self.budget.steps // rung)
            scores = {plan: self.score(plan, steps) for plan in plans}
            plans = sorted(plans, key=lambda plan: -scores[plan])[: max(2, math.ceil(len(plans) / 2))]
        return list(plans)

    def tuned(self, plans: Sequence[Plan]) -> list[Plan]:
        """The structures of the best plans, each with a learning rate that is found for it."""
        structures = [tuple(r for r in plan if not isinstance(r, UseOptimizer)) for plan in plans]
        rates = [joined(structure, (LearningRate(),)) for structure in structures]
        return [plan for plan in dict.fromkeys(rates) if plan not in plans][:_TUNED]

    def better(self, plan: Plan) -> bool:
        """Whether a plan trains clearly better than the setup as it is, or cures it at no cost."""
        gained, own = self.score(plan), self.score(())
        if self.treatable & _CONTRADICTIONS:
            return self.cures(plan) and gained >= own - _COST_OF_CURE
        return gained > own + 0.05 * (1 - own)

    def cures(self, plan: Plan) -> bool:
        """Whether a plan leaves none of the contradictions that can be treated."""
        wrong = self.treatable & _CONTRADICTIONS
        if plan not in self._cured:
            left = self.look(plan) if wrong and plan else None
            self._cured[plan] = not wrong or (left is not None and not left.causes & wrong)
        return self._cured[plan]

    def rank(self, plan: Plan) -> tuple[bool, int, float]:
        """Plans that train about as well as the best come first, of them the least intrusive."""
        return not self.good(plan), cost(plan), -self.score(plan)

    def good(self, plan: Plan) -> bool:
        """Whether a plan cures and scores well enough."""
        return self.cures(plan) and self.score(plan) >= self.bound()

    def bound(self) -> float:
        """The least score that is enough: about that of the best, or where contradictions go, no loss."""
        own = self.score(())
        if self.treatable and self.treatable <= _CONTRADICTIONS:
            return own - _COST_OF_CURE
        full = [plan for plan, steps, _ in self.trials if steps == self.budget.steps and self.cures(plan)]
        highest = max(map(self.score, full), default=own)
        return highest - _TOLERANCE * (highest - own)

    def reduced(self, plan: Plan) -> Plan:
        """Take away each remedy without which the setup trains as well."""
        plan = self.concrete(plan)
        for remedy in sorted(plan, key=lambda remedy: -remedy.intrusion):
            rest = tuple(other for other in plan if other is not remedy)
            if rest and self.good(rest):
                plan = rest
        return plan

    def concrete(self, plan: Plan) -> Plan:
        """The same plan with what its remedies found, such as a learning rate."""
        found = tuple(change.remedy for change in self.apply(plan))
        known = {key: trial for key, trial in self.trials.items() if key[0] == plan}
        self.trials |= {(found, *key[1:]): trial for key, trial in known.items()}
        return found

    def confirmed(self, plan: Plan) -> bool:
        """Whether a plan stays as good for twice as many steps, in another order and with other numbers."""
        return self.score(plan, 2 * self.budget.steps, seed=1) >= self.bound()

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
        key = (plan, steps, seed)
        if key not in self.trials:
            self.pause()
            self.say(f"trying {describe(plan)}")
            changes = self.apply(plan)
            setup = changes[-1].setup if changes else self.setup
            budget = Budget(steps, max(1.0, self.until - perf_counter()))
            order = random.Random(seed).sample(self.seen, len(self.seen)) if seed else self.seen
            self.trials[key] = run_trial(
                setup, order, budget, label=describe(plan), seed=seed, judge=self.judge
            )
        return self.trials[key]

    def judge(self, trained: Setup) -> float | None:
        """How well held-back samples fit, and where there are classes, how many of them are right: the mean.

        An output that is far too large fits its targets better than others even if it is mostly wrong.
        """
        found = fit(trained, self.held)
        right = None if found is None else evaluate(trained, self.held)[1]
        return found if found is None or right is None else (found + right) / 2

    def pause(self) -> None:
        """Between two pieces of work: end here if the budget is spent."""
        if perf_counter() > self.until or len(self.trials) >= self.budget.trials:
            raise TimeIsUp
