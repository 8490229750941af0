"""Repairs of the corpora: verdicts, gains and tables by hand, and programs made here through the command."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks.corpora import __main__ as command
from benchmarks.corpora import repairs, searches
from benchmarks.corpora.answers import Answer, Claim, Level, to_line
from benchmarks.corpora.cases import Truth
from benchmarks.corpora.repair_tables import found_table, repair_table, search_counts
from benchmarks.corpora.repairs import Outcome
from benchmarks.corpora.searches import (
    Comparison,
    affordable_budget,
    fixed_row,
    published,
    share,
    surely_better,
)
from rich.console import Console

from gradmend import Budget

BUILD = """
import json
from dataclasses import dataclass
from functools import partial
import torch
from torch import nn

class CannotBuild(Exception):
    pass

class Net(nn.Sequential):
    penalties = ()

@dataclass(frozen=True)
class Case:
    model: nn.Module
    lr: float
    x_train: torch.Tensor
    y_train: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor
    metric: str = "accuracy"
    batch_size: int = 16
    epochs: int = 10
    data_is_standin: bool = True
    loss_fn = staticmethod(lambda out, y: nn.functional.cross_entropy(out, y.argmax(-1)))
    def optimizer(self, parameters):
        return torch.optim.SGD(parameters, lr=self.lr)
    def objective(self, x, y):
        return self.loss_fn(self.model(x), y)

def load(path):
    return [json.loads(line) for line in path.read_text().splitlines()]

def parts_of(row):
    return ["learning_rate"]

def build(row, seed, data_root):
    if row["lr"] is None:
        raise CannotBuild("no optimizer recorded")
    torch.manual_seed(seed)
    x = torch.randn(240, 4)
    y = torch.eye(2)[(x[:, 0] + x[:, 1] > 0).long()]
    if row.get("noise"):
        y = y[torch.randperm(240)]
    model = Net(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    return Case(model, row["lr"], x[:160], y[:160], x[160:], y[160:])
"""


def known(name: str = "a", group: str = "a") -> Truth:
    return Truth(name, "own", group, "dev", "buggy", ("wrong_loss",), ("loss",), "", {})


RAN = Outcome(known(), "ran", kind="class", guess=0.5, untreated=0.5, well=0.8, seconds=1.0)


@pytest.mark.parametrize(
    ("fixed", "well", "bar"),
    [
        (None, 0.8, 0.72),
        (0.9, 0.8, 0.72),
        (0.7, 0.8, 0.65),
        (0.55, 0.8, 0.72),
        (0.9, None, 0.85),
        (0.55, 0.5, None),
    ],
)
def test_the_bar_is_the_lower_of_both_references_that_learn(
    fixed: float | None, well: float | None, bar: float | None
) -> None:
    outcome = replace(RAN, fixed=fixed, well=well)
    assert outcome.bar == (None if bar is None else pytest.approx(bar))
    assert outcome.judged == (bar is not None)


def test_verdicts() -> None:
    assert not RAN.trains
    assert replace(RAN, untreated=0.73).trains
    assert replace(RAN, mended=0.73).repaired
    assert not replace(RAN, mended=0.71).repaired


def printed(*shown: object) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    for each in shown:
        console.print(each)
    return console.export_text()


def test_tables_count_groups_and_leave_out_what_trains() -> None:
    outcomes = [
        replace(RAN, mended=0.8, changes=("x",), mend_seconds=3.0),
        replace(RAN, truth=known("b1", "b"), mended=0.5, mend_seconds=5.0),
        replace(RAN, truth=known("b2", "b"), mended=0.8, changes=("x", "y"), mend_seconds=4.0),
        replace(RAN, truth=known("c", "c"), untreated=0.9),
        Outcome(known("d", "d"), "too slow"),
    ]
    alarm = Answer(known(), "gradmend", "ran", claims=(Claim("loss", Level.ERROR, ("loss",)),))
    text = printed(repair_table(outcomes, "repair"), found_table(outcomes, [alarm], "detection"))
    cells = [line.split() for line in text.splitlines()]
    assert ["all", "3/2", "0.75", "(0.20-0.97)", "2", "1.5", "4.0"] in cells
    assert ["train", "badly", "3/2", "0.50", "(0.09-0.91)"] in cells
    assert ["train", "well", "1/1", "0.00", "(0.00-0.79)"] in cells


FAULT = {
    "layers": [
        {"type": "dense", "units": 8, "activation": "tanh", "kernel_init": "zeros"},
        {"type": "dropout", "rate": 0.5},
        {"type": "dense", "units": 2, "activation": "linear", "kernel_init": "zeros"},
    ],
    "optimizer": {"name": "sgd", "lr": 3.0, "momentum": 0.9},
    "loss": "mse",
    "batch_size": 16,
    "epochs": 1,
}
PARAMS = {
    "ki1": "RandomNormal(stddev=1)", "act1": "relu", "unit1": 4.0, "ki2": "normal", "act2": "softmax",
    "loss": "hinge", "optimizer": "adam", "lr": 0.01, "batch_size": 64.0, "epochs": 5.0,
}  # fmt: skip


def test_a_developers_parameters_make_the_fixed_program() -> None:
    row = {**FAULT, "id": "a", "developer_fix_params": PARAMS}
    made = fixed_row(row, [row])
    assert made is not None
    first, _, last = made["layers"]
    assert (first["units"], first["activation"]) == (4, "relu")
    assert first["kernel_init"] == {"name": "random_normal", "stddev": 1.0}
    assert (last["activation"], last["kernel_init"], last["units"]) == ("softmax", "random_normal", 2)
    assert made["optimizer"] == {"name": "adam", "lr": 0.01}
    assert (made["loss"], made["batch_size"], made["epochs"]) == ("hinge", 64, 5)
    assert row["layers"] == FAULT["layers"]
    assert fixed_row({"id": "b", "pair_id": "a"}, [row]) is row
    assert fixed_row({"id": "b"}, [row]) is None


def test_gains_and_the_test_of_significance() -> None:
    assert share(0.5, 0.7, 0.9) == pytest.approx(0.5)
    assert (share(0.5, 0.99, 0.9), share(0.5, -2.0, 0.9), share(0.9, 0.9, 0.9)) == (1.0, -1.0, None)
    assert surely_better((0.9, 0.91, 0.89, 0.9, 0.9), (0.5, 0.6, 0.5, 0.55, 0.5))
    assert not surely_better((0.6, 0.4, 0.5, 0.55, 0.5), (0.5, 0.6, 0.4, 0.45, 0.5))
    assert surely_better((0.9, 0.9), (0.8, 0.8))
    assert not surely_better((0.8, 0.8), (0.8, 0.8))


BASELINES = {
    "metric": "accuracy",
    "search_budget_in_training_times": {"hebo@10x": {"holdout_of_best_mean": 0.3}},
    "autotrainer": {"repaired_accuracy_mean": None},
}
TRUTH = {"faulty_metric_mean": 0.1, "best_metric_mean": 0.5}


def test_published_gains() -> None:
    row = {"repair_baselines": BASELINES, "alt_ground_truth": TRUTH}
    assert published(row) == {"hebo@10x": pytest.approx(0.5), "autotrainer": 0.0}
    lower = {"metric": "loss (lower is better)", "search_budget_in_training_times": {
        "bohb@20x": {"holdout_of_best_mean": 4.0}}}  # fmt: skip
    row = {
        "repair_baselines": lower,
        "alt_ground_truth": {"faulty_metric_mean": 6.0, "best_metric_mean": 2.0},
    }
    assert published(row) == {"bohb@20x": pytest.approx(0.5)}


def test_where_the_fix_does_not_learn_a_well_set_network_stands_for_it() -> None:
    ran = Comparison(
        known(), "ran", broken=(0.5, 0.5), fixed=(0.9, 0.9), well=(0.8, 0.8), mended=(0.87, 0.87)
    )
    assert (ran.gain, ran.weak, ran.strong) == (pytest.approx(0.925), True, False)
    assert replace(ran, guess=0.85).gain is None
    assert replace(ran, guess=0.45, fixed=(0.53, 0.53)).reachable == ran.well
    useless = replace(ran, fixed=(0.5, 0.5))
    assert (useless.gain, useless.strong) == (1.0, True)
    assert Comparison(known(), "too slow").gain is None
    told = list(
        search_counts([replace(ran, published=(("hebo@50x", 0.95),)), Comparison(known(), "too slow")])
    )
    assert told[0].startswith("gain >= 0.9: gradmend 1 of 1")
    assert "    hebo@50x: 1 of 1; of the same programs 1 of 1" in told


@pytest.fixture
def cases(tmp_path: Path) -> Path:
    (tmp_path / "build.py").write_text(BUILD)
    plain = {
        "corpus": "own",
        "split": "dev",
        "labels": {"verdict": "buggy", "faults": ["wrong_learning_rate"]},
    }
    sound = {"repair_baselines": BASELINES, "alt_ground_truth": TRUTH, "lr": 1e-6, "pair_id": "fixed"}
    rows = [
        {"id": "slow", "group": "a", **plain, **sound},
        {"id": "noise", "group": "b", **plain, "lr": 1e-6, "noise": True},
        {"id": "refused", "group": "c", **plain, "lr": None},
        {"id": "fixed", "group": "a", **plain, "labels": {"verdict": "fixed"}, "lr": 1.0},
    ]
    path = tmp_path / "cases.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_from_a_program_to_its_repair_and_back(cases: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = cases.with_name("out.jsonl")
    command.main(["--ask", "repair", "--cases", str(cases), "--out", str(out), "--list"])
    told = capsys.readouterr().out
    found = {outcome.truth.id: outcome for outcome in repairs.read([out])}
    assert {name: outcome.status for name, outcome in found.items()} == {
        "slow": "ran", "noise": "ran", "refused": "not built",
    }  # fmt: skip
    slow = found["slow"]
    assert (slow.judged, slow.trains, slow.repaired) == (True, False, True)
    assert slow.changes
    assert (slow.fixed or 0.0) > 0.9
    assert (found["noise"].judged, found["noise"].mended) == (False, None)
    assert "3 buggy programs, 1 not built" in told
    assert "slow  repaired" in told
    out.write_text("".join(map(to_line, (found["slow"], replace(found["noise"], status="failed")))))
    command.main(
        ["--ask", "repair", "--cases", str(cases), "--out", str(out), "--resume", "--ids", "slow", "noise"]
    )
    again = repairs.read([out])
    assert again[0] == slow
    assert again[1].status == "ran"
    capsys.readouterr()
    command.main(["--ask", "repair", "--from", str(out)])
    assert "1/1" in capsys.readouterr().out


def test_beside_searches_each_seed_is_trained(cases: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = cases.with_name("out.jsonl")
    command.main(["--ask", "search", "--cases", str(cases), "--out", str(out)])
    told = capsys.readouterr().out
    (slow,) = searches.read([out])
    assert [len(of) for of in (slow.broken, slow.fixed, slow.well, slow.mended)] == [searches.SEEDS] * 4
    assert slow.gain is not None
    assert dict(slow.published) == {"hebo@10x": pytest.approx(0.5), "autotrainer": 0.0}
    assert "hebo@10x: 0 of 1" in told


def test_a_search_may_take_the_steps_and_the_time_of_four_trainings() -> None:
    assert affordable_budget(1000, 3.0) == Budget(steps=200, seconds=12.0, trials=20)
    assert affordable_budget(50, 0.01) == Budget(steps=50, seconds=5.0, trials=4)
