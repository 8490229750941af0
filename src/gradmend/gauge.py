"""Gauge: measures tensors as they come by, small ones together and large ones by a few samples each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from gradmend import stats
from gradmend.ledger import Key, Pile
from gradmend.samples import real

_SMALL = 2**14
"""Values of a tensor that is cheaper to copy than to reduce by itself."""

_WHOLE, _SAMPLED = 32, 8
"""How many small tensors, and how many samples of large ones, make a pile: half a megabyte or less."""

Look: TypeAlias = Callable[[Tensor, Sequence[Key]], None]


class Gauge:
    """Measures tensors [B, ...] of any shapes.

    Args:
        size: takes whole tensors [places, B, ...], in float32 or float64, and the places' keys.
        look: takes samples of them [places, b, n] and the keys; None if nothing is to be seen there.
    """

    def __init__(self, size: Look, look: Look | None) -> None:
        self._size = size
        self._look = look
        self._piles: dict[object, Pile] = {}

    def put(self, key: int, x: Tensor) -> Pile | None:
        """Take a tensor, which may change afterwards; gives the pile where it waits, if it does."""
        small = x.numel() <= _SMALL
        if not small:
            x = real(x)
            self._size(x[None], (key,))
            if self._look is None:
                return None
            x = stats.some_samples(x.flatten(1))
        kind = (x.shape, x.dtype, x.device, small)
        pile = self._piles.get(kind)
        if pile is None:
            look = self._whole if small or self._look is None else self._look
            pile = self._piles[kind] = Pile(look, height=_WHOLE if small else _SAMPLED)
        pile.add(key, x)
        return pile

    def finish(self) -> None:
        """Reduce what waits, and let go of its space."""
        for pile in self._piles.values():
            pile.reduce()
        self._piles.clear()

    def _whole(self, x: Tensor, keys: Sequence[Key]) -> None:
        self._size(x, keys)
        if self._look is not None:
            self._look(stats.some_samples(x.flatten(2)), keys)


def moments(x: Tensor) -> Tensor:
    """Sum and norm of each [B, n], scaled first where float32 is too small or too coarse for the squares.

    >>> moments(torch.tensor([[[3.0, 4.0]]])).tolist()
    [[7.0, 5.0]]
    """
    norms = _norm(x)
    on_host = x.device.type == "cpu"  # where a number can be looked at without waiting for the device
    if x.dtype == torch.float64 or (on_host and all(map(sure, norms.tolist()))):
        return torch.stack([x.sum((1, 2)), norms], dim=1)
    largest = torch.maximum(x.amax((1, 2)), -x.amin((1, 2)))
    largest = torch.where(largest > 0, largest, 1)
    x = x / largest[:, None, None]
    return torch.stack([x.sum((1, 2)), _norm(x)], dim=1).double() * largest[:, None]


def sure(norm: float) -> bool:
    """Whether float32 can hold the squares of values of this size, and all that matters beside them.

    >>> sure(1.0), sure(1e-20)
    (True, False)
    """
    return 1e-12 < norm < 1e15


def _norm(x: Tensor) -> Tensor:
    """By rows first, which is three times as fast as all at once."""
    norm: Tensor = torch.linalg.vector_norm(torch.linalg.vector_norm(x, dim=2), dim=1)
    return norm
