"""Learning-rate schedules: one of torch's, stepped once per optimizer step. The model stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

from torch.optim import Optimizer
from torch.optim import lr_scheduler as schedulers

from gradmend.anatomy import Anatomy
from gradmend.causes import Cause
from gradmend.errors import SetupError, suggest
from gradmend.remedies.base import Remedy
from gradmend.setup import Batch, Setup
from gradmend.surgery import Edit

_LEFT = 0.01
"""What an exponential or inverse-time schedule leaves of the rate at its end."""

SCHEDULES: dict[str, Callable[[int], tuple[str, dict[str, Any]]]] = {
    "constant": lambda n: ("ConstantLR", {"factor": 1.0, "total_iters": n}),
    "linear": lambda n: ("LinearLR", {"start_factor": 1.0, "end_factor": 0.0, "total_iters": n}),
    "polynomial": lambda n: ("PolynomialLR", {"total_iters": n, "power": 2.0}),
    "inverse time": lambda n: ("LambdaLR", {"lr_lambda": InverseTime((1 / _LEFT - 1) / n)}),
    "cosine": lambda n: ("CosineAnnealingLR", {"T_max": n}),
    "exponential": lambda n: ("ExponentialLR", {"gamma": _LEFT ** (1 / n)}),
    "step": lambda n: ("StepLR", {"step_size": max(1, n // 3), "gamma": 0.1}),
    "warm-up": lambda n: ("LinearLR", {"start_factor": 0.01, "end_factor": 1.0, "total_iters": n}),
}
"""Name -> (torch's scheduler, its options) for `n` optimizer steps."""


@dataclass(frozen=True)
class InverseTime:
    """`1 / (1 + decay * t)`, the factor of the rate at step t; torch has no schedule of this name.

    Examples:
        >>> [InverseTime(0.5)(t) for t in (0, 2)]
        [1.0, 0.5]
    """

    decay: float

    def __call__(self, step: int) -> float:
        """The factor at a step."""
        return 1 / (1 + self.decay * step)


@dataclass(frozen=True)
class UseSchedule(Remedy):
    """One of torch's learning-rate schedules, stepped once per optimizer step.

    A falling rate lets the last steps settle; a warm-up spares the first ones, which are the longest of all
    for adaptive optimizers and fresh weights. Costs nothing.

    Args:
        name: with rate a and step t of T: constant a; linear a (1 - t/T); polynomial a (1 - t/T)^2; inverse
            time a / (1 + d t); cosine; exponential; step (a tenth after each third); warm-up, from a/100
            to a, then constant.
        steps: T, in optimizer steps.

    Source: Loshchilov, Hutter, SGDR, 2017, https://arxiv.org/abs/1608.03983 (cosine); Goyal et al., Accurate,
    large minibatch SGD, 2017, https://arxiv.org/abs/1706.02677 (warm-up); Robbins, Monro, A stochastic
    approximation method, 1951, https://doi.org/10.1214/aoms/1177729586 (inverse time)
    """

    intrusion: ClassVar[int] = 2
    summary: ClassVar[str] = "{name} schedule over {steps} steps"
    treats: ClassVar[frozenset[Cause]] = frozenset({Cause.OSCILLATING_LOSS, Cause.DIVERGENCE, Cause.PLATEAU})
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
        written = "".join(f", {key}={_written(value)}" for key, value in options.items())
        code = (
            f"schedule = torch.optim.lr_scheduler.{kind}(optimizer{written})\n"
            "optimizer.register_step_post_hook(lambda *_: schedule.step())"
        )
        make: Callable[[Optimizer], Any] = partial(getattr(schedulers, kind), **options)
        return replace(setup, schedule=make), self, [Edit("", code, self.title)]


def _written(value: object) -> str:
    return f"lambda t: 1 / (1 + {value.decay!r} * t)" if isinstance(value, InverseTime) else repr(value)
