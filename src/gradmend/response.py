"""Response: how the loss answers to the optimizer's steps, tried on a copy.

`respond` looks at one batch: is the step too long or too short? `look_ahead` looks at a batch that the steps
have not seen: does the network learn to tell samples apart?
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradmend.harmless import undisturbed, untouched
from gradmend.readings import Response
from gradmend.setup import Batch, Setup, split
from gradmend.updates import changes, obstacle


def respond(setup: Setup, batch: Batch, steps: int = 10) -> Response | None:
    """Step on a copy and watch the loss: along the first step, and over a few steps on one batch.

    Args:
        steps: how many steps are taken on the same batch; four times as many if they overshoot.

    Returns:
        The losses, or None if no step can be tried on a copy: the optimizer's step wants a closure (LBFGS),
        or its factory holds on to the model's own parameters, whatever parameters it is given.

    Example:
        >>> from functools import partial
        >>> setup = Setup(nn.Linear(2, 1), nn.MSELoss(), partial(torch.optim.SGD, lr=1e-6))
        >>> respond(setup, (torch.randn(64, 2), torch.randn(64, 1))).best_fraction > 100
        True
    """
    with undisturbed(setup.model):
        return _respond(setup, setup.copy(), batch, steps)


def _respond(setup: Setup, trial: Setup, batch: Batch, steps: int) -> Response | None:
    with undisturbed(trial.model):
        optimizer = trial.build_optimizer()
        if obstacle(optimizer, setup.model):
            return None
        before = _backward(trial, optimizer, batch)
        response = Response(before, _line(trial, optimizer, batch), ())
        while len(response.losses) < steps or (
            response.overshoots and len(response.losses) < _PATIENCE * steps
        ):
            optimizer.step()
            loss = _tried(lambda: _backward(trial, optimizer, batch))
            response = replace(response, losses=(*response.losses, loss))
        return response


@dataclass(frozen=True)
class Losses:
    """The loss of one batch with its own targets, and the mean with those of other samples of the batch.

    Both are the same for a network that makes nothing of its input, whatever it returns.
    """

    own: float
    others: float

    @property
    def told_apart(self) -> float:
        """From 0, where the own targets fit no better than others, to 1; -1 if a loss is no number."""
        return lower(self.own, self.others)


def lower(loss: float, than: float) -> float:
    """By how much a loss is lower than another, as a share of their sum: from -1 to 1.

    >>> lower(1.0, 3.0), lower(3.0, 1.0), lower(math.nan, 1.0)
    (0.5, -0.5, -1.0)
    """
    if not (math.isfinite(loss) and math.isfinite(than)):
        return -1.0
    return (than / 2 - loss / 2) / (abs(than) / 2 + abs(loss) / 2 or 1.0)  # halves do not overflow


@dataclass(frozen=True)
class Outlook:
    """What six of the optimizer's steps do to the loss of the batches stepped on, and of another one.

    Args:
        first: of the batches stepped on, before each of the first three steps: the means.
        second: the same before the next three.
        after: of the other batch, after all six.
        ahead: of the other batch still further on, as if the last three steps were repeated 8 times and 32
            times: 24 and 96 more steps.
    """

    first: Losses
    second: Losses
    after: Losses
    ahead: tuple[Losses, ...]


_HALF, _REPEATED = 3, (8, 24)
"""Half of the steps; how often they are repeated, and how often once more."""


def look_ahead(setup: Setup, batches: Sequence[Batch]) -> Outlook | str:
    """Take a few steps on a copy and look at the loss of the last batch, which they have not seen.

    The steps go through the other batches in turn. Of a single batch they take that one, and it is less
    telling that its loss falls.

    Args:
        batches: each `(x, y)` or `(x1, ..., y)`, four of them at best.

    Returns:
        The losses; or, in words, why there are none.

    Example:
        >>> from functools import partial
        >>> setup = Setup(nn.Linear(2, 2), nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=1.0))
        >>> x = torch.randn(4, 32, 2)
        >>> outlook = look_ahead(setup, [(rows, rows.argmax(1)) for rows in x])
        >>> outlook.after.told_apart > outlook.first.told_apart
        True
    """
    if setup.optimizer is None:
        return "there is no optimizer"
    if setup.loss_fn is None:
        return "the model or `step` computes the loss, so that targets cannot be exchanged"
    with undisturbed(setup.model):
        trial = setup.copy()
        try:
            return _look_ahead(setup, trial, batches)
        except Exception as error:  # of the user's code, which may refuse what the steps make of the weights
            return f"the loss fails after a few steps: {error}"


def _look_ahead(setup: Setup, trial: Setup, batches: Sequence[Batch]) -> Outlook | str:
    with undisturbed(trial.model):
        optimizer = trial.build_optimizer()
        if reason := obstacle(optimizer, setup.model):
            return reason
        *seen, unseen = batches
        if not _shifts(split(unseen)[1]):
            return "the targets are no tensor with a row for each of several samples"
        parameters, feed = _held(optimizer), cycle(seen or [unseen])
        first = _walk(trial, optimizer, islice(feed, _HALF))
        halfway = [p.detach().clone() for p in parameters]
        second, after = _walk(trial, optimizer, islice(feed, _HALF)), _look(trial, unseen)
        way = [p.detach() - start for p, start in zip(parameters, halfway, strict=True)]
        ahead = []
        for times in _REPEATED:
            _go_on(parameters, way, times)
            ahead.append(_look(trial, unseen))
        return Outlook(first, second, after, tuple(ahead))


def _walk(setup: Setup, optimizer: Optimizer, batches: Iterable[Batch]) -> Losses:
    """Step on each batch; the means of the losses before each step."""
    met = []
    for batch in batches:
        own, others = _compare(setup, batch)
        _set_gradients(setup, optimizer, own)
        optimizer.step()
        met.append((own.item(), others))
    return Losses(*(sum(losses) / len(met) for losses in zip(*met, strict=True)))


def _look(setup: Setup, batch: Batch) -> Losses:
    own, others = _compare(setup, batch)
    return Losses(own.item(), others)


@torch.no_grad()
def _go_on(parameters: Sequence[Tensor], way: Sequence[Tensor], times: int) -> None:
    for parameter, change in zip(parameters, way, strict=True):
        parameter.add_(change, alpha=times)


def _compare(setup: Setup, batch: Batch) -> tuple[Tensor, float]:
    """The loss with its own targets and with others by one forward pass, with fixed noise."""
    others: list[float] = []
    given: Callable[[Any, Any], Tensor] | None = setup.loss_fn

    def loss_fn(output: Any, target: Any) -> Tensor:
        assert given is not None
        others.extend(given(output, target.roll(shift, 0)).item() for shift in _shifts(target))
        return given(output, target)

    torch.manual_seed(0)
    own = replace(setup, loss_fn=loss_fn).loss(untouched(batch))
    return own, sum(others) / len(others)


def _shifts(target: object) -> list[int]:
    """How far targets are moved along the batch: up to four different ways."""
    rows = len(target) if isinstance(target, Tensor) and target.dim() else 0
    return sorted({rows * k // 5 for k in range(1, 5)} - {0})


_FRACTIONS = tuple(4.0**k for k in range(-3, 4))
_SMALLEST, _LARGEST, _ROUNDING = 4.0**-6, 4.0**20, 1e-6
_PATIENCE = 4
"""Where steps overshoot, so many times more of them show whether the loss falls after all."""


def _backward(setup: Setup, optimizer: Optimizer, batch: Batch) -> float:
    """The loss; its gradients go to the parameters."""
    loss = _forward(setup, batch)
    _set_gradients(setup, optimizer, loss)
    return loss.item()


def _set_gradients(setup: Setup, optimizer: Optimizer, loss: Tensor) -> None:
    parameters = [p for p in _held(optimizer) if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    given: set[int] = set()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = None if gradient is None else _owned(gradient, given)
        given.add(id(gradient))
    if setup.gradient_transform is not None:
        setup.gradient_transform(parameters)


def _owned(gradient: Tensor, given: set[int]) -> Tensor:
    """A copy where autograd hands out one tensor twice, or one value as many; as `backward` does."""
    free = gradient.layout is torch.strided and gradient.is_contiguous() and id(gradient) not in given
    return gradient if free else gradient.clone()


def _held(optimizer: Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _line(setup: Setup, optimizer: Optimizer, batch: Batch) -> tuple[tuple[float, float], ...]:
    """(fraction, loss) along the next step, shorter and longer until the loss rises at both ends.

    The step is computed in float64: a tiny one would be lost when it is added to float32 weights.
    """
    parameters = _held(optimizer)
    start = [p.detach().clone() for p in parameters]
    gradients = {id(p): p.grad for p in parameters}
    step = [
        change.to(p.dtype) for p, change in changes(optimizer, parameters, gradients, dtype=torch.float64)
    ]

    def loss_at(fraction: float) -> float:
        _place(parameters, start, step, fraction)
        return _tried(lambda: _forward(setup, batch).item())  # with gradients, as some losses take some

    line = {fraction: loss_at(fraction) for fraction in _FRACTIONS}
    while (fraction := _further(line)) is not None:
        line[fraction] = loss_at(fraction)
    _place(parameters, start, step, 0.0)
    return tuple(sorted(line.items()))


def _further(line: Mapping[float, float]) -> float | None:
    """The next fraction to try, beyond the end where the loss is lowest; None if it is at neither.

    >>> _further({0.5: 2.0, 1.0: 1.0}), _further({0.5: 1.0, 1.0: 1.5, 2.0: math.nan}), _further({0.5: 3.0})
    (4.0, 0.125, 2.0)
    """
    ordered = sorted(line)
    finite = [loss for loss in line.values() if math.isfinite(loss)]
    lowest = min(finite, default=-math.inf)
    if line[ordered[-1]] <= lowest + _ROUNDING * abs(lowest) and ordered[-1] < _LARGEST:
        return 4 * ordered[-1]
    shorter = not any(line[fraction] <= line[ordered[0]] for fraction in ordered[1:])
    return ordered[0] / 4 if shorter and ordered[0] > _SMALLEST else None


def _forward(setup: Setup, batch: Batch) -> Tensor:
    """The loss with fixed noise, so that only the parameters tell the losses apart."""
    torch.manual_seed(0)
    return setup.loss(untouched(batch))


def _tried(loss: Callable[[], float]) -> float:
    """A loss of changed weights; infinite where the user's code refuses what they make.

    >>> _tried(lambda: 1 / 0)
    inf
    """
    try:
        return loss()
    except Exception:  # argument checks, assertions, factorizations: the first loss was sound
        return math.inf


@torch.no_grad()
def _place(
    parameters: Sequence[Tensor], start: Sequence[Tensor], step: Sequence[Tensor], fraction: float
) -> None:
    for parameter, origin, change in zip(parameters, start, step, strict=True):
        parameter.copy_(origin + fraction * change if fraction else origin)
