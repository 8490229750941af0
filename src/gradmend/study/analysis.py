"""Results: what a study found, as text, table, pictures and plain data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from plotly.graph_objects import Figure
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gradmend.console import Printable, bullets, lines, plain_data
from gradmend.errors import SetupError, suggest
from gradmend.look import Look
from gradmend.report.page import Page, render
from gradmend.study import figures, report, wording
from gradmend.study.advice import Recommendation, joined, recommend
from gradmend.study.effects import LEAST_SEEDS, Effect, Interaction, effects, interactions
from gradmend.study.grid import SHARES, TASK, Grid, Labels, tabulate
from gradmend.study.outcome import DIVERGED, DONE, FAILED, MEASURES, NOT_APPLICABLE, STATUSES, Outcome
from gradmend.study.page import COSTS, MOST_ROWS, Shown, task_figures
from gradmend.study.ranking import Place, Point, pareto, ranking

SIDES = ("test_accuracy", "gap", "steps_to_target", "step_seconds", "parameters", "memory", "gradient_ratio")


@dataclass(frozen=True)
class Results(Printable):
    """What a study found. Nothing is claimed without a 95 % interval over seeds.

    Args:
        name: of the study.
        question: that it asks.
        outcomes: of its trials so far, in any order.
        measure: what is compared: a name of `MEASURES` of which more or less is better.
        target: the accuracy that `steps_to_target` counts to.
        levels: factor -> its labels, the base first; by default in the order in which the outcomes have them.
        predicted: points (x, y) of a line that theory draws into the heatmap of two numeric factors, x being
            the second of them.

    Raises:
        SetupError: for a measure that does not exist or has no better side.
        GradmendError: for outcomes that are not of one study, or a trial that is there twice.

    Examples:
        >>> def trial(norm, seed, accuracy):
        ...     return Outcome({"norm": norm}, seed, "done", "", {"test_accuracy": accuracy}, (), ())
        >>> trials = [trial("none", seed, 0.5 + seed / 100) for seed in range(5)]
        >>> trials += [trial("batch", seed, 0.9 + seed / 100) for seed in range(5)]
        >>> print(Results("norms", "Does it help?", trials).recommendation.sentence)
        Use batch: test accuracy 92.0 % [90.0, 94.0]; against none +40.0 [+40.0, +40.0] points.
    """

    name: str
    question: str
    outcomes: Sequence[Outcome]
    measure: str = "test_accuracy"
    target: float = 0.9
    levels: Mapping[str, Labels] = field(default_factory=dict)
    predicted: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "outcomes", tuple(self.outcomes))
        possible = [name for name, measure in MEASURES.items() if measure.better]
        if self.measure not in possible:
            raise SetupError(f"A study cannot compare {self.measure!r}. {suggest(self.measure, possible)}")
        self.grid  # noqa: B018 - contradictions are raised here

    @cached_property
    def grid(self) -> Grid:
        """The outcomes in rows (arms) and columns (seeds)."""
        return tabulate(self.outcomes, self.levels)

    @cached_property
    def effects(self) -> tuple[Effect, ...]:
        """What each level does to the measure, alone and on average."""
        return effects(self.grid, self.measure)

    @cached_property
    def interactions(self) -> tuple[Interaction, ...]:
        """By how much two levels together differ from the sum of their effects."""
        return interactions(self.grid, self.measure)

    @cached_property
    def ranking(self) -> tuple[Place, ...]:
        """The arms, the best first; ties share a rank. Arms on other data are ranked for themselves."""
        return tuple(place for part in self.grid.tasks.values() for place in ranking(part, self.measure))

    @cached_property
    def pareto(self) -> Mapping[str, tuple[Point, ...]]:
        """The measure against training time, and against the number of parameters."""
        parts, costs = self.grid.tasks.values(), [cost for cost in COSTS if cost != self.measure]
        return {cost: tuple(p for part in parts for p in pareto(part, self.measure, cost)) for cost in costs}

    @cached_property
    def recommendation(self) -> Recommendation:
        """What to do on this task, with the evidence; of several tasks on each."""
        found = self._recommended
        return found[""] if "" in found else joined(found)

    @cached_property
    def _recommended(self) -> dict[str, Recommendation]:
        return {label: recommend(part, self.measure) for label, part in self.grid.tasks.items()}

    @cached_property
    def sides(self) -> tuple[tuple[Effect, ...], ...]:
        """Pros and cons: the effects of each level on the measure and on all that it may cost."""
        known = [effects(self.grid, m) for m in dict.fromkeys((self.measure, *SIDES))]
        held = [
            [e for found in known for e in found if (e.factor, e.level) == key] for key in _keys(self.grid)
        ]
        return tuple(tuple(side) for side in held if side and side[0].factor != TASK)

    @cached_property
    def left_out(self) -> tuple[str, ...]:
        """What could not be compared, and why."""
        told = {(effect.factor, effect.level) for effect in self.effects}
        untold = [self.grid.level(*key) for key in _keys(self.grid) if key not in told]
        sentences = [f"The effect of {words} cannot be told from these trials." for words in untold]
        return (*sentences, *self._fitted(), *self._unbounded(), *self._unlucky(), *self._unfit())

    def _fitted(self) -> list[str]:
        words = lines([effect.words for effect in self.effects if not effect.contexts])
        why = "no two arms differ in one of them alone; that they do not interact is taken for granted"
        return [f"Fitted as a sum, as {why}: the effects of {words}."] if words else []

    def _unbounded(self) -> list[str]:
        weak = [e for e in self.effects if not e.average.bounded]
        most = max((effect.average.seeds for effect in weak), default=0)
        words = lines([effect.words for effect in weak])
        need = f"an interval needs at least {LEAST_SEEDS}, better 5"
        return [f"Nothing is claimed of {words}: {wording.seeds(most)} at most; {need}."] if weak else []

    def _unlucky(self) -> list[str]:
        """Arms without a value, as their other seeds alone would flatter them."""
        rows = range(len(self.grid.arms))
        ran = [row for row in rows if self.grid.count(row, DONE) or self.grid.count(row, DIVERGED)]
        steps = np.isnan(self.grid.values("steps_to_target")[ran]).all(1)
        late = f"{steps.sum()} of {len(ran)} arms did not reach {100 * self.target:g} % with every seed"
        missed = [f"{late}; their steps are not compared."] if steps.any() and not steps.all() else []
        lost = [self.grid.label(row) for row in ran if self.grid.count(row, DIVERGED)]
        if self.measure in SHARES:
            fate = "A diverged trial counts as accuracy 0: it leaves no usable model."
        else:
            fate = f"Not compared, as they diverged with some seed: {lines(lost)}."
        return [*missed, fate] if lost else missed

    def _unfit(self) -> list[str]:
        held: dict[tuple[str, str], dict[str, None]] = {}
        for row, cells in enumerate(self.grid.cells):
            for cell in cells:
                if cell is not None and cell.status in (NOT_APPLICABLE, FAILED):
                    held.setdefault((cell.status, cell.reason), {})[self.grid.label(row)] = None
        told = ((f"{status.capitalize()}: {lines(list(arms))}", why) for (status, why), arms in held.items())
        return [f"{words}: {why}" for words, why in told]

    def figures(self, dark: bool = False) -> dict[str, Figure]:
        """All pictures that these outcomes give, by name, the ranking first.

        Args:
            dark: for a dark background.
        """
        look, several = Look(dark), len(self.grid.tasks) > 1
        drawn: dict[str, Figure] = {}
        for task, part in self.grid.tasks.items():
            own = task_figures(part, self.measure, self.predicted, look)
            drawn |= {f"{name} on {task}" if several else name: figure for name, figure in own.items()}
        if self.effects:
            drawn["effects"] = figures.forest(self.effects, self.measure, look)
        if self.interactions:
            drawn["interactions"] = figures.matrix(self.interactions, self.measure, look)
        return drawn

    def __rich__(self) -> RenderableType:
        return Group(*self._head(), Text(), *report.advice(self.recommendation), *self._below())

    def _head(self) -> list[Text]:
        title = Text.assemble((self.name, "bold"), f": {self.question}" if self.question else "")
        return [title, Text(self.size)]

    @property
    def size(self) -> str:
        """How many arms, seeds and trials, and what became of them."""
        if not self.outcomes:
            return "No trials yet."
        counts = Counter(outcome.status for outcome in self.outcomes)
        told = ", ".join(f"{counts[status]} {status}" for status in STATUSES if counts[status])
        arms, seeds = f"{len(self.grid.arms)} arms", wording.seeds(len(self.grid.seeds))
        return f"{arms}, {seeds}, {len(self.outcomes)} trials: {told}."

    def _below(self) -> list[RenderableType]:
        told = [part for table in self.tables().values() for part in (Text(), table)]
        rest: list[RenderableType] = [Text(), bullets(self.left_out)] if self.left_out else []
        return [*told, *rest, Text(), Text(report.LEGEND, style="dim")]

    def tables(self, most: int = report.MOST_ROWS) -> dict[str, Table]:
        """All that is known, by names like those of the `figures`, without tables that are empty.

        Args:
            most: rows of each.
        """
        of = self.measure
        tables = {
            **self._rankings(most),
            "effects": report.effects_table(self.effects, of, most),
            "interactions": report.interactions_table(self.interactions, of, most),
            "pros and cons": report.pros_and_cons(self.sides, most),
            **{f"{of} over {c}": report.front_table(held, of, c, most) for c, held in self.pareto.items()},
        }
        return {name: table for name, table in tables.items() if table.rows}

    def _rankings(self, most: int) -> dict[str, Table]:
        tasks = list(self.grid.tasks)
        held = {task: [p for p in self.ranking if p.arm.get(TASK) == task or not task] for task in tasks}
        return {
            f"ranking on {task}" if task else "ranking": report.ranking_table(
                places, self.measure, task, most
            )
            for task, places in held.items()
        }

    def page(self, more: Sequence[Figure] = ()) -> Page:
        """What a report shows of it.

        Args:
            more: pictures that come last, such as those of `Study.figures`.
        """
        title = f"{self.name}: {self.question}" if self.question else self.name
        drawn, known = self.figures(), any(each.arm for each in self._recommended.values())
        told = self.recommendation.evidence
        parts = Shown(drawn, self.tables(MOST_ROWS), self.size, told, self.left_out, tuple(more))
        tone = "good" if known else "warning"
        return Page(title, self.recommendation.sentence, tone, parts.sections())

    def html(self, lang: str = "en", more: Sequence[Figure] = ()) -> str:
        """Text, tables and pictures as one page that needs nothing else.

        Args:
            lang: one of `gradmend.language.LANGUAGES`.
            more: pictures that come last, such as those of `Study.figures`.
        """
        return render(self.page(more), lang)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: numbers, strings, lists; NaN and infinity become None. Curves are left out."""
        data: dict[str, Any] = plain_data(
            {
                "name": self.name,
                "question": self.question,
                "measure": self.measure,
                "target": self.target,
                "recommendation": self.recommendation,
                "ranking": self.ranking,
                "effects": self.effects,
                "interactions": self.interactions,
                "sides": self.sides,
                "pareto": self.pareto,
                "left_out": self.left_out,
                "trials": [_trial(outcome) for outcome in self.outcomes],
            }
        )
        return data


def _keys(grid: Grid) -> list[tuple[str, str]]:
    return [(factor, label) for factor, labels in grid.levels.items() for label in labels[1:]]


def _trial(outcome: Outcome) -> dict[str, Any]:
    curves = ("losses", "accuracies")
    return {key: value for key, value in plain_data(outcome).items() if key not in curves}
