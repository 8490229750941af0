"""Gauge: measures tensors as they come by, small ones together and large ones by a few samples each."""

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

_HEIGHT = 24
"""How many small tensors, or samples of large ones, are measured together at most."""

_GRAMS = 64
"""How many Gram matrices, of 2 kB each, are looked at together."""

Look: TypeAlias = Callable[[Tensor, Sequence[Key]], None]


class Pile:
    """Copies of tensors of one shape, from several places.

    Args:
        like: such a tensor.
        height: of how many.
        look: takes them, [places, *shape], and the places' keys.
    """

    def __init__(self, like: Tensor, height: int, look: Look) -> None:
        self._look = look
        self._keys: list[Key] = []
        self._space = like.new_empty((height, *like.shape), dtype=precision(like))
        self._slots = self._space.unbind(0)

    def add(self, key: Key, x: Tensor) -> None:
        """Keep a copy, until there is no room for another."""
        self._slots[len(self._keys)].copy_(x)
        self._keys.append(key)
        if len(self._keys) == len(self._slots):
            self.reduce()

    def reduce(self) -> None:
        """Hand over what waits."""
        if self._keys:
            self._look(self._space[: len(self._keys)], tuple(self._keys))
            self._keys.clear()


class Gauge:
    """Measures tensors [B, ...] of any shapes.

    Args:
        size: takes whole tensors [places, B, ...], in float32 or float64, and the places' keys.
        look: takes samples of them [places, b, n] and the keys.
    """

    def __init__(self, size: Look | None, look: Look | None) -> None:
        self._size = size
        self._look = look
        self._piles: dict[object, Pile] = {}

    def put(self, key: Key, x: Tensor) -> None:
        """Take a tensor, which may change afterwards."""
        small = x.numel() <= _SMALL
        reduce: Look = self._both
        if not small:
            x = real(x)
            if self._size is not None:
                self._size(x[None], (key,))
            if self._look is None:
                return
            x, reduce = stats.some_samples(x.flatten(1)), self._look
        kind = (x.shape, x.dtype, x.device, small)
        if kind not in self._piles:
            self._piles[kind] = Pile(x, _HEIGHT if small else _HEIGHT // 4, reduce)
        self._piles[kind].add(key, x)

    def finish(self) -> None:
        """Measure what waits, and let go of its space."""
        for pile in self._piles.values():
            pile.reduce()
        self._piles.clear()

    def _both(self, x: Tensor, keys: Sequence[Key]) -> None:
        if self._size is not None:
            self._size(x, keys)
        if self._look is not None:
            self._look(stats.some_samples(x.flatten(2)), keys)


class Angles:
    """Compares the directions of samples, of many places together.

    Args:
        look: takes what `stats.directions` found [places, 2], and the places' keys.
    """

    def __init__(self, look: Look) -> None:
        self._look = look
        self._keys: list[Key] = []
        self._grams: list[Tensor] = []

    def put(self, rows: Tensor, keys: Sequence[Key]) -> None:
        """Take samples [places, b, n]."""
        self._keys += keys
        self._grams.append(stats.gram(rows))
        if len(self._keys) >= _GRAMS:
            self.finish()

    def finish(self) -> None:
        """Look at what waits."""
        if self._keys:
            self._look(stats.directions(torch.cat(self._grams)), tuple(self._keys))
            self._keys.clear()
            self._grams.clear()


def moments(x: Tensor) -> Tensor:
    """Sum and norm of each of several tensors [places, B, n], in float64 where float32 cannot hold squares.

    >>> moments(torch.tensor([[[3.0, 4.0]]])).tolist()
    [[7.0, 5.0]]
    """
    found = norms(x)
    return torch.stack([x.sum((1, 2), dtype=found.dtype), found], dim=1)


def norms(x: Tensor) -> Tensor:
    """The norm of each of several tensors [places, B, n], in float64 where float32 cannot hold the squares.

    >>> norms(torch.tensor([[[3.0, 4.0]], [[0.0, 1e-30]]])).tolist()
    [5.0, 1.0000000031710769e-30]
    """
    found: Tensor
    if x.device.type == "cpu":  # where numbers can be looked at without waiting for the device
        found = torch.linalg.vector_norm(torch.linalg.vector_norm(x, dim=2), dim=1)  # by rows: twice as fast
        if all(map(sure, found.tolist())):
            return found
    found = torch.linalg.vector_norm(x, dim=(1, 2), dtype=torch.float64)
    return found


def sure(norm: float) -> bool:
    """Whether float32 can hold the squares of values of this size, and all that matters beside them.

    >>> sure(1.0), sure(1e-20)
    (True, False)
    """
    return 1e-12 < norm < 1e15
