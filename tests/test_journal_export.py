"""Export: CSV and Parquet hold what the journal holds."""

import csv
import io
import math
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet

from gradmend.journal import Journal, JournalError
from gradmend.journal.export import TABLES, export


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    journal = Journal(tmp_path / "run.gradmend")
    with journal.run("night", 'python train.py --name "a, b"') as recording:
        sink = recording.sink("net")
        for step, loss in enumerate((1.5, math.nan, None, math.inf), start=1):
            sink.write("step", step, {"loss": loss, "gradient": 0.5, "rate": None})
        names = {"table": "layers", "rows": ("a", "b"), "statistics": ("mean", "rms")}
        sink.write("reading", 2, {**names, "values": np.array([[1, 2], [3, math.nan]], np.float32)})
        span = {"id": 0, "began": 2, "ended": None}
        text = {"cause": "plateau", "severity": "error", "sentence": "It rests,\nand rests.", "unit": "loss"}
        lists = {"sites": ("a",), "where": ("train.py:3",), "evidence": ()}
        sink.write("finding", 2, {**span, **text, **lists, "measured": 1.0, "expected": None})
        act = {"cause": "plateau", "text": "Halved.", "before": 1.0, "after": 0.5, "unit": "learning rate"}
        sink.write("act", 3, act)
        sink.write("note", 3, {"text": "ä note"})
    return journal


def test_csv(journal: Journal, tmp_path: Path) -> None:
    files = export(journal, tmp_path / "out")
    tables = {file.stem: list(csv.DictReader(io.StringIO(file.read_bytes().decode()))) for file in files}
    assert {name: tuple(rows[0]) for name, rows in tables.items()} == TABLES
    assert [row["loss"] for row in tables["steps"]] == ["1.5", "nan", "", "inf"]
    cells = [(row["row"], row["statistic"], row["value"]) for row in tables["readings"]]
    assert cells == [("a", "mean", "1.0"), ("a", "rms", "2.0"), ("b", "mean", "3.0"), ("b", "rms", "nan")]
    assert tables["findings"][0]["sentence"] == "It rests,\nand rests."
    assert tables["findings"][0]["lines"] == '["train.py:3"]'
    assert tables["runs"][0]["command"] == 'python train.py --name "a, b"'
    assert (tables["acts"][0]["before"], tables["acts"][0]["after"]) == ("1.0", "0.5")
    assert tables["notes"][0]["text"] == "ä note"


def test_parquet(journal: Journal, tmp_path: Path) -> None:
    files = export(journal, tmp_path / "out", "parquet")
    tables = {file.stem: parquet.read_table(file) for file in files}
    assert {name: tuple(table.column_names) for name, table in tables.items()} == TABLES
    assert tables["steps"]["step"].to_pylist() == [1, 2, 3, 4]
    np.testing.assert_equal(tables["steps"]["loss"].to_pylist(), [1.5, math.nan, None, math.inf])
    assert str(tables["steps"].schema.field("step").type) == "int64"
    assert tables["findings"]["ended"].to_pylist() == [None]
    assert tables["readings"]["statistic"].to_pylist() == ["mean", "rms", "mean", "rms"]


def test_an_empty_journal_gives_empty_tables(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "run.gradmend")
    journal.run().close()
    files = export(journal, tmp_path / "out")
    assert [len(file.read_text().splitlines()) for file in files] == [2, 1, 1, 1, 1, 1]
    assert all(parquet.read_schema(file).names for file in export(journal, tmp_path / "out", "parquet"))


def test_unknown_formats_are_refused(journal: Journal, tmp_path: Path) -> None:
    with pytest.raises(JournalError, match=r"There is no format 'xls'\. Possible: csv, parquet"):
        export(journal, tmp_path / "out", "xls")
    assert not (tmp_path / "out").exists()


def test_a_file_where_the_folder_should_be(journal: Journal, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(JournalError, match="cannot be written"):
        export(journal, tmp_path / "out")


def test_without_a_journal_no_folder_is_made(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="There is no journal"):
        export(Journal(tmp_path / "none.gradmend"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
