"""Mend: from the causes to the least change that cures them, proved by trials beside the untreated setup."""

from __future__ import annotations

import heapq
import itertools
import math
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gradmend.causes import Cause
from gradmend.console import Printable, lines, number, plain_data
from gradmend.data import as_batches, check_batch
from gradmend.diagnosis import Diagnosis, Severity, diagnose, look
from gradmend.errors import GradmendError, NoEffectWarning
from gradmend.layers import definitions
from gradmend.remedies import REMEDIES, SEED, Change, Remedy, anatomy_of
from gradmend.setup import Batch, Budget, Setup
from gradmend.surgery import Edit
from gradmend.training import Trial, best_threads, run_trial

UNTREATED = "untreated"
_LOOKS, _ALIKE, _PLANS, _FINALISTS, _TOGETHER = 80, 3, 6, 3, 4
"""Plans looked at, kept of one combination of kinds, tried shortly, tried in full; remedies in one plan."""

_TOLERANCE = 0.1
"""A plan may lose this share of the best gain in loss and still win by changing less."""

_ORDER = ("repairs", "activation", "normalization", "residual", "initialization", "gradient", "optimization")
"""Weights are drawn for the structure that they belong to, and the optimizer is made for both."""

Plan = tuple[Remedy, ...]


@dataclass(frozen=True)
class Treatment(Printable):
    """What `mend` chose, changed and verified.

    Args:
        setup: mended, or the original where nothing was changed.
        changes: in the order in which they were made; none if the setup was healthy or nothing helped.
        before: the diagnosis of the original.
        after: the diagnosis of `setup`.
        trials: the untreated setup first, then each plan that was tried, under the same budget.
    """

    setup: Setup
    changes: tuple[Change, ...]
    before: Diagnosis
    after: Diagnosis
    trials: tuple[Trial, ...]

    @property
    def mended(self) -> bool:
        """Whether the setup was ill and is healthy now."""
        return bool(self.changes) and self.after.healthy

    @property
    def verdict(self) -> str:
        """The result in one sentence."""
        if self.before.healthy:
            return "This setup is healthy; nothing was changed."
        if not self.changes:
            return "No remedy made this setup healthy and better, so nothing was changed."
        done = "; ".join(change.text for change in self.changes)
        return f"Mended by: {done}." if self.after.healthy else f"Mended in part by: {done}. Left to you:"

    @property
    def advice(self) -> tuple[str, ...]:
        """What is left to do by hand: faults that sit in the user's own functions."""
        if self.after.healthy:
            return ()
        errors = [f for f in self.after.findings if f.severity is Severity.ERROR and f.where]
        return tuple(f"{lines(f.where)}: {f.cause.illness.cure}" for f in errors)

    def code(self) -> str:
        """The changes as Python, to be run on `model` (and `optimizer`) without gradmend."""
        if not self.changes:
            return ""
        text = "\n\n".join(f"# {change.text}\n{_seeded(_loops(change.edits))}" for change in self.changes)
        return f"{definitions(text)}\n{text}\n"

    def __rich__(self) -> RenderableType:
        style = "bold green" if self.after.healthy else "bold red"
        words = [Text(self.verdict, style=style), *(Text(f"- {line}") for line in self.advice)]
        return Group(_table(self.trials), Text(), *words) if self.trials else Group(*words)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: numbers, strings, lists; NaN and infinity become None."""
        return {
            "verdict": self.verdict,
            "mended": self.mended,
            "advice": list(self.advice),
            "changes": [{"text": c.text, "remedy": repr(c.remedy)} for c in self.changes],
            "code": self.code(),
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "trials": plain_data(self.trials),
        }


def _fall(diagnosis: Diagnosis) -> float:
    """What a few steps on one batch leave of its loss: the less, the more promising."""
    response = diagnosis.profile.response
    if response is None or not math.isfinite(response.losses[-1]) or not response.before:
        return math.inf
    return response.losses[-1] / abs(response.before)


def _table(trials: Sequence[Trial]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("trial")
    for heading in ("steps", "loss", "accuracy"):
        table.add_column(heading, justify="right")
    longest = {trial.label: trial for trial in sorted(trials, key=lambda trial: len(trial.losses))}
    best_first = sorted(longest.values(), key=lambda trial: (-len(trial.losses), trial.final_loss))
    for trial in sorted(best_first, key=lambda trial: trial.label != UNTREATED):
        accuracy = "-" if trial.accuracy is None else f"{trial.accuracy:.1%}"
        table.add_row(trial.label, str(len(trial.losses)), number(trial.final_loss), accuracy)
    return table


def _seeded(code: str) -> str:
    """Weights are drawn as `mend` drew them."""
    return f"torch.manual_seed({SEED})\n{code}" if "set_weight(" in code else code


def _loops(edits: Sequence[Edit]) -> str:
    """The code of the edits; runs of edits that differ only in their place become one loop."""
    templates = [
        (edit.code.replace(f'"{edit.where}"', "name") if edit.where else edit.code) for edit in edits
    ]
    parts = []
    for template, run in itertools.groupby(zip(templates, edits, strict=True), key=lambda pair: pair[0]):
        group = [edit for _, edit in run]
        names = textwrap.fill(" ".join(edit.where for edit in group), 88, break_long_words=False)
        loop = f'for name in """\\\n{names}\n""".split():\n{textwrap.indent(template, "    ")}'
        parts += [loop] if len(group) > 1 and group[0].where else [edit.code for edit in group]
    return "\n".join(parts)


def mend(
    setup: Setup,
    batches: Batch | Iterable[Batch],
    budget: Budget | None = None,
    report: Callable[[str], None] | None = None,
) -> Treatment:
    """Find the least change that makes a setup healthy and train better, and prove it.

    Remedies that treat the causes found are combined, the least intrusive first, measured on copies, and the
    healthy combinations tried for a few steps beside the untreated setup, on the same batches and seed. Each
    change that proves unnecessary is taken away again.

    Args:
        setup: stays as it is.
        batches: one batch or several; trials go through them again and again.
        budget: of each trial.
        report: is told what is being done, in words.

    Returns:
        The treatment; a healthy setup comes back unchanged, and so does one that nothing helps.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> healthy = Setup(nn.Sequential(nn.Linear(8, 3)), nn.CrossEntropyLoss())
        >>> mend(healthy, (torch.randn(64, 8), torch.randint(3, (64,)))).verdict
        'This setup is healthy; nothing was changed.'
    """
    say = report or (lambda _: None)
    given = as_batches(batches, limit=_MOST_BATCHES)
    for batch in given:
        check_batch(batch)
    say("measuring")
    before = diagnose(setup, given)
    if before.healthy:
        return Treatment(setup, (), before, before, ())
    setup.build_optimizer()  # without one there is nothing to try
    with best_threads(setup, given[:1]):
        return _Search(setup, given, budget or Budget(), say).treatment(before)


_MOST_BATCHES = 1000


class _Search:
    """One run of `mend`: what it works on, and what it has tried."""

    def __init__(
        self, setup: Setup, batches: list[Batch], budget: Budget, say: Callable[[str], None]
    ) -> None:
        self.setup = setup
        self.batches = batches
        self.budget = budget
        self.say = say
        self.trials: dict[tuple[Plan, int], Trial] = {}
        self.untreatable = frozenset[Cause]()

    def treatment(self, before: Diagnosis) -> Treatment:
        """Search, choose, and take away what is unnecessary."""
        anatomy = anatomy_of(self.setup, self.batches[0])
        applicable = [remedy for remedy in REMEDIES if remedy.applies_to(self.setup, anatomy)]
        self.untreatable = before.causes - frozenset[Cause]().union(*(r.treats for r in applicable))
        plan = self.best(self.healthy_plans(before))
        if plan:
            plan = self.without_unnecessary(plan)
        changes = self.apply(plan)
        setup = changes[-1].setup if changes else self.setup
        after = diagnose(setup, self.batches) if changes else before
        return Treatment(setup, changes, before, after, tuple(self.trials.values()))

    def apply(self, plan: Plan) -> tuple[Change, ...]:
        """Apply the remedies of a plan, one after the other; those without effect are left out."""
        setup, changes = self.setup, []
        for remedy in plan:
            with warnings.catch_warnings(action="ignore", category=NoEffectWarning):
                change = remedy.apply(setup, self.batches)
            if change.edits:
                setup = change.setup
                changes.append(change)
        return tuple(changes)

    def healthy_plans(self, before: Diagnosis) -> list[Plan]:
        """Combinations of remedies that leave nothing treatable to find, the most promising first.

        They are looked at in the order of their intrusion, of each combination of kinds only a few.
        """
        order = itertools.count()
        queue: list[tuple[int, int, Plan]] = []
        seen, promise, full = set[Plan](), dict[Plan, float](), Counter[frozenset[str]]()

        def push(plans: Iterable[Plan]) -> None:
            for plan in plans:
                if plan not in seen:
                    seen.add(plan)
                    heapq.heappush(queue, (cost(plan), next(order), plan))

        push(self.extensions((), before))
        looks = 0
        while queue and looks < _LOOKS:
            *_, plan = heapq.heappop(queue)
            kinds = frozenset(map(kind, plan))
            if full[kinds] == _ALIKE:
                continue
            looks += 1
            self.say(f"looking at {describe(plan)}")
            if diagnosis := self.look(plan):
                if diagnosis.causes <= self.untreatable:
                    promise[plan] = _fall(diagnosis)
                    full[kinds] += 1
                push(self.extensions(plan, diagnosis))
        return sorted(promise, key=promise.__getitem__)[:_PLANS]

    def look(self, plan: Plan) -> Diagnosis | None:
        """The diagnosis after a plan; None if it changes nothing or cannot be applied."""
        try:
            changes = self.apply(plan)
            if len(changes) < len(plan):
                return None
            quick = look(changes[-1].setup, self.batches)
            good = quick.causes <= self.untreatable
            return diagnose(changes[-1].setup, self.batches) if good else quick
        except GradmendError:
            return None

    def extensions(self, plan: Plan, diagnosis: Diagnosis) -> list[Plan]:
        """The plan with one more remedy that treats what is still found, of a group not used yet."""
        if len(plan) == _TOGETHER:
            return []
        used = {kind(remedy) for remedy in plan}
        more = [r for r in REMEDIES if r.treats & diagnosis.causes and kind(r) not in used]
        return [tuple(sorted((*plan, r), key=lambda r: _ORDER.index(group(r)))) for r in more]

    def best(self, plans: Sequence[Plan]) -> Plan:
        """The least intrusive plan among those that train about as well as the best; () if none is better."""
        short = Budget(max(1, self.budget.steps // 4), self.budget.seconds)
        ranked = sorted(plans, key=lambda plan: self.trial(plan, short).final_loss)[:_FINALISTS]
        untreated = self.trial((), self.budget).final_loss
        losses = {plan: self.trial(plan, self.budget).final_loss for plan in ranked}
        lowest = min(losses.values(), default=math.inf)
        if not lowest < 0.95 * untreated:
            return ()
        bound = self.bound(min(ranked, key=losses.__getitem__))
        good = [plan for plan in ranked if losses[plan] <= bound]
        return min(good, key=lambda plan: (cost(plan), [REMEDIES.index(remedy) for remedy in plan]))

    def bound(self, plan: Plan) -> float:
        """The highest final loss that still counts as training about as well as a plan.

        The gain is counted from where training began, or from where it ended untreated if that is lower.
        """
        trial, untreated = self.trial(plan, self.budget), self.trial((), self.budget)
        gain = min(untreated.final_loss, trial.initial_loss) - trial.final_loss
        return trial.final_loss + _TOLERANCE * max(gain, 0.0)

    def without_unnecessary(self, plan: Plan) -> Plan:
        """Take away each remedy without which the setup is as healthy and trains as well."""
        bound = self.bound(plan)
        for remedy in sorted(plan, key=lambda r: -r.intrusion):
            rest = tuple(r for r in plan if r is not remedy)
            diagnosis = self.look(rest) if rest else None
            cured = diagnosis is not None and diagnosis.causes <= self.untreatable
            if cured and self.trial(rest, self.budget).final_loss <= bound:
                plan = rest
        return plan

    def trial(self, plan: Plan, budget: Budget) -> Trial:
        """Train a copy under the budget; the same plan is not tried twice."""
        key = (plan, budget.steps)
        if key not in self.trials:
            self.say(f"trying {describe(plan)}")
            changes = self.apply(plan)
            setup = changes[-1].setup if changes else self.setup
            self.trials[key] = run_trial(setup, self.batches, budget, label=describe(plan))
        return self.trials[key]


def group(remedy: Remedy) -> str:
    """The group of a remedy: the module that holds it."""
    return type(remedy).__module__.rpartition(".")[-1]


def kind(remedy: Remedy) -> str:
    """Remedies of one kind exclude each other: one initialization, but several repairs."""
    return type(remedy).__name__ if group(remedy) in ("repairs", "optimization") else group(remedy)


def cost(plan: Plan) -> int:
    """How much a plan intrudes."""
    return sum(remedy.intrusion for remedy in plan)


def describe(plan: Plan) -> str:
    """A plan in words."""
    return " + ".join(remedy.title for remedy in plan) or UNTREATED
