"""Ledger: numbers of one measured step; those on a device stay there until all are fetched together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Key: TypeAlias = int | str
Numbers: TypeAlias = Mapping[str, Mapping[Key, Sequence[float]]]
"""By group and key; a group that was never added is empty."""


class Ledger:
    """Numbers by group and key."""

    def __init__(self) -> None:
        self._numbers: dict[str, dict[Key, Sequence[float]]] = defaultdict(dict)
        self._waiting: list[tuple[str, Sequence[Key], Tensor]] = []

    def add(self, group: str, keys: Sequence[Key], values: Tensor | Sequence[Sequence[float]]) -> None:
        """Note values: one row for each key."""
        if not isinstance(values, Tensor):
            self._numbers[group].update(zip(keys, values, strict=True))
        elif values.device.type == "cpu":
            rows = values.flatten(1)
            short = values.dtype == torch.bool  # a byte each, and no Python object
            found = [row.tobytes() for row in rows.numpy()] if short else rows.tolist()
            self._numbers[group].update(zip(keys, found, strict=True))
        else:
            self._waiting.append((group, keys, values.detach().flatten(1)))

    def fetch(self) -> Numbers:
        """All numbers."""
        if self._waiting:
            flat = torch.cat([values.double().flatten() for _, _, values in self._waiting]).cpu()
            parts = torch.split(flat, [values.numel() for _, _, values in self._waiting])
            for (group, keys, values), part in zip(self._waiting, parts, strict=True):
                self.add(group, keys, part.view_as(values).to(values.dtype))
            self._waiting.clear()
        return self._numbers
