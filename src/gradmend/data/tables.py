"""Tables: CSV and Parquet files as named columns, and columns as tensors."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradmend.errors import DataError, MissingExtraError, suggest

Column: TypeAlias = NDArray[Any]
"""Numbers as float64 with NaN where one is missing, or text as objects with None where it is missing."""

_MISSING = {"", "na", "n/a", "nan", "null", "?"}
_TARGETS = ("target", "label", "class", "y")
_ONE_HOT = 20


def read_csv(path: Path) -> dict[str, Column]:
    """The columns of a CSV file.

    Comma, semicolon or tab separate the cells, whichever the first line holds most. The first line names
    the columns; if it holds nothing but numbers it is data, and the columns are called 1, 2, 3, ...
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            delimiter = max(",;\t", key=file.readline().count)
            file.seek(0)
            rows = [row for row in csv.reader(file, delimiter=delimiter) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as CSV in UTF-8: {error}.") from error
    names = [cell.strip() for cell in rows[0]] if rows else []
    if names and _column(names).dtype != object:
        names = [str(number) for number in range(1, len(names) + 1)]
    else:
        rows = rows[1:]
    for number, row in enumerate(rows, start=1):
        if len(row) != len(names):
            raise DataError(f"{path}: row {number} has {len(row)} cells, but there are {len(names)} columns.")
    return _table(path, names, [_column(cells) for cells in zip(*rows, strict=True)])


def read_parquet(path: Path) -> dict[str, Column]:
    """The columns of a Parquet file; truth values count as 0 and 1, dates as text."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "parquet", "Reading Parquet") from error
    try:
        table = parquet.read_table(path, partitioning=None)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}.") from error
    columns = [_arrow_column(path, name, table[place]) for place, name in enumerate(table.column_names)]
    return _table(path, table.column_names, columns)


def target_name(path: Path, table: dict[str, Column], wanted: str | None) -> str:
    """The column to predict: the one wanted, else target, label, class or y, else the last."""
    if wanted is None:
        usual = [name for usual in _TARGETS for name in table if name.lower() == usual]
        return usual[0] if usual else list(table)[-1]
    if wanted not in table:
        raise DataError(f"{path} has no column {wanted!r}. {suggest(wanted, table)}")
    return wanted


def features(path: Path, table: dict[str, Column], target: str) -> Tensor:
    """All columns but the target, float32 [rows, columns].

    Text becomes one column of 0 and 1 per level up to 20 levels, and the number of its level beyond.
    """
    parts = [_encode(column) for name, column in table.items() if name != target]
    if not parts:
        raise DataError(f"{path} has no column besides the target {target!r}: nothing to predict it from.")
    return torch.cat(parts, dim=1)


def refuse_missing(path: Path, name: str, missing: NDArray[np.bool_]) -> None:
    """Raise a DataError if a column or array [rows] has a missing value."""
    if missing.any():
        raise DataError(
            f"{path}: column {name!r} has no value in row {int(missing.argmax()) + 1} (counted from 1); "
            f"{int(missing.sum())} missing in that column. Fill them in or drop these rows."
        )


def floats(array: NDArray[Any]) -> Tensor:
    """The numbers as float32; those beyond its range become infinite."""
    with np.errstate(over="ignore"):
        return torch.from_numpy(array.astype(np.float32))


def _table(path: Path, names: Sequence[str], columns: Sequence[Column]) -> dict[str, Column]:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{path} has more than one column called {twice[0]!r}. Rename all but one.")
    if not columns or len(columns[0]) == 0:
        raise DataError(f"{path} is empty: it holds no row of data.")
    for name, column in zip(names, columns, strict=True):
        missing = np.isnan(column) if column.dtype != object else np.array([cell is None for cell in column])
        refuse_missing(path, name, missing)
    return dict(zip(names, columns, strict=True))


def _column(cells: Sequence[str]) -> Column:
    values = [None if cell.strip().lower() in _MISSING else cell.strip() for cell in cells]
    try:
        return np.array([np.nan if value is None else float(value) for value in values])
    except ValueError:
        return np.array(values, dtype=object)


def _arrow_column(path: Path, name: str, column: Any) -> Column:
    from pyarrow import float64, types

    kind = column.type
    if types.is_nested(kind):
        raise DataError(
            f"{path}: column {name!r} holds {kind}, not single values. Give it columns of its own."
        )
    if types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) or types.is_decimal(kind):
        numbers: Column = column.cast(float64(), safe=False).to_numpy()
        return numbers
    return np.array([None if value is None else str(value) for value in column.to_pylist()], dtype=object)


def _encode(column: Column) -> Tensor:
    if column.dtype != object:
        return floats(column).unsqueeze(1)
    levels, codes = np.unique(column, return_inverse=True)
    numbers = torch.from_numpy(codes)
    if len(levels) > _ONE_HOT:
        return numbers.float().unsqueeze(1)
    return torch.nn.functional.one_hot(numbers, len(levels)).float()
