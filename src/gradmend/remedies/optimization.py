"""Optimizer, learning rate, weight decay and batch size. The model stays as it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradmend.anatomy import Anatomy
from gradmend.causes import Cause
from gradmend.errors import SetupError, suggest
from gradmend.harmless import undisturbed
from gradmend.kinds import rows_in
from gradmend.remedies.base import Remedy
from gradmend.remedies.factory import option_edit, with_options
from gradmend.setup import Batch, Budget, Setup
from gradmend.surgery import Edit
from gradmend.training import Trial, run_trial
from gradmend.updates import changes

_LEAST, _FIRST, _MOST = -7, -2, 2
"""Decades of the learning rate."""

_STEPS, _ENOUGH = 20, 0.1
"""Each rate is tried for so many steps; a smaller rate may miss this share of the best fall in loss."""

_ROWS, _LONGEST = 16, 4
"""Smaller batches than this take more steps to show a fall, but no more than so many times."""

_ALONG, _ITERATIONS, _REACH = 0.999, 12, 1e-3
"""Cosine of steps that follow the gradient; power iterations; how far the gradient's differences reach."""


@dataclass(frozen=True)
class LearningRate(Remedy):
    """Another learning rate: the one given, or found on a copy. Weights and optimizer state stay.

    For losses that diverge, oscillate or hardly move though signals and gradients are sound. Costs about 120
    steps on copies, or 26 gradients; nothing afterwards.

    Args:
        lr: None finds it.
        by: "range" tries rates for 20 steps each, from 0.01 on up or down by decades (1e-7 to 100) as long as
            the loss falls further, then 0.3 and 3 times the best, and takes the smallest that brings nine
            tenths of the best fall. "curvature" takes 26 gradients: one
            over the largest curvature of the loss where the optimizer follows the gradient, else the rate
            at which its next step would end in the lowest point along it.

    Source: Smith, Cyclical learning rates for training neural networks, 2017,
    https://arxiv.org/abs/1506.01186 (range); LeCun, Simard, Pearlmutter, Automatic learning rate maximization
    by on-line estimation of the Hessian's eigenvectors, 1992 (curvature)
    """

    treats: ClassVar[frozenset[Cause]] = frozenset(
        {
            Cause.LEARNING_RATE_TOO_HIGH,
            Cause.LEARNING_RATE_TOO_LOW,
            Cause.TOO_FEW_STEPS,
            Cause.DIVERGENCE,
            Cause.OSCILLATING_LOSS,
            Cause.SLOW_CONVERGENCE,
            Cause.PLATEAU,
            Cause.DYING_UNITS,
        }
    )
    intrusion: ClassVar[int] = 2
    summary: ClassVar[str] = "learning rate {lr:.3g}"
    lr: float | None = None
    by: str = "range"

    def __post_init__(self) -> None:
        if self.by not in _FINDERS:
            raise SetupError(f"A learning rate is not found by {self.by!r}. {suggest(self.by, _FINDERS)}")

    @property
    def title(self) -> str:
        """The summary with the values of the fields."""
        found = "curvature" if self.by == "curvature" else "range test"
        return f"learning rate by {found}" if self.lr is None else self.summary.format(lr=self.lr)

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether there is an optimizer."""
        return setup.optimizer is not None

    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Set the rate of all groups."""
        lr = _FINDERS[self.by](setup, batches) if self.lr is None else self.lr
        if all(group["lr"] == lr for group in setup.build_optimizer().param_groups):
            return setup, replace(self, lr=lr), []
        edit = option_edit("lr", lr, f"learning rate {lr:.3g}")
        return with_options(setup, lr=lr), replace(self, lr=lr), [edit]


@dataclass(frozen=True)
class UseOptimizer(Remedy):
    """Another of torch's optimizers, over all parameters that are not frozen; its state starts afresh.

    An adaptive one gives each weight a step of about the rate, whatever the size of its gradient: for layers
    whose gradients differ by orders of magnitude. Weights stay. Costs memory: Adam keeps two numbers per
    weight, momentum and RMSprop one.

    Args:
        name: Adam, AdamW, SGD, RMSprop, Adagrad, ...
        lr: None takes the optimizer's default.
        momentum: for SGD and RMSprop.

    Source: Kingma, Ba, Adam, 2015, https://arxiv.org/abs/1412.6980
    """

    treats: ClassVar[frozenset[Cause]] = frozenset(
        {
            Cause.LEARNING_RATE_TOO_HIGH,
            Cause.LEARNING_RATE_TOO_LOW,
            Cause.UNFIT_OPTIMIZER,
            Cause.SLOW_CONVERGENCE,
            Cause.PLATEAU,
        }
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

    More of it against overfitting, less where it pulls harder than the data. Penalties that the loss itself
    adds stay. Weights and optimizer state stay. Costs next to nothing.

    Source: Krogh, Hertz, A simple weight decay can improve generalization, 1992; Loshchilov, Hutter,
    Decoupled weight decay regularization, 2019, https://arxiv.org/abs/1711.05101
    """

    treats: ClassVar[frozenset[Cause]] = frozenset({Cause.TOO_MUCH_WEIGHT_DECAY, Cause.OVERFITTING})
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
        edit = option_edit("weight_decay", self.value, self.title)
        return with_options(setup, weight_decay=self.value), self, [edit]


@dataclass(frozen=True)
class Epsilon(Remedy):
    """The usual epsilon of an adaptive optimizer: so small that it does not shorten the steps.

    One of about the size of the gradients' root mean square, or above, makes of Adam a slow SGD. All else of
    the optimizer, and its state, stays. Costs nothing.

    Source: Kingma, Ba, Adam, 2015, https://arxiv.org/abs/1412.6980
    """

    treats: ClassVar[frozenset[Cause]] = frozenset({Cause.UNFIT_OPTIMIZER, Cause.NON_FINITE})
    intrusion: ClassVar[int] = 2
    summary: ClassVar[str] = "epsilon {value:g}"
    value: float = 1e-8

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether the optimizer knows an epsilon and has another one."""
        if setup.optimizer is None:
            return False
        groups = setup.build_optimizer().param_groups
        return any(group.get("eps", self.value) != self.value for group in groups)

    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Set the epsilon of all groups."""
        edit = option_edit("eps", self.value, self.title)
        return with_options(setup, eps=self.value), self, [edit]


@dataclass(frozen=True)
class BatchSize(Remedy):
    """Batches of so many rows: the batches that come are joined or cut when the setup trains.

    Smaller ones give more steps for the same data; larger ones give steadier steps, and batch normalization
    more to average. Beyond the noise scale of the gradient larger ones save no steps. The learning rate has
    to follow: in proportion with SGD, by the root with Adam. Only for batches of tensors. Costs memory in
    proportion to the rows.

    Source: McCandlish, Kaplan, Amodei, An empirical model of large-batch training, 2018,
    https://arxiv.org/abs/1812.06162
    """

    treats: ClassVar[frozenset[Cause]] = frozenset(
        {Cause.UNFIT_BATCH_SIZE, Cause.TOO_FEW_STEPS, Cause.BATCH_OF_ONE}
    )
    intrusion: ClassVar[int] = 2
    summary: ClassVar[str] = "batches of {rows} rows"
    rows: int = 32

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether it trains with other batches."""
        return setup.optimizer is not None and setup.batch_size != self.rows

    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Set the number, unless the batches are so large already."""
        if all(rows_in(batch) == self.rows for batch in batches[:-1] or batches):
            return setup, self, []
        code = f"batch_size = {self.rows}\n# for your DataLoader(..., batch_size=batch_size, shuffle=True)"
        return replace(setup, batch_size=self.rows), self, [Edit("", code, self.title)]


def _best_rate(setup: Setup, batches: Sequence[Batch]) -> float:
    """The smallest rate that brings nearly the best fall in a few steps: by decades, then between them."""

    steps = _STEPS * max(1, min(_LONGEST, _ROWS // max(1, rows_in(batches[0]))))

    @cache
    def trial(rate: float) -> Trial:
        return run_trial(with_options(setup.copy(), lr=rate), list(batches), Budget(steps=steps))

    decade = _lowest_decade(lambda k: trial(10.0**k).final_loss)
    near = (10.0**k for k in range(max(_LEAST, decade - 1), min(_MOST, decade + 1) + 1))
    rates = [*near, *(float(f"{factor * 10.0**decade:.1g}") for factor in (0.3, 3))]
    lowest, start = min(trial(rate).final_loss for rate in rates), trial(10.0**decade).initial_loss
    fall = start - lowest
    enough = lowest + (_ENOUGH * fall if math.isfinite(fall) and fall > 0 else 0.0)
    return min(rate for rate in rates if trial(rate).final_loss <= enough)


def _lowest_decade(loss: Callable[[int], float]) -> int:
    """Downhill from decade to decade; of equal ones, such as where all diverges, to the smaller.

    >>> _lowest_decade(lambda k: abs(k + 5)), _lowest_decade(lambda k: math.inf)
    (-5, -7)
    """
    decade = _FIRST
    while True:
        near = (k for k in (decade - 1, decade, decade + 1) if _LEAST <= k <= _MOST)
        lowest = min(near, key=lambda k: (loss(k), k))
        if lowest == decade:
            return decade
        decade = lowest


def _curved_rate(setup: Setup, batches: Sequence[Batch]) -> float:
    """The rate that the curvature of the loss of one batch allows, by differences of gradients on a copy.

    With momentum steps add up to 1 / (1 - momentum) of one, so the rate is so much smaller.
    """
    trial = with_options(setup.copy(), lr=1.0)
    with undisturbed(trial.model):
        optimizer = trial.build_optimizer()
        held = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        slope = _gradient(trial, batches[0], held)
        step = _next_step(optimizer, held, slope)
        cosine = -_dot(step, slope) / math.sqrt(_dot(step, step) * _dot(slope, slope) or 1.0)
        if cosine < _ALONG:
            bent = _dot(step, _bend(trial, batches[0], held, step))
            return -_dot(step, slope) / (abs(bent) or 1.0)
        largest = _largest_curvature(trial, batches[0], held, step)
    momentum = max(float(group.get("momentum", 0.0)) for group in optimizer.param_groups)
    return (1 - momentum) / largest if largest else 1.0


def _largest_curvature(setup: Setup, batch: Batch, held: Sequence[Tensor], start: list[Tensor]) -> float:
    """The largest eigenvalue of the Hessian in size, by power iteration."""
    direction, value = start, 0.0
    for _ in range(_ITERATIONS):
        size = math.sqrt(_dot(direction, direction)) or 1.0
        direction = _bend(setup, batch, held, [part / size for part in direction])
        value = math.sqrt(_dot(direction, direction))
    return value


def _bend(setup: Setup, batch: Batch, held: Sequence[Tensor], direction: list[Tensor]) -> list[Tensor]:
    """The Hessian times a direction, as the difference of the gradients a little to both sides."""
    weights = math.sqrt(_dot(held, held)) or 1.0
    reach = _REACH * weights / (math.sqrt(_dot(direction, direction)) or 1.0)
    sides = []
    for side in (reach, -reach):
        _move(held, direction, side)
        sides.append(_gradient(setup, batch, held))
        _move(held, direction, -side)
    return [(a - b) / (2 * reach) for a, b in zip(*sides, strict=True)]


@torch.no_grad()
def _move(held: Sequence[Tensor], direction: Sequence[Tensor], far: float) -> None:
    for parameter, part in zip(held, direction, strict=True):
        parameter.add_(part, alpha=far)


def _gradient(setup: Setup, batch: Batch, held: Sequence[Tensor]) -> list[Tensor]:
    torch.manual_seed(0)  # the same dropout each time
    slopes = torch.autograd.grad(setup.loss(batch), held, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(held, slopes, strict=True)]


def _next_step(optimizer: Optimizer, held: Sequence[Tensor], slope: Sequence[Tensor]) -> list[Tensor]:
    wanted: dict[int, Tensor | None] = {id(p): g for p, g in zip(held, slope, strict=True)}
    found = {id(p): change for p, change in changes(optimizer, held, wanted)}
    return [found[id(p)] for p in held]


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return sum(float((x.detach().double() * y.detach().double()).sum()) for x, y in zip(a, b, strict=True))


_FINDERS: dict[str, Callable[[Setup, Sequence[Batch]], float]] = {
    "range": _best_rate,
    "curvature": _curved_rate,
}
