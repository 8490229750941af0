"""Evaluation: the loss on held-out batches, and how many outputs are right."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmend.errors import DataError
from gradmend.readout import lower
from gradmend.setup import Batch, LossFn, Setup

_THRESHOLDS: Final[Mapping[Any, float]] = {
    nn.BCEWithLogitsLoss: 0.0,
    F.binary_cross_entropy_with_logits: 0.0,
    nn.BCELoss: 0.5,
    F.binary_cross_entropy: 0.5,
}


class Tally:
    """Counts right outputs: of classes [B, K] against int64 [B], or of one unit against 0 and 1.

    Nothing is computed until `take`, so that watching a step costs it next to nothing.
    """

    def __init__(self, loss_fn: LossFn | None) -> None:
        self._loss_fn = loss_fn
        self._right: Callable[[Tensor, Tensor], Tensor] | None = None
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._first = True

    def add(self, output: Any, target: Any) -> None:
        """Keep what a loss function was given."""
        if self._first:
            self._first = False
            self._right = judge(self._loss_fn, output, target)
        if self._right is not None:
            self._kept.append((output.detach(), target))

    def take(self) -> tuple[Tensor | None, int]:
        """How many outputs were right, a scalar on their device, and of how many; then start afresh."""
        if self._right is None or not self._kept:
            return None, 0
        outputs, targets = map(torch.cat, zip(*self._kept, strict=True))
        self._kept.clear()
        return self._right(outputs, targets).sum(dtype=torch.float32), len(outputs)


def observe(setup: Setup) -> tuple[Setup, Tally]:
    """The same setup, whose loss shows all it compares to a tally; a `step` shows nothing."""
    tally, loss_fn = Tally(setup.loss_fn), setup.loss_fn
    if loss_fn is None:
        return setup, tally

    def watched(output: Any, target: Any) -> Tensor:
        loss = loss_fn(output, target)
        tally.add(output, target)
        return loss

    watched.__name__ = getattr(loss_fn, "__name__", type(loss_fn).__name__)
    return replace(setup, loss_fn=watched), tally


def evaluate(setup: Setup, batches: Iterable[Batch]) -> tuple[float, float | None]:
    """Mean loss over the rows, and the share of right outputs, in evaluation mode.

    Args:
        batches: at least one.

    Returns:
        The loss, and an accuracy between 0 and 1: None if the setup does not classify.

    Raises:
        DataError: without any batch.

    Examples:
        >>> setup = Setup(nn.Identity(), nn.CrossEntropyLoss())
        >>> evaluate(setup, [(torch.eye(3), torch.tensor([0, 1, 1]))])[1]
        0.6666666666666666
    """
    watched, tally = observe(setup)
    losses: list[Tensor] = []
    right: list[Tensor] = []
    rows: list[int] = []
    judged = 0
    with modes_restored(setup.model), torch.no_grad():
        setup.model.eval()
        for batch in batches:
            losses.append(watched.loss(batch))
            rows.append(_rows(batch))
            count, outputs = tally.take()
            right += [] if count is None else [count]
            judged += outputs  # of flattened sequences more than rows
    if not losses:
        raise DataError("There is no batch to evaluate on. Check the length of the test data.")
    weights = torch.tensor(rows, dtype=losses[0].dtype, device=losses[0].device)
    loss = (torch.stack(losses) * weights).sum() / weights.sum()
    return loss.item(), torch.stack(right).sum().item() / judged if right else None


@contextmanager
def modes_restored(model: nn.Module) -> Iterator[None]:
    """Put every module back into train or evaluation mode, as it was."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def judge(loss_fn: LossFn | None, output: Any, target: Any) -> Callable[[Tensor, Tensor], Tensor] | None:
    """What counts as right for such outputs, a function of outputs and targets; None if nothing does."""
    if not isinstance(output, Tensor) or not isinstance(target, Tensor) or output.dim() == 0:
        return None
    if target.dtype == torch.int64 and target.dim() == 1 and output.dim() == 2 and output.shape[1] > 1:
        # not argmax, which is ten times slower where classes do not lie side by side in memory
        return lambda outputs, targets: outputs.max(1).indices == targets
    threshold = _threshold(loss_fn)
    if threshold is None or output.numel() != len(output) or target.numel() != len(output):
        return None
    if not bool(((target == 0) | (target == 1)).all()):  # of amounts none is right
        return None
    return lambda outputs, targets: (outputs > threshold).flatten() == (targets > 0.5).flatten()


def _threshold(loss_fn: LossFn | None) -> float | None:
    fn: Any = loss_fn.func if isinstance(loss_fn, partial) else getattr(loss_fn, "loss", loss_fn)
    return _THRESHOLDS.get(type(fn) if isinstance(fn, nn.Module) else fn)


def _rows(batch: Batch) -> int:
    """How many rows a batch has; 1 for what only a user's `step` understands."""
    members = list(batch.values()) if isinstance(batch, Mapping) else batch
    found = (
        [m for m in members if isinstance(m, Tensor) and m.dim()]
        if isinstance(members, (list, tuple))
        else []
    )
    return len(found[0]) if found else 1


def fit(setup: Setup, batches: Iterable[Batch]) -> float | None:
    """By how much the loss of samples with their own targets is lower than with those of others.

    As a share of the sum of both: 0 for a network that makes nothing of its input, whatever the loss, and
    1 for one that is always right; -1 if a loss is no number. Of a squared error it is about R².

    Args:
        batches: `(x, ..., y)`, at least one. Of single rows each gets the targets of other batches.

    Returns:
        None if targets cannot be exchanged: a batch is no such tuple, or there is a single row.
    """
    pairs = [_own_and_others(setup, batch, others) for batch, others in _exchanged(list(batches))]
    if any(pair is None for pair in pairs):
        return None
    own, others = (math.fsum(column) for column in zip(*filter(None, pairs), strict=True))
    return lower(own, others)


def _exchanged(batches: list[Batch]) -> Iterator[tuple[Batch, list[Tensor]]]:
    """Each batch, and its targets in other orders; of a single row, the targets of other batches."""
    for place, batch in enumerate(batches):
        target = _targets(batch)
        if target is None:
            yield batch, []
        elif len(target) > 1:
            yield batch, [target.roll(shift, 0) for shift in _quarters(len(target))]
        else:
            others = (_targets(batches[place - shift]) for shift in _quarters(len(batches)))
            yield batch, [other for other in others if other is not None and other.shape == target.shape]


def _quarters(count: int) -> list[int]:
    """How far to move: a quarter of so many, half and three quarters, where that is something."""
    return sorted({count // 4, count // 2, 3 * count // 4} - {0})


def _targets(batch: Batch) -> Tensor | None:
    """What the last member of a batch holds for each row."""
    if not isinstance(batch, (tuple, list)) or len(batch) < 2 or not isinstance(batch[-1], Tensor):
        return None
    target = batch[-1]
    plain = not target.is_nested and target.layout == torch.strided
    return target if plain and target.dim() and len(target) else None


def _own_and_others(setup: Setup, batch: Batch, targets: list[Tensor]) -> tuple[float, float] | None:
    """The loss of a batch with its own targets, and the mean with others."""
    if not targets:
        return None
    with torch.no_grad(), modes_restored(setup.model):
        setup.model.eval()
        own, *others = (loss.item() for loss in setup.losses(batch, (batch[-1], *targets)))
    return own, math.fsum(others) / len(others)
