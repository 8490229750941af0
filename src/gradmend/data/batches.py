"""Whatever users hand over, as a list of batches, and the checks that a batch can be learnt from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from gradmend.data.record import Data
from gradmend.errors import DataError

_ROWS = 128


def as_batches(data: Any, limit: int | None = None) -> list[Any]:
    """The batches in `data`, as a list; torch's global random state stays as it was.

    Args:
        data: one batch (a tensor, a dict, a tuple such as `(x, y)`, or a list of tensors), a `Data`
            (batches of 128 rows, in an order that is always the same), or any iterable of batches: a
            DataLoader, a list, a generator. A tuple whose members all are pairs of tensors is
            several batches.
        limit: take the first so many batches of an iterable. One without end needs it.

    Raises:
        DataError: if there is no batch in it, or it is no batch and cannot be iterated.

    Example:
        >>> x, y = torch.zeros(8, 3), torch.zeros(8, 1)
        >>> len(as_batches((x, y))), len(as_batches([(x, y), (x, y)])), len(as_batches([x, y]))
        (1, 2, 1)
    """
    if _is_batch(data):
        return [data]
    with torch.random.fork_rng(devices=[]):
        batches = list(islice(_iterable(data), limit))
    if not batches:
        raise DataError(
            "The loader is empty: it gave no batch. Check the length of its dataset, that "
            "`drop_last=True` leaves a batch, and that a generator was not used up before."
        )
    return batches


def check_batch(batch: Any) -> None:
    """Refuse a batch that nothing can be learnt from.

    Args:
        batch: tensors, alone or in tuples, lists and dicts. The last member of a tuple or list is the
            targets, the others are inputs. Integer inputs are allowed.

    Raises:
        DataError: if a tensor has no rows or holds NaN or infinite values, or if the inputs and targets
            of a batch `(x, y)` differ in their number of rows.

    Example:
        >>> check_batch((torch.zeros(8, 3), torch.zeros(8, dtype=torch.long)))
        >>> check_batch((torch.tensor([[1.0, torch.nan]]), torch.zeros(1)))
        Traceback (most recent call last):
        ...
        gradmend.errors.DataError: The inputs hold 1 value that is NaN or infinite, ...
    """
    for name, tensor in _named(batch):
        if tensor.dim() > 0 and len(tensor) == 0:
            raise DataError(f"The {name} of this batch have no rows: shape {list(tensor.shape)}.")
        if tensor.is_floating_point() or tensor.is_complex():
            _check_finite(name, tensor)
    _check_rows(batch)


def _is_batch(data: Any) -> bool:
    if isinstance(data, list):
        return len(data) > 0 and all(isinstance(member, Tensor) for member in data)
    if isinstance(data, tuple):
        return len(data) > 0 and not all(map(_is_pair, data))
    return isinstance(data, (Tensor, Mapping))


def _is_pair(data: Any) -> bool:
    pair = isinstance(data, (tuple, list)) and len(data) == 2
    return pair and all(isinstance(member, Tensor) for member in data)


def _iterable(data: Any) -> Iterable[Any]:
    if isinstance(data, Data):
        return data.batches(_ROWS, generator=torch.Generator().manual_seed(0), epochs=1)
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        raise DataError(
            "A dataset gives single rows, not batches. Give `DataLoader(dataset, batch_size=128)`."
        )
    if isinstance(data, str) or not isinstance(data, Iterable):
        raise DataError(
            f"{data!r:.60} ({type(data).__name__}) is neither a batch nor an iterable of batches. Give "
            '`(x, y)`, a DataLoader, or `load("digits")`.'
        )
    return data


def _named(batch: Any, name: str = "inputs") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a batch with the name of its place."""
    if isinstance(batch, Tensor):
        yield name, batch
    elif isinstance(batch, Mapping):
        for key, member in batch.items():
            yield from _named(member, f"{name} {key!r}")
    elif isinstance(batch, (tuple, list)):
        for place, member in enumerate(batch, start=1):
            last = name == "inputs" and place == len(batch) > 1
            yield from _named(member, "targets" if last else name)


def _check_finite(name: str, tensor: Tensor) -> None:
    bad = ~tensor.isfinite()
    found = int(bad.sum())
    if found == 0:
        return
    where = bad.nonzero()[0].tolist()
    place = f"row {where[0]}, column {where[1]}" if len(where) == 2 else f"position {where}"
    values = "1 value that is" if found == 1 else f"{found} values that are"
    raise DataError(
        f"The {name} hold {values} NaN or infinite, the first in {place} (counted from 0). NaN spreads to "
        "everything computed from it: drop or fill these rows before training."
    )


def _check_rows(batch: Any) -> None:
    if not _is_pair(batch) or batch[0].dim() == 0 or batch[1].dim() == 0:
        return
    inputs, targets = map(len, batch)
    if inputs != targets:
        raise DataError(
            f"The batch has {inputs} rows of inputs, but {targets} of targets. They must be as many: "
            "one target per row."
        )
