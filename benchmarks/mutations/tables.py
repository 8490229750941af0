"""What gradmend found and mended, operator by operator."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.table import Table

from benchmarks.corpora.answers import Answer, Level
from benchmarks.corpora.repairs import Outcome
from benchmarks.corpora.scoring import first_hit
from benchmarks.corpora.tables import plain_table
from benchmarks.mutations.making import SEEDS

NOTES = f"""\
A mutant is faulty if it scores clearly worse than its original with each of {SEEDS} seeds, harmless if about
as well. Alarm: a finding of level error. Part: one of the first three warnings and errors blames a part that
the operator changed. Repaired: of those that do not train, as in `benchmarks.corpora --ask repair`.
"""


def operator_table(answers: Sequence[Answer], outcomes: Sequence[Outcome], title: str) -> Table:
    """A line for each operator, and one of all."""
    table = plain_table(
        title, "operator", "faulty", "alarm", "part", "to repair", "repaired", "harmless", "alarm"
    )
    operators = dict.fromkeys(fault for answer in answers for fault in answer.truth.faults)
    for operator in operators:
        own = [answer for answer in answers if answer.truth.faults == (operator,)]
        table.add_row(operator, *_line(own, [o for o in outcomes if o.truth.faults == (operator,)]))
    table.add_section()
    table.add_row("originals", *_line([a for a in answers if not a.truth.faults], []))
    table.add_row("all", *_line(answers, outcomes))
    return table


def _line(answers: Sequence[Answer], outcomes: Sequence[Outcome]) -> tuple[str, ...]:
    faulty = [answer for answer in answers if answer.truth.verdict == "buggy"]
    rest = [answer for answer in answers if answer.truth.verdict != "buggy"]
    ill = [outcome for outcome in outcomes if outcome.judged and not outcome.trains]
    return (
        str(len(faulty)),
        _share(answer.alarm(Level.ERROR) for answer in faulty),
        _share(0 < first_hit(answer) <= 3 for answer in faulty),
        str(len(ill)),
        _share(outcome.repaired for outcome in ill),
        str(len(rest)),
        _share(answer.alarm(Level.ERROR) for answer in rest),
    )


def _share(of: Iterable[bool]) -> str:
    met = list(of)
    return f"{sum(met)} ({sum(met) / len(met):.0%})" if met else "-"
