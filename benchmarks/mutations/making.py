"""Which mutants there are, and whether they train worse than their originals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from benchmarks.corpora.references import STEPS, own_steps
from benchmarks.corpora.repairs import POINTS, trained
from benchmarks.corpora.tasks import read_task
from benchmarks.corpora.tools.gradmend import setup
from benchmarks.mutations.build import CannotBuild, make
from benchmarks.mutations.operators import OPERATORS
from benchmarks.mutations.programs import HOLD_OUT, TUNE, Program

Json = dict[str, Any]

SIDES = {"dev": TUNE, "test": HOLD_OUT}
"""By the names that corpora have for the side that is tuned on and the one that is reported on."""

EACH, SEEDS = 3, 3
"""Programs of a side that each operator is applied to; trainings of each mutant and original."""

_ALIKE = 0.6 * POINTS
"""A mutant whose mean score is lower by no more than this is harmless."""


def plan(each: int) -> Iterator[tuple[str, Program, str | None]]:
    """Side, program and operator (None: as it is). The programs take turns."""
    for split, programs in SIDES.items():
        yield from ((split, program, None) for program in programs)
        for turn, (name, operator) in enumerate(OPERATORS.items()):
            fitting = [p for p in _turned(programs, turn) if operator(p) is not None]
            yield from ((split, program, name) for program in fitting[:each])


def _turned(programs: Sequence[Program], turn: int) -> Sequence[Program]:
    """Steps of three through ten programs: each comes first once in ten turns."""
    return [programs[(3 * turn + 7 * place) % len(programs)] for place in range(len(programs))]


def scores(program: Program) -> list[float]:
    """Accuracy, or R² of amounts, on the test rows after each training.

    Raises:
        CannotBuild: if the output does not fit the targets.
    """
    found = []
    for seed in range(SEEDS):
        case = make(program, seed)
        task, steps = read_task(case), min(STEPS, own_steps(case))
        found.append(trained(setup(case), case, task, steps, seed)[0])
    return found


def original_row(split: str, program: Program) -> Json:
    """The case of a sound program."""
    return _row(split, program, program.name, "normal", [], scores(program))


def row_of(original: Json, program: Program, operator: str) -> Json:
    """The case of a mutant: buggy, clean where it trains as well, unlabelled where that is not clear."""
    mutant, name = OPERATORS[operator](program), f"{program.name}: {operator}"
    assert mutant is not None
    try:
        found = scores(mutant)
    except (CannotBuild, ValueError) as error:
        row = _row(original["split"], mutant, name, "unlabelled", [operator], [])
        return {**row, "problem": str(error)}
    verdict = compared(original["scores"], found)
    row = _row(original["split"], mutant, name, verdict, [operator], found)
    return {**row, "group": original["group"], "pair_id": original["id"]}


def compared(before: Sequence[float], after: Sequence[float]) -> str:
    """Buggy if it is clearly worse with every seed.

    >>> compared([0.9, 0.9], [0.5, 0.8]), compared([0.9, 0.9], [0.9, 0.5]), compared([0.9], [0.88])
    ('buggy', 'unlabelled', 'clean')
    """
    worse = [one - other for one, other in zip(before, after, strict=True)]
    if min(worse) > POINTS:
        return "buggy"
    return "clean" if fmean(worse) <= _ALIKE and max(worse) <= POINTS else "unlabelled"


def _row(
    split: str, program: Program, name: str, verdict: str, faults: list[str], found: Sequence[float]
) -> Json:
    return {
        "id": name,
        "corpus": "mutants",
        "group": program.name,
        "split": split,
        "labels": {"verdict": verdict, "faults": faults},
        "pair_id": None,
        "program": asdict(program),
        "scores": [round(score, 4) for score in found],
    }
