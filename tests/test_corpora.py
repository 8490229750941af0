"""The corpora: scores by hand, intervals against published ones, and a case made here through the runner."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.corpora import __main__ as command
from benchmarks.corpora.answers import Answer, Claim, Level, read, to_line
from benchmarks.corpora.cases import Truth, batches, builder, draw, select, truth
from benchmarks.corpora.published import figures, verdicts
from benchmarks.corpora.runner import Job, prepare, run_one
from benchmarks.corpora.scoring import detection, first_hit, localization, over_groups, wilson
from benchmarks.corpora.tables import guesses, mistakes, views
from benchmarks.corpora.training import claims
from hypothesis import given
from hypothesis import strategies as st

BUILD = """
import json, os, time
from dataclasses import dataclass
import torch
from torch import nn

class CannotBuild(Exception):
    pass

class Net(nn.Sequential):
    penalties = ()
    def penalty(self):
        return sum((l2 * p.square().sum() for p, _, l2 in self.penalties), torch.zeros(()))

@dataclass(frozen=True)
class Case:
    model: nn.Module
    x_train: torch.Tensor
    y_train: torch.Tensor
    batch_size: int = 16
    epochs: int = 100
    data_is_standin: bool = True
    loss_fn = staticmethod(lambda out, y: (out - y).square().mean())
    def optimizer(self, parameters):
        return torch.optim.SGD(parameters, lr=0.1)
    def objective(self, x, y):
        return self.loss_fn(self.model(x), y) + self.model.penalty()

def load(path):
    return [json.loads(line) for line in path.read_text().splitlines()]

def parts_of(row):
    return row["parts"]

def build(row, seed, data_root):
    if row["does"] == "refuse":
        raise CannotBuild("no optimizer recorded")
    if row["does"] == "sleep":
        time.sleep(60)
    if row["does"] == "die":
        os._exit(3)
    torch.manual_seed(seed)
    model = Net(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    if row["does"] == "same weights":
        for parameter in model.parameters():
            nn.init.constant_(parameter, 0.1)
    if row["does"] == "penalize":
        model.penalties = ((model[0].weight, 0.0, 0.01),)
    return Case(model, torch.randn(40, 4), torch.randn(40, 1))
"""


def row(name: str, does: str = "train", verdict: str = "buggy", split: str = "dev") -> dict[str, Any]:
    labels = {"verdict": verdict, "faults": ["bad_initialization"]}
    known = {"id": name, "corpus": "own", "group": name, "split": split, "labels": labels}
    return {**known, "parts": ["initialization"], "does": does, "static_contradictions": ["never read"]}


@pytest.fixture
def cases(tmp_path: Path) -> Path:
    (tmp_path / "build.py").write_text(BUILD)
    rows = [row("equal", "same weights"), row("sound", verdict="normal"), row("other", split="test")]
    rows += [row(name, name) for name in ("refuse", "sleep", "die", "penalize")]
    rows.append(row("unknown", verdict="unlabelled"))
    prepare(["gradmend"])
    path = tmp_path / "cases.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return path


def known(name: str, verdict: str = "buggy", **others: Any) -> Truth:
    plain = Truth(name, "own", name, "dev", verdict, ("wrong_loss",), ("loss",), "", {})
    return replace(plain, **others)


def says(truth: Truth, *blamed: str, level: Level = Level.ERROR, tool: str = "gradmend") -> Answer:
    return Answer(truth, tool, "ran", claims=tuple(Claim(part, level, (part,)) for part in blamed))


@pytest.mark.parametrize(
    ("hits", "units", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_intervals_are_those_of_newcombe_1998(hits: int, units: int, low: float, high: float) -> None:
    """Table I, method 3, of https://doi.org/10.1002/(SICI)1097-0258(19980430)17:8<857::AID-SIM777>3.0.CO;2-E."""
    found = wilson(hits / units, units)
    assert (found.low, found.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_nothing_is_known_without_units() -> None:
    found = over_groups([], lambda _: 1.0)
    assert math.isnan(found.share)
    assert (found.low, found.high, str(found)) == (0.0, 1.0, "-")


def test_detection_by_hand() -> None:
    """Three buggy groups, one of them with two programs; a fixed partner in a group of its own verdict."""
    answers = [
        says(known("a"), "loss"),
        says(known("b1", group="b"), "input"),
        says(known("b2", group="b")),
        says(known("c"), "loss", level=Level.WARNING),
        says(known("a-fixed", "fixed", group="a"), "loss"),
        says(known("n", "normal")),
        says(known("u", "unlabelled"), "loss"),
    ]
    errors, warnings = (detection(answers, level) for level in (Level.ERROR, Level.WARNING))
    assert errors.recall == wilson(0.5, 3)
    assert warnings.recall == wilson(2.5 / 3, 3)
    assert errors.precision == wilson(1.5 / 2.5, 2.5)
    assert errors.false_alarms["all"] == wilson(0.5, 2)
    assert [errors.false_alarms[kind].share for kind in ("fixed", "normal")] == [1.0, 0.0]
    assert errors.false_alarms["clean"].units == 0


def test_failing_never_helps() -> None:
    """A bug that a tool failed on is missed; a sound program that it failed on is no proof of silence."""
    failed = [
        replace(says(known(name, verdict)), status="failed")
        for name, verdict in (("a", "buggy"), ("n", "clean"))
    ]
    found = detection([*failed, says(known("b"), "loss")], Level.ERROR)
    assert found.recall == wilson(0.5, 2)
    assert found.false_alarms["all"].units == 0


def test_localization_by_hand() -> None:
    answers = [
        says(known("first"), "loss", "input"),
        says(known("third"), "input", "batch", "loss"),
        says(known("fourth"), "input", "batch", "epochs", "loss"),
        says(known("silent")),
    ]
    found = localization(answers)
    assert [first_hit(answer) for answer in answers] == [1, 3, 4, 0]
    assert found.first == wilson(1 / 4, 4)
    assert found.three == wilson(2 / 4, 4)
    assert found.reciprocal.share == pytest.approx((1 + 1 / 3 + 1 / 4) / 4)
    assert found.rank == 3
    assert found.labelled.share == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 3)
    assert found.named == pytest.approx((2 + 3 + 4) / 4)


def test_notes_blame_nothing() -> None:
    answer = says(known("a"), "loss", level=Level.NOTE)
    assert not answer.alarm(Level.WARNING)
    assert first_hit(answer) == 0


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1), st.integers(2, 4))
def test_more_variants_of_the_same_programs_change_nothing(
    programs: list[tuple[int, bool]], times: int
) -> None:
    answers = [says(known(f"{group}", group=f"{group}"), *["loss"] * hit) for group, hit in programs]
    once, often = detection(answers, Level.ERROR), detection(answers * times, Level.ERROR)
    assert often.recall.share == pytest.approx(once.recall.share)
    assert often.recall.units == once.recall.units == len({group for group, _ in programs})


@pytest.mark.parametrize(
    ("faults", "injected", "located", "visible"),
    [
        (("wrong_loss",), "", True, True),
        (("wrong_epochs",), "", True, False),
        (("wrong_epochs", "wrong_loss"), "", True, True),
        (("wrong_loss",), "inference", True, False),
        (("dying_relu",), "", False, False),
    ],
    ids=["loss", "epochs", "epochs and loss", "inference", "symptom"],
)
def test_which_faults_are_visible(
    faults: tuple[str, ...], injected: str, located: bool, visible: bool
) -> None:
    case = known("a", faults=faults, injected=injected)
    assert (case.located, case.visible, case.symptomatic) == (located, visible, faults == ("dying_relu",))


def test_a_peer_says_each_kind_once_and_the_worst_first() -> None:
    found = [("dead", Level.WARNING, "layer 1"), ("flow", Level.NOTE, "2"), ("dead", Level.ERROR, "layer 3")]
    told = claims(found, {"dead": ("activation",), "flow": ("depth",)})
    assert [(claim.rule, claim.level, claim.sentence) for claim in told] == [
        ("dead", Level.ERROR, "layer 3"),
        ("flow", Level.NOTE, "2"),
    ]


def test_the_extractors_own_rules_are_never_read(cases: Path) -> None:
    class Guarded(dict[str, Any]):
        def __getitem__(self, key: str) -> Any:
            assert key != "static_contradictions"
            return super().__getitem__(key)

        def get(self, key: str, default: Any = None) -> Any:
            assert key != "static_contradictions"
            return super().get(key, default)

    assert truth(Guarded(row("a")), builder(cases)).parts == ("initialization",)


def test_batches_are_the_programs_own(cases: Path) -> None:
    """40 rows in batches of 13 leave one over, which is left out; each epoch is shuffled anew."""
    case = builder(cases).build(row("a"), 0, None)
    object.__setattr__(case, "batch_size", 13)
    drawn = draw(case, 6, seed=0)
    assert [len(x) for x, _ in drawn] == [13] * 6
    rows = torch.cat([x for x, _ in drawn[:3]])
    assert len(rows.unique(dim=0)) == 39
    assert not torch.equal(rows, torch.cat([x for x, _ in drawn[3:]]))
    assert torch.equal(next(batches(case, 0))[0], drawn[0][0])


@pytest.mark.parametrize(
    ("name", "status", "problem", "limit"),
    [
        ("refuse", "not built", "no optimizer recorded", 60),
        ("sleep", "failed", "too slow: more than 0.5 s", 0.5),
        ("die", "failed", "its process died (exit code 3)", 60),
        ("penalize", "ran", "", 60),
    ],
)
def test_what_cannot_run_is_told(cases: Path, name: str, status: str, problem: str, limit: float) -> None:
    ((line, found),) = select(cases, ids=[name])
    answer = run_one(Job(line, found, cases, "gradmend"), limit)
    assert (answer.status, answer.problem) == (status, problem)
    assert answer.own_step == (name == "penalize")


def test_from_cases_to_tables_and_back(cases: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = cases.with_name("out.jsonl")
    chosen = ["--split", "dev", "--ids", "equal", "sound", "--tools", "gradmend", "--out", str(out)]
    command.main(["--cases", str(cases), *chosen, "--list"])
    printed = capsys.readouterr().out
    answers = read([out])
    assert [(a.truth.id, a.status, a.alarm(Level.ERROR)) for a in answers] == [
        ("equal", "ran", True),
        ("sound", "ran", False),
    ]
    assert first_hit(answers[0]) == 1
    assert all(a.seconds > 0 and a.step_seconds > 0 and a.stand_in for a in answers)
    command.main(["--from", str(out), "--list"])
    assert capsys.readouterr().out == printed
    failed = replace(answers[1], status="failed", problem="too slow", claims=())
    out.write_text(to_line(answers[0]) + to_line(failed))
    command.main(["--cases", str(cases), *chosen, "--resume"])
    resumed = read([out])
    assert resumed[0] == answers[0]
    assert [(a.truth.id, a.status) for a in resumed] == [("equal", "ran"), ("sound", "ran")]
    assert "dev: detection" in printed
    assert "test: detection" not in printed


def test_unlabelled_cases_and_the_other_side_are_left_out(cases: Path) -> None:
    assert [found.id for _, found in select(cases, "test")] == ["other"]
    assert "unknown" not in [found.id for _, found in select(cases)]
    with pytest.raises(SystemExit, match="There is no case nowhere"):
        select(cases, ids=["nowhere"])


def test_answers_survive_their_file(tmp_path: Path) -> None:
    answer = replace(says(known("a", published={"UMLAUT": {"detected": True}}), "loss"), seconds=1.5)
    path = tmp_path / "out.jsonl"
    path.write_text(to_line(answer))
    assert read([path, path]) == [answer, answer]


def test_what_was_missed_and_falsely_found_is_listed() -> None:
    answers = [says(known("right"), "loss"), says(known("missed")), says(known("f", "fixed"), "batch")]
    lines = "\n".join(mistakes(answers))
    assert "right" not in lines
    assert "missed  missed\n    labelled: loss  (wrong_loss)" in lines
    assert "f  false alarm (fixed)" in lines
    assert "error   batch [batch]" in lines


def test_a_peer_is_shown_with_and_without_its_rules_of_activations() -> None:
    case = known("a")
    told = tuple(Claim(rule, Level.ERROR, ("activation",)) for rule in ("saturation: x", "update_ratio: y"))
    shown = views([Answer(case, "torchmortem", "ran", claims=told), Answer(case, "gradmend", "not built")])
    assert [len(view.answers[0].claims) for view in shown] == [2, 1]
    (guess,) = guesses(shown)
    assert guess.answers[0].alarm(Level.ERROR)


PUBLISHED = {
    "UMLAUT": {"detected": False, "seconds": 1.0},
    "deepmufl": {"detected_any_config": True, "seconds_100pct": 2.0},
    "DeepDiagnosis_Table6": {
        "bug_identified": {"UMLAUT": None, "DeepLocalize": True},
        "fault_localised": {"UMLAUT": None, "DeepLocalize": False},
    },
    "DeepFD_Evaluation.xlsx": {
        "fault_detected": {"DeepFD": 1},
        "fault_type_diagnosed": {"DeepFD": 0},
        "deepfd_output": "lr",
    },
    "FL_study(x)": {"id": "D", "GT": "ACH(2), HLR", "DeepFD": "OCH, HLR", "UMLAUT": "-", "NeuraLint": "N/A"},
}


def test_published_figures() -> None:
    assert verdicts(PUBLISHED) == {
        ("deepmufl", "UMLAUT"): (False, None),
        ("deepmufl", "deepmufl"): (True, None),
        ("DeepDiagnosis", "UMLAUT"): (None, None),
        ("DeepDiagnosis", "DeepLocalize"): (True, False),
        ("DeepFD", "DeepFD"): (True, False),
        ("study", "DeepFD"): (True, True),
        ("study", "UMLAUT"): (False, False),
    }
    two = [says(known(name, published=PUBLISHED), tool=tool) for name in "ab" for tool in ("gradmend", "x")]
    found = {(figure.source, figure.tool): figure for figure in figures(two)}
    assert found["study", "DeepFD"].cases == 2
    assert found["study", "DeepFD"].noticed == wilson(1.0, 2)
    assert found["DeepDiagnosis", "UMLAUT"].cases == 0
