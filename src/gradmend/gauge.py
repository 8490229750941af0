"""Gauge: measures tensors as they come by, several of one shape together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from gradmend import stats
from gradmend.ledger import Key
from gradmend.samples import precision, real

_SMALL = 2**14
"""Values of a tensor that is cheaper to copy than to measure by itself."""

_ROOM, _ROOM_OF_SAMPLES = 2**17, 2**15
"""Values of small tensors, and of samples of large ones, that wait together at most."""

_HEIGHT = 32
"""How many tensors are measured together at most."""

_GRAMS = 64
"""How many Gram matrices, of 2 kB each, are looked at together."""

_FRUGAL = 32
"""Of the room of samples and Gram matrices, one part in so many."""

Rows: TypeAlias = Tensor | Sequence[Sequence[float]]
"""Numbers, a row for each place; those that are known already are no tensor."""

Look: TypeAlias = Callable[[Tensor, Sequence[Key]], None]


class Pile:
    """Copies of tensors of one shape, from several places.

    Args:
        look: takes them, [places, *shape], in float32 or float64, and the places' keys.
        room: for how many values.
    """

    def __init__(self, look: Look, room: int = _ROOM) -> None:
        self._look = look
        self._room = room
        self._keys: list[Key] = []
        self._slots: Sequence[Tensor] = ()

    def add(self, key: Key, x: Tensor) -> None:
        """Keep a copy; if there is no room, those that wait are looked at before."""
        place = len(self._keys)
        if place == len(self._slots):
            self._make_room(x)
            place = 0
        self._slots[place].copy_(x)
        self._keys.append(key)

    def reduce(self) -> None:
        """Hand over what waits."""
        if self._keys:
            self._look(self._space[: len(self._keys)], tuple(self._keys))
            self._keys.clear()

    def _make_room(self, like: Tensor) -> None:
        if self._slots:
            self.reduce()
            return
        height = max(1, min(_HEIGHT, self._room // max(1, like.numel())))
        self._space = like.new_empty((height, *like.shape), dtype=precision(like))
        self._slots = self._space.unbind(0)


class Single:
    """Measures the size of large tensors one by one, and piles up a few samples of each.

    Args:
        size: takes whole tensors [1, B, ...] and their keys.
        look: takes samples of them [places, b, n] and the keys.
        room: for how many values of samples.
    """

    def __init__(self, size: Look | None, look: Look | None, room: int = _ROOM_OF_SAMPLES) -> None:
        self._size = size
        self._rows = None if look is None else Pile(look, room)

    def add(self, key: Key, x: Tensor) -> None:
        """Take a tensor, which may change afterwards."""
        x = real(x)
        if self._size is not None:
            self._size(x[None], (key,))
        if self._rows is not None:
            self._rows.add(key, stats.some_samples(x.flatten(1)))

    def reduce(self) -> None:
        """Hand over the samples that wait."""
        if self._rows is not None:
            self._rows.reduce()


class Gauge:
    """Measures tensors [B, ...] of any shapes.

    Args:
        size: takes whole tensors [places, B, ...], in float32 or float64, and the places' keys.
        look: takes samples of them [places, b, n] and the keys.
        frugal: with hardly any memory, in up to half as much time again.
    """

    def __init__(self, size: Look | None, look: Look | None, frugal: bool = False) -> None:
        self._size = size
        self._look = look
        self._frugal = frugal
        self._places: dict[object, Pile | Single] = {}

    def place(self, like: Tensor) -> Pile | Single:
        """Where to add tensors of this shape, precision and device."""
        kind = (like.shape, like.dtype, like.device)
        if kind not in self._places:
            small = like.numel() <= _SMALL and not self._frugal
            room = _ROOM_OF_SAMPLES // (_FRUGAL if self._frugal else 1)
            self._places[kind] = Pile(self._both) if small else Single(self._size, self._look, room)
        return self._places[kind]

    def finish(self) -> None:
        """Measure what waits, and let go of its space."""
        for place in self._places.values():
            place.reduce()
        self._places.clear()

    def _both(self, x: Tensor, keys: Sequence[Key]) -> None:
        if self._size is not None:
            self._size(x, keys)
        if self._look is not None:
            self._look(stats.some_samples(x.flatten(2)), keys)


class Angles:
    """Compares the directions of samples, of many places together.

    Args:
        look: takes what `stats.directions` found [places, 2], and the places' keys.
        frugal: with fewer places that wait.
    """

    def __init__(self, look: Look, frugal: bool = False) -> None:
        self._look = look
        self._most = _GRAMS // (_FRUGAL if frugal else 1)
        self._keys: list[Key] = []
        self._grams: list[Tensor] = []

    def put(self, rows: Tensor, keys: Sequence[Key]) -> None:
        """Take samples [places, b, n]."""
        self._keys += keys
        self._grams.append(stats.gram(rows))
        if len(self._keys) >= self._most:
            self.finish()

    def finish(self) -> None:
        """Look at what waits."""
        if self._keys:
            self._look(stats.directions(torch.cat(self._grams)), tuple(self._keys))
            self._keys.clear()
            self._grams.clear()


def moments(x: Tensor) -> Rows:
    """Sum and norm of each of several tensors [places, B, ...], in float64 where float32 cannot hold squares.

    >>> moments(torch.tensor([[[3.0, 4.0]]]))
    [(7.0, 5.0)]
    """
    found = norms(x)
    if isinstance(found, Tensor):
        return torch.stack([x.flatten(1).sum(1, dtype=found.dtype), found[:, 0]], dim=1)
    sums = [x.sum().item()] if len(x) == 1 else x.flatten(1).sum(1).tolist()
    return [(total, norm) for total, (norm,) in zip(sums, found, strict=True)]


def norms(x: Tensor) -> Rows:
    """The norm of each of several tensors [places, B, ...], in float64 where float32 cannot hold the squares.

    >>> norms(torch.tensor([[[3.0, 4.0]], [[0.0, 1e-30]]])).tolist()
    [[5.0], [1.0000000031710769e-30]]
    """
    found: Tensor
    if x.device.type == "cpu":  # where numbers can be looked at without waiting for the device
        if len(x) == 1:
            known = [torch.linalg.vector_norm(x).item()]
        else:  # by rows: twice as fast
            known = torch.linalg.vector_norm(torch.linalg.vector_norm(x.flatten(2), dim=2), dim=1).tolist()
        if all(map(sure, known)):
            return [(norm,) for norm in known]
    found = torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=torch.float64)
    return found[:, None]


def sure(norm: float) -> bool:
    """Whether float32 can hold the squares of values of this size, and all that matters beside them.

    >>> sure(1.0), sure(1e-20)
    (True, False)
    """
    return 1e-12 < norm < 1e15
