"""`gradmend run`: the script runs as it does without, to the last bit of what it prints and leaves behind."""

import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gradmend.journal import Journal
from gradmend.recorded import read_recorded
from running import plain, script, theirs, watched

STATE = """
import os, sys
environment = {key: value for key, value in os.environ.items() if key != "_"}
print(__name__, __file__, __spec__ and __spec__.name, __package__, __doc__, sorted(globals()))
print(sys.argv, sys.path, sys.flags, sys.warnoptions, sorted(environment.items()))
print(sys.excepthook is sys.__excepthook__, [name for name in sys.modules if "gradmend" in name])
print(sys.stdin.read())
sys.exit(3)
"""

TRAINING = """
import os, sys, time
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        h = torch.relu(self.layer(x))
        if step == 6:
            WHAT_HAPPENS
        return h

class Raising(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise ValueError("backward")

torch.manual_seed(0)
model = Net()
optimizer = torch.optim.Adam(model.parameters())
for step in range(10):
    optimizer.zero_grad()
    loss = model(torch.randn(3, 4)).sum()
    print(step, loss.item(), flush=True)
    loss.backward()
    optimizer.step()
"""

DEEP = """
import torch
from torch import nn

torch.manual_seed(0)
layers = [part for _ in range(30) for part in (nn.Linear(16, 16), nn.Sigmoid())]
model = nn.Sequential(*layers, nn.Linear(16, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(300):
    x = torch.randn(64, 16)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), x[:, :3].argmax(1)).backward()
    optimizer.step()
print(model[0].weight.double().sum().item())
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the training prints without us."""
    return plain([script(tmp_path_factory.mktemp("alone"), TRAINING.replace("WHAT_HAPPENS", "pass"))]).stdout


@pytest.mark.parametrize("path", [None, "/somewhere"])
def test_the_script_finds_everything_as_without_us(tmp_path: Path, path: str | None) -> None:
    """Arguments, paths, environment, flags, stdin and exit code."""
    file = script(tmp_path, STATE)
    environment = {} if path is None else {"PYTHONPATH": path}
    arguments = [file, "a", "--journal", "x", "-m", "--", "--help"]
    runs = [run(arguments, env=environment, input="typed", cwd=tmp_path) for run in (plain, watched)]
    assert runs[0].stdout == runs[1].stdout
    assert (runs[1].returncode, runs[1].stderr) == (3, "")


def test_a_module_finds_everything_as_without_us(tmp_path: Path) -> None:
    script(tmp_path, STATE, "package/sub/train.py")
    runs = [run(["-m", "package.sub.train", "--lr", "1"], input="", cwd=tmp_path) for run in (plain, watched)]
    assert "package.sub.train" in runs[1].stdout
    assert runs[0].stdout == runs[1].stdout
    assert (runs[1].returncode, runs[1].stderr) == (3, "")


def test_a_sitecustomize_of_the_users_still_runs(tmp_path: Path) -> None:
    script(tmp_path, "print('theirs', __file__)", "site/sitecustomize.py")
    file = script(tmp_path, "import sys; print(sys.modules['sitecustomize'].__file__)")
    environment = {"PYTHONPATH": str(tmp_path / "site")}
    runs = [run([file], env=environment) for run in (plain, watched)]
    command, *lines = runs[1].stdout.splitlines()
    assert command == lines[0]  # our own command, before it becomes the script's interpreter, has it as well
    assert lines == runs[0].stdout.splitlines()


def test_a_script_without_torch_is_left_alone(tmp_path: Path) -> None:
    done = watched([script(tmp_path, "import json; print(json.dumps(1))")], journal=tmp_path / "run.gradmend")
    assert (done.stdout, done.stderr, done.returncode) == ("1\n", "", 0)
    assert not (tmp_path / "run.gradmend").exists()


def test_a_script_that_is_not_there(tmp_path: Path) -> None:
    script(tmp_path, "")
    done = watched([str(tmp_path / "trian.py")])
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        f"There is no file '{tmp_path / 'trian.py'}'. Did you mean '{tmp_path / 'train.py'}'?" in done.stderr
    )


@pytest.mark.parametrize(
    ("happens", "code"),
    [
        ("raise KeyError('forward')", 1),
        ("os.kill(os.getpid(), 2); time.sleep(9)", -signal.SIGINT),
        ("os._exit(9)", 9),
    ],
)
def test_however_the_script_ends(tmp_path: Path, alone: str, happens: str, code: int) -> None:
    """Exit code, stdout, and no line of ours in a traceback; the journal can be read."""
    file, journal = script(tmp_path, TRAINING.replace("WHAT_HAPPENS", happens)), tmp_path / "run.gradmend"
    done = watched([file], journal=journal)
    assert done.returncode == code
    assert 6 <= len(done.stdout.splitlines()) <= 7
    assert alone.startswith(done.stdout)
    assert "gradmend" not in theirs(done)
    assert ("Traceback" in theirs(done)) == ("_exit" not in happens)
    assert Journal(journal).runs()


def test_a_traceback_is_the_same(tmp_path: Path) -> None:
    file = script(tmp_path, TRAINING.replace("WHAT_HAPPENS", "h = Raising.apply(h)"))
    done, alone = watched([file]), plain([file])
    assert theirs(done) == alone.stderr
    assert "ValueError: backward" in alone.stderr


PROBABILITIES = """
import torch
from torch import nn

model = nn.Sequential(nn.Linear(8, 1), nn.Sigmoid())
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(1, 9):
    x = torch.randn(16, 8) if step < 5 else torch.full((16, 8), torch.nan)
    optimizer.zero_grad()
    nn.functional.binary_cross_entropy(model(x), torch.ones(16, 1)).backward()
    optimizer.step()
"""


def test_numbers_over_which_the_script_failed_are_named(tmp_path: Path) -> None:
    done = watched([script(tmp_path, PROBABILITIES)])
    assert done.returncode == 1
    assert done.stderr.index("RuntimeError") < done.stderr.index("gradmend, step 5")
    assert "The batch holds values that are not finite." in " ".join(done.stderr.split())
    assert "gradmend: Sequential, 4 steps" in done.stderr


def test_findings_with_their_lines_and_a_summary(tmp_path: Path) -> None:
    file, journal = script(tmp_path, DEEP), tmp_path / "run.gradmend"
    done = watched([file], journal=journal, cwd=tmp_path)
    assert "vanishing gradient" in done.stderr
    assert "train.py:6" in done.stderr
    summary = done.stderr.splitlines()[-1]
    assert summary.startswith("gradmend: Sequential, 300 steps, last loss ")
    assert "vanishing gradient" in summary
    (run,) = Journal(journal).runs()
    assert (run["command"], run["outcome"]) == (f"python {file}", "ended")
    assert len(Journal(journal).steps(1)["Sequential"]["step"]) == 300
    recorded = read_recorded(Journal(journal))
    assert not recorded.healthy
    assert "vanishing gradient" in str(recorded)


def test_a_journal_that_cannot_be_had(tmp_path: Path, alone: str) -> None:
    """Locked by another process, or no journal at all: it is said, and the training goes on."""
    file, journal = script(tmp_path, TRAINING.replace("WHAT_HAPPENS", "pass")), tmp_path / "run.gradmend"
    Journal(journal).run().close()
    other = sqlite3.connect(journal, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    done = watched([file], journal=journal)
    other.close()
    assert (done.returncode, done.stdout) == (0, alone)
    said = (
        "locked by another process. End it, or name another file. The training goes on, but is not recorded."
    )
    assert said in done.stderr
    assert len(Journal(journal).runs()) == 1


def test_kill_9_leaves_all_but_the_last_second(tmp_path: Path) -> None:
    endless = TRAINING.replace("WHAT_HAPPENS", "pass").replace("range(10)", "range(10**9)")
    file, journal = script(tmp_path, endless), tmp_path / "run.gradmend"
    command = [sys.executable, "-m", "gradmend", "run", "--journal", str(journal), file]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        assert child.stdout is not None
        done = [next(child.stdout) for _ in range(200)]
        time.sleep(1)
        child.kill()
    steps = Journal(journal).steps(1)["Net"]["step"]
    assert len(steps) >= len(done)
    assert Journal(journal).runs()[0]["ended"] is None
