"""Series: the tables of one kind that a run holds of a model, one after the other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int64

from gradmend.journal.file import select

_LAYOUTS = "SELECT id, kind, sites, statistics FROM layout WHERE run = ?"
_READINGS = "SELECT model, layout, step, numbers FROM reading WHERE run = ? ORDER BY model, layout, step"


@dataclass(frozen=True, eq=False)
class Series:
    """The tables of one kind and of the same rows and columns.

    Args:
        model: its name in the run.
        table: what they are of: `gradients`, `weights`, `layers` or `sites`.
        rows: their names.
        statistics: the names of the columns.
        steps: of the optimizer, rising.
        values: NaN is not known.
    """

    model: str
    table: str
    rows: tuple[str, ...]
    statistics: tuple[str, ...]
    steps: Int64[np.ndarray, " steps"]
    values: Float32[np.ndarray, "steps rows statistics"]

    def column(self, statistic: str) -> Float32[np.ndarray, "steps rows"]:
        """One number of each row at each step; nothing is known of a column that there is not."""
        if statistic not in self.statistics:
            return np.full(self.values.shape[:2], np.nan, np.float32)
        found: Float32[np.ndarray, "steps rows"] = self.values[:, :, self.statistics.index(statistic)]
        return found


def read_series(path: Path, run: int) -> Iterator[Series]:
    """All tables of a run, those of one model, kind and layout together.

    Args:
        path: of the journal.
        run: its number.

    Raises:
        JournalError: if the file cannot be read.
    """
    readings = list(select(path, _READINGS, run))
    layouts = {row["id"]: row for row in select(path, _LAYOUTS, run)}  # later, so that none is missing
    for (model, layout), group in groupby(readings, itemgetter("model", "layout")):
        about, read = layouts[layout], [(row["step"], row["numbers"]) for row in group]
        rows, statistics = (tuple(json.loads(about[name])) for name in ("sites", "statistics"))
        numbers = np.frombuffer(b"".join(numbers for _, numbers in read), "<f4")
        steps = np.array([step for step, _ in read], np.int64)
        values = numbers.reshape(len(steps), len(rows), len(statistics))
        yield Series(model, about["kind"], rows, statistics, steps, values)
