"""Search: from the causes to the least plan that cures them and lets the setup train."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from typing import cast

from gradmend.anatomy import Anatomy
from gradmend.causes import Cause
from gradmend.diagnosis import Diagnosis, diagnose, look, with_reach
from gradmend.diagnosis.reach import MOST_SECONDS
from gradmend.remedies import (
    REMEDIES,
    Change,
    LearningRate,
    Remedy,
    Tailor,
    UseOptimizer,
    anatomy_of,
)
from gradmend.setup import Batch, Budget, Setup
from gradmend.treatment.plans import Plan, cost, describe, fallbacks, joined
from gradmend.treatment.structures import extensions, in_order, structures
from gradmend.treatment.workbench import TimeIsUp, Workbench

_SPEEDS, _ENTRANTS = 3, 6
"""Ways to train a structure; entrants of the race."""

_RUNGS = {4: 0.2, 2: 0.4, 1: 0.8}
"""Trials are looked at after a quarter of the budget's steps, a half, and all.

What has less than this share of what is enough by then will not get there.
"""

_BEHIND = 0.5
"""What scores less than this share of the best is out: at a rung, and if nobody told how many steps are
planned, of what only treats contradictions."""

_ENOUGH, _NEARLY = 0.9, 0.85
"""What scores so well is good enough, whatever others do. Beyond the second no better rate is looked for."""

_TOLERANCE = 0.02
"""A plan may lose this share of the best gain and still win by changing less."""

_REDUCTIONS = 3
"""So many ways to take away from a plan are tried, if what is left proves no good in the end."""

_OF_THE_TIME = 0.2
"""So much of the time the trainings of one diagnosis may take."""

_LEARNS, _LEARNS_WELL = 0.3, 0.8
"""A setup without errors that scores so well is left alone; the second after all steps that are planned."""

_BEGUN = 0.25
"""With less than this share of it after a trial's steps, more of them are not waited for."""

_PATIENCE = 4
"""So many times a trial's steps are tried of a setup without errors."""

_COST_OF_CURE = 0.1
"""What a plan may lose in score by curing a contradiction: new output units have to be learnt, too."""

_HALF = 0.5
"""What cures a contradiction and scores so well is better, however well the wrong loss could be fitted."""

_CONTRADICTIONS = frozenset(
    cause for cause in Cause if cause.illness.part in ("output", "loss", "labels", "wiring")
)
"""A setup may learn in spite of these, but not what was meant."""


def _share(share: float, score: float) -> float:
    """So much of a score, or below a negative one as far.

    >>> _share(0.5, 0.8), _share(0.5, -1.0)
    (0.4, -1.5)
    """
    return score - (1 - share) * abs(score)


def diagnosed(setup: Setup, batches: Sequence[Batch], budget: Budget, planned: int | None) -> Diagnosis:
    """A diagnosis whose own trainings take a part of the budget's time, and none where errors are known.

    They would tell which of several cures is one, and that is what the search does.
    """
    soon = diagnose(setup, batches, steps=planned, seconds=0.0)
    seconds = min(MOST_SECONDS, _OF_THE_TIME * budget.seconds)
    return with_reach(setup, batches, soon, seconds) if soon.healthy else soon


class Search:
    """One run of `mend`: what it works on, what it has tried, and the best so far.

    Args:
        bench: where plans are tried.
        planned: how many optimizer steps are planned, if that is known.
    """

    def __init__(self, bench: Workbench, planned: int | None = None) -> None:
        self.bench, self.planned = bench, planned
        budget = bench.budget
        self.steps = budget.steps
        self.patience = min(planned or sys.maxsize, min(_PATIENCE, budget.trials) * budget.steps)
        self.best: Plan = ()
        self.firm: Plan = ()
        self.treatable = frozenset[Cause]()
        self._cured: dict[Plan, bool] = {}
        self._refuted = set[Plan]()
        self._diagnosed: dict[Plan, Diagnosis] = {}

    def learns(self) -> bool:
        """Whether the setup learns as it is, in the steps that are planned, if the budget allows so many."""
        enough = _LEARNS_WELL if self.planned else _LEARNS
        try:
            soon = self.bench.score((), min(self.steps, self.patience))
            if _BEGUN * enough <= soon < enough:
                return self.bench.score((), self.patience) >= enough
            return soon >= enough
        except TimeIsUp:  # nothing has shown that it does not
            return True

    def diagnosis(self, plan: Plan) -> Diagnosis:
        """Of the setup after a plan; how far it gets, its trials have shown."""
        if plan not in self._diagnosed:
            self.bench.say(f"measuring after {describe(plan)}")
            mended = self.bench.apply(plan)[-1].setup
            self._diagnosed[plan] = diagnose(mended, self.bench.given, steps=self.planned, seconds=0.0)
        return self._diagnosed[plan]

    def run(self, before: Diagnosis) -> tuple[Change, ...]:
        """Gather plans, race them, take away what is not needed, confirm; interrupted, the best so far."""
        try:
            self._run(before)
        except (KeyboardInterrupt, TimeIsUp):
            self.bench.say("ending early, with the best so far")
            self.best = self.best or self.leader()
        return self.bench.apply(self.best)

    def _run(self, before: Diagnosis) -> None:
        self.bench.trial((), self.steps)
        finalists = self.race(self.gather(before))
        better = sorted(filter(self.better, [*finalists, *self.tuned(finalists)]), key=self.rank)
        if not better and self.firm and self.better(self.firm, self.patience):
            self.best = self.firm
            return
        for self.best in better:
            if less := self.proved(self.best):
                self.best = less
                self.best = self.lasting(less)
                if self.best != less:
                    self.best = self.least(self.best)
                return
        self.best = ()
        self.best = next((plan for plan in better if self.better(plan, 2 * self.steps, seed=1)), ())

    def proved(self, plan: Plan) -> Plan | None:
        """A plan without what it does not need, if that proves good in the end."""
        for _ in range(_REDUCTIONS):
            less = self.reduced(plan)
            if self.confirmed(less):
                return less
            self._refuted.add(less)
        return None

    def lasting(self, plan: Plan) -> Plan:
        """The plan, or what trains nearly always, where that gets clearly further in the planned steps."""
        if not self.planned or self.patience <= self.steps or plan == self.firm:
            return plan
        if self.bench.score(plan, 2 * self.steps, seed=1) >= _ENOUGH:
            return plan
        late = self.bench.score(plan, self.patience)
        if late > 1 - _TOLERANCE or not self.firm or not self.cures(self.firm):
            return plan
        return self.firm if self.bench.score(self.firm, self.patience) > late + _TOLERANCE else plan

    def least(self, plan: Plan) -> Plan:
        """A plan without the parts that it gets as far without in the planned steps."""
        enough = self.bench.score(plan, self.patience) - _TOLERANCE
        for out in sorted(plan, key=lambda remedy: -remedy.intrusion):
            rest = tuple(remedy for remedy in plan if remedy is not out)
            if rest and self.cures(rest) and self.bench.score(rest, self.patience) >= enough:
                plan = rest
        return plan

    def leader(self) -> Plan:
        """The plan of the best trial so far, if it beats the setup as it is."""
        scores = {key[0]: self.bench.score(*key) for key in self.bench.trials}
        best = max(scores, key=scores.__getitem__, default=())
        return best if best and scores[best] > scores.get((), -1.0) else ()

    # ---- plans ------------------------------------------------------------------------------------------

    def gather(self, before: Diagnosis) -> list[Plan]:
        """Plans that leave nothing to find which remedies treat, each with several ways to train it."""
        setup, seen = self.bench.setup, self.bench.seen
        anatomy = anatomy_of(setup, seen[0])
        usable = [remedy for remedy in REMEDIES if remedy.applies_to(setup, anatomy)]
        found = frozenset(finding.cause for finding in before.findings)
        causes = before.causes or found | {Cause.SLOW_CONVERGENCE}
        self.treatable = causes & frozenset[Cause]().union(*(remedy.treats for remedy in usable))
        if not self.treatable:
            return []
        start = look(setup, seen)
        repairs, repaired = self.repairs(start, usable)
        self.treatable -= repaired.causes & _CONTRADICTIONS  # what nothing cures keeps nothing from helping
        shapes = list(structures(repairs, repaired, usable, self.bench.look)) or [repairs]
        speeds = list(self.speeds(causes - start.causes, usable))
        plans = [joined(structure, speed) for speed in speeds for structure in shapes][:_ENTRANTS]
        self.firm = self.fallback(repairs, anatomy)
        return [plan for plan in dict.fromkeys([*map(self.bench.concrete, plans), self.firm]) if plan]

    def fallback(self, repairs: Plan, anatomy: Anatomy) -> Plan:
        """What nearly always trains: the usual ReLUs, or tailored ones, if one step shows that it must."""
        *usual, tailored = (joined(repairs, plan) for plan in fallbacks(self.bench.setup, anatomy))
        for plan in map(self.bench.concrete, usual):
            found = self.bench.look(plan) if plan else None
            if found and not found.causes & Tailor.treats:
                return plan
        return self.bench.concrete(tailored)

    def repairs(self, start: Diagnosis, usable: Sequence[Remedy]) -> tuple[Plan, Diagnosis]:
        """What resolves the contradictions, one after the other, and what one step shows then.

        Also those that others hid, as a shape that does not fit hides what the loss wants.
        """
        plan, diagnosis = cast(Plan, ()), start
        treats = _CONTRADICTIONS & frozenset[Cause]().union(*(remedy.treats for remedy in usable))
        while wrong := diagnosis.causes & self.treatable & _CONTRADICTIONS:
            new = (more for cause in in_order(wrong) for _, more in extensions(plan, cause, usable))
            looks = ((more, self.bench.look(more)) for more in new)
            good = ((more, found) for more, found in looks if found and not wrong <= found.causes)
            step = next(good, None)
            if step is None:
                break
            self.treatable |= (step[1].causes - start.causes) & treats
            plan, diagnosis = step
        return plan, diagnosis

    @staticmethod
    def speeds(hidden: frozenset[Cause], usable: Sequence[Remedy]) -> Iterator[Plan]:
        """What treats that which only steps show; first nothing, as other weights may do."""
        yield ()
        found = [r for r in usable if r.treats & hidden and not isinstance(r, LearningRate)]
        optimizers = [r for r in usable if isinstance(r, UseOptimizer)]
        for remedy in list(dict.fromkeys([*found, *optimizers]))[:_SPEEDS]:
            yield (remedy,)

    # ---- trials -----------------------------------------------------------------------------------------

    def race(self, plans: Sequence[Plan]) -> list[Plan]:
        """The plans that train best, by successive halving (Jamieson, Talwalkar, 2016)."""
        for rung in _RUNGS:
            steps = max(1, self.steps // rung)
            scores = {plan: self.bench.score(plan, steps) for plan in plans}
            best = max(scores.values(), default=0.0)
            better = sorted(plans, key=lambda plan: -scores[plan])[: max(2, math.ceil(len(plans) / 2))]
            kept = [plan for plan in better if scores[plan] >= _share(_BEHIND, best)]
            late = [self.firm] if best < _LEARNS and self.firm in plans else []  # nothing is decided yet
            plans = list(dict.fromkeys([*kept, *late]))
        return list(plans)

    def tuned(self, plans: Sequence[Plan]) -> list[Plan]:
        """The structure of the best plan and the fallback, each with a learning rate found for it.

        None where a plan is nearly good enough as it is; where none helps, a rate to blame is found alone.
        """
        helping = [plan for plan in plans if self.better(plan)]
        if any(self.bench.score(plan) >= _NEARLY for plan in helping):
            return []
        alone: list[Plan] = [()] if self.treatable & LearningRate.treats else []
        shapes = [tuple(r for r in p if not isinstance(r, UseOptimizer)) for p in helping[:1] or alone]
        shapes += [tuple(r for r in p if not isinstance(r, LearningRate)) for p in [self.firm] if p]
        rates = [joined(shape, (LearningRate(),)) for shape in shapes]
        return [plan for plan in dict.fromkeys(rates) if plan not in plans]

    def better(self, plan: Plan, steps: int | None = None, seed: int = 0) -> bool:
        """Whether a plan trains clearly better than the setup as it is, or cures it and learns well.

        How well something fits a wrong loss says little.
        """
        gained, own = self.bench.score(plan, steps, seed), self.bench.score((), steps, seed)
        if self.treatable & _CONTRADICTIONS:
            return self.cures(plan) and gained >= min(own - _COST_OF_CURE, _HALF)
        return gained > own + 0.05 * (1 - own)

    def cures(self, plan: Plan) -> bool:
        """Whether a plan leaves none of the contradictions that can be treated."""
        wrong = self.treatable & _CONTRADICTIONS
        if plan not in self._cured:
            left = self.bench.look(plan) if wrong and plan else None
            self._cured[plan] = not wrong or (left is not None and not left.causes & wrong)
        return self._cured[plan]

    def rank(self, plan: Plan) -> tuple[bool, int, float]:
        """Plans that train about as well as the best come first, of them the least intrusive."""
        return not self.good(plan), cost(plan), -self.bench.score(plan)

    def good(self, plan: Plan) -> bool:
        """Whether a plan cures and scores well enough."""
        return plan not in self._refuted and self.cures(plan) and self.bench.score(plan) >= self.bound()

    def bound(self) -> float:
        """The least score that is enough: about that of the best; of cures, not much less than before."""
        own, highest = self.bench.score(()), self.highest()
        best = min(_ENOUGH, highest - _TOLERANCE * (highest - own))
        if self.treatable and self.treatable <= _CONTRADICTIONS:
            share = _ENOUGH if self.planned else _BEHIND  # nobody knows how long it will train
            return min(best, max(_share(share, highest), own - _COST_OF_CURE))
        return best

    def highest(self) -> float:
        """The best score after all steps of the budget."""
        full = [plan for plan, steps, _ in self.bench.trials if steps == self.steps and self.cures(plan)]
        return max(map(self.bench.score, full), default=self.bench.score(()))

    def reduced(self, plan: Plan) -> Plan:
        """Take away one remedy after the other, as long as there is one without which it trains as well."""
        plan = self.bench.concrete(plan)
        rests = (tuple(r for r in plan if r is not out) for out in sorted(plan, key=lambda r: -r.intrusion))
        less = next((rest for rest in rests if rest and self.reaches(rest)), None)
        return plan if less is None else self.reduced(less)

    def reaches(self, plan: Plan) -> bool:
        """Whether a plan is good, or gets as far as the best in all the steps that are planned.

        It is seen early where it is far from that.
        """
        for rung, share in _RUNGS.items():
            if self.bench.score(plan, max(1, self.steps // rung)) < _share(share, self.bound()):
                return False
        return plan not in self._refuted and (self.good(plan) or self.catches_up(plan))

    def catches_up(self, plan: Plan) -> bool:
        """Whether a plan is slower than the best, and still healthy and as good in the end."""
        if not self.planned or self.patience <= self.steps or not self.cures(plan):
            return False
        late = self.bench.score(plan, self.patience)
        return late >= min(_ENOUGH, self.highest()) and self.diagnosis(plan).healthy

    def confirmed(self, plan: Plan) -> bool:
        """Whether a plan stays as good for twice as many steps, in another order and with other numbers."""
        share = 1.0 if self.bench.score(plan) >= self.bound() else _RUNGS[1]  # what is slower arrives later
        return self.bench.score(plan, 2 * self.steps, seed=1) >= _share(share, self.bound())
