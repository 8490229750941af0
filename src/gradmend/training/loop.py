"""Loop: one optimizer step after another, and what they were like."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from gradmend.errors import SetupError
from gradmend.harmless import seed_noise
from gradmend.setup import Batch, Setup
from gradmend.training.evaluation import Tally


class Stepper:
    """Takes the optimizer steps of a setup; a factory makes its optimizer here.

    Examples:
        >>> from torch import nn
        >>> step = Stepper(Setup(nn.Linear(2, 1), nn.MSELoss(), SGD))
        >>> step([(torch.zeros(4, 2), torch.zeros(4, 1))]).shape
        torch.Size([])
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.optimizer = setup.build_optimizer()
        self._ours = not isinstance(setup.optimizer, Optimizer)
        self.schedule = build_schedule(setup, self.optimizer)
        self._parameters = [p for group in self.optimizer.param_groups for p in group["params"]]

    def __call__(self, batches: Sequence[Batch]) -> Tensor:
        """One step on one batch, or on several that are accumulated; returns their mean loss, detached."""
        self.optimizer.zero_grad()
        loss = self._backward(batches)
        if self.setup.gradient_transform is not None:
            self.setup.gradient_transform(self._parameters)
        if self._ours:
            self._ours = False
            fuse(self.optimizer)
        self.optimizer.step()
        if self.schedule is not None:
            self.schedule.step()
        return loss

    def _backward(self, batches: Sequence[Batch]) -> Tensor:
        if len(batches) == 1:
            loss = self.setup.loss(batches[0])
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.detach()
        losses = [self._backward_part(batch, len(batches)) for batch in batches]
        return torch.stack(losses).sum()

    def _backward_part(self, batch: Batch, parts: int) -> Tensor:
        loss = self.setup.loss(batch) / parts
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()


def build_schedule(setup: Setup, optimizer: Optimizer) -> LRScheduler | None:
    """The schedule of an optimizer that was made for this setup, if it has one.

    Raises:
        SetupError: for one that waits for a measured quantity.
    """
    schedule = None if setup.schedule is None else setup.schedule(optimizer)
    if isinstance(schedule, ReduceLROnPlateau):
        raise SetupError(
            "A schedule is stepped once per optimizer step, without a measured quantity: "
            "ReduceLROnPlateau cannot be used. Take another, such as CosineAnnealingLR."
        )
    return schedule


_FUSED: dict[str, tuple[type[Optimizer], ...]] = {
    "cpu": (Adam, AdamW, SGD, Adagrad),
    "cuda": (Adam, AdamW, SGD),
}


def fuse(optimizer: Optimizer) -> None:
    """Switch torch's fused kernel on, before the first step, unless the user chose a kernel.

    The arithmetic is the same but for rounding; the step is 1.1 to 1.9 times as fast.
    """
    groups = optimizer.param_groups
    parameters = [p for group in groups for p in group["params"]]
    if all(map(_is_plain, groups)) and all(_fusible(p, type(optimizer)) for p in parameters):
        for group in groups:
            group["fused"] = True


def _is_plain(group: dict[str, Any]) -> bool:
    chosen = group.get("fused") is not None or group.get("foreach") is not None
    return not (chosen or group.get("differentiable") or group.get("capturable"))


def _fusible(parameter: Tensor, kind: type[Optimizer]) -> bool:
    dense = parameter.grad is None or parameter.grad.layout == torch.strided
    exact = parameter.dtype in (torch.float32, torch.float64)
    return dense and exact and kind in _FUSED.get(parameter.device.type, ())


@dataclass
class Meter:
    """Collects the losses of steps on their device and fetches them in stretches, in one transfer each.

    Args:
        tally: counts right outputs meanwhile.
        stretch: how many steps.
    """

    tally: Tally
    stretch: int = 50
    losses: list[float] = field(default_factory=list)
    right: list[tuple[float, int]] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    diverged: bool = False
    _pending: list[Tensor] = field(default_factory=list)
    _since: float = field(default_factory=perf_counter)

    def add(self, loss: Tensor) -> None:
        """Note the loss of a step, a scalar."""
        self._pending.append(loss)
        if len(self._pending) >= self.stretch:
            self.fetch()

    def fetch(self) -> None:
        """Bring what was collected to the host; a loss that is no finite number is divergence."""
        if not self._pending:
            return
        count, rows = self.tally.take()
        values = torch.stack([*self._pending, *([] if count is None else [count])]).tolist()
        losses = values[: len(self._pending)]
        if count is not None:
            self.right.append((values[-1], rows))
        self.losses += losses
        self.diverged = self.diverged or not all(map(math.isfinite, losses))
        now = perf_counter()
        self.step_seconds.append((now - self._since) / len(losses))
        self._since = now
        self._pending.clear()

    @property
    def fetched(self) -> bool:
        """Whether all that was noted is on the host."""
        return not self._pending

    @property
    def steps(self) -> int:
        """How many steps were noted."""
        return len(self.losses) + len(self._pending)


def to_train(model: nn.Module) -> None:
    """A model wholly in eval mode trains wholly; in one that trains, parts in eval mode stay frozen so."""
    if not model.training:
        model.train()


def accuracy(right: Sequence[tuple[float, int]]) -> float | None:
    """The share of right outputs, from pairs (right, all); None without any.

    >>> accuracy([(1.0, 2), (2.0, 2)])
    0.75
    """
    rows = sum(n for _, n in right)
    return sum(count for count, _ in right) / rows if rows else None


def grouped(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """Lists of `size` batches, the last may be shorter.

    >>> list(grouped("abc", 2))
    [['a', 'b'], ['c']]
    """
    stream = iter(batches)
    while group := list(islice(stream, size)):
        yield group


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers of torch by `seed`; its global state returns afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        seed_noise(seed)
        yield


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread inside, so that sums are the same wherever they run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def best_threads(setup: Setup, batches: Sequence[Batch]) -> Iterator[None]:
    """Compute with one thread instead of torch's number where that is faster; the number returns afterwards.

    Small networks run several times faster on one thread. It is timed on a copy of the setup.
    """
    threads = torch.get_num_threads()
    try:
        if threads > 1 and _one_is_faster(setup, batches, threads):
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)


def _one_is_faster(setup: Setup, batches: Sequence[Batch], threads: int) -> bool:
    try:
        step = Stepper(setup.copy())
    except SetupError:
        return False
    seconds: dict[int, list[float]] = {1: [], threads: []}
    with seeded(0, torch.device("cpu")):
        for _ in range(3):
            for number, times in seconds.items():
                torch.set_num_threads(number)
                times += step_times(step, batches, 4)[1:]
    return median(seconds[1]) <= median(seconds[threads])


def step_times(step: Stepper, batches: Sequence[Batch], repeats: int) -> list[float]:
    """The seconds of each of several steps on the same batches."""
    times = []
    for _ in range(repeats):
        start = perf_counter()
        step(batches)
        times.append(perf_counter() - start)
    return times
