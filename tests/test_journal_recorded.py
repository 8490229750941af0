"""What `gradmend check run.gradmend` says, and `gradmend export`."""

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from gradmend.acts import Act
from gradmend.causes import Cause
from gradmend.cli import main
from gradmend.diagnosis import Severity
from gradmend.journal import Journal
from gradmend.recorded import read_recorded

FOUND = {
    "cause": "vanishing_gradient",
    "severity": "error",
    "sentence": "Over 31 layers the gradient shrinks by 26 decades.",
    "sites": ("0", "2"),
    "where": ("train.py:5",),
    "measured": -26.0,
    "expected": 0.0,
    "unit": "log10 of |first|/|last|",
    "evidence": ("Without the sigmoids it is gone.",),
}


ACT = {"before": None, "after": 1.5}


def record(path: Path, *findings: dict[str, Any], name: str = "") -> None:
    with Journal(path).run(name, "python train.py") as recording:
        sink = recording.sink("Net")
        for step, loss in enumerate((2.5, 2.25, None), start=1):
            sink.write("step", step, {"loss": loss})
        for number, finding in enumerate(findings):
            sink.write("finding", 1, {"id": number, "began": 1, "ended": None, **FOUND, **finding})
        sink.write("act", 2, {"cause": "vanishing_gradient", "text": "Clipped.", "unit": "norm", **ACT})
        sink.write("note", 3, {"text": "Something was compiled."})


def checked(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return int(str(ended.value.code)), capsys.readouterr().out


def test_check_shows_what_was_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.gradmend"
    record(path, {}, {"severity": "warning", "ended": 2})
    code, said = checked(capsys, "check", str(path))
    assert code == 1
    for text in ("python train.py", "Net, 3 steps, loss 2.5 to 2.25", "from step 1 to the end", "train.py:5"):
        assert text in said
    for text in (
        "from step 1 to step 2",
        "Without the sigmoids it is gone.",
        "step 2: Clipped.",
        "Something was compiled.",
    ):
        assert text in said


def test_an_act_comes_back_as_it_was(tmp_path: Path) -> None:
    record(tmp_path / "run.gradmend", {})
    (model,) = read_recorded(Journal(tmp_path / "run.gradmend")).runs[0].models
    assert model.acts == (Act(2, Cause.VANISHING_GRADIENT, "Clipped.", None, 1.5, "norm"),)


def test_a_journal_without_a_table_of_acts_is_read(tmp_path: Path) -> None:
    path = tmp_path / "run.gradmend"
    record(path, {})
    with sqlite3.connect(path) as connection:
        connection.execute("DROP TABLE act")
    assert read_recorded(Journal(path)).runs[0].models[0].acts == ()
    record(path, {})
    assert len(read_recorded(Journal(path)).runs[1].models[0].acts) == 1


def test_a_finding_comes_back_as_it_was(tmp_path: Path) -> None:
    record(tmp_path / "run.gradmend", {})
    (model,) = read_recorded(Journal(tmp_path / "run.gradmend")).runs[0].models
    finding = model.findings[0].finding
    assert (finding.cause, finding.severity) == (Cause.VANISHING_GRADIENT, Severity.ERROR)
    assert (finding.measured, finding.where, finding.evidence) == (-26.0, ("train.py:5",), FOUND["evidence"])


@pytest.mark.parametrize("finding", [None, {"ended": 2}, {"severity": "warning"}])
def test_what_has_passed_and_warnings_are_healthy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], finding: dict[str, Any] | None
) -> None:
    record(tmp_path / "run.gradmend", *([] if finding is None else [finding]))
    code, said = checked(capsys, "check", str(tmp_path / "run.gradmend"))
    assert code == 0
    assert "Nothing found that lasted." in said


def test_the_newest_run_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.gradmend"
    record(path, {}, name="ill")
    record(path, name="mended")
    code, said = checked(capsys, "check", str(path), "--json")
    told = json.loads(said)
    assert (code, told["healthy"]) == (0, True)
    assert [run["name"] for run in told["runs"]] == ["ill", "mended"]
    assert told["runs"][0]["models"][0]["findings"][0]["finding"]["cause"] == "vanishing_gradient"


def test_a_run_that_was_killed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.gradmend"
    recording = Journal(path).run("killed")
    code, said = checked(capsys, "check", str(path))
    recording.close()
    assert code == 0
    assert "killed, or still running" in said


def test_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path / "run.gradmend", {})
    code, said = checked(capsys, "export", str(tmp_path / "run.gradmend"), str(tmp_path / "out"))
    assert code == 0
    assert [Path(line).name for line in said.split()] == [
        *("runs.csv", "steps.csv", "readings.csv", "findings.csv", "acts.csv", "notes.csv")
    ]
    assert all(Path(line).is_file() for line in said.split())


def test_no_journal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["check", str(tmp_path / "none.gradmend")])
    assert ended.value.code == 2
    assert "There is no journal" in capsys.readouterr().err
