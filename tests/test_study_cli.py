"""`gradmend study` as users meet it: what it prints, leaves behind, and goes on with."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gradmend.cli import main
from gradmend.study.store import read_study
from studies import wait_for_trials

STUDY = """
question = "Does the activation matter?"
setups = "deep"
seeds = 3
steps = 30
batch_size = 16
data = "rows.csv:y"

[settings]
depth = 2
width = 8

[factors]
activation = ["relu", "tanh"]
"""
OWN = """
setups = { mine = { target = "net.py:make" } }
seeds = 2
epochs = 1
data = "rows.csv:y"

[factors]
learning_rate = [0.1, 0.01]
"""
NET = """
import torch
from torch import nn
import gradmend as gm

def make():
    return gm.Setup(nn.Linear(2, 3), nn.CrossEntropyLoss(), lambda p: torch.optim.SGD(p, lr=0.1))
"""
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, own_folder: None) -> None:
    """A folder with studies and their data."""
    (tmp_path / "small.toml").write_text(STUDY)
    (tmp_path / "own.toml").write_text(OWN)
    (tmp_path / "net.py").write_text(NET)
    lines = [f"{(i * 7) % 11 / 11},{(i * 5) % 13 / 13 + i % 3},{'abc'[i % 3]}" for i in range(150)]
    (tmp_path / "rows.csv").write_text("\n".join(["a,b,y", *lines]))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(["study", *(str(argument) for argument in arguments)])
        assert isinstance(stop.value.code, int)
        return stop.value.code, *capsys.readouterr()

    return run


def test_it_prints_a_recommendation_and_leaves_a_journal(run: Run, tmp_path: Path) -> None:
    code, out, err = run("small.toml")
    assert code == 0
    assert "Does the activation matter?" in out
    assert "2 arms, 3 seeds, 6 trials: 6 done" in out
    assert "The trials are in small.gradmend." in out
    assert "6 of 6 trials" in err
    assert max(map(len, out.splitlines())) <= 80
    assert len(read_study("small.gradmend").outcomes) == 6


def test_a_report_is_one_page_with_pictures(run: Run) -> None:
    run("small.toml", "--report", "small.html")
    page = Path("small.html").read_text()
    assert "Does the activation matter?" in page
    assert "Gradients of the layers, before the first step" in page
    assert not re.search(r'<(script|link|img)[^>]+(src|href)=(?!"data:)', page), "it must need nothing else"


def test_json_is_one_object_and_options_change_the_study(run: Run) -> None:
    code, out, err = run("small.toml", "--seeds", 2, "--journal", "other.gradmend", "--json")
    results = json.loads(out)
    assert code == 0
    assert err == ""
    assert len(results["trials"]) == 4
    assert len(read_study("other.gradmend").outcomes) == 4
    assert not Path("small.gradmend").exists()


def test_more_seeds_add_trials(run: Run) -> None:
    run("small.toml", "--seeds", 1)
    _, out, _ = run("small.toml", "--seeds", 2)
    assert "4 trials: 4 done" in out


def test_other_data_has_another_journal(run: Run) -> None:
    assert run("small.toml", "--seeds", 1)[0] == 0
    assert run("small.toml", "--seeds", 1, "--data", "digits")[0] == 0
    assert sorted(path.name for path in Path().glob("*.gradmend")) == [
        "small-digits.gradmend",
        "small.gradmend",
    ]


def test_setups_of_the_users_own(run: Run) -> None:
    code, out, _ = run("own.toml")
    assert code == 0
    assert "4 trials: 4 done" in out
    first, second = (
        o.losses[0] for o in read_study("own.gradmend").outcomes.values() if o.arm["learning_rate"] == "0.1"
    )
    assert first != second


def test_the_shipped_studies_are_listed(run: Run) -> None:
    code, out, _ = run()
    assert code == 0
    assert "activations" in out
    assert {"depth", "activations"} <= {study["name"] for study in json.loads(run("--json")[1])["studies"]}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("epochs = 2\n", "not both"),
        ("sedes = 2\n", "Did you mean 'seeds'"),
        ('data = "nowhere.csv:y"\n', "nowhere.csv"),
    ],
)
def test_a_wrong_file_is_told(run: Run, text: str, told: str) -> None:
    Path("wrong.toml").write_text(
        text + STUDY.replace('data = "rows.csv:y"\n', "" if "data" in text else "#")
    )
    code, out, err = run("wrong.toml")
    assert (code, out) == (2, "")
    assert told in err
    assert not Path("wrong.gradmend").exists()


def test_a_contradiction_is_told(run: Run) -> None:
    run("small.toml", "--seeds", 1)
    Path("small.toml").write_text(STUDY.replace("steps = 30", "steps = 31"))
    code, out, err = run("small.toml", "--seeds", 1)
    assert (code, out) == (2, "")
    assert "steps was 30, is 31" in err
    assert "name another journal" in err


def test_ctrl_c_shows_what_is_finished_and_the_same_command_goes_on(run: Run, tmp_path: Path) -> None:
    Path("small.toml").write_text(STUDY.replace("steps = 30", "steps = 800"))
    command = [sys.executable, "-m", "gradmend", "study", "small.toml"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        wait_for_trials(Path("small.gradmend"), lambda: child.poll() is None)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate()
    assert child.returncode == 130
    count = len(read_study("small.gradmend").outcomes)
    assert 0 < count < 6
    assert f"Stopped: {count} of 6 trials are in small.gradmend." in out
    assert "Traceback" not in err
    assert "6 trials: 6 done" in run("small.toml")[1]
