"""False alarms: sound setups train well, and no error is found in them, neither before nor after."""

from dataclasses import replace
from statistics import mean

import pytest

import gradmend as gm
from gradmend.diagnosis import Diagnosis, Severity
from healthy import CASES
from healthy_data import Case

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def alarms(diagnosis: Diagnosis) -> list[str]:
    errors = (found for found in diagnosis.findings if found.severity is Severity.ERROR)
    return [f"{found.cause.title}: {found.sentence}" for found in errors]


def test_there_are_many_and_each_has_its_name() -> None:
    names = {case.name for case in CASES}
    assert len(names) == len(CASES) >= 45


@each_case
def test_no_alarm_at_initialization(case: Case) -> None:
    assert alarms(gm.diagnose(*case.build())) == []


@pytest.mark.slow
@each_case
def test_it_trains_and_there_is_no_alarm_afterwards(case: Case) -> None:
    setup, batches = case.build()
    trained = replace(setup, optimizer=setup.build_optimizer())  # a live one keeps what it has learnt
    losses = gm.train(trained, batches, steps=case.steps).loss
    recent = mean(losses[-case.steps // 10 :])
    assert recent < case.below < losses[0]
    assert alarms(gm.diagnose(trained, batches)) == []
