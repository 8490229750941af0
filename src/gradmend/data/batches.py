"""Whatever users hand over, as a list of batches, and the checks that a batch can be learnt from."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from gradmend.data.record import Data
from gradmend.errors import DataError

_ROWS = 128


def as_batches(data: Any, limit: int | None = None) -> list[Any]:
    """The batches in `data`, as a list; random generators, global or a loader's own, stay as they were.

    Args:
        data: one batch (a tensor, a dict, a tuple such as `(x, y)`, or a list of tensors), a `Data`
            (batches of 128 rows, in an order that is always the same), or any iterable of batches: a
            DataLoader, a list, a generator. A tuple whose members all are pairs of tensors is
            several batches.
        limit: take the first so many batches of an iterable. One without end needs it.

    Raises:
        DataError: if there is no batch in it, if it is no batch and cannot be iterated, or if it fails.

    Examples:
        >>> x, y = torch.zeros(8, 3), torch.zeros(8, 1)
        >>> len(as_batches((x, y))), len(as_batches([(x, y), (x, y)])), len(as_batches([x, y]))
        (1, 2, 1)
    """
    if _is_batch(data):
        return [data]
    with _same_randomness(data):
        batches = _take(_iterable(data), limit)
    if not batches:
        raise DataError(
            "The loader is empty: it gave no batch. Check the length of its dataset, that "
            "`drop_last=True` leaves a batch, and that a generator was not used up before."
        )
    return batches


def _take(batches: Iterable[Any], limit: int | None) -> list[Any]:
    try:
        return list(islice(batches, limit))
    except (RuntimeError, TypeError) as error:
        raise DataError(
            f"The loader gives no batch: {error}\nRows of different sizes need a `collate_fn` that pads them."
        ) from error


@contextmanager
def _same_randomness(data: Any) -> Iterator[None]:
    """Inside, random numbers may be drawn; afterwards all generators are where they were."""
    batch_sampler = getattr(data, "batch_sampler", None)
    samplers = (data, getattr(data, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    owned = (getattr(holder, "generator", None) for holder in samplers)
    states = [(g, g.get_state()) for g in owned if isinstance(g, torch.Generator)]
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for generator, state in states:
            generator.set_state(state)


def check_batch(batch: Any, paired: bool = True) -> None:
    """Refuse a batch that nothing can be learnt from.

    Args:
        batch: tensors, alone or in tuples, lists and dicts. The last member of a tuple or list is the
            targets, the others are inputs. Integer inputs are allowed.
        paired: whether two tensors are inputs and targets, so that they need as many rows. Targets may also
            belong to the second dimension of a sequence (time first), or to each of its places, flattened.

    Raises:
        DataError: if inputs or targets have no rows or no values, hold NaN or infinite values (other than
            masks of zeros and minus infinity), or if those of `(x, y)` differ in their number of rows.

    Examples:
        >>> check_batch((torch.zeros(8, 3), torch.zeros(8, dtype=torch.long)))
        >>> check_batch((torch.tensor([[1.0, torch.nan]]), torch.zeros(1)))
        Traceback (most recent call last):
        ...
        gradmend.errors.DataError: The inputs hold 1 value that is NaN or infinite, ...
    """
    outermost = {id(member) for member in _members(batch)}  # further in, none found is an answer too
    for name, tensor in _named(batch):
        if id(tensor) in outermost and tensor.numel() == 0:
            what = "rows" if tensor.shape[0] == 0 else "values"
            raise DataError(f"The {name} of this batch have no {what}: shape {list(tensor.shape)}.")
        if tensor.is_meta:
            raise DataError(f"The {name} of this batch are on the meta device, so they have no values.")
        if tensor.is_floating_point() or tensor.is_complex():
            _check_finite(name, tensor)
    if paired and _is_pair(batch):
        _check_rows(*batch)


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
    if isinstance(data, np.ndarray):
        raise DataError("A batch holds tensors, not numpy arrays. Give `(torch.as_tensor(x), ...)`.")
    if isinstance(data, str) or not isinstance(data, Iterable):
        raise DataError(
            f"{data!r:.60} ({type(data).__name__}) is neither a batch nor an iterable of batches. Give "
            '`(x, y)`, a DataLoader, or `load("digits")`; a batch of a class of your own goes into a list.'
        )
    return data


def _members(batch: Any) -> list[Any]:
    if isinstance(batch, Mapping):
        return list(batch.values())
    return list(batch) if isinstance(batch, (tuple, list)) else [batch]


def _named(batch: Any, name: str = "inputs") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a batch with the name of its place; of ragged and sparse ones what they hold."""
    if isinstance(batch, Tensor) and batch.is_nested:
        yield from ((name, member) for member in batch.unbind())
    elif isinstance(batch, Tensor):
        yield name, batch
    elif isinstance(batch, Mapping):
        for key, member in batch.items():
            yield from _named(member, f"{name} {key!r}")
    elif isinstance(batch, (tuple, list)):
        for place, member in enumerate(batch, start=1):
            last = name == "inputs" and place == len(batch) > 1
            yield from _named(member, "targets" if last else name)


def _check_finite(name: str, tensor: Tensor) -> None:
    values = _values(tensor)
    bad = ~values.isfinite()
    found = int(bad.sum())
    if found == 0 or _is_mask(values, bad):
        return
    where = bad.nonzero()[0].tolist()
    place = f"row {where[0]}, column {where[1]}" if len(where) == 2 else f"position {where}"
    holds = "1 value that is" if found == 1 else f"{found} values that are"
    raise DataError(
        f"The {name} hold {holds} NaN or infinite, the first in {place} (counted from 0). NaN spreads to "
        "everything computed from it: drop or fill these rows before training."
    )


def _is_mask(values: Tensor, bad: Tensor) -> bool:
    """Whether it is made to be added before a softmax: nothing but zero and minus infinity."""
    return not values.is_complex() and bool(torch.where(bad, values == -torch.inf, values == 0).all())


def _values(tensor: Tensor) -> Tensor:
    """What a sparse tensor holds beside its zeros; any other as it is."""
    if tensor.layout == torch.strided:
        return tensor
    return tensor.coalesce().values() if tensor.layout == torch.sparse_coo else tensor.values()


def _check_rows(x: Tensor, y: Tensor) -> None:
    if x.dim() == 0 or y.dim() == 0:
        return
    inputs, targets = x.size(0), y.size(0)
    sequences = not x.is_nested and (x.dim() > 2 or (x.dim() == 2 and not x.is_floating_point()))
    places = {x.shape[1], inputs * x.shape[1]} if sequences else set()
    if inputs != targets and targets not in places:
        raise DataError(
            f"The batch has {inputs} rows of inputs, but {targets} of targets. They must be as many: "
            "one target per row."
        )
