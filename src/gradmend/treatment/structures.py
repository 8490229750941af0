"""Structures: the least plans that cure all that one measured step shows."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from gradmend.causes import Cause
from gradmend.diagnosis import Diagnosis
from gradmend.remedies import Remedy
from gradmend.treatment.plans import Plan, cost, group, joined, kind

_LOOKS, _ALIKE, _STRUCTURES, _TOGETHER = 14, 1, 2, 4
"""Plans looked at; kept of one set of kinds, and in all; remedies in one."""

_IN_VAIN = 2
"""So many remedies of one group that leave the cause, and its others are not looked at."""

Look = Callable[[Plan], Diagnosis | None]
"""What one step shows after a plan; None if it cannot be applied."""


@dataclass(frozen=True)
class _Extension:
    """A plan with one more remedy, not looked at yet.

    Args:
        plan: with the remedy.
        parent: without it.
        remedy: the last one.
        left: what is found after the parent.
    """

    plan: Plan
    parent: Plan
    remedy: Remedy
    left: frozenset[Cause]

    @property
    def family(self) -> tuple[Plan, str]:
        """What other remedies that do much the same would extend as well."""
        return self.parent, group(self.remedy)


def structures(base: Plan, start: Diagnosis, usable: Sequence[Remedy], look: Look) -> Iterator[Plan]:
    """What cures all that one step shows, the least intrusive first.

    Args:
        base: that all of them begin with.
        start: what is found after `base`.
        usable: remedies to extend it by.
        look: measures a copy; it is asked as seldom as can be.
    """
    search = _Best(usable, look)
    search.push(base, start.causes, cost(base))
    found = Counter[frozenset[str]]()
    while found.total() < _STRUCTURES and (cured := search.next_cured(found)) is not None:
        found[_kinds(cured)] += 1
        yield cured


def extensions(plan: Plan, cause: Cause, usable: Sequence[Remedy]) -> list[tuple[Remedy, Plan]]:
    """One more remedy that treats a cause, of a kind not used yet, and the plan with it."""
    if len(plan) == _TOGETHER:
        return []
    used = {kind(remedy) for remedy in plan}
    return [(r, joined(plan, (r,))) for r in usable if cause in r.treats and kind(r) not in used]


class _Best:
    """Best-first search: plans wait with their cost, those that were looked at before those that were not."""

    def __init__(self, usable: Sequence[Remedy], look: Look) -> None:
        self.usable, self.look = usable, look
        self.treatable = frozenset[Cause]().union(*(remedy.treats for remedy in usable))
        self.queue: list[tuple[int, bool, int, Plan, frozenset[Cause] | _Extension]] = []
        self.known, self.vain = set[Plan](), Counter[tuple[Plan, str]]()
        self.order, self.looks = itertools.count(), 0

    def push(self, plan: Plan, state: frozenset[Cause] | _Extension, price: int) -> None:
        """Let a plan wait, with what is left after it, or not looked at."""
        unseen = isinstance(state, _Extension)
        heapq.heappush(self.queue, (price, unseen, next(self.order), plan, state))

    def next_cured(self, found: Counter[frozenset[str]]) -> Plan | None:
        """The next plan that leaves nothing to treat, of kinds that were not found too often."""
        while self.queue:
            *_, plan, state = heapq.heappop(self.queue)
            if found[_kinds(plan)] == _ALIKE:
                continue
            if isinstance(state, _Extension):
                self.try_out(state)
            elif left := state & self.treatable:
                self.extend(plan, left)
            else:
                return plan
        return None

    def extend(self, plan: Plan, left: frozenset[Cause]) -> None:
        """Let all that may treat what is left wait."""
        for remedy, more in extensions(plan, in_order(left)[0], self.usable):
            if more not in self.known:
                self.known.add(more)
                self.push(more, _Extension(more, plan, remedy, left), cost(more))

    def try_out(self, new: _Extension) -> None:
        """Look at a plan, if its like were not looked at in vain."""
        if self.looks == _LOOKS or self.vain[new.family] == _IN_VAIN:
            return
        self.looks += 1
        if found := self.look(new.plan):
            left = found.causes & self.treatable
            self.vain[new.family] += in_order(new.left)[0] in left
            self.push(new.plan, left, cost(new.plan) + max(0, len(left) - len(new.left)))


def _kinds(plan: Plan) -> frozenset[str]:
    return frozenset(map(kind, plan))


def in_order(causes: frozenset[Cause]) -> list[Cause]:
    """As they come in the order of all: what others follow from first."""
    return [cause for cause in Cause if cause in causes]
