"""Trials: short trainings of copies, which can be looked at and go on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from statistics import median
from time import perf_counter

import torch

from gradmend.setup import Batch, Budget, Setup
from gradmend.training.evaluation import observe
from gradmend.training.feed import home, recut
from gradmend.training.loop import Meter, Stepper, accuracy, grouped, seeded, to_train


@dataclass(frozen=True)
class Trial:
    """One short training run of a copy.

    Args:
        label: what was tried.
        losses: of every optimizer step.
        accuracy: the share of right outputs in the last quarter of the steps; None without classes.
        seconds: that it took.
        diverged: whether a loss was NaN or infinite.
        fit: what the judge said of the trained copy, if there was one.
    """

    label: str
    losses: tuple[float, ...]
    accuracy: float | None
    seconds: float
    diverged: bool
    fit: float | None = None

    @property
    def initial_loss(self) -> float:
        """The loss of the first step."""
        return self.losses[0]

    @property
    def final_loss(self) -> float:
        """The median loss of the last quarter of the steps; infinite when it diverged."""
        return math.inf if self.diverged else median(self.losses[-_quarter(len(self.losses)) :])


def run_trial(
    setup: Setup,
    batches: Sequence[Batch],
    budget: Budget,
    *,
    label: str = "",
    seed: int = 0,
    judge: Callable[[Setup], float | None] | None = None,
) -> Trial:
    """Train a copy on the batches, over and over in their order; nothing of the setup is touched.

    Args:
        batches: at least one, on the device of the model.
        budget: ends the run by steps or by seconds, whichever is first.
        label: what the trial is called.
        seed: of all random numbers while training.
        judge: looks at the trained copy, which is its own.

    Raises:
        SetupError: if the setup cannot be copied, or lacks a loss or an optimizer.
        BatchError: if model, batch and loss do not fit each other.

    Examples:
        >>> from functools import partial
        >>> nn = torch.nn
        >>> setup = Setup(nn.Linear(2, 1), nn.MSELoss(), partial(torch.optim.SGD, lr=0.1))
        >>> trial = run_trial(setup, [(torch.ones(4, 2), torch.ones(4, 1))], Budget(steps=20))
        >>> len(trial.losses), trial.final_loss < trial.initial_loss
        (20, True)
    """
    run = Run(setup, batches, seed, stretch=max(1, min(50, budget.steps // 8)))
    run.train(budget.steps, budget.seconds)
    return run.trial(label, judge)


class Run:
    """A training of a copy that goes on from where it stopped, as if it had never stopped.

    Args:
        setup: stays as it is.
        batches: at least one; the steps go through them in turn.
        seed: of all random numbers while training.
        stretch: steps between two looks at whether the loss is still a number.

    Examples:
        >>> from functools import partial
        >>> nn = torch.nn
        >>> setup = Setup(nn.Linear(2, 1), nn.MSELoss(), partial(torch.optim.SGD, lr=0.1))
        >>> run = Run(setup, [(torch.ones(4, 2), torch.ones(4, 1))], seed=0)
        >>> run.train(5)
        >>> run.train(20)
        >>> len(run.trial("a line").losses)
        20
    """

    def __init__(self, setup: Setup, batches: Sequence[Batch], seed: int, stretch: int = 10) -> None:
        self.setup = setup.copy()
        self.seconds = 0.0
        observed, tally = observe(self.setup)
        self._meter, self._device = Meter(tally, stretch), home(self.setup.model)
        with seeded(seed, self._device):
            to_train(self.setup.model)
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
        right = meter.right[-_quarter(len(meter.right)) :]
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


def _quarter(steps: int) -> int:
    return math.ceil(steps / 4)


def _state(device: torch.device) -> list[torch.Tensor]:
    """Of the generators that a training on this device draws from."""
    own = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *own]
