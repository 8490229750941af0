"""Ledger: numbers of one measured step, kept on their device until all are fetched in one transfer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from gradmend.samples import precision

Key: TypeAlias = int | str
Numbers: TypeAlias = dict[tuple[str, Key], list[float]]


class Ledger:
    """Numbers by group and key."""

    def __init__(self) -> None:
        self._waiting: list[tuple[str, Sequence[Key], Tensor]] = []

    def add(self, group: str, keys: Sequence[Key], values: Tensor) -> None:
        """Note values: one row of the tensor for each key."""
        self._waiting.append((group, keys, values.detach()))

    def fetch(self) -> Numbers:
        """All numbers, by group and key."""
        numbers: Numbers = {}
        start = 0
        device = self._waiting[0][2].device
        flat = torch.cat([t.double().flatten().to(device) for _, _, t in self._waiting]).tolist()
        for group, keys, values in self._waiting:
            width = values.numel() // len(keys)
            for key in keys:
                numbers[group, key] = flat[start : start + width]
                start += width
        return numbers


class Pile:
    """Tensors of one shape from several places, reduced together: few operations on much, not many on little.

    Args:
        reduce: takes a tensor [places, *shape] and the places' keys.
        height: of how many tensors; the space for them is the cost in memory.
    """

    def __init__(self, reduce: Callable[[Tensor, Sequence[Key]], None], height: int) -> None:
        self._reduce = reduce
        self._height = height
        self._keys: list[Key] = []
        self._space: Tensor | None = None
        self._slots: Sequence[Tensor] = ()

    def __contains__(self, key: Key) -> bool:
        return key in self._keys

    def add(self, key: Key, x: Tensor) -> None:
        """Keep a copy of a tensor until the pile is high enough; all must be of one shape."""
        if self._space is None:
            self._space = torch.empty((self._height, *x.shape), dtype=precision(x), device=x.device)
            self._slots = self._space.unbind(0)
        elif len(self._keys) == len(self._slots):
            self.reduce()
        self._slots[len(self._keys)].copy_(x)
        self._keys.append(key)

    def reduce(self) -> None:
        """Reduce what is there."""
        if self._space is not None and self._keys:
            self._reduce(self._space[: len(self._keys)], tuple(self._keys))
            self._keys.clear()
