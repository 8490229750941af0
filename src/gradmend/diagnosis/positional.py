"""Positional: batches given by name as batches `(x1, ..., y)`, so that targets can be exchanged."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from gradmend.setup import Batch, Setup

_TARGETS = ("labels", "label", "targets", "target", "y")
"""What targets are called; the first is that of Hugging Face's models."""


def positional(setup: Setup, batches: Sequence[Batch]) -> tuple[Setup, Sequence[Batch]]:
    """The same setup for batches without names, the target last.

    Setup and batches as they are, where they have no names, or none of a target.

    Args:
        batches: at least one.

    Examples:
        >>> import torch
        >>> def step(model, batch):
        ...     return (model(batch["x"]) - batch["labels"]).square().mean()
        >>> batch = {"labels": torch.zeros(8, 1), "x": torch.ones(8, 2)}
        >>> setup, (unnamed,) = positional(Setup(nn.Linear(2, 1), step=step), [batch])
        >>> [list(part.shape) for part in unnamed], setup.loss(unnamed).shape
        ([[8, 2], [8, 1]], torch.Size([]))
    """
    names = _names(batches)
    if not names:
        return setup, batches

    def step(model: nn.Module, batch: Batch) -> Tensor:
        named = copy.copy(batches[0])  # of the same class, which may be one of the user's
        named.update(zip(names, batch, strict=True))
        return Setup(model, step=setup.step).loss(named)

    return replace(setup, loss_fn=None, step=step), [tuple(batch[n] for n in names) for batch in batches]


def _names(batches: Sequence[Batch]) -> tuple[str, ...]:
    """What all the batches hold, the target last; nothing if they are not alike."""
    first = batches[0]
    if not isinstance(first, Mapping):
        return ()
    target = next((name for name in _TARGETS if isinstance(first.get(name), Tensor)), None)
    names = tuple(name for name in first if name != target)
    alike = all(isinstance(batch, Mapping) and batch.keys() == first.keys() for batch in batches)
    return (*names, target) if target and names and alike else ()
