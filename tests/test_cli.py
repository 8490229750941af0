"""The command line as users meet it: what it prints, its exit codes, and what it leaves alone."""

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

import gradmend
from gradmend.causes import Cause
from gradmend.cli import main, mend
from gradmend.remedies.card import cards
from gradmend.setup import Budget

HEALTHY, ILL, BAD_INPUT = 0, 1, 2
NET = """
import torch
from torch import nn
import torch.nn.functional as F
import gradmend as gm

print("the user's file prints")
torch.manual_seed(0)
x, y = torch.randn(96, 4), torch.arange(96) % 3
x[:, 0] += y
batch = (x, y)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 16)
        self.out = nn.Linear(16, 3)
    def forward(self, x):
        return self.out(F.relu(self.inner(x)))

class Ill(Net):
    def forward(self, x):
        x = super().forward(x)
        return torch.softmax(x if x.sum() < 1e9 else x / 2, 1)

layers = [nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3)]
squashed = nn.Sequential(*layers, nn.Softmax(1))
slow = gm.Setup(nn.Sequential(*layers), nn.CrossEntropyLoss(), lambda p: torch.optim.SGD(p, lr=1e-9))
"""
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, own_folder: None) -> None:
    """A folder with `net.py`."""
    (tmp_path / "net.py").write_text(NET)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        assert isinstance(stop.value.code, int)
        return stop.value.code, *capsys.readouterr()

    return run


def process(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "gradmend", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "80"}
    )


# check, mend, train


def test_check_exits_0_when_healthy_and_1_with_findings(run: Run) -> None:
    code, out, err = run("check", "net.py:Net")
    assert (code, out.splitlines()[-1]) == (HEALTHY, "Healthy: nothing found.")
    assert "loss CrossEntropyLoss (assumed: the targets are class numbers)" in err
    code, out, _ = run("check", "net.py:Ill")
    assert code == ILL
    assert "error   softmax before logits loss" in out
    assert "net.py:24" in out
    assert out.splitlines()[-1] == "To mend it: gradmend mend net.py:Ill"


def test_check_a_recipe(run: Run) -> None:
    code, out, _ = run("check", "deep")
    assert code == ILL
    assert "This setup will hardly train: contracting activation." in out


def test_mend_exits_0_when_mended_and_prints_the_code(run: Run) -> None:
    code, out, _ = run("mend", "net.py:squashed", "--optimizer", "Adam:0.01", "--steps", 40)
    assert code == HEALTHY
    assert "Mended by: raw scores to the loss (no softmax or sigmoid before it)." in out
    assert 'model.set_submodule("3", nn.Identity())' in out
    assert out.index("softmax before logits loss") < out.index("In your own code") < out.index("Mended by")


def test_mend_exits_1_when_part_is_left_to_the_user(run: Run) -> None:
    code, out, _ = run("mend", "net.py:Ill", "--steps", 20)
    assert code == ILL
    assert "net.py:24: Remove the softmax from the model" in out


def test_mend_leaves_a_healthy_setup_alone(run: Run) -> None:
    code, out, _ = run("mend", "net.py:Net")
    assert code == HEALTHY
    assert out.splitlines()[-1] == "This setup is healthy; nothing was changed."


def test_mend_of_a_setup_with_a_function_for_its_optimizer(run: Run) -> None:
    code, out, _ = run("mend", "net.py:slow", "--steps", 40)
    assert code == HEALTHY
    assert "Mended by: " in out


def test_train_prints_the_test_accuracy(run: Run) -> None:
    code, out, _ = run("train", "mnist", "--data", "digits", "--epochs", 3, "--device", "cpu")
    assert code == HEALTHY
    accuracy = float(out.split("test accuracy  ")[1].split("%")[0])
    assert accuracy > 90


def test_train_a_users_file_and_exit_1_when_it_diverges(run: Run) -> None:
    assert run("train", "net.py:Net", "--epochs", 2)[0] == HEALTHY
    code, out, _ = run("train", "net.py:Net", "--optimizer", "SGD:1e30", "--epochs", 9)
    assert code == ILL
    assert "diverged" in out


def test_train_a_very_deep_network_of_a_given_size(run: Run) -> None:
    arguments = (
        "train",
        "very-deep",
        "--depth",
        100,
        "--width",
        32,
        "--epochs",
        5,
        "--device",
        "cpu",
        "--json",
    )
    code, out, _ = run(*arguments)
    assert code == HEALTHY
    assert strict(out)["steps"] == 5 * 23
    assert strict(out)["test_accuracy"] > 0.85


def test_the_planned_steps_are_judged_if_they_are_told(run: Run) -> None:
    few = ("net.py:slow", "--optimizer", "SGD:0.001", "--planned-steps", 5)
    assert "too few steps" in run("check", *few)[1]
    assert "too few steps" not in run("check", *few[:-2])[1]
    out = run("mend", *few, "--steps", 5, "--trials", 1)[1]
    assert "too few steps" in out


def test_the_budget_of_mend_is_that_of_the_library(run: Run) -> None:
    usual = {p.name: p.default for p in inspect.signature(Budget).parameters.values()}
    given = inspect.signature(mend).parameters
    assert {name: given[name].default for name in usual} == usual
    _, out, _ = run("mend", "net.py:squashed", "--trials", 1, "--seconds", 60, "--steps", 10, "--json")
    assert len(strict(out)["trials"]) == 1


def strict(text: str) -> Any:
    """One JSON object and nothing else, without NaN."""
    assert len(text.splitlines()) == 1
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_json_is_one_object_also_when_the_users_file_prints(run: Run) -> None:
    code, out, err = run("check", "net.py:Ill", "--json")
    assert (code, strict(out)["healthy"]) == (ILL, False)
    assert "the user's file prints" in err
    code, out, _ = run("mend", "net.py:squashed", "--optimizer", "Adam:0.01", "--steps", 20, "--json")
    assert (code, strict(out)["mended"]) == (HEALTHY, True)
    code, out, _ = run("mend", "net.py:Net", "--json")
    assert (code, strict(out)["verdict"]) == (HEALTHY, "This setup is healthy; nothing was changed.")
    code, out, _ = run("train", "net.py:Net", "--optimizer", "SGD:1e30", "--json")
    assert (code, strict(out)["diverged"]) == (ILL, True)
    assert len(strict(run("explain", "--json")[1])["causes"]) == len(Cause)
    assert strict(run("explain", "dead units", "--json")[1])["cause"] == "dead units"
    code, out, _ = run("check", "net.py:No", "--json")
    assert (code, out) == (BAD_INPUT, "")


def test_no_line_is_wider_than_80_columns(run: Run) -> None:
    for arguments in (("check", "net.py:Ill"), ("mend", "net.py:squashed", "--steps", 20), ("explain",)):
        _, out, _ = run(*arguments)
        before, _, code_and_after = out.partition("In your own code:")
        text = before + code_and_after.rpartition("\ntrial ")[2]  # code is as long as it is
        assert max(len(line) for line in text.splitlines()) <= 80


def test_the_users_files_stay_as_they_are(run: Run, tmp_path: Path) -> None:
    for command in ("check", "mend", "train"):
        run(command, "net.py:squashed")
    assert [path.name for path in tmp_path.iterdir()] == ["net.py"]
    assert (tmp_path / "net.py").read_text() == NET


# explain


@pytest.mark.parametrize("cause", list(Cause), ids=[cause.title for cause in Cause])
def test_every_cause_is_explained(run: Run, cause: Cause) -> None:
    code, out, _ = run("explain", cause.title)
    words = " ".join(out.split())
    assert code == HEALTHY
    for text in (cause.sentence, cause.illness.why, cause.illness.signs, cause.illness.cure):
        assert " ".join(text.split()) in words
    assert (
        run("explain", cause.name.lower()) == run("explain", cause.title.replace(" ", "-")) == (code, out, "")
    )
    assert cause.title in run("explain")[1]


CARDS = {card.name: card for card in cards()}


@pytest.mark.parametrize("name", CARDS)
def test_every_remedy_is_explained(run: Run, name: str) -> None:
    code, out, _ = run("explain", name)
    words = " ".join(out.split())
    assert code == HEALTHY
    for text in (CARDS[name].what, CARDS[name].about, CARDS[name].source, *CARDS[name].treats):
        assert " ".join(text.split()) in words
    assert run("explain", name.upper()) == (code, out, "")


def test_remedies_are_found_however_their_names_are_written(run: Run) -> None:
    assert run("explain", "clip norm") == run("explain", "ClipNorm") == run("explain", "clip-norm")
    assert strict(run("explain", "use_schedule", "--json")[1])["remedy"] == "UseSchedule"
    out = run("explain")[1]
    assert all(f"{name} " in out for name in CARDS)
    assert [r["remedy"] for r in strict(run("explain", "--json")[1])["remedies"]] == [*CARDS]


# In a process of its own


def test_help_and_import_do_not_load_torch() -> None:
    text = "import sys, gradmend.cli; gradmend.cli.main(['--help'])"
    watch = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules))\n"
    for code in (text, "import gradmend, gradmend.cli"):
        done = subprocess.run(
            [sys.executable, "-c", watch + code], capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[-1] == "False"


def test_help_names_every_command() -> None:
    done = process("--help")
    assert done.returncode == 0
    for command in ("check", "mend", "train", "explain", "demo"):
        assert f"  {command} " in done.stdout


def test_a_process_checks_a_file_with_a_neighbour(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("width = 8")
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "near.py").write_text("classes = 3")
    (folder / "other.py").write_text(f"import helper, near\n{NET}")
    done = process("check", "models/other.py:Ill", "--json")
    assert (done.returncode, strict(done.stdout)["healthy"]) == (ILL, False)
    done = process("check", "models/other.py:No")
    assert (done.returncode, done.stdout) == (BAD_INPUT, "the user's file prints\n")
    wanted = "models/other.py has no 'No'. Possible: Ill, Net, slow, squashed."
    assert done.stderr.strip() == f"gradmend: {wanted}"


# Bad input


MORE = """
class Crash(Net):
    def forward(self, x):
        return undefined

class Crashing(torch.utils.data.Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, index):
        raise KeyError("no such row")

class Cut(Net):
    def forward(self, x):
        return super().forward(x).detach()

def frozen():
    return Net().requires_grad_(False)

def normed():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))

crashing = torch.utils.data.DataLoader(Crashing())
wide = (torch.randn(96, 5), y)
none = (torch.randn(0, 4), torch.arange(0))
short = (x, y[:50])
numbers = (torch.arange(384).reshape(96, 4), y)
many = (x, y + 5)
one = (x[:1], y[:1])
holes = (x.masked_fill(x > 2, float("nan")), y)
three = (x, y, y)
"""

BAD: dict[str, tuple[tuple[str, ...], str]] = {
    "no file": (("nett.py:Net",), "There is no file 'nett.py'. Did you mean 'net.py'?"),
    "no name": (("net.py",), "Which model of net.py? Type net.py:NAME."),
    "unknown recipe": (("deeep",), "neither `file.py:name` nor a shipped recipe. Did you mean 'deep'?"),
    "unknown data": (("--data", "mnits"), "no data called 'mnits'. Did you mean 'mnist'?"),
    "unknown loss": (("--loss", "mes"), "There is no loss 'mes'. Did you mean 'mse'?"),
    "unknown device": (("net.py:Net", "--device", "tpu"), "There is no device 'tpu'."),
    "unknown option": (("net.py:Net", "--optimiser", "SGD"), "No such option: --optimiser"),
    "wide input": (("--data", "net.py:wide"), "The model Net cannot take the input (float32 [96, 5])"),
    "no rows": (("--data", "net.py:none"), "no rows"),
    "fewer targets": (("--data", "net.py:short"), "The batch has 96 rows of inputs, but 50 of targets."),
    "integers": (
        ("--data", "net.py:numbers"),
        "The input holds integers. Layers other than embeddings",
    ),
    "classes": (
        ("--data", "net.py:many"),
        "The loss CrossEntropyLoss cannot compare the output",
    ),
    "one row": (("net.py:normed", "--data", "net.py:one"), "cannot train on a batch with a single row"),
    "NaN": (("--data", "net.py:holes"), "NaN or infinite, the first in row"),
    "two inputs": (("--data", "net.py:three"), "The model Net cannot take the input"),
    "wrong loss": (("--loss", "bce_with_logits"), "The loss BCEWithLogitsLoss cannot compare the output"),
    "cut": (("net.py:Cut",), "The loss does not depend on any parameter."),
    "frozen": (("net.py:frozen",), "All 4 parameters of Net are frozen. Call `model.requires_grad_(True)`."),
    "crash": (("net.py:Crash",), "NameError: name 'undefined' is not defined"),
    "crashing data": (("--data", "net.py:crashing"), "KeyError: 'no such row'"),
}


@pytest.mark.parametrize("command", ["check", "mend"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_answered_in_words(run: Run, tmp_path: Path, command: str, case: str) -> None:
    (tmp_path / "net.py").write_text(NET + MORE)
    arguments, words = BAD[case]
    target = () if not arguments[0].startswith("--") else ("net.py:Net",)
    code, _, err = run(command, *target, *arguments)
    assert code == BAD_INPUT
    assert words in " ".join(err.split())
    assert "src/gradmend" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["net.py"]


def test_an_error_of_the_users_model_shows_the_users_lines(run: Run, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NET + MORE)
    _, _, err = run("train", "net.py:Crash")
    assert err.count("Traceback") == 1
    assert 'File "net.py", line' in err
    assert "return undefined" in err
    assert "gradmend/" not in err.replace("gradmend: your code raised an error", "")


@pytest.mark.parametrize(
    ("command", "option", "count"),
    [
        ("mend", "--steps", -5),
        ("train", "--epochs", 0),
        ("train", "--batch-size", -1),
        ("demo", "--depth", 0),
    ],
)
def test_counts_below_one_are_refused(run: Run, command: str, option: str, count: int) -> None:
    code, _, err = run(command, *([] if command == "demo" else ["deep"]), option, count)
    assert code == BAD_INPUT
    assert f"Invalid value for '{option}'" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("explain", "vanishing"), "no cause and no remedy 'vanishing'. Did you mean 'vanishing gradient'?"),
        (("demo", "--activation", "sigmod"), "There is no activation 'sigmod'. Did you mean 'sigmoid'?"),
        (("demo", "--init", "hee"), "There is no init 'hee'. Did you mean 'he'?"),
        (("demo", "--data", "digit"), "There is no data called 'digit'. Did you mean 'digits'?"),
        (("chek", "deep"), "No such command 'chek'."),
    ],
)
def test_other_commands_answer_too(run: Run, arguments: tuple[str, ...], words: str) -> None:
    code, _, err = run(*arguments)
    assert code == BAD_INPUT
    assert words in " ".join(err.split())


def test_the_version_is_at_hand() -> None:
    assert gradmend.__version__ == "0.1.0"
    assert dedent(gradmend.__doc__ or "").startswith("gradmend finds out why a deep network does not learn")
