"""The journal: what goes in comes out, many runs, many readers, thinning, and errors that help."""

import json
import math
import multiprocessing
import sqlite3
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradmend.journal import Journal, JournalError, Sink, record

PROBLEM = {
    "id": 0,
    "cause": "vanishing_gradient",
    "severity": "error",
    "sentence": "The gradient vanishes.",
    "sites": ("a", "b"),
    "where": ("train.py:3",),
    "measured": math.inf,
    "expected": None,
    "unit": "ratio",
    "evidence": ("Without the sigmoid it is gone.",),
    "began": 3,
    "ended": None,
}


def step(sink: Sink, number: int, loss: float | None = 1.0) -> None:
    sink.write("step", number, {"loss": loss, "gradient": 0.5, "rate": 0.1})


def table(sink: Sink, number: int, values: Any, rows: Sequence[str], name: str = "layers") -> None:
    statistics = ("mean", "rms")
    sink.write("reading", number, {"table": name, "rows": rows, "statistics": statistics, "values": values})


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "run.gradmend")
    values = np.array([[1.5, math.nan], [math.inf, 1e-30]], np.float32)
    with journal.run("night", "python train.py --lr 1") as recording:
        sink = recording.sink("net")
        for number, loss in enumerate((2.5, math.nan, math.inf, None), start=1):
            step(sink, number, loss)
        table(sink, 2, values, ("a", "b"))
        sink.write("finding", 3, PROBLEM)
        sink.write("note", 4, {"text": "compiled"})
    (run,) = journal.runs()
    assert (run["name"], run["command"], run["outcome"], run["lost"]) == (
        "night",
        "python train.py --lr 1",
        "ended",
        0,
    )
    assert run["started"] <= run["ended"]
    net = journal.steps(run["id"])["net"]
    np.testing.assert_array_equal(net["step"], [1, 2, 3, 4])
    np.testing.assert_array_equal(net["loss"], [2.5, math.nan, math.inf, math.nan])
    (reading,) = journal.readings(run["id"])
    assert (reading.model, reading.step, reading.table, reading.rows) == ("net", 2, "layers", ("a", "b"))
    np.testing.assert_array_equal(reading.values, values)
    (finding,) = journal.findings(run["id"])
    assert finding["sites"] == ["a", "b"]
    assert finding["lines"] == ["train.py:3"]
    assert finding["measured"] == math.inf
    assert finding["expected"] is None
    assert journal.notes(run["id"]) == [{"model": "net", "step": 4, "text": "compiled"}]


def test_what_is_not_known_is_null_and_nan_is_not(tmp_path: Path) -> None:
    path = tmp_path / "run.gradmend"
    with Journal(path).run() as recording:
        step(recording.sink("net"), 1, math.nan)
        step(recording.sink("net"), 2, None)
    losses = sqlite3.connect(path).execute("SELECT loss FROM step ORDER BY step").fetchall()
    assert losses == [("nan",), (None,)]


def test_a_finding_that_ends_is_the_same_finding(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "run.gradmend")
    with journal.run() as recording:
        recording.sink("net").write("finding", 3, PROBLEM)
        recording.sink("net").write("finding", 9, {**PROBLEM, "ended": 9})
        recording.sink("other").write("finding", 5, PROBLEM)
    found = journal.findings(1)
    assert [(f["model"], f["began"], f["ended"]) for f in found] == [("net", 3, 9), ("other", 3, None)]


def test_unknown_rows_are_refused(tmp_path: Path) -> None:
    with (
        Journal(tmp_path / "run.gradmend").run() as recording,
        pytest.raises(ValueError, match="not 'picture'"),
    ):
        recording.sink("net").write("picture", 1, {})


@settings(max_examples=5, deadline=None)
@given(
    names=st.lists(st.text(min_size=1), min_size=1, max_size=4, unique=True),
    numbers=st.lists(st.floats(width=32), min_size=1, max_size=5),
)
def test_any_names_and_numbers(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], numbers: list[float]
) -> None:
    names = [name.encode("utf-8", "replace").decode() for name in names]
    journal = Journal(tmp_path_factory.mktemp("any") / "run.gradmend")
    values = np.array([[number, number] for number in numbers], np.float32)
    with journal.run(names[0]) as recording:
        for name in names:
            table(recording.sink(name), 1, values, [str(i) for i in range(len(numbers))], name)
    read = {reading.table: reading for reading in journal.readings(1)}
    assert set(read) == set(names)
    for reading in read.values():
        np.testing.assert_array_equal(reading.values, values)


def test_rows_of_changing_shape(tmp_path: Path) -> None:
    """A model that is swapped in the midst has other sites: each step keeps the names that it had."""
    journal = Journal(tmp_path / "run.gradmend")
    with journal.run() as recording:
        sink = recording.sink("net")
        table(sink, 1, np.ones((1, 2), np.float32), ("a",))
        table(sink, 2, np.ones((2, 2), np.float32), ("a", "b"))
        table(sink, 3, np.ones((1, 2), np.float32), ("a",))
    assert [reading.rows for reading in journal.readings(1)] == [("a",), ("a", "b"), ("a",)]


def test_many_runs_in_one_file(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "run.gradmend")
    with journal.run("one") as first, journal.run("two") as second:
        step(first.sink("net"), 1, 1.0)
        step(second.sink("net"), 1, 2.0)
    assert [run["name"] for run in journal.runs()] == ["one", "two"]
    assert [journal.steps(run)["net"]["loss"].item() for run in (1, 2)] == [1.0, 2.0]


def test_sqlite_closes_it_to_one_file(tmp_path: Path) -> None:
    with Journal(tmp_path / "run.gradmend").run() as recording:
        step(recording.sink("net"), 1)
    assert [file.name for file in tmp_path.iterdir()] == ["run.gradmend"]


def test_the_short_way(tmp_path: Path) -> None:
    sink = record(tmp_path / "run.gradmend", "net")
    step(sink, 1)
    sink.close()
    assert list(Journal(tmp_path / "run.gradmend").steps(1)) == ["net"]


def test_readers_see_a_run_while_it_is_written(tmp_path: Path) -> None:
    """Several at once, each a consistent state: steps without a gap, and in the end all of them."""
    journal = Journal(tmp_path / "run.gradmend")
    done, failures = threading.Event(), []

    def read() -> None:
        while not done.is_set():
            seen = journal.steps(1).get("net", {"step": np.arange(1, 1)})["step"]
            if seen.tolist() != list(range(1, len(seen) + 1)):
                failures.append(seen)

    with journal.run() as recording:
        readers = [threading.Thread(target=read) for _ in range(3)]
        for reader in readers:
            reader.start()
        for number in range(1, 4001):
            step(recording.sink("net"), number)
    done.set()
    for reader in readers:
        reader.join()
    assert not failures
    assert len(journal.steps(1)["net"]["step"]) == 4000


def _record_steps(path: Path, name: str, count: int) -> None:
    with Journal(path).run(name) as recording:
        for number in range(1, count + 1):
            step(recording.sink("net"), number)


def test_several_processes_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "run.gradmend"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_record_steps, args=(path, f"{i}", 3000)) for i in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    journal = Journal(path)
    assert sorted(run["name"] for run in journal.runs()) == ["0", "1", "2"]
    assert [len(journal.steps(run)["net"]["step"]) for run in (1, 2, 3)] == [3000] * 3


def test_old_steps_are_thinned_out_evenly(tmp_path: Path) -> None:
    """Room for a thousand steps: of twelve thousand the newest are all there, the old ones evenly spaced."""
    path, room = tmp_path / "run.gradmend", 256 * 1024
    journal = Journal(path)
    with journal.run(room=room) as recording:
        for number in range(1, 12_001):
            step(recording.sink("net"), number)
    steps = journal.steps(1)["net"]["step"]
    assert len(steps) < 2 * room // 4 // 64
    assert steps[0] == 1
    assert steps[-1] == 12_000
    gaps = np.diff(steps)
    assert set(gaps[-200:]) == {1}
    old = gaps[: len(gaps) // 2]
    assert old.max() <= 4 * old[1:].min()


def test_the_file_stays_as_small_as_it_was_told_to(tmp_path: Path) -> None:
    path, room = tmp_path / "run.gradmend", 4 << 20
    rows = tuple(f"layer{i}" for i in range(100))
    with Journal(path).run(room=room) as recording:
        for number in range(10, 60_001, 10):
            table(recording.sink("net"), number, np.full((100, 2), number, np.float32), rows)
            table(recording.sink("net"), number + 5, np.zeros((100, 2), np.float32), rows, "parameters")
    assert path.stat().st_size < 2 * room
    read = list(Journal(path).readings(1))
    assert {reading.table for reading in read} == {"layers", "parameters"}
    layers = [reading for reading in read if reading.table == "layers"]
    assert layers[0].step == 10
    assert layers[-1].step == 60_000
    assert all((reading.values == reading.step).all() for reading in layers)


@pytest.mark.parametrize(
    "content", [b"", b"hello, this is text and no table at all" * 50, b"SQLite format 3\0"]
)
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes.gradmend"
    path.write_bytes(content)
    with pytest.raises(JournalError, match="is not a journal of gradmend"):
        Journal(path).runs()
    if content:
        with pytest.raises(JournalError, match="is not a journal of gradmend"):
            Journal(path).run()
        assert path.read_bytes() == content


def test_the_tables_of_others_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "theirs.db"
    with sqlite3.connect(path) as theirs:
        theirs.execute("CREATE TABLE run (id INTEGER)")
    before = path.read_bytes()
    for use in (Journal(path).runs, Journal(path).run):
        with pytest.raises(JournalError, match="is not a journal of gradmend"):
            use()
    assert path.read_bytes() == before


def test_a_journal_of_the_future_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.gradmend"
    Journal(path).run().close()
    with sqlite3.connect(path) as file:
        file.execute("PRAGMA user_version = 7")
    for use in (Journal(path).runs, Journal(path).run):
        with pytest.raises(JournalError, match=r"version 7.*up to 1. Type: pip install --upgrade gradmend"):
            use()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    Journal(tmp_path / "night.gradmend").run().close()
    with pytest.raises(JournalError, match=r"There is no journal .*Did you mean '.*night.gradmend'"):
        Journal(tmp_path / "nigt.gradmend").runs()


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="Name a file in a folder that you may write to"):
        Journal(tmp_path / "none" / "run.gradmend").run()


def test_lists_are_json_for_other_readers(tmp_path: Path) -> None:
    path = tmp_path / "run.gradmend"
    with Journal(path).run() as recording:
        recording.sink("net").write("finding", 1, PROBLEM)
    (sites,) = sqlite3.connect(path).execute("SELECT sites FROM finding").fetchone()
    assert json.loads(sites) == ["a", "b"]
