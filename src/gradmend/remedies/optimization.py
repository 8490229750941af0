"""Optimizer, learning rate, schedule and weight decay. The model stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim import lr_scheduler as schedulers

from gradmend.anatomy import Anatomy
from gradmend.causes import Cause
from gradmend.errors import SetupError, suggest
from gradmend.remedies.base import Remedy
from gradmend.setup import Batch, Budget, OptimizerFactory, Setup
from gradmend.surgery import Edit
from gradmend.training import Trial, run_trial

_DECADES = range(-7, 3)
_STEPS, _ENOUGH = 20, 0.1
"""Each rate is tried for so many steps; a smaller rate may miss this share of the best fall in loss."""


@dataclass(frozen=True)
class LearningRate(Remedy):
    """Another learning rate: the one given, or the best of a range, each tried for 20 steps on a copy.

    Args:
        lr: None finds it: of 1e-7, 1e-6, ... 100, then 0.3 and 3 times the best, the smallest that brings
            nine tenths of the best fall in loss.

    Source: Smith, Cyclical learning rates for training neural networks, 2017,
    https://arxiv.org/abs/1506.01186
    """

    treats: ClassVar[frozenset[Cause]] = frozenset(
        {Cause.LEARNING_RATE_TOO_HIGH, Cause.LEARNING_RATE_TOO_LOW}
    )
    intrusion: ClassVar[int] = 2
    summary: ClassVar[str] = "learning rate {lr:.3g}"
    lr: float | None = None

    @property
    def title(self) -> str:
        """The summary with the values of the fields."""
        return "learning rate by range test" if self.lr is None else self.summary.format(lr=self.lr)

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether there is an optimizer."""
        return setup.optimizer is not None

    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Set the rate of all groups."""
        lr = _best_rate(setup, batches) if self.lr is None else self.lr
        if all(group["lr"] == lr for group in setup.build_optimizer().param_groups):
            return setup, replace(self, lr=lr), []
        code = f"for group in optimizer.param_groups:\n    group['lr'] = {lr!r}"
        return with_options(setup, lr=lr), replace(self, lr=lr), [Edit("", code, f"learning rate {lr:.3g}")]


@dataclass(frozen=True)
class UseOptimizer(Remedy):
    """Another of torch's optimizers, over all parameters that are not frozen; its state starts afresh.

    Args:
        name: Adam, AdamW, SGD, RMSprop, Adagrad, ...
        lr: None takes the optimizer's default.
        momentum: for SGD and RMSprop.

    Source: Kingma, Ba, Adam, 2015, https://arxiv.org/abs/1412.6980
    """

    treats: ClassVar[frozenset[Cause]] = frozenset(
        {Cause.LEARNING_RATE_TOO_HIGH, Cause.LEARNING_RATE_TOO_LOW}
    )
    intrusion: ClassVar[int] = 2
    summary: ClassVar[str] = "{name}"
    name: str = "Adam"
    lr: float | None = None
    momentum: float | None = None

    def __post_init__(self) -> None:
        kinds = {name: kind for name, kind in vars(torch.optim).items() if isinstance(kind, type)}
        known = [
            name for name, kind in kinds.items() if issubclass(kind, Optimizer) and kind is not Optimizer
        ]
        if self.name not in known:
            raise SetupError(f"torch has no optimizer {self.name!r}. {suggest(self.name, known)}")

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether the setup has another optimizer, or the same with other options."""
        if setup.optimizer is None:
            return False
        present = setup.build_optimizer()
        wanted = self._options().items()
        same = all(group.get(key) == value for group in present.param_groups for key, value in wanted)
        return type(present).__name__ != self.name or not same

    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Put a factory in the place of the optimizer."""
        factory = partial(getattr(torch.optim, self.name), **self._options())
        written = "".join(f", {key}={value!r}" for key, value in self._options().items())
        code = f"optimizer = torch.optim.{self.name}(model.parameters(){written})"
        return replace(setup, optimizer=factory), self, [Edit("", code, self.title)]

    def _options(self) -> dict[str, float]:
        options = {"lr": self.lr, "momentum": self.momentum}
        return {key: value for key, value in options.items() if value is not None}


@dataclass(frozen=True)
class WeightDecay(Remedy):
    """Decay of the weights by the optimizer: an L2 term, or decoupled where the optimizer decouples it.

    Source: Krogh, Hertz, A simple weight decay can improve generalization, 1992; Loshchilov, Hutter,
    Decoupled weight decay regularization, 2019, https://arxiv.org/abs/1711.05101
    """

    treats: ClassVar[frozenset[Cause]] = frozenset()
    intrusion: ClassVar[int] = 2
    summary: ClassVar[str] = "weight decay {value:g}"
    value: float = 1e-4

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether the optimizer knows weight decay and has another value."""
        if setup.optimizer is None:
            return False
        groups = setup.build_optimizer().param_groups
        return any(group.get("weight_decay", self.value) != self.value for group in groups)

    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Set the decay of all groups."""
        code = f"for group in optimizer.param_groups:\n    group['weight_decay'] = {self.value!r}"
        return with_options(setup, weight_decay=self.value), self, [Edit("", code, self.title)]


SCHEDULES: dict[str, Callable[[int], tuple[str, dict[str, Any]]]] = {
    "linear": lambda n: ("LinearLR", {"start_factor": 1.0, "end_factor": 0.0, "total_iters": n}),
    "polynomial": lambda n: ("PolynomialLR", {"total_iters": n, "power": 2.0}),
    "cosine": lambda n: ("CosineAnnealingLR", {"T_max": n}),
    "exponential": lambda n: ("ExponentialLR", {"gamma": 0.01 ** (1 / n)}),
    "step": lambda n: ("StepLR", {"step_size": max(1, n // 3), "gamma": 0.1}),
    "warm-up": lambda n: ("LinearLR", {"start_factor": 0.01, "end_factor": 1.0, "total_iters": n}),
}
"""Name -> (torch's scheduler, its options) for `n` optimizer steps."""


@dataclass(frozen=True)
class UseSchedule(Remedy):
    """One of torch's learning-rate schedules, stepped once per optimizer step.

    Args:
        name: linear, polynomial, cosine, exponential, step, or warm-up.
        steps: over how many optimizer steps.

    Source: Loshchilov, Hutter, SGDR, 2017, https://arxiv.org/abs/1608.03983 (cosine); Goyal et al., Accurate,
    large minibatch SGD, 2017, https://arxiv.org/abs/1706.02677 (warm-up)
    """

    treats: ClassVar[frozenset[Cause]] = frozenset()
    intrusion: ClassVar[int] = 2
    summary: ClassVar[str] = "{name} schedule over {steps} steps"
    name: str = "cosine"
    steps: int = 1000

    def __post_init__(self) -> None:
        if self.name not in SCHEDULES:
            raise SetupError(f"There is no schedule {self.name!r} here. {suggest(self.name, SCHEDULES)}")

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether there is an optimizer and no schedule yet."""
        return setup.optimizer is not None and setup.schedule is None

    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Add the schedule."""
        kind, options = SCHEDULES[self.name](self.steps)
        written = "".join(f", {key}={value!r}" for key, value in options.items())
        code = (
            f"schedule = torch.optim.lr_scheduler.{kind}(optimizer{written})\n"
            "# after each optimizer.step():\n# schedule.step()"
        )
        factory = partial(getattr(schedulers, kind), **options)
        return replace(setup, schedule=factory), self, [Edit("", code, self.title)]


@dataclass(frozen=True)
class _WithOptions:
    """An optimizer factory whose groups get other options."""

    factory: OptimizerFactory
    options: tuple[tuple[str, float], ...]

    def __call__(self, parameters: Sequence[nn.Parameter]) -> Optimizer:
        optimizer = self.factory(parameters)
        for group in optimizer.param_groups:
            group.update(self.options)
        return optimizer


def with_options(setup: Setup, **options: float) -> Setup:
    """The setup with other options in all parameter groups, of a live optimizer (in place) or a factory."""
    if isinstance(setup.optimizer, Optimizer):
        for group in setup.optimizer.param_groups:
            group.update(options)
        return setup
    if setup.optimizer is None:
        raise SetupError("This setup has no optimizer.")
    return replace(setup, optimizer=_WithOptions(setup.optimizer, tuple(options.items())))


def _best_rate(setup: Setup, batches: Sequence[Batch]) -> float:
    """The smallest rate that brings nearly the best fall in a few steps: by decades, then between them."""

    def trial(rate: float) -> Trial:
        return run_trial(with_options(setup.copy(), lr=rate), list(batches), Budget(steps=_STEPS))

    trials = {rate: trial(rate) for rate in (10.0**k for k in _DECADES)}
    best = min(trials, key=lambda rate: trials[rate].final_loss)
    trials |= {rate: trial(rate) for rate in (float(f"{0.3 * best:.1g}"), float(f"{3 * best:.1g}"))}
    lowest, start = min(t.final_loss for t in trials.values()), trials[best].initial_loss
    enough = lowest + _ENOUGH * max(start - lowest, 0.0)
    return min(rate for rate, trial in trials.items() if trial.final_loss <= enough)
