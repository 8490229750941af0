"""Feed: any form of data as batches, on one device with the setup they train."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from operator import length_hint
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradmend.data import Data, as_batches
from gradmend.setup import Batch, Setup


@dataclass(frozen=True)
class Feed:
    """Batches on a device.

    Args:
        epoch: begins an epoch.
        batches: how many an epoch has, about; None if that is not known.
    """

    epoch: Callable[[], Iterable[Batch]]
    batches: int | None


def recut(batches: Iterable[Batch], rows: int | None) -> Iterator[Batch]:
    """Batches of so many rows, joined or cut from those that come; the last may be shorter.

    Batches that are no tuple of tensors with rows, or no others would fit to, come as they are.

    Examples:
        >>> batches = [(torch.zeros(3, 2), torch.zeros(3))] * 3
        >>> [len(y) for _, y in recut(batches, 4)]
        [4, 4, 1]
    """
    kept: list[Any] = []
    for batch in batches:
        if rows is None or not _joinable(kept[-1] if kept else batch, batch):
            yield from (*kept, batch)
            kept = []
            continue
        kept.append(batch)
        while sum(len(part[0]) for part in kept) >= rows:
            joined = [torch.cat(parts) for parts in zip(*kept, strict=True)]
            yield tuple(part[:rows] for part in joined)
            kept = [tuple(part[rows:] for part in joined)] if len(joined[0]) > rows else []
    if kept:
        yield tuple(torch.cat(parts) for parts in zip(*kept, strict=True))


def _joinable(first: Batch, batch: Batch) -> bool:
    """Whether both are tuples of tensors that can be put one after the other."""
    if not all(
        isinstance(b, (tuple, list)) and all(isinstance(t, Tensor) for t in b) for b in (first, batch)
    ):
        return False
    alike = len(first) == len(batch) > 0 and all(t.dim() and len(t) == len(batch[0]) for t in batch)
    pairs = zip(first, batch, strict=False)
    return alike and all(a.shape[1:] == b.shape[1:] and a.dtype == b.dtype for a, b in pairs)


def feed(data: Any, batch_size: int, seed: int, device: torch.device, rows: int | None = None) -> Feed:
    """Any form of data as batches on the device.

    Args:
        data: a `Data` or full arrays `(x, y)`, moved once and shuffled anew for each epoch; one batch of
            another form or a list of batches, moved once; or a loader, whose batches are moved as they come.
        batch_size: rows per batch that is cut here.
        seed: of the order of the rows.
        rows: of batches joined or cut from those of a loader or a list; None takes them as they come.

    Raises:
        DataError: if it is none of these, or empty.

    Examples:
        >>> whole = feed((torch.zeros(8, 2), torch.zeros(8, 1)), 4, seed=0, device=torch.device("cpu"))
        >>> [len(y) for _, y in whole.epoch()]
        [4, 4]
    """
    if isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        data = Data(*data, data[0][:0], data[1][:0], "(x, y)", classes=None)
    if isinstance(data, Data):
        order = torch.Generator().manual_seed(seed)
        epoch = partial(data.to(device).batches, batch_size, generator=order, epochs=1)
        return Feed(epoch, data.batch_count(batch_size))
    if isinstance(data, (tuple, list, Mapping, Tensor)) or not isinstance(data, Iterable):
        batches = [to_device(batch, device) for batch in recut(as_batches(data), rows)]
        return Feed(lambda: batches, len(batches))
    known = length_hint(data) if rows is None else 0
    return Feed(lambda: (to_device(batch, device) for batch in recut(data, rows)), known or None)


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch with all its tensors on the device."""
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, dict):
        return {key: to_device(member, device) for key, member in batch.items()}
    if type(batch) in (tuple, list):
        return type(batch)(to_device(member, device) for member in batch)
    return batch


def choose_device(name: str) -> torch.device:
    """The device of this name; auto is CUDA, else MPS, else the CPU."""
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def move(setup: Setup, device: torch.device) -> None:
    """Move the model, and with it the loss and what the optimizer remembers."""
    moved = home(setup.model).type != device.type
    setup.model.to(device)
    if isinstance(setup.loss_fn, nn.Module):
        setup.loss_fn.to(device)
    if moved and isinstance(setup.optimizer, Optimizer):  # loading puts the state beside its parameter
        setup.optimizer.load_state_dict(setup.optimizer.state_dict())


def home(model: nn.Module) -> torch.device:
    """The device of the first parameter; the CPU for a model without any."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))
