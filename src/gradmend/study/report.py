"""How the results of a study print: tables within 80 columns."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from gradmend.console import PlainTable, bullets
from gradmend.study import wording
from gradmend.study.advice import Recommendation
from gradmend.study.effects import Effect, Interaction, judge
from gradmend.study.grid import TASK
from gradmend.study.ranking import Place, Point
from gradmend.terminal import GREEN, RED

MOST_ROWS = 12
"""A printed table has so many rows, one of a page more; `to_dict` has them all."""

_MARKS = {1: Text("+", style=f"bold {GREEN}"), -1: Text("-", style=f"bold {RED}"), 0: Text("·", style="dim")}
LEGEND = "+ better, - worse, · neither shown; [95 % interval over seeds], each for itself."


def ranking_table(places: Sequence[Place], measure: str, task: str = "", most: int = MOST_ROWS) -> Table:
    """Arms, the best first, with the ranks that the seeds can tell apart; of several tasks, on this one."""
    lost = any(place.diverged for place in places)
    table = _table(
        "rank", f"arm on {task}" if task else "arm", f"{wording.name(measure)}|", *["diverged"] * lost
    )
    for place in places[:most]:
        fate = _fate(place.diverged, place.trials) if lost else []
        table.add_row(_rank(place), Text(place.label), wording.value(place.mean, measure), *fate)
    return _ended(table, len(places), most)


def _rank(place: Place) -> str:
    if place.rank is None:
        return "-"
    return f"{place.rank}" if place.rank == place.last else f"{place.rank}-{place.last}"


def _fate(diverged: int, trials: int) -> list[str]:
    return [f"{diverged} of {trials}" if diverged else ""]


def effects_table(effects: Sequence[Effect], measure: str, most: int = MOST_ROWS) -> Table:
    """The effect of each level: alone, and on average over so many pairs of arms that differ in it."""
    lost = any(effect.diverged for effect in effects)
    both = any(effect.contexts != 1 for effect in effects)
    headings = ("alone|", "on average|") if both else (f"effect on {wording.name(measure)}|",)
    table = _table("", "level", *headings, *["diverged"] * lost)
    for effect in effects[:most]:
        changes = _changes(effect, measure) if both else [wording.change(effect.average, measure)]
        fate = _fate(effect.diverged, effect.trials) if lost else []
        table.add_row(_MARKS[effect.verdict], Text(effect.words), *changes, *fate)
    if both:
        table.title, table.title_justify, table.title_style = (
            f"Effects on {wording.name(measure)}",
            "left",
            "",
        )
    return _ended(table, len(effects), most)


def _changes(effect: Effect, measure: str) -> list[str]:
    alone = "-" if effect.alone is None else wording.change(effect.alone, measure, units=False)
    return [alone, wording.change(effect.average, measure, units=False)]


def interactions_table(interactions: Sequence[Interaction], measure: str, most: int = MOST_ROWS) -> Table:
    """By how much two levels together differ from the sum of their effects, what is shown first."""
    table = _table("", "together", "beyond the sum of both|")
    for each in sorted(interactions, key=_weight)[:most]:
        change = wording.change(each.change, measure)
        table.add_row(_MARKS[judge(each.change, measure)], Text(each.words), change)
    return _ended(table, len(interactions), most)


def _weight(each: Interaction) -> tuple[bool, float]:
    return not each.change.shown, -abs(each.change.value)


def pros_and_cons(sides: Sequence[Sequence[Effect]], most: int = MOST_ROWS) -> Table:
    """What each level changes, measure by measure, but for what stays exactly the same.

    Args:
        sides: the effects of each level on several measures.
        most: rows of levels.
    """
    table = _table("level", "", "measure", "change on average|")
    for held in sides[:most]:
        words: Text | str = Text(held[0].words)
        for effect in held:
            change = wording.change(effect.average, effect.measure)
            if change != "the same":
                table.add_row(words, _MARKS[effect.verdict], wording.name(effect.measure), change)
                words = ""
    return _ended(table, len(sides), most)


def front_table(points: Sequence[Point], measure: str, cost: str, most: int = MOST_ROWS) -> Table:
    """The arms that nothing dominates, the cheapest first."""
    table = _table("worth its cost", f"{wording.name(measure)}|", f"{wording.name(cost)}|")
    several = len({point.arm.get(TASK) for point in points}) > 1
    front = [point for point in points if point.front and point.gives.bounded]
    for point in front[:most]:
        words = Text(f"{point.label} on {point.arm[TASK]}" if several else point.label)
        table.add_row(words, wording.value(point.gives, measure), wording.value(point.costs, cost))
    return _ended(table, len(front), most)


def advice(recommendation: Recommendation) -> list[RenderableType]:
    """The recommendation and its evidence."""
    style = f"bold {GREEN if recommendation.arm is not None else RED}"
    return [Text(recommendation.sentence, style=style), bullets(recommendation.evidence)]


def _table(*headings: str) -> Table:
    """A plain table; the columns whose heading ends with a bar are not broken into lines."""
    table = PlainTable()
    for heading in headings:
        table.add_column(heading.rstrip("|"), no_wrap=heading.endswith("|"), overflow="fold")
    return table


def _ended(table: Table, rows: int, most: int) -> Table:
    if rows > most:
        column = 1 if len(table.columns) > 3 else 0
        table.add_row(*[""] * column, f"and {rows - most} more")
    return table
