"""The page of a training, and `gradmend run --report`."""

import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from browsing import opened, seen, violations
from gradmend.journal import Journal
from gradmend.recorded import read_recorded
from gradmend.report.page import render
from gradmend.report.parts import Card
from gradmend.report.run import run_page
from recordings import HOSTILE, begun, falling, found, recorded, steps
from running import plain, script, theirs, watched
from studies import small

if TYPE_CHECKING:
    from playwright.sync_api import Browser

TRAINING = """
import sys, torch
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(40):
    x = torch.randn(16, 8)
    optimizer.zero_grad()
    loss = (model(x) - x[:, :1]).square().mean()
    loss.backward()
    optimizer.step()
    if step == 30:
        WHAT_HAPPENS
    print(step, loss.item(), flush=True)
"""


@pytest.mark.parametrize(
    ("findings", "verdict", "tone"),
    [
        ([], "Nothing wrong was found in 30 steps.", "good"),
        ([{"began": 7}], "This training went wrong from step 7 on: dead units.", "error"),
        (
            [{"began": 7, "severity": "warning"}],
            "A warning lasted to the end of 30 steps: dead units.",
            "warning",
        ),
        (
            [{"began": 7, "ended": 9}],
            "Nothing lasted to the end of 30 steps; what has passed: dead units.",
            "good",
        ),
    ],
)
def test_the_verdict(tmp_path: Path, findings: list[dict[str, Any]], verdict: str, tone: str) -> None:
    page = run_page(recorded(tmp_path / "run.gradmend", "python train.py", 30, *findings))
    assert (page.verdict, page.tone) == (verdict, tone)
    cards = [part for section in page.sections for part in section.parts if isinstance(part, Card)]
    assert [card.head for card in cards] == ["dead units"] * len(findings)


def test_several_runs_and_journals(tmp_path: Path) -> None:
    recorded(tmp_path / "a.gradmend", "python one.py")
    recorded(tmp_path / "a.gradmend", "python two.py", 40, {"began": 3})
    page = run_page([recorded(tmp_path / "b.gradmend", "python three.py"), Journal(tmp_path / "a.gradmend")])
    assert (page.verdict, page.tone) == ("1 of 3 runs went wrong: dead units.", "error")
    assert page.title == "b.gradmend, a.gradmend"
    titles = [section.title for section in page.sections]
    assert titles[0] == "Side by side"
    assert [title for title in titles if title.startswith("What was found")] == [
        "What was found: python two.py",
        "What was found: python one.py",
        "What was found: python three.py",
    ]


def test_an_empty_journal_and_one_still_written(tmp_path: Path) -> None:
    recording = begun(tmp_path / "run.gradmend")
    assert run_page(Journal(tmp_path / "run.gradmend")).verdict == "No step of a training is recorded here."
    steps(recording.sink("Net"), falling(20))
    time.sleep(1.0)  # the journal is written four times a second
    page = run_page(Journal(tmp_path / "run.gradmend"))
    recording.close()
    assert page.verdict == "Nothing wrong was found in 20 steps."
    assert "A run that has not ended is shown as far as it came." in page.notes


def test_a_journal_of_a_study_says_so(tmp_path: Path) -> None:
    small(seeds=range(1), epochs=1).run(tmp_path / "small.gradmend", progress=False)
    page = run_page(Journal(tmp_path / "small.gradmend"))
    assert page.verdict == "No step of a training is recorded here."
    (section,) = page.sections
    told = "The study small is recorded here. `gradmend view small.gradmend` shows its results."
    assert section.parts == (told,)


def test_figures_of_what_is_recorded(tmp_path: Path) -> None:
    held = read_recorded(recorded(tmp_path / "run.gradmend"))
    assert list(held.figures()) == ["course", "gradient", "signal", "step", "weights"]
    np.testing.assert_allclose(held.figures()["course"].data[0].y, falling(30))
    gradient = held.runs[0].models[0].figures()["gradient"].data[0]
    np.testing.assert_allclose(gradient.z[:, 0], [-6, -3, 0], atol=1e-5)
    assert "curves" not in held.to_dict()["runs"][0]["models"][0]


@pytest.mark.parametrize("dark", [False, True])
def test_the_page_in_a_browser(tmp_path: Path, browser: "Browser", dark: bool) -> None:
    """Hostile names, NaN-only losses and several runs; nothing is asked outside, nothing complains."""
    recorded(tmp_path / "run.gradmend", "python train.py", 700, {"began": 20}, {"began": 50, "ended": 60})
    with begun(tmp_path / "run.gradmend", HOSTILE) as recording:
        sink = recording.sink(HOSTILE)
        steps(sink, [math.nan] * 20, layers=(HOSTILE, "a.b"))
        found(sink, 1, sentence=HOSTILE, sites=(HOSTILE,), where=(HOSTILE,), evidence=(HOSTILE,))
    page = tmp_path / "out.html"
    page.write_text(render(run_page(Journal(tmp_path / "run.gradmend"))), encoding="utf-8")
    assert page.stat().st_size < 6_000_000
    with opened(browser, page, dark=dark) as shown:
        seen(shown)
        assert shown.locator("h1 + .verdict").inner_text() == "2 of 2 runs went wrong: dead units."
        assert shown.get_by_text("NaN from step 1").count()
        assert not violations(shown)


def report(folder: Path, code: str, *more: str) -> subprocess.CompletedProcess[str]:
    file = script(folder, TRAINING.replace("WHAT_HAPPENS", code))
    return plain(["-m", "gradmend", "run", "--report", "out.html", *more, file], cwd=folder)


def test_run_writes_a_report_and_changes_nothing_else(tmp_path: Path) -> None:
    before = set(Path(os.environ.get("TMPDIR", "/tmp")).glob("gradmend-*"))
    done = report(tmp_path, "pass", "--lang", "zh")
    alone = plain([str(tmp_path / "train.py")], cwd=tmp_path)
    assert (done.stdout, done.returncode, theirs(done)) == (alone.stdout, 0, alone.stderr)
    page = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert 'lang="zh' in page
    assert str(tmp_path / "out.html") in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.html", "train.py"]
    assert set(Path(os.environ.get("TMPDIR", "/tmp")).glob("gradmend-*")) <= before


def test_a_script_that_fails_has_its_report(tmp_path: Path) -> None:
    done = report(tmp_path, "raise ValueError('gone')", "--journal", "run.gradmend")
    alone = plain([str(tmp_path / "train.py")], cwd=tmp_path)
    assert (done.stdout, done.returncode) == (alone.stdout, alone.returncode)
    assert theirs(done) == alone.stderr
    assert "in 31 steps" in (tmp_path / "out.html").read_text(encoding="utf-8")
    assert len(Journal(tmp_path / "run.gradmend").runs()) == 1


def test_ctrl_c_still_writes_the_report(tmp_path: Path) -> None:
    file = script(
        tmp_path, TRAINING.replace("WHAT_HAPPENS", "import time; print('now', flush=True); time.sleep(60)")
    )
    command = [sys.executable, "-m", "gradmend", "run", "--report", "out.html", file]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        assert any("now" in line for line in run.stdout)
        run.send_signal(signal.SIGINT)
        _, said = run.communicate(timeout=100)
    assert run.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in said
    assert "in 31 steps" in (tmp_path / "out.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("place", ["theirs.html", "none/out.html", "."])
def test_a_place_that_is_not_free_is_refused_before_the_script_starts(tmp_path: Path, place: str) -> None:
    (tmp_path / "theirs.html").write_text("<p>mine</p>")
    file = script(tmp_path, "print('started')")
    done = watched(["--report", str(tmp_path / place), file])
    assert (done.returncode, done.stdout) == (2, "")
    assert (tmp_path / "theirs.html").read_text() == "<p>mine</p>"


def test_a_language_that_there_is_not(tmp_path: Path) -> None:
    done = watched(
        ["--report", str(tmp_path / "out.html"), "--lang", "xx", script(tmp_path, "print('started')")]
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert re.search("There is no language 'xx'", done.stderr)
