"""Run: a copy of a setup in training that can be looked at, and go on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle, islice
from time import perf_counter

import torch

from gradmend.setup import Batch, Setup
from gradmend.training import Trial
from gradmend.training.evaluation import observe
from gradmend.training.feed import home, recut
from gradmend.training.loop import Meter, Stepper, accuracy, grouped, seeded

_STRETCH = 10
"""Steps between two looks at whether the loss is still a number."""


class Run:
    """A training of a copy that goes on from where it stopped, as if it had never stopped.

    Args:
        setup: stays as it is.
        batches: at least one; the steps go through them in turn.
        seed: of all random numbers while training.

    Example:
        >>> from functools import partial
        >>> from torch import nn
        >>> setup = Setup(nn.Linear(2, 1), nn.MSELoss(), partial(torch.optim.SGD, lr=0.1))
        >>> run = Run(setup, [(torch.ones(4, 2), torch.ones(4, 1))], seed=0)
        >>> run.train(5)
        >>> run.train(20)
        >>> len(run.trial("a line").losses)
        20
    """

    def __init__(self, setup: Setup, batches: Sequence[Batch], seed: int) -> None:
        self.setup = setup.copy()
        self.seconds = 0.0
        observed, tally = observe(self.setup)
        self._meter, self._device = Meter(tally, _STRETCH), home(self.setup.model)
        with seeded(seed, self._device):
            if not self.setup.model.training:
                self.setup.model.train()  # parts in eval mode stay so in a model that trains
            self._step = Stepper(observed)
            self._random = _state(self._device)
        given = list(recut(batches, setup.batch_size))
        self._batches = grouped(cycle(given), setup.accumulate)

    def train(self, steps: int, seconds: float = math.inf) -> None:
        """Go on until so many steps were taken in all, some seconds went by, or the loss is no number."""
        start, meter = perf_counter(), self._meter
        with self._own_numbers():
            for group in islice(self._batches, max(0, steps - meter.steps)):
                meter.add(self._step(group))
                if meter.diverged or perf_counter() - start > seconds:
                    break
            meter.fetch()
        self.seconds += perf_counter() - start

    def trial(self, label: str, judge: Callable[[Setup], float | None] | None = None) -> Trial:
        """What became of it so far; a judge looks at the copy and leaves it as it is."""
        meter = self._meter
        fit = judge(self.setup) if judge and not meter.diverged else None
        right = meter.right[-math.ceil(len(meter.right) / 4) :]
        return Trial(label, tuple(meter.losses), accuracy(right), self.seconds, meter.diverged, fit)

    @contextmanager
    def _own_numbers(self) -> Iterator[None]:
        """Random numbers go on where this run stopped; those of others stay."""
        with torch.random.fork_rng(devices=[self._device] if self._device.type == "cuda" else []):
            torch.set_rng_state(self._random[0])
            if self._device.type == "cuda":
                torch.cuda.set_rng_state(self._random[1], self._device)
            yield
            self._random = _state(self._device)


def _state(device: torch.device) -> list[torch.Tensor]:
    """Of the generators that a training on this device draws from."""
    own = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *own]
