"""Heats: what a journal holds of layers and parameters, as tables of one statistic over steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradmend.journal.series import Series
from gradmend.pictures.heat import Heat


def heats(series: Sequence[Series]) -> dict[str, Heat]:
    """Statistics by their names in `pictures.training.SCALES`, as far as they were read at several steps.

    Args:
        series: of one model.

    Examples:
        >>> values = np.array([[[1.0, 0.5]], [[2.0, 0.5]]], np.float32)
        >>> table = Series("net", "weights", ("0.weight",), ("value", "update"), np.array([1, 9]), values)
        >>> {name: heat.values.ravel().tolist() for name, heat in heats([table]).items()}
        {'step': [0.5, 0.25], 'weights': [1.0, 2.0]}
    """
    read = {
        "gradient": _merged(series, ("layers", "sites"), lambda table: table.column("gradient")),
        "signal": _merged(series, ("layers", "sites"), lambda table: table.column("rms")),
        "weight gradient": _merged(series, ("gradients",), lambda table: table.column("gradient")),
        "step": _merged(series, ("weights",), _relative),
        "weights": _merged(series, ("weights",), lambda table: table.column("value")),
        "dead": _merged(series, ("sites",), lambda table: table.column("dead")),
        "saturated": _merged(series, ("sites",), lambda table: table.column("saturation")),
        "likeness": _merged(series, ("sites",), lambda table: table.column("cosine")),
    }
    return {name: heat for name, heat in read.items() if heat is not None and len(heat.steps) > 1}


def _relative(table: Series) -> NDArray[Any]:
    with np.errstate(all="ignore"):
        return np.asarray(table.column("update") / table.column("value"))


def _merged(
    series: Sequence[Series], kinds: Sequence[str], read: Callable[[Series], NDArray[Any]]
) -> Heat | None:
    """One statistic of all tables of these kinds, in the rows of the first kind that there is."""
    found = sorted((table for table in series if table.table in kinds), key=lambda t: kinds.index(t.table))
    if not found:
        return None
    names = _rows([table for table in found if table.table == found[0].table])
    steps = np.unique(np.concatenate([table.steps for table in found]))
    values = np.full((len(steps), len(names)), np.nan, np.float32)
    for table in reversed(found):
        _fill(values, np.searchsorted(steps, table.steps), names, table, read(table))
    return _known(names, steps, values, _standing(names, series))


def _rows(tables: Sequence[Series]) -> list[str]:
    """The rows of all, without biases where there is anything else."""
    names = list(dict.fromkeys(row for table in tables for row in table.rows))
    return [name for name in names if not name.endswith("bias")] or names


def _fill(
    values: NDArray[Any], at: NDArray[Any], names: list[str], table: Series, read: NDArray[Any]
) -> None:
    place = {row: column for column, row in enumerate(table.rows)}
    columns = np.array([column for column, name in enumerate(names) if name in place], np.int64)
    own = np.array([place[names[column]] for column in columns], np.int64)
    values[np.ix_(at, columns)] = read[:, own]


def _standing(names: Sequence[str], series: Sequence[Series]) -> dict[str, str]:
    """Of each site the row that comes next in the order of the forward pass."""
    sites = max((table.rows for table in series if table.table == "sites"), key=len, default=())
    found, following = {}, names[-1]
    for site in reversed(sites):
        following = site if site in names else following
        found[site] = following
    return found if set(names) & set(sites) else {}


def _known(
    names: Sequence[str], steps: NDArray[Any], values: NDArray[Any], within: dict[str, str]
) -> Heat | None:
    """Without rows and steps of which nothing is known."""
    known = ~np.isnan(values)
    columns, rows = np.flatnonzero(known.any(0)), np.flatnonzero(known.any(1))
    if not len(columns):
        return None
    kept = tuple(names[int(column)] for column in columns)
    return Heat(kept, steps[rows], values[np.ix_(rows, columns)], within)
