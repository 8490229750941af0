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

from gradmend.harmless import seed_noise, undisturbed, untouched
from gradmend.readings import Response
from gradmend.readout import centered, cosine, last_input, lower, pulls, readable
from gradmend.room import out_of_memory
from gradmend.setup import Batch, Setup, split
from gradmend.steps import Step, flushed, held, next_step, seeded_loss, set_gradients
from gradmend.updates import obstacle


def respond(setup: Setup, batch: Batch, steps: int = 10) -> Response | None:
    """Step on a copy and watch the loss: along the first step, and over a few steps on one batch.

    Args:
        steps: how many steps are taken on the same batch; up to 40 while they overshoot.

    Returns:
        The losses, or None if no step can be tried on a copy: the optimizer's step wants a closure (LBFGS),
        or its factory holds on to the model's own parameters, whatever parameters it is given.

    Examples:
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
        loss = seeded_loss(trial, batch)
        step, before = next_step(trial, optimizer, loss), loss.item()
        line = _line(trial, step, batch, before)
        response = Response(before, line, (), step.descent, step.shrinking, step.weights)
        with flushed(optimizer):
            while len(response.losses) < (_PATIENCE if response.losses and response.overshoots else steps):
                optimizer.step()
                loss_after = _tried(lambda: _backward(trial, optimizer, batch))
                response = replace(response, losses=(*response.losses, loss_after))
        return response


@dataclass(frozen=True)
class Losses:
    """The loss of one batch with its own targets, and the mean with those of other samples of the batch.

    Both are the same for a network that makes nothing of its input, whatever it returns.

    Args:
        alignment: cosine between the outputs and where the loss pulls them to, each less its mean over the
            samples: from -1 to 1, whatever the size of the outputs; NaN where it was not looked at.
    """

    own: float
    others: float
    alignment: float = math.nan

    @property
    def told_apart(self) -> float:
        """From 0, where the own targets fit no better than others, to 1; -1 if a loss is no number."""
        return lower(self.own, self.others)


@dataclass(frozen=True)
class Outlook:
    """What six of the optimizer's steps do to the loss of the batches stepped on, and of another one.

    Args:
        before: of the other batch, before all steps.
        first: of the batches stepped on, before each of the first three steps: the means.
        second: the same before the next three.
        after: of the other batch, after all six.
        everywhere: of all batches, after all six: the means.
        ahead: of the other batch still further on, as if the last three steps were repeated 32 times.
        moved: how far the six steps moved the parameters, over the parameters' norm.
        readable: the share of the targets' variance that a linear map of what the last layer gets predicts
            for samples it was not fitted to, after the six steps; below 0 if it predicts worse than the mean.
        rate: the largest learning rate of the optimizer's groups; NaN if they have none.
    """

    before: Losses
    first: Losses
    second: Losses
    after: Losses
    everywhere: Losses
    ahead: Losses
    moved: float
    readable: float
    rate: float


_HALF, _REPEATED = 3, 32
"""Half of the steps; how often they are repeated."""

_ROWS = 48
"""So many samples of a batch are looked at."""


def look_ahead(setup: Setup, batches: Sequence[Batch]) -> Outlook | str:
    """Take a few steps on a copy and look at the loss of the last batch, which they have not seen.

    The steps go through the other batches in turn. Of a single batch they take that one, and it is less
    telling that its loss falls.

    Args:
        batches: each `(x, y)` or `(x1, ..., y)`, four of them at best.

    Returns:
        The losses; or, in words, why there are none.

    Examples:
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
            if out_of_memory(error):
                raise
            return f"the loss fails after a few steps: {error}"


def _look_ahead(setup: Setup, trial: Setup, batches: Sequence[Batch]) -> Outlook | str:
    with undisturbed(trial.model):
        optimizer = trial.build_optimizer()
        if reason := obstacle(optimizer, setup.model):
            return reason
        *seen, unseen = batches
        if not _shifts(split(unseen)[1]):
            return "the targets are no tensor with a row for each of several samples"
        parameters, feed, shown = held(optimizer), cycle(seen or [unseen]), _first_rows(unseen)
        start, before = _values(parameters), _look(trial, shown)
        with flushed(optimizer):
            first = _walk(trial, optimizer, islice(feed, _HALF))
            halfway = _values(parameters)
            second = _walk(trial, optimizer, islice(feed, _HALF))
        with last_input(trial.model) as inputs:
            views = [_view(trial, _first_rows(batch), inputs) for batch in seen]
            views.append(_view(trial, shown, inputs))
        moved = _distance(parameters, start) / (_norm(start) or math.nan)
        way = [p.detach() - value for p, value in zip(parameters, halfway, strict=True)]
        _go_on(parameters, way, _REPEATED)
        looks = [view.losses for view in views]
        return Outlook(
            before=before,
            first=first,
            second=second,
            after=looks[-1],
            everywhere=_mean(looks),
            ahead=_look(trial, shown),
            moved=moved,
            readable=readable([(view.inputs, view.pulled) for view in views]),
            rate=max(float(group.get("lr", math.nan)) for group in optimizer.param_groups),
        )


def _walk(setup: Setup, optimizer: Optimizer, batches: Iterable[Batch]) -> Losses:
    """Step on each batch; the means of the losses before each step."""
    met = []
    for batch in batches:
        own, others = _compare(setup, batch)
        set_gradients(setup, optimizer, own)
        optimizer.step()
        met.append((own.item(), others))
    return Losses(*(sum(losses) / len(met) for losses in zip(*met, strict=True)))


def _mean(met: Sequence[Losses]) -> Losses:
    parts = zip(*((losses.own, losses.others, losses.alignment) for losses in met), strict=True)
    return Losses(*(sum(part) / len(met) for part in parts))


@dataclass(frozen=True, eq=False)
class _View:
    """A batch as the network sees it: [samples, numbers] each, or None where that cannot be had."""

    losses: Losses
    inputs: Tensor | None
    pulled: Tensor | None


def _look(setup: Setup, batch: Batch) -> Losses:
    return _view(setup, batch, []).losses


def _view(setup: Setup, batch: Batch, inputs: list[Tensor]) -> _View:
    """Look at a batch without stepping on it.

    Args:
        inputs: what the last layer with weights gets is found here at its end, while it is watched.
    """
    given = setup.loss_fn
    assert given is not None
    met: list[tuple[Any, Any]] = []

    def loss_fn(output: Any, target: Any) -> Tensor:
        met[:] = [(output, target)]  # those of other samples come first
        return given(output, target)

    watched = replace(setup, loss_fn=loss_fn)
    try:
        with torch.no_grad():
            own, others = _compare(watched, batch)
    except RuntimeError:  # a model or loss that takes gradients itself
        own, others = _compare(watched, batch)
    output, target = met[-1]
    pulled = pulls(given, output, target)
    alignment = math.nan if pulled is None else cosine(centered(output), pulled)
    return _View(Losses(own.item(), others, alignment), centered(inputs[-1]) if inputs else None, pulled)


def _first_rows(batch: Batch) -> Batch:
    """The first samples, if all parts of the batch are tensors of as many rows."""
    inputs, target = split(batch)
    parts = (*inputs, target)
    alike = all(isinstance(part, Tensor) and part.dim() and len(part) == len(target) for part in parts)
    return tuple(part[:_ROWS] for part in parts) if alike else batch


def _values(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in parameters]


def _norm(values: Sequence[Tensor]) -> float:
    return nn.utils.get_total_norm(values).item()


@torch.no_grad()
def _distance(parameters: Sequence[Tensor], start: Sequence[Tensor]) -> float:
    return _norm([p - value for p, value in zip(parameters, start, strict=True)])


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

    seed_noise(0)
    own = replace(setup, loss_fn=loss_fn).loss(untouched(batch))
    return own, sum(others) / len(others)


def _shifts(target: object) -> list[int]:
    """How far targets are moved along the batch: up to four different ways."""
    rows = len(target) if isinstance(target, Tensor) and target.dim() else 0
    return sorted({rows * k // 5 for k in range(1, 5)} - {0})


_FRACTIONS = (0.25, 1.0, 4.0)
_SMALLEST, _LARGEST, _ROUNDING = 4.0**-6, 4.0**20, 1e-6
_PATIENCE = 40
"""Where steps overshoot, so many of them show whether the loss falls after all."""


def _backward(setup: Setup, optimizer: Optimizer, batch: Batch) -> float:
    """The loss; its gradients go to the parameters."""
    loss = seeded_loss(setup, batch)
    set_gradients(setup, optimizer, loss)
    return loss.item()


def _line(setup: Setup, step: Step, batch: Batch, before: float) -> tuple[tuple[float, float], ...]:
    """(fraction, loss) along a step, shorter and longer until the loss rises at both ends."""
    if not step.moves:
        return tuple((fraction, before) for fraction in _FRACTIONS)

    def loss_at(fraction: float) -> float:
        step.go(fraction)
        return _tried(lambda: seeded_loss(setup, batch).item())  # with gradients, as some losses take some

    line = {fraction: loss_at(fraction) for fraction in _FRACTIONS}
    while (fraction := _further(line, before)) is not None:
        line[fraction] = loss_at(fraction)
    step.go(0.0)
    return tuple(sorted(line.items()))


def _further(line: Mapping[float, float], before: float) -> float | None:
    """The next fraction to try, beyond the end where the loss is lowest; None if it is at neither.

    A shorter one as well while every one raises the loss, or while they lower it alike: then they have all
    leapt over the slope, onto a plateau such as that of dead units.

    >>> _further({0.5: 2.0, 1.0: 1.0}, 3.0), _further({0.5: 1.0, 1.0: 1.5, 2.0: math.nan}, 3.0)
    (4.0, 0.125)
    >>> _further({0.5: 2.0, 1.0: 1.0}, 0.5), _further({0.5: 1.0, 1.0: 1.0}, 2.0)
    (0.125, 0.125)
    >>> _further({0.5: 2.0, 1.0: 1.0, 2.0: 1.5}, 3.0), _further({0.5: 1.0, 1.0: 1.0}, 1.0)
    (None, 4.0)
    """
    fractions = sorted(line)
    losses = [loss if math.isfinite(loss := line[fraction]) else math.inf for fraction in fractions]
    slack, lowest = _ROUNDING * abs(before), min(losses)
    still = max(losses) - lowest <= slack
    lost = lowest > before + slack or (still and lowest < before - slack)
    if (lost or losses[0] < min(losses[1:], default=-math.inf)) and fractions[0] > _SMALLEST:
        return fractions[0] / 4
    on = still or losses[-1] < min(losses[:-1], default=math.inf)
    return 4 * fractions[-1] if on and not lost and fractions[-1] < _LARGEST else None


def _tried(loss: Callable[[], float]) -> float:
    """A loss of changed weights; infinite where the user's code refuses what they make.

    >>> _tried(lambda: 1 / 0)
    inf
    """
    try:
        return loss()
    except Exception as error:  # argument checks, assertions, factorizations: the first loss was sound
        if out_of_memory(error):
            raise
        return math.inf
