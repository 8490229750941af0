"""Mutants of sound programs: each changes one thing, runs, and is compared with its original by trainings."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from benchmarks.corpora.answers import Answer, Claim, Level
from benchmarks.corpora.cases import select
from benchmarks.corpora.repairs import Outcome
from benchmarks.corpora.tasks import read_task
from benchmarks.mutations.build import CannotBuild, make, parts_of, program_of
from benchmarks.mutations.making import SIDES, compared, original_row, plan, row_of
from benchmarks.mutations.operators import OPERATORS
from benchmarks.mutations.programs import HOLD_OUT, TUNE, Program
from benchmarks.mutations.tables import operator_table
from rich.console import Console

SMALL = replace(TUNE[2], epochs=20)
PROGRAMS = {program.name: program for program in (*TUNE, *HOLD_OUT)}


@pytest.mark.parametrize("name", PROGRAMS)
def test_each_program_takes_its_own_data(name: str) -> None:
    case = make(PROGRAMS[name], seed=1)
    loss = case.objective(case.x_train[:8], case.y_train[:8])
    assert loss.isfinite()
    kinds = {"classes": "class", "binary": "class", "amounts": "amounts"}
    assert read_task(case).kind == kinds[PROGRAMS[name].task]


@pytest.mark.parametrize("operator", OPERATORS)
def test_each_operator_changes_some_program_and_blames_known_parts(operator: str) -> None:
    mutants = [mutant for program in PROGRAMS.values() if (mutant := OPERATORS[operator](program))]
    assert mutants
    assert all(mutant.name in PROGRAMS for mutant in mutants)
    case = make(mutants[0], seed=0)
    case.objective(case.x_train[:4], case.y_train[:4]).backward()
    assert OPERATORS[operator](mutants[0]) in (None, mutants[0]) or "x" in operator or "epochs" in operator


def test_the_sides_share_no_program_and_no_operator_is_missing() -> None:
    sides = {split: {p.name for side, p, _ in plan(1) if side == split} for split in SIDES}
    assert not sides["dev"] & sides["test"]
    assert {operator for _, _, operator in plan(1)} == {None, *OPERATORS}


def test_equal_seeds_make_equal_programs_and_others_do_not() -> None:
    one, same, other = (make(SMALL, seed) for seed in (3, 3, 4))
    assert torch.equal(one.x_train, same.x_train)
    assert not torch.equal(one.x_train, other.x_train)
    first, second = (next(iter(case.model.parameters())) for case in (one, same))
    assert torch.equal(first, second)


def test_exchanged_labels_are_those_of_other_training_rows() -> None:
    sound, mutant = make(SMALL, 0), make(replace(SMALL, exchanged=1.0), 0)
    assert torch.equal(sound.y_train.sum(0), mutant.y_train.sum(0))
    assert torch.equal(sound.y_test, mutant.y_test)
    assert not torch.equal(sound.y_train, mutant.y_train)


def test_a_program_whose_output_does_not_fit_cannot_be_built() -> None:
    with pytest.raises(CannotBuild):
        make(replace(SMALL, units=2), 0)


def test_a_mutant_is_a_case_of_the_corpora(tmp_path: Path) -> None:
    """A rate of nothing is buggy, another batch size harmless; both are read back as they were written."""
    original = original_row("dev", SMALL)
    rows = [original, *(row_of(original, SMALL, name) for name in ("rate x 0.001", "RMSprop 0.001"))]
    assert [row["labels"]["verdict"] for row in rows[:2]] == ["normal", "buggy"]
    (tmp_path / "build.py").write_text("from benchmarks.mutations.build import *\n")
    (tmp_path / "cases.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = select(tmp_path / "cases.jsonl", "dev")
    assert [truth.group for _, truth in found] == [SMALL.name] * len(found)
    assert found[1][1].parts == ("learning_rate",)
    assert program_of(found[1][0]) == OPERATORS["rate x 0.001"](SMALL)
    assert parts_of(rows[0]) == []
    assert asdict(program_of(rows[0])) == asdict(SMALL)


@pytest.mark.parametrize(
    ("after", "verdict"),
    [
        ([0.5, 0.8], "buggy"),
        ([0.5, 0.9], "unlabelled"),
        ([0.9, 0.87], "clean"),
        ([0.95, 0.81], "unlabelled"),
    ],
)
def test_only_what_is_worse_with_every_seed_is_buggy(after: list[float], verdict: str) -> None:
    assert compared([0.9, 0.9], after) == verdict


def test_the_table_counts_faulty_and_harmless_mutants_apart() -> None:
    original = original_row("dev", replace(SMALL, epochs=1))
    row = row_of(original, SMALL, "uphill")
    truth = _truth(row)
    harmless = replace(truth, id="b", verdict="clean")
    claim = Claim("rate", Level.ERROR, ("wiring",))
    answers = [Answer(truth, "gradmend", "ran", claims=(claim,)), Answer(harmless, "gradmend", "ran")]
    outcome = Outcome(truth, "ran", guess=0.3, untreated=0.3, fixed=0.9, mended=0.9)
    console = Console(width=150, record=True)
    console.print(operator_table(answers, [outcome], "dev"))
    line = next(line for line in console.export_text().splitlines() if "uphill" in line)
    assert line.split()[1:] == ["1", "1", "(100%)", "1", "(100%)", "1", "1", "(100%)", "1", "0", "(0%)"]


def _truth(row: dict[str, object]) -> object:
    from benchmarks.corpora.cases import truth
    from benchmarks.mutations import build

    return truth(row, build)


def test_a_program_is_described_by_plain_data() -> None:
    assert isinstance(json.dumps(asdict(SMALL)), str)
    assert isinstance(SMALL, Program)
