"""Mend: from the causes to the least change that cures them, proved by trials beside the untreated setup."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gradmend.console import PlainTable, Printable, bullets, lines, number, plain_data
from gradmend.data import as_batches, check_batch
from gradmend.diagnosis import Diagnosis, Severity
from gradmend.remedies import Change
from gradmend.remedies.code import code
from gradmend.setup import Batch, Budget, Setup
from gradmend.terminal import GREEN, RED, one_line
from gradmend.training import Trial, best_threads
from gradmend.treatment.plans import UNTREATED
from gradmend.treatment.search import Search, diagnosed
from gradmend.treatment.workbench import Workbench

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from gradmend.pictures.curves import Curve


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
        if self.before.healthy and not self.changes:
            return "This setup is healthy; nothing was changed."
        if not self.changes:
            return "No remedy made this setup healthy and better, so nothing was changed."
        done = "; ".join(change.text for change in self.changes)
        return f"Mended by: {done}." if self.after.healthy else f"Mended in part by: {done}. Left to you:"

    @property
    def advice(self) -> tuple[str, ...]:
        """What is left to do by hand: faults of the data, or that sit in the user's own functions."""
        left = [sentence for change in self.changes for sentence in change.by_hand]
        if self.after.healthy:
            return tuple(left)
        errors = [f for f in self.after.findings if f.severity is Severity.ERROR]
        places = (f"{lines(f.where)}: " if f.where else "" for f in errors)
        return (*left, *(place + f.cause.illness.cure for place, f in zip(places, errors, strict=True)))

    def code(self) -> str:
        """The changes as Python, to be run on `model` (and `optimizer`, `loss_fn`) without gradmend."""
        return code(self.changes)

    def __rich__(self) -> RenderableType:
        style = f"bold {GREEN if self.after.healthy else RED}"
        words: list[RenderableType] = [Text(one_line(self.verdict), style=style), bullets(self.advice)]
        return Group(_table(self.trials), Text(), *words) if self.trials else Group(*words)

    def figures(self, dark: bool = False) -> dict[str, Figure]:
        """The pictures that there are, by their names: before and after, then the trials.

        Args:
            dark: for a dark background.
        """
        from gradmend.pictures.curves import trials
        from gradmend.portrait import portraits

        steps = {"before": self.before, "after": self.after} if self.changes else {"": self.before}
        marks = [
            replace(m, words=f"{m.words}, {when}") if when else m
            for when, d in steps.items()
            for m in d.marks
        ]
        found = portraits({when: each.profile.portrait for when, each in steps.items()}, marks, dark)
        known = any(trial.losses for trial in self.trials)
        return {**found, **({"trials": trials(self._curves(), dark)} if known else {})}

    def _curves(self) -> list[Curve]:
        from gradmend.pictures.curves import Curve

        chosen = " + ".join(change.remedy.title for change in self.changes)
        places = {UNTREATED: "first", chosen: "chosen"}
        return [Curve(t.label, t.losses, places.get(t.label, "other")) for t in _distinct(self.trials)]

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


def _table(trials: Sequence[Trial]) -> Table:
    table = PlainTable()
    table.add_column("trial")
    for heading in ("steps", "loss", "accuracy"):
        table.add_column(heading, justify="right", no_wrap=True)
    for trial in ranked(trials):
        accuracy = "-" if trial.accuracy is None else f"{trial.accuracy:.1%}"
        table.add_row(Text(one_line(trial.label)), str(len(trial.losses)), number(trial.final_loss), accuracy)
    return table


def ranked(trials: Sequence[Trial]) -> list[Trial]:
    """The longest of each plan: the untreated setup, then what got furthest, the best first."""
    best_first = sorted(_distinct(trials), key=lambda trial: (-len(trial.losses), trial.final_loss))
    return sorted(best_first, key=lambda trial: trial.label != UNTREATED)


def _distinct(trials: Sequence[Trial]) -> list[Trial]:
    """The longest of each plan."""
    return list(
        {trial.label: trial for trial in sorted(trials, key=lambda trial: len(trial.losses))}.values()
    )


def mend(
    setup: Setup,
    batches: Batch | Iterable[Batch],
    budget: Budget | None = None,
    report: Callable[[str], None] | None = None,
    *,
    steps: int | None = None,
) -> Treatment:
    """Find the least change that makes a setup healthy and train better, and prove it.

    Remedies that treat the causes found are combined, the least intrusive first, and looked at by measuring
    copies. What leaves nothing to find is tried beside the untreated setup: the better half goes on for
    longer. Of those that train about as well as the best, the least intrusive is taken; each change without
    which it trains as well is taken away again, and the rest confirmed on another order of the batches.
    Trained copies are judged by batches that are held back.

    Args:
        setup: stays as it is.
        batches: one batch or several; trials go through them again and again.
        budget: of each trial in steps, of all together in seconds and in so many whole trials.
        report: is told what is being done, in words.
        steps: how many optimizer steps are planned; whether they suffice is judged only if they are told.

    Returns:
        The treatment; a healthy setup comes back unchanged, and so does one that nothing helps.

    Examples:
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
    budget = budget or Budget()
    before = diagnosed(setup, given, budget, steps)
    if before.healthy and (setup.optimizer is None or not (before.doubtful or steps)):
        return Treatment(setup, (), before, before, ())
    setup.build_optimizer()  # without one there is nothing to try
    with best_threads(setup, given[:1]):
        search = Search(Workbench(setup, given, budget, say), steps)
        if before.healthy and search.learns():
            return Treatment(setup, (), before, before, ())
        changes = search.run(before)
        mended = changes[-1].setup if changes else setup
        after = search.diagnosis(search.best) if changes else before
    return Treatment(mended, changes, before, after, tuple(dict.fromkeys(search.bench.trials.values())))


_MOST_BATCHES = 1000
