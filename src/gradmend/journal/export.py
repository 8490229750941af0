"""Export: a journal as CSV or Parquet, one file for each table."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

from gradmend.errors import MissingExtraError
from gradmend.journal import Journal
from gradmend.journal.file import JournalError, number, select

Row: TypeAlias = dict[str, Any]

TABLES: dict[str, tuple[str, ...]] = {
    "runs": ("run", "name", "command", "started", "ended", "outcome", "python", "torch", "lost"),
    "steps": ("run", "model", "step", "loss", "gradient", "rate"),
    "readings": ("run", "model", "step", "table", "row", "statistic", "value"),
    "findings": (
        *("run", "model", "cause", "severity", "sentence", "measured", "expected", "unit"),
        *("sites", "lines", "evidence", "began", "ended"),
    ),
    "acts": ("run", "model", "step", "cause", "text", "before", "after", "unit"),
    "notes": ("run", "model", "step", "text"),
}
"""The files and their columns. Lists are JSON, times Unix time, what is not known is empty."""

_COUNTS = {"run", "step", "lost", "began"}
_NUMBERS = {
    *("started", "ended", "loss", "gradient", "rate", "value", "measured", "expected", "before", "after")
}
_AT_ONCE = 50_000


def export(journal: Journal, folder: Path, kind: str = "csv") -> list[Path]:
    """Write all tables of a journal into a folder; a file of the same name is replaced.

    Args:
        journal: to read; it may be written meanwhile.
        folder: is made if there is none.
        kind: `csv` or `parquet`.

    Returns:
        The files.

    Raises:
        JournalError: if the journal cannot be read, or the folder not be written.
        MissingExtraError: for Parquet without pyarrow.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     journal = Journal(Path(folder) / "run.gradmend")
        ...     journal.run("first").close()
        ...     [file.name for file in export(journal, Path(folder) / "out")]
        ['runs.csv', 'steps.csv', 'readings.csv', 'findings.csv', 'acts.csv', 'notes.csv']
    """
    writers = {"csv": _csv, "parquet": _parquet}
    if kind not in writers:
        raise JournalError(f"There is no format {kind!r}. Possible: {', '.join(writers)}.")
    journal.runs()  # complains before a folder is made
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return [
            writers[kind](folder / f"{table}.{kind}", table, rows(journal)) for table, rows in _ROWS.items()
        ]
    except OSError as error:
        raise JournalError(f"{folder} cannot be written: {error}. Name another folder.") from None


def _runs(journal: Journal) -> Iterator[Row]:
    return ({**run, "run": run["id"]} for run in journal.runs())


def _steps(journal: Journal) -> Iterator[Row]:
    for row in select(journal.path, "SELECT * FROM step ORDER BY run, model, step"):
        yield row | {name: number(row[name]) for name in ("loss", "gradient", "rate")}


def _readings(journal: Journal) -> Iterator[Row]:
    for run in journal.runs():
        for reading in journal.readings(run["id"]):
            whose = {"run": run["id"], "model": reading.model, "step": reading.step, "table": reading.table}
            for row, values in zip(reading.rows, reading.values.tolist(), strict=True):
                for statistic, value in zip(reading.statistics, values, strict=True):
                    yield {**whose, "row": row, "statistic": statistic, "value": value}


def _findings(journal: Journal) -> Iterator[Row]:
    for run in journal.runs():
        for finding in journal.findings(run["id"]):
            lists = {name: json.dumps(finding[name]) for name in ("sites", "lines", "evidence")}
            yield {**finding, **lists}


def _acts(journal: Journal) -> Iterator[Row]:
    return ({**act, "run": run["id"]} for run in journal.runs() for act in journal.acts(run["id"]))


def _notes(journal: Journal) -> Iterator[Row]:
    return ({**note, "run": run["id"]} for run in journal.runs() for note in journal.notes(run["id"]))


_ROWS: dict[str, Callable[[Journal], Iterator[Row]]] = {
    "runs": _runs,
    "steps": _steps,
    "readings": _readings,
    "findings": _findings,
    "acts": _acts,
    "notes": _notes,
}


def _csv(path: Path, table: str, rows: Iterable[Row]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, TABLES[table], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


def _parquet(path: Path, table: str, rows: Iterable[Row]) -> Path:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "parquet", "Writing Parquet") from error
    schema = pyarrow.schema([(name, _arrow_type(table, name)) for name in TABLES[table]])
    remaining = iter(rows)
    with parquet.ParquetWriter(path, schema) as writer:
        while some := list(islice(remaining, _AT_ONCE)):
            writer.write_table(pyarrow.Table.from_pylist(some, schema))
    return path


def _arrow_type(table: str, name: str) -> str:
    if name in _COUNTS or (table, name) == ("findings", "ended"):
        return "int64"
    return "float64" if name in _NUMBERS else "string"
