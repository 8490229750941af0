"""Data: training and held-out rows in memory, and shuffled mini-batches of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, count

import torch
from torch import Tensor

from gradmend.errors import DataError


@dataclass(frozen=True, eq=False, repr=False)
class Data:
    """Training and held-out rows, as tensors in memory.

    Args:
        x: float32 inputs [rows, ...].
        y: int64 class numbers [rows], or float32 targets [rows, targets]; 0 and 1 [rows, 1] where one unit
            tells two classes apart.
        x_test: held-out inputs [test rows, ...]; there may be none.
        y_test: held-out targets, of the form of `y`.
        name: what it is called in tables and messages.
        classes: how many classes; None for regression.

    Raises:
        DataError: if there are no rows, or inputs and targets differ in number.

    Examples:
        >>> x, y = torch.randn(10, 3), torch.arange(10) % 2
        >>> Data(x[:8], y[:8], x[8:], y[8:], name="toy", classes=2)
        Data('toy', 8 + 2 rows of [3], 2 classes)
    """

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    name: str
    classes: int | None

    def __post_init__(self) -> None:
        for part, x, y in (("training", self.x, self.y), ("test", self.x_test, self.y_test)):
            if len(x) != len(y):
                raise DataError(f"{self.name}: {len(x)} rows of {part} inputs, but {len(y)} of targets.")
        if len(self.x) == 0:
            raise DataError(f"{self.name}: there are no training rows.")

    def __repr__(self) -> str:
        task = "regression" if self.classes is None else f"{self.classes} classes"
        rows = f"{len(self.x)} + {len(self.x_test)} rows of {list(self.x.shape[1:])}"
        return f"Data({self.name!r}, {rows}, {task})"

    def to(self, device: torch.device | str) -> Data:
        """The same data on another device."""
        tensors = {part: getattr(self, part).to(device) for part in ("x", "y", "x_test", "y_test")}
        return replace(self, **tensors)

    def head(self, n: int) -> tuple[Tensor, Tensor]:
        """The first `n` training rows as one batch: inputs [n, ...], targets [n] or [n, targets]."""
        return self.x[:n], self.y[:n]

    def batches(
        self, size: int, *, generator: torch.Generator | None = None, epochs: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Mini-batches of the training rows, each epoch in a new random order.

        The last batch of an epoch may be shorter. A single left-over row joins the batch before it:
        batch normalization cannot train on one row.

        Args:
            size: rows per batch.
            generator: draws the order, on its own device; torch's global one by default.
            epochs: how many times through the data; without end when None.

        Returns:
            Pairs of inputs [size, ...] and targets [size] or [size, targets].

        Raises:
            DataError: if `size` is less than 1.

        Examples:
            >>> x, y = torch.randn(9, 3), torch.randn(9, 1)
            >>> data = Data(x, y, x[:0], y[:0], name="toy", classes=None)
            >>> [len(y) for _, y in data.batches(4, epochs=1)]
            [4, 5]
        """
        if size < 1:
            raise DataError(f"A batch has one row or more, not {size}.")
        rounds = count() if epochs is None else range(epochs)
        return chain.from_iterable(self._epoch(size, generator) for _ in rounds)

    def batch_count(self, size: int) -> int:
        """How many batches of so many rows an epoch has.

        Examples:
            >>> x = torch.zeros(9, 1)
            >>> Data(x, x, x[:0], x[:0], name="toy", classes=None).batch_count(4)
            2
        """
        return math.ceil(len(self.x) / size) - (len(self.x) > size > 1 == len(self.x) % size)

    def _epoch(self, size: int, generator: torch.Generator | None) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in self.order(size, generator):  # index_select copies at less than half the cost of x[rows]
            yield self.x.index_select(0, rows), self.y.index_select(0, rows)

    def order(self, size: int, generator: torch.Generator | None = None) -> list[Tensor]:
        """The numbers of the rows of each batch of one epoch, as `batches` draws them."""
        device = self.x.device if generator is None else generator.device
        order = torch.randperm(len(self.x), generator=generator, device=device).to(self.x.device)
        parts = list(torch.split(order, size))
        if len(parts) > 1 and len(parts[-1]) == 1 < size:
            parts[-2:] = [torch.cat(parts[-2:])]
        return parts
