"""What happens to a journal when the process, the disk or another process fails: it stays readable."""

import resource
import signal
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from gradmend.journal import Journal, JournalError

RECORD = """
import os, sys, time
from contextlib import closing
from pathlib import Path
from gradmend.journal import Journal

path = Path(sys.argv[1])
recording = Journal(path).run("child")
sink = recording.sink("net")

def steps(first, last):
    for step in range(first, last):
        sink.write("step", step, {"loss": 1.0, "gradient": None, "rate": None})
"""


def script(tmp_path: Path, code: str) -> list[str]:
    file = tmp_path / "record.py"
    file.write_text(RECORD + textwrap.dedent(code))
    return [sys.executable, str(file), str(tmp_path / "run.gradmend")]


def recorded(path: Path) -> int:
    return len(Journal(path).steps(1).get("net", {"step": []})["step"])


def sound(path: Path) -> bool:
    """What SQLite's own check says."""
    with closing(sqlite3.connect(path)) as connection:
        verdict: tuple[str] = connection.execute("PRAGMA integrity_check").fetchone()
    return verdict == ("ok",)


def test_kill_9_while_it_writes(tmp_path: Path) -> None:
    """Everything is there but the last second; and the file can be written again."""
    code = """
    for step in range(10**9):
        steps(step, step + 1)
        print(step, time.time(), flush=True)
        time.sleep(0.0005)
    """
    path = tmp_path / "run.gradmend"
    with subprocess.Popen(script(tmp_path, code), stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        told = [next(child.stdout).split() for _ in range(3000)]
        child.kill()
        told += [line.split() for line in child.stdout if line.endswith("\n")]
    told = [line for line in told if len(line) == 2]
    last = float(told[-1][1])
    old = [int(step) for step, when in told if float(when) < last - 1]
    assert sound(path)
    assert recorded(path) > max(old) > 500
    assert Journal(path).runs()[0]["ended"] is None
    with Journal(path).run("next"):
        pass
    assert [run["name"] for run in Journal(path).runs()] == ["child", "next"]


@pytest.fixture
def closed_folder() -> Iterator[Path]:
    """A folder with a journal, where somebody else than root may only read."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "run.gradmend"
        with Journal(path).run() as recording:
            recording.sink("net").write("step", 1, {"loss": 1.0})
        path.chmod(0o444)
        path.parent.chmod(0o555)
        yield path
        path.parent.chmod(0o755)


def as_nobody(path: Path, code: str) -> subprocess.CompletedProcess[str]:
    """What a user sees who may not write; root may, so it becomes somebody else."""
    become = "import os; os.geteuid() or (os.setgroups([]), os.setuid(65534))"
    lines = f"from gradmend.journal import Journal; import numpy; {become}; journal = Journal({str(path)!r})"
    return subprocess.run([sys.executable, "-c", f"{lines}; {code}"], capture_output=True, text=True)


def test_what_cannot_be_written_can_be_read(closed_folder: Path) -> None:
    done = as_nobody(closed_folder, "print(journal.steps(1)['net']['loss'].item())")
    assert (done.stdout.strip(), done.stderr) == ("1.0", "")


def test_what_cannot_be_written_is_refused(closed_folder: Path) -> None:
    before = closed_folder.read_bytes()
    done = as_nobody(closed_folder, "journal.run()")
    assert "JournalError" in done.stderr
    assert "Name a file in a folder that you may write to" in done.stderr
    assert closed_folder.read_bytes() == before


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A disk of half a megabyte, where the system lets a test make one."""
    folder = Path(tempfile.mkdtemp())
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    try:
        made = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        made = False
    if made:
        yield folder
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
    folder.rmdir()
    if not made:
        pytest.skip("this system lets no test mount a disk")


def test_a_full_disk_is_said_once_and_the_training_goes_on(small_disk: Path, tmp_path: Path) -> None:
    code = """
    for i in range(30):
        steps(2000 * i, 2000 * (i + 1))
        time.sleep(0.02)
    print("trained")
    """
    command = [*script(tmp_path, code)[:2], str(small_disk / "run.gradmend")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "trained\n")
    assert done.stderr.count("\n") == 1
    assert "is full. The training goes on, but is not recorded." in done.stderr
    assert recorded(small_disk / "run.gradmend") > 500
    assert sound(small_disk / "run.gradmend")


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    code = """
    steps(0, 30_000)
    recording.close()
    print("trained")
    """
    limit = 256 * 1024
    done = subprocess.run(
        script(tmp_path, code),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert (done.returncode, done.stdout) == (0, "trained\n")
    assert done.stderr.count("The training goes on, but is not recorded.") == 1
    assert sound(tmp_path / "run.gradmend")


def test_space_that_comes_back_is_used(small_disk: Path) -> None:
    """Rows wait while the disk is full."""
    ballast = small_disk / "ballast"
    path = small_disk / "run.gradmend"
    recording = Journal(path).run()
    ballast.write_bytes(b"x" * 340 * 1024)
    for step in range(9000):
        recording.sink("net").write("step", step, {"loss": 1.0})
    time.sleep(0.6)
    assert recorded(path) < 9000
    ballast.unlink()
    recording.close()
    assert recorded(path) == 9000


def test_a_lock_of_another_process_only_delays_it(tmp_path: Path) -> None:
    path = tmp_path / "run.gradmend"
    recording = Journal(path).run()
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    for step in range(1000):
        recording.sink("net").write("step", step, {"loss": 1.0})
    time.sleep(0.5)
    assert recorded(path) == 0
    other.execute("ROLLBACK")
    recording.close()
    assert recorded(path) == 1000


def test_a_lock_that_stays(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """At the end the rows are given up, which is said; nothing can be begun meanwhile."""
    path = tmp_path / "run.gradmend"
    recording = Journal(path).run()
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    recording.sink("net").write("step", 1, {"loss": 1.0})
    with pytest.raises(JournalError, match=r"locked by another process\. End it, or name another file"):
        Journal(path).run()
    recording.close()
    assert capfd.readouterr().err.count("locked by another process") == 1
    other.close()
    assert recorded(path) == 0


def test_too_many_rows_are_counted_and_lost(tmp_path: Path) -> None:
    path = tmp_path / "run.gradmend"
    recording = Journal(path).run()
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    time.sleep(0.5)  # until the thread has found it locked
    for step in range(25_000):
        recording.sink("net").write("step", step, {"loss": 1.0})
    recording.sink("net").write("note", 25_000, {"text": "few of these are never lost"})
    other.execute("ROLLBACK")
    recording.close()
    (run,) = Journal(path).runs()
    assert run["lost"] + recorded(path) == 25_000
    assert run["lost"] > 0
    assert len(Journal(path).notes(1)) == 1


def test_a_child_made_by_fork_writes_nothing(tmp_path: Path) -> None:
    """As in a data loader: neither its rows nor its end reach the journal, and it may use SQLite itself."""
    code = """
    import sqlite3, warnings
    warnings.simplefilter("ignore")
    for round in range(20):
        steps(100 * round, 100 * round + 100)
        child = os.fork()
        if child == 0:
            for _ in range(50):
                sqlite3.connect(":memory:").execute("SELECT 1").fetchone()
            steps(10**6, 10**6 + 100)
            sys.exit(0)
        assert os.waitpid(child, 0)[1] == 0
    """
    done = subprocess.run(script(tmp_path, code), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    path = tmp_path / "run.gradmend"
    assert Journal(path).steps(1)["net"]["step"].tolist() == list(range(2000))
    assert Journal(path).runs()[0]["ended"] is not None


def test_a_damaged_file_is_named_as_such(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """By readers as an error; by a recording in a line, and the training goes on."""
    path = tmp_path / "run.gradmend"
    with Journal(path).run() as recording:
        for step in range(5000):
            recording.sink("net").write("step", step, {"loss": 1.0})
    content = bytearray(path.read_bytes())
    content[3 * 4096 :] = b"x" * (len(content) - 3 * 4096)
    path.write_bytes(content)
    with pytest.raises(JournalError, match=r"is damaged .* What can be saved: sqlite3 .* \.recover"):
        Journal(path).steps(1)
    recording = Journal(path).run()
    for step in range(5000):
        recording.sink("net").write("step", step, {"loss": 1.0})
    recording.close()
    assert capfd.readouterr().err.count("The training goes on, but is not recorded.") == 1


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("sys.exit(3)", 3),
        ("raise RuntimeError", 1),
        ("os._exit(4)", 4),
        ("os.kill(os.getpid(), 15)", -signal.SIGTERM),
        ("os.kill(os.getpid(), 2)", -signal.SIGINT),
    ],
)
def test_however_the_process_ends(tmp_path: Path, end: str, code: int) -> None:
    """All rows but those of the last second, and the exit code that it has without a journal."""
    done = subprocess.run(script(tmp_path, f"steps(0, 500); time.sleep(1); {end}"), capture_output=True)
    assert done.returncode == code
    assert recorded(tmp_path / "run.gradmend") == 500
