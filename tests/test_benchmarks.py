"""The benchmarks run: each workload is stepped, measured and watched; the table says what it should."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count

import pytest
import torch
from benchmarks import __main__ as table
from benchmarks.measure_cost import MLP_100
from benchmarks.memory import peak_bytes
from benchmarks.peers import After, costs, hooks
from benchmarks.timing import Ratio, Row, compare
from benchmarks.workloads import ADAM, SGD, WORKLOADS, Job, Workload, deep_mlp

SMALL = Workload("small", partial(deep_mlp, 2, 8), 1.0)


@contextmanager
def broken(job: Job) -> Iterator[After]:
    def fail(loss: torch.Tensor) -> None:
        raise ValueError("this peer\ncannot watch")

    yield fail


@contextmanager
def missing(job: Job) -> Iterator[After]:
    raise ModuleNotFoundError("No module named 'peer'")
    yield print


@pytest.mark.parametrize("workload", [*WORKLOADS, MLP_100], ids=lambda workload: workload.name)
def test_measure_sees_the_step_that_it_is_compared_with(workload: Workload) -> None:
    job, twin = workload.job(), workload.job()
    with hooks(twin) as after, pytest.warns(UserWarning, match="Full backward hook"):
        after(loss := twin.step())
    profile = job.measure()
    assert profile.loss == pytest.approx(loss.item(), rel=1e-5)
    assert profile.sites
    for reading, p in zip(profile.parameters, twin.model.parameters(), strict=True):
        assert reading.gradient == pytest.approx(p.grad.square().mean().sqrt().item(), rel=1e-3)


@pytest.mark.parametrize("optimizer", [SGD, ADAM], ids=["SGD", "Adam"])
def test_measure_with_an_optimizer_looks_at_its_next_step(optimizer: partial[torch.optim.Optimizer]) -> None:
    job = SMALL.job(optimizer)
    job.step()
    assert all(reading.update is not None for reading in job.measure().parameters)


def test_peers_that_fail_are_named_by_their_error() -> None:
    before = os.getcwd()
    results = costs(SMALL, {"hooks": hooks, "broken": broken, "missing": missing}, budget=0)
    assert os.getcwd() == before
    assert isinstance(results["hooks"], Ratio)
    assert isinstance(results["gradmend.measure"], Ratio)
    assert results["broken"] == "ValueError: this peer"
    assert results["missing"] == "ModuleNotFoundError: No module named 'peer'"


def test_a_machine_that_slows_down_does_not_change_the_ratio() -> None:
    """By a clock whose seconds grow by 1 % of the first per call; every call is a block of its own."""
    calls = count()

    def clock(call: Callable[[], object]) -> float:
        return call() * (1 + next(calls) / 100)

    results = compare(lambda: 1.0, {"twice": lambda: 2.0, "half": lambda: 0.5}, clock=clock, budget=0)
    assert [(r.low, r.median, r.high) for r in results.values()] == [
        pytest.approx((ratio, ratio, ratio)) for ratio in (2.0, 0.5)
    ]


def test_a_subject_that_fails_leaves_nothing_to_time() -> None:
    assert compare(lambda: 1, {"division": lambda: 1 / 0}) == {
        "division": "ZeroDivisionError: division by zero"
    }


def test_peak_memory_counts_what_is_held_at_once() -> None:
    def call() -> None:
        a, b = torch.empty(1000), torch.empty(2000)
        del a
        c = torch.empty(500)
        del b, c

    assert peak_bytes(call) == 4 * 3000
    assert peak_bytes(lambda: None) == 0


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (Row("a", 1.04, 1.1), ["a", "1.040", "<= 1.1"]),
        (Row("a", Ratio(2.0, 1.5, 2.5), 1.6), ["a", "2.000 (1.500 to 2.500)", "<= 1.6, missed"]),
        (Row("a", 0.8, (0.9, 1.1)), ["a", "0.8000", "0.9 to 1.1, missed"]),
        (Row("a", "failed", 1.6), ["a", "failed", "<= 1.6, missed"]),
        (Row("a", 3.0), ["a", "3.000"]),
        (Row("a", "RuntimeError: " + "x" * 100), ["a", "RuntimeError: " + "x" * 35]),
        (Row("a", "x" * 100, 1.6), ["a", "x" * 30, " <= 1.6, missed"]),
    ],
    ids=["reached", "missed", "below the range", "sentence", "shown", "long", "long and missed"],
)
def test_a_line_holds_name_number_and_aim(row: Row, expected: list[str]) -> None:
    text = table.line(row).plain
    assert len(text) <= table.WIDTH
    for part in expected:
        assert part in text
    assert ("<=" in text or " to " in text) == (row.reach is not None)


def test_all_benchmarks_are_found_by_name() -> None:
    assert {"measure_cost", "peers", "training_step"} <= set(table.all_names())
    with pytest.raises(SystemExit, match="There is no benchmark speed"):
        table.main(["speed"])
